"""Gene names of human and mouse with their Ensembl ids: two pinned tables that come with the package.

Each file's first line says where it is from. A name that stands for several ids is in neither.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

SPECIES: dict[str, str] = {"homo_sapiens": "ENSG", "mus_musculus": "ENSMUSG"}
"""Organism, as a Census names it -> prefix of its Ensembl gene ids."""


def _text(organism: str) -> str:
    path = Path(__file__).parent / f"{organism}.tsv.gz"
    return gzip.decompress(path.read_bytes()).decode()


@cache
def ids_by_name(organism: str) -> dict[str, str]:
    """Gene name -> Ensembl id without version, of one of ``SPECIES``."""
    lines = (line.split("\t") for line in _text(organism).splitlines()[1:])
    return {name: f"{SPECIES[organism]}{number:0>11}" for number, name in lines}


@cache
def names_by_id(organism: str) -> dict[str, str]:
    """Ensembl id without version -> gene name."""
    return {feature_id: name for name, feature_id in ids_by_name(organism).items()}


def table_source(organism: str) -> str:
    """Release of a table, in a few words."""
    return _text(organism).partition("\n")[0].removeprefix("# ").partition(",")[0] + ")"
