"""Files are whole or absent, commits happen once, one driver at a time: also with many processes and kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling_ray.errors import BadInput, LeaseHeld
from scaling_ray.storage import (
    PARTIAL_PREFIX,
    Lease,
    create_if_absent,
    output_directory,
    partial_directory,
    publish_directory,
    write_atomic,
    write_json,
)


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


COMMIT = """
import sys, time
from pathlib import Path
from scaling_ray.storage import create_if_absent
target, mine, begin = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
time.sleep(max(0.0, begin - time.time()))
print(create_if_absent(target, mine * 100_000))
"""


def test_eight_processes_commit_once(tmp_path: Path) -> None:
    for round_ in range(3):
        target = tmp_path / f"{round_}.json"
        begin = str(time.time() + 1.0)
        writers = {letter: start(COMMIT, str(target), letter, begin) for letter in "abcdefgh"}
        said = {letter: process.communicate()[0].strip() for letter, process in writers.items()}
        assert sorted(said.values()) == ["False"] * 7 + ["True"]
        winner = next(letter for letter, answer in said.items() if answer == "True")
        assert target.read_text() == winner * 100_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json", "2.json"]


def test_a_later_commit_changes_nothing(tmp_path: Path) -> None:
    assert create_if_absent(tmp_path / "deep" / "result", b"first")
    assert not create_if_absent(tmp_path / "deep" / "result", b"second")
    assert (tmp_path / "deep" / "result").read_bytes() == b"first"


REWRITE = """
import sys
from pathlib import Path
from scaling_ray.storage import write_atomic
print("ready", flush=True)
while True:
    for letter in "ab":
        write_atomic(Path(sys.argv[1]), letter * 4_000_000)
"""


def test_a_kill_never_shows_a_part_of_a_file(tmp_path: Path) -> None:
    target = tmp_path / "state"
    write_atomic(target, "a" * 4_000_000)
    delays = random.Random(0)
    interrupted = 0
    for _ in range(8):
        process = start(REWRITE, str(target))
        assert process.stdout is not None
        process.stdout.readline()
        until = time.monotonic() + delays.uniform(0.02, 0.15)
        while time.monotonic() < until:  # a reader beside the living writer
            assert target.read_text() in ("a" * 4_000_000, "b" * 4_000_000)
        kill(process)
        assert target.read_text() in ("a" * 4_000_000, "b" * 4_000_000)
        left = [path for path in tmp_path.iterdir() if path != target]
        assert all(path.name.startswith(PARTIAL_PREFIX) for path in left)
        interrupted += bool(left)
        for path in left:
            path.unlink()
    assert interrupted, "no kill fell into a write: the test shows nothing"


def test_write_json_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.5}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_directory_appears_whole_and_replaces_whole(tmp_path: Path) -> None:
    final = tmp_path / "shards"
    for files in ({"a": "1", "b": "2"}, {"c": "3"}):
        building = partial_directory(final)
        before = sorted(path.name for path in final.iterdir()) if final.exists() else None
        for name, text in files.items():
            (building / name).write_text(text)
            assert (sorted(path.name for path in final.iterdir()) if final.exists() else None) == before
        publish_directory(building, final)
        assert {path.name: path.read_text() for path in final.iterdir()} == files
        assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_leftovers_of_an_interrupted_build_go_and_only_those(tmp_path: Path) -> None:
    final = tmp_path / "demo"
    interrupted = partial_directory(final)
    (interrupted / "half").write_text("half")
    neighbours = partial_directory(tmp_path / "demo-large")
    (tmp_path / "demo[1]").mkdir()
    odd = partial_directory(tmp_path / "demo[1]")
    building = partial_directory(final)
    assert not interrupted.exists()
    assert neighbours.exists()
    assert odd.exists()
    assert list(building.iterdir()) == []
    again = partial_directory(tmp_path / "demo[1]")
    assert not odd.exists()
    assert again.exists()


HOLD = """
import sys, time
from pathlib import Path
from scaling_ray.storage import Lease
with Lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_holder_between_processes_and_a_kill_frees_it(tmp_path: Path) -> None:
    holder = start(HOLD, str(tmp_path))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LeaseHeld, match="another driver") as caught, Lease(tmp_path):
        raise AssertionError("two holders")
    assert caught.value.exit_code == 5
    kill(holder)
    with Lease(tmp_path):
        second = start(HOLD, str(tmp_path))
        assert second.communicate()[0] == ""
        assert second.returncode != 0
    with Lease(tmp_path):
        pass


def test_a_child_started_by_the_holder_does_not_keep_the_lease(tmp_path: Path) -> None:
    with Lease(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        with Lease(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_output_directory(tmp_path: Path) -> None:
    assert output_directory(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--out: .*file.*another place"):
        output_directory(tmp_path / "file")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(BadInput, match="not writable"):
            output_directory(tmp_path / "closed")
