"""One driver at a time, fences that stop those who lost their lease, and commits that happen once.

Holders run in processes of their own, so that they can be killed and paused.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import PROXY, S3Server, free_port, serving

from scaling_ray.errors import BadInput, LeaseHeld
from scaling_ray.storage import LocalPlace, Place, S3Place, S3Settings, fenced, follow_lease, open_place

LEASE = "building/.lease"
SECONDS = 3.0
"""Of a short lease; S3 tells times in whole seconds."""

TALK = """
import base64, json, pickle, sys
from scaling_ray.errors import LeaseHeld
from scaling_ray.storage import fenced

def answers(state):
    # Run each line of the test, one answer to each: what it gives, or the error's name.
    for line in sys.stdin:
        try:
            answer = eval(line, state)
        except Exception as error:
            answer = type(error).__name__ + ": " + str(error)
        print(json.dumps(answer if isinstance(answer, (str, bool, int, type(None))) else "done"), flush=True)

place = pickle.loads(base64.b64decode(sys.argv[1]))
"""

HOLD = (
    TALK
    + """
with place.lease(sys.argv[2]) as lease:
    print(json.dumps(lease.token), flush=True)
    answers({"place": fenced(place, lease), "lease": lease, "claims": {}})
"""
)

WANT = (
    TALK
    + """
from contextlib import ExitStack
print(json.dumps("ready"), flush=True)
with ExitStack() as held:
    answers({"place": place, "held": held, "fenced": fenced})
