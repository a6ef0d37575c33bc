"""The published law, re-read: the reported figures, and those that the same runs support.

Needs the two run tables of ``reports/published`` (arXiv 2602.15253 and its released code; figures only) and nothing
else. The study's own estimator is repeated to the digit; then the same 18 runs are fitted by least squares under every
choice that an analyst could have declared, and the spread of those answers is the result.
"""

from __future__ import annotations

import csv
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from scaling_ray.errors import BadInput
from scaling_ray.laws import gates, units
from scaling_ray.laws.contrasts import contrasts
from scaling_ray.laws.entries import parameter
from scaling_ray.laws.fit import Floats
from scaling_ray.laws.forms import POWER_FLOOR
from scaling_ray.laws.intervals import union
from scaling_ray.laws.law import Fitted, fit_law
from scaling_ray.laws.points import Agreement, Rows, where
from scaling_ray.laws.protocol import protocol_gates
from scaling_ray.laws.published import EDGE, PublishedFit, published_grid
from scaling_ray.laws.verdict import judge

FORMAT = 2
SOURCE = "arXiv 2602.15253 (February 2026; revised for TMLR, April 2026) and the run tables released with it"
CANONICAL, ALL_RUNS = "canonical_v512.csv", "all_runs.csv"
GENE_MEAN_MSE = 1.875  # the study's own, on its validation cells
REPORTED_TOKENS = 983e6
WIDTHS = {"XXS": 1, "TINY": 16, "XS": 64, "S": 128, "M": 512, "L": 1020}
EDGE_STEPS = 10_001  # fine enough that only the edge matters, and not where the study's 200 steps happen to fall
EDGES = (0.90, 0.95, 0.98, 0.99, 0.995, 0.999)

_THIRTY_THOUSAND_STEPS = "sweep_gpu_census200k"  # the three runs that make 21 of the 18
_FIFTY_THOUSAND_CELLS = "sweep_gpu_census50k"


def published_directory(given: Path | None = None) -> Path:
    """Directory of the published tables: the one given, that of the checkout, or that of an installation.

    Raises:
        BadInput: in none of these places.
    """
    package = Path(__file__).resolve().parents[1]
    places = [package.parent / "reports" / "published"]
    places += [Path(sysconfig.get_path("data")) / "share" / "scaling-ray" / "published"]
    places += [package.parent / "share" / "scaling-ray" / "published"]
    for place in [given] if given else places:
        if all((place / name).is_file() for name in (CANONICAL, ALL_RUNS)):
            return place
    where_looked = str(given) if given else ", ".join(str(place) for place in places)
    raise BadInput("T001", "published", where_looked, f"does not hold {CANONICAL} and {ALL_RUNS}; name their directory")


def audit(directory: Path | None = None) -> dict[str, Any]:
    """The content of ``audit.json``.

    Args:
        directory: of the two tables; found where the package is installed if None.

    Raises:
        BadInput: the tables are not there, or lack a column.
    """
    directory = published_directory(directory)
    runs, pooled = _read(directory / CANONICAL), _read(directory / ALL_RUNS)
    rows: Rows = {
        "params": _column(runs, "params"),
        "loss": _column(runs, "best_val_mse"),
        "final": _column(runs, "final_val_mse"),
        "size": np.array([run["size"] for run in runs]),
        "seed": np.array([run["seed"] for run in runs]),
    }
    as_published = published_grid(rows["params"], rows["loss"])
    fits = _choices(rows)
    choices = [_published_choice("as published, 18 runs", as_published)]
    choices += [_choice(name, fit) for name, fit in fits.items()]
    values = [fit.parameters["alpha"] for fit in fits.values()]
    floors = [fit.parameters["c"] for fit in fits.values()]
    return {
        "format": FORMAT,
        "source": SOURCE,
        "published": {
            "alpha": as_published.alpha,
            "a": as_published.a,
            "c": as_published.c,
            "r2_log": as_published.r2_log,
            "c_at_bound": as_published.c_at_bound,
            "estimator": f"c scanned over [0, {EDGE} min(L)], log(L - c) regressed on log P, highest R2",
            "entropy_bits": units.shared_gaussian_bits(as_published.c),
        },
        "supported": {
            "verdict": "refused",
            "reasons": _reasons(rows, as_published, fits),
            "settles": _settles(),
            "can_be_said": _what_can_be_said(rows),
            "alpha": {"low": min(values), "high": max(values), "what": "least squares over the declared choices"}
            | _union(fits, "alpha"),
            "c": {"low": min(floors), "high": max(floors), "what": "least squares over the declared choices"}
            | _union(fits, "c"),
        },
        "choices": choices,
        "rows": [
            *_reproductions(rows, pooled, as_published),
            *_edge_rows(rows),
            *_size_rows(rows),
            *_budget_rows(runs),
            *_best_of_noise_rows(rows),
            *_pooled_rows(pooled),
        ],
    }


