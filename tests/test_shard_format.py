"""Shards: counts come back as they went in, and damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaling_ray.cli import main
from scaling_ray.errors import BadInput, DamagedFiles
from scaling_ray.records import ShardManifest, SplitEntry
from scaling_ray.shards import format as shard_format
from scaling_ray.shards.format import (
    CODE_COLUMNS,
    block_name,
    block_widths,
    decode_block,
    encode_block,
    read_manifest,
    shard_schema,
    split_content,
    verify,
    write_file,
    write_table,
)
from scaling_ray.shards.prepare import carried_groups
from scaling_ray.shards.read import Cells, columns_for, decode_cells, read_split
from scaling_ray.spec import DataSpec
from scaling_ray.storage import open_place, sealed_json, unseal

CELLS = 60


def counts_of(genes: int, cells: int = CELLS, seed: int = 0) -> np.ndarray:
    counts = np.random.default_rng(seed).integers(0, 65_536, (cells, genes)).astype(np.uint16)
    counts[0, :2], counts[-1, -2:] = (0, 65_535), (65_535, 0)
    return counts


def table_of(counts: np.ndarray, first_cell: int = 10_000_000_000) -> pa.Table:
    cells, genes = counts.shape
    columns: dict[str, pa.Array] = {
        "cell": pa.array(first_cell + np.arange(cells)),
        "raw_sum": pa.array(counts.sum(1, dtype=np.int64)),
    }
    columns |= {name: pa.array((np.arange(cells) + i) % 2, pa.int32()) for i, name in enumerate(CODE_COLUMNS)}
    for index, start in enumerate(range(0, genes, 256)):
        columns[block_name(index)] = encode_block(counts[:, start : start + 256])
    return pa.table(columns)


def measured_of(genes: int) -> np.ndarray:
    return np.random.default_rng(9).random((2, genes)) < 0.9


def write_shards(directory: Path, genes: int, file_cells: int = CELLS) -> ShardManifest:
    directory.mkdir()
    splits = {}
    for seed, split in enumerate(shard_format.SPLITS):
        table = table_of(counts_of(genes, seed=seed), first_cell=1_000 * seed)
        written = [
            write_file(open_place(directory), f"{split}-{n:05d}.parquet", [table.slice(start, file_cells)], genes)
            for n, start in enumerate(range(0, CELLS, file_cells))
        ]
        files = [file for file in written if file is not None]
        assert len(files) == len(written)
        splits[split] = SplitEntry(
            cells=CELLS,
            fraction=1 / 3,
            groups=[f"donor{seed}"],
            donor_cells=[CELLS],
            content_sha256=split_content(files),
            files=files,
        )
    presence = pa.table({"measured": encode_block(measured_of(genes).astype(np.uint16))})
    manifest = ShardManifest(
        name="test",
        data_hash="0",
        genes=genes,
        block_genes=256,
        row_group_cells=16_384,
        split_by="donor_id",
        data={},
        census={},
        planted=False,
        dropped={},
        splits=splits,
        tables=[write_table(open_place(directory), "presence.parquet", presence)],
        codes={},
        made_with={},
    )
    (directory / "manifest.json").write_text(manifest.to_json())
    return manifest


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", 300)
    return tmp_path / "shards"


@pytest.mark.parametrize(("genes", "widths"), [(1, [1]), (256, [256]), (300, [256, 44]), (1000, [256, 256, 256, 232])])
def test_blocks_are_256_genes_and_the_rest(genes: int, widths: list[int]) -> None:
    assert block_widths(genes) == widths
    assert [shard_schema(genes).field(block_name(i)).type for i in range(len(widths))] == [
        pa.binary(2 * w) for w in widths
    ]


@pytest.mark.parametrize("genes", [256, 300, 1000])
def test_what_was_written_is_read_and_every_panel_is_a_prefix(tmp_path: Path, genes: int) -> None:
    write_shards(tmp_path / "shards", genes)
    manifest = read_manifest(tmp_path / "shards")
    for seed, split in enumerate(shard_format.SPLITS):
        stored = counts_of(genes, seed=seed)
        for panel in sorted({1, 100, 255, 256, genes} | {v for v in (257, 299, 512, 999) if v <= genes}):
            cells = read_split(tmp_path / "shards", manifest, split, panel)
            assert cells.counts.dtype == np.uint16
            assert (cells.counts == stored[:, :panel]).all()
            assert (cells.measured == measured_of(genes)[:, :panel]).all()
        assert (cells.cell == 1_000 * seed + np.arange(CELLS)).all()
        assert (cells.raw_sum == stored.sum(1, dtype=np.int64)).all()
        assert (cells.dataset == np.arange(CELLS) % 2).all()
        assert (cells.donor == (np.arange(CELLS) + 1) % 2).all()


def test_a_prefix_reads_only_the_blocks_it_needs(shards: Path) -> None:
    assert columns_for(256) == ["cell", "raw_sum", "dataset_id", "donor_id", "counts_000"]
    assert columns_for(257)[-1] == "counts_001"
    read_split(shards, read_manifest(shards), "train", 256)


def test_counts_stand_as_little_endian_uint16() -> None:
    block = encode_block(np.array([[1, 258], [65_535, 0]], dtype=np.uint16))
    assert block.to_pylist() == [b"\x01\x00\x02\x01", b"\xff\xff\x00\x00"]


def test_sliced_and_chunked_columns_decode_from_their_offsets() -> None:
    counts = counts_of(300)
    table = table_of(counts)
    sliced = table.slice(7, 20)
    assert sliced["counts_000"].chunk(0).offset == 7, "the case under test"
    measured = measured_of(300)
    assert (decode_cells(sliced, 300, 300, measured).counts == counts[7:27]).all()
    assert (decode_cells(sliced, 280, 300, measured).counts == counts[7:27, :280]).all()
    joined = pa.concat_tables([table.slice(50, 3), table.slice(0, 0), table.slice(4, 2), table.slice(59)])
    decoded = decode_cells(joined, 300, 300, measured)
    rows = [50, 51, 52, 4, 5, 59]
    assert (decoded.counts == counts[rows]).all()
    assert (decoded.cell == table["cell"].to_numpy()[rows]).all()
    assert decode_block(table["counts_001"].slice(3, 0), 44).shape == (0, 44)
    assert (decode_block(table["counts_001"].chunk(0).slice(58), 44) == counts[58:, 256:]).all()


def test_the_content_hash_is_of_the_cells_not_of_how_they_came(tmp_path: Path) -> None:
    def content_of(*tables: pa.Table) -> str | None:
        entry = write_file(open_place(tmp_path), "train-00000.parquet", tables, 300)
        assert entry is not None and entry.rows == CELLS
        return entry.content_sha256

    table = table_of(counts_of(300))
    whole = content_of(table)
    pieces = [table.slice(0, 13), table.slice(13, 1), table.slice(14)]
    assert content_of(*pieces) == content_of(pa.concat_tables(pieces)) == whole
    other_order = pa.concat_tables([table.slice(30), table.slice(0, 30)])
    counts = counts_of(300)
    counts[17, 290] ^= 1
    codes = table.set_column(2, "dataset_id", pa.array((np.arange(CELLS) // 2) % 2, pa.int32()))
    others = [other_order, table_of(counts), codes, table_of(counts_of(300), first_cell=5)]
    assert len({whole, *(content_of(other) for other in others)}) == 5


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards", 300, file_cells=25)
    entries = manifest.splits["train"].files
    assert [entry.rows for entry in entries] == [25, 25, 10]
    assert verify(tmp_path / "shards") == []
    assert (read_split(tmp_path / "shards", manifest, "train", 300).counts == counts_of(300)).all()


def test_whole_shards_verify(shards: Path) -> None:
    assert verify(shards) == []


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flip_a_byte, "sha256"),
    "cut": (cut_short, "bytes"),
    "missing": (Path.unlink, "missing"),
}


@pytest.mark.parametrize("name", ["train-00000.parquet", "test-00000.parquet", "presence.parquet"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_names_the_damaged_file(shards: Path, name: str, kind: str) -> None:
    damage, says = DAMAGE[kind]
    damage(shards / name)
    problems = verify(shards)
    assert len(problems) == 1
    assert problems[0].startswith(f"{name}: ")
    assert says in problems[0]


def test_verify_names_every_problem_at_once(shards: Path) -> None:
    flip_a_byte(shards / "train-00000.parquet")
    (shards / "val-00000.parquet").unlink()
    (shards / "presence.parquet").write_bytes(b"")
    (shards / "notes.txt").write_text("extra")
    assert sorted(problem.split(":")[0] for problem in verify(shards)) == [
        "notes.txt",
        "presence.parquet",
        "train-00000.parquet",
        "val-00000.parquet",
    ]


def test_verify_names_a_donor_that_is_in_two_splits(shards: Path) -> None:
    manifest = read_manifest(shards)
    leaky = manifest.splits["val"].model_copy(update={"groups": ["donor0"]})
    (shards / "manifest.json").write_text(
        manifest.model_copy(update={"splits": manifest.splits | {"val": leaky}}).to_json()
    )
    assert verify(shards) == ["manifest.json: donor_id 'donor0' is in train and in val"]


@pytest.mark.parametrize("name", ["train-00000.parquet", "presence.parquet"])
@pytest.mark.parametrize("kind", ["cut", "missing"])
def test_reading_damaged_files_says_which(shards: Path, name: str, kind: str) -> None:
    manifest = read_manifest(shards)
    DAMAGE[kind][0](shards / name)
    with pytest.raises(DamagedFiles, match=name) as caught:
        read_split(shards, manifest, "train", 300)
    assert caught.value.problems[0].startswith(name)


def test_fewer_cells_than_promised_is_damage(shards: Path) -> None:
    manifest = read_manifest(shards)
    path = shards / "train-00000.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(DamagedFiles, match="holds 59 cells, the manifest says 60"):
        read_split(shards, manifest, "train", 300)


def test_more_genes_than_stored_is_bad_input(shards: Path) -> None:
    with pytest.raises(BadInput, match="301.*300 genes"):
        read_split(shards, read_manifest(shards), "train", 301)


def test_directories_without_a_whole_manifest_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"manifest\.json"):
        read_manifest(tmp_path)
    fields = unseal((shards / "manifest.json").read_bytes(), "manifest.json")
    for odd in (fields | {"version": 1_000}, {"nome" if key == "name" else key: fields[key] for key in fields}):
        (shards / "manifest.json").write_text(sealed_json(odd))
        for reader in (verify, read_manifest):
            with pytest.raises(BadInput, match="ShardManifest of this version") as caught:
                reader(shards)
            assert "\n" not in str(caught.value)
    shutil.rmtree(shards)
    with pytest.raises(BadInput):
        verify(shards)


def carried_from(shards: Path) -> object:
    return carried_groups(DataSpec(split_from=str(shards / "manifest.json")))


def read_directly(shards: Path) -> object:
    return ShardManifest.read(shards / "manifest.json")


def test_a_manifest_with_any_byte_changed_is_named_by_verify_and_refused_by_every_reader(shards: Path) -> None:
    path = shards / "manifest.json"
    whole = path.read_bytes()
    digit = whole.index(b'"content_sha256": "') + 30
    chosen = {digit, *range(0, len(whole), 97)}
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        problems = verify(shards)
        assert len(problems) == 1 and problems[0].startswith("manifest.json: "), at
        assert "build the shards anew" in problems[0] and "\n" not in problems[0]
        if at in chosen:
            for reader in (read_manifest, read_directly, carried_from):
                with pytest.raises(BadInput, match="manifest.json"):
                    reader(shards)
    path.write_bytes(whole)
    assert verify(shards) == []


def test_a_manifest_cut_short_or_without_its_seal_is_one_line(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shards / "manifest.json"
    whole = path.read_bytes()
    fields = json.loads(whole)
    older = json.dumps({key: value for key, value in fields.items() if key != "sha256"}).encode()
    for damaged in (whole[:-2], whole[: len(whole) // 2], b"", b"[]", b"\xff", older):
        path.write_bytes(damaged)
        assert main(["shards", "verify", str(shards)]) == 1
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and "manifest.json: " in said.err
        with pytest.raises(BadInput, match="manifest.json"):
            read_manifest(shards)


def test_selected_rows_keep_their_columns_together(make_cells: Callable[..., Cells]) -> None:
    cells = make_cells(20)
    index = np.array([3, 19, 3])
    part = cells.rows(index)
    assert len(part) == 3
    assert (part.counts == cells.counts[index]).all()
    assert part.cell.tolist() == cells.cell[index].tolist()
    assert part.raw_sum.tolist() == cells.raw_sum[index].tolist()
    assert part.dataset.tolist() == [1, 1, 1]
