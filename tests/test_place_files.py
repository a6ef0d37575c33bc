"""Whole files into a place and out of it, folders to build them in, and files that grow by lines; on both kinds."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import S3Server

from scaling_ray.errors import BadInput
from scaling_ray.storage import (
    PARTIAL_PREFIX,
    LocalPlace,
    Place,
    S3Place,
    S3Settings,
    open_place,
    partial_directory,
    sweep_partial_files,
)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process's own directory for temporary files, to see what is left in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def finished(folder: Path, data: bytes) -> Path:
    path = folder / "finished"
    path.write_bytes(data)
    return path


def test_what_is_there_is_told_and_read_and_what_is_not_is_none(where: Place) -> None:
    where.write("folder/file", b"x")
    where.write("empty", b"")
    assert where.exists("folder/file") and where.exists("empty")
    assert where.read_if_there("folder/file") == b"x" and where.read_if_there("empty") == b""
    for name in ("folder", "fold", "folder/fil", "folder/file2", "absent", "absent/file"):
        assert not where.exists(name)
        assert where.read_if_there(name) is None


@pytest.mark.parametrize("size", [0, 1, 200_000, 40_000_000])
def test_a_file_goes_in_whole_and_is_consumed(where: Place, tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    where.write("deep/state", b"what was there")
    path = finished(tmp_path, data)
    where.put_file("deep/state", path)
    assert not path.exists()
    assert where.names() == {"deep/state": size}
    assert where.read("deep/state") == data
    with where.local_copy("deep/state") as copy:
        assert copy.read_bytes() == data


def test_what_is_no_file_is_not_put(where: Place, tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises((FileNotFoundError, IsADirectoryError)):
            where.put_file("state", path)
    assert where.names() == {}


def test_a_file_from_another_disk_goes_in_whole(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    where = open_place(tmp_path / "sweep")
    if not other.is_dir() or os.stat(other).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("needs a second file system")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        path = finished(Path(folder), b"x" * 100_000)
        where.put_file("state", path)
        assert not path.exists()
    assert where.read("state") == b"x" * 100_000
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["state"]


@pytest.mark.parametrize("name", ["refused-2-times", "lost-2-times", "unended-1-times", "cut-1-times"])
def test_a_large_file_outlasts_errors_and_lost_answers(on_s3: S3Place, s3: S3Server, tmp_path: Path, name: str) -> None:
    """It goes in parts, of which some are refused, or done and not answered, also where the SDK tries only once."""
    data = np.random.default_rng(0).bytes(40_000_000)
    one_try = S3Place(on_s3.uri, settings=S3Settings(attempts=1, answer_seconds=20.0))
    one_try.put_file(name, finished(tmp_path, data))
    with one_try.local_copy(name) as copy:
        assert copy.read_bytes() == data
    faults = [fault for _, path, _, _, fault in s3.requests() if on_s3.prefix in path and fault != "-"]
    assert faults, "nothing went wrong: the test shows nothing"  # a part that is given up with another is not logged


def test_a_refused_file_stays_with_its_maker(on_s3: S3Place, tmp_path: Path) -> None:
    path = finished(tmp_path, b"mine")
    with pytest.raises(BadInput, match="NoSuchBucket"):
        open_place("s3://no-such-bucket/sweep").put_file("state", path)
    assert path.read_bytes() == b"mine"


def test_a_local_copy_goes_with_its_block(where: Place, temporary: Path) -> None:
    where.write("deep/model.safetensors", b"weights")
    with pytest.raises(RuntimeError), where.local_copy("deep/model.safetensors") as copy:
        assert copy.name == "model.safetensors"
        assert copy.read_bytes() == b"weights"
        raise RuntimeError
    assert where.read("deep/model.safetensors") == b"weights"
    assert list(temporary.iterdir()) == []
    for name in ("absent", "deep"):
        with pytest.raises(FileNotFoundError), where.local_copy(name):
            raise AssertionError("a copy of nothing")
    assert list(temporary.iterdir()) == []


def test_a_copy_is_of_one_object_also_where_that_is_replaced(on_s3: S3Place, s3: S3Server) -> None:
    """Replaced between two parts: the copy begins again."""

    on_s3.write("state", b"old" * 2000)
    later = [b"new" * 1000, b"newest"]

    class ReplacedMeanwhile(S3Place):
        def ask(self, operation: str, name: str | None = None, **arguments: object) -> object:
            reply = super().ask(operation, name, **arguments)
            if operation == "head_object" and later:
                s3.client.put_object(Bucket="shards", Key=self.prefix + "state", Body=later.pop(0))
            return reply

    with ReplacedMeanwhile(on_s3.uri).local_copy("state") as copy:
        assert copy.read_bytes() == b"newest"


# folders to build in


def test_a_scratch_folder_is_empty_unseen_and_gone_afterwards(where: Place, temporary: Path) -> None:
    where.write("checkpoints/older", b"x")
    with pytest.raises(RuntimeError), where.scratch("checkpoints/best") as folder:
        assert list(folder.iterdir()) == []
        (folder / "deep").mkdir()
        (folder / "deep" / "left").write_bytes(b"left")
        (folder / "state").write_bytes(b"state")
        assert list(where.names()) == list(where.names("checkpoints/")) == ["checkpoints/older"]
        where.put_file("checkpoints/best/state", folder / "state")
        raise RuntimeError
    assert where.names() == {"checkpoints/best/state": 5, "checkpoints/older": 1}
    assert not folder.exists() and list(temporary.iterdir()) == []


def test_a_scratch_folder_lies_where_its_files_will(tmp_path: Path) -> None:
    where = LocalPlace(tmp_path / "sweep")
    with where.scratch("runs/a/best") as folder:
        assert folder.parent == tmp_path / "sweep" / "runs" / "a" and folder.name.startswith(PARTIAL_PREFIX)
        before = finished(folder, b"x").stat().st_ino
        where.put_file("runs/a/best", folder / "finished")
        assert (tmp_path / "sweep/runs/a/best").stat().st_ino == before


BUILD = """
import os, signal, sys
from pathlib import Path
from scaling_ray.storage import open_place
with open_place(sys.argv[1]).scratch("runs/a/best") as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_builder_left_is_unseen_and_goes_with_the_next_of_its_name(tmp_path: Path) -> None:
    where = open_place(tmp_path)
    killed = subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    left = list((tmp_path / "runs/a").iterdir())
    assert len(left) == 1 and where.names() == where.names("runs/a/") == {}
    with where.scratch("runs/a/other"):
        assert left[0].exists()
    with where.scratch("runs/a/best"):
        assert not left[0].exists()
    assert list((tmp_path / "runs/a").iterdir()) == []