"""
)


@dataclass
class Talker:
    """A process that runs the lines it is sent."""

    process: subprocess.Popen[str]
    greeting: str

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, line: str) -> Any:
        self.send(line)
        return self.answer()

    def kill(self) -> None:
        """End it at once; nobody has waited for it yet."""
        self.process.send_signal(signal.SIGKILL)


@contextmanager
def talking(program: str, place: Place, *arguments: str, before: tuple[str, ...] = ()) -> Iterator[Talker]:
    """A process that runs ``program`` on ``place``, until the block ends."""
    carried = base64.b64encode(pickle.dumps(place)).decode()
    process = subprocess.Popen(
        [*before, sys.executable, "-c", program, carried, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    talker = Talker(process, "")
    try:
        talker.greeting = talker.answer()
        yield talker
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.fixture
def brief(on_s3: S3Place) -> S3Place:
    """A place on S3 whose leases are short."""
    return S3Place(on_s3.uri, settings=S3Settings(lease_seconds=SECONDS))


def body_of(s3: S3Server, place: S3Place, name: str = LEASE) -> bytes:
    """What the store holds for the lease."""
    return s3.objects("shards", place.prefix)[name]


# who holds it


def test_a_second_holder_is_told_so_and_a_released_lease_is_free(where: Place) -> None:
    with where.lease(LEASE) as held:
        held.check()
        with pytest.raises(LeaseHeld, match="another driver works here") as caught, where.lease(LEASE):
            raise AssertionError("two holders")
        assert caught.value.exit_code == 5
        assert str(where) in str(caught.value) and "\n" not in str(caught.value)
        assert f"process {os.getpid()} on " in str(caught.value)
        with where.below("other").lease(LEASE) as other:
            assert other.token != held.token
    with where.lease(LEASE) as again:
        assert again.token != held.token
    with pytest.raises(RuntimeError, match="of the work"), where.lease(LEASE):
        raise RuntimeError("of the work itself")
    with where.lease(LEASE):
        pass


def test_of_eight_processes_at_once_one_holds_the_lease_and_one_commits(where: Place) -> None:
    with ExitStack() as stack:
        eight = [stack.enter_context(talking(WANT, where)) for _ in range(8)]
        for turn in range(2):
            for taker in eight:
                taker.send(f"held.enter_context(place.lease({LEASE!r})).token")
            said = [taker.answer() for taker in eight]
            assert sum(answer.startswith("LeaseHeld: ") for answer in said) == 7
            winner = next(taker for taker, answer in zip(eight, said, strict=True) if len(answer) == 32)
            winner.ask("held.close()")
            for number, writer in enumerate(eight):
                data = f"{number} ".encode() * 1000
                writer.send(f"place.commit('result-{turn}', place.claim('result-{turn}', '{number}'), {data!r})")
            committed = [writer.answer() for writer in eight]
            assert sorted(committed) == [False] * 7 + [True]
            assert where.committed(f"result-{turn}") == f"{committed.index(True)} ".encode() * 1000


def test_after_a_kill_the_lease_is_taken_over_at_once_on_the_same_machine(where: Place) -> None:
    waited: list[str] = []
    with talking(HOLD, where, LEASE) as holder:
        assert len(holder.greeting) == 32
        with pytest.raises(LeaseHeld), where.lease(LEASE, waited.append):
            raise AssertionError("two holders")
        holder.kill()
        os.waitid(os.P_PID, holder.process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has waited for it
        with where.lease(LEASE, waited.append) as held:
            assert held.token != holder.greeting
    assert waited == []


def test_a_process_with_the_number_of_the_dead_holder_is_not_the_holder(on_s3: S3Place, s3: S3Server) -> None:
    with talking(HOLD, on_s3, LEASE) as holder:
        body = json.loads(body_of(s3, on_s3))
        holder.kill()
        holder.process.wait()
    assert body["pid"] == holder.process.pid
    recycled = json.dumps(body | {"pid": os.getpid()}).encode()
    s3.client.put_object(Bucket="shards", Key=on_s3.prefix + LEASE, Body=recycled)
    waited: list[str] = []
    with on_s3.lease(LEASE, waited.append):
        pass
    assert waited == []


def test_a_dead_process_elsewhere_is_not_judged_from_here(brief: S3Place, s3: S3Server) -> None:
    with talking(HOLD, brief, LEASE) as holder:
        body = json.loads(body_of(s3, brief))
        holder.kill()
        holder.process.wait()
    changes = [{"host": "another"}, {"boot": "another"}, {"pid_namespace": "another"}, {"boot": ""}, {"started": ""}]
    waited: dict[str, list[str]] = {f"{number}/.lease": [] for number in range(len(changes))}

    def take(name: str) -> None:
        with brief.lease(name, waited[name].append):
            pass

    for name, change in zip(waited, changes, strict=True):
        s3.client.put_object(Bucket="shards", Key=brief.prefix + name, Body=json.dumps(body | change).encode())
    takers = [threading.Thread(target=take, args=(name,)) for name in waited]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    assert all(len(lines) == 1 and "waiting up to 3 s" in lines[0] for lines in waited.values())
    assert {name: b"null" in s3.objects("shards", brief.prefix)[name] for name in waited} == dict.fromkeys(waited, True)


def test_a_holder_elsewhere_that_lives_is_seen_by_its_renewals(on_s3: S3Place, s3: S3Server) -> None:
    done = threading.Event()

    def renew() -> None:
        count = 0
        while not done.wait(SECONDS / 6):
            count += 1
            s3.client.put_object(Bucket="shards", Key=on_s3.prefix + LEASE, Body=f"a holder elsewhere {count}".encode())

    s3.client.put_object(Bucket="shards", Key=on_s3.prefix + LEASE, Body=b"a holder elsewhere")
    elsewhere = threading.Thread(target=renew)
    elsewhere.start()
    try:
        waited: list[str] = []
        with pytest.raises(LeaseHeld), on_s3.lease(LEASE, waited.append):
            raise AssertionError("taken from a holder that lives")
        assert len(waited) == 1
    finally:
        done.set()
        elsewhere.join()


def test_an_abandoned_lease_is_taken_over_by_one_and_not_before_its_time(brief: S3Place, s3: S3Server) -> None:
    s3.client.put_object(Bucket="shards", Key=brief.prefix + LEASE, Body=b"a holder that was killed elsewhere")
    abandoned = time.monotonic()
    with ExitStack() as stack:
        takers = [stack.enter_context(talking(WANT, brief)) for _ in range(2)]
        for taker in takers:
            taker.send(f"held.enter_context(place.lease({LEASE!r})).token")
        said = sorted((taker.answer() for taker in takers), key=len)
        assert time.monotonic() - abandoned >= SECONDS
        assert len(said[0]) == 32 and said[1].startswith("LeaseHeld: ")
        with pytest.raises(LeaseHeld), brief.lease(LEASE):
            raise AssertionError("two holders")


def test_a_holder_keeps_its_lease_past_its_seconds(brief: S3Place, s3: S3Server) -> None:
    with talking(HOLD, brief, LEASE) as holder:
        bodies = set()
        until = time.monotonic() + 1.5 * SECONDS
        while time.monotonic() < until:
            bodies.add(body_of(s3, brief))
            time.sleep(0.1)
        assert len(bodies) > 3
        assert holder.ask("place.write('mine', b'mine')") is None
        with pytest.raises(LeaseHeld), brief.lease(LEASE):
            raise AssertionError("two holders")


@pytest.fixture
def other_pid_namespace() -> tuple[str, ...]:
    """A command prefix that makes a process one of another machine, as far as numbers of processes go."""
    command = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a pid namespace")
    return command


def test_a_holder_in_another_container_is_waited_for(brief: S3Place, other_pid_namespace: tuple[str, ...]) -> None:
    waited: list[str] = []
    with talking(HOLD, brief, LEASE, before=other_pid_namespace) as holder:
        with pytest.raises(LeaseHeld), brief.lease(LEASE, waited.append):
            raise AssertionError("two holders")
        assert len(waited) == 1
        holder.kill()  # of the wrapper, and with it of the holder
        holder.process.wait()
    with brief.lease(LEASE, waited.append):
        pass
    assert len(waited) == 2


# who lost it


def test_a_paused_holder_that_was_taken_over_writes_and_commits_nothing(brief: S3Place, s3: S3Server) -> None:
    with talking(HOLD, brief, LEASE) as paused:
        assert paused.ask("place.write('progress', b'of the first')") is None
        assert paused.ask("claims.setdefault('mine', place.claim('result', 'first'))") == "done"
        paused.process.send_signal(signal.SIGSTOP)
        with brief.lease(LEASE) as held:
            own = fenced(brief, held)
            assert own.claims() == ["result"]
            claim = own.claim("result", "second")
            paused.process.send_signal(signal.SIGCONT)
            said = paused.ask("place.write('progress', b'of a driver whose time is over')")
            assert said.startswith("LeaseHeld: ") and "took over" in said
            for line in ("place.create('new', b'x')", "place.remove('progress')", "place.claim('other', 'first')"):
                assert paused.ask(line).startswith("LeaseHeld: ")
            assert paused.ask("place.commit('result', claims['mine'], b'first')").startswith("LeaseHeld: ")
            # The store itself refuses what slips past the fence.
            plain = f"__import__('pickle').loads({pickle.dumps(brief)!r})"
            assert paused.ask(f"{plain}.commit('result', claims['mine'], b'first')") is False
            assert own.commit("result", claim, b"second") is True
            held.check()
        assert paused.ask("place.read('progress').decode()") == "of the first"
    assert brief.committed("result") == b"second"
    assert set(s3.objects("shards", brief.prefix)) == {LEASE, "progress", "result"}


def test_a_holder_that_was_paused_and_not_taken_over_goes_on(brief: S3Place) -> None:
    with talking(HOLD, brief, LEASE) as paused:
        paused.process.send_signal(signal.SIGSTOP)
        time.sleep(1.2 * SECONDS)
        paused.process.send_signal(signal.SIGCONT)
        assert paused.ask("place.write('progress', b'more')") is None
        assert paused.ask("lease.check()") is None


def test_who_lost_the_lease_leaves_that_of_its_successor(brief: S3Place, s3: S3Server) -> None:
    with brief.lease(LEASE) as held:
        s3.client.put_object(Bucket="shards", Key=brief.prefix + LEASE, Body=b"the successor")
        deadline = time.monotonic() + 10 * SECONDS
        with pytest.raises(LeaseHeld, match="took over"):
            while time.monotonic() < deadline:
                held.check()
                time.sleep(0.05)
        s3.client.delete_object(Bucket="shards", Key=brief.prefix + LEASE)
        with pytest.raises(LeaseHeld, match="took over"):  # for ever
            held.check()
        s3.client.put_object(Bucket="shards", Key=brief.prefix + LEASE, Body=b"the successor")
    assert body_of(s3, brief) == b"the successor"


def test_a_lease_that_was_given_back_allows_nothing(on_s3: S3Place) -> None:
    with on_s3.lease(LEASE) as held:
        own = fenced(on_s3, held)
        own.write("file", b"x")
    with pytest.raises(LeaseHeld, match="gave its lease back"):
        own.write("file", b"y")
    assert on_s3.read("file") == b"x"


@pytest.mark.parametrize("after", [0, 2])
def test_a_holder_knows_its_lease_where_answers_get_lost(brief: S3Place, s3: S3Server, after: int) -> None:
    """Of taking it, and of its renewals."""
    name = f"lease-lost-2-times-after-{after}"
    with brief.lease(name) as held:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            held.check()
            time.sleep(0.05)
        with pytest.raises(LeaseHeld), brief.lease(name):
            raise AssertionError("two holders")
    lost = [path for _, path, _, _, fault in s3.requests() if fault == "lost" and brief.prefix in path]
    assert len(lost) == 2


@contextmanager
def behind_a_proxy(place: S3Place, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Talker, Any]]:
    """A holder that reaches the store through a proxy, and a way to cut it off (False) and connect it again (True)."""
    port = free_port()
    with ExitStack() as up, ExitStack() as rest:

        def connect(wanted: bool) -> None:
            if wanted:
                up.enter_context(serving(port, PROXY, str(port), str(s3.port)))
            else:
                up.close()

        connect(True)
        with monkeypatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            holder = rest.enter_context(talking(HOLD, place, LEASE))
        yield holder, connect


@pytest.mark.slow
def test_a_store_that_is_gone_for_longer_than_a_lease_costs_time_only(
    brief: S3Place, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with behind_a_proxy(brief, s3, monkeypatch) as (holder, connect):
        connect(False)
        time.sleep(SECONDS)  # so that the lease must be renewed first
        holder.send("place.write('progress', b'written after the outage')")
        time.sleep(SECONDS)
        assert set(s3.objects("shards", brief.prefix)) == {LEASE}
        connect(True)
        assert holder.answer() is None
    assert brief.read("progress") == b"written after the outage"


@pytest.mark.slow
def test_a_holder_that_was_cut_off_and_taken_over_writes_nothing_once_it_is_back(
    brief: S3Place, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with behind_a_proxy(brief, s3, monkeypatch) as (holder, connect):
        assert holder.ask("place.write('progress', b'of the first')") is None
        connect(False)
        holder.send("place.write('progress', b'begun while it held the lease')")  # and tried again ever since
        time.sleep(SECONDS)  # a process of this machine that renewed just now is not even waited for
        with brief.lease(LEASE) as held:
            fenced(brief, held).write("progress", b"of the second")
            connect(True)
            said = holder.answer()
            assert said.startswith("LeaseHeld: ") and "took over" in said
            held.check()
    assert brief.read("progress") == b"of the second"


# those who work for the holder


@dataclass
class Switch:
    """A fence of the test's own."""

    lost: bool = False
    asked: int = 0

    def check(self) -> None:
        self.asked += 1
        if self.lost:
            raise LeaseHeld("P000", "another driver took over here")


