"""What a machine has and what it lacks for a sweep; nothing heavy is imported for it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from scaling_ray.console import plain, table
from scaling_ray.extras import missing_modules

GIB = 2**30

OLDEST_PYTHON = (3, 11)
NEEDED_CORES = 2
NEEDED_MEMORY_BYTES = 4 * GIB
NEEDED_DISK_BYTES = 5 * GIB
NEEDED_PORTS = 8
"""A head binds about this many: GCS, dashboard, client, agents, metrics, raylet, object manager."""

RAY_OBJECT_STORE_SHARE = 0.3
"""Ray's default: 30% of memory for the object store, in /dev/shm if that holds it, else on disk (slow)."""

RAY_OBJECT_STORE_CAP_BYTES = 200 * 10**9

LIGHT_PACKAGES = (
    *("numpy", "scipy", "pyarrow", "pydantic", "jinja2", "resvg-py", "pyyaml"),
    *("rich", "rich-argparse", "argcomplete"),
)
"""Without these no verb runs."""

USES = {
    "train": ("torch", "run, sweep, reproduce, export, embed, bench train, track models"),
    "cluster": ("ray", "run, sweep, reproduce, shards build, bench stream, node-watch"),
    "census": (
        "tiledbsoma",
        "run, reproduce, census plant, census limits, census import, census check, shards build, embed",
    ),
    "track": ("mlflow", "track replay, track check, track models"),
    "s3": ("boto3", "results and shards on S3"),
}
"""Extra -> the package whose version stands for it, and the verbs that need it, alone or with others."""


@dataclass(frozen=True)
class Finding:
    """One check. ``remedy`` is what to do where it is not ``ok``; ``required``: nothing runs without it."""

    name: str
    ok: bool
    required: bool
    detail: str
    remedy: str = ""


def check_machine(write_to: Path, constraints: Path | None = None) -> list[Finding]:
    """Check this machine.

    Args:
        write_to: directory for results; it need not exist, and nothing is left behind in it.
        constraints: the pins to hold installed versions against; default ``constraints.txt`` of the working directory
            or of the checkout, none if neither exists.
    """
    memory_bytes = _memory_bytes()
    return [
        _python(),
        _cores(),
        _memory(memory_bytes),
        _shared_memory(memory_bytes),
        _gpu(),
        _tool("g++", "DeepSpeed builds its optimizer with it at first use", "install g++ (apt-get install g++)"),
        _tool("ninja", "DeepSpeed builds its optimizer with it at first use", "pip install ninja"),
        _tool("make", "the project's commands are make targets", "install make (apt-get install make)"),
        _ports(),
        *_versions(constraints or _find_constraints()),
        _writable(write_to),
        _disk(write_to),
    ]


def lacks_required(findings: list[Finding]) -> bool:
    """Whether something is missing without which nothing runs: the command's exit code is 1 then."""
    return any(finding.required and not finding.ok for finding in findings)


def format_findings(findings: list[Finding]) -> str:
    """One line each: ``ok``, ``warn`` or ``LACKS``, the name, what was seen and, where not ok, what to do."""
    rows = []
    for finding in findings:
        state = "ok" if finding.ok else "LACKS" if finding.required else "warn"
        remedy = f"; {finding.remedy}" if finding.remedy and not finding.ok else ""
        rows.append((state, finding.name, f"{finding.detail}{remedy}"))
    return "\n".join(plain(table((), rows)))


def _python() -> Finding:
    found = ".".join(str(part) for part in sys.version_info[:3])
    oldest = ".".join(str(part) for part in OLDEST_PYTHON)
    return Finding("python", sys.version_info[:2] >= OLDEST_PYTHON, True, found, f"needs {oldest} or newer")


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    remedy = f"a sweep needs {NEEDED_CORES}: one for the driver, one for a run"
    return Finding("cores", cores >= NEEDED_CORES, False, f"{cores} usable", remedy)


