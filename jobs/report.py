"""A sweep's report: ``ray job submit --working-dir . -- python jobs/report.py SWEEP_DIR --out DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

import output


def main(argv: list[str]) -> int:
    """Write the report of the sweep in SWEEP_DIR. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", help="absolute directory of a sweep")
    parser.add_argument("--out", help="absolute directory for the report (default: SCALING_RAY_OUT)")
    options = parser.parse_args(argv)
    out = Path(output.place(options.out))

    from scaling_ray.report.build import build_report

    output.say(str(build_report(Path(options.sweep), out)))
    return 0


if __name__ == "__main__":
    output.run(main)
