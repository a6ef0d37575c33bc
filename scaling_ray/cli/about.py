"""``explain`` and ``completion``: what a refusal means, and what a shell needs to complete a line."""

from __future__ import annotations

import argparse

from scaling_ray.cli.complete import codes
from scaling_ray.cli.declare import PROGRAM, Verbs, add_verb, completed
from scaling_ray.errors import BadInput

SHELLS = ("bash", "zsh", "fish")


def add_explain(top: Verbs) -> None:
    """``explain``."""
    verb = add_verb(top, "explain", explain, "what a refusal means, by the code its line ends with", "explain S035")
    completed(verb.add_argument("code", metavar="CODE", help="a letter and three digits, as in [S035]"), codes)


def explain(options: argparse.Namespace) -> int:
    """Print what is known of a refusal."""
    from difflib import get_close_matches

    from scaling_ray.refusals import refusals

    asked = options.code.strip("[]").upper()
    known = {refusal.code: refusal for refusal in refusals()}
    if asked not in known:
        near = ", ".join(get_close_matches(asked, known, 3, 0.5)) or "a letter and three digits"
        raise BadInput("V030", "CODE", options.code, f"is no code of this version; codes look like this: {near}")
    print("\n".join(known[asked].lines()))
    return 0


def add_completion(top: Verbs) -> None:
    """``completion``."""
    verb = add_verb(
        top,
        "completion",
        completion,
        "print what a shell has to read to complete verbs, options, specs, runs and files",
        "completion bash",
    )
    verb.add_argument(
        "shell",
        choices=SHELLS,
        help=f"bash or zsh: put `source <({PROGRAM} completion SHELL)` into its start-up file (zsh after compinit); "
        f"fish: `{PROGRAM} completion fish | source`",
    )


def completion(options: argparse.Namespace) -> int:
    """Print the code of argcomplete for a shell."""
    from argcomplete import shellcode

    print(shellcode([PROGRAM], shell=options.shell))
    return 0
