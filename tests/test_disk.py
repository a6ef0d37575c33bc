"""A sweep on a file system that fills up, turns read-only, or has next to no shared memory: nothing is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_orchestrator import in_flight, wait_for

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from fake_cluster import write_spec  # noqa: E402

from scaling_ray.results.read import read_rows  # noqa: E402
from scaling_ray.storage import open_place  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def may_mount() -> bool:
    """Whether this user may mount file systems in a namespace of its own."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return False
    return (
        subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    )


needs_mount = pytest.mark.skipif(not may_mount(), reason="mounting a small file system needs root")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def sweep(spec: Path, shards: Path, out: Path, said: Path, *before: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    line = ["sweep", str(spec), "--shards", str(shards), "--out", str(out)]
    with open(said, "a") as file:
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "scaling_ray.cli", *line], env=environment, stderr=file
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@needs_mount
def test_a_disk_that_fills_up_pauses_the_sweep(tiny_shards: Path, tmp_path: Path, small: Path) -> None:
    spec, out, said = write_spec(tmp_path / "spec.toml", 2, 0, cells_seen=60_000), small / "out", tmp_path / "said"
    with sweep(spec, tiny_shards, out, said) as process:
        wait_for(lambda: len(in_flight(out)) == 2)
        time.sleep(3)
        filler = small / "filler"
        with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        wait_for(lambda: "No space left on device" in said.read_text())
        time.sleep(30)
        assert process.poll() is None
        filler.unlink()
        assert process.wait(400) == 0, said.read_text()[-3000:]
    assert {row.status for row in read_rows(open_place(out))} == {"done"}
    words = said.read_text()
    assert "Traceback" not in words and words.count("No space left on device") <= 4, words
    assert "there is room again; the sweep goes on" in words


@needs_mount
def test_a_disk_that_fails_and_is_mounted_again_loses_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    """What ext4 does after an error of its device: everything turns read-only, until somebody repairs and mounts it."""
    image, disk, said = tmp_path / "image", tmp_path / "disk", tmp_path / "said"
    disk.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    mount = ["mount", "-o", "loop", str(image), str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no loop device to mount")
    spec, out = write_spec(tmp_path / "spec.toml", 2, 0, cells_seen=60_000), disk / "out"
    try:
        with sweep(spec, tiny_shards, out, said) as process:
            wait_for(lambda: len(in_flight(out)) == 2)
            time.sleep(3)
            subprocess.run(["mount", "-o", "remount,abort", str(disk)], check=True)
            wait_for(lambda: "Read-only file system" in said.read_text())
            time.sleep(30)
            assert process.poll() is None
            process.terminate()
            assert process.wait(60) == 75, said.read_text()[-3000:]
        subprocess.run(["umount", str(disk)], check=True)
        subprocess.run(mount, check=True)
        with sweep(spec, tiny_shards, out, said) as process:
            assert process.wait(400) == 0, said.read_text()[-3000:]
        assert {row.status for row in read_rows(open_place(out))} == {"done"}
        assert "Traceback" not in said.read_text()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@needs_mount
def test_a_shared_memory_of_48_mib_is_enough_or_said(tiny_shards: Path, tmp_path: Path) -> None:
    """As in a container that nobody gave a --shm-size."""
    spec, out, said = write_spec(tmp_path / "spec.toml", 2, 0, cells_seen=8_000), tmp_path / "out", tmp_path / "said"
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=48m none /dev/shm && exec "$@"', "sh"]
    with sweep(spec, tiny_shards, out, said, *mounted) as process:
        assert process.wait(300) == 0, said.read_text()[-3000:]
    assert {row.status for row in read_rows(open_place(out))} == {"done"}
    assert "Traceback" not in said.read_text()