def changes(place: Place, folder: Path) -> dict[str, Callable[[], object]]:
    """A call of each kind that changes something, and of those that only read."""
    (folder / "finished").write_bytes(b"a file")
    return {
        "write": lambda: place.write("file", b"x"),
        "create": lambda: place.create("new", b"x"),
        "put_file": lambda: place.put_file("file", folder / "finished"),
        "remove": lambda: place.remove("file"),
        "remove folder": lambda: place.remove("folder/"),
        "scratch": lambda: place.scratch("file").__enter__(),
        "log": lambda: place.log("log", "text\n"),
        "claim": lambda: place.claim("result", "me"),
        "below": lambda: place.below("deep").write("file", b"x"),
    }


def test_every_change_asks_the_fence_first_and_reading_is_free(where: Place, tmp_path: Path) -> None:
    where.write("file", b"old")
    where.write("folder/inside", b"old")
    fence = Switch()
    guarded = fenced(where, fence)
    assert type(guarded) is type(where) and str(guarded) == str(where)
    log, claim = guarded.log("log", "first\n", seconds=0.0), guarded.claim("result", "me")
    before = where.names()
    fence.lost, fence.asked = True, 0
    for name, change in changes(guarded, tmp_path).items():
        with pytest.raises(LeaseHeld):
            change()
        assert fence.asked > 0, name
        fence.asked = 0
    for late in (lambda: log.write("second\n"), lambda: guarded.commit("result", claim, b"x")):
        with pytest.raises(LeaseHeld):
            late()
    fence.asked = 0
    assert guarded.read("file") == b"old" and guarded.size("file") == 3 and guarded.exists("folder/inside")
    with guarded.local_copy("file") as path:
        assert path.read_bytes() == b"old"
    assert guarded.names() == before and guarded.claims() == where.claims()
    assert fence.asked == 0
    assert where.names() == before and (tmp_path / "finished").read_bytes() == b"a file"
    where.write("file", b"the plain place has no fence")


