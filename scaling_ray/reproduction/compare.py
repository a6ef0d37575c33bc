"""A repetition held beside its reference: a verdict per quantity, one over all, and what changed between the two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from scaling_ray.errors import BadInput
from scaling_ray.laws.drift import (
    AGREES,
    ALPHA,
    BLIND,
    CANNOT_TELL,
    DRIFTED,
    Axes,
    Difference,
    Judgement,
    Verdict,
    between_estimates,
    differences,
    judge_all,
    overall,
    without_noise,
)
from scaling_ray.records import Record
from scaling_ray.reproduction.record import Origin, Setting, SweepRecord
from scaling_ray.runs import differing
from scaling_ray.spec import parse_spec

Kind = Literal["loss", "contrast", "parameter", "prediction", "baseline", "cells"]
DEFAULT_TOLERANCE = 0.01
"""Smallest difference that matters, as a share of the drop from the gene mean to the best setting."""
EXIT_CODES: dict[str, int] = {AGREES: 0, DRIFTED: 3, CANNOT_TELL: 6}
OTHER_CELLS = "the shards hold other cells, or the same cells on other sides of the split"
_IN_LOSS_UNITS = ("c", "E")
_Key = tuple[str, int | None, str, float | None]


class Quantity(BaseModel):
    """One figure of both sides.

    ``low``..``high`` is the 95% interval of found less reference, ``found_error`` the standard error of the found
    figure, ``detectable`` the smallest difference that would be called a drift.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    name: str
    verdict: Verdict
    reason: str
    reference: float | None
    found: float | None
    low: float | None
    high: float | None
    found_error: float | None
    tolerance: float | None
    detectable: float | None
    p: float | None


class Reproduction(Record):
    """The outcome of one reproduction.

    ``changed`` names what differs between the two origins, and ``hint`` says where to look first. ``missing`` are runs
    and settings that the reference has and the repetition does not; ``identical`` counts losses that are the same to
    the last digit in every run.
    """

    version: Literal[1] = 1
    name: str
    verdict: Verdict
    summary: str
    tolerance: float
    tolerance_share: float
    alpha: float
    drop: float
    paired: bool
    identical: int
    quantities: list[Quantity]
    missing: list[str]
    extra: list[str]
    changed: list[str]
    hint: str | None
    notes: list[str]
    reference: Origin
    found: Origin

    def of_kind(self, kind: Kind) -> list[Quantity]:
        """Its quantities of one kind."""
        return [each for each in self.quantities if each.kind == kind]


def compare(
    reference: SweepRecord,
    found: SweepRecord,
    tolerance_share: float = DEFAULT_TOLERANCE,
    notes: Sequence[str] = (),
    *,
    other_cells: bool = False,
) -> Reproduction:
    """Hold a repetition beside its reference.

    Args:
        reference: what was found before.
        found: what the repetition found; it may lack runs.
        tolerance_share: smallest difference that matters, as a share of the reference's drop.
        notes: said beside the verdict.
        other_cells: whether the two may stand on other cells, so that only what was found of them is compared.

    Raises:
        BadInput: losses of other units or columns, so that nothing can be compared; a tolerance below 0.
    """
    if not 0 <= tolerance_share < 1:
        raise BadInput("R008", "--tolerance", tolerance_share, "must be a share of the drop, at least 0 and below 1")
    for name in ("loss_unit", "loss"):
        there, here = getattr(reference.origin, name), getattr(found.origin, name)
        if there is not None and here is not None and there != here:
            raise BadInput(
                "R009",
                f"reference: {name}",
                there,
                f"the repetition's is {here!r}: these losses do not compare; name a reference of the same",
            )
    drop = reference.drop()
    tolerance = tolerance_share * drop
    cases = [*_losses(reference, found, tolerance), *_laws(reference, found, tolerance, tolerance_share)]
    if not (other_cells and reference.origin.data_hash != found.origin.data_hash):
        cases += _baselines(reference, found, tolerance)  # closed forms say nothing but which cells these are
    judged = judge_all([case for _, _, case in cases], drop)
    quantities = [_quantity(kind, name, one) for (kind, name, _), one in zip(cases, judged, strict=True)]
    quantities += [*_untold(reference, found), *_cells(reference.origin, found.origin, other_cells)]
    missing, extra = _missing(reference, found), _extra(reference, found)
    losses = [one for (kind, _, _), one in zip(cases, judged, strict=True) if kind == "loss"]
    others = [one for (kind, _, _), one in zip(cases, judged, strict=True) if kind != "loss"]
    same_cells = all(each.verdict == AGREES for each in quantities if each.kind == "cells")
    verdict = overall(losses, others, missing) if same_cells else DRIFTED
    identical = sum(one.difference.identical for one in losses)
    changed = list(_changes(reference.origin, found.origin))
    made = Reproduction(
        name=reference.name,
        verdict=verdict,
        summary="",
        tolerance=tolerance,
        tolerance_share=tolerance_share,
        alpha=ALPHA,
        drop=drop,
        paired=any(one.difference.paired for one in losses),
        identical=identical,
        quantities=quantities,
        missing=missing,
        extra=extra,
        changed=changed,
        hint=_hint(verdict, quantities, reference, found, changed),
        notes=list(notes),
        reference=reference.origin,
        found=found.origin,
    )
    return made.model_copy(update={"summary": _summary(made)})


