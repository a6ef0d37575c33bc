"""Shards on S3 are those of a directory, byte for byte, also from a store that fails now and then or goes away.

Conversions run in a process of their own, as Ray's workers take their environment from the one that starts the cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import PROXY, TINY_SWEEP, S3Server, free_port, running_s3, serving

from scaling_ray.cli import main
from scaling_ray.errors import BadInput, LeaseHeld
from scaling_ray.shards.convert import build_shards
from scaling_ray.shards.format import SPLITS, read_manifest, verify
from scaling_ray.shards.read import read_split
from scaling_ray.spec import parse_spec
from scaling_ray.storage import open_place

pytestmark = pytest.mark.ray

CONVERT = """
import sys
from pathlib import Path
from scaling_ray.cluster import ray_session
from scaling_ray.shards.convert import build_shards
from scaling_ray.spec import load_spec
spec, census, *targets = sys.argv[1:]
spec = load_spec(Path(spec))
with ray_session(spec.resources.cpus):
    for target in targets:
        build_shards(spec, census, target, lambda line: print(line, flush=True))
"""

CONVERT_AND_READ = (
    CONVERT
    + """
    import numpy as np
    from scaling_ray.runs import runs_of
    from scaling_ray.storage import open_place
    from scaling_ray.shards.format import SPLITS, read_manifest
    from scaling_ray.shards.read import shards_order
    from scaling_ray.shards.stream import StreamFeed, read_resident
    run = next(run for run in runs_of(spec) if run.cells is None)
    for number, target in enumerate(targets):
        manifest = read_manifest(target)
        found = {split: read_resident(target, manifest, split, 50) for split in SPLITS}
        feed = StreamFeed(target, manifest, run.genes, shards_order(open_place(target), manifest, run))
        for step in range(12):  # twice through the cells, and on
            found[f"step {step}"], found[f"epochs of step {step}"] = feed.batch(step, 128)
        feed.close()
        arrays = {}
        for name, cells in found.items():
            arrays |= {f"{name} {k}": v for k, v in vars(cells).items()} if hasattr(cells, "counts") else {name: cells}
        np.savez(f"{sys.argv[1]}-{number}.npz", **arrays)
"""
)


def started(program: str, *arguments: str, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A conversion under way, with a Ray of its own."""
    own = {name: value for name, value in os.environ.items() if name[:4] not in ("RAY_", "AWS_")}
    own["RAY_worker_niceness"] = "0"
    with open(log, "wb") as stream:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.Popen(command, env=own | environment, stdout=stream, stderr=stream)


def ended(process: subprocess.Popen[bytes], log: Path, timeout: float) -> None:
    """Waits for a conversion to end well."""
    try:
        assert process.wait(timeout) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    """sha256 by name."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def directory(path: Path) -> dict[str, bytes]:
    """Every file below a directory, by its name there."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@dataclass(frozen=True)
class Both:
    """The same conversion into a directory and to S3, and what the cluster read from each."""

    local: Path
    uri: str
    read: tuple[Path, Path]


