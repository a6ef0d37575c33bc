"""Names of what a run may be trained on and for, known without torch."""

from __future__ import annotations

from typing import Literal

Recipe = Literal["corrected", "published"]
"""How counts become values and which genes are masked: by the full library and K exactly, or as arXiv 2602.15253."""
