"""Every refusal of the package, read from its source: code, line, cause and way out, and where it is raised.

``python -m scaling_ray.refusals docs/errors.md`` writes the list (``make errors``), ``--check`` says whether it is the
one that the source gives. ``scaling-ray explain CODE`` reads the same source, so it needs no list beside it.
"""

from __future__ import annotations

from scaling_ray.refusals.listing import Refusal, complaints, next_code, refusals
from scaling_ray.refusals.markdown import main, page
from scaling_ray.refusals.scan import sites, sources_here

__all__ = ["Refusal", "complaints", "main", "next_code", "page", "refusals", "sites", "sources_here"]
