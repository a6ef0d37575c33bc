"""Laws of loss against size and data: forms, fits, intervals, the gates a fit must pass, and units."""

from __future__ import annotations

from scaling_ray.laws.many import refit
from scaling_ray.laws.table import fit_table

__all__ = ["fit_table", "refit"]
