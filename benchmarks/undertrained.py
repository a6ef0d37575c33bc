"""How right the flag *undertrained* is: half budgets that it judges, and what the other half then brought.

    python benchmarks/undertrained.py NAME=SWEEP_DIR [NAME=SWEEP_DIR ...]

Reads sweeps of trunks with branches at a quarter and at half of the budget. A half budget, decayed, is flagged by the
quarter before it, as a run of that budget would be; then it is seen whether the whole budget brought more on validation
cells than the noise between seeds: the standard deviation of runs of one setting, pooled over settings. Results go to
reports/benchmarks/undertrained.json; nothing here judges them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from machine import machine, say

from scaling_ray.results.read import read_rows
from scaling_ray.results.references import read_closed_form, reference_name
from scaling_ray.results.sweep_files import SweepFiles
from scaling_ray.results.write import is_undertrained
from scaling_ray.storage import open_place, write_json

QUARTER, HALF = 0.25, 0.5


def judged(sweep: Path) -> dict[str, Any]:
    """Flags of the half budgets of a sweep's grid, and how many of each kind gained more than the noise."""
    files = SweepFiles.at(sweep)
    train_cells = files.known_manifest().splits["train"].cells
    losses = defaultdict(list)
    runs: list[dict[str, Any]] = []
    for row in read_rows(open_place(sweep)):
        run, result = files.run(row.run_id).spec(), files.run(row.run_id).result()
        if row.role != "law" or run is None or result is None or result.stop_reason != "budget":
            continue
        val = {branch.share: branch.val_loss for branch in result.branches}
        known = read_closed_form(files.references, reference_name(run, train_cells))
        if not {QUARTER, HALF} <= set(val) or known is None:
            continue
        losses[row.size, row.cells].append(result.val_loss)
        flagged = is_undertrained(val[QUARTER], val[HALF], known["val_gene_mean_loss"])
        drop = known["val_gene_mean_loss"] - result.val_loss
        runs.append({"run_id": row.run_id, "flagged": flagged, "gain": val[HALF] - result.val_loss, "drop": drop})
    repeated = [seeds for seeds in losses.values() if len(seeds) > 1]
    freedom = sum(len(seeds) - 1 for seeds in repeated)
    if not freedom:
        raise SystemExit(
            f"{sweep}: no setting has two runs with branches at {QUARTER} and {HALF} that used their budget"
        )
    noise = math.sqrt(sum((len(seeds) - 1) * statistics.variance(seeds) for seeds in repeated) / freedom)
    kinds = {}
    for name, flag in (("flagged", True), ("not flagged", False)):
        gains = [run["gain"] for run in runs if run["flagged"] is flag]
        kinds[name] = {
            "runs": len(gains),
            "gained_more_than_noise": sum(gain > noise for gain in gains),
            "median_gain": statistics.median(gains) if gains else None,
        }
    return {
        "noise": noise,
        "median_drop": statistics.median(run["drop"] for run in runs),
        "kinds": kinds,
        "runs": runs,
    }


def main() -> int:
    """Judge the flags of some sweeps and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", metavar="NAME=SWEEP_DIR")
    parser.add_argument("--results", type=Path, default=Path("reports/benchmarks/undertrained.json"))
    options = parser.parse_args()
    for named in options.sweeps:
        name, _, where = named.partition("=")
        found = judged(Path(where))
        for kind, counts in found["kinds"].items():
            gained = f"{counts['gained_more_than_noise']} of {counts['runs']}"
            say(f"{name}: {gained} {kind} gained more than {found['noise']:.4f}")
        text = options.results.read_text() if options.results.is_file() else "{}"
        write_json(options.results, json.loads(text) | {name: found | {"machine": machine()}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
