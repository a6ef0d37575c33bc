"""How a job runs a verb of ``scaling-ray``. Jobs run in a temporary copy of the repository: results go elsewhere.

Ray forgets the exit code of a job that was stopped, and everything else with its head. So a job that ends leaves
``jobs/<submission id>.json`` in its output: what ran, when, and the exit code. No file: the job was killed or lost.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from scaling_ray import cli
from scaling_ray.errors import BadInput, Preempted
from scaling_ray.storage import LocalPlace, Place, open_place


def run_verb(about: str, verb: str, arguments: list[str], records: str = "/jobs") -> NoReturn:
    """Run a verb and end the process with its exit code; without ``--out`` results go to SCALING_RAY_OUT.

    Args:
        about: what ``--help`` says.
        verb: of ``scaling-ray``, as typed.
        arguments: of the job.
        records: folder for the record of how the job ended; follows the name of the place for results.
    """
    parser = argparse.ArgumentParser(
        description=about,
        epilog=f"Other arguments are those of `scaling-ray {verb}`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", help="absolute directory or s3:// URI for results (default: SCALING_RAY_OUT)")
    options, others = parser.parse_known_args(arguments)
    try:
        out = place_of(options.out or os.environ.get("SCALING_RAY_OUT"))
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    command = [*verb.split(), *others, "--out", out]
    began = datetime.now(UTC)
    code = 1
    # Until the verb hears signals itself, and after: ending then loses nothing, and the same job goes on.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    try:
        code = cli.main(command)
    except SystemExit as end:
        # Ray's own handler and the one above leave with the number of the signal.
        code = int(end.code or 0)
        if code == signal.SIGTERM:
            code = Preempted.exit_code
            print("stopped on the way: the same job goes on", file=sys.stderr)
    finally:
        _record(out, records, command, began, code)
    sys.exit(code)


def place_of(given: str | None) -> str:
    """The place for results; BadInput where none is given, or a relative one, which is deleted with the job's copy."""
    if given is None or not (given.startswith("s3://") or Path(given).is_absolute()):
        remedy = "name an absolute directory or an s3:// URI with --out or SCALING_RAY_OUT"
        raise BadInput("V027", "--out", given, f"{remedy}; a relative one vanishes with the job's package")
    open_place(given)
    return given.rstrip("/") or given


def submission_id() -> str | None:
    """The id under which this process was submitted to Ray; None where it was not."""
    config = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return None if config is None else json.loads(config)["metadata"]["job_submission_id"]


def _record(out: str, records: str, command: list[str], began: datetime, code: int) -> None:
    """Leave the record of a submitted job; a place that takes none costs one line, and the exit code stays."""
    job = submission_id()
    if job is None or (code == BadInput.exit_code and not _may_hold_results(open_place(out))):
        return
    told = {"submission_id": job, "command": command, "exit_code": code}
    told |= {"began": began.isoformat(timespec="seconds"), "ended": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        open_place(f"{out}{records}").write(f"{quote(job, safe='')}.json", (json.dumps(told, indent=1) + "\n").encode())
    except BadInput as error:
        print(f"the job's exit code {code} is not kept: {error}", file=sys.stderr)


def _may_hold_results(place: Place) -> bool:
    """A job that was refused at once leaves no new folder."""
    return not isinstance(place, LocalPlace) or place.path.is_dir()
