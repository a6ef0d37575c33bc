"""Shared fixtures: small synthetic cells and specs, one torch thread."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from scaling_ray.places import place
from scaling_ray.records import ShardManifest, SplitEntry
from scaling_ray.shards.format import block_name, block_widths, encode_block, split_content, write_file, write_table
from scaling_ray.shards.read import Cells
from scaling_ray.spec import RunSpec, parse_spec

# Ray starts its workers at niceness 15, which on a busy machine is next to nothing; tests wait for them.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads; tests that need torch get one."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    yield


def synthetic_cells(cells: int, genes: int = 64, seed: int = 0, first_id: int = 0, unmeasured: int = 0) -> Cells:
    """Overdispersed counts of two datasets; the second one did not measure the last ``unmeasured`` genes."""
    rng = np.random.default_rng([seed, first_id])
    gene_rate = np.random.default_rng(seed).gamma(0.5, 3.0, size=(1, genes))
    program = np.random.default_rng(seed + 1).lognormal(0.0, 0.7, size=(4, genes))
    state = rng.integers(0, 4, cells)
    depth = rng.gamma(4.0, 0.5, size=(cells, 1))
    counts = rng.poisson(gene_rate * program[state] * depth).astype(np.uint16)
    dataset = (np.arange(cells) % 2).astype(np.int32)
    measured = np.ones((2, genes), dtype=bool)
    if unmeasured:
        measured[1, -unmeasured:] = False
    counts[~measured[dataset]] = 0
    raw_sum = counts.sum(1).astype(np.int64) * 3 + 1
    ids = first_id + 7 * np.arange(cells, dtype=np.int64)
    return Cells(counts, raw_sum, ids, dataset, (np.arange(cells) % 5).astype(np.int32), measured)


@pytest.fixture
def make_cells() -> Callable[..., Cells]:
    """``synthetic_cells`` as a fixture."""
    return synthetic_cells


def write_cells_as_shards(
    directory: Path, splits: dict[str, Cells], file_cells: int = 131_072, row_group_cells: int = 16_384
) -> ShardManifest:
    """Shards of some cells by the project's own writers; small files and row groups make a few cells act like many."""
    entries = {}
    target = place(directory)
    for split, cells in splits.items():
        genes = cells.counts.shape[1]
        columns = {"cell": cells.cell, "raw_sum": cells.raw_sum, "cell_type": cells.dataset, "disease": cells.dataset}
        columns |= {"tissue": cells.dataset, "assay": cells.dataset}
        columns |= {"dataset_id": cells.dataset, "donor_id": cells.donor}
        columns |= {
            block_name(i): encode_block(cells.counts[:, 256 * i : 256 * (i + 1)])
            for i in range(len(block_widths(genes)))
        }
        table = pa.table(columns)
        files = [
            write_file(target, f"{split}-{n:05d}.parquet", table.slice(start, file_cells), genes, row_group_cells)
            for n, start in enumerate(range(0, len(cells), file_cells))
        ]
        entries[split] = SplitEntry(
            cells=len(cells),
            fraction=1 / 3,
            groups=[split],
            donor_cells=np.bincount(cells.donor).tolist(),
            content_sha256=split_content(files),
            files=files,
        )
    presence = pa.table({"measured": encode_block(next(iter(splits.values())).measured.astype(np.uint16))})
    manifest = ShardManifest(
        name="test",
        data_hash="synthetic",
        genes=genes,
        block_genes=256,
        row_group_cells=row_group_cells,
        split_by="donor_id",
        data={},
        census={},
        planted=False,
        dropped={},
        splits=entries,
        tables=[write_table(target, "presence.parquet", presence)],
        codes={},
        made_with={},
    )
    (directory / "manifest.json").write_text(manifest.to_json())
    return manifest


def small_run(
    extra_train: str = "", size: str = "TINY", genes: int = 64, cells: str = '"all"', lr: float = 1e-2
) -> RunSpec:
    """One run from a spec of one grid cell, so that tests take their specs through the parser."""
    return parse_spec(
        f"""
        name = "test"
        sizes.WIDE = {{ width = 8, layers = 2, heads = 2, feedforward = 2 }}
        [grid]
        sizes = ["{size}"]
        genes = [{genes}]
        cells = [{cells}]
        seeds = [1]
        [lr]
        rates = [{lr}]
        [train]
        {extra_train}
        """
    ).runs()[0]


@pytest.fixture
def make_run() -> Callable[..., RunSpec]:
    """``small_run`` as a fixture."""
    return small_run


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private Ray of two CPUs for every test that asks for it; the package's own sessions join it."""
    from scaling_ray.cluster import ray_session

    with ray_session(2):
        yield


@pytest.fixture(scope="session")
def planted_census(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted Census of 900 cells and 200 genes."""
    from scaling_ray.census.plant import plant

    return plant(tmp_path_factory.mktemp("planted") / "census", n_cells=900, n_genes=200, seed=1)


TINY_SWEEP = """
name = "tiny"
[data]
genes = 64
[grid]
sizes = ["XXS", "W4"]
genes = [64]
cells = [100, "all"]
seeds = [1]
[sizes.W4]
width = 4
layers = 1
heads = 1
feedforward = 1
[train]
max_cells_seen = 640
evaluations = 4
[lr]
rule = "choose"
rates = [3e-3, 1e-2]
"""


@pytest.fixture(scope="session")
def tiny_shards(planted_census: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """Shards of the planted Census by TINY_SWEEP's rules."""
    from scaling_ray.shards.convert import build_shards

    out = tmp_path_factory.mktemp("shards") / "shards"
    build_shards(parse_spec(TINY_SWEEP), str(planted_census), out)
    return out
