"""Draw the two pictures of the README from kept tables, by the project's own fit and figures.

    python docs/draw.py [OUT_DIR]

``tables/known-law.csv`` holds made runs, drawn here from a law that is known (alpha 0.30, floor 0.20), so that a fit of
it can be right or wrong. The other picture is of the kept bone-marrow sweep.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from scaling_ray.report.figures import Chart, Level, Series, draw
from scaling_ray.report.svg import standalone
from scaling_ray.results.foreign import read_table
from scaling_ray.results.table_fit import fit_read_table

HERE = Path(__file__).resolve().parent
KNOWN = HERE / "tables" / "known-law.csv"
MARROW = HERE.parent / "reports" / "real-bone-marrow"
WIDTH, HEIGHT = 470, 330
ALPHA, SCALE, FLOOR, NOISE, SEEDS = 0.30, 2.0, 0.20, 0.002, 3
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)


def known_law() -> list[tuple[int, int, float]]:
    """(parameters, seed, loss) of made runs: SCALE P^-ALPHA + FLOOR with normal noise."""
    noise = np.random.default_rng(30).normal(0.0, NOISE, (len(SIZES), SEEDS))
    return [
        (params, seed + 1, round(SCALE * params**-ALPHA + FLOOR + float(noise[i, seed]), 5))
        for i, params in enumerate(SIZES)
        for seed in range(SEEDS)
    ]


def write_known_law(path: Path) -> None:
    """The made runs as a table that ``scaling-ray fit`` reads."""
    with path.open("w", newline="") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(("params", "seed", "loss"))
        rows.writerows(known_law())


def answered() -> str:
    """The made runs, the fitted law, and the next size with its interval."""
    fit = fit_read_table(read_table(KNOWN))
    with KNOWN.open() as file:
        points = [(float(row["params"]), float(row["loss"])) for row in csv.DictReader(file)]
    (curve,) = fit["curves"]
    line = list(zip(curve["params"], curve["loss"], strict=True))
    runs = Series("runs", points, curve=line, forecasts=_next_size(fit), joined=False)
    return standalone(draw(Chart("A law that is supported", "parameters P", "loss", [runs]), WIDTH, HEIGHT))


def refused() -> str:
    """The kept bone-marrow sweep at its largest number of cells: no law, and a prediction all the same."""
    fit = json.loads((MARROW / "fit.json").read_text())
    with (MARROW / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["role"] == "law" and row["status"] == "done"]
    most = max(int(row["cells"]) for row in rows)
    here = [row for row in rows if int(row["cells"]) == most]
    points, hollow = (
        [(float(row["params"]), float(row["test_loss"])) for row in here if (row["size"] == "XXS") == is_anchor]
        for is_anchor in (False, True)
    )
    mean, gaussian = (float(np.mean([float(r[name]) for r in here])) for name in ("baseline_loss", "gaussian_loss"))
    runs = Series("runs", points, hollow=hollow, forecasts=_next_size(fit))
    levels = [Level("gene mean", mean), Level("Gaussian", gaussian)]
    return standalone(draw(Chart("A law that is refused", "parameters P", "test mse", [runs], levels), WIDTH, HEIGHT))


def _next_size(fit: dict[str, Any]) -> list[tuple[float, float, float | None, float | None]]:
    entries = fit["headline"]["predictions"]["entries"]
    return [(e["params"], e["value"], e["low"], e["high"]) for e in entries if e["what"] == "the next size"]


def main(out: Path) -> None:
    """Write the table and both pictures."""
    write_known_law(KNOWN)
    (out / "law-answered.svg").write_text(answered(), encoding="utf-8")
    (out / "law-refused.svg").write_text(refused(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "pictures")
