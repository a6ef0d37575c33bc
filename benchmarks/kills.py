"""Kill a conversion at random moments until it is done, over and over: its files must be those of an undisturbed one.

``python benchmarks/kills.py --census DIR --spec SPEC.toml --work DIR [--kills 20]``. Only the driver is killed, by its
process id, with SIGKILL; what Ray it had started ends by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def start(options: argparse.Namespace, out: Path) -> subprocess.Popen[str]:
    """A conversion in a process of its own."""
    command = [sys.executable, "-m", "scaling_ray.cli", "shards", "build", str(options.spec)]
    command += ["--census", str(options.census), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def works(process: subprocess.Popen[str]) -> bool:
    """Wait until a conversion has finished a first piece of its work; False where it ended before."""
    assert process.stderr is not None
    return any(re.search(r"[\d,]+ of [\d,]+ cells", line) for line in process.stderr)


def finished(process: subprocess.Popen[str]) -> float:
    """Seconds until a conversion ends; it must end well."""
    began = time.monotonic()
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"a conversion ended with {process.returncode}: {said.strip().splitlines()[-1]}")
    return time.monotonic() - began


def hashes(out: Path) -> dict[str, str]:
    """sha256 of every file below a directory."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def progress_of(out: Path) -> str:
    """How far an unfinished conversion is, by what it left."""
    building = out / "building"
    if (out / "manifest.json").exists():
        return "published"
    if list(building.glob("files/*/*.json")):
        return "writing shard files"
    if list(building.glob("ranges/*.facts")):
        return "reading ranges"
    return "planned" if (building / "plan.json").exists() else "starting"


def main() -> int:
    """Run until so many kills have landed; 1 where any file differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--census", type=Path, required=True, help="directory of a Census")
    parser.add_argument("--spec", type=Path, required=True, help="TOML whose [data] is converted")
    parser.add_argument("--work", type=Path, required=True, help="directory for conversions; emptied")
    parser.add_argument("--kills", type=int, default=20, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    shutil.rmtree(options.work, ignore_errors=True)
    undisturbed = options.work / "undisturbed"
    began = time.monotonic()
    process = start(options, undisturbed)
    works(process)
    working = finished(process)
    seconds = time.monotonic() - began
    expected = hashes(undisturbed)
    landed: list[str] = []
    identical = conversions = 0
    while len(landed) < options.kills:
        out = options.work / f"killed-{conversions}"
        conversions += 1
        while True:
            process = start(options, out)
            try:
                wanted = len(landed) < options.kills and works(process)
                process.wait(rng.uniform(0.0, 0.9) * working if wanted else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                landed.append(progress_of(out))
                print(f"kill {len(landed)}: {landed[-1]}", file=sys.stderr, flush=True)
                continue
            finished(process)
            break
        same = hashes(out) == expected
        identical += same
        print(f"conversion {conversions}: {'identical' if same else 'DIFFERENT'}", file=sys.stderr, flush=True)
        shutil.rmtree(out)
    found: dict[str, Any] = {
        "kills": len(landed),
        "killed_while": {where: landed.count(where) for where in dict.fromkeys(landed)},
        "conversions": conversions,
        "byte_identical": identical,
        "files": len(expected),
        "undisturbed_seconds": seconds,
        "of_which_after_its_first_piece": working,
    }
    print(json.dumps(found))
    return int(identical != conversions)


if __name__ == "__main__":
    sys.exit(main())
