"""What people see: plain lines in a pipe, tables and bars on a terminal, the time that a long step still takes."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import REPOSITORY
from test_status import Sweep

from scaling_ray import pace
from scaling_ray.console import plain, table
from scaling_ray.pace import Pace, Step, span

ESCAPE = "\x1b"


def on_terminal(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> str:
    """What a command writes where its output and errors are a terminal of 100 columns."""
    master, slave = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        env.pop(name, None)
    running = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env={**env, **(environment or {})}
    )
    os.close(slave)
    written = b""
    while True:
        try:
            chunk = os.read(master, 65_536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(master)
    assert running.wait(timeout=60) == 0, written.decode()
    return written.decode()


def piped(command: list[str], cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm-256color"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


STEP = """
import time
from scaling_ray.cli.lines import say
from scaling_ray.pace import Pace
say("before [data]")
pace = Pace("read", 100, say, every_seconds=0.0)
for _ in range(5):
    time.sleep(0.15)
    pace.add(20)
say("after")
"""


def test_a_step_is_a_bar_on_a_terminal_and_lines_in_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STEP]
    lines = piped(command, tmp_path).splitlines()
    assert [line.split(" ", 1)[1] for line in lines][0::6] == ["before [data]", "after"]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d .*", line) for line in lines) and ESCAPE not in "".join(lines)
    assert re.search(r"read 20 of 100 cells, \d+ cells/s, \d+ s left$", lines[1])
    assert re.search(r"read 100 of 100 cells, \d+ cells/s$", lines[5])
    shown = on_terminal(command, tmp_path)
    assert ESCAPE in shown and "━" in shown and "80/100" in shown and "left" in shown
    assert "before [data]" in shown and shown.rstrip().endswith("after")
    assert "read 20 of 100" not in shown and "read 100 of 100 cells" in shown


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["plan", "demo"], ["doctor"], ["init", "--list"], ["explain", "S035"]]
)
def test_a_pipe_gets_no_escape_codes(arguments: list[str], tmp_path: Path) -> None:
    assert ESCAPE not in piped([sys.executable, "-m", "scaling_ray.cli", *arguments], tmp_path)


def test_status_is_coloured_on_a_terminal_alone(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    for run in sweep.runs[:-1]:
        sweep.finish(run, 5, 10)
    sweep.files.run(sweep.runs[-1].run_id).record_failure(sweep.runs[-1], "diverged", "Diverged: loss is NaN")
    command = [sys.executable, "-m", "scaling_ray.cli", "status", str(tmp_path)]
    lines = [line.rstrip() for line in piped(command, tmp_path).splitlines()]
    shown = on_terminal(command, tmp_path)
    assert f"{ESCAPE}[32m" in shown and f"{ESCAPE}[31m" in shown
    bare = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert [line.split() for line in bare.splitlines()][:4] == [line.split() for line in lines][:4]
    watched = on_terminal([*command, "--watch", "0.1"], tmp_path)
    assert "done/total" in watched


def test_help_is_coloured_on_a_terminal(tmp_path: Path) -> None:
    shown = on_terminal([sys.executable, "-m", "scaling_ray.cli", "plan", "--help"], tmp_path)
    assert f"{ESCAPE}[" in shown
    bare = on_terminal([sys.executable, "-m", "scaling_ray.cli", "plan", "--help"], tmp_path, {"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[3\d", bare)


def test_a_table_is_as_wide_as_its_words_and_takes_them_literally() -> None:
    long = "x" * 300
    lines = plain(table(["name", "n"], [["a [bold]b[/bold] :smile:", "1"], [long, "1,000"]], right=[1]))
    assert lines[0] == f"{'name':300}      n"
    assert lines[1] == f"{'a [bold]b[/bold] :smile:':300}      1"
    assert lines[2] == f"{long}  1,000"
    assert plain(table((), [["ok", "fine"], ["LACKS", "gone"]])) == ["ok     fine", "LACKS  gone"]


def test_the_rate_leaves_out_what_an_earlier_call_did(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told: list[str] = []
    counted = Pace("read", 1_000_000, told.append, before=400_000)
    now[0] += 4.0
    counted.add(100_000)
    assert told == [], "too early to tell"
    now[0] += 6.0
    counted.add(100_000)
    assert told == ["read 600,000 of 1,000,000 cells, 20,000 cells/s, 20 s left"]
    counted.add(400_000)
    assert isinstance(told[-1], Step) and told[-1].done == told[-1].total == 1_000_000
    assert told[-1].startswith("read 1,000,000 of 1,000,000 cells") and "left" not in told[-1]
    assert pace.EVERY_SECONDS == 5.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(45, "45 s"), (720, "12 min"), (11_100, "3 h 05 min"), (183_600, "2 d 03 h")]
)
def test_a_time_is_said_in_two_units_at_most(seconds: float, words: str) -> None:
    assert span(seconds) == words
