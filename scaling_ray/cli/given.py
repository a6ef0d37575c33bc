"""What several verbs make of their arguments."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scaling_ray.spec import SweepSpec


def spec_of(options: argparse.Namespace) -> SweepSpec:
    """The spec of a verb that takes one; ``options.spec`` becomes the path of its file."""
    from scaling_ray.spec import load_spec
    from scaling_ray.specs import spec_path

    options.spec = spec_path(options.spec)
    return load_spec(options.spec)


def flag(name: str) -> str:
    """The flag of an option: max_cost -> --max-cost."""
    return f"--{name.replace('_', '-')}"
