"""From runs and fits to the content of ``report.json``: the verdict in words, the first screen, and all below it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from scaling_ray.laws import units
from scaling_ray.report import settings
from scaling_ray.report.checklist import SOURCE, checklist
from scaling_ray.report.data_card import data_card, provenance
from scaling_ray.report.planned import plan_by_setting, plan_by_size
from scaling_ray.report.sweep import Sweep
from scaling_ray.report.whereabouts import where_the_loss_sits
from scaling_ray.results.columns import Row

FORMAT = 4
# What the page shows of the first cohort's fit as it stands there.
_OF_FIT = (
    "fits choices leave_one_out held_out_largest residuals next_steps compute_optimal iso_flop planted_floor baselines "
    "notes excluded columns_used contrasts sensitivity rivals"
).split()
_UNITS = {"mse": ("MSE", "mean squared error")}
_NORMALISATION = {
    "corrected": "log1p of counts scaled to 10,000 by the cell's whole library",
    "published": "log1p of counts scaled to 10,000 over the panel's genes alone: visible genes give away a part of the "
    "masked",
}


def summarise(sweep: Sweep, fits: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Everything the page says, as plain values.

    Args:
        sweep: what its files say.
        fits: genes -> fit of that cohort, the first one on top (see :func:`scaling_ray.results.cohorts.fit_cohorts`).
    """
    genes, fit = next(iter(fits.items()))
    grid = sweep.law_rows
    done = [row for row in grid if row.is_finished]
    head = fit["headline"]
    chosen = [(row.val_loss, row) for row in done if row.genes == genes and row.val_loss is not None]
    best = min(chosen, key=lambda pair: pair[0])[1] if chosen else None
    loss_units = sorted({row.loss_unit for row in grid if row.loss_unit is not None})
    unit, about = _unit_words(loss_units)
    loss = f"{about} per masked gene on test cells, of the checkpoint that validation chose"
    report = {
        "format": FORMAT,
        "name": sweep.spec.name if sweep.spec else sweep.folder.rstrip("/").rsplit("/", 1)[-1],
        "verdict": head["verdict"],
        "sentence": head["sentences"][0],
        "second_sentence": head["sentences"][1],
        "linear_sentence": _against_linear(grid),
        "headline": head,
        "genes": genes,
        "title": sweep.spec.data.title if sweep.spec else None,
        "source": sweep.spec.data.source if sweep.spec else None,
        "whereabouts": where_the_loss_sits(sweep, best),
        "split_noun": sweep.split_noun,
        "loss": loss,
        "loss_units": loss_units,
        "unit": unit,
        "definitions": _definitions(sweep, grid, loss),
        "best": _describe(best) if best else None,
        "counts": _counts(sweep, grid),
        "leak_test": _leak_test(fits),
        "commands": _commands(sweep.folder),
        "runs": [
            asdict(row) | {"number": number, "mlflow_link": sweep.links.get(row.run_id)}
            for number, row in enumerate(sweep.rows, start=1)
        ],
        **{part: fit[part] for part in _OF_FIT},
        "bits": _bits(fit),
        "units": {
            "entropy": {"name": units.ENTROPY_NAME, "formula": units.ENTROPY_FORMULA},
            "gain": {"name": units.GAIN_NAME, "formula": units.GAIN_FORMULA},
            "share": {"name": units.SHARE_NAME, "formula": units.SHARE_FORMULA},
        },
    }
    report |= {
        "settings": settings.gather_settings(grid),
        "completeness": settings.completeness(grid),
        "plan_against_actual": plan_by_size(sweep.rows, sweep.planned),
        "plan_by_setting": plan_by_setting(sweep.rows, sweep.planned),
        "learning_rates": settings.learning_rates(sweep.rows),
        "protocol": settings.protocol(grid, sweep.spec),
        "needs": [*head["settles"], *settings.unfinished(grid)],
    }
    made = provenance(sweep)
    report |= {
        "date": made["last_evaluation"],
        "data": sweep.manifest.model_dump(mode="json"),
        "data_card": data_card(sweep.manifest),
        "provenance": made,
    }
    report["checklist"] = {"source": SOURCE, "entries": checklist(report, fit)}
    return report


def _unit_words(loss_units: Sequence[str]) -> tuple[str, str]:
    """The unit of the losses as a short name and as a phrase; several are all named."""
    if not loss_units:
        return "loss", "loss"
    short, about = zip(*(_UNITS.get(unit, (unit, f"loss in {unit}")) for unit in loss_units), strict=True)
    return " or ".join(short), " or ".join(about)


