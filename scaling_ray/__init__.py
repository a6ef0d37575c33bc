"""Scaling laws for single-cell models: cells in, a law with intervals one can defend out.

What a notebook needs is here, by name: ``fit_table``, ``load_spec``, ``plan``, ``read_results``, ``audit`` and
``embed``, with what they return and ``scaling_ray.errors.BadInput``, which they raise. Everything else in the package
may change without notice. A name is imported when it is first used, so that ``import scaling_ray`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_ray.public.audits import audit
    from scaling_ray.public.embeddings import embed
    from scaling_ray.public.fits import fit_table
    from scaling_ray.public.plans import plan
    from scaling_ray.public.results import read_results
    from scaling_ray.public.specs import load_spec

__all__ = ["audit", "embed", "fit_table", "load_spec", "plan", "read_results"]
__version__ = "0.1.0"

_ROOMS = {
    "audit": "audits",
    "embed": "embeddings",
    "fit_table": "fits",
    "load_spec": "specs",
    "plan": "plans",
    "read_results": "results",
}


if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> Any:
        if name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"scaling_ray.public.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