def _key(setting: Setting) -> _Key:
    return setting.size, setting.genes, setting.cells, setting.lr


def _losses(reference: SweepRecord, found: SweepRecord, tolerance: float) -> Iterator[tuple[Kind, str, Difference]]:
    """Losses and contrasts, panel by panel: noise is pooled within one loss."""
    for genes in dict.fromkeys(setting.genes for setting in reference.settings):
        before = [setting for setting in reference.settings if setting.genes == genes]
        keys = {_key(setting): setting.name for setting in before}
        after = [setting for setting in found.settings if _key(setting) in keys]
        axes = {setting.name: _axes(setting) for setting in before}
        made = differences(
            {setting.name: setting.losses for setting in before},
            {keys[_key(setting)]: setting.losses for setting in after},
            axes,
            tolerance,
        )
        sizes = {f"{setting.params:g}": setting.size for setting in before}
        counts = {f"{_axes(setting).cells:g}": f"{setting.cells} cells" for setting in before}
        for each in made:
            if each.name in axes:
                yield "loss", each.name, each
                continue
            axis, low, high = each.name.split(":")
            words = sizes if axis == "params" else counts
            yield "contrast", f"{words[low]} to {words[high]}{_panel(genes)}", each


def _axes(setting: Setting) -> Axes:
    return Axes(setting.params, setting.cells_resolved if setting.cells_resolved is not None else 0.0)


def _panel(genes: int | None) -> str:
    return "" if genes is None else f", {genes} genes"


def _laws(
    reference: SweepRecord, found: SweepRecord, tolerance: float, share: float
) -> Iterator[tuple[Kind, str, Difference]]:
    """Parameters and predictions that both sides give, for the same form and place."""
    there = {law.genes: law for law in found.laws}
    for law in reference.laws:
        other = there.get(law.genes)
        if other is None:
            continue
        for name, one in law.parameters.items():
            if other.form == law.form and name in other.parameters:
                two = other.parameters[name]
                matters = tolerance if name in _IN_LOSS_UNITS else share * abs(one.value)
                case = between_estimates(name, (one.value, one.low, one.high), (two.value, two.low, two.high), matters)
                yield "parameter", f"{name}{_panel(law.genes)}", case
        places = {(each.what, each.params, each.cells): each for each in other.predictions}
        for each in law.predictions:
            if (each.what, each.params, each.cells) in places:
                two = places[each.what, each.params, each.cells]
                case = between_estimates(
                    each.what, (each.value, each.low, each.high), (two.value, two.low, two.high), tolerance
                )
                yield "prediction", f"{each.what}{_panel(law.genes)}", case


def _baselines(reference: SweepRecord, found: SweepRecord, tolerance: float) -> Iterator[tuple[Kind, str, Difference]]:
    there = {(each.genes, each.cells, each.seed): each for each in found.baselines}
    for one in reference.baselines:
        two = there.get((one.genes, one.cells, one.seed))
        if two is None:
            continue
        where = f"{one.cells} cells" + (f", seed {one.seed}" if one.seed is not None else "") + _panel(one.genes)
        for word, before, after in (
            ("gene mean", one.gene_mean, two.gene_mean),
            ("shrunk Gaussian", one.gaussian, two.gaussian),
        ):
            if before is not None and after is not None:
                name = f"{word}, {where}"
                yield "baseline", name, without_noise(name, before, after, tolerance)


