"""What a place promises, the same for a directory and for S3: whole files, one first writer, one holder of a lease.

The S3 server is a process of its own (``conftest.S3_SERVER``): moto, whose conditional puts are made to be one step and
to conflict while another is under way, as S3 documents them, and which fails as often as the name of a file asks for.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3Server, free_port

from scaling_ray.errors import BadInput, LeaseHeld
from scaling_ray.storage import LocalPlace, Place, S3Place, S3Settings, open_place, patiently

LEASE = "building/.lease"


def all_at_once(actions: Sequence[Callable[[], bool]]) -> list[bool | Exception]:
    """What each action says when all begin at the same moment, or the error that rose from it."""
    begin = threading.Barrier(len(actions))
    said: list[bool | Exception] = [False] * len(actions)

    def act(index: int) -> None:
        begin.wait()
        try:
            said[index] = actions[index]()
        except Exception as error:  # noqa: BLE001 - what rises is what the caller looks at
            said[index] = error

    threads = [threading.Thread(target=act, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def refused(action: Callable[[], object]) -> str:
    """The one line of BadInput that ``action`` ends in."""
    with pytest.raises(BadInput) as refusal:
        action()
    assert refusal.value.exit_code == 2
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_what_was_written_is_read_whole_and_in_ranges(where: Place) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    where.write("train-00000.parquet", data)
    where.write("deep/er/file", b"0123456789")
    where.write("empty", b"")
    assert where.read("train-00000.parquet") == data
    assert where.read("train-00000.parquet", 123_456, 1) == data[123_456:123_457]
    assert where.read("train-00000.parquet", 100_000, 150_000) == data[100_000:250_000]
    ranges = {(0, None): b"0123456789", (7, None): b"789", (0, 3): b"012", (3, 4): b"3456", (8, 100): b"89"}
    ranges |= {(4, 0): b"", (10, None): b"", (10, 5): b"", (99, 1): b""}
    assert {asked: where.read("deep/er/file", *asked) for asked in ranges} == ranges
    assert where.read("empty") == where.read("empty", 0, 5) == b""
    assert [where.size(name) for name in ("train-00000.parquet", "deep/er/file", "empty")] == [300_000, 10, 0]


def test_a_write_takes_the_place_of_what_was_there(where: Place) -> None:
    for data in (b"the first and longer one", b"second", b""):
        where.write("manifest.json", data)
        assert where.read("manifest.json") == data
        assert where.names() == {"manifest.json": len(data)}


def test_what_is_not_there_is_file_not_found(where: Place) -> None:
    for wanting in (where, where.below("no/such/folder")):
        assert wanting.names() == {}
        assert wanting.size("absent") is None
        wanting.remove("absent")
        wanting.remove("absent/")
    where.write("there", b"something")
    for name in ("absent", "folder/absent", "ther"):
        assert where.size(name) is None
        with pytest.raises(FileNotFoundError):
            where.read(name)
        with pytest.raises(FileNotFoundError):
            where.read(name, 2, 3)
        with pytest.raises(FileNotFoundError):
            pq.ParquetFile(where.parquet_source(name))
    assert where.names() == {"there": 9}


def test_names_are_those_that_begin_so_with_their_bytes(where: Place) -> None:
    written = {"manifest.json": 5, "ranges/00000.rows": 3, "ranges/00000.facts": 4, "ranges/00001.rows": 1}
    written |= {"rangesum": 2, "files/abc/train.json": 6}
    for name, size in written.items():
        where.write(name, b"x" * size)
    assert where.names() == written
    assert list(where.names()) == sorted(written)
    for below in ("ranges/", "ranges", "ranges/00000", "files/abc/", "manifest.json", "nothing/", "anges"):
        assert where.names(below) == {name: size for name, size in written.items() if name.startswith(below)}


def test_remove_takes_a_file_or_a_folder_and_nothing_beside_it(where: Place) -> None:
    for name in ("a/1", "a/2", "a/deep/er/3", "ab/4", "ab5", "c", "cd"):
        where.write(name, b"x")
    where.remove("a/")
    assert list(where.names()) == ["ab/4", "ab5", "c", "cd"]
    where.remove("c")
    where.remove("ab/4")
    assert list(where.names()) == ["ab5", "cd"]
    where.write("a/1", b"again")
    assert where.names("a/") == {"a/1": 5}


def test_the_place_below_is_a_folder_of_this_one(where: Place) -> None:
    building = where.below("building")
    building.write("plan.json", b"plan")
    where.write("building/ranges/00000", b"facts")
    where.write("buildings", b"beside it")
    assert str(building) == f"{where}/building" == building.uri
    assert building.field == where.field
    assert building.names() == {"plan.json": 4, "ranges/00000": 5}
    assert building.below("ranges").read("00000") == b"facts"
    assert where.read("building/plan.json") == b"plan"
    assert building.create("result", b"one") and where.size("building/result") == 3
    building.remove("ranges/")
    assert where.names() == {"building/plan.json": 4, "building/result": 3, "buildings": 9}


def test_a_place_goes_to_another_process_and_is_the_same_there(where: Place) -> None:
    where.write("file", b"of this process")
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read('file').decode())"
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(where), capture_output=True, timeout=60)
    assert done.stdout == b"of this process\n", done.stderr


def test_the_first_to_create_wins_and_later_ones_change_nothing(where: Place) -> None:
    assert where.create("deep/result", b"first") is True
    assert where.create("deep/result", b"second, and longer") is False
    assert where.names() == {"deep/result": 5}
    assert where.read("deep/result") == b"first"
    where.remove("deep/result")
    assert where.create("deep/result", b"third") is True
    assert where.read("deep/result") == b"third"


def test_eight_creators_at_once_commit_once(where: Place) -> None:
    for turn in range(2):
        contents = [f"{turn} {writer} ".encode() * 20_000 for writer in range(8)]
        actions = [partial(where.create, f"result-{turn}", data) for data in contents]
        said = all_at_once(actions)
        assert sorted(said, key=str) == [False] * 7 + [True]
        assert where.read(f"result-{turn}") == contents[said.index(True)]
    assert list(where.names()) == [f"result-{turn}" for turn in range(2)]


def test_parquet_reads_some_columns_of_a_row_group(where: Place, request: pytest.FixtureRequest) -> None:
    rng = np.random.default_rng(0)
    table = pa.table({name: rng.integers(0, 1 << 40, 60_000) for name in ("cell", "raw_sum", "other", "more")})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=20_000)
    where.write("train-00000.parquet", sink.getvalue())
    before = len(request.getfixturevalue("s3_server").requests()) if isinstance(where, S3Place) else 0
    file = pq.ParquetFile(where.parquet_source("train-00000.parquet"), pre_buffer=True)
    assert file.num_row_groups == 3
    assert file.read_row_group(1, columns=["raw_sum"]).equals(table.select(["raw_sum"]).slice(20_000, 20_000))
    assert file.read_row_group(2).equals(table.slice(40_000))
    if isinstance(where, S3Place):
        asked = request.getfixturevalue("s3_server").requests()[before:]
        moved = sum(int(size) for method, _, _, size, _ in asked if method == "GET")
        assert moved < 0.75 * len(sink.getvalue()), "a part of the file was asked for, all of it was read"
    assert pq.read_table(where.parquet_source("train-00000.parquet")).equals(table)


def test_of_eight_who_want_the_lease_at_once_one_holds_it(where: Place) -> None:
    for _ in range(2):
        with ExitStack() as stack:
            said = all_at_once([lambda: bool(stack.enter_context(where.lease(LEASE))) for _ in range(8)])  # noqa: B023
            assert [type(answer) for answer in said if answer is not True] == [LeaseHeld] * 7
        with where.lease(LEASE):
            pass


def test_a_place_is_what_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = open_place("some/shards")
    assert isinstance(relative, LocalPlace) and relative.path == tmp_path / "some" / "shards"
    assert str(relative) == str(open_place(tmp_path / "some/shards")) == str(tmp_path / "some/shards")
    assert open_place(relative, "shards") is relative
    for uri in ("s3://bucket/shards", "s3://bucket/shards/", "s3://bucket/deep/er/shards"):
        found = open_place(uri)
        assert isinstance(found, S3Place) and str(found) == uri.rstrip("/")
    assert open_place("s3://bucket/shards", "data.split_from").field == "data.split_from"
    for uri in ("gs://x/y", "file:///x/y", "https://bucket/shards", "s3://", "s3://bucket", "s3:///shards"):
        line = refused(partial(open_place, uri, "shards"))
        assert line.startswith(f"shards: '{uri}': ") and "s3://" in line.split(": ", 2)[2]
    assert list(tmp_path.iterdir()) == []


# S3


@pytest.mark.parametrize("objects", [250, pytest.param(1_005, marks=pytest.mark.slow)])
def test_more_objects_than_one_answer_lists_are_named_and_removed(objects: int, on_s3: S3Place, s3: S3Server) -> None:
    sizes = {f"many/{index:05d}": index % 5 for index in range(objects)}
    for name, size in sizes.items():
        s3.client.put_object(Bucket="shards", Key=on_s3.prefix + name, Body=b"x" * size)
    on_s3.write("zz", b"beside them")
    assert on_s3.names("many/") == sizes
    assert on_s3.names() == sizes | {"zz": 11}
    on_s3.remove("many/")
    assert s3.objects("shards", on_s3.prefix) == {"zz": b"beside them"}


def test_a_folder_made_by_hand_is_an_empty_place(on_s3: S3Place, s3: S3Server) -> None:
    s3.client.put_object(Bucket="shards", Key=on_s3.prefix, Body=b"")  # as the console makes folders
    assert on_s3.names() == {}
    on_s3.write("file", b"x")
    assert on_s3.names() == {"file": 1}
    for folder in ("sub/", "sub/deep/"):
        s3.client.put_object(Bucket="shards", Key=on_s3.prefix + folder, Body=b"")
    on_s3.remove("sub/")
    there = s3.client.list_objects_v2(Bucket="shards", Prefix=on_s3.prefix)["Contents"]
    assert {entry["Key"].removeprefix(on_s3.prefix) for entry in there} == {"", "file"}


def everything(where: Place) -> dict[str, Callable[[], object]]:
    """A call of each kind."""
    return {
        "read": lambda: where.read("there"),
        "write": lambda: where.write("mine", b"mine"),
        "create": lambda: where.create("mine", b"mine"),
        "names": lambda: where.names(),
        "remove": lambda: where.remove("there"),
        "remove folder": lambda: where.remove("folder/"),
        "lease": lambda: where.lease(LEASE).__enter__(),
    }


def test_a_bucket_that_is_none_is_one_line(s3: S3Server) -> None:
    where = open_place("s3://no-such-bucket/shards", "shards")
    for call in everything(where).values():
        line = refused(call)
        assert line.startswith("shards: 's3://no-such-bucket/shards': ") and "NoSuchBucket" in line


def test_who_is_not_let_in_is_told_so_in_one_line(on_s3: S3Place, s3: S3Server) -> None:
    on_s3.write("there", b"whole")
    calls = everything(on_s3) | {"size": lambda: on_s3.size("there"), "parquet": lambda: on_s3.parquet_source("there")}

    def check_keys(first_requests_unchecked: str) -> None:
        address = f"{s3.endpoint}/moto-api/reset-auth"
        text = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(address, first_requests_unchecked.encode(), text)).close()

    check_keys("0")
    try:
        lines = {name: refused(call) for name, call in calls.items()}
    finally:
        check_keys("inf")
    assert all(line.startswith(f"--out: '{on_s3}': S3 refuses ") for line in lines.values())
    assert "InvalidAccessKeyId" in lines["read"] and "InvalidAccessKeyId" in lines["write"]
    assert s3.objects("shards", on_s3.prefix) == {"there": b"whole"}


def test_a_bucket_that_may_be_read_only_keeps_its_files(on_s3: S3Place, s3: S3Server) -> None:
    on_s3.write("there", b"whole")
    rule = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": "arn:aws:s3:::shards/*"}
    s3.client.put_bucket_policy(Bucket="shards", Policy=json.dumps({"Version": "2012-10-17", "Statement": [rule]}))
    try:
        line = refused(lambda: on_s3.write("there", b"another"))
    finally:
        s3.client.delete_bucket_policy(Bucket="shards")
    assert line.startswith(f"--out: '{on_s3}': S3 refuses put_object (403)")
    assert on_s3.read("there") == b"whole"


def test_without_credentials_the_line_says_so(on_s3: S3Place, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    before = len(s3.requests())
    for call in everything(on_s3).values():
        assert "credentials" in refused(call)
    assert len(s3.requests()) == before


def test_a_malformed_endpoint_is_one_line(on_s3: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    for call in everything(on_s3).values():
        assert "localhost" in refused(call)


@pytest.mark.slow
def test_a_store_that_stays_away_is_one_line_in_the_end(on_s3: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    away = S3Place(on_s3.uri, settings=S3Settings(outage_seconds=0.1))
    line = refused(lambda: away.read("there"))
    assert line.startswith(f"--out: '{on_s3}': cannot be reached (Could not connect")


def test_an_answer_that_breaks_off_is_asked_for_again(on_s3: S3Place, s3: S3Server) -> None:
    data = np.random.default_rng(0).bytes(200_000)
    on_s3.write("cut-2-times", data)
    assert on_s3.read("cut-2-times") == data
    on_s3.write("again-cut-1-times", data)
    assert on_s3.read("again-cut-1-times", 50_000, 100_000) == data[50_000:150_000]
    broken = [path for _, path, _, _, fault in s3.requests() if fault == "cut" and on_s3.prefix in path]
    assert len(broken) == 3


def test_who_made_a_file_knows_it_also_where_the_answer_got_lost(on_s3: S3Place) -> None:
    assert on_s3.create("lost-1-times", b"mine") is True
    assert on_s3.create("lost-1-times", b"another's") is False
    assert on_s3.read("lost-1-times") == b"mine"
    with on_s3.lease("lease-lost-1-times"):
        with pytest.raises(LeaseHeld), on_s3.lease("lease-lost-1-times"):
            raise AssertionError("two holders")
    assert on_s3.names("lost") == {"lost-1-times": 4}


@pytest.mark.slow
def test_a_write_outlasts_more_errors_than_the_sdk_does(on_s3: S3Place, s3: S3Server) -> None:
    on_s3.write("refused-5-times", b"whole")
    assert on_s3.read("refused-5-times") == b"whole"
    put = ["PUT", f"/shards/{on_s3.prefix}refused-5-times"]
    asked = [status for method, path, status, *_ in s3.requests() if [method, path] == put]
    assert asked == ["500"] * 5 + ["200"]


# a directory


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("way", ["write", "create"])
def test_a_full_disk_is_one_line_and_the_old_file_stays_whole(small_disk: Path, way: str) -> None:
    where = open_place(small_disk / "shards")
    where.write("train-00000.parquet", b"old" * 100_000)
    larger = b"new" * 500_000
    put = {"write": lambda data: where.write("train-00000.parquet", data), "create": lambda d: where.create("new", d)}
    line = refused(lambda: put[way](larger))
    assert line.startswith(f"--out: '{small_disk}/shards': cannot be used (No space left on device); ")
    assert where.names() == {"train-00000.parquet": 300_000}
    assert where.read("train-00000.parquet") == b"old" * 100_000
    put[way](b"what fits")  # what did not fit takes no room


FILE_SIZE_LIMIT = """
import resource, signal, sys
from scaling_ray.errors import BadInput
from scaling_ray.storage import open_place
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    open_place(sys.argv[1]).write("manifest.json", b"n" * 200_000)
except BadInput as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_file_that_grows_too_large_is_one_line_and_the_old_one_stays_whole(tmp_path: Path) -> None:
    where = open_place(tmp_path)
    where.write("manifest.json", b"old")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", FILE_SIZE_LIMIT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith(f"--out: '{tmp_path}': cannot be used (File too large)")
    assert done.stdout.count("\n") == 1
    assert where.names() == {"manifest.json": 3} and where.read("manifest.json") == b"old"