def test_a_fence_is_asked_again_before_each_try(on_s3: S3Place, s3: S3Server) -> None:
    """An outage may last longer than the lease: what was held when a write began need not be when it succeeds."""

    class LostMeanwhile(Switch):
        def check(self) -> None:
            super().check()
            self.lost = True

    fence = LostMeanwhile()
    with pytest.raises(LeaseHeld):
        fenced(on_s3, fence).write("refused-1-times", b"x")
    assert fence.asked == 2 and s3.objects("shards", on_s3.prefix) == {}


def test_who_follows_a_lease_stops_once_it_is_anothers(where: Place) -> None:
    with where.lease(LEASE) as first:
        follower = follow_lease(where, LEASE, first.token, every_seconds=0.0)
        rarely = follow_lease(where, LEASE, first.token, every_seconds=1e6)
        stranger = follow_lease(where, LEASE, "0" * 32, every_seconds=0.0)
        for each in (follower, rarely, follower):
            each.check()
        with pytest.raises(LeaseHeld):
            stranger.check()
    follower.check()  # given back: nobody's
    with where.lease(LEASE) as second:
        with pytest.raises(LeaseHeld, match="another driver took over"):
            follower.check()
        follow_lease(where, LEASE, second.token, every_seconds=0.0).check()
        rarely.check()
        with pytest.raises(LeaseHeld):  # a copy looks anew: clocks of two machines have nothing in common
            pickle.loads(pickle.dumps(rarely)).check()
    where.remove(LEASE)
    with pytest.raises(LeaseHeld):  # for ever
        follower.check()
    follow_lease(where, LEASE, first.token).check()