def _memory_bytes() -> int:
    """Memory this process may use: the machine's, or its container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file():
            text = limit.read_text().strip()
            if text.isdigit():
                total = min(total, int(text))
    return total


def _memory(total_bytes: int) -> Finding:
    remedy = f"Ray and two runs need {NEEDED_MEMORY_BYTES / GIB:.0f} GiB"
    return Finding("memory", total_bytes >= NEEDED_MEMORY_BYTES, False, f"{total_bytes / GIB:.1f} GiB", remedy)


def _shared_memory(total_bytes: int, directory: Path = Path("/dev/shm")) -> Finding:
    wanted_bytes = min(int(total_bytes * RAY_OBJECT_STORE_SHARE), RAY_OBJECT_STORE_CAP_BYTES)
    if not directory.is_dir():
        return Finding("/dev/shm", sys.platform != "linux", False, "none here", "mount a tmpfs there")
    free_bytes = shutil.disk_usage(directory).free
    detail = f"{free_bytes / GIB:.1f} GiB free, Ray's object store takes {wanted_bytes / GIB:.1f} GiB"
    remedy = f"the store goes to the slower disk: in a container set --shm-size={wanted_bytes / GIB:.0f}g or more"
    return Finding("/dev/shm", free_bytes >= wanted_bytes, False, detail, remedy)


def _gpu() -> Finding:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("gpu", True, False, "none (no nvidia-smi); training runs on the CPU")
    command = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("gpu", False, False, f"nvidia-smi fails: {_one_line(error)}", "check the driver")
    names = "; ".join(line.strip() for line in done.stdout.splitlines() if line.strip())
    return Finding("gpu", bool(names), False, names or "nvidia-smi lists none", "check the driver")


def _tool(name: str, purpose: str, remedy: str) -> Finding:
    # A program of this environment counts without being on PATH: Python packages find it there.
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name) or (str(beside) if os.access(beside, os.X_OK) else None)
    return Finding(name, found is not None, False, found or f"not found; {purpose}", remedy)


def _ports() -> Finding:
    opened: list[socket.socket] = []
    try:
        for _ in range(NEEDED_PORTS):
            opened.append(socket.socket())
            opened[-1].bind(("127.0.0.1", 0))
    except OSError as error:
        remedy = "Ray needs loopback sockets: allow binding 127.0.0.1, or free some ports"
        return Finding("ports", False, True, f"cannot bind on 127.0.0.1: {_one_line(error)}", remedy)
    finally:
        for each in opened:
            each.close()
    return Finding("ports", True, True, f"{NEEDED_PORTS} free ones bound on 127.0.0.1")


def _find_constraints() -> Path | None:
    places = (Path.cwd(), Path(__file__).resolve().parents[1])
    return next((place / "constraints.txt" for place in places if (place / "constraints.txt").is_file()), None)


def read_pins(constraints: Path) -> dict[str, str]:
    """The ``name==version`` lines of a constraints file, by normalised name (lower case, dashes)."""
    pins = {}
    for line in constraints.read_text().splitlines():
        name, equals, version = line.split("#", 1)[0].partition("==")
        if equals:
            pins[_normal(name)] = version.split(";", 1)[0].strip()
    return pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip().lower())


def _versions(constraints: Path | None) -> list[Finding]:
    """The light packages, each extra, and what differs from the pins."""
    pins = read_pins(constraints) if constraints else {}
    # A mapping, not a call per package: reading each distribution's metadata anew is what takes the time.
    installed = {_normal(each.name): each.version for each in metadata.distributions() if each.name}
    missing = [name for name in LIGHT_PACKAGES if name not in installed]
    shown = ", ".join(f"{name} {installed[name]}" for name in LIGHT_PACKAGES if name in installed)
    detail = f"missing {', '.join(missing)}" if missing else shown
    findings = [Finding("packages", not missing, True, detail, "pip install scaling-ray")]
    for extra, (package, verbs) in USES.items():
        lacking = missing_modules(extra)
        detail = f"needed by {verbs}; missing {', '.join(lacking)}"
        if not lacking:
            detail = f"{package} {installed.get(package, 'of unknown version')}"
        findings.append(Finding(f"[{extra}]", not lacking, False, detail, f"pip install 'scaling-ray[{extra}]'"))
    if not pins:
        findings.append(Finding("versions", True, False, "no constraints.txt at hand to compare with"))
        return findings
    # torch 2.13.0+cpu satisfies torch==2.13.0: a local suffix names the build, not the version.
    different = [
        f"{name} {installed[name]} instead of {pinned}"
        for name, pinned in pins.items()
        if name in installed and installed[name].split("+", 1)[0] != pinned
    ]
    absent = [name for name in pins if name not in installed]
    shown = "; ".join(different[:5]) + (f"; {len(different) - 5} more" if len(different) > 5 else "")
    agreed = f"{len(pins) - len(absent)} of {len(pins)} pinned packages installed, all as pinned"
    findings.append(Finding("versions", not different, False, shown or agreed, "pip install -c constraints.txt ..."))
    return findings


def _existing(path: Path) -> Path:
    """``path`` or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _writable(write_to: Path) -> Finding:
    place = _existing(write_to)
    try:
        # Permission bits do not show read-only mounts and quotas, so a file is written.
        with tempfile.NamedTemporaryFile(dir=place, prefix=".scaling-ray-doctor-") as stream:
            stream.write(b"0")
            stream.flush()
    except OSError as error:
        return Finding("write access", False, True, f"{place}: {_one_line(error)}", "name another directory")
    return Finding("write access", True, True, str(place))


def _disk(write_to: Path) -> Finding:
    place = _existing(write_to)
    free_bytes = shutil.disk_usage(place).free
    remedy = f"have {NEEDED_DISK_BYTES / GIB:.0f} GiB free, or name another directory"
    return Finding("disk", free_bytes >= NEEDED_DISK_BYTES, False, f"{free_bytes / GIB:.1f} GiB free: {place}", remedy)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
