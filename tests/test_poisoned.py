"""A sweep with one poisoned setting of each class of failure: the others complete, and the table names each."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from fake_cluster import FakeCluster  # noqa: E402

from scaling_ray.results.read import read_rows  # noqa: E402
from scaling_ray.results.sweep_files import write_sealed  # noqa: E402
from scaling_ray.runs import runs_of  # noqa: E402
from scaling_ray.spec import load_spec  # noqa: E402
from scaling_ray.storage import open_place  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.slow]

POISONED = {
    "HUGE": "out_of_memory",
    "WILD": "diverged",
    "ODD": "bug",
    "TORN": "bad_input",
    "LOST": "lost",
    "STUCK": "stuck",
}
SOUND = ["ONE", "OTHER", "GROUP"]


def write_spec(path: Path) -> Path:
    text = 'name = "poisoned"\n[data]\ngenes = 64\n[grid]\ngenes = [64]\ncells = ["all"]\nseeds = [1]\n'
    text += f"sizes = {[*POISONED, *SOUND]}\n"
    for name in (*POISONED, *SOUND):
        width = 4 << 20 if name == "HUGE" else 8
        text += f"[sizes.{name}]\nwidth = {width}\nlayers = 1\nheads = 2\nfeedforward = 1\n"
    text += "[train]\nmax_cells_seen = { default = 8000, LOST = 800000, STUCK = 800000 }\ncells_per_step = 8\n"
    text += "micro_batch = 4\npatience_evaluations = 0\ncheckpoint_seconds = 1.0\n"
    text += '[lr]\nrule = "fixed"\nrates = [0.01]\nper_size = { WILD = [1e6] }\n'
    text += "[resources]\nstack = 1\nworkers = { GROUP = 2 }\nmax_failures = 1\n"
    path.write_text(text)
    return path


class Strikes(threading.Thread):
    """Does something to the process of a run whenever it trains, a few times."""

    def __init__(self, cluster: FakeCluster, run: Path, number: signal.Signals) -> None:
        super().__init__(daemon=True)
        self._cluster, self._run, self._number, self.over = cluster, run, number, threading.Event()
        self.struck: set[int] = set()

    def run(self) -> None:
        while not self.over.wait(0.5):
            for process in self._cluster.workers("ImplicitFunc"):
                if process.pid not in self.struck and self._trains(process):
                    time.sleep(2.0)
                    self.struck.add(process.pid)
                    process.send_signal(self._number)

    def _trains(self, process: psutil.Process) -> bool:
        try:
            return any(str(self._run) in file.path for file in process.open_files())
        except psutil.Error:
            return False


def test_one_poisoned_setting_of_each_class_leaves_the_others_alone(tiny_shards: Path, tmp_path: Path) -> None:
    spec, out, said = write_spec(tmp_path / "spec.toml"), tmp_path / "out", tmp_path / "said"
    names = {run.size: run.run_id for run in runs_of(load_spec(spec))}
    folder = {size: out / "runs" / name for size, name in names.items()}
    for size in ("ODD", "TORN"):
        folder[size].mkdir(parents=True)
    write_sealed(open_place(folder["ODD"]), "memory.json", {"half": 1})  # nothing of ours writes this, or foresees it
    (folder["TORN"] / "memory.json").write_text('{"micro_batch": 2')
    with FakeCluster(3) as cluster:
        strikes = [
            Strikes(cluster, folder["LOST"], signal.SIGKILL),
            Strikes(cluster, folder["STUCK"], signal.SIGSTOP),
        ]
        for one in strikes:
            one.start()
        sweep = cluster.sweep(spec, tiny_shards, out, said=said)
        code = sweep.wait(900)
        for one in strikes:
            one.over.set()
            one.join()
    words = said.read_text()
    rows = {row.size: row for row in read_rows(open_place(out))}
    assert {size: rows[size].failure for size in POISONED} == POISONED, words
    assert {rows[size].status for size in POISONED} == {"failed"}
    assert {rows[size].status for size in SOUND} == {"done"}
    assert code == 1 and "6 of 9 runs have no result" in words.splitlines()[-1]
    assert "Traceback" not in words
    assert [len(one.struck) for one in strikes] == [2, 3]


def test_a_node_short_of_memory_is_said_and_the_same_command_goes_on_on_a_larger_one(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """Ray kills a process of a node whose memory is used beyond its threshold: here at once, and again and again."""
    spec, out, said = tmp_path / "spec.toml", tmp_path / "out", tmp_path / "said"
    write_spec(spec)
    text = spec.read_text().replace(f"sizes = {[*POISONED, *SOUND]}", 'sizes = ["LOST"]')
    spec.write_text(text.replace("default = 8000, LOST = 800000", "default = 8000, LOST = 60000"))
    used = psutil.virtual_memory().percent / 100
    limits = {"RAY_memory_usage_threshold": f"{max(0.01, used - 0.01):.4f}", "RAY_memory_monitor_refresh_ms": "3000"}
    with FakeCluster(1, more=limits) as cluster:
        code = cluster.sweep(spec, tiny_shards, out, said=said).wait(600)
    words = said.read_text()
    (row,) = read_rows(open_place(out))
    assert (code, row.status, row.failure) == (75, "failed", "out_of_memory"), words
    assert "host memory (its node ran short of memory, and Ray killed it)" in words
    assert "call again to go on" in words.splitlines()[-1] and "Traceback" not in words
    with FakeCluster(1) as cluster:
        assert cluster.sweep(spec, tiny_shards, out, said=said).wait(600) == 0, said.read_text()
    assert {row.status for row in read_rows(open_place(out))} == {"done"}