def test_a_read_only_disk_is_one_line(small_disk: Path) -> None:
    where = open_place(small_disk / "shards", "shards")
    where.write("there", b"whole")
    where.write("folder/inside", b"whole")
    where.write("building/plan.json", b"whole")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    calls = everything(where)
    for name in ("write", "create", "remove", "remove folder", "lease"):
        assert "shards': cannot be used (Read-only file system); " in refused(calls[name]), name
    assert where.names() == {"building/plan.json": 5, "folder/inside": 5, "there": 5}
    assert where.read("there") == b"whole"


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    where = open_place(tmp_path / "file" / "shards")
    for name in ("write", "create", "lease"):
        line = refused(everything(where)[name])
        assert line.startswith(f"--out: '{tmp_path}/file/shards': cannot be used (Not a directory); ")
    assert where.names() == {} and where.size("there") is None
    assert (tmp_path / "file").read_text() == "mine"


NOBODY = """
import os, sys
from scaling_ray.errors import BadInput
from scaling_ray.storage import open_place
os.setgid(65534)
os.setuid(65534)
where = open_place(sys.argv[1], "shards")
calls = {
    "read": lambda: where.read("there"),
    "size": lambda: where.size("there"),
    "names": lambda: where.names(),
    "write": lambda: where.write("mine", b"mine"),
    "create": lambda: where.create("mine", b"mine"),
    "remove": lambda: where.remove("there"),
    "lease": lambda: where.lease(".lease").__enter__(),
}
for name, call in calls.items():
    try:
        print(f"{name} gave {call()}")
    except BadInput as error:
        print(f"{name} {error}")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to become another user")
def test_a_folder_of_another_user_is_one_line_for_every_call() -> None:
    with tempfile.TemporaryDirectory() as folder:  # the folders above tmp_path are closed too
        os.chmod(folder, 0o755)
        where = open_place(Path(folder) / "closed")
        where.write("there", b"whole")
        os.chmod(str(where), 0o700)
        done = subprocess.run([sys.executable, "-c", NOBODY, str(where)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["read", "size", "names", "write", "create", "remove", "lease"]
        for line in lines:
            assert line.split(" ", 1)[1].startswith(f"shards: '{where}': cannot be used (Permission denied); "), line
        assert where.names() == {"there": 5}


# patience


class Flaky:
    """An action that fails with each of ``errors`` in turn and then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "the result"


