"""A sweep's spec from whatever a notebook has of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling_ray.spec import SweepSpec, spec_of
from scaling_ray.spec import load_spec as read_spec
from scaling_ray.specs import spec_path


def load_spec(spec: str | Path | Mapping[str, Any] | SweepSpec) -> SweepSpec:
    """A sweep's spec, checked whole.

    Args:
        spec: a TOML file, the name of a shipped example ("demo"), or the tables of one as a dict. A spec is returned
            as it is.

    Returns:
        A frozen model with a field for every key; ``spec.data``, ``spec.grid`` and so on are its tables.

    Raises:
        BadInput: no such file or example, a key that is not known, or a value that cannot be.

    Example:
        >>> scaling_ray.load_spec("demo").grid.seeds
        (1, 2)
    """
    if isinstance(spec, SweepSpec):
        return spec
    return spec_of(spec) if isinstance(spec, Mapping) else read_spec(spec_path(spec))