def test_a_follower_reads_the_lease_only_now_and_then(on_s3: S3Place, s3: S3Server) -> None:
    with on_s3.lease(LEASE) as held:
        follower = follow_lease(on_s3, LEASE, held.token, every_seconds=1e6)
        before = len(s3.requests())
        for _ in range(50):
            follower.check()
        asked = [path for method, path, *_ in s3.requests()[before:] if method == "GET" and path.endswith(LEASE)]
        assert len(asked) == 1


def test_a_fenced_place_travels_and_is_fenced_by_the_same_lease(where: Place) -> None:
    with where.lease(LEASE) as held:
        with talking(WANT, fenced(where, held)) as worker, talking(WANT, follow_fenced(where, held.token)) as other:
            for each in (worker, other):
                assert each.ask("place.write('mine', b'x')") is None
                assert each.ask("place.below('deep').create('mine', b'x')") in (True, False)
    with where.lease(LEASE), talking(WANT, follow_fenced(where, held.token)) as late:
        assert late.ask("place.write('mine', b'late')").startswith("LeaseHeld: ")
        assert late.ask("place.below('deep').remove('mine')").startswith("LeaseHeld: ")
        assert late.ask("place.read('mine').decode()") == "x"


def follow_fenced(place: Place, token: str) -> Place:
    return fenced(place, follow_lease(place, LEASE, token, every_seconds=0.0))


