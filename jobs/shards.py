"""A Census to shards: ``ray job submit --working-dir . -- python jobs/shards.py SPEC.toml --census URI --out DIR``."""

from __future__ import annotations

import argparse

import output


def main(argv: list[str]) -> int:
    """Build the shards that SPEC asks for; calling it again goes on. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", help="the sweep's TOML file")
    parser.add_argument("--census", required=True, help="directory, s3:// URI or release (2025-11-08) of a Census")
    parser.add_argument("--out", help="absolute directory or s3:// URI for the shards (default: SCALING_RAY_OUT)")
    options = parser.parse_args(argv)
    out = output.place(options.out, s3=True)

    from scaling_ray.shards.convert import build_shards
    from scaling_ray.spec import load_spec

    build_shards(load_spec(options.spec), options.census, out, output.say)
    output.say(out)
    return 0


if __name__ == "__main__":
    output.run(main)