def _quantity(kind: Kind, name: str, one: Judgement) -> Quantity:
    each = one.difference
    return Quantity(
        kind=kind,
        name=name,
        verdict=one.verdict,
        reason=one.reason,
        reference=each.reference,
        found=each.found,
        low=one.low,
        high=one.high,
        found_error=each.found_error,
        tolerance=each.tolerance,
        detectable=one.detectable,
        p=one.p,
    )


_BLANK = {name: None for name in ("low", "high", "found_error", "tolerance", "detectable", "p")}


def _cells(reference: Origin, found: Origin, other_cells: bool) -> Iterator[Quantity]:
    """Whether both sides stand on the same cells, genes and split, to the byte, where both know it.

    Losses may not say that: labels that were swapped between donors move a few cells from one split to another, and a
    mean over thousands of test cells by less than what matters.
    """
    one, two = reference.data_hash, found.data_hash
    if one is None or two is None or other_cells:
        return
    verdict, reason = (AGREES, "identical") if one == two else (DRIFTED, OTHER_CELLS)
    yield Quantity(kind="cells", name="data_hash", verdict=verdict, reason=reason, reference=None, found=None, **_BLANK)


def _untold(reference: SweepRecord, found: SweepRecord) -> list[Quantity]:
    """What one side gives and the other does not: settings of the reference, parameters and predictions of either."""

    def made(kind: Kind, name: str, reason: str, before: float | None, after: float | None) -> Quantity:
        return Quantity(
            kind=kind, name=name, verdict=CANNOT_TELL, reason=reason, reference=before, found=after, **_BLANK
        )

    keys = {_key(setting) for setting in found.settings}
    quantities = [
        made("loss", setting.name, "the repetition has no finished run of it", _mean(setting), None)
        for setting in reference.settings
        if _key(setting) not in keys
    ]
    sides = [{law.genes: law for law in record.laws} for record in (reference, found)]
    for genes in sides[0].keys() & sides[1].keys():
        one, two = sides[0][genes], sides[1][genes]
        for name in sorted(one.parameters.keys() | two.parameters.keys()):
            before, after = one.parameters.get(name), two.parameters.get(name)
            if before is not None and after is not None and one.form == two.form:
                continue
            if before is not None and after is not None:
                reason = f"another form of law: {one.form} before, {two.form} now"
            else:
                reason = f"only the {'reference' if after is None else 'repetition'} supports it with a closed interval"
            values = [None if each is None else each.value for each in (before, after)]
            quantities.append(made("parameter", f"{name}{_panel(genes)}", reason, *values))
        places = [{(p.what, p.params, p.cells): p for p in law.predictions} for law in (one, two)]
        for place in [key for key in places[0] if key not in places[1]]:
            reason = "the repetition gives none at this place"
            quantities.append(made("prediction", f"{place[0]}{_panel(genes)}", reason, places[0][place].value, None))
    return quantities


def _mean(setting: Setting) -> float:
    return sum(setting.losses.values()) / len(setting.losses)


def _missing(reference: SweepRecord, found: SweepRecord) -> list[str]:
    """Settings of the reference without a run, and runs of the repetition without a result."""
    keys = {_key(setting) for setting in found.settings}
    unfinished = list(found.unfinished)
    gone = [s.name for s in reference.settings if _key(s) not in keys]
    return unfinished + [name for name in gone if not any(each.startswith(f"{name}, seed") for each in unfinished)]


def _extra(reference: SweepRecord, found: SweepRecord) -> list[str]:
    keys = {_key(setting) for setting in reference.settings}
    return [setting.name for setting in found.settings if _key(setting) not in keys]


def _changes(reference: Origin, found: Origin) -> Iterator[str]:
    """What differs between two origins, in words; what one of them does not know is not said."""
    if reference.spec is not None and found.spec is not None and reference.spec != found.spec:
        one, two = (parse_spec(text, "spec").model_dump(mode="json") for text in (reference.spec, found.spec))
        fields = differing(one, two)
        for name in fields:
            yield f"spec {name}: {_at(one, name)} -> {_at(two, name)}"
        if not fields:
            yield "spec: comments or layout only"
    plain = ("recipe", "objective", "schedule", "census", "numerics_version", "commit", "processor")
    for name in plain:
        before, after = getattr(reference, name), getattr(found, name)
        if before is not None and after is not None and before != after:
            yield f"{name.replace('_', ' ')}: {before} -> {after}"
    if reference.data_hash is not None and found.data_hash is not None and reference.data_hash != found.data_hash:
        yield f"data_hash: {reference.data_hash[:12]} -> {found.data_hash[:12]}"
    for package in reference.versions:
        if package in found.versions and reference.versions[package] != found.versions[package]:
            yield f"{package}: {reference.versions[package]} -> {found.versions[package]}"
    if reference.machines and found.machines and reference.machines != found.machines:
        yield f"runs by engine: {_counts(reference.machines)} -> {_counts(found.machines)}"


