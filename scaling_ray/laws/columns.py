"""Columns of a table as numbers, unknown values and all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_ray.errors import BadInput


def numbers(columns: Mapping[str, Any], name: str, rows: np.ndarray) -> np.ndarray:
    """Column ``name`` as float64 (R,), unknown values as NaN.

    Raises:
        BadInput: a value among ``rows`` (boolean, (R,)) that is no number.
    """
    values = np.full(len(rows), np.nan)
    for i, value in enumerate(columns[name]):
        if value is None or value == "":
            continue
        try:
            values[i] = float(value)
        except (TypeError, ValueError) as error:
            if rows[i]:
                raise BadInput(name, value, f"row {i + 1}: not a number") from error
    return values
