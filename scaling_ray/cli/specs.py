"""``init`` and ``plan``: a spec, and what it will do and cost."""

from __future__ import annotations

import argparse
import json

from scaling_ray.cli import complete
from scaling_ray.cli.declare import PROGRAM, SPEC_HELP, Verbs, add_verb, completed, local
from scaling_ray.cli.given import flag, spec_of
from scaling_ray.cli.lines import say
from scaling_ray.errors import BadInput

LIMITS = {
    "gpu-hours": ("GPU_HOURS", "whole GPUs times hours"),
    "cpu-hours": ("CPU_HOURS", "CPUs times hours"),
    "cost": ("MONEY", "in the currency of the spec's [prices]"),
    "wall-hours": ("HOURS", "from the first start"),
}


def add_init(top: Verbs) -> None:
    """``init``."""
    verb = add_verb(
        top,
        "init",
        init,
        "write a spec with every key explained: a shipped example, or a new sweep",
        "init my-sweep --out my-sweep.toml",
        "init --list",
    )
    name = verb.add_argument(
        "name", nargs="?", metavar="NAME", help="an example, or the name of a new sweep, which begins as `cells`"
    )
    completed(name, complete.examples)
    verb.add_argument(
        "--out", type=local, metavar="SPEC.toml", default=None, help="file to write, a new one (printed if left out)"
    )
    verb.add_argument("--list", action="store_true", help="name the shipped examples")


def init(options: argparse.Namespace) -> int:
    """Write, print or list specs with every key explained."""
    from scaling_ray.specs import about_example, example_names

    if options.list:
        from scaling_ray.console import plain, table

        print("\n".join(plain(table((), [(name, about_example(name)) for name in example_names()]))))
        return 0
    if options.name is None:
        remedy = f"name an example ({', '.join(example_names())}), or a new sweep"
        raise BadInput("V010", "NAME", None, remedy)
    if options.name.endswith(".toml"):
        raise BadInput("V032", "NAME", options.name, "is a file; name a sweep, and the file to write with --out")
    from scaling_ray.specs.annotated import annotated_spec
    from scaling_ray.storage import create_if_absent, output_directory

    text = annotated_spec(options.name)
    if options.out is None:
        print(text, end="")
        return 0
    output_directory(options.out.parent)
    if not create_if_absent(options.out, text):
        raise BadInput("V011", "--out", str(options.out), "exists; name another file, or remove it")
    say(f"next: {PROGRAM} plan {options.out}, then {PROGRAM} run {options.out} --out DIR")
    print(options.out)
    return 0


def add_plan(top: Verbs) -> None:
    """``plan``."""
    verb = add_verb(
        top,
        "plan",
        plan,
        "what a sweep will do and cost: grid, parameters, TFLOP, MiB, hours",
        "plan demo",
        "plan demo --max-cpu-hours 0.1 --json",
    )
    completed(verb.add_argument("spec", metavar="SPEC.toml", help=SPEC_HELP), complete.specs)
    verb.add_argument("--json", action="store_true", help="as JSON")
    verb.add_argument(
        "--rates", type=local, nargs="+", default=[], metavar="FILE", help="JSON of measured rates, a file per machine"
    )
    verb.add_argument(
        "--cluster", type=local, default=None, metavar="FILE", help="cluster's file for `ray up`: what it can become"
    )
    for limit, (unit, about) in LIMITS.items():
        verb.add_argument(
            f"--max-{limit}", type=float, default=None, metavar=unit, help=f"budget, {about}: what it leaves undone"
        )


def plan(options: argparse.Namespace) -> int:
    """Say what a sweep will do and cost."""
    from scaling_ray.public.plans import plan_document
    from scaling_ray.resources import BudgetSpec
    from scaling_ray.sweep.plan_text import format_plan

    spec, limits = spec_of(options), {name: getattr(options, name) for name in BudgetSpec.model_fields}
    for name, value in limits.items():
        if value is not None and not value > 0:
            raise BadInput("V019", flag(name), value, "must be more than 0")
    plan = plan_document(spec, options.rates, options.cluster, limits)
    print(json.dumps(plan, indent=1) if options.json else format_plan(plan))
    return 0
