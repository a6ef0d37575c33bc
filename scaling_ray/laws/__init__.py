"""Laws of loss against size and data: forms, fits, intervals, the gates a fit must pass, and units."""

from __future__ import annotations

from scaling_ray.laws.many import refit
from scaling_ray.laws.points import Agreement
from scaling_ray.laws.table import fit_table, nothing_to_fit

__all__ = ["Agreement", "fit_table", "nothing_to_fit", "refit"]
