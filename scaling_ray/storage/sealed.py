"""Seals."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from scaling_ray.errors import BadInput


def _hash(v: Any) -> str:
    return hashlib.sha256(json.dumps(v, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"sha256": _hash(fields)}


def unseal(fields: Any, source: str) -> dict[str, Any]:
    if not isinstance(fields, dict) or "sha256" not in fields:
        raise BadInput(source, "no seal", "x")
    rest = {k: v for k, v in fields.items() if k != "sha256"}
    if _hash(rest) != fields["sha256"]:
        raise BadInput(source, "changed", "sha256 differs")
    return rest
