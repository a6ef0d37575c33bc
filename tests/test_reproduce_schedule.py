"""What is in deploy/schedule: the cron line fired for real on a head with a token, and the manifests of Kubernetes."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from test_jobs_submit import BIN, REPOSITORY, Head, head, on_a_head
from test_reproduce import SPEC

from scaling_ray.reproduction.history import read_history
from scaling_ray.storage import open_place

__all__ = ["head"]

SCHEDULE = REPOSITORY / "deploy" / "schedule"


def cron_line() -> str:
    """The command of the crontab as cron hands it to the shell: five fields gone, each \\% a percent sign."""
    (line,) = [each for each in (SCHEDULE / "crontab").read_text().splitlines() if not each.startswith("#")]
    fields = line.split(maxsplit=5)
    assert "%" not in fields[5].replace("\\%", ""), "cron ends the command at a bare percent sign"
    return fields[5].replace("\\%", "%")


@pytest.fixture
def home(head: Head, tmp_path: Path) -> Path:
    """A home as docs/reproduction.md sets it up: the checkout, and what cron's environment lacks."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "scaling_ray").symlink_to(REPOSITORY)
    settings = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "SCALING_RAY_HEAD": head.url,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": head.env["RAY_AUTH_TOKEN_PATH"],
        "SCALING_RAY_SPEC": str(tmp_path / "spec.toml"),
        "SCALING_RAY_REFERENCE": str(tmp_path / "reference.json"),
        "SCALING_RAY_OUT": str(tmp_path / "out"),
        "SCALING_RAY_EVERY": "604800",
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    (home / ".scaling-ray.env").write_text("\n".join(lines) + "\n")
    return home


def fire(home: Path) -> subprocess.Popen[str]:
    """Start the line as cron does."""
    env = {"HOME": str(home), "LOGNAME": "someone", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}
    return subprocess.Popen(
        ["/bin/sh", "-c", cron_line()],
        cwd=home,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@on_a_head
def test_the_cron_line_repeats_a_sweep_and_finds_it_done_the_second_time(
    head: Head, home: Path, tiny_shards: Path, planted_census: Path, tmp_path: Path
) -> None:
    from scaling_ray.cli import main
    from scaling_ray.sweep.run import run_sweep

    (tmp_path / "spec.toml").write_text(SPEC)
    run_sweep(tmp_path / "spec.toml", tiny_shards, tmp_path / "reference")
    assert main(["reference", str(tmp_path / "reference"), "--out", str(tmp_path / "reference.json")]) == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "census").symlink_to(planted_census)

    first = fire(home)
    while not (tmp_path / "out" / "shards").exists():
        assert first.poll() is None, first.communicate()[0]
    second, _ = fire(home).communicate(timeout=60)
    assert second == "skipped: the reproduction before this one is still at work\n"
    said, _ = first.communicate(timeout=420)
    assert first.returncode == 0, said
    assert "tiny: agrees; 4 of 4 losses agree" in said
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    assert len(results) == 12

    again = fire(home)
    said, _ = again.communicate(timeout=420)
    assert again.returncode == 0 and "tiny: agrees" in said, said
    assert results == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    (entry,) = read_history(open_place(tmp_path / "out"))
    assert entry.verdict == "agrees" and entry.every_seconds == 604800
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert entry.commit == commit.stdout.strip(), "a job's package has no git, so the line says which commit it is"

    (tmp_path / "spec.toml").write_text(SPEC.replace("[train]", '[train]\nrecipe = "published"'))
    (home / ".scaling-ray.env").write_text(
        (home / ".scaling-ray.env").read_text().replace(str(tmp_path / "out"), str(tmp_path / "broken"))
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "census").symlink_to(planted_census)
    broken = fire(home)
    said, _ = broken.communicate(timeout=420)
    assert broken.returncode != 0 and "tiny: drifted; " in said
    assert head.jobs()[-1]["driver_exit_code"] == 3


