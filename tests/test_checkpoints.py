"""Checkpoints as files: shards put together, damage passed over and told of, other specs refused, orphans removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import files_at
from torch import Tensor

from scaling_ray.errors import BadInput
from scaling_ray.results.sweep_files import attempts_begun, read_rows
from scaling_ray.runs import RunSpec
from scaling_ray.storage import open_place
from scaling_ray.train.attempt import LAST, Attempt, publish_winner
from scaling_ray.train.checkpoint import Checkpoints, Progress
from scaling_ray.train.sharded import (
    PREFIXES,
    STEP,
    UNREADABLE,
    Layout,
    Shard,
    generator_name,
    read_shard,
    read_state,
    write_shard,
)

MakeRun = Callable[..., RunSpec]

SHAPES = {"embedding": [5, 3], "head.weight": [4], "head.bias": [1], "nothing": [0, 2]}
CUTS = {
    2: {"embedding": [0, 9, 15], "head.weight": [0, 0, 4], "head.bias": [0, 1, 1], "nothing": [0, 0, 0]},
    3: {"embedding": [0, 5, 10, 15], "head.weight": [0, 2, 4, 4], "head.bias": [0, 1, 1, 1], "nothing": [0, 0, 0, 0]},
}
"""By number of ranks, where each parameter is cut: rank r holds the elements from cut r to cut r + 1."""


def whole_state(ranks: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {prefix + name: torch.randn(shape) for prefix in PREFIXES for name, shape in SHAPES.items()}
    tensors |= {f"{STEP}.{name}": torch.tensor(7.0) for name in SHAPES}
    return tensors | {generator_name(rank): torch.arange(10 + rank, dtype=torch.uint8) for rank in range(ranks)}


def shards_of(tensors: dict[str, Tensor], ranks: int) -> list[Shard]:
    shards = []
    for rank in range(ranks):
        edges = {name: (cuts[rank], cuts[rank + 1]) for name, cuts in CUTS[ranks].items()}
        held = {name: (start, stop) for name, (start, stop) in edges.items() if stop > start}
        layout = Layout(1, rank, ranks, SHAPES, {name: (start, stop - start) for name, (start, stop) in held.items()})
        pieces = {
            prefix + name: tensors[prefix + name].flatten()[start:stop]
            for prefix in PREFIXES
            for name, (start, stop) in held.items()
        }
        own = generator_name(rank)
        shards.append(Shard(layout, pieces | {STEP: torch.tensor(7.0), own: tensors[own]}))
    return shards


@pytest.mark.parametrize("ranks", sorted(CUTS))
def test_shards_make_the_whole_state_again(tmp_path: Path, ranks: int) -> None:
    tensors = whole_state(ranks)
    shards = shards_of(tensors, ranks)
    for shard in shards:
        write_shard(open_place(tmp_path), shard)
    found = read_state(open_place(tmp_path))
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    files = {f"state-rank{rank}of{ranks}.{kind}" for rank in range(ranks) for kind in ("json", "safetensors")}
    files |= {f"state-rank{rank}of{ranks}.safetensors.sha256.json" for rank in range(ranks)}
    assert {path.name for path in tmp_path.iterdir()} == files
    for shard in shards:
        own = read_shard(open_place(tmp_path), shard.layout)
        assert own is not None and own.layout == shard.layout
        assert all(torch.equal(own.tensors[name], tensor) for name, tensor in shard.tensors.items())
        assert read_shard(open_place(tmp_path), replace(shard.layout, stage=3)) is None
        assert read_shard(open_place(tmp_path), replace(shard.layout, ranks=ranks + 1)) is None
        assert read_shard(open_place(tmp_path), replace(shard.layout, fragments={"embedding": (0, 15)})) is None


def test_a_state_before_the_first_update_has_no_moments(tmp_path: Path) -> None:
    for shard in shards_of(whole_state(2), 2):
        early = {name: tensor for name, tensor in shard.tensors.items() if not name.startswith("optimizer.")}
        write_shard(open_place(tmp_path), Shard(shard.layout, early))
    assert sorted(read_state(open_place(tmp_path))) == [
        "generator",
        "generator.1",
        *sorted(f"model.{name}" for name in SHAPES),
    ]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize("kept_share", [None, 0.0, 0.5, 0.99])
def test_a_shard_that_is_not_whole_is_noticed(tmp_path: Path, rank: int, kind: str, kept_share: float | None) -> None:
    checkpoints = Checkpoints(open_place(tmp_path))
    for shard in shards_of(whole_state(2), 2):
        write_shard(checkpoints.folder(LAST, 7), shard)
    checkpoints.publish(LAST, 7, {"some": "facts"})
    assert checkpoints.read(LAST, 7).facts == {"some": "facts"}
    path = tmp_path / "last-000000000007" / f"state-rank{rank}of2.{kind}"
    written = path.read_bytes()
    if kept_share is None:
        path.unlink()
    else:
        path.write_bytes(written[: int(kept_share * len(written))])
    with pytest.raises(UNREADABLE):
        checkpoints.read(LAST, 7)


@pytest.mark.parametrize("start", [8, 10])
def test_shards_with_a_gap_or_an_overlap_are_no_state(tmp_path: Path, start: int) -> None:
    first, second = shards_of(whole_state(2), 2)
    write_shard(open_place(tmp_path), first)
    moved = second.layout.fragments | {"embedding": (start, 6)}
    write_shard(open_place(tmp_path), Shard(replace(second.layout, fragments=moved), second.tensors))
    with pytest.raises(ValueError, match="embedding"):
        read_state(open_place(tmp_path))


def save(attempt: Attempt, *updates: int) -> None:
    for update in updates:
        attempt.save_last(Progress(optimizer_steps=update), {"model.w": torch.full((3,), float(update))})
        attempt.metrics.write({"kind": "train", "optimizer_steps": update})


def notes(attempt: Attempt) -> list[str]:
    return [row["note"] for row in read_rows(attempt.place) if row["kind"] == "note"]


def folders(directory: Path, attempt: Attempt) -> list[str]:
    """The names of an attempt's checkpoints."""
    return sorted(path.name for path in (directory / "attempts" / attempt.token / "checkpoints").iterdir())


