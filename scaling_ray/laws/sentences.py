"""Two plain sentences for the top of a page, true and useful whatever the verdict is."""

from __future__ import annotations

from typing import Any

from scaling_ray.laws.gates import AXIS_NOUNS
from scaling_ray.laws.verdict import APPROXIMATE, Judged


def sentences(judged: Judged, predictions: dict[str, Any], contrast_lines: list[str]) -> list[str]:
    """What the runs say: the law or why there is none, then what stands without it.

    Args:
        judged: the headline's law.
        predictions: ``headline.predictions``.
        contrast_lines: sentences of :mod:`contrasts`, sizes first.
    """
    predicted = next(
        (e["sentence"] for e in predictions["entries"] if e["sentence"] and e["verdict"] != "refused"), None
    )
    rest = " ".join(line for line in ([predicted] if predicted else []) + contrast_lines)
    if judged.answered:
        return [_law(judged), rest or "Nothing was predicted beyond the sizes trained."]
    more = len(judged.refusals) - 1
    aside = "" if not more else f" (and {more} more reason{'s' if more > 1 else ''})"
    first = f"Refused: these runs do not determine a scaling exponent, because {judged.reasons[0]}{aside}."
    settles = f"What would settle it first: {judged.settles[0]}." if judged.settles else "Nothing is known yet."
    return [first, f"{rest}" if rest else settles]


def _law(judged: Judged) -> str:
    law = judged.law
    parts = []
    for name in law.form.exponents:
        shown = law.headline_interval(name)
        parts.append(f"{name} {law.parameters[name]:.3g} ({shown.low:.3g} to {shown.high:.3g})")
    text = f"{law.form.formula} with {' and '.join(parts)}"
    left = " or ".join(AXIS_NOUNS[axis] for axis in law.form.axes)
    if judged.verdict == APPROXIMATE:
        return (
            f"Approximate: the loss follows {text} closely enough to plan with, whichever {left} is left out, but not "
            f"as a constant of nature: {judged.doubts[0].reason}."
        )
    return f"Supported: within what was trained, the loss falls as {text}, 95% and whichever {left} is left out."