# one commit


def test_what_was_committed_stays(where: Place) -> None:
    assert where.committed("runs/a/result.json") is None
    claim = where.claim("runs/a/result.json", "attempt 1")
    assert where.committed("runs/a/result.json") is None
    assert where.commit("runs/a/result.json", claim, b"first") is True
    assert where.committed("runs/a/result.json") == where.read("runs/a/result.json") == b"first"
    assert where.commit("runs/a/result.json", claim, b"first") is True  # the same, said again
    assert where.commit("runs/a/result.json", claim, b"second") is False
    late = where.claim("runs/a/result.json", "attempt 2")
    assert where.commit("runs/a/result.json", late, b"third") is False
    assert where.committed("runs/a/result.json") == b"first"
    assert where.claims() == []


def test_a_later_claim_voids_every_earlier_one_on_s3(on_s3: S3Place) -> None:
    names = [f"runs/{index}/result.json" for index in range(3)]
    early = [on_s3.claim(name, "an old driver's") for name in names]
    on_s3.write("runs/0/metrics.jsonl", b"x" * 512)
    assert on_s3.commit(names[2], early[2], b"in time") is True
    assert on_s3.claims("runs/") == names[:2] == on_s3.claims()
    assert on_s3.claims("runs/1") == names[1:2]
    late = [on_s3.claim(name, "the new driver's") for name in names]
    assert [on_s3.commit(name, claim, b"early") for name, claim in zip(names, early, strict=True)] == [False] * 3
    assert [on_s3.commit(name, claim, b"late") for name, claim in zip(names, late, strict=True)] == [True, True, False]
    assert [on_s3.committed(name) for name in names] == [b"late", b"late", b"in time"]
    assert on_s3.claims() == []


def test_a_claim_travels(where: Place) -> None:
    claim = pickle.loads(pickle.dumps(where.claim("result", "é" * 1000 + '"\n')))
    assert where.commit("result", claim, b"x") is True


def test_what_a_reservation_looks_like_is_never_committed(on_s3: S3Place) -> None:
    claim = on_s3.claim("result", "me")
    with pytest.raises(ValueError, match="reservation"):
        on_s3.commit("result", claim, on_s3.read("result"))
    on_s3.remove("result")
    assert on_s3.commit("result", claim, b"x") is False
    assert on_s3.committed("result") is None


@pytest.mark.parametrize("there", [False, True])
def test_the_answer_of_a_claim_gets_lost(on_s3: S3Place, there: bool) -> None:
    """Also of one that takes the place of another's."""
    name = f"result-lost-1-times-after-{int(there)}"
    other = on_s3.claim(name, "another") if there else None
    claim = on_s3.claim(name, "me")
    assert on_s3.claims() == [name]
    if other:
        assert on_s3.commit(name, other, b"another's") is False
    assert on_s3.commit(name, claim, b"mine") is True
    assert on_s3.committed(name) == b"mine"


def test_the_answer_of_a_commit_gets_lost(on_s3: S3Place) -> None:
    claim = on_s3.claim("result-lost-1-times-after-1", "me")
    assert on_s3.commit("result-lost-1-times-after-1", claim, b"mine") is True
    assert on_s3.commit("result-lost-1-times-after-1", claim, b"another's") is False
    assert on_s3.committed("result-lost-1-times-after-1") == b"mine"


def test_a_place_that_is_gone_is_one_line_for_leases_and_claims(s3: S3Server) -> None:
    gone = open_place("s3://no-such-bucket/sweep")
    for call in (lambda: gone.lease(LEASE).__enter__(), lambda: gone.claim("result", "me")):
        with pytest.raises(BadInput, match="NoSuchBucket"):
            call()


def test_a_local_place_needs_no_reservation(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "sweep")
    place.claim("result", "me")
    assert place.names() == {} and place.claims() == []
