"""A stream gives the batches of a resident run: in windows of stored row groups, from any batch on, on any ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_SWEEP, small_run, synthetic_cells, write_cells_as_shards

from scaling_ray.errors import BadInput, DamagedFiles
from scaling_ray.records import ShardManifest
from scaling_ray.runs import RunSpec
from scaling_ray.shards.format import read_manifest, row_groups
from scaling_ray.shards.order import RunOrder, RunRows, chosen_donors, donor_rows, keyed_permutation, replicate_rows
from scaling_ray.shards.read import Cells, Feed, ResidentFeed, read_measured, read_rows, read_split, shards_order
from scaling_ray.shards.stream import StreamFeed, open_feed, read_resident
from scaling_ray.storage import open_place
from scaling_ray.sweep.run import run_sweep
from scaling_ray.train.engine import PlainEngine
from scaling_ray.train.loop import RunData, TrainingLoop

N_TRAIN = 1_000
GENES = 300
"""Two blocks of counts, so that fewer genes can be fewer columns or a part of one."""
WINDOW_ROWS = 150
"""Two of the shards' row groups."""
FILE_CELLS, ROW_GROUP_CELLS = 256, 64
EDGES = np.array([*range(0, 961, 64), N_TRAIN])
"""Row groups of 1,000 cells in files of 256: the last of 40."""
PIPELINE_WINDOWS = 20
"""A pipeline of few windows begins quickly, and a stream is made of several."""
DONOR = (np.random.default_rng(8).permutation(N_TRAIN) % 9).astype(np.int32)


def order_of(rows: RunRows, edges: np.ndarray, seed: int) -> RunOrder:
    """Windows of 150 rows, by which 1,000 cells are cut as millions are."""
    return RunOrder(rows, edges, seed, WINDOW_ROWS)


# Integers only: which row is visited when.


def wrapping_seed(n_cells: int) -> int:
    """A seed whose replicate runs over the end of the training split and goes on at its beginning."""
    return next(seed for seed in range(100) if (np.diff(replicate_rows(N_TRAIN, n_cells, seed).all()) < 0).any())


def irregular_edges() -> np.ndarray:
    """Row groups of 1 to 149 rows."""
    edges = np.cumsum(np.random.default_rng(3).integers(1, 150, 40))
    return np.array([0, 1, 2, *edges[(edges > 2) & (edges < N_TRAIN)], N_TRAIN])


WRAPPED = replicate_rows(N_TRAIN, 700, wrapping_seed(700))
RUNS = {
    "every cell": (RunRows(N_TRAIN, N_TRAIN), EDGES),
    "a wrapped replicate": (WRAPPED, EDGES),
    "a replicate of nearly all": (replicate_rows(N_TRAIN, 999, wrapping_seed(999)), EDGES),
    "four donors": (donor_rows(DONOR, 4, None, seed=2), EDGES),
    "some cells of six donors": (donor_rows(DONOR, 6, 500, wrapping_seed(700)), EDGES),
    "irregular row groups": (RunRows(N_TRAIN, N_TRAIN), irregular_edges()),
    "a wrapped replicate of irregular row groups": (WRAPPED, irregular_edges()),
    "donors in irregular row groups": (donor_rows(DONOR, 4, None, seed=2), irregular_edges()),
    "row groups larger than a window": (RunRows(N_TRAIN, N_TRAIN), np.array([0, 400, 410, 600, N_TRAIN])),
}
every_run = pytest.mark.parametrize(("rows", "edges"), RUNS.values(), ids=RUNS)


