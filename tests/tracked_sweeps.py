"""Sweeps as their drivers leave them, real tracking servers, and a proxy that loses answers, for tests of tracking."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from scaling_ray.records import RunResult, ShardManifest, SplitEntry
from scaling_ray.report.build import build_report
from scaling_ray.results.references import reference_name
from scaling_ray.results.sweep_files import MANIFEST, METRICS, SPEC, SweepFiles, write_sealed
from scaling_ray.results.write import ResultsTable
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.spec import SweepSpec, parse_spec
from scaling_ray.sweep.plan import make_plan

BASE_MS = 1_790_000_000_000
TRAIN_CELLS = 5_000
SWEPT = """
name = "tracked"
[data]
title = "Made-up runs around a known law"
genes = 64
[grid]
sizes = ["W4", "W8", "W16", "W32"]
genes = [64]
cells = [200, "all"]
seeds = [1, 2]
[lr]
rule = "fixed"
rates = [1e-2]
"""
SWEPT += "".join(
    f"[sizes.W{width}]\nwidth = {width}\nlayers = 1\nheads = 1\nfeedforward = 1\n" for width in (4, 8, 16, 32)
)


@dataclass(frozen=True)
class Swept:
    """A sweep and what it is of."""

    files: SweepFiles
    spec: SweepSpec
    manifest: ShardManifest
    runs: list[RunSpec]

    @property
    def place(self) -> Path:
        return Path(str(self.files))


def manifest() -> ShardManifest:
    """Of shards whose training split has TRAIN_CELLS cells."""
    splits = {
        name: SplitEntry(
            cells=cells, fraction=cells / 6_000, groups=[name], donor_cells=[cells], content_sha256="0" * 64, files=[]
        )
        for name, cells in (("train", TRAIN_CELLS), ("val", 500), ("test", 500))
    }
    return ShardManifest(
        name="made-up",
        data_hash="d" * 64,
        genes=64,
        block_genes=256,
        row_group_cells=16_384,
        split_by="donor_id",
        data={},
        census={"uri": "planted"},
        planted=False,
        dropped={},
        splits=splits,
        tables=[],
        codes={},
        made_with={},
    )


def token_of(number: int, start_ms: int) -> str:
    """The name of an attempt that began then."""
    return f"{number:06d}-{start_ms * 1_000_000:020d}-{number:08x}"


def start_of(index: int) -> int:
    """When the run of an index began, in milliseconds since 1970."""
    return BASE_MS + 20_000 * index


def loss_of(run: RunSpec) -> float:
    """A law of size and cells, with a scatter that differs by seed."""
    cells = run.cells or TRAIN_CELLS
    scatter = random.Random(run.run_id).gauss(0, 0.002)
    return 0.15 + 2.4 * run.params**-0.4 + 1.5 * cells**-0.5 + scatter


def write_rows(files: SweepFiles, run: RunSpec, attempt: str, start_ms: int, rows: range) -> None:
    """Rows of an attempt: one of training each second, every second one followed by an evaluation."""
    lines = []
    for step in rows:
        common = {"optimizer_steps": step, "cells_seen": 32 * step, "timestamp_ms": start_ms + 1000 * step}
        speed = {"lr": 0.01, "grad_norm": 1.0, "cells_per_second": 32.0}
        lines.append({"kind": "train", "train_loss": loss_of(run) + 1 / step} | common | speed)
        if step % 2 == 0:
            loss = loss_of(run) + 0.5 / step
            lines.append({"kind": "eval", "val_loss": loss, "val_loss_smoothed": loss} | common)
    log = files.run(run.run_id).place.below(f"attempts/{attempt}").log(METRICS)
    log.write("".join(json.dumps(line) + "\n" for line in lines))


def result_of(run: RunSpec, index: int, attempt: str) -> RunResult:
    """A result that was committed nine seconds after the start."""
    loss = loss_of(run)
    return RunResult(
        run_id=run.run_id,
        attempt=attempt,
        attempts=1,
        data_hash="d" * 64,
        lr=run.lr or 0.01,
        cells_resolved=min(run.cells or TRAIN_CELLS, TRAIN_CELLS),
        cells_seen=256,
        masked_genes_seen=2_560,
        optimizer_steps=8,
        flops=1e9,
        loss_unit="mse",
        val_loss=loss,
        final_val_loss=loss,
        best_curve_loss=loss,
        best_cells_seen=256,
        test_loss=loss + 0.01,
        test_loss_sum=100 * (loss + 0.01),
        test_masked_genes=100,
        stop_reason="budget",
        wall_seconds=9.0,
        train_seconds=8.0,
        workers=1,
        engine="plain",
        micro_batch=32,
        precision="fp32",
        stacked=1,
        host="node-1",
        ended_ms=start_of(index) + 9_000,
    )


def finish_run(swept: Swept, index: int) -> None:
    """All that a finished run leaves."""
    run, attempt = swept.runs[index], token_of(1, start_of(index))
    swept.files.run(run.run_id).prepare(run)
    write_rows(swept.files, run, attempt, start_of(index), range(1, 9))
    place = swept.files.run(run.run_id).place
    place.below(f"attempts/{attempt}").copy("metrics.jsonl", place, "metrics.jsonl")
    place.remove("attempts/")
    place.write("result.json", result_of(run, index, attempt).to_json().encode())


def begin_sweep(directory: Path, seeds: int = 2) -> Swept:
    """A sweep of eight settings, of which no run has begun."""
    text = SWEPT.replace("seeds = [1, 2]", f"seeds = {list(range(1, seeds + 1))}")
    spec = parse_spec(text)
    swept = Swept(SweepFiles.at(directory), spec, manifest(), runs_of(spec, "cpu"))
    place = swept.files.place
    place.write(SPEC, text.encode())
    place.write(MANIFEST, swept.manifest.to_json().encode())
    swept.files.write_plan(make_plan(spec, "cpu")[0])
    closed = dict.fromkeys(("test_gene_mean_loss", "val_gene_mean_loss"), 0.9) | {"test_gaussian_loss": 0.6}
    for run in swept.runs:
        name = f"{reference_name(run, TRAIN_CELLS)}.json"
        write_sealed(swept.files.references, name, closed | {"test_gene_mean_per_gene_bits": 1.9})
    return swept


def finished_sweep(directory: Path) -> Swept:
    """A sweep whose runs are all done, and its report beside it."""
    swept = begin_sweep(directory / "sweep")
    for index in range(len(swept.runs)):
        finish_run(swept, index)
    ResultsTable(swept.files, swept.runs, TRAIN_CELLS).write()
    build_report(directory / "sweep", directory / "report")
    return swept


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int, backend: str | None = None, path: str | None = None) -> Iterator[str]:
    """A real ``mlflow server`` on this machine's loopback; its address. It ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = backend or f"sqlite:///{folder / 'server.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend, "--artifacts-destination", str(folder / "artifacts")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    if path is not None:
        environment["PYTHONPATH"] = path
    with open(folder / "server.log", "ab") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_until(lambda: _is_healthy(port), server, folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if ready():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.5)
    raise AssertionError(log.read_text())


