"""A truth whose loss falls as a power of model size and of training cells: programs whose strengths fall as a power.

A cell has each of a few *programs* switched on or off, independently and by even odds. A program raises the logarithm
of its own genes, a fixed share of all, by about its strength; strengths fall as strength * k^-strength_exponent for
program k = 1, 2, ... Genes belong to several programs at once. So there are as many things to know as programs, each
worth about the square of its strength, and whoever follows the n strongest ones misses a sum that falls as
n^(1 - 2 strength_exponent) while n is small beside their number (``planted/limits.py``).

A few genes behind those of the programs are on in every cell, take their part of the library and say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

LARGEST_LAW_STATES = 4096


@dataclass(frozen=True)
class LawSpec:
    """All parameters of the law. Strengths are natural-log fold changes.

    Every data set measured every gene, and nobody carries an effect. Data sets, donors, depths and copies are those of
    ``PlantSpec``.
    """

    n_genes: int = 168
    """Genes of programs, then those that are always on. A panel of the former alone, the first ``n_told`` genes, hides
    from everybody how many counts the masked ones share."""
    seed: int = 0
    programs: int = 12
    strength: float = 1.5
    """Of the strongest program; a gene of it is raised by 0.5 to 1.5 times as much."""
    strength_exponent: float = 0.7
    program_gene_fraction: float = 0.35
    base_sd: float = 1.0
    """Standard deviation of the genes' own log weights."""
    always_on: int = 8
    always_on_share: float = 0.3
    """Share of every library that the genes which are always on take."""
    concentration_per_gene: float = 20.0
    """Sum of the Dirichlet weights divided by the number of genes: the larger, the less two cells of a state differ."""
    counts_per_gene: float = 30.0
    """Median library size divided by the number of genes."""
    dataset_share: tuple[float, ...] = (0.5, 0.3, 0.2)
    donors_per_dataset: int = 4
    depth_sd: float = 0.3
    depth_levels: int = 16
    empty_share: float = 0.004
    copied_share: float = 0.03

    def __post_init__(self) -> None:
        for name, low in (("programs", 1), ("always_on", 1), ("donors_per_dataset", 1), ("depth_levels", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)}: choose {low} or more")
        for name in ("strength", "concentration_per_gene", "counts_per_gene"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name}: {getattr(self, name)}: choose a number above 0")
        for name in ("strength_exponent", "base_sd", "depth_sd"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}: {getattr(self, name)}: choose 0 or more")
        for name in ("program_gene_fraction", "always_on_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}: choose a share between 0 and 1")
        if self.n_states > LARGEST_LAW_STATES:
            raise ValueError(
                f"programs: {self.programs}: makes {self.n_states} states; the floor is computed for at most "
                f"{LARGEST_LAW_STATES}"
            )
        if self.n_told < 2:
            raise ValueError(
                f"n_genes: {self.n_genes}: choose two more than the {self.always_on} that are always on, or more"
            )

    @property
    def n_told(self) -> int:
        """Genes that programs move: the first of all."""
        return self.n_genes - self.always_on

    @property
    def branching(self) -> tuple[int, ...]:
        """Off and on, for each program; a state of the truth is one of each."""
        return (2,) * self.programs

    @property
    def n_states(self) -> int:
        """Combinations of programs."""
        return 2**self.programs

    @property
    def n_effects(self) -> int:
        """One: donors differ in nothing."""
        return 1

    @property
    def unmeasured_fraction(self) -> tuple[float, ...]:
        """Every data set measured every gene."""
        return (0.0,) * len(self.dataset_share)

    @property
    def depth_per_gene(self) -> tuple[float, ...]:
        """Median library size divided by the number of genes, of each data set."""
        return (self.counts_per_gene,) * len(self.dataset_share)

    @property
    def range_cells(self) -> int:
        """Cells drawn from one random stream."""
        return int(np.clip(2**22 // self.n_genes, 64, 2048))

    def strengths(self) -> np.ndarray:
        """(programs,) mean log fold change of the genes of each program, falling."""
        return self.strength * (np.arange(self.programs) + 1.0) ** -self.strength_exponent


class Stream(Protocol):
    """Where the random numbers of a table come from."""

    def uniform(self, size: int) -> np.ndarray:
        """(size,) numbers from 0 to 1."""

    def normal(self, size: int) -> np.ndarray:
        """(size,) standard normal numbers."""


def law_tables(spec: LawSpec, state_path: np.ndarray, stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """Weights (S, G) of all states and their probabilities (S,).

    Args:
        spec: the law.
        state_path: (S, programs) 1 where a program is on.
        stream: of random numbers.
    """
    base = spec.base_sd * stream.normal(spec.n_told)
    raised = np.zeros((spec.programs, spec.n_told))
    for program, strength in enumerate(spec.strengths()):
        member = stream.uniform(spec.n_told) < spec.program_gene_fraction
        raised[program] = np.where(member, strength * (0.5 + stream.uniform(spec.n_told)), 0.0)
    log_share = base + state_path @ raised
    share = np.exp(log_share - log_share.max(axis=1, keepdims=True))
    share *= (1 - spec.always_on_share) / share.sum(axis=1, keepdims=True)
    behind = np.full((len(share), spec.always_on), spec.always_on_share / spec.always_on)
    weight = spec.concentration_per_gene * spec.n_genes * np.concatenate([share, behind], axis=1)
    return weight, np.full(len(share), 1 / len(share))
