"""The model that a planted Census was drawn from, derived again from ``plant.json`` alone.

The model. A cell has a *state* (one leaf of a tree of gene programs, or in a plant of the law, ``planted/law.py``, one
combination of switches that are on and off), an *effect* (its donor carries one of a few
shifts of expression), a *depth* (one level of a grid that belongs to its dataset) and a dataset, which measured
some of the genes. With alpha[s, e, g] the Dirichlet weights of the measured genes, scaled to the same sum A in
every state and effect, the counts of gene g are independent negative binomials of shape alpha[s, e, g] and one
common probability theta. So given their total the counts are Dirichlet-multinomial, and the total itself carries no
information about state or effect.

The weights are kept as whole multiples of 2^-20. Floating-point libraries differ in their last bit between
machines; rounded weights do not, and a hash over them tells whether this machine derives the same truth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri

from scaling_ray.errors import BadInput
from scaling_ray.planted.law import LawSpec, law_tables

TRUTH_NAME = "plant.json"
TRUTH_VERSION = 1
WEIGHT_UNIT = 2.0**-20


@dataclass(frozen=True)
class PlantSpec:
    """All parameters of the truth. Strengths are natural-log fold changes."""

    n_genes: int = 2000
    seed: int = 0
    branching: tuple[int, ...] = (4, 4, 6)
    """Children per level; states = their product. Programs below the first level recur in every branch."""
    program_gene_fraction: tuple[float, ...] = (0.20, 0.15, 0.06)
    program_strength: tuple[float, ...] = (3.0, 2.6, 0.6)
    base_sd: float = 2.0
    largest_share: float = 0.02
    """No gene takes more of a library than about this, so that deep libraries stay within 16-bit counts."""
    n_effects: int = 4
    effect_gene_fraction: float = 0.3
    effect_sd: float = 0.6
    dataset_share: tuple[float, ...] = (0.41, 0.31, 0.24, 0.04)
    donors_per_dataset: int = 4
    unmeasured_fraction: tuple[float, ...] = (0.0, 0.03, 0.04, 0.06)
    concentration_per_gene: float = 1.0
    """A / G: the smaller, the more two cells of one state differ."""
    depth_per_gene: tuple[float, ...] = (0.28, 0.28, 0.2, 40.0)
    """Median library size / G of each dataset; the last one reads whole transcripts."""
    depth_sd: float = 0.5
    depth_levels: int = 64
    empty_share: float = 0.004
    """Cells of the lowest depth level, where most libraries have no count at all."""
    copied_share: float = 0.03
    """Rows that repeat another cell and say so (is_primary_data is false)."""

    def __post_init__(self) -> None:
        levels = len(self.branching)
        if not (levels == len(self.program_gene_fraction) == len(self.program_strength)):
            raise ValueError("branching, program_gene_fraction and program_strength: one entry per level each")
        datasets = len(self.dataset_share)
        if not (datasets == len(self.unmeasured_fraction) == len(self.depth_per_gene)):
            raise ValueError("dataset_share, unmeasured_fraction and depth_per_gene: one entry per dataset each")
        if self.donors_per_dataset % self.n_effects:
            # otherwise the dataset would be evidence about the effect, and the posterior would need it
            raise ValueError(f"donors_per_dataset: {self.donors_per_dataset}: must be a multiple of n_effects")

    @property
    def n_states(self) -> int:
        """Leaves of the tree."""
        return math.prod(self.branching)

    @property
    def range_cells(self) -> int:
        """Cells drawn from one random stream; a function of the spec so that any plant of it agrees."""
        return int(np.clip(2**22 // self.n_genes, 64, 2048))


Spec = PlantSpec | LawSpec
_SPECS: dict[str, type[PlantSpec] | type[LawSpec]] = {"tree": PlantSpec, "switches": LawSpec}


class PlantedTruth:
    """The generating model of one planted Census, derived from its spec.

    Shape legend: S states, E effects, C = S * E components (state major), G genes, T datasets, J depth levels.

    Attributes:
        spec: the parameters.
        n_cells: cells of the Census beside this truth (0 where none was drawn yet).
        state_prior: (S,) probabilities.
        effect_prior: (E,) probabilities.
        measured: (T, G) bool.
        dataset_ids: names of the rows of ``measured``.
    """

    def __init__(self, spec: Spec, n_cells: int = 0) -> None:
        self.spec, self.n_cells = spec, n_cells
        stream = _Normals(spec.seed)
        self.state_path = np.stack(np.unravel_index(np.arange(spec.n_states), spec.branching), axis=1)
        if isinstance(spec, LawSpec):
            weight, prior = law_tables(spec, self.state_path, stream)
        else:
            weight, prior = _tree_tables(spec, self.state_path, stream)
        self._units = np.maximum(np.rint(weight / WEIGHT_UNIT), 1).astype(np.int64)
        self._prior_units = np.maximum(np.rint(prior / WEIGHT_UNIT), 1).astype(np.int64)
        self.state_prior = self._prior_units / self._prior_units.sum()
        self.effect_prior = np.full(spec.n_effects, 1 / spec.n_effects)
        self.measured = np.stack([stream.uniform(spec.n_genes) >= fraction for fraction in spec.unmeasured_fraction])
        self.dataset_ids = [f"planted-{spec.seed}-{i}" for i in range(len(spec.dataset_share))]
        self.concentration = float(spec.concentration_per_gene * spec.n_genes)
        self._weights_of: dict[int, np.ndarray] = {}

    @cached_property
    def table_sha256(self) -> str:
        """Hash of the integer weights, priors and measured genes."""
        digest = hashlib.sha256()
        for part in (self._units, self._prior_units, self.measured.astype(np.uint8)):
            digest.update(np.ascontiguousarray(part.astype(part.dtype.newbyteorder("<"))).tobytes())
        return digest.hexdigest()

    def weights(self, dataset: int) -> np.ndarray:
        """(C, G) Dirichlet weights of one dataset: 0 where unmeasured, each row sums to ``concentration``."""
        if dataset not in self._weights_of:
            kept = np.where(self.measured[dataset], self._units, 0).astype(np.float64)
            self._weights_of[dataset] = kept * (self.concentration / kept.sum(axis=1, keepdims=True))
        return self._weights_of[dataset]

    @cached_property
    def component_prior(self) -> np.ndarray:
        """(C,) prior of (state, effect), state major."""
        return np.outer(self.state_prior, self.effect_prior).ravel()

    def depth_grid(self, dataset: int) -> tuple[np.ndarray, np.ndarray]:
        """Expected library sizes (J,) of a dataset's cells and their probabilities (J,).

        The levels are the mid-quantiles of a log-normal; one more level represents empty droplets.
        """
        spec = self.spec
        quantiles = (np.arange(spec.depth_levels) + 0.5) / spec.depth_levels
        sizes = spec.depth_per_gene[dataset] * spec.n_genes * np.exp(spec.depth_sd * ndtri(quantiles))
        share = np.full(spec.depth_levels, (1 - spec.empty_share) / spec.depth_levels)
        return np.append(sizes, 0.4), np.append(share, spec.empty_share)

    @property
    def donor_ids(self) -> list[str]:
        """All donors, by dataset."""
        spec = self.spec
        return [f"donor-{t}-{i}" for t in range(len(spec.dataset_share)) for i in range(spec.donors_per_dataset)]

    def effect_of_donor(self, donor_id: str | Sequence[str]) -> Any:
        """The effect (0 .. E-1) that a donor carries; an array for a sequence of donors."""
        if isinstance(donor_id, str):
            return self._effect_of_donor[donor_id]
        return np.array([self._effect_of_donor[d] for d in donor_id], np.int64)

    @cached_property
    def _effect_of_donor(self) -> dict[str, int]:
        spec = self.spec
        effects: dict[str, int] = {}
        for index, donor in enumerate(self.donor_ids):
            dataset, place = divmod(index, spec.donors_per_dataset)
            # turned by dataset so that donor k of each dataset is not the same effect everywhere
            effects[donor] = (place + dataset) % spec.n_effects
        return effects

    def dataset_index(self, dataset_id: Sequence[str]) -> np.ndarray:
        """Rows of ``measured`` for a sequence of dataset_ids."""
        row = {name: i for i, name in enumerate(self.dataset_ids)}
        return np.array([row[d] for d in dataset_id], np.int64)

    def to_json(self) -> str:
        """The text of plant.json."""
        return (
            json.dumps(
                {
                    "truth_version": TRUTH_VERSION,
                    # a tree's file says no design, as before there were others
                    **({"design": "switches"} if isinstance(self.spec, LawSpec) else {}),
                    "n_cells": self.n_cells,
                    "spec": dataclasses.asdict(self.spec),
                    "table_sha256": self.table_sha256,
                },
                indent=1,
            )
            + "\n"
        )


class _Normals:
    """Numbers for the table, from uniform bits alone: of numpy's generators that part is the least likely to change."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0x7AB1E])))

    def uniform(self, size: int) -> np.ndarray:
        return self._bits.random(size)

    def normal(self, size: int) -> np.ndarray:
        return ndtri(np.clip(self._bits.random(size), 2.0**-53, 1 - 2.0**-53))