def is_lost(error: Exception) -> bool:
    return isinstance(error, ConnectionError)


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)


def test_transient_errors_are_tried_again_until_they_stop() -> None:
    action, clock = Flaky(ConnectionError("1"), ConnectionResetError("2"), ConnectionError("3")), Clock()
    assert patiently(action, is_lost, 30, clock, clock.sleep) == "the result"
    assert action.calls == 4 and len(clock.waits) == 3


def test_other_errors_rise_at_once_and_as_they_are() -> None:
    wrong = ValueError("of the caller")
    for errors in ([wrong], [ConnectionError(), wrong]):
        action, clock = Flaky(*errors), Clock()
        with pytest.raises(ValueError) as caught:
            patiently(action, is_lost, 30, clock, clock.sleep)
        assert caught.value is wrong
        assert action.calls == len(errors) and len(clock.waits) == len(errors) - 1


def test_patience_ends_at_its_limit_with_the_last_error() -> None:
    errors = [ConnectionError(str(index)) for index in range(1_000)]
    action, clock = Flaky(*errors), Clock()
    with pytest.raises(ConnectionError) as caught:
        patiently(action, is_lost, 60.0, clock, clock.sleep)
    assert caught.value is errors[action.calls - 1]
    assert 40 < clock.now - 1000 < 60
    assert clock.waits[0] <= 0.2 and max(clock.waits) <= 10
    assert all(0.9 * early < late for early, late in zip(clock.waits, clock.waits[2:], strict=False) if early < 4)
    assert 8 <= action.calls <= 20  # waits double: a store that comes back is not run down


def test_the_limit_counts_from_the_first_error_not_from_the_beginning_of_a_long_action() -> None:
    clock = Clock()

    def upload() -> str:
        clock.now += 1000.0
        if not clock.waits:
            raise ConnectionError
        return "the result"

    assert patiently(upload, is_lost, 60.0, clock, clock.sleep) == "the result"


def test_no_patience_is_one_try() -> None:
    action, clock = Flaky(ConnectionError("1")), Clock()
    with pytest.raises(ConnectionError):
        patiently(action, is_lost, 0, clock, clock.sleep)
    assert action.calls == 1 and clock.waits == []
