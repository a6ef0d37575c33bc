"""JSON that carries a hash of itself: whoever reads it back knows that no digit of it has changed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from scaling_ray.errors import BadInput

SEAL = "sha256"
"""The field that holds the hash of all others."""


def seal(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` and, last, the sha256 over their canonical JSON; ValueError where a field has that name already."""
    if SEAL in fields:
        raise ValueError(f"a sealed document has no field {SEAL!r} of its own")
    return fields | {SEAL: _digest(json.dumps(fields, allow_nan=False))}


def sealed_json(fields: dict[str, Any]) -> str:
    """``fields``, sealed, as indented JSON text that ends in a newline; NaN and infinity are refused."""
    return json.dumps(seal(fields), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def unseal(text: bytes | str, source: str, remedy: str = "make it anew") -> dict[str, Any]:
    """The fields of a sealed document, without the seal.

    Args:
        text: of the document; its spaces and line breaks do not count, every digit does.
        source: its name, for the message.
        remedy: the way out, for the message.

    Raises:
        BadInput: it is cut short or no JSON object, was changed, or has no seal.
    """
    try:
        whole = text.decode() if isinstance(text, bytes) else text
        fields = json.loads(whole)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise BadInput("P014", source, reason, f"is no JSON, so cut short or damaged; {remedy}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get(SEAL), str):
        raise BadInput("P015", source, f"no field {SEAL!r}", f"was written by another version, or is damaged; {remedy}")
    found, said = _digest(whole), fields.pop(SEAL)
    if found != said:
        raise BadInput(
            "P016", source, f"sha256 {found[:12]}, not {said[:12]}", f"was changed since it was written; {remedy}"
        )
    return fields


def _digest(text: str) -> str:
    """Of a JSON object without its seal. Numbers count as they are written: two texts may say the same float."""
    fields = json.loads(text, parse_float=_as_written, parse_int=_as_written, parse_constant=_as_written)
    fields.pop(SEAL, None)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _as_written(digits: str) -> list[str]:
    return ["number", digits]
