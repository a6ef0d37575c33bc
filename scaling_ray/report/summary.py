"""From runs and a fit to the content of ``report.json``: counts, the grid over seeds, protocol, verdict in words."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from scaling_ray.laws import units
from scaling_ray.report.runs import Run, finite, is_baseline, mean, values

FORMAT = 1


def summarise(
    name: str,
    spec: dict[str, Any],
    runs: list[Run],
    manifest: dict[str, Any],
    fit: dict[str, Any],
    genes: int,
    curves: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Everything the page says, as plain values.

    Args:
        name: of the sweep where its specification gives none.
        spec: the sweep's specification, empty where unknown.
        runs: all of them, finished or not.
        manifest: of the shards.
        fit: the first cohort's, from :func:`scaling_ray.laws.fit_table`.
        genes: of the first cohort.
        curves: run id -> evaluations.
    """
    stamps = [row["timestamp_ms"] for rows in curves.values() for row in rows if finite(row.get("timestamp_ms"))]
    grid = [run for run in runs if run["role"] == "law"]
    done = [run for run in grid if run["status"] == "done"]
    head = fit["headline"]
    best = min((r for r in done if r["genes"] == genes and r["val_mse"]), key=lambda r: r["val_mse"], default=None)
    return {
        "format": FORMAT,
        "name": spec.get("name", name),
        "date": datetime.fromtimestamp(max(stamps) / 1000, UTC).date().isoformat() if stamps else None,
        "verdict": head["verdict"],
        "sentence": _sentence(head, fit),
        "headline": head,
        "best": _describe(best) if best else None,
        "counts": _counts(grid, manifest),
        "leak_test": _leak_test(done),
        "cells": _cells(grid),
        "runs": runs,
        "fits": fit["fits"],
        "choices": fit["choices"],
        "leave_one_out": fit["leave_one_out"],
        "held_out_largest": fit["held_out_largest"],
        "baselines": fit["baselines"],
        "learning_rates": _learning_rates(runs),
        "units": {
            "entropy": {"name": units.ENTROPY_NAME, "formula": units.ENTROPY_FORMULA},
            "gain": {"name": units.GAIN_NAME, "formula": units.GAIN_FORMULA},
            "share": {"name": units.SHARE_NAME, "formula": units.SHARE_FORMULA},
        },
        "data": manifest,
        "protocol": _protocol(grid, spec),
        "needs": [*head["settles"], *_unfinished(grid)],
        "notes": fit["notes"],
        "excluded": fit["excluded"],
        "columns_used": fit.get("columns_used", {}),
    }


def _sentence(head: dict[str, Any], fit: dict[str, Any]) -> str:
    """The verdict in words: what the runs support, or why they do not."""
    supported = [f for f in fit["fits"] if f["verdict"] == "supported" and f["form"] != "constant"]
    if head["verdict"] == "supported":
        what = "size and data" if head["form"] == "params_cells" else "size"
        return f"Supported: within the sizes trained here, the loss falls with {what} as {head['formula']}."
    more = len(head["reasons"]) - 1
    rest = "" if not more else f" (and {more} more reason{'s' if more > 1 else ''}, below)"
    aside = ""
    if any(f["form"] == "power_floor" for f in supported):
        aside = " A part of the table, fitted alone, does support a law: see the fits."
    return f"Refused: these runs do not determine a scaling exponent, because {head['reasons'][0]}{rest}.{aside}"


def _describe(run: Run) -> dict[str, Any]:
    """One run's losses, and what they are worth against the lines beside them."""
    mse, gene_mean = run["test_mse"], run["baseline_mse"]
    floors = {"attainable_floor": run["attainable_mse"], "shrunk_gaussian": run["gaussian_mse"]}
    keys = (
        "run_id",
        "size",
        "params",
        "genes",
        "cells",
        "seed",
        "lr",
        "val_mse",
        "test_mse",
        "baseline_mse",
        "gaussian_mse",
    )
    more = ("attainable_mse", "bound_mse", "attainable_bits", "bound_bits", "bound_z", "cells_seen", "mlflow_run_id")
    worth: dict[str, Any] = {key: run[key] for key in keys + more}
    worth["share_of_gap"] = {floor: _share(mse, gene_mean, value) for floor, value in floors.items()}
    worth["entropy_bits"] = units.shared_gaussian_bits(mse) if mse else None
    worth["gain_bits"] = {
        "over_gene_mean": _gain(mse, gene_mean),
        "over_shrunk_gaussian": _gain(mse, run["gaussian_mse"]),
    }
    worth["ratio_to_gaussian"] = mse / run["gaussian_mse"] if mse and run["gaussian_mse"] else None
    return worth


def _counts(grid: Sequence[Run], manifest: dict[str, Any]) -> dict[str, Any]:
    states: dict[str, int] = {}
    for run in grid:
        states[run["status"]] = states.get(run["status"], 0) + 1
    return {
        "runs": states,
        "sizes": len({run["params"] for run in grid}),
        "data_sizes": len({(run["cells"], run["cells_requested"]) for run in grid}),
        "seeds": len({run["seed"] for run in grid}),
        "groups": {split: len(entry.get("groups") or []) for split, entry in manifest["splits"].items()},
    }


