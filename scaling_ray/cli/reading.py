"""Flags that say how files of cells are read; none of them is needed where a file says it itself."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_ray.census.beliefs import Rules

CELL_FILES = ".h5ad, .zarr, .h5mu, .loom, 10x .h5, or a 10x folder of matrix.mtx (.gz of each too)"

ENDINGS = (".h5ad", ".zarr", ".h5mu", ".loom", ".h5", ".mtx")
"""Of names of such files, before a .gz."""

READING: dict[str, Any] = {
    "layer": None,
    "donor": [],
    "organism": None,
    "genes": "union",
    "gene_ids": "mapped",
    "trust_counts": False,
    "cut_counts": False,
    "title": None,
    "source": None,
}
"""The flags, with the values of those that nobody gave."""


def add_reading_flags(parser: argparse.ArgumentParser, when: str = "") -> None:
    """Add the flags; ``when`` begins the help of each."""
    parser.add_argument(
        "--layer",
        metavar="NAME",
        default=READING["layer"],
        help=f"{when}where the counts are: X, raw.X or a layer's name (found if left out)",
    )
    parser.add_argument(
        "--donor",
        metavar="COLUMN",
        action="append",
        default=READING["donor"],
        help=f"{when}obs column of donors (found if left out); repeatable, the first that a file has; @file: one each",
    )
    parser.add_argument(
        "--organism",
        choices=("homo_sapiens", "mus_musculus"),
        default=READING["organism"],
        help=f"{when}keep the genes of this species only (told from the ids if left out)",
    )
    parser.add_argument(
        "--genes",
        choices=("union", "intersection"),
        default=READING["genes"],
        help=f"{when}genes of several files: all that any has, or those that all have (libraries are then of those)",
    )
    parser.add_argument(
        "--gene-ids",
        choices=("mapped", "given"),
        default=READING["gene_ids"],
        help=f"{when}given: take ids as they stand, drop no version and map no name; needs --organism",
    )
    parser.add_argument(
        "--trust-counts", action="store_true", help=f"{when}take whole numbers as counts that look like none"
    )
    parser.add_argument(
        "--cut-counts", action="store_true", help=f"{when}take the counts of a panel as whole libraries"
    )
    parser.add_argument(
        "--title", metavar="TEXT", default=None, help=f"{when}what the cells are called in the Census and in reports"
    )
    parser.add_argument("--source", metavar="TEXT", default=None, help=f"{when}citation or address of the cells")


def reading_rules(options: argparse.Namespace) -> Rules:
    """What the flags say."""
    from scaling_ray.census.beliefs import Rules

    given = {name: getattr(options, name) for name in READING}
    return Rules(**given | {"donor": tuple(options.donor)})
