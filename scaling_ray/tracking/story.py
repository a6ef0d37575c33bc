"""What MLflow shows of a whole sweep: verdicts, law, best loss and cost, a description, and the report's files.

Its inputs are the sweep's own files and the report's; it redoes no part of either, and needs no MLflow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.records import RunResult, ShardManifest
from scaling_ray.results.sweep_files import PLAN, RESULTS_CSV, SPEC, SweepFiles
from scaling_ray.spec import SweepSpec
from scaling_ray.storage import Place

NOTE_OF_EXPERIMENT = (
    "One parent run for each sweep of this specification, with its verdict and report; one child for each run. "
    "The link that a sweep prints opens it with its columns and charts."
)
LARGEST_NOTE = 5000
"""Characters of a description that every version of MLflow keeps."""
_PAGE, _FIT, _REPORT = "report.html", "fit.json", "report.json"
_VERDICTS = (("size", "size"), ("data", "data"), ("prediction", "predictions"))
"""What a verdict is about -> the part of the headline that holds it."""


@dataclass(frozen=True)
class Reported:
    """A report that belongs to a sweep: ``headline`` and ``best`` as report.json has them, and where its files lie."""

    place: Place
    headline: Mapping[str, Any]
    best: Mapping[str, Any] | None
    unit: str


def read_report(place: Place, sweep: SweepFiles) -> Reported | None:
    """The report at a place, None where there is none.

    Raises:
        BadInput: it is the report of another sweep, or of another version.
    """
    data = place.read_if_there(_REPORT)
    if data is None or not place.exists(_PAGE):
        return None
    try:
        report = json.loads(data)
        found = (report["provenance"]["data_hash"], report["provenance"]["spec_sha256"])
        headline, best, unit = report["headline"], report["best"], report["unit"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            "K009", f"{place}/{_REPORT}", repr(error), "is no report of this version; write it anew"
        ) from error
    own = (sweep.known_manifest().data_hash, hashlib.sha256(sweep.place.read(SPEC)).hexdigest())
    if found != own:
        raise BadInput(
            "K010",
            place.field,
            str(place),
            "is the report of another sweep, or of one that has changed since; write it anew",
        )
    return Reported(place, headline, best, unit)


def first_tags(spec: SweepSpec, manifest: ShardManifest) -> dict[str, str]:
    """Tags of a parent before there is a report."""
    return {
        "kind": "sweep",
        "recipe": spec.train.recipe,
        "objective": spec.train.objective,
        "loss_unit": spec.train.loss_unit,
        "data": manifest.name,
        "data_hash": manifest.data_hash,
    }


def metrics_of(results: Sequence[RunResult], plan: Mapping[str, Any] | None) -> dict[str, float]:
    """Progress, best loss and cost of a sweep, from its results and its plan.

    Hours are of one process each: a run of two workers counts twice, one of a stack of eight an eighth.
    """
    law = [result for result in results if result.test_loss is not None]
    values: dict[str, float] = {"runs_done": float(len(results))}
    if law:
        best = min(law, key=lambda result: result.val_loss)
        assert best.test_loss is not None
        values |= {"test_loss": best.test_loss, "val_loss": best.val_loss}
    values["actual_hours"] = sum(one.wall_seconds * one.workers / one.stacked for one in results) / 3600
    if plan is not None:
        values["planned_hours"] = sum(one["hours"] * one["execution"]["workers"] for one in plan["settings"])
        values["runs_planned"] = float(len(plan["settings"]))
    return values


def report_metrics(told: Reported) -> dict[str, float]:
    """The law's parameters with their shown intervals, and the gains of the best run, in bits per masked gene."""
    values: dict[str, float | None] = {}
    for name, parameter in _parameters(told).items():
        values[name] = parameter["value"]
        values |= {f"{name}_{end}": parameter[end] for end in ("low", "high")}
    if told.best is not None:
        gains = told.best["gain_bits"]
        values["gain_over_gene_mean"] = gains["over_gene_mean"]
        values["gain_over_gaussian"] = gains["over_shrunk_gaussian"]
    return {name: float(f"{value:.6g}") for name, value in values.items() if value is not None}


def _parameters(told: Reported) -> Mapping[str, Any]:
    found: Mapping[str, Any] = told.headline["parameters"] if "parameters" in told.headline else {}
    return found or {}


def report_tags(told: Reported) -> dict[str, str]:
    """The verdicts, the form of the law, and which setting is best."""
    tags = {"verdict": told.headline["verdict"], "law": told.headline["formula"]}
    tags |= {f"verdict_{about}": told.headline[part]["verdict"] for about, part in _VERDICTS}
    if told.best is not None:
        tags |= {"size": told.best["size"], "setting": f"{told.best['size']} {told.best['cells']}"}
    return tags


def note_of(told: Reported, where: str) -> str:
    """A description in Markdown: the verdict's sentences, the law, the best run, and where to look."""
    head = told.headline
    lines = [f"**{head['verdict'].capitalize()}.**" if not head["sentences"] else "", *_paragraphs(head["sentences"])]
    lines += ["| about | verdict | |", "|---|---|---|"]
    for about, part in _VERDICTS:
        said = head[part]["sentence"] if "sentence" in head[part] else ""
        lines.append(f"| {about} | **{head[part]['verdict']}** | {_cell(said or '')} |")
    parameters = _parameters(told)
    if parameters:
        lines += ["", f"| {_cell(head['formula'])} | value | 95% |", "|---|---|---|"]
        for name, parameter in parameters.items():
            ends = " to ".join("open" if parameter[end] is None else f"{parameter[end]:.4g}" for end in ("low", "high"))
            lines.append(f"| {name} | {parameter['value']:.4g} | {ends} |")
    if told.best is not None:
        best = told.best
        cells = f" on {best['cells']:,} cells" if best["cells"] is not None else ""
        loss = f", test loss {best['test_loss']:.4g} {told.unit}" if best["test_loss"] is not None else ""
        lines += ["", f"Best run: {best['size']} ({best['params']:,} parameters){cells}, seed {best['seed']}{loss}."]
    lines += ["", "The whole report is report.html among the artifacts; the law is fit.json, the plan plan.json."]
    lines += ["", f"All runs with columns and charts: {where}"]
    text = "\n".join(lines).strip()
    return text if len(text) <= LARGEST_NOTE else text[: LARGEST_NOTE - 4].rsplit("\n", 1)[0] + "\n..."


def _paragraphs(sentences: Sequence[str]) -> list[str]:
    return [line for sentence in sentences for line in (sentence, "")]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def artifacts_of(told: Reported, sweep: SweepFiles) -> dict[str, bytes]:
    """The files that a parent holds: page, law and figures of the report, plan, specification and results."""
    names = [_PAGE, _FIT, _REPORT, *sorted(told.place.names("figures/"))]
    files = {name: told.place.read(name) for name in names if told.place.exists(name)}
    own = {name: sweep.place.read_if_there(name) for name in (PLAN, SPEC, RESULTS_CSV)}
    return files | {name: data for name, data in own.items() if data is not None}


def digest_of(files: Mapping[str, bytes]) -> str:
    """A hash of names and contents."""
    parts = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