def _choices(rows: Rows) -> dict[str, Fitted]:
    """Least squares under each declared choice; the order is that of the page."""
    xxs, largest = rows["size"] == "XXS", rows["size"] == "L"
    embedding = np.array([512.0 * WIDTHS[size] for size in rows["size"]])
    without_embedding = {**rows, "params": rows["params"] - embedding}
    converged = {**rows, "loss": np.where(xxs, GENE_MEAN_MSE, rows["loss"])}
    final = {**rows, "loss": rows["final"]}
    tables = {
        "all 18 runs": rows,
        "without XXS": where(rows, ~xxs),
        "TINY to M (without XXS and L)": where(rows, ~xxs & ~largest),
        "without L": where(rows, ~largest),
        f"XXS set to the gene mean ({GENE_MEAN_MSE}) it should have converged to": converged,
        "final losses instead of the best of 61": final,
        "final losses, without XXS": where(final, ~xxs),
        "parameters counted without the gene embedding": without_embedding,
        "parameters without the gene embedding, without XXS": where(without_embedding, ~xxs),
    }
    return {name: fit_law(POWER_FLOOR, table, thorough=False, plain=True) for name, table in tables.items()}


def _choice(name: str, fit: Fitted) -> dict[str, Any]:
    shown = ("value", "low", "high", "closed", "at_bound")
    entry: dict[str, Any] = {"name": name, "estimator": "least_squares", "runs": fit.points.n_runs}
    entry["sizes"] = int(fit.points.distinct("params").size)
    for parameter_name in ("alpha", "c"):
        found = parameter(fit, parameter_name)
        entry[parameter_name] = {key: found[key] for key in shown}
    return entry


def _published_choice(name: str, fit: PublishedFit) -> dict[str, Any]:
    blank = {"low": None, "high": None, "closed": False}
    return {
        "name": name,
        "estimator": "published_grid",
        "runs": 18,
        "sizes": 6,
        "alpha": {"value": fit.alpha, **blank, "at_bound": False},
        "c": {"value": fit.c, **blank, "at_bound": fit.c_at_bound},
    }


def _union(fits: dict[str, Fitted], name: str) -> dict[str, float | None]:
    """The union of all choices' 95% profiles; an end is None where one of them is open."""
    interval = union([fit.intervals[name] for fit in fits.values()])
    return {"union_low": interval.low, "union_high": interval.high}


def _reasons(rows: Rows, as_published: PublishedFit, fits: dict[str, Fitted]) -> list[str]:
    reasons = []
    if as_published.c_at_bound:
        reasons.append(
            f"the reported floor {as_published.c:.4f} is the edge of its own search, {EDGE} x the smallest loss "
            f"{np.min(rows['loss']):.4f}; the reported alpha follows that edge"
        )
    disagreement = gates.choices_gate([{"value": fit.parameters["alpha"]} for fit in fits.values()])
    values = [fit.parameters["alpha"] for fit in fits.values()]
    if disagreement:
        reasons.append(disagreement[0].reason)
    else:
        of_all = next(iter(fits.values())).intervals["alpha"]
        reasons.append(
            f"the choice of runs, of P and of best or final loss moves alpha from {min(values):.2f} to "
            f"{max(values):.2f}, where the 95% interval of all 18 runs is {of_all.low:.3f} to {of_all.high:.3f}: "
            "seed noise is not what is open here"
        )
    everyone = {name: column for name, column in rows.items() if name in ("params", "loss", "size")}
    beside_mean = everyone | {"baseline_loss": np.full(rows["loss"].size, GENE_MEAN_MSE)}
    with_xxs = fit_law(POWER_FLOOR, everyone, only=("alpha", "c"))
    without = fit_law(POWER_FLOOR, where(everyone, rows["size"] != "XXS"), only=("alpha", "c"))
    reasons += [f"with XXS: {reason}" for reason in judge(with_xxs, protocol_gates(beside_mean, Agreement())).reasons]
    reasons += [f"without XXS: {reason}" for reason in judge(without, []).reasons]
    return reasons