def test_a_damaged_last_checkpoint_gives_way_to_the_one_before_and_a_row_says_so(tmp_path: Path) -> None:
    first = Attempt(files_at(tmp_path))
    save(first, 1, 2, 3)
    assert folders(tmp_path, first) == ["last-000000000002", "last-000000000003"]
    own = tmp_path / "attempts" / first.token / "checkpoints"
    weights = own / "last-000000000003" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    second = Attempt(files_at(tmp_path))
    found = second.find()
    assert found is not None and found[0].optimizer_steps == 2
    assert found[1].tensors()["model.w"].tolist() == [2.0] * 3
    rows = read_rows(second.place)
    assert [(row["kind"], row["optimizer_steps"]) for row in rows] == [("train", 1), ("train", 2), ("note", 2)]
    (note,) = notes(second)
    assert f"attempts/{first.token}/checkpoints/last-000000000003" in note and "state.safetensors" in note

    (own / "last-000000000002" / "progress.json").write_text("{}")
    third = Attempt(files_at(tmp_path))
    assert third.find() is None
    assert len(notes(third)) == 2 and "progress.json" in notes(third)[1]


def test_a_checkpoint_without_its_marker_is_unfinished(tmp_path: Path) -> None:
    first = Attempt(files_at(tmp_path))
    save(first, 1, 2)
    own = tmp_path / "attempts" / first.token / "checkpoints"
    (own / "last-000000000002" / "progress.json").unlink()
    second = Attempt(files_at(tmp_path))
    found = second.find()
    assert found is not None and found[0].optimizer_steps == 1
    assert notes(second) == []