class Faults:
    """What a proxy does to the answers of the server behind it; changed while it runs."""

    def __init__(self) -> None:
        self.lost_share, self.delay_seconds = 0.0, 0.0
        self.lost = 0
        self._chance = random.Random(17)

    def loses(self) -> bool:
        lost = self._chance.random() < self.lost_share
        self.lost += lost
        return lost


@contextlib.contextmanager
def proxy_to(port: int, faults: Faults) -> Iterator[str]:
    """A proxy before the server at a port of this machine; its address.

    An answer that is lost was given: the server has done what it was asked, and the connection breaks.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = (
                self.rfile.read(int(self.headers["Content-Length"] or 0)) if "Content-Length" in self.headers else b""
            )
            own = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
            behind = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            try:
                behind.request(self.command, self.path, body, own)
                answer = behind.getresponse()
                data = answer.read()
            except OSError:
                self.close_connection = True
                return
            finally:
                behind.close()
            time.sleep(faults.delay_seconds)
            if faults.loses():
                self.close_connection = True
                return
            with contextlib.suppress(OSError):  # the caller may have given up
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

        def log_message(self, *_: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) if Path("/usr/lib/postgresql").is_dir() else []


def why_no_postgres() -> str | None:
    """Why no PostgreSQL can be started here, None where one can."""
    if not POSTGRES:
        return "PostgreSQL's server programs (Debian's package postgresql) are not installed"
    if os.getuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "PostgreSQL refuses to run as root, and there is no user postgres"
        if shutil.which("setpriv") is None:
            return "setpriv is not installed"
    try:
        import psycopg2  # noqa: F401
    except ImportError:
        return "psycopg2 is not installed; pip install 'scaling-ray[dev]'"
    return None


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """A PostgreSQL of its own on a private port and in a private folder; its URI. It ends with the block."""
    programs, port = POSTGRES[-1].parent, free_port()
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    # A folder that the user postgres can reach: pytest's own are closed to others.
    folder = Path(subprocess.check_output([*as_user, "mktemp", "-d", "/tmp/pg-XXXXXX"], text=True).strip())
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    try:
        data = str(folder / "data")
        _quietly([*as_user, str(programs / "initdb"), "-D", data, "-U", "postgres", "-A", "trust"])
        control = [*as_user, str(programs / "pg_ctl"), "-D", data, "-w", "-t", "120"]
        _quietly([*control, "-o", options, "-l", str(folder / "log"), "start"])
        try:
            yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}/postgres"
        finally:
            _quietly([*control, "-m", "immediate", "stop"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _quietly(command: list[str]) -> None:
    """Run a command that must work; pg_ctl's server keeps what it is given open, so that is nothing."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
