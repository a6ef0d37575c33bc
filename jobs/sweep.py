"""The whole path as one job: Census, shards, sweep and report below OUT, each skipped where it is already whole.

``ray job submit --working-dir . -- python jobs/sweep.py jobs/demo.toml --out DIR``; submit it again to go on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import output


def main(argv: list[str]) -> int:
    """Run the sweep of SPEC to its report. Returns the exit code; RunsFailed, after the report, where runs failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, help="the sweep's TOML file")
    parser.add_argument("--shards", help="directory or s3:// URI of shards (default: built below OUT from the Census)")
    parser.add_argument("--census", help="directory, s3:// URI or release of a Census (default: planted below OUT)")
    parser.add_argument("--out", help="absolute directory for everything (default: SCALING_RAY_OUT)")
    options = parser.parse_args(argv)
    out = Path(output.place(options.out))

    from scaling_ray.errors import RunsFailed
    from scaling_ray.report.build import build_report
    from scaling_ray.spec import load_spec
    from scaling_ray.sweep.run import run_sweep

    shards = options.shards or out / "shards"
    if options.shards is None:
        from scaling_ray.planted.plant import plant
        from scaling_ray.shards.convert import build_shards

        census = options.census or str(plant(out / "census", progress=output.say))
        build_shards(load_spec(options.spec), census, shards, output.say)
    failed: RunsFailed | None = None
    try:
        run_sweep(options.spec, shards, out / "sweep", output.say)
    except RunsFailed as error:
        # The runs that finished are worth their report; the job then ends as failed.
        failed = error
    output.say(str(build_report(out / "sweep", out / "report")))
    if failed:
        raise failed
    return 0


if __name__ == "__main__":
    output.run(main)