def _tree_tables(spec: PlantSpec, state_path: np.ndarray, stream: _Normals) -> tuple[np.ndarray, np.ndarray]:
    """Weights (C, G) of a tree of programs, and the probabilities (S,) of its leaves."""
    genes, states = spec.n_genes, spec.n_states
    base = np.clip(stream.normal(genes) * spec.base_sd, -4 * spec.base_sd, 2.2 * spec.base_sd)
    log_state = np.tile(base, (states, 1))
    for level, children in enumerate(spec.branching):
        programs = np.zeros((children, genes))
        for child in range(children):
            member = stream.uniform(genes) < spec.program_gene_fraction[level]
            programs[child, member] = spec.program_strength[level] * (0.5 + stream.uniform(genes)[member])
        log_state += programs[state_path[:, level]]
    shifts = np.zeros((spec.n_effects, genes))
    for effect in range(1, spec.n_effects):
        member = stream.uniform(genes) < spec.effect_gene_fraction
        shifts[effect, member] = spec.effect_sd * stream.normal(genes)[member]
    log_weight = log_state[:, None, :] + shifts[None]
    share = np.exp(log_weight - log_weight.max(axis=2, keepdims=True))
    share /= share.sum(axis=2, keepdims=True)
    share = np.minimum(share, spec.largest_share)
    weight = spec.concentration_per_gene * genes * share / share.sum(axis=2, keepdims=True)
    rarity = np.exp(0.7 * stream.normal(states))
    return weight.reshape(-1, genes), rarity / rarity.sum()