def test_the_job_stays_thin_and_refuses_a_place_that_would_vanish() -> None:
    path = REPOSITORY / "jobs" / "reproduce.py"
    assert len(path.read_text().splitlines()) <= 15
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(path), "demo", "--against", "reports/demo/reference.json", "--out", "here"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.startswith("--out: 'here'")


@pytest.fixture(scope="module")
def creator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("create_rayjob", SCHEDULE / "kubernetes" / "create_rayjob.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A stand-in for the API of Kubernetes that keeps RayJobs by name and refuses a second one of a name."""
    jobs: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            good = self.path == "/apis/ray.io/v1/namespaces/scaling-ray/rayjobs" and job["kind"] == "RayJob"
            status = 403 if not good else 409 if job["metadata"]["name"] in jobs else 201
            if status == 201:
                jobs[job["metadata"]["name"]] = job
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("KUBERNETES_API", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NAMESPACE", "scaling-ray")
    try:
        yield jobs
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_tick_makes_one_rayjob_of_its_name(
    creator: ModuleType, api: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # 29,737,637 minutes after 1970 began it was 2026-07-17 03:17 UTC; Kubernetes ends the name of a Job so.
    monkeypatch.setenv("JOB_NAME", "scaling-ray-reproduce-29737637")
    monkeypatch.setattr(sys, "argv", ["create_rayjob.py", str(SCHEDULE / "kubernetes" / "rayjob.yaml")])
    creator.main()
    creator.main()
    assert capsys.readouterr().out.splitlines() == [
        "scaling-ray-reproduce-29737637: created",
        "scaling-ray-reproduce-29737637: there already",
    ]
    (job,) = api.values()
    words = job["spec"]["entrypoint"].split()
    assert words[words.index("--tick") + 1] == "2026-07-17T03:17Z" and "TICK" not in words


def test_the_verb_takes_what_the_manifests_say() -> None:
    from scaling_ray.cli import build_parser

    entry_points = [
        yaml.safe_load((SCHEDULE / "kubernetes" / "rayjob.yaml").read_text())["spec"]["entrypoint"],
        yaml.safe_load((SCHEDULE / "raycronjob.yaml").read_text())["spec"]["jobTemplate"]["entrypoint"],
    ]
    for entry_point in entry_points:
        program, *arguments = entry_point.split()
        options = build_parser().parse_args(arguments)
        assert program == "scaling-ray" and options.verb == "reproduce"
        assert (REPOSITORY / options.against).is_file()


def test_the_cronjob_keeps_ticks_apart_and_may_do_one_thing() -> None:
    folder = SCHEDULE / "kubernetes"
    spec = yaml.safe_load((folder / "cronjob.yaml").read_text())["spec"]
    assert spec["concurrencyPolicy"] == "Forbid" and spec["timeZone"] == "Etc/UTC"
    assert spec["startingDeadlineSeconds"] > 100, "the controller looks every ten seconds"
    _, role, _ = yaml.safe_load_all((folder / "rbac.yaml").read_text())
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    job = yaml.safe_load((folder / "rayjob.yaml").read_text())["spec"]
    assert job["backoffLimit"] == 0 and job["shutdownAfterJobFinishes"] and job["activeDeadlineSeconds"] > 0
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    kept = yaml.safe_load((folder / "kustomization.yaml").read_text())
    named = [*kept["resources"], *kept["configMapGenerator"][0]["files"]]
    assert {path.name for path in folder.iterdir() if path.suffix in (".yaml", ".py")} == {*named, "kustomization.yaml"}


def test_the_workflow_repeats_the_demo_and_may_only_read() -> None:
    work = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "reproduce.yml").read_text())
    assert work["permissions"] == {"contents": "read"} and work["concurrency"]["cancel-in-progress"] is False
    (command,) = [step["run"] for step in work["jobs"]["demo"]["steps"] if step.get("name") == "reproduce"]
    assert "reproduce demo --against reports/demo/reference.json" in command and work[True]["schedule"]
