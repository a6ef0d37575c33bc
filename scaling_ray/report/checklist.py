"""The questions that a paper on a scaling law should answer, answered by the program from the sweep's own files.

The questions follow the checklist of Li et al., "(Mis)Fitting: A Survey of Scaling Laws" (arXiv 2502.18969), in this
project's words: the form, how the models were trained, what was measured, and how the form was fitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SOURCE = "after Li et al., (Mis)Fitting, arXiv 2502.18969"


def checklist(report: dict[str, Any], fit: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of ``part``, ``question``, ``answer``; an answer is None where the files do not say."""
    head, protocol, train = report["headline"], report["protocol"], report["protocol"]["train"]
    counts, card, sizes = report["counts"], report["data_card"], report["protocol"]["sizes"]
    others = sorted({entry["form"] for entry in fit["fits"]} - {head["form"]})
    seen = [row["mean_cells_seen"] for row in sizes if row["mean_cells_seen"]]
    flops = [row["flops"] for row in sizes if row["flops"]]
    trained, d_values = fit["points"]["sizes"], fit["points"]["cells"]
    texts = {
        "optimizer": "AdamW, beta2 {adam_beta2}, weight decay {weight_decay}, gradient clip {grad_clip}",
        "batch": "{cells_per_step} cells an update, one size of batch for every model",
        "schedule": "{schedule}, warm-up {warmup_fraction} of the budget, down to {final_lr_fraction} of the rate",
        "regular": "dropout {dropout}; {mask_fraction} of a cell's genes masked",
    }
    said = {name: text.format(**train) if train else None for name, text in texts.items()}
    excluded = "; ".join(f"{entry['runs']} {entry['reason']}" for entry in fit["excluded"])
    asked: list[tuple[str, str, str | None]] = [
        ("form", "What form is fitted?", head["formula"]),
        (
            "form",
            "Which variables, in which units?",
            "; ".join(f"{d['term']}: {d['means']}" for d in report["definitions"] if len(d["term"]) == 1),
        ),
        ("form", "Which other forms were tried?", ", ".join(name.replace("_", " ") for name in others) or None),
        ("form", "When was the form chosen?", "by the shape of the table (number of sizes and of D), before any fit"),
        ("training", "How many models, over which sizes?", _sizes(trained, counts)),
        ("training", "Which numbers of training cells?", ", ".join(f"{d:,.0f}" for d in d_values) or None),
        ("training", "How many seeds?", f"{counts['seeds']}: each its own initial weights, order, and subset of cells"),
        ("training", "Is data repeated?", _epochs(counts["epochs"])),
        ("training", "Which data, is it public?", _data(card)),
        ("training", "Architecture", "pre-norm transformer encoder over genes; sizes differ in width, layers, heads"),
        ("training", "Optimiser and its settings", said["optimizer"]),
        ("training", "Batch", said["batch"]),
        ("training", "Learning-rate schedule", said["schedule"] or ", ".join(protocol["schedule"]) or None),
        ("training", "How was the learning rate chosen?", _rates(report)),
        ("training", "Regularisation and masking", said["regular"]),
        ("training", "When does a run stop?", _stopping(train)),
        (
            "training",
            "How are parameters counted?",
            "all trainable ones, gene embedding included; without it: a declared choice",
        ),
        ("training", "How are FLOPs counted?", "exactly, by matrix product, attention included; not as 6 P D"),
        (
            "training",
            "Range of compute",
            f"{min(flops):.2e} to {max(flops):.2e} FLOPs a run, mean per size" if flops else None,
        ),
        ("measured", "Which loss is fitted?", f"{report['columns_used']['loss']}: {report['loss']}"),
        (
            "measured",
            "On which data?",
            f"{card['splits']['test']['cells']:,} test cells, "
            + ("split cell by cell" if report["split_noun"] == "cell" else f"of held-out {report['split_noun']}s"),
        ),
        ("measured", "Which checkpoint?", "that of the best smoothed validation loss; final losses: a declared choice"),
        ("measured", "How many points per run?", "one: no intermediate checkpoint is a point of the law"),
        ("measured", "Which runs were left out, and why?", excluded or "none"),
        ("measured", "What would no model at all score?", "gene mean and shrunk Gaussian, on the same cells and masks"),
        (
            "fit",
            "What is minimised?",
            "squared error of the loss, weighted by the modelled noise of each size; Huber on the log beside it",
        ),
        (
            "fit",
            "Initial values and search",
            "variable projection: every local minimum of a grid over the exponents is refined",
        ),
        ("fit", "How many points, how many parameters?", _points(fit)),
        (
            "fit",
            "Intervals",
            "95% profiles, from the larger of noise and misfit; their union with every leave-one-out fit's",
        ),
        ("fit", "Is the fit tested beyond its points?", _held_out(fit)),
        ("fit", "Is the fit sensitive to choices?", f"{len(fit['choices'])} declared choices, each with its interval"),
        (
            "fit",
            "Are code, runs and figures available?",
            "this package; results.parquet, report.json and fit.json hold all of it",
        ),
    ]
    if seen:
        asked.insert(
            8, ("training", "Range of cells seen", f"{min(seen):,.0f} to {max(seen):,.0f} a run, mean per size")
        )
    return [{"part": part, "question": question, "answer": answer} for part, question, answer in asked]