def visits(run: RunOrder, epochs: int, cells_per_step: int = 37) -> np.ndarray:
    """(epochs, n_cells) numbers of rows in the run, in the order they are visited, put together out of batches."""
    wanted = epochs * len(run.rows)
    batches = [run.batch(step, cells_per_step) for step in range(-(-wanted // cells_per_step))]
    for step, (index, epoch) in enumerate(batches):
        positions = step * cells_per_step + np.arange(cells_per_step)
        assert len(index) == cells_per_step and np.array_equal(epoch, positions // len(run.rows))
    return np.concatenate([index for index, _ in batches])[:wanted].reshape(epochs, len(run.rows))


def chunk_of(rows: RunRows, edges: np.ndarray) -> np.ndarray:
    """Which stored chunk each row of a run lies in: its rows one after the other, cut where their row group changes."""
    group = np.array([max(g for g, edge in enumerate(edges) if edge <= row) for row in rows.all().tolist()])
    return np.concatenate([[0], np.cumsum(np.diff(group) != 0)])


@every_run
def test_every_row_is_visited_once_per_epoch(rows: RunRows, edges: np.ndarray) -> None:
    assert len(rows) > WINDOW_ROWS
    seen = visits(order_of(rows, edges, seed=5), epochs=4)
    assert (np.sort(seen, axis=1) == np.arange(len(rows))).all()
    assert len(np.unique(rows.all())) == len(rows)


@every_run
def test_a_window_is_whole_stored_chunks_and_each_is_read_once(rows: RunRows, edges: np.ndarray) -> None:
    run = order_of(rows, edges, seed=5)
    seen, chunk = visits(run, epochs=3), chunk_of(rows, edges)
    largest = max(WINDOW_ROWS, int(np.bincount(chunk).max()))
    for epoch in range(3):
        windows = run.windows(epoch)
        assert windows[0].first == 0 and sum(window.rows for window in windows) == len(rows)
        chunks_before: set[int] = set()
        for window, following in zip(windows, [*windows[1:], None], strict=True):
            visited = seen[epoch, window.first : window.first + window.rows]
            chunks = set(chunk[visited].tolist())
            assert len(visited) == np.isin(chunk, list(chunks)).sum(), "a chunk is in two windows"
            assert np.array_equal(np.sort(run.stored(window)), np.sort(visited))
            assert window.rows <= WINDOW_ROWS or (len(chunks) == 1 and window.rows <= largest)
            assert not chunks & chunks_before
            chunks_before |= chunks
            if following is not None:
                assert following.first == window.first + window.rows
                first_of_next = chunk[seen[epoch, following.first :]]
                smallest = min(int((chunk == c).sum()) for c in set(first_of_next[: following.rows].tolist()))
                assert window.rows + smallest <= WINDOW_ROWS or following.rows + window.rows > WINDOW_ROWS


@every_run
def test_windows_are_filled_and_shuffled(rows: RunRows, edges: np.ndarray) -> None:
    """Neighbours in storage are no neighbours in a run, and neither are the chunks of a window."""
    run = order_of(rows, edges, seed=5)
    seen, chunk = visits(run, epochs=3), chunk_of(rows, edges)
    assert ((np.diff(seen, axis=1) == 1).mean(axis=1) < 0.1).all()
    mixed = [
        len(set(chunk[seen[epoch, window.first : window.first + max(1, window.rows // 3)]].tolist())) > 1
        for epoch in range(3)
        for window in run.windows(epoch)
        if len(window.chunks) > 1 and window.rows > 30
    ]
    assert not mixed or np.mean(mixed) > 0.9
    shuffles = [run.shuffle(window).tolist() for epoch in range(3) for window in run.windows(epoch) if window.rows > 9]
    assert len({tuple(shuffle) for shuffle in shuffles}) == len(shuffles), "two windows are shuffled alike"
    if rows is RUNS["every cell"][0]:
        assert len({window.rows for window in run.windows(0)}) < len(run.windows(0)), "no windows of equal size"
    if edges is EDGES:
        assert mixed, "no window holds several chunks"
        assert max(window.rows for window in run.windows(0)) > WINDOW_ROWS - ROW_GROUP_CELLS


@every_run
def test_epochs_and_seeds_are_shuffled_apart(rows: RunRows, edges: np.ndarray) -> None:
    """The order of the chunks, what shares a window, and the order within it."""
    by_seed = {seed: visits(order_of(rows, edges, seed), epochs=2) for seed in (5, 6)}
    orders = [seen[epoch] for seen in by_seed.values() for epoch in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).mean() < 0.05
    chunk = chunk_of(rows, edges)
    first_visits = [list(dict.fromkeys(chunk[seen].tolist())) for seen in orders]
    assert len({tuple(chunks) for chunks in first_visits}) == 4
    compositions = {
        frozenset(frozenset(window.chunks) for window in order_of(rows, edges, seed).windows(epoch))
        for seed in (5, 6)
        for epoch in (0, 1)
    }
    assert len(compositions) == 4 or len(set(chunk.tolist())) < 6


@every_run
@pytest.mark.parametrize("cells_per_step", [1, 32, 150, 400, 2_300])
def test_a_batch_depends_on_its_number_alone(rows: RunRows, edges: np.ndarray, cells_per_step: int) -> None:
    """Asked forwards, backwards, in between others, of one order or of a new one each time; 400 cells straddle windows
    and epochs, 2,300 whole epochs."""
    steps = list(range(3 * len(rows) // cells_per_step + 1))
    steps = steps if len(steps) < 40 else np.random.default_rng(0).choice(steps, 40, replace=False).tolist()
    sequence = visits(order_of(rows, edges, seed=5), epochs=3 + 2 * 2_300 // len(rows)).ravel()
    run = order_of(rows, edges, seed=5)
    for step in [*steps, *reversed(steps), *np.random.default_rng(1).permutation(steps).tolist()]:
        index, epochs = run.batch(step, cells_per_step)
        positions = np.arange(step * cells_per_step, (step + 1) * cells_per_step)
        assert np.array_equal(index, sequence[positions])
        assert np.array_equal(epochs, positions // len(rows))
        index[:] = -1  # the caller's own
    alone = order_of(rows, edges, seed=5).batch(steps[-1], cells_per_step)[0]
    assert np.array_equal(alone, sequence[steps[-1] * cells_per_step :][:cells_per_step])


@pytest.mark.parametrize("n_cells", [1, 40, 149, 150])
def test_a_run_of_one_window_is_one_permutation_whatever_the_edges(n_cells: int) -> None:
    seed = 4
    whole = [keyed_permutation((seed << 32) ^ epoch, np.arange(n_cells)) for epoch in range(3)]
    listed = RunRows(N_TRAIN, n_cells, listed=np.random.default_rng(0).permutation(N_TRAIN)[:n_cells])
    for rows in (RunRows(N_TRAIN, n_cells, offset=980), RunRows(N_TRAIN, n_cells), listed):
        for edges in (EDGES, irregular_edges(), np.array([0, N_TRAIN])):
            assert np.array_equal(visits(order_of(rows, edges, seed), epochs=3, cells_per_step=7), whole)
    above = RunRows(N_TRAIN, WINDOW_ROWS + 1)
    even, uneven = (visits(order_of(above, edges, seed), 1) for edges in (EDGES, irregular_edges()))
    assert not np.array_equal(even, uneven)


@pytest.mark.parametrize("edges", [[0, 16_384, 32_768, 40_000], [0, 9, 40_000]])
def test_runs_of_up_to_32_768_cells_keep_the_order_they_always_had(edges: list[int]) -> None:
    """A smaller window would move the losses of runs that were done."""
    run = RunOrder(RunRows(40_000, 32_768, offset=20_000), np.array(edges), seed=1)
    assert np.array_equal(run.batch(0, 32_768)[0], keyed_permutation(1 << 32, np.arange(32_768)))


# Runs of a few donors.


@pytest.mark.parametrize("seed", range(6))
def test_a_run_of_donors_reads_exactly_the_cells_of_those_donors(seed: int) -> None:
    for n_donors in range(1, 10):
        rows = donor_rows(DONOR, n_donors, None, seed)
        read = set(DONOR[rows.all()].tolist())
        assert len(read) == n_donors
        assert read == set(chosen_donors(n_donors, np.arange(9), seed).tolist())
        assert sorted(rows.all().tolist()) == np.flatnonzero(np.isin(DONOR, list(read))).tolist()
        assert len(rows) == np.isin(DONOR, list(read)).sum()


@pytest.mark.parametrize("seed", range(6))
def test_fewer_donors_and_fewer_cells_are_a_part_of_more(seed: int) -> None:
    donors = [set(DONOR[donor_rows(DONOR, n, None, seed).all()].tolist()) for n in range(1, 10)]
    assert all(few < more for few, more in zip(donors, donors[1:], strict=False))
    all_of_them = donor_rows(DONOR, 4, None, seed).all()
    most = donor_rows(DONOR, 4, 400, seed).all()
    for n_cells in (1, 10, 399):
        rows = donor_rows(DONOR, 4, n_cells, seed)
        assert len(rows) == n_cells and np.array_equal(rows.all(), most[:n_cells])
    assert set(most.tolist()) < set(all_of_them.tolist())


def test_seeds_take_other_donors_and_other_cells() -> None:
    assert len({tuple(chosen_donors(3, np.arange(9), seed)) for seed in range(12)}) > 6
    first = [int(donor_rows(DONOR, 9, 100, seed).all()[0]) for seed in range(12)]
    assert len(set(first)) == 12


def test_codes_that_hold_no_training_cell_are_no_donors() -> None:
    """Donors of validation and test cells have codes too."""
    sparse = DONOR * 5 + 2
    for seed in range(6):
        same = chosen_donors(4, np.unique(sparse), seed)
        assert set(same.tolist()) <= set(sparse.tolist()) and len(same) == 4
        assert set(sparse[donor_rows(sparse, 4, None, seed).all()].tolist()) == set(same.tolist())


@pytest.mark.parametrize(
    ("donors", "cells", "line"),
    [
        (10, None, "grid.donors: 10: is more than the 9 donors of the training split; lower it"),
        (10, 5, "grid.donors: 10: is more than the 9 donors"),
        (2, 300, r"grid.donors: 2: hold 22[0-9] training cells at seed 1, fewer than 300; take more donors"),
    ],
)
def test_too_few_donors_or_cells_are_refused(donors: int, cells: int | None, line: str) -> None:
    with pytest.raises(BadInput, match=line) as refusal:
        donor_rows(DONOR, donors, cells, seed=1)
    assert "\n" not in str(refusal.value) and refusal.value.exit_code == 2


# The same cells out of a stream, out of the whole split and out of the run's own prefix.


@dataclass(frozen=True)
class Shards:
    """1,000 training cells in 4 files and 16 row groups, and what they were written from."""

    path: Path
    manifest: ShardManifest
    train: Cells

    def order(self, run: RunSpec) -> RunOrder:
        return shards_order(open_place(self.path), self.manifest, run, WINDOW_ROWS)

    def resident(self, run: RunSpec) -> ResidentFeed:
        """Out of the whole split as it was before it was written."""
        return ResidentFeed(self.train.narrowed(run.genes), self.order(run))

    def stream(self, run: RunSpec, pipeline_windows: int = PIPELINE_WINDOWS) -> StreamFeed:
        return StreamFeed(self.path, self.manifest, run.genes, self.order(run), 0.0, pipeline_windows)

    def feed(self, run: RunSpec, resident_bytes: float) -> Feed:
        return open_feed(self.path, self.manifest, run, resident_bytes, cpus=0.0, window_rows=WINDOW_ROWS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    path = tmp_path_factory.mktemp("streamed") / "shards"
    sizes = {"train": N_TRAIN, "val": 60, "test": 50}
    splits = {
        name: synthetic_cells(size, GENES, first_id=10_000 * i, unmeasured=9)
        for i, (name, size) in enumerate(sizes.items())
    }
    manifest = write_cells_as_shards(path, splits, FILE_CELLS, ROW_GROUP_CELLS)
    assert row_groups(manifest, "train").tolist() == EDGES.tolist() and len(manifest.splits["train"].files) == 4
    return Shards(path, read_manifest(path), splits["train"])


def run_of(cells: str = '"all"', genes: int = GENES, donors: int | None = None, seed: int = 1, **train: int) -> RunSpec:
    lines = "\n".join(f"{name} = {value}" for name, value in train.items())
    return small_run(lines, genes=64, cells=cells).model_copy(update={"genes": genes, "donors": donors, "seed": seed})


def assert_same(found: tuple[Cells, np.ndarray], wanted: tuple[Cells, np.ndarray]) -> None:
    for field in fields(Cells):
        one, two = getattr(found[0], field.name), getattr(wanted[0], field.name)
        assert one.dtype == two.dtype and np.array_equal(one, two), field.name
    assert np.array_equal(found[1], wanted[1])


def joined(parts: list[tuple[Cells, np.ndarray]]) -> tuple[Cells, np.ndarray]:
    of_cells = [field.name for field in fields(Cells) if field.name != "measured"]
    columns = {name: np.concatenate([getattr(cells, name) for cells, _ in parts]) for name in of_cells}
    return Cells(**columns, measured=parts[0][0].measured), np.concatenate([epochs for _, epochs in parts])


def batch_of_ranks(feeds: list[Feed], step: int, cells_per_step: int) -> tuple[Cells, np.ndarray]:
    """A global batch, every rank asking its own feed for its share."""
    share = cells_per_step // len(feeds)
    shares = [slice(rank * share, (rank + 1) * share) for rank in range(len(feeds))]
    return joined([feed.batch(step, cells_per_step, own) for feed, own in zip(feeds, shares, strict=True)])


def opened(stack: ExitStack, shards: Shards, run: RunSpec, ranks: int) -> list[Feed]:
    return [stack.enter_context(closing(shards.stream(run))) for _ in range(ranks)]


def test_the_resident_feed_hands_out_the_rows_of_the_order(shards: Shards) -> None:
    """The reference of all that follows, checked against the cells themselves."""
    for run in (run_of(), run_of("700", seed=wrapping_seed(700)), run_of(donors=2)):
        feed, visited = shards.resident(run), shards.order(run)
        for step in (0, 3, 80):
            cells, epochs = feed.batch(step, 30)
            index, when = visited.batch(step, 30)
            assert np.array_equal(cells.cell, shards.train.cell[visited.rows.all()[index]])
            assert np.array_equal(epochs, when)


RUNS_OF_SHARDS = {
    "every cell": run_of(),
    "a wrapped replicate": run_of("700", seed=wrapping_seed(700)),
    "two donors": run_of(donors=2),
    "some cells of three donors": run_of("420", donors=3, seed=wrapping_seed(700)),
    "one block of genes": run_of(genes=256),
    "a part of a block": run_of("500", genes=40),
    "one window": run_of("100"),
}
each_run = pytest.mark.parametrize("run", RUNS_OF_SHARDS.values(), ids=RUNS_OF_SHARDS)


@each_run
@pytest.mark.parametrize("cells_per_step", [30, 2_310])
def test_a_runs_own_prefix_gives_the_batches_of_the_whole_split(
    shards: Shards, run: RunSpec, cells_per_step: int
) -> None:
    prefix = shards.feed(run, 2**30)
    whole = shards.resident(run)
    for step in (0, 1, 2, 40, 7):
        assert_same(prefix.batch(step, cells_per_step), whole.batch(step, cells_per_step))
        for share in (slice(0, 10), slice(20, 30)):
            assert_same(prefix.batch(step, cells_per_step, share), whole.batch(step, cells_per_step, share))


@pytest.mark.ray
@each_run
def test_a_stream_gives_the_batches_of_the_whole_split(ray_cluster: None, shards: Shards, run: RunSpec) -> None:
    """Over two epochs and into the third, without a stop."""
    whole = shards.resident(run)
    with closing(shards.stream(run)) as feed:
        for step in range(-(-2 * len(feed.order.rows) // 48) + 2):
            assert_same(feed.batch(step, 48), whole.batch(step, 48))


@pytest.mark.ray
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "run", [run_of("700", seed=wrapping_seed(700)), run_of(donors=2, genes=40)], ids=["a wrapped replicate", "donors"]
)
def test_ranks_share_every_batch_of_a_stream(ray_cluster: None, shards: Shards, run: RunSpec, ranks: int) -> None:
    whole = shards.resident(run)
    with ExitStack() as stack:
        feeds = opened(stack, shards, run, ranks)
        for step in range(-(-len(feeds[0].order.rows) // 60) + 3):
            assert_same(batch_of_ranks(feeds, step, 60), whole.batch(step, 60))


@pytest.mark.ray
def test_a_stream_goes_on_from_any_batch_with_any_number_of_ranks(ray_cluster: None, shards: Shards) -> None:
    """Stopped in the middle of a window, at its last cell, in the middle of an epoch and across its end."""
    run = run_of("700", seed=wrapping_seed(700))
    whole = shards.resident(run)
    edge = shards.order(run).windows(0)[1]
    begins = [(1, 7, 30), (3, 11, 30), (2, 23, 30), (1, 24, 30), (2, 1, edge.rows), (3, 150, 30), (1, 0, 30)]
    with ExitStack() as stack:
        feeds: list[Feed] = []
        for ranks, first, cells_per_step in begins:
            if len(feeds) != ranks:
                stack.close()
                feeds = opened(stack, shards, run, ranks)
            size = cells_per_step - cells_per_step % ranks
            for step in range(first, first + 3):
                assert_same(batch_of_ranks(feeds, step, size), whole.batch(step, size))


@pytest.mark.ray
def test_one_stream_may_be_asked_for_any_batch(ray_cluster: None, shards: Shards) -> None:
    """Ahead, back, the same again, and with another number of cells in a batch."""
    run = run_of("700", seed=wrapping_seed(700), genes=40)
    whole = shards.resident(run)
    with closing(shards.stream(run)) as feed:
        for step, cells_per_step in [(5, 30), (6, 30), (2, 30), (2, 30), (3, 30), (40, 30), (1, 400), (30, 7), (0, 30)]:
            assert_same(feed.batch(step, cells_per_step), whole.batch(step, cells_per_step))


@pytest.mark.ray
@pytest.mark.parametrize("ranks", [1, 3])
def test_batches_larger_than_the_whole_run(ray_cluster: None, shards: Shards, ranks: int) -> None:
    for run in (run_of(donors=1), run_of("100")):
        whole = shards.resident(run)
        with ExitStack() as stack:
            feeds = opened(stack, shards, run, ranks)
            for step in (0, 1, 4):
                assert_same(batch_of_ranks(feeds, step, 501), whole.batch(step, 501))


@pytest.mark.ray
def test_a_run_longer_than_one_pipeline_goes_on_with_another(ray_cluster: None, shards: Shards) -> None:
    run = run_of()
    whole = shards.resident(run)
    with closing(shards.stream(run, pipeline_windows=3)) as feed:
        assert len(feed.order.windows(0)) > 6
        for step in range(16):
            assert_same(feed.batch(step, 100), whole.batch(step, 100))


@pytest.mark.ray
def test_a_closed_stream_begins_again(ray_cluster: None, shards: Shards) -> None:
    run = run_of()
    whole, feed = shards.resident(run), shards.stream(run)
    for _ in range(2):
        assert_same(feed.batch(4, 30), whole.batch(4, 30))
        assert_same(feed.batch(5, 30), whole.batch(5, 30))
        feed.close()


@pytest.mark.ray
def test_a_run_is_streamed_where_its_cells_take_more_than_the_bound(ray_cluster: None, shards: Shards) -> None:
    """700 cells of 40 genes are 56,000 bytes."""
    run = run_of("700", genes=40)
    whole = shards.resident(run)
    held = shards.feed(run, 56_000)
    streamed = shards.feed(run, 55_999)
    assert isinstance(held, ResidentFeed) and isinstance(streamed, StreamFeed)
    with closing(streamed):
        for step in range(4):
            assert_same(streamed.batch(step, 200), whole.batch(step, 200))
            assert_same(held.batch(step, 200), whole.batch(step, 200))


@pytest.mark.ray
def test_a_run_of_one_window_is_read_once(ray_cluster: None, shards: Shards, tmp_path: Path) -> None:
    """Its shards may even be gone after the first batch."""
    run = run_of("100")
    whole = shards.resident(run)
    shutil.copytree(shards.path, tmp_path / "shards")
    with closing(replace(shards, path=tmp_path / "shards").stream(run)) as feed:
        assert_same(feed.batch(0, 30), whole.batch(0, 30))
        shutil.rmtree(tmp_path / "shards")
        for step in range(1, 20):
            assert_same(feed.batch(step, 30), whole.batch(step, 30))


@pytest.mark.ray
def test_damage_is_named_by_the_pipeline_that_meets_it(ray_cluster: None, shards: Shards, tmp_path: Path) -> None:
    """As itself and on one line, though it rose in a task of Ray Data."""
    run = run_of()
    shutil.copytree(shards.path, tmp_path / "shards")
    (tmp_path / "shards" / "train-00002.parquet").write_bytes(b"PAR1")
    damaged = replace(shards, path=tmp_path / "shards")
    with closing(damaged.stream(run)) as feed:
        with pytest.raises(DamagedFiles, match="train-00002.parquet: ") as streamed:
            for step in range(4):
                feed.batch(step, 250)
    with pytest.raises(DamagedFiles, match="train-00002.parquet: ") as resident:
        read_resident(tmp_path / "shards", shards.manifest, "train", GENES)
    for error in (streamed.value, resident.value):
        assert "\n" not in str(error) and error.exit_code == 1 and len(error.problems) == 1


def test_more_genes_than_stored_are_refused(shards: Shards) -> None:
    for bound in (0, 2**30):
        with pytest.raises(BadInput, match="grid.genes: 301: is more than the 300 genes of the shards"):
            open_feed(shards.path, shards.manifest, run_of(genes=301), bound)


@pytest.mark.parametrize("genes", [GENES, 257, 256, 40, 1])
def test_rows_are_read_in_the_order_asked_for(shards: Shards, genes: int) -> None:
    where = open_place(shards.path)
    measured = read_measured(where, shards.manifest, genes)
    whole = read_split(where, shards.manifest, "train", genes)
    assert np.array_equal(whole.counts, shards.train.counts[:, :genes])
    assert np.array_equal(measured, shards.train.measured[:, :genes])
    rng = np.random.default_rng(genes)
    asked = {
        "all": np.arange(N_TRAIN),
        "backwards": np.arange(N_TRAIN)[::-1],
        "shuffled": rng.permutation(N_TRAIN),
        "wrapped": (np.arange(700) + 600) % N_TRAIN,
        "scattered": np.sort(rng.permutation(N_TRAIN)[:90]),
        "across a row group": np.arange(60, 70),
        "across a file": np.arange(250, 260),
        "the last": np.array([N_TRAIN - 1]),
        "one twice": np.array([5, 700, 5, 5, 701]),
        "none": np.empty(0, dtype=np.int64),
    }
    for name, rows in asked.items():
        found = read_rows(where, shards.manifest, "train", genes, rows, measured)
        for field in fields(Cells):
            wanted = getattr(whole.rows(rows), field.name)
            got = getattr(found, field.name)
            assert got.dtype == wanted.dtype and np.array_equal(got, wanted), (name, field.name)


# A training run and a sweep.


def losses(loop: TrainingLoop, updates: int) -> list[tuple[float, float]]:
    rows = [loop.train_one_update() for _ in range(updates)]
    return [(sums.loss, norm) for sums, _, norm in rows]


@pytest.fixture
def cpu_loop(shards: Shards) -> Iterator[object]:
    """A training loop over the shards, fed by what is given."""
    held = {name: read_split(shards.path, shards.manifest, name, GENES) for name in ("val", "test")}

    def loop(run: RunSpec, train: Feed) -> TrainingLoop:
        val, test = (cells.narrowed(run.genes) for cells in held.values())
        return TrainingLoop(run, RunData(train, val, test, "the-data"), PlainEngine(run, torch.device("cpu")))

    yield loop


@pytest.mark.ray
def test_a_training_run_is_bit_identical_resident_and_streamed(
    ray_cluster: None, shards: Shards, cpu_loop: object
) -> None:
    """Over the end of an epoch; thinned, so that epochs and cell ids count in what the network sees."""
    for run in (
        run_of("300", genes=64, max_cells_seen=640),
        run_of(donors=2, genes=64, max_cells_seen=640).model_copy(
            update={"train": small_run("max_cells_seen = 640\numi_fraction = 0.5").train}
        ),
    ):
        resident = losses(cpu_loop(run, shards.resident(run)), 20)  # type: ignore[operator]
        prefix = shards.feed(run, 2**30)
        assert losses(cpu_loop(run, prefix), 20) == resident  # type: ignore[operator]
        with closing(shards.stream(run)) as feed:
            assert losses(cpu_loop(run, feed), 20) == resident  # type: ignore[operator]
        assert len({loss for loss, _ in resident}) == 20


def test_cells_in_memory_are_visited_in_the_row_groups_they_came_from(shards: Shards) -> None:
    edges, run = row_groups(shards.manifest, "train"), run_of("700", seed=wrapping_seed(700))
    held = RunData(shards.train, shards.train, shards.train, "the-data", edges)
    assert np.array_equal(held.feed(run).order.cuts, shards.order(run).cuts)
    assert len(shards.order(run).cuts) > 10


@pytest.fixture(scope="module")
def resident_rows(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Rows by run of TINY_SWEEP with its training cells in memory."""
    return swept(tiny_shards, tmp_path_factory.mktemp("resident"), TINY_SWEEP)


def swept(shards: Path, directory: Path, text: str) -> dict[str, dict[str, object]]:
    (directory / "spec.toml").write_text(text)
    run_sweep(directory / "spec.toml", shards, directory / "sweep")
    rows = pq.read_table(directory / "sweep" / "results.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"done"}
    return {row["run_id"]: row for row in rows}


STREAMED = "[resources]\nresident_gib = 1e-9\n"


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_ends_with_the_same_losses_when_everything_streams(
    resident_rows: dict[str, dict[str, object]], tiny_shards: Path, tmp_path: Path
) -> None:
    streamed = swept(tiny_shards, tmp_path, TINY_SWEEP + STREAMED)
    exact = ("val_loss", "final_val_loss", "test_loss", "baseline_loss", "gaussian_loss", "lr", "cells", "cells_seen")
    assert list(streamed) == list(resident_rows)
    for run_id, row in resident_rows.items():
        assert [streamed[run_id][key] for key in exact] == [row[key] for key in exact], run_id


@pytest.fixture(scope="module")
def donor_sweeps(
    tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict[str, object]], dict[str, dict[str, object]]]:
    """A sweep over donors, resident and streamed."""
    text = TINY_SWEEP.replace("seeds = [1]", 'seeds = [1]\ndonors = [4, "all"]').replace('["XXS", "W4"]', '["XXS"]')
    places = [tmp_path_factory.mktemp(name) for name in ("donors-resident", "donors-streamed")]
    resident, streamed = (swept(tiny_shards, at, text + end) for at, end in zip(places, ("", STREAMED), strict=True))
    return resident, streamed


@pytest.mark.ray
@pytest.mark.slow
def test_a_grid_of_donors_is_a_column_and_another_run(
    donor_sweeps: tuple[dict[str, dict[str, object]], dict[str, dict[str, object]]],
) -> None:
    resident, streamed = donor_sweeps
    law = [row for row in resident.values() if row["role"] == "law"]
    asked = {(row["donors"], row["cells_requested"]) for row in law}
    assert asked == {(4, "100"), (4, "all"), (None, "100"), (None, "all")} and len(law) == 4
    assert {row["donors"] for row in resident.values() if row["role"] == "rate"} == {None}
    assert len({row["val_loss"] for row in law}) == 4
    assert len({row["baseline_loss"] for row in law}) == 4, "references are those of the run's own cells"
    for run_id, row in resident.items():
        assert [streamed[run_id][key] for key in ("val_loss", "test_loss")] == [row["val_loss"], row["test_loss"]]


@pytest.mark.ray
@pytest.mark.slow
def test_the_cells_of_a_run_of_donors_are_those_of_its_donors(
    donor_sweeps: tuple[dict[str, dict[str, object]], dict[str, dict[str, object]]], tiny_shards: Path
) -> None:
    donor_cells = np.array(read_manifest(tiny_shards).splits["train"].donor_cells)
    chosen = chosen_donors(4, np.flatnonzero(donor_cells), 1)
    (row,) = [r for r in donor_sweeps[0].values() if r["donors"] == 4 and r["cells_requested"] == "all"]
    assert row["cells"] == donor_cells[chosen].sum()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("donors", "cells", "line"),
    [
        ("1000", '"all"', r"grid.donors: 1000: is more than the \d+ donors of the training split; lower it"),
        ("1", "500", r"grid.donors: 1: hold \d+ training cells at seed 1, fewer than 500; take more donors"),
    ],
)
def test_more_donors_than_there_are_stop_a_sweep_before_it_begins(
    tiny_shards: Path, tmp_path: Path, donors: str, cells: str, line: str
) -> None:
    text = TINY_SWEEP.replace("seeds = [1]", f"seeds = [1]\ndonors = [{donors}]")
    (tmp_path / "spec.toml").write_text(text.replace('cells = [100, "all"]', f"cells = [{cells}]"))
    with pytest.raises(BadInput, match=line) as refusal:
        run_sweep(tmp_path / "spec.toml", tiny_shards, tmp_path / "sweep")
    assert "\n" not in str(refusal.value) and not (tmp_path / "sweep").exists()
