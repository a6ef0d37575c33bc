"""The cluster path on one machine: a real head in token mode, a real ``ray job submit``, results on disk."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import S3Server

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
START_SECONDS = 90
JOB_SECONDS = 420

TINY_SPEC = """
name = "tiny"

[data]
split_by = "cell"
genes = 64

[grid]
sizes = ["XXS", "TINY"]
genes = [64]
cells = [200]
seeds = [0]

[lr]
rates = [1e-3]

[train]
max_cells_seen = 640
evaluations = 4

[resources]
cpus = 1
"""

LONG_SPEC = TINY_SPEC.replace('"XXS", ', "").replace(
    "max_cells_seen = 640\nevaluations = 4", "max_cells_seen = 160_000\nevaluations = 50\npatience_evaluations = 0"
)
"""Long enough to be stopped on the way, on any machine."""

STOP_SECONDS = 60
"""RAY_JOB_STOP_WAIT_TIME_S of the head, as in cluster.yaml."""


def on_a_head(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(pytest.mark.ray(test))


@dataclass(frozen=True)
class Head:
    """A running head: its jobs API, the environment that holds the token, and the pid everything hangs on."""

    url: str
    env: dict[str, str] = field(repr=False)
    token: str = field(repr=False)
    pid: int
    log: Path

    def status_of(self, path: str, token: str | None) -> int:
        """HTTP status of a GET on the jobs API; 0 while nothing answers."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return 0

    def job(self, verb: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """``ray job <verb> ...`` from the repository root."""
        return subprocess.run(
            [str(BIN / "ray"), "job", verb, "--address", self.url, *arguments],
            cwd=REPOSITORY,
            env=self.env if env is None else env,
            capture_output=True,
            text=True,
            timeout=JOB_SECONDS,
            check=False,
        )

    def submit(
        self, *entry_point: str, env: dict[str, str] | None = None, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """``ray job submit --working-dir . -- <entry point>``, waiting for the job's end."""
        return self.job("submit", "--working-dir", ".", *options, "--", *entry_point, env=env)

    def jobs(self) -> list[dict[str, object]]:
        """Every job the head knows, oldest first."""
        request = urllib.request.Request(self.url + "/api/jobs/", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            submitted = [job for job in json.load(answer) if job["type"] == "SUBMISSION"]
        return sorted(submitted, key=lambda job: job["start_time"])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def stop(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """SIGTERM to a node, then SIGKILL to whatever of its own descendants is left; returns what had to be killed."""
    descendants = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=10)
    _, alive = psutil.wait_procs(descendants, timeout=10)
    for straggler in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            straggler.kill()
    psutil.wait_procs(alive, timeout=10)
    return alive


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("head")
    token = secrets.token_hex(32)
    token_path = home / "auth_token"
    token_path.touch(mode=0o600)
    token_path.write_text(token)
    # A unix socket's path may have 107 bytes, and pytest's own folders eat most of them. Each node has a folder and an
    # address of its own, as two machines do: a node puts a job's package into its folder in place of what is there.
    temp_dirs = [Path(tempfile.mkdtemp(prefix="sr", dir="/tmp")) for _ in range(2)]
    port, dashboard, client = free_ports(3)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCALING_RAY_", "AWS_"))}
    env |= s3_server.environment() | {
        # `python` of an entry point is the one on the head's PATH.
        "PATH": f"{BIN}:{env['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    # As cluster.yaml's head: it drives and computes nothing. All CPUs are a worker node's.
    as_head = ["--head", "--node-ip-address=127.0.0.1", f"--temp-dir={temp_dirs[0]}", "--num-cpus=0"]
    as_head += ['--resources={"trial_driver": 64}', f"--port={port}"]
    as_head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    as_worker = [f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.2", f"--temp-dir={temp_dirs[1]}"]
    with contextlib.ExitStack() as nodes:
        for temp_dir in temp_dirs:
            nodes.callback(shutil.rmtree, temp_dir, ignore_errors=True)
        log = home / "head.log"
        process = nodes.enter_context(node(log, env, as_head))
        started = Head(f"http://127.0.0.1:{dashboard}", env, token, process.pid, log)
        deadline = time.monotonic() + START_SECONDS
        while started.status_of("/api/jobs/", token) != 200:
            assert process.poll() is None, f"the head ended at once:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"no jobs API after {START_SECONDS} s:\n{log.read_text()}"
            time.sleep(0.5)
        nodes.enter_context(node(home / "worker.log", env, [*as_worker, "--num-cpus=2"]))
        yield started


@contextlib.contextmanager
def node(log: Path, env: dict[str, str], options: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """``ray start`` with these options, on ports that are free, until the block ends."""
    agent_http, agent_grpc, runtime_env, metrics = free_ports(4)
    command = [str(BIN / "ray"), "start", "--block", *options]
    command += [f"--dashboard-agent-listen-port={agent_http}", f"--dashboard-agent-grpc-port={agent_grpc}"]
    # Any free port for workers: the default range may belong to another head, or hold one of the ports above.
    command += [f"--runtime-env-agent-port={runtime_env}", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--metrics-export-port={metrics}", f"--object-store-memory={300 * 2**20}"]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=env, stdout=stream, stderr=stream, start_new_session=True)
    try:
        yield process
    finally:
        stop(process)


@pytest.mark.parametrize(
    ("arguments", "field", "remedy"),
    [
        (["jobs/sweep.py", "jobs/demo.toml", "--out", "results"], "--out: 'results'", "absolute"),
        (["jobs/sweep.py", "jobs/demo.toml"], "--out: None", "SCALING_RAY_OUT"),
        (
            ["jobs/shards.py", "jobs/demo.toml", "--census", "stable", "--out", "./shards"],
            "--out: './shards'",
            "absolute",
        ),
        (["jobs/report.py", "/sweep", "--out", "report"], "--out: 'report'", "absolute"),
    ],
)
def test_a_place_that_would_vanish_is_refused_on_one_line(arguments: list[str], field: str, remedy: str) -> None:
    env = {key: value for key, value in os.environ.items() if key != "SCALING_RAY_OUT"} | {
        "PYTHONPATH": str(REPOSITORY)
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(field) and remedy in line
    assert not (REPOSITORY / "results").exists() and not (REPOSITORY / "s3:").exists()


def absent_spec(out: Path, script: str = "jobs/sweep.py", **env: str) -> subprocess.CompletedProcess[str]:
    """A job that a line of bad input ends, run by hand."""
    return subprocess.run(
        [sys.executable, script, "jobs/absent.toml"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "SCALING_RAY_OUT": str(out)} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def as_job(name: str) -> str:
    """What Ray tells a job's process about it."""
    return json.dumps({"runtime_env": {}, "metadata": {"job_submission_id": name, "job_name": name}})


def test_a_job_ends_as_its_verb_does(tmp_path: Path) -> None:
    done = absent_spec(tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("scaling-ray: spec: 'jobs/absent.toml'")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_job_makes_no_folder_and_leaves_its_record_in_one_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert absent_spec(out, RAY_JOB_CONFIG_JSON_ENV_VAR=as_job("first")).returncode == 2
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    assert absent_spec(out).returncode == 2
    assert list(out.iterdir()) == []
    assert absent_spec(out, RAY_JOB_CONFIG_JSON_ENV_VAR=as_job("nightly/7")).returncode == 2
    (record,) = (out / "jobs").iterdir()
    told = json.loads(record.read_text())
    assert (record.name, told["submission_id"], told["exit_code"]) == ("nightly%2F7.json", "nightly/7", 2)
    assert told["command"] == ["run", "jobs/absent.toml", "--out", str(out)]
    assert told["began"] <= told["ended"]


def test_a_job_that_is_stopped_before_its_verb_hears_signals_ends_with_75(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes a request and never answers
        silent.settimeout(60)
        env = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "RAY_JOB_CONFIG_JSON_ENV_VAR": as_job("first"),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "for-nobody",
            "AWS_SECRET_ACCESS_KEY": "for-nobody",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        command = [sys.executable, "jobs/report.py", "s3://shards/sweep", "--out", str(out)]
        with subprocess.Popen(command, cwd=REPOSITORY, env=env, stderr=subprocess.PIPE, text=True) as job:
            connection, _ = silent.accept()
            with connection:
                job.terminate()
                _, said = job.communicate(timeout=60)
    assert job.returncode == 75
    assert said.splitlines() == ["stopped on the way: the same job goes on"]
    assert json.loads((out / "jobs" / "first.json").read_text())["exit_code"] == 75


def test_no_record_lies_among_shards_where_it_would_count_as_damage(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    out.mkdir()
    bare = {"SCALING_RAY_OUT": f"{out}/"}
    done = absent_spec(out, "jobs/shards.py", RAY_JOB_CONFIG_JSON_ENV_VAR=as_job("first"), **bare)
    assert done.returncode == 2
    assert list(out.iterdir()) == []
    assert json.loads((tmp_path / "shards.jobs" / "first.json").read_text())["exit_code"] == 2


def test_a_record_that_cannot_be_kept_is_one_line_and_changes_no_exit_code(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("in the way")
    done = absent_spec(tmp_path, RAY_JOB_CONFIG_JSON_ENV_VAR=as_job("first"))
    assert done.returncode == 2
    told, unkept = done.stderr.splitlines()
    assert told.startswith("scaling-ray: spec:") and unkept.startswith("the job's exit code 2 is not kept: --out:")


@pytest.mark.parametrize("name", ["shards", "sweep", "report"])
def test_a_job_stays_thin_and_says_what_it_takes(name: str) -> None:
    path = REPOSITORY / "jobs" / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 15
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, path, "--help"], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "--out" in done.stdout and "SCALING_RAY_OUT" in done.stdout


@on_a_head
def test_the_jobs_api_refuses_whoever_has_no_token(head: Head) -> None:
    assert head.status_of("/api/jobs/", None) == 401
    assert head.status_of("/api/jobs/", secrets.token_hex(32)) in {401, 403}
    assert head.status_of("/api/jobs/", head.token) == 200


@on_a_head
def test_a_submission_without_the_token_is_refused(head: Head) -> None:
    before = head.jobs()
    bare = {key: value for key, value in head.env.items() if not key.startswith("RAY_AUTH")}
    done = head.submit("python", "-c", "pass", env=bare | {"RAY_AUTH_MODE": "disabled"})
    assert done.returncode != 0
    assert "401" in done.stdout + done.stderr or "Unauthorized" in done.stdout + done.stderr, done.stderr
    assert head.jobs() == before


@on_a_head
def test_a_submitted_sweep_runs_to_its_report_and_is_done_the_second_time(head: Head, tmp_path: Path) -> None:
    from scaling_ray.planted.plant import plant

    spec = tmp_path / "tiny.toml"
    spec.write_text(TINY_SPEC)
    census = plant(tmp_path / "census", n_cells=600, n_genes=200)
    out = tmp_path / "out"
    entry_point = ["python", "jobs/sweep.py", str(spec), "--census", str(census), "--out", str(out)]

    done = head.submit(*entry_point)
    assert done.returncode == 0, done.stdout + done.stderr
    assert head.jobs()[-1]["status"] == "SUCCEEDED"
    with (out / "sweep" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["size"] for row in rows} == {"XXS", "TINY"}
    assert {row["status"] for row in rows} == {"done"}
    assert all(int(row["cells_seen"]) == 640 for row in rows)
    assert (out / "report" / "report.html").is_file()
    json.loads((out / "report" / "report.json").read_text())

    results = {path: path.stat().st_mtime_ns for path in out.glob("sweep/runs/*/result.json")}
    assert len(results) == len(rows)
    again = head.submit(*entry_point)
    assert again.returncode == 0, again.stdout + again.stderr
    assert results == {path: path.stat().st_mtime_ns for path in out.glob("sweep/runs/*/result.json")}
    ids = [str(job["submission_id"]) for job in head.jobs()[-2:]]
    assert records(out) == dict.fromkeys(ids, 0) and len(set(ids)) == 2


def records(out: Path) -> dict[str, int]:
    """Submission id -> exit code, by the files that jobs left in their output."""
    told = [json.loads(path.read_text()) for path in (out / "jobs").glob("*.json")]
    return {each["submission_id"]: each["exit_code"] for each in told}


@on_a_head
def test_a_stopped_job_saves_leaves_its_exit_code_and_goes_on_when_submitted_again(head: Head, tmp_path: Path) -> None:
    from scaling_ray.planted.plant import plant

    spec = tmp_path / "long.toml"
    spec.write_text(LONG_SPEC)
    census = plant(tmp_path / "census", n_cells=600, n_genes=200)
    out = tmp_path / "out"
    entry_point = ["python", "jobs/sweep.py", str(spec), "--census", str(census), "--out", str(out)]

    submitted = head.submit(*entry_point, options=("--no-wait", "--submission-id=night-1"))
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    deadline = time.monotonic() + JOB_SECONDS
    while not list(out.glob("sweep/runs/*/attempts/*/metrics.jsonl")):
        assert time.monotonic() < deadline, head.job("logs", "night-1").stdout
        assert head.jobs()[-1]["status"] in {"PENDING", "RUNNING"}, head.job("logs", "night-1").stdout
        time.sleep(0.2)
    stopped = head.job("stop", "night-1")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert head.jobs()[-1]["status"] == "STOPPED"
    assert records(out) == {"night-1": 75}
    logs = head.job("logs", "night-1").stdout
    assert "scaling-ray: " in logs and "Traceback" not in logs
    assert not list(out.glob("sweep/runs/*/result.json"))

    refused = head.submit(*entry_point, options=("--submission-id=night-1",))
    assert refused.returncode != 0 and "already exists" in refused.stdout + refused.stderr
    again = head.submit(*entry_point, options=("--submission-id=night-2",))
    assert again.returncode == 0, again.stdout + again.stderr
    assert records(out) == {"night-1": 75, "night-2": 0}
    with (out / "sweep" / "results.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert row["status"] == "done" and int(row["cells_seen"]) == 160_000


@on_a_head
def test_a_submitted_sweep_leaves_everything_on_s3(head: Head, s3_server: S3Server, tmp_path: Path) -> None:
    from scaling_ray.planted.plant import plant

    spec = tmp_path / "tiny.toml"
    spec.write_text(TINY_SPEC)
    census = plant(tmp_path / "census", n_cells=600, n_genes=200)
    done = head.submit(
        *("python", "jobs/sweep.py", str(spec), "--census", str(census), "--out", "s3://shards/job/out"),
        options=("--submission-id=on-s3",),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    objects = s3_server.objects("shards", "job/out/")
    assert {"sweep/results.parquet", "report/report.html"} <= objects.keys()
    assert json.loads(objects["jobs/on-s3.json"])["exit_code"] == 0


@on_a_head
def test_a_job_with_bad_input_fails_with_its_line_in_the_log(head: Head) -> None:
    done = head.submit("python", "jobs/sweep.py", "jobs/demo.toml", "--out", "results")
    assert done.returncode != 0
    last = head.jobs()[-1]
    assert (last["status"], last["driver_exit_code"]) == ("FAILED", 2)
    assert "--out: 'results'" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@on_a_head
def test_a_job_runs_this_environment_and_the_submitted_package(head: Head, tmp_path: Path) -> None:
    # As a script, not with -c: that would put the working directory on sys.path by itself.
    script = tmp_path / "look.py"
    script.write_text(
        "import json, pathlib, sys, scaling_ray\n"
        "ignored = [name for name in ('.venv', '.git', 'tests') if pathlib.Path(name).exists()]\n"
        "spec = pathlib.Path('jobs/demo.toml').read_text()\n"
        "seen = [sys.executable, str(pathlib.Path.cwd()), scaling_ray.__file__, ignored, spec]\n"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps(seen))\n"
    )
    seen = tmp_path / "seen.json"
    done = head.submit("python", str(script), str(seen))
    assert done.returncode == 0, done.stdout + done.stderr
    assert head.jobs()[-1]["status"] == "SUCCEEDED"
    executable, cwd, package, ignored, spec = json.loads(seen.read_text())
    assert Path(executable).parent == BIN
    assert Path(cwd) != REPOSITORY and package.startswith(cwd), "the job must use the package it was submitted with"
    assert ignored == []
    assert spec == (REPOSITORY / "jobs" / "demo.toml").read_text()