def _what_can_be_said(rows: Rows) -> list[str]:
    """What the runs show without any law: what each step in size bought, XXS left out as an anchor."""
    points = where(rows, rows["size"] != "XXS")
    names = dict(zip(points["params"].tolist(), points["size"].tolist(), strict=True))
    bought = contrasts({"params": points["params"], "loss": points["loss"]}, "params", names, None)
    found = [bought["sentence"]] if bought["sentence"] else []
    for step in bought["neighbours"]:
        within = ": within the noise of three seeds" if step["low"] <= 0 <= step["high"] else ""
        found.append(
            f"{step['from_name']} to {step['to_name']} changed the loss by {-step['gain']:+.3f} "
            f"({-step['high']:+.3f} to {-step['low']:+.3f}, 95%, all steps at once){within}."
        )
    return found


def _settles() -> list[str]:
    return [
        "XXS trained to convergence and shown as an anchor size, and two or more sizes between TINY and L",
        "learning rates chosen per size, and budgets until validation stops each size",
        "a loss that is not the best of noisy evaluations: fixed masks, the final or averaged weights",
        "validation and test cells kept out of training",
    ]


def _row(finding: int, name: str, value: Any, reported: Any, says: str) -> dict[str, Any]:
    return {"finding": finding, "name": name, "value": value, "reported": reported, "says": says}


def _reproductions(rows: Rows, pooled: list[dict[str, str]], first: PublishedFit) -> list[dict[str, Any]]:
    def entry(name: str, fit: PublishedFit, reported: dict[str, float], says: str) -> dict[str, Any]:
        value = {"alpha": fit.alpha, "a": fit.a, "c": fit.c, "r2_log": fit.r2_log, "c_at_bound": fit.c_at_bound}
        return _row(1, name, value, reported, says)

    more = [run for run in pooled if run["group"] == _THIRTY_THOUSAND_STEPS]
    params = np.r_[rows["params"], _column(more, "params")]
    twenty_one = published_grid(params, np.r_[rows["loss"], _column(more, "val_mse")])
    wide = [run for run in pooled if run["genes"] == "1024"]
    data_limited = published_grid(_column(wide, "params"), _column(wide, "val_mse"))
    return [
        entry(
            "published estimator, 18 runs",
            first,
            {
                "alpha": 0.26642859805500463,
                "a": 2.1527631574716932,
                "c": 1.4437577651696205,
                "r2_log": 0.8579791737782294,
            },
            "the repository's figures, to the last digit",
        ),
        entry(
            "published estimator, 21 runs",
            twenty_one,
            {"alpha": 0.23368046, "c": 1.43650270, "r2_log": 0.82292663},
            "arXiv v1: the 18 and the three runs of 30,000 steps (XS, S, M)",
        ),
        entry(
            "published estimator, pooled V = 1,024",
            data_limited,
            {"alpha": 0.00878544, "c": 0.11261814},
            f"all {len(wide)} runs at 1,024 genes, whatever their cells, rate and budget",
        ),
    ]


def _edge_rows(rows: Rows) -> list[dict[str, Any]]:
    found = []
    for edge in EDGES:
        fit = published_grid(rows["params"], rows["loss"], edge=edge, steps=EDGE_STEPS)
        where_c = "on the edge" if fit.c_at_bound else "inside"
        found.append(
            _row(
                1,
                f"edge of the search at {edge} min(L)",
                {"alpha": fit.alpha, "c": fit.c, "c_at_bound": fit.c_at_bound},
                None,
                f"alpha {fit.alpha:.3f}, c {fit.c:.4f} {where_c}",
            )
        )
    bits = units.shared_gaussian_bits(float(found[EDGES.index(EDGE)]["value"]["c"]))
    says = f"{bits:.2f} bits per masked gene is the edge of that search in other units"
    return [*found, _row(1, "entropy of the floor", bits, 2.30, says)]


