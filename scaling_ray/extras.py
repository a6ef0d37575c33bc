"""Extras of an installation (``pip install 'scaling-ray[train]'``): what each brings, and what to say without it.

A light installation has none of them. Nothing is imported here, so the question costs nothing.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from scaling_ray.errors import BadInput

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("torch", "safetensors"),
    "cluster": ("ray",),
    "census": (
        *("tiledbsoma", "cellxgene_census", "anndata", "h5py", "pandas", "requests", "safetensors", "scanpy", "skmisc"),
        "zarr",
    ),
    "track": ("mlflow",),
    "s3": ("boto3", "botocore"),
}
"""Extra -> the modules that the package imports from it. No verb needs the extra ``loom``: a .loom file asks for it."""


def missing_modules(extra: str) -> list[str]:
    """The modules of an extra that cannot be imported here."""
    return [module for module in EXTRAS[extra] if not _is_importable(module)]


def require_extras(field: str, *extras: str) -> None:
    """BadInput with the command that installs what is missing, where one of ``extras`` is; ``field`` asked for them."""
    lacking = {extra: found for extra in extras if (found := missing_modules(extra))}
    if lacking:
        modules = ", ".join(dict.fromkeys(module for found in lacking.values() for module in found))
        raise BadInput("V001", field, modules, f"not installed; pip install 'scaling-ray[{','.join(lacking)}]'")


def _is_importable(module: str) -> bool:
    # Not find_spec alone: it refuses to answer for a module that was loaded without a spec.
    return sys.modules[module] is not None if module in sys.modules else find_spec(module) is not None