def _leak_test(done: Sequence[Run]) -> dict[str, Any] | None:
    scores = [(run["bound_z"], run["run_id"]) for run in done if run["bound_z"] is not None]
    if not scores:
        return None
    lowest = min(scores)
    return {"runs": len(scores), "lowest_z": lowest[0], "run_id": lowest[1], "limit": -4.0, "passed": lowest[0] >= -4.0}


def _cells(grid: Sequence[Run]) -> list[dict[str, Any]]:
    """The grid gathered over seeds: means, standard deviations, and the runs behind each cell."""
    keys = sorted(
        {(r["genes"], r["params"], r["size"], r["cells"] or 0, str(r["cells_requested"] or "")) for r in grid}
    )
    table = []
    for genes, params, size, cells, requested in keys:
        members = [
            r
            for r in grid
            if (r["genes"], r["params"], r["size"], r["cells"] or 0, str(r["cells_requested"] or ""))
            == (genes, params, size, cells, requested)
        ]
        done = [r for r in members if r["status"] == "done"]
        mse, gene_mean = mean(done, "test_mse"), mean(done, "baseline_mse")
        floor = mean(done, "attainable_mse")
        table.append(
            {
                "size": size,
                "params": params,
                "genes": genes,
                "cells": cells or None,
                "cells_requested": requested or None,
                "baseline_size": is_baseline(members[0]),
                "runs": len(members),
                "done": len(done),
                "lr": sorted({r["lr"] for r in done if r["lr"] is not None}),
                "test_mse": mse,
                "test_mse_sd": _sd(done, "test_mse"),
                "val_mse": mean(done, "val_mse"),
                "baseline_mse": gene_mean,
                "gaussian_mse": mean(done, "gaussian_mse"),
                "attainable_mse": floor,
                "gain_bits": _gain(mse, gene_mean),
                "share_to_gaussian": _share(mse, gene_mean, mean(done, "gaussian_mse")),
                "share_to_attainable": _share(mse, gene_mean, floor),
                "cells_seen": mean(done, "cells_seen"),
                "wall_seconds": mean(done, "wall_seconds"),
                "undertrained": sum(1 for r in done if r["undertrained"]),
                "not_better_than_gene_mean": bool(mse and gene_mean and mse >= gene_mean),
                "run_ids": [r["run_id"] for r in members],
            }
        )
    return table


def _share(mse: float | None, baseline: float | None, floor: float | None) -> float | None:
    return units.share_of_gap(mse, baseline, floor) if mse and baseline and floor else None


def _gain(mse: float | None, baseline: float | None) -> float | None:
    return units.gain_bits(mse, baseline) if mse and baseline else None


def _sd(runs: Iterable[Run], name: str) -> float | None:
    known = values(runs, name)
    return statistics.stdev(known) if len(known) > 1 else None


def _learning_rates(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per size: the rates tried with their validation loss, the one the grid used, and whether it is an edge."""
    table = []
    for genes, params, size in sorted({(r["genes"], r["params"], r["size"]) for r in runs}):
        here = [r for r in runs if (r["genes"], r["size"]) == (genes, size)]
        tried = sorted(
            (r["lr"], r["val_mse"], r["status"]) for r in here if r["role"] == "rate" and r["lr"] is not None
        )
        used = sorted({r["lr"] for r in here if r["role"] == "law" and r["lr"] is not None})
        edges = [r["lr_at_edge"] for r in here if r["role"] == "law" and r["lr_at_edge"] is not None]
        table.append(
            {
                "genes": genes,
                "size": size,
                "params": params,
                "tried": [{"lr": lr, "val_mse": val, "status": status} for lr, val, status in tried],
                "used": used,
                "at_edge": any(edges) if edges else None,
            }
        )
    return table


def _protocol(grid: Sequence[Run], spec: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for params, size in sorted({(r["params"], r["size"]) for r in grid}):
        here = [r for r in grid if r["size"] == size]
        done = [r for r in here if r["status"] == "done"]
        epochs = [r["cells_seen"] / r["cells"] for r in done if r["cells_seen"] and r["cells"]]
        rows.append(
            {
                "size": size,
                "params": params,
                "max_cells_seen": sorted({r["max_cells_seen"] for r in here if r["max_cells_seen"] is not None}),
                "mean_cells_seen": mean(done, "cells_seen"),
                "epochs_low": min(epochs, default=None),
                "epochs_high": max(epochs, default=None),
                "optimizer_steps": mean(done, "optimizer_steps"),
                "flops": mean(done, "flops"),
                "done": len(done),
                "stopped_early": sum(1 for r in done if r["stop_reason"] not in (None, "budget")),
                "undertrained": sum(1 for r in done if r["undertrained"]),
            }
        )
    same = {
        name: sorted({str(r[name]) for r in grid if r[name] is not None})
        for name in ("recipe", "objective", "schedule")
    }
    return {
        "sizes": rows,
        **same,
        "train": spec.get("train", {}),
        "grid": spec.get("grid", {}),
        "lr": spec.get("lr", {}),
    }


def _unfinished(grid: Sequence[Run]) -> list[str]:
    left: dict[str, int] = {}
    for run in grid:
        if run["status"] != "done":
            state = f"failed ({run['failure']})" if run["status"] == "failed" and run["failure"] else run["status"]
            left[state] = left.get(state, 0) + 1
    return [f"{count} run{'s' if count > 1 else ''} of the grid still {state}" for state, count in sorted(left.items())]
