"""An embedding beside principal components of the same values: do both call the same cells near?

A bad embedding looks like a good one until somebody uses it, so ``embed`` says in its summary how it compares with the
plainest method there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.linalg
from numpy.typing import NDArray
from scipy.spatial import cKDTree

SAMPLED_CELLS = 2_000
"""Cells that are compared, evenly spaced over a file."""
NEIGHBOURS, COMPONENTS = 15, 30
_FEW_AGREE = 0.2
_WORSE_BY = 0.05


@dataclass(frozen=True)
class Sample:
    """Some cells of a file: their places (N,) and their normalised values (N, G) of the model's measured genes."""

    cells: NDArray[np.int64]
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """agreement: share of a cell's nearest by the embedding that are nearest by components too; chance: of random ones.

    same_by_embedding, same_by_components: share of the nearest with the cell's own label, where a column has labels.
    All are None for too few cells.
    """

    cells: int
    agreement: float | None = None
    chance: float | None = None
    components: int = 0
    label: str | None = None
    same_by_embedding: float | None = None
    same_by_components: float | None = None

    def facts(self) -> dict[str, Any]:
        """What ``uns`` keeps of it."""
        found = {
            "pca_neighbour_agreement": self.agreement,
            "pca_neighbour_chance": self.chance,
            "label": self.label,
            "same_label_by_embedding": self.same_by_embedding,
            "same_label_by_pca": self.same_by_components,
        }
        return {name: value for name, value in found.items() if value is not None}

    def lines(self) -> list[str]:
        """Sentences for people; the last one warns where there is reason to."""
        if self.agreement is None or self.chance is None:
            return [f"{self.cells:,} cells are too few to compare the embedding with principal components"]
        lines = [
            f"of a cell's {NEIGHBOURS} nearest by this embedding {self.agreement:.0%} are among its {NEIGHBOURS} "
            f"nearest by {self.components} principal components of the same genes ({self.chance:.1%} by chance; "
            f"{self.cells:,} cells)"
        ]
        if self.same_by_embedding is not None and self.same_by_components is not None:
            lines.append(
                f"of a cell's {NEIGHBOURS} nearest {self.same_by_embedding:.0%} have its own {self.label} by this "
                f"embedding, {self.same_by_components:.0%} by principal components"
            )
            if self.same_by_embedding < self.same_by_components - _WORSE_BY:
                lines.append(f"WARNING principal components keep {self.label} better than this embedding: prefer them")
        elif self.agreement < max(_FEW_AGREE, 3 * self.chance):
            lines.append("WARNING this embedding and principal components hardly agree: check it before you use it")
        return lines


def compare_with_components(
    sample: Sample, embedding: NDArray[np.float32], labels: tuple[str, NDArray[np.object_]] | None
) -> Comparison:
    """Compare the neighbours of the sampled cells.

    Args:
        sample: of N cells.
        embedding: (N, D) of the same cells.
        labels: a column's name and its (N,) labels.
    """
    cells = len(sample.cells)
    if cells < 2 * NEIGHBOURS or not sample.values.shape[1]:
        return Comparison(cells)
    components = principal_components(sample.values)
    by_embedding, by_components = nearest(embedding), nearest(components)
    common = [len(np.intersect1d(a, b)) for a, b in zip(by_embedding, by_components, strict=True)]
    same: list[float | None] = [None, None]
    if labels is not None:
        own = labels[1]
        same = [float((own[near] == own[:, None]).mean()) for near in (by_embedding, by_components)]
    chance = NEIGHBOURS / (cells - 1)
    agreement = float(np.mean(common)) / NEIGHBOURS
    label = labels[0] if labels is not None else None
    return Comparison(cells, agreement, chance, components.shape[1], label, same[0], same[1])


def principal_components(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, at most COMPONENTS) scores of (N, G) values, centred by gene."""
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    left, size, _ = scipy.linalg.svd(centred, full_matrices=False)
    found: NDArray[np.float64] = (left * size)[:, :COMPONENTS]
    return found


def nearest(points: NDArray[Any]) -> NDArray[np.int64]:
    """(N, NEIGHBOURS) the nearest other points of each, by Euclidean distance."""
    _, found = cKDTree(points).query(points, k=NEIGHBOURS + 1)
    rows = np.arange(len(points))[:, None]
    # among points that coincide, a point need not be its own nearest
    order = np.argsort(found == rows, axis=1, kind="stable")
    others: NDArray[np.int64] = np.take_along_axis(found, order, axis=1)[:, :NEIGHBOURS]
    return others


def labels_of(obs: pd.DataFrame, cells: NDArray[np.int64]) -> tuple[str, NDArray[np.object_]] | None:
    """A column of cell types and the labels of some cells; None where obs has none with 2 values or more."""
    for column in obs.columns:
        if str(column).strip().lower().replace(" ", "_") in ("cell_type", "celltype", "cell_types", "annotation"):
            labels = obs[column].astype(str).to_numpy(object)[cells]
            if len(set(labels.tolist())) > 1:
                return str(column), labels
    return None
