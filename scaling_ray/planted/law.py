"""A truth whose loss falls as a power of model size and of training cells: Zipf states with markers of their own.

A cell draws one state in each of a few independent *groups* by a Zipf law: state k (0, 1, ...) of a group has
probability proportional to (k + 1 + state_offset)^-(1 + state_exponent). A state switches on its own few marker genes
and no others. A few genes behind the markers are on in every cell, take the rest of the library and say nothing.

So there are groups * states_per_group things to know, each worth about its frequency, and whoever knows the n most
frequent ones of each group misses a share that falls as n^-state_exponent (``planted/limits.py``). A marker that is on
has a small weight: its count is now zero, now large. Whether a state is on is thus a question of any of its markers
being seen, which a linear predictor answers badly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LARGEST_LAW_STATES = 4096


@dataclass(frozen=True)
class LawSpec:
    """All parameters of the law. Weights are Dirichlet weights, in units of their own sum.

    Every data set measured every gene, and nobody carries an effect. Data sets, donors, depths and copies are those of
    ``PlantSpec``.
    """

    n_genes: int = 200
    """Markers, then the genes that are always on. A panel of the markers alone, the first ``n_markers`` genes, hides
    from everybody how many counts the masked ones share."""
    seed: int = 0
    groups: int = 3
    states_per_group: int = 16
    markers: int = 4
    state_exponent: float = 0.5
    state_offset: float = 1.0
    marker_weight: float = 0.45
    """Dirichlet weight of a marker that is on; the smaller, the more its counts vary."""
    marker_sd: float = 0.2
    """Standard deviation of the log weights of markers that are on."""
    silent_weight: float = 1e-4
    """Dirichlet weight of a marker that is off."""
    always_on_weight: float = 5.0
    """Sum of the Dirichlet weights of the genes that are always on."""
    counts_per_weight: float = 60.0
    """Median library size divided by the sum of all weights."""
    dataset_share: tuple[float, ...] = (0.5, 0.3, 0.2)
    donors_per_dataset: int = 4
    depth_sd: float = 0.3
    depth_levels: int = 16
    empty_share: float = 0.004
    copied_share: float = 0.03

    def __post_init__(self) -> None:
        for name, low in (("groups", 1), ("states_per_group", 2), ("markers", 1), ("donors_per_dataset", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)}: choose {low} or more")
        for name in ("marker_weight", "silent_weight", "always_on_weight", "counts_per_weight", "state_exponent"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}: choose a number above 0")
        for name in ("state_offset", "marker_sd", "depth_sd"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}: choose 0 or more")
        if self.n_states > LARGEST_LAW_STATES:
            raise ValueError(
                f"states_per_group: {self.states_per_group}: {self.groups} groups make {self.n_states} states; "
                f"the floor is computed for at most {LARGEST_LAW_STATES}"
            )
        if self.n_genes <= self.n_markers:
            raise ValueError(
                f"n_genes: {self.n_genes}: choose more than the {self.n_markers} markers of {self.groups} groups of "
                f"{self.states_per_group} states with {self.markers} each; the others are always on"
            )

    @property
    def n_markers(self) -> int:
        """Genes that a state switches on: the first of all."""
        return self.groups * self.states_per_group * self.markers

    @property
    def branching(self) -> tuple[int, ...]:
        """States of each group; a state of the truth is one of each."""
        return (self.states_per_group,) * self.groups

    @property
    def n_states(self) -> int:
        """Combinations of one state per group."""
        return self.states_per_group**self.groups

    @property
    def n_effects(self) -> int:
        """One: donors differ in nothing."""
        return 1

    @property
    def unmeasured_fraction(self) -> tuple[float, ...]:
        """Every data set measured every gene."""
        return (0.0,) * len(self.dataset_share)

    @property
    def concentration_per_gene(self) -> float:
        """Sum of a component's weights, divided by the number of genes."""
        return (self.groups * self.markers * self.marker_weight + self.always_on_weight) / self.n_genes

    @property
    def depth_per_gene(self) -> tuple[float, ...]:
        """Median library size divided by the number of genes, of each data set."""
        return (self.counts_per_weight * self.concentration_per_gene,) * len(self.dataset_share)

    @property
    def range_cells(self) -> int:
        """Cells drawn from one random stream."""
        return int(np.clip(2**22 // self.n_genes, 64, 2048))

    def state_probability(self) -> np.ndarray:
        """(states_per_group,) of one group, falling."""
        weight = (np.arange(self.states_per_group) + 1.0 + self.state_offset) ** -(1.0 + self.state_exponent)
        return weight / weight.sum()


def law_tables(spec: LawSpec, state_path: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (S, G) of all states and their probabilities (S,).

    Args:
        spec: the law.
        state_path: (S, groups) the state of each group.
        normals: (n_markers,) standard normal numbers.
    """
    on = spec.marker_weight * np.exp(spec.marker_sd * normals)
    weight = np.full((spec.n_states, spec.n_genes), spec.silent_weight)
    weight[:, spec.n_markers :] = spec.always_on_weight / (spec.n_genes - spec.n_markers)
    own = np.arange(spec.n_markers).reshape(spec.groups, spec.states_per_group, spec.markers)
    for group in range(spec.groups):
        genes = own[group, state_path[:, group]]  # (S, markers)
        np.put_along_axis(weight, genes, on[genes], axis=1)
    weight *= spec.concentration_per_gene * spec.n_genes / weight.sum(axis=1, keepdims=True)
    return weight, np.prod(spec.state_probability()[state_path], axis=1)