def test_the_latest_attempt_is_told_by_its_number_and_not_by_a_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    now = time.time_ns()
    first = Attempt(files_at(tmp_path))
    save(first, 1)
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)  # the clock of this machine was set back
    second = Attempt(files_at(tmp_path))
    assert second.find() is not None
    save(second, 2)
    third = Attempt(files_at(tmp_path))
    found = third.find()
    assert found is not None and found[0].optimizer_steps == 2
    save(third, 3)
    there = [path.name for path in sorted((tmp_path / "attempts").iterdir())]
    assert there == [second.token, third.token] and (second.number, third.number) == (2, 3)


@pytest.mark.parametrize(
    ("change", "field", "values"),
    [
        ({"seed": 2}, "checkpoint.seed", ("1", "2")),
        ({"width": 16, "run_id": "another"}, "checkpoint.width", ("4", "16")),
        ({"train": {"dropout": 0.5}}, "checkpoint.train.dropout", ("0.0", "0.5")),
        ({"run_id": "of-other-data"}, "checkpoint.run_id", ("law-", "of-other-data")),
    ],
)
def test_a_checkpoint_of_another_spec_is_refused_by_the_field_that_differs(
    make_run: MakeRun, tmp_path: Path, change: dict[str, object], field: str, values: tuple[str, str]
) -> None:
    run = make_run("", size="TINY")
    if "width" in change:
        run = run.model_copy(update={"width": 4})
    save(Attempt(files_at(tmp_path), run), 1)
    train = change.get("train")
    changed = change | ({"train": run.train.model_copy(update=train)} if isinstance(train, dict) else {})
    other = run.model_copy(update=changed)
    with pytest.raises(BadInput) as refused:
        Attempt(files_at(tmp_path), other).find()
    assert refused.value.field == field
    assert values[0] in str(refused.value.value) and values[1] in refused.value.remedy
    assert "\n" not in str(refused.value)


def test_what_a_run_may_use_does_not_make_another_spec_of_it(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("micro_batch = 8")
    save(Attempt(files_at(tmp_path), run), 1)
    free = {"workers": 2, "engine": "deepspeed", "zero_stage": 2, "offload_optimizer": True}
    other = run.carried_out(**free, micro_batch=4, checkpoint_seconds=1.0, precision="bf16", cpus=2, compile=True)
    found = Attempt(files_at(tmp_path), other).find()
    assert found is not None and found[0].optimizer_steps == 1
    assert found[1].facts["identity"]["seed"] == run.seed


def test_attempts_older_than_the_one_resumed_from_go_with_the_first_own_checkpoint(tmp_path: Path) -> None:
    attempts = [Attempt(files_at(tmp_path)) for _ in range(3)]
    for attempt in attempts[:2]:
        save(attempt, 1)
    fourth = Attempt(files_at(tmp_path))
    assert fourth.find() is not None
    there = sorted(path.name for path in (tmp_path / "attempts").iterdir())
    assert there == [attempt.token for attempt in [*attempts, fourth]]
    save(fourth, 2)
    there = sorted(path.name for path in (tmp_path / "attempts").iterdir())
    assert there == [attempt.token for attempt in [*attempts[1:], fourth]]
    assert (fourth.number, attempts_begun(open_place(tmp_path)), Attempt(files_at(tmp_path)).number) == (4, 4, 5)


def test_only_the_chosen_checkpoint_of_a_finished_run_stays(make_run: MakeRun, tmp_path: Path) -> None:
    from conftest import synthetic_cells

    from scaling_ray.train.engine import PlainEngine
    from scaling_ray.train.loop import RunData, run_to_result

    run = make_run("max_cells_seen = 320\ncheckpoint_seconds = 1e-6", size="XXS")
    train, val, test = (synthetic_cells(count, first_id=first) for count, first in ((64, 0), (32, 1000), (32, 2000)))
    data = RunData(train, val, test, data_hash="synthetic")
    run_to_result(run, data, PlainEngine(run, torch.device("cpu")), files_at(tmp_path))
    publish_winner(files_at(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best"]