def test_the_one_writer_may_sweep_folders_too(tmp_path: Path) -> None:
    (partial_directory(tmp_path / "deep" / "best") / "half").write_text("half")
    (tmp_path / f"{PARTIAL_PREFIX}file").write_text("half")
    (tmp_path / "whole").write_text("whole")
    sweep_partial_files(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "whole"]


# files that grow


def test_lines_are_read_in_the_order_they_were_written(where: Place) -> None:
    log = where.log("runs/a/metrics.jsonl", "taken over\n", seconds=0.0)
    assert where.read("runs/a/metrics.jsonl") == b"taken over\n"
    for line in ("first\n", "second\nthird\n", "é\n"):
        log.write(line)
        assert where.read("runs/a/metrics.jsonl").decode().endswith(line)
    log.flush()
    assert where.read("runs/a/metrics.jsonl").decode() == "taken over\nfirst\nsecond\nthird\né\n"


def test_a_log_begins_anew_or_goes_on_as_it_is_asked(where: Place) -> None:
    first = where.log("log")
    first.write("one\n")
    first.flush()
    on = where.log("log")
    on.write("two\n")
    on.flush()
    assert where.read("log") == b"one\ntwo\n"
    where.write("log", b"one\ntwo\nhal")
    cut = where.log("log")
    cut.write("three\n")
    cut.flush()
    assert where.read("log") == b"one\ntwo\nthree\n"
    where.log("log", "")
    assert where.read("log") == b""


def test_s3_holds_the_lines_after_a_flush_and_not_before_its_time(on_s3: S3Place, s3: S3Server) -> None:
    log = on_s3.log("log", "taken over\n", seconds=1e6)
    before = len(s3.requests())
    for number in range(100):
        log.write(f"{number}\n")
    assert on_s3.read("log") == b"taken over\n"
    log.flush()
    log.flush()
    assert on_s3.read("log").decode() == "taken over\n" + "".join(f"{number}\n" for number in range(100))
    assert sum(method == "PUT" for method, *_ in s3.requests()[before:]) == 1


APPEND = """
import sys
from scaling_ray.storage import open_place
log = open_place(sys.argv[1]).log("metrics.jsonl", "")
print("ready", flush=True)
number = 0
while True:
    number += 1
    log.write('{"row": %d, "text": "%s"}\\n' % (number, "x" * 500))
"""


def test_a_kill_costs_the_last_line_of_a_local_log_at_most(tmp_path: Path) -> None:
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", APPEND, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        path = tmp_path / "metrics.jsonl"
        while path.stat().st_size < 200_000:
            pass
        writer.kill()
        writer.communicate()
        lines = path.read_bytes().split(b"\n")
        assert [json.loads(line)["row"] for line in lines[:-1]] == list(range(1, len(lines)))
        open_place(tmp_path).log("metrics.jsonl").write('{"row": 0}\n')
        assert json.loads(path.read_bytes().splitlines()[-1]) == {"row": 0}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_leaves_whole_lines(small_disk: Path, tmp_path: Path) -> None:
    where = open_place(small_disk / "sweep")
    log = where.log("log", "first\n")
    large = finished(tmp_path, b"x" * 2_000_000)
    calls: dict[str, Callable[[], object]] = {
        "log": lambda: log.write("x" * 2_000_000 + "\n"),
        "put_file": lambda: where.put_file("state", large),
    }
    for call in calls.values():
        with pytest.raises(BadInput, match="No space left on device"):
            call()
    assert where.names() == {"log": 6} and where.read("log") == b"first\n"
    assert large.stat().st_size == 2_000_000
    log.write("second\n")
    assert where.read("log") == b"first\nsecond\n"
    assert [path.name for path in (small_disk / "sweep").iterdir()] == ["log"]


def test_a_full_temporary_directory_is_named(on_s3: S3Place, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_s3.write("state", b"x" * 2_000_000)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with pytest.raises(BadInput, match=f"TMPDIR: '{small_disk}': cannot be used .{os.strerror(errno.ENOSPC)}"):
        on_s3.local_copy("state").__enter__()
    assert list(small_disk.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk / "absent"))
    for call in (lambda: on_s3.scratch("best").__enter__(), lambda: on_s3.local_copy("state").__enter__()):
        with pytest.raises(BadInput, match="TMPDIR: .*/absent'"):
            call()


def test_settings_travel_with_a_place_and_its_folders(on_s3: S3Place) -> None:
    settings = S3Settings(outage_seconds=7.0, lease_seconds=6.0)
    place = S3Place(on_s3.uri, "sweep", settings)
    for found in (place.below("runs"), pickle.loads(pickle.dumps(place)), open_place(place)):
        assert isinstance(found, S3Place)
        assert found.settings == settings and found.field == "sweep"