def _definitions(sweep: Sweep, grid: Sequence[Row], loss: str) -> list[dict[str, str]]:
    recipes = sorted({row.recipe for row in grid if row.recipe})
    schedules = sorted({row.schedule for row in grid if row.schedule})
    budgets = sorted({row.max_cells_seen for row in grid if row.max_cells_seen is not None})
    protocol = [f"{schedules[0]} schedule" if len(schedules) == 1 else f"schedules {', '.join(schedules) or 'unknown'}"]
    if budgets:
        ends = f"{budgets[0]:,.0f}" + (f" to {budgets[-1]:,.0f}" if len(budgets) > 1 else "")
        protocol.append(f"at most {ends} cells seen{' by size' if len(budgets) > 1 else ''}")
    patience = sweep.spec.train.patience_evaluations if sweep.spec else None
    if patience:
        protocol.append(f"stopped after {patience} evaluations without gain")
    elif any(row.stop_reason == "early_stop" for row in grid):
        protocol.append("stopped early by validation")
    genes = ", ".join(f"{value:,}" for value in sorted({row.genes for row in grid}))
    normalised = "; ".join(f"{recipe}: {_NORMALISATION.get(recipe, 'of its own')}" for recipe in recipes)
    words = [
        ("P", "all trainable parameters, the gene embedding included"),
        ("D", "unique training cells"),
        ("T", "cells seen in training, each presentation counted; epochs are T / D"),
        ("V", f"genes of the panel ({genes}), chosen on training cells"),
        ("L", f"loss: {loss}; test cells are {sweep.held_out}"),
        ("normalisation", normalised or "not recorded"),
        ("protocol", ", ".join(protocol)),
    ]
    return [{"term": term, "means": means} for term, means in words]


def _commands(folder: str) -> list[str]:
    return [
        f"scaling-ray sweep {folder}/spec.toml --shards SHARDS --out {folder}",
        f"scaling-ray report {folder} --out REPORT",
    ]


def _bits(fit: dict[str, Any]) -> dict[str, Any]:
    """Losses of each setting in every unit, with the size's name; the page leaves out a unit that no setting has."""
    names = {entry["params"]: entry["size"] for entry in fit["points"]["sizes"]}
    table = [entry | {"size": names[entry["params"]]} for entry in fit["units"]["by_setting"]]
    return {**fit["units"], "by_setting": table}


def _describe(row: Row) -> dict[str, Any]:
    """One run with its losses set against its baselines and floors."""
    loss, gene_mean, gaussian = row.test_loss, row.baseline_loss, row.gaussian_loss
    mse = loss if units.is_mse(row.loss_unit) else None
    return asdict(row) | {
        "share_of_gap": {
            "attainable_floor": units.share_of_gap(loss, gene_mean, row.attainable_loss),
            "shrunk_gaussian": units.share_of_gap(loss, gene_mean, gaussian),
        },
        "entropy_bits": units.shared_gaussian_bits(mse) if mse else None,
        "gain_bits": {
            "over_gene_mean": units.gain_bits(mse, gene_mean),
            "over_shrunk_gaussian": units.gain_bits(mse, gaussian),
        },
        "ratio_to_gaussian": loss / gaussian if loss and gaussian else None,
    }


def _against_linear(grid: Sequence[Row]) -> str | None:
    """Where no run with the most cells is better than their linear predictor, that is the first thing to know."""
    most = max((row.cells or 0 for row in grid), default=0)
    both = [
        (row, row.test_loss / row.gaussian_loss)
        for row in grid
        if row.test_loss and row.gaussian_loss and row.cells == most
    ]
    if not both or min(ratio for _, ratio in both) < 1:
        return None
    row, ratio = min(both, key=lambda one: one[1])
    return (
        f"With {most:,} cells no model here predicts better than a linear one: the best of them ({row.size}, "
        f"{row.test_loss:.4g}) has {ratio:.3g} times the loss of the shrunk Gaussian of the same cells."
    )


def _counts(sweep: Sweep, grid: Sequence[Row]) -> dict[str, Any]:
    states = Counter({"done": 0})
    states.update(row.status for row in grid)
    epochs = [row.cells_seen / row.cells for row in grid if row.cells_seen and row.cells]
    return {
        "runs": dict(states),
        "sizes": len({row.params for row in grid}),
        "data_sizes": len({(row.cells, row.cells_requested) for row in grid}),
        "seeds": len({row.seed for row in grid}),
        "groups": {
            split: entry.cells if sweep.manifest.split_by == "cell" else len(entry.groups)
            for split, entry in sweep.manifest.splits.items()
        },
        "epochs": {"low": min(epochs), "high": max(epochs)} if epochs else None,
    }


def _leak_test(fits: Mapping[int, dict[str, Any]]) -> dict[str, Any] | None:
    """The worst of the cohorts' leak tests, over the runs of all of them."""
    tests = [fit["leak_test"] for fit in fits.values() if fit["leak_test"] is not None]
    if not tests:
        return None
    worst: dict[str, Any] = min(tests, key=lambda test: test["lowest_z"])
    return worst | {"runs": sum(test["runs"] for test in tests)}
