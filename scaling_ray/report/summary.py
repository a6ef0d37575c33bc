"""From runs and a fit to the content of ``report.json``: the verdict in words, the first screen, and all below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling_ray.laws import units
from scaling_ray.report import grid as grids
from scaling_ray.report.checklist import SOURCE, checklist
from scaling_ray.report.data_card import data_card, provenance
from scaling_ray.report.evidence import leave_one_out, residuals
from scaling_ray.report.runs import Run

FORMAT = 2
LOSS = "mean squared error per masked gene on test cells, of the checkpoint that validation chose"
_NORMALISATION = {
    "corrected": "log1p of counts scaled to 10,000 by the cell's whole library",
    "published": "log1p of counts scaled to 10,000 over the panel's genes alone: visible genes give away a part of the "
    "masked",
}


def summarise(
    sweep_dir: Path,
    spec: dict[str, Any],
    runs: list[Run],
    manifest: dict[str, Any],
    fit: dict[str, Any],
    genes: int,
    curves: dict[str, list[dict[str, Any]]],
    plan: dict[str, Any],
) -> dict[str, Any]:
    """Everything the page says, as plain values.

    Args:
        sweep_dir: of the sweep; its name is the report's where the specification gives none.
        spec: the sweep's specification, empty where unknown.
        runs: all of them, finished or not, each with its ``number`` on the page.
        manifest: of the shards.
        fit: the first cohort's, from :func:`scaling_ray.laws.fit_table`.
        genes: of the first cohort.
        curves: run id -> evaluations.
        plan: plan.json, empty where unknown.
    """
    grid = [run for run in runs if run["role"] == "law"]
    done = [run for run in grid if run["status"] == "done"]
    head = fit["headline"]
    best = min((r for r in done if r["genes"] == genes and r["val_mse"]), key=lambda r: r["val_mse"], default=None)
    made = provenance(sweep_dir, manifest, curves.values(), runs)
    noun = {"donor_id": "donor", "dataset_id": "data set"}.get(manifest["split_by"], manifest["split_by"])
    report = {
        "format": FORMAT,
        "name": spec.get("name", sweep_dir.name),
        "date": made["last_evaluation"],
        "verdict": head["verdict"],
        "sentence": _sentence(head, fit),
        "second_sentence": _second_sentence(head),
        "headline": head,
        "genes": genes,
        "split_noun": noun,
        "loss": LOSS,
        "definitions": _definitions(grid, spec, noun),
        "best": _describe(best) if best else None,
        "counts": _counts(grid, manifest),
        "leak_test": _leak_test(done),
        "commands": _commands(sweep_dir.name),
        "cells": grids.gather_cells(grid),
        "completeness": grids.completeness(grid),
        "plan_against_actual": grids.plan_against_actual(runs, plan),
        "runs": runs,
        "fits": fit["fits"],
        "choices": fit["choices"],
        "leave_one_out": fit["leave_one_out"],
        "headline_left_out": leave_one_out(fit, runs),
        "held_out_largest": fit["held_out_largest"],
        "residuals": residuals(runs, fit, genes),
        "next_steps": fit["next_steps"],
        "compute_optimal": fit["compute_optimal"],
        "iso_flop": fit["iso_flop"],
        "planted_floor": fit["planted_floor"],
        "bits": _bits(fit, runs, genes),
        "baselines": fit["baselines"],
        "learning_rates": grids.learning_rates(runs),
        "units": {
            "entropy": {"name": units.ENTROPY_NAME, "formula": units.ENTROPY_FORMULA},
            "gain": {"name": units.GAIN_NAME, "formula": units.GAIN_FORMULA},
            "share": {"name": units.SHARE_NAME, "formula": units.SHARE_FORMULA},
        },
        "data": manifest,
        "data_card": data_card(manifest),
        "protocol": grids.protocol(grid, spec),
        "needs": [*head["settles"], *grids.unfinished(grid)],
        "notes": fit["notes"],
        "excluded": fit["excluded"],
        "columns_used": fit.get("columns_used", {}),
        "provenance": made,
    }
    report["checklist"] = {"source": SOURCE, "entries": checklist(report, fit)}
    return report


def _sentence(head: dict[str, Any], fit: dict[str, Any]) -> str:
    """The verdict in words: what the runs support, or why they do not."""
    supported = [f for f in fit["fits"] if f["verdict"] == "supported" and f["form"] not in ("constant", "cells_log")]
    if head["verdict"] == "supported":
        what = "size and data" if head["form"] == "params_cells" else "size"
        return f"Supported: within the sizes trained here, the loss falls with {what} as {head['formula']}."
    more = len(head["reasons"]) - 1
    rest = "" if not more else f" (and {more} more reason{'s' if more > 1 else ''}, below)"
    aside = ""
    if any(f["form"] == "power_floor" for f in supported):
        aside = " A part of the table, fitted alone, does support a law: see the fits."
    return f"Refused: these runs do not determine a scaling exponent, because {head['reasons'][0]}{rest}.{aside}"


def _second_sentence(head: dict[str, Any]) -> str | None:
    """What the verdict comes to: the exponent with its headline interval, or what would settle it."""
    if head["verdict"] != "supported":
        return f"What would settle it first: {head['settles'][0]}." if head["settles"] else None
    alpha = head["parameters"]["alpha"]
    low, high = alpha["widest_low"], alpha["widest_high"]
    if low is None or high is None:
        return f"alpha is {alpha['value']:.3g}, and leaving one size out opens its interval."
    return f"alpha is {alpha['value']:.3g}, and between {low:.3g} and {high:.3g} whichever size is left out."


def _definitions(grid: Sequence[Run], spec: dict[str, Any], noun: str) -> list[dict[str, str]]:
    recipes = sorted({str(run["recipe"]) for run in grid if run["recipe"]})
    schedules = sorted({str(run["schedule"]) for run in grid if run["schedule"]})
    budgets = sorted({run["max_cells_seen"] for run in grid if run["max_cells_seen"] is not None})
    protocol = [f"{schedules[0]} schedule" if len(schedules) == 1 else f"schedules {', '.join(schedules) or 'unknown'}"]
    if budgets:
        ends = f"{budgets[0]:,.0f}" + (f" to {budgets[-1]:,.0f}" if len(budgets) > 1 else "")
        protocol.append(f"at most {ends} cells seen{' by size' if len(budgets) > 1 else ''}")
    patience = spec.get("train", {}).get("patience_evaluations")
    if patience:
        protocol.append(f"stopped after {patience} evaluations without gain")
    if any(run["stop_reason"] == "early_stop" for run in grid) and not patience:
        protocol.append("stopped early by validation")
    genes = ", ".join(f"{value:,}" for value in sorted({run["genes"] for run in grid}))
    normalised = "; ".join(f"{recipe}: {_NORMALISATION.get(recipe, 'of its own')}" for recipe in recipes)
    words = [
        ("P", "all trainable parameters, the gene embedding included"),
        ("D", "unique training cells"),
        ("T", "cells seen in training, each presentation counted; epochs are T / D"),
        ("V", f"genes of the panel ({genes}), chosen on training cells"),
        ("L", f"loss: {LOSS}; test cells are of held-out {noun}s"),
        ("normalisation", normalised or "not recorded"),
        ("protocol", ", ".join(protocol)),
    ]
    return [{"term": term, "means": means} for term, means in words]


def _commands(name: str) -> list[str]:
    return [
        f"scaling-ray sweep {name}/spec.toml --shards SHARDS --out {name}",
        f"scaling-ray report {name} --out REPORT",
    ]


def _bits(fit: dict[str, Any], runs: Sequence[Run], genes: int) -> dict[str, Any]:
    """Losses of each cell in every unit, with the size's name; a unit that no cell has is left out on the page."""
    names = {float(run["params"]): run["size"] for run in runs if run["genes"] == genes}
    table = [entry | {"size": names.get(entry["params"])} for entry in fit["units"]["by_cell"]]
    return {**fit["units"], "by_cell": table}


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
    worth["share_of_gap"] = {floor: grids.share(mse, gene_mean, value) for floor, value in floors.items()}
    worth["entropy_bits"] = units.shared_gaussian_bits(mse) if mse else None
    worth["gain_bits"] = {
        "over_gene_mean": grids.gain(mse, gene_mean),
        "over_shrunk_gaussian": grids.gain(mse, run["gaussian_mse"]),
    }
    worth["ratio_to_gaussian"] = mse / run["gaussian_mse"] if mse and run["gaussian_mse"] else None
    return worth


def _counts(grid: Sequence[Run], manifest: dict[str, Any]) -> dict[str, Any]:
    states: dict[str, int] = {}
    for run in grid:
        states[run["status"]] = states.get(run["status"], 0) + 1
    epochs = [run["cells_seen"] / run["cells"] for run in grid if run["cells_seen"] and run["cells"]]
    return {
        "runs": states,
        "sizes": len({run["params"] for run in grid}),
        "data_sizes": len({(run["cells"], run["cells_requested"]) for run in grid}),
        "seeds": len({run["seed"] for run in grid}),
        "groups": {split: len(entry.get("groups") or []) for split, entry in manifest["splits"].items()},
        "epochs": {"low": min(epochs), "high": max(epochs)} if epochs else None,
    }


def _leak_test(done: Sequence[Run]) -> dict[str, Any] | None:
    scores = [(run["bound_z"], run["run_id"]) for run in done if run["bound_z"] is not None]
    if not scores:
        return None
    lowest = min(scores)
    return {"runs": len(scores), "lowest_z": lowest[0], "run_id": lowest[1], "limit": -4.0, "passed": lowest[0] >= -4.0}
