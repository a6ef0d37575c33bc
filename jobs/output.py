"""How a job runs a verb of ``scaling-ray``. Jobs run in a temporary copy of the repository: results go elsewhere."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from scaling_ray import cli
from scaling_ray.errors import BadInput


def run_verb(about: str, verb: str, arguments: list[str]) -> NoReturn:
    """Run a verb and end the process with its exit code; without ``--out`` results go to SCALING_RAY_OUT."""
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
    sys.exit(cli.main([*verb.split(), *others, "--out", out]))


def place_of(given: str | None) -> str:
    """The place for results; BadInput where none is given, or a relative one, which is deleted with the job's copy."""
    if given is None or not (given.startswith("s3://") or Path(given).is_absolute()):
        remedy = "name an absolute directory or an s3:// URI with --out or SCALING_RAY_OUT"
        raise BadInput("--out", given, f"{remedy}; a relative one vanishes with the job's package")
    return given