def load_truth(path: str | Path) -> PlantedTruth:
    """The truth of a planted Census.

    Args:
        path: the Census directory, or its plant.json.

    Raises:
        BadInput: no plant.json there, an unknown version, or a table that comes out differently here.
    """
    path = Path(path)
    if path.is_dir():
        path = path / TRUTH_NAME
    if not path.is_file():
        raise BadInput("C078", "truth", str(path), "does not exist; only a planted Census has one")
    return parse_truth(path.read_text(), str(path))


def parse_truth(plant_json: str, source: str) -> PlantedTruth:
    """The truth in the text of a plant.json; BadInput as ``load_truth``, naming ``source``."""
    try:
        text = json.loads(plant_json)
        version, stored = text["truth_version"], dict(text["spec"])
        if version != TRUTH_VERSION:
            raise BadInput(
                "C079", "truth_version", version, f"this version reads {TRUTH_VERSION}; plant the Census again"
            )
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
        design = text.get("design", "tree")
        if design not in _SPECS:
            raise BadInput(
                "C080", "design", design, f"this version reads {' or '.join(_SPECS)}; plant the Census again"
            )
        spec = _SPECS[design](**fields)
        n_cells, expected = int(text["n_cells"]), text["table_sha256"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadInput("C081", "truth", source, f"is no plant.json ({error}); plant the Census again") from error
    truth = PlantedTruth(spec, n_cells)
    if truth.table_sha256 != expected:
        raise BadInput(
            "C082",
            "table_sha256",
            truth.table_sha256,
            f"differs from {expected} in {source}: this machine does not derive the table the Census was drawn from; "
            "plant the Census again here",
        )
    return truth
