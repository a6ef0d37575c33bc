"""A truth whose loss falls as a power of model size and of training cells: programs whose strengths fall as a power.

A cell has a few *switches*, each on or off, independently and by even odds. A *program* adds a log change of its own,
of either sign, to every gene where an even number of its switches is on, and takes it away where an odd number is.
Switches come in groups, and every choice of switches of one group is a program: five make thirty-one. So the signs of
any two programs are uncorrelated over cells, and there are as many directions to learn as programs, many more than
switches. Strengths fall as strength * k^-strength_exponent for program k = 1, 2, ..., groups in turn, and whoever
follows the n strongest misses a sum that falls about as n^(1 - 2 strength_exponent) while n is small beside their
number (``planted/limits.py``).

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

    n_genes: int = 264
    """Genes of programs, then those that are always on. A panel of the former alone, the first ``n_told`` genes, hides
    from everybody how many counts the masked ones share."""
    seed: int = 0
    groups: int = 2
    switches: int = 5
    """Of each group; 2^switches - 1 programs."""
    strength: float = 0.6
    """Of the strongest program: standard deviation over genes of its log changes."""
    strength_exponent: float = 0.9
    base_sd: float = 0.5
    """Standard deviation of the genes' own log weights."""
    always_on: int = 8
    always_on_share: float = 0.3
    """Share of every library that the genes which are always on take."""
    concentration_per_gene: float = 960.0
    """Sum of the Dirichlet weights divided by the number of genes: the larger, the less two cells of a state differ."""
    counts_per_gene: float = 960.0
    """Median library size divided by the number of genes: so many that chance stays far below what programs say."""
    dataset_share: tuple[float, ...] = (0.5, 0.3, 0.2)
    donors_per_dataset: int = 4
    depth_sd: float = 0.3
    depth_levels: int = 16
    empty_share: float = 0.004
    copied_share: float = 0.03

    def __post_init__(self) -> None:
        for name, low in (
            ("groups", 1),
            ("switches", 1),
            ("always_on", 1),
            ("donors_per_dataset", 1),
            ("depth_levels", 1),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)}: choose {low} or more")
        for name in ("strength", "concentration_per_gene", "counts_per_gene"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name}: {getattr(self, name)}: choose a number above 0")
        for name in ("strength_exponent", "base_sd", "depth_sd"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}: {getattr(self, name)}: choose 0 or more")
        if not 0 < self.always_on_share < 1:
            raise ValueError(f"always_on_share: {self.always_on_share}: choose a share between 0 and 1")
        if self.n_states > LARGEST_LAW_STATES:
            raise ValueError(
                f"switches: {self.switches}: makes {self.n_states} states of {self.groups} groups; the floor is "
                f"computed for at most {LARGEST_LAW_STATES}"
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
        """Off and on, for each switch, group by group; a state of the truth is one of each."""
        return (2,) * (self.groups * self.switches)

    @property
    def n_states(self) -> int:
        """Combinations of switches."""
        return 2 ** (self.groups * self.switches)

    @property
    def programs(self) -> int:
        """Of all groups."""
        return int(self.groups * (2**self.switches - 1))

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
        """(programs,) standard deviation over genes of the log change of each program, falling."""
        return self.strength * (np.arange(self.programs) + 1.0) ** -self.strength_exponent

    def signs(self, state_path: np.ndarray) -> np.ndarray:
        """(S, programs) the sign that each program's log changes take in a state; strongest first.

        Args:
            state_path: (S, groups * switches) 1 where a switch is on.
        """
        by_group = state_path.reshape(-1, self.groups, self.switches)
        chosen = (np.arange(1, 2**self.switches)[:, None] >> np.arange(self.switches)) & 1
        odd = np.einsum("sgw,pw->spg", by_group, chosen) % 2
        return (1 - 2 * odd).reshape(len(state_path), self.programs)


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
        state_path: (S, groups * switches) 1 where a switch is on.
        stream: of random numbers.
    """
    base = spec.base_sd * stream.normal(spec.n_told)
    moved = np.stack([strength * stream.normal(spec.n_told) for strength in spec.strengths()])
    log_share = base + spec.signs(state_path) @ moved
    share = np.exp(log_share - log_share.max(axis=1, keepdims=True))
    share *= (1 - spec.always_on_share) / share.sum(axis=1, keepdims=True)
    behind = np.full((len(share), spec.always_on), spec.always_on_share / spec.always_on)
    weight = spec.concentration_per_gene * spec.n_genes * np.concatenate([share, behind], axis=1)
    return weight, np.full(len(share), 1 / len(share))