@pytest.fixture(scope="module")
def both(planted_census: Path, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("both")
    spec, local, uri = folder / "spec.toml", folder / "shards", "s3://shards/tiny/shards"
    spec.write_text(TINY_SWEEP)
    arguments = (str(spec), str(planted_census), str(local), uri)
    process = started(CONVERT_AND_READ, *arguments, environment=s3_server.environment(), log=folder / "log")
    ended(process, folder / "log", 300)
    return Both(local, uri, (Path(f"{spec}-0.npz"), Path(f"{spec}-1.npz")))


@pytest.fixture
def copy(both: Both, s3: S3Server) -> Iterator[tuple[str, Callable[[str, bytes | None], None]]]:
    """A copy of the shards on S3, and a way to put or, where it gets None, to delete an object of it."""

    def put(name: str, data: bytes | None) -> None:
        if data is None:
            s3.client.delete_object(Bucket="shards", Key=f"copy/shards/{name}")
        else:
            s3.client.put_object(Bucket="shards", Key=f"copy/shards/{name}", Body=data)

    for name, data in directory(both.local).items():
        put(name, data)
    yield "s3://shards/copy/shards", put
    for name in s3.objects("shards", "copy/shards/"):
        put(name, None)


def test_the_objects_are_the_files_of_a_directory_byte_for_byte(both: Both, s3: S3Server) -> None:
    objects = s3.objects("shards", "tiny/shards/")
    assert hashes(objects) == hashes(directory(both.local))
    assert {"manifest.json", "genes.parquet", "presence.parquet", "plant.json", "train-00000.parquet"} < set(objects)
    assert read_manifest(both.uri) == read_manifest(both.local)
    assert {name: entry.cells for name, entry in read_manifest(both.uri).splits.items()}.keys() == set(SPLITS)


def test_verify_is_clean_and_names_what_is_damaged_missing_or_foreign(
    both: Both, copy: tuple[str, Callable[[str, bytes | None], None]], capsys: pytest.CaptureFixture[str]
) -> None:
    uri, put = copy
    assert verify(both.uri) == verify(uri) == []
    assert main(["shards", "verify", uri]) == 0
    assert capsys.readouterr().out == f"{uri}: whole\n"
    data = (both.local / "val-00000.parquet").read_bytes()
    put("val-00000.parquet", data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    put("test-00000.parquet", (both.local / "test-00000.parquet").read_bytes()[:-100])
    put("genes.parquet", None)
    put("train-00001.parquet", b"of an older build")
    put("building/ranges/00000.rows", b"left over")
    problems = {line.split(": ", 1)[0]: line.split(": ", 1)[1] for line in verify(uri)}
    assert set(problems) == {
        "val-00000.parquet",
        "test-00000.parquet",
        "genes.parquet",
        "train-00001.parquet",
        "building/ranges/00000.rows",
    }
    assert "sha256 differs" in problems["val-00000.parquet"]
    assert problems["test-00000.parquet"].startswith("has ")
    assert problems["genes.parquet"] == "is missing"
    assert problems["train-00001.parquet"] == problems["building/ranges/00000.rows"] == "is not in the manifest"
    assert main(["shards", "verify", uri]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(name in said for name in problems)


def test_the_driver_reads_the_same_cells(both: Both, s3: S3Server) -> None:
    manifest = read_manifest(both.local)
    for split in SPLITS:
        for genes in (64, 10):
            here, there = (read_split(where, manifest, split, genes) for where in (both.local, both.uri))
            assert len(here) == manifest.splits[split].cells > 0
            for name, values in vars(here).items():
                np.testing.assert_array_equal(values, vars(there)[name], strict=True)


def test_the_cluster_reads_the_same_cells_and_batches(both: Both) -> None:
    here, there = (np.load(path) for path in both.read)
    with here, there:
        assert here.files == there.files and len(here.files) == (len(SPLITS) + 12) * 6 + 12
        for name in here.files:
            np.testing.assert_array_equal(here[name], there[name], strict=True)
        plain = read_split(both.local, read_manifest(both.local), "train", 50)
        np.testing.assert_array_equal(there["train counts"], plain.counts)
        assert there["epochs of step 11"].max() >= 1


def test_shards_that_are_there_are_left_as_they_are(
    both: Both, planted_census: Path, s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(s3.requests())
    manifest = build_shards(parse_spec(TINY_SWEEP), str(planted_census), both.uri)
    assert manifest == read_manifest(both.local)
    spec = tmp_path / "spec.toml"
    spec.write_text(TINY_SWEEP)
    assert main(["shards", "build", str(spec), "--census", str(planted_census), "--out", both.uri]) == 0
    assert capsys.readouterr().out == f"{both.uri}\n"
    with pytest.raises(BadInput, match=r"made by other rules \(genes\)"):
        build_shards(parse_spec(TINY_SWEEP.replace("genes = 64", "genes = 65", 1)), str(planted_census), both.uri)
    assert {method for method, *_ in s3.requests()[before:]} <= {"GET", "HEAD"}


def test_what_lies_there_of_another_kind_is_left_alone(planted_census: Path, s3: S3Server) -> None:
    s3.client.put_object(Bucket="shards", Key="mine/mine.txt", Body=b"mine")
    with pytest.raises(BadInput, match=r"manifest\.json"):
        build_shards(parse_spec(TINY_SWEEP), str(planted_census), "s3://shards/mine")
    assert s3.objects("shards", "mine/") == {"mine.txt": b"mine"}


def test_a_second_driver_is_told_so_and_writes_nothing(planted_census: Path, s3: S3Server) -> None:
    with open_place("s3://shards/held/shards").lease("building/.lease"):
        before = set(s3.objects("shards", "held/"))
        with pytest.raises(LeaseHeld, match="s3://shards/held/shards: another driver works here"):
            build_shards(parse_spec(TINY_SWEEP), str(planted_census), "s3://shards/held/shards")
        assert set(s3.objects("shards", "held/")) == before == {"shards/building/.lease"}


def test_a_bucket_that_is_none_is_refused_at_once(planted_census: Path, s3: S3Server) -> None:
    with pytest.raises(BadInput, match="NoSuchBucket") as refusal:
        build_shards(parse_spec(TINY_SWEEP), str(planted_census), "s3://no-such-bucket/shards")
    assert refusal.value.exit_code == 2 and refusal.value.field == "--out"
    assert len([path for _, path, *_ in s3.requests() if path.startswith("/no-such-bucket")]) == 1, "asked again"


# a store that is not well


@dataclass(frozen=True)
class Large:
    """A conversion of several ranges: its spec and Census, and the files it leaves in a directory."""

    spec: Path
    census: Path
    files: dict[str, str]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    from scaling_ray.planted.plant import plant

    folder = tmp_path_factory.mktemp("large")
    census = plant(folder / "census", n_cells=140_000, n_genes=80, seed=1)
    spec, local = folder / "spec.toml", folder / "shards"
    spec.write_text(TINY_SWEEP)
    process = started(CONVERT, str(spec), str(census), str(local), environment={}, log=folder / "log")
    ended(process, folder / "log", 500)
    return Large(spec, census, hashes(directory(local)))


@pytest.mark.slow
def test_a_store_that_fails_one_request_in_twenty_gives_the_same_bytes(large: Large, tmp_path: Path) -> None:
    with running_s3(tmp_path, failing=0.05) as server:
        arguments = (str(large.spec), str(large.census), "s3://shards/flaky")
        process = started(CONVERT, *arguments, environment=server.environment(), log=tmp_path / "log")
        ended(process, tmp_path / "log", 500)
        asked = server.requests()
        assert hashes(server.objects("shards", "flaky/")) == large.files
    failed = [fault for *_, fault in asked if fault != "-"]
    assert 0.02 * len(asked) < len(failed) < 0.1 * len(asked)
    assert set(failed) == {"refused", "lost", "cut"}


@pytest.mark.slow
def test_a_store_that_is_gone_for_a_minute_costs_a_minute(large: Large, s3_server: S3Server, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    ranges = "outage/building/ranges/"

    def names(below: str) -> set[str]:
        found = s3_server.client.list_objects_v2(Bucket="shards", Prefix=below).get("Contents", [])
        return {entry["Key"] for entry in found}

    with ExitStack() as stack:
        proxy = stack.enter_context(serving(port, PROXY, str(port), str(s3_server.port)))
        arguments = (str(large.spec), str(large.census), "s3://shards/outage")
        environment = s3_server.environment(f"http://127.0.0.1:{port}")
        process = started(CONVERT, *arguments, environment=environment, log=log)
        stack.callback(process.kill)
        deadline = time.monotonic() + 300
        while not names(ranges):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        os.kill(proxy.pid, signal.SIGKILL)
        proxy.wait()
        gone = time.monotonic()
        time.sleep(1)  # what was under way has ended
        left = names("outage/")
        plan = json.loads(s3_server.objects("shards", "outage/building/plan.json")[""])
        facts = [name for name in left if name.endswith(".facts")]
        assert len(facts) < len(plan["ranges"]), "all was read before the store went away: the test shows nothing"
        while time.monotonic() - gone < 60:
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        assert names("outage/") == left and "outage/manifest.json" not in left
        stack.enter_context(serving(port, PROXY, str(port), str(s3_server.port)))
        ended(process, log, 400)
    assert hashes(s3_server.objects("shards", "outage/")) == large.files


@pytest.mark.slow
def test_a_driver_that_was_killed_is_followed_by_one_that_goes_on(large: Large, s3: S3Server, tmp_path: Path) -> None:
    arguments = (str(large.spec), str(large.census), "s3://shards/killed")
    log = tmp_path / "log"
    with ExitStack() as stack:
        first = started(CONVERT, *arguments, environment=s3.environment(), log=log)
        stack.callback(first.kill)
        deadline = time.monotonic() + 300
        while not (facts := [name for name in s3.objects("shards", "killed/") if name.endswith(".facts")]):
            assert first.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
    before = len(s3.requests())
    second = started(CONVERT, *arguments, environment=s3.environment(), log=log)
    ended(second, log, 300)
    assert hashes(s3.objects("shards", "killed/")) == large.files
    written = {path.rpartition("killed/")[2] for method, path, *_ in s3.requests()[before:] if method == "PUT"}
    assert "manifest.json" in written
    assert not written & {"building/plan.json", *facts}, "what was done was made again"