def _sizes(trained: Iterable[dict[str, Any]], counts: dict[str, Any]) -> str | None:
    params = [entry["params"] for entry in trained]
    if not params:
        return None
    done = counts["runs"]["done"]
    return f"{done} runs; {len(params)} sizes fitted, {min(params):,.0f} to {max(params):,.0f} parameters"


def _epochs(epochs: dict[str, Any] | None) -> str | None:
    if epochs is None:
        return None
    return f"yes, where D is small: {epochs['low']:.2g} to {epochs['high']:.3g} passes" if epochs["high"] > 1 else "no"


def _data(card: dict[str, Any]) -> str | None:
    version = card["source"].get("census_version") or card["source"].get("version")
    if card["planted"]:
        return f"planted cells of a known law ({version}); anybody can draw them again"
    return f"CELLxGENE Census layout, version {version}" if version else None


def _rates(report: dict[str, Any]) -> str | None:
    table = report["learning_rates"]
    tried = [len(row["tried"]) for row in table if row["tried"]]
    if not tried:
        return "fixed, not chosen among several" if any(row["used"] for row in table) else None
    many = f"{min(tried)}" + (f" to {max(tried)}" if max(tried) > min(tried) else "")
    edge = [row["size"] for row in table if row["at_edge"]]
    rest = f"; at an edge of those tried: {', '.join(edge)}" if edge else "; none at an edge of those tried"
    return f"per size, {many} rates on validation, with a seed that no law uses{rest}"


def _stopping(train: dict[str, Any]) -> str | None:
    if not train:
        return None
    patience = train["patience_evaluations"]
    return f"after {patience} evaluations without gain, or with its budget of cells" if patience else "with its budget"


def _points(fit: dict[str, Any]) -> str | None:
    head = fit["headline"]
    for entry in fit["fits"]:
        if (entry["form"], entry["cells"]) == (head["form"], head["cells"]):
            sizes = f"{entry['n_sizes']} sizes" + (f" x {entry['n_data_sizes']} D" if entry["n_data_sizes"] else "")
            return f"{entry['n_runs']} runs of {sizes}; {len(entry['parameters'])} parameters"
    return None


def _held_out(fit: dict[str, Any]) -> str | None:
    judged = [held for held in fit["held_out_largest"] if held["covered"] is not None]
    if not fit["held_out_largest"]:
        return None
    inside = sum(bool(held["covered"]) for held in judged)
    total = len(fit["held_out_largest"])
    return f"the largest size, predicted by the others: {inside} of {total} settings inside their interval"
