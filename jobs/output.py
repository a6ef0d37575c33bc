"""Where a job writes, and how it ends. Jobs run in a temporary copy of the repository: places are absolute."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from scaling_ray.errors import BadInput, ScalingRayError


def place(given: str | None, s3: bool = False) -> str:
    """Where results go, from ``--out`` or the environment's SCALING_RAY_OUT.

    Raises:
        BadInput: none given, relative (a job's working directory is deleted with its package), or on S3 where only
            directories will do.
    """
    value = given or os.environ.get("SCALING_RAY_OUT") or ""
    if value.startswith("s3://") and s3:
        return value
    if value.startswith("s3://"):
        raise BadInput("--out", value, "results cannot go to S3 yet; name an absolute directory that every node mounts")
    if not Path(value).is_absolute():
        remedy = (
            "name an absolute directory with --out or SCALING_RAY_OUT; a relative one vanishes with the job's package"
        )
        raise BadInput("--out", value or None, remedy)
    return value


def say(line: str) -> None:
    """A line of progress, in the job's log at once and not when a buffer is full."""
    print(line, flush=True)


def run(job: Callable[[list[str]], int]) -> NoReturn:
    """End the process with the job's exit code; what the package refuses on purpose becomes one line, no traceback."""
    try:
        sys.exit(job(sys.argv[1:]))
    except ScalingRayError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