def _size_rows(rows: Rows) -> list[dict[str, Any]]:
    losses = rows["loss"][rows["size"] == "XXS"]
    xxs = _row(
        4,
        "XXS against the mean of each gene",
        {"low": float(losses.min()), "high": float(losses.max()), "gene_mean": GENE_MEAN_MSE},
        None,
        f"the smallest point of the law ({losses.min():.2f} to {losses.max():.2f}) is worse than predicting each "
        f"gene's mean ({GENE_MEAN_MSE}): an undertrained mean, not a size",
    )
    medium, large = (rows["loss"][rows["size"] == size] for size in ("M", "L"))
    worse = int(np.sum(large > medium))
    text = f"L (five times M) is worse than M for {worse} of {large.size} seeds: one constant rate for every size"
    value = {"M": [float(v) for v in medium], "L": [float(v) for v in large], "worse": worse}
    return [xxs, _row(5, "L against M, seed by seed", value, None, text)]


def _budget_rows(runs: list[dict[str, str]]) -> list[dict[str, Any]]:
    micro = float(runs[0]["micro_steps"]) * float(runs[0]["micro_batch"])
    updates, passes = float(runs[0]["micro_steps"]) / float(runs[0]["accumulation"]), micro / float(runs[0]["cells"])
    tokens = micro * float(runs[0]["genes"])
    says = (
        f"60,000 steps are micro-batches of 4: {micro:,.0f} cells seen, {passes:.1f} passes, {updates:,.0f} updates, "
        f"{tokens / 1e6:.0f}M tokens where {REPORTED_TOKENS / 1e6:.0f}M were reported"
    )
    value = {"cells_seen": micro, "epochs": passes, "optimizer_steps": updates, "tokens": tokens}
    return [_row(7, "budget of every run", value, {"tokens": REPORTED_TOKENS}, says)]


def _best_of_noise_rows(rows: Rows) -> list[dict[str, Any]]:
    gaps = {}
    for size in WIDTHS:
        here = rows["size"] == size
        gaps[size] = float(np.mean(rows["final"][here] - rows["loss"][here]))
    says = "final minus best of 61 noisy evaluations: " + ", ".join(f"{s} {v:.3f}" for s, v in gaps.items())
    return [_row(10, "bias of the best of 61", gaps, None, says + "; the bias grows with the size")]


def _pooled_rows(pooled: list[dict[str, str]]) -> list[dict[str, Any]]:
    wide = [run for run in pooled if run["genes"] == "1024"]
    rates, best = _column(wide, "lr"), _column(wide, "best_micro_step")
    mixed = {
        "runs": len(wide),
        "learning_rates": sorted(set(rates.tolist())),
        "fewest_steps": float(best.min()),
        "most_steps": float(best.max()),
    }
    text = (
        f"the data-limited fit pools {len(wide)} runs with {len(set(rates.tolist()))} learning rates "
        f"({rates.min():.1e} to {rates.max():.1e}) and best steps from {best.min():,.0f} to {best.max():,.0f}"
    )
    alone = [run for run in pooled if run["group"] == _FIFTY_THOUSAND_CELLS]
    losses = {run["size"]: float(run["val_mse"]) for run in sorted(alone, key=lambda run: float(run["params"]))}
    says = "its three runs at 50,000 cells alone fall with size: " + ", ".join(
        f"{s} {v:.3f}" for s, v in losses.items()
    )
    return [_row(11, "runs pooled at V = 1,024", mixed, None, text), _row(11, "50,000 cells alone", losses, None, says)]


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def _column(runs: list[dict[str, str]], name: str) -> Floats:
    """A column as float64 (R,).

    Raises:
        BadInput: the column is not there, or holds something that is no number.
    """
    try:
        return np.array([float(run[name]) for run in runs])
    except (KeyError, ValueError) as error:
        raise BadInput(
            "T002", name, str(error), "the published tables need this column, in numbers; restore them"
        ) from error
