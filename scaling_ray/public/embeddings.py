"""New cells through an exported model, as vectors."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scaling_ray.extras import require_extras

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, repr=False)
class Embedding:
    """One vector for each of B cells.

    ``vectors`` is (B, D) float32, D the model's width, in the order of the file; ``cell_ids`` are its B names.
    ``genes_matched`` of the model's ``genes`` were found, the others went in as unmeasured. ``agreement`` is the share
    of a cell's nearest neighbours that principal components of the same genes call near too, ``chance`` that of random
    ones; both are None for too few cells. ``lines`` is what ``scaling-ray embed`` says, warnings included, and
    ``file`` the copy of the cells that was written, if one was asked for.
    """

    vectors: NDArray[np.float32] = field(repr=False)
    cell_ids: Sequence[str] = field(repr=False)
    run_id: str
    genes: int
    genes_matched: int
    agreement: float | None
    chance: float | None
    lines: tuple[str, ...]
    file: Path | None

    def __repr__(self) -> str:
        cells, width = self.vectors.shape
        head = f"{cells:,} cells, {width} values each, by {self.run_id}"
        return "\n".join([head, *(f"  {line}" for line in self.lines)])


def embed(
    model: str | Path,
    cells: str | Path | anndata.AnnData,
    out: str | Path | None = None,
    *,
    batch_cells: int = 64,
    layer: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    min_genes: float = 0.5,
    cut_counts: bool = False,
    trust_counts: bool = False,
) -> Embedding:
    """Embed new cells with a trained model. Needs ``pip install 'scaling-ray[train,census]'``.

    Args:
        model: directory that ``scaling-ray export`` made.
        cells: raw counts: an .h5ad, .zarr, .h5mu, .loom or 10x .h5 file, a 10x folder of a matrix, or an AnnData.
        out: .h5ad file to write, or replace: the cells with ``obsm["X_scaling_ray"]``. No file is kept if left out.
        batch_cells: cells in the network at a time.
        layer: where the counts are: ``X``, ``raw.X`` or a layer's name; found if left out.
        device: where the network runs, in fp32.
        min_genes: share of the model's genes that the cells must have, 0 to 1.
        cut_counts: take counts that are cut to a panel as whole libraries.
        trust_counts: take whole numbers as counts that look like none.

    Raises:
        BadInput: no whole model, no raw counts, too few of the model's genes, an ``out`` that cannot be, or an extra
            that is not installed.

    Example:
        >>> found = scaling_ray.embed("model", "cells.h5ad")
        >>> found.vectors.shape
        (10000, 64)
    """
    require_extras("embed", "train", "census")
    from anndata import read_h5ad

    from scaling_ray.embedding import ABOUT, EMBEDDING, embed_h5ad

    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="scaling-ray-") as folder:
        if isinstance(cells, str | Path):
            source = Path(cells)
        else:
            source = Path(folder) / "cells.h5ad"
            cells.write_h5ad(source)
        target = embed_h5ad(
            Path(model),
            source,
            Path(folder) / "embedded.h5ad" if out is None else out,
            batch_cells=batch_cells,
            layer=layer,
            device=device,
            min_genes=min_genes,
            cut_counts=cut_counts,
            trust_counts=trust_counts,
            progress=lines.append,
        )
        written = read_h5ad(target, backed="r")
        try:
            about: Mapping[str, Any] = written.uns[ABOUT]
            return Embedding(
                vectors=written.obsm[EMBEDDING],
                cell_ids=tuple(map(str, written.obs_names)),
                run_id=str(about["run_id"]),
                genes=int(about["genes"]),
                genes_matched=int(about["genes_matched"]),
                agreement=_share(about, "pca_neighbour_agreement"),
                chance=_share(about, "pca_neighbour_chance"),
                lines=tuple(line for line in lines if not line.startswith("embedded ")),
                file=None if out is None else target,
            )
        finally:
            written.file.close()


def _share(about: Mapping[str, Any], name: str) -> float | None:
    return float(about[name]) if name in about else None