def _at(fields: Mapping[str, object], dotted: str) -> object:
    value: object = fields
    for part in dotted.split("."):
        value = value[part] if isinstance(value, Mapping) and part in value else None
    return value


def _counts(machines: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in machines.items())


def _hint(
    verdict: Verdict,
    quantities: Sequence[Quantity],
    reference: SweepRecord,
    found: SweepRecord,
    changed: Sequence[str],
) -> str | None:
    """Where to look first: data before training, what was asked before how it was run."""
    if verdict == AGREES:
        return None
    if verdict == CANNOT_TELL:
        return "complete the sweep and compare again: the same command goes on" if found.unfinished else None
    moved = [each for each in quantities if each.kind == "baseline" and each.reason != "identical"]
    words = {change.split(":")[0].split(" ")[0] for change in changed}
    if "spec" in words and any(change.startswith("spec ") for change in changed):
        return "the specs differ: repeat with the reference's spec first"
    if "data_hash" in words or moved:
        seen = " (the closed-form baselines moved with them)" if moved else " (the closed-form baselines did not move)"
        return (
            f"the cells differ{seen}: convert with the reference's version and Census; "
            "where other cells are meant, --other-cells compares what was found of them"
        )
    if "numerics" in words:
        return "the numerics version was raised on purpose: see its entry in CHANGELOG.md, then make the reference anew"
    if "commit" in words:
        before, after = reference.origin.commit, found.origin.commit
        return f"same cells, same spec: git bisect start {_plain(after)} {_plain(before)}, one setting per step"
    if changed:
        return "same cells, spec and code: repeat with the reference's versions, then on its kind of machine"
    one_seed = reference.origin.commit is None
    return "nothing known differs" + (" (the reference does not say its commit)" if one_seed else "")


def _plain(commit: str | None) -> str:
    return (commit or "").rstrip("+")[:12]


def _summary(made: Reproduction) -> str:
    """One line: the verdict, how many losses, and the largest drift or what is missing."""
    losses = made.of_kind("loss")
    agreeing = sum(each.verdict == AGREES for each in losses)
    line = f"{made.name}: {made.verdict}; {agreeing} of {len(losses)} losses agree"
    if made.identical:
        line += f", {made.identical} to the last digit"
    blind = sum(each.reason == BLIND for each in losses)
    if blind:
        line += f", {blind} scatter too far to tell"
    if any(each.verdict == DRIFTED for each in made.of_kind("cells")):
        line += "; the cells are not the reference's"
    drifted = [each for each in made.quantities if each.verdict == DRIFTED and each.kind != "cells"]
    if drifted:
        most = max(drifted, key=lambda each: abs((each.found or 0.0) - (each.reference or 0.0)))
        line += f"; {len(drifted)} quantities drifted, most {most.name}: {most.reference:.4g} -> {most.found:.4g}"
    small = sum(each.reason.endswith("too little to matter") for each in made.quantities)
    if small:
        line += f"; {small} differ by too little to matter"
    if made.missing:
        line += f"; missing {made.missing[0]}" + (f" and {len(made.missing) - 1} more" if made.missing[1:] else "")
    return line


def table_of(made: Reproduction) -> Iterator[str]:
    """The comparison in lines of plain text: quantities that do not simply agree, then what changed."""
    told = [each for each in made.quantities if each.verdict != AGREES or each.reason.endswith("to matter")]
    for each in told:
        values = [f"{value:.5g}" if value is not None else "-" for value in (each.reference, each.found)]
        yield f"{each.verdict:11} {each.kind:10} {each.name}: {values[0]} -> {values[1]} ({each.reason})"
    least = [each.detectable for each in made.of_kind("loss") if each.detectable is not None]
    if least:
        yield (
            f"a drift of a loss is called from {min(least):.3g} to {max(least):.3g} on, by setting; "
            f"differences up to {made.tolerance:.3g} do not matter"
        )
    if made.extra:
        yield f"not in the reference: {', '.join(made.extra[:4])}" + (" ..." if made.extra[4:] else "")
    yield from (f"changed: {each}" for each in made.changed)
    yield from (f"note: {each}" for each in made.notes)
    if made.hint:
        yield f"hint: {made.hint}"
