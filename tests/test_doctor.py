"""What the doctor promises: it sees what is there, names what is not with a way out, and imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from scaling_ray.doctor import Finding, check_machine, format_findings, lacks_required, read_pins

REPOSITORY = Path(__file__).resolve().parents[1]


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


def executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_this_machine_can_run_and_nothing_is_left_behind(tmp_path: Path) -> None:
    target = tmp_path / "not" / "yet"
    findings = check_machine(target, REPOSITORY / "constraints.txt")
    assert not lacks_required(findings), format_findings(findings)
    assert list(tmp_path.iterdir()) == []
    seen = by_name(findings)
    assert {"python", "cores", "memory", "gpu", "g++", "ninja", "make"} <= set(seen)
    assert {"/dev/shm", "ports", "packages", "versions", "write access", "disk"} <= set(seen)
    assert ".".join(map(str, sys.version_info[:3])) in seen["python"].detail
    assert str(len(os.sched_getaffinity(0))) in seen["cores"].detail
    assert f"numpy {metadata.version('numpy')}" in seen["packages"].detail
    assert f"torch {metadata.version('torch')}" in seen["[train]"].detail
    assert {"[train]", "[cluster]", "[census]", "[track]", "[s3]"} <= set(seen)


def test_it_starts_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from scaling_ray.doctor import check_machine; check_machine(Path('.'));"
        "assert not {'torch', 'ray', 'mlflow', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


def test_a_version_unlike_its_pin_is_named_and_does_not_stop(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    torch = metadata.version("torch").split("+", 1)[0]
    pins.write_text(f"# pins\ntorch=={torch}  # a local suffix is no difference\nNumPy==0.0.1\nno-such==1.0\n")
    versions = by_name(check_machine(tmp_path, pins))["versions"]
    assert not versions.ok and not versions.required
    assert f"numpy {metadata.version('numpy')} instead of 0.0.1" in versions.detail
    assert "torch" not in versions.detail
    assert "constraints.txt" in versions.remedy


def test_an_extra_that_is_not_there_is_named_with_its_verbs_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    findings = check_machine(tmp_path)
    tracking = by_name(findings)["[track]"]
    assert not tracking.ok and "track replay" in tracking.detail and "missing mlflow" in tracking.detail
    assert tracking.remedy == "pip install 'scaling-ray[track]'"
    assert not lacks_required(findings)


def test_pins_are_read_by_normalised_name(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("Jinja2==3.1 \nruamel.yaml_x==2 ; python_version > '3'\n\n# a==1\n")
    assert read_pins(path) == {"jinja2": "3.1", "ruamel-yaml-x": "2"}


def test_missing_tools_are_named_with_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    seen = by_name(check_machine(tmp_path))
    for name in ("g++", "make"):
        assert not seen[name].ok and seen[name].remedy
    assert seen["gpu"].ok and "none" in seen["gpu"].detail


def test_a_gpu_and_a_broken_driver_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    executable(tmp_path / "nvidia-smi", "echo 'NVIDIA L4, 23034 MiB, 550.1'")
    assert "NVIDIA L4, 23034 MiB" in by_name(check_machine(tmp_path))["gpu"].detail
    executable(tmp_path / "nvidia-smi", "exit 9")
    broken = by_name(check_machine(tmp_path))["gpu"]
    assert not broken.ok and "driver" in broken.remedy


def test_a_place_that_cannot_be_written_is_a_required_lack(tmp_path: Path) -> None:
    a_file = tmp_path / "file"
    a_file.write_text("")
    findings = check_machine(a_file / "below")
    assert lacks_required(findings)
    writing = by_name(findings)["write access"]
    assert writing.required and not writing.ok and str(a_file) in writing.detail


def test_one_line_each_with_state_and_remedy() -> None:
    findings = [
        Finding("a", True, True, "fine", "unused"),
        Finding("longer", False, False, "odd", "mend it"),
        Finding("b", False, True, "gone", "get it"),
    ]
    lines = format_findings(findings).splitlines()
    assert lines == ["ok     a       fine", "warn   longer  odd; mend it", "LACKS  b       gone; get it"]
    assert lacks_required(findings) and not lacks_required(findings[:2])
