"""How a verb is declared: its handler, a sentence, examples, the extras it needs."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich_argparse import ArgumentDefaultsRichHelpFormatter, RawDescriptionRichHelpFormatter

from scaling_ray.errors import BadCall

PROGRAM = "scaling-ray"
Handler = Callable[[argparse.Namespace], int]
Verbs = argparse._SubParsersAction
"""What verbs are added to: the command line, or a group such as ``census``."""


class HelpFormatter(RawDescriptionRichHelpFormatter, ArgumentDefaultsRichHelpFormatter):
    """Help with defaults, where there is one to tell; in colours on a terminal only."""

    text_markup = False  # [data] is a table of a spec, and no colour
    help_markup = False

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def add_argument(self, action: argparse.Action) -> None:
        """As argparse does, which forgets that verbs are indented when it measures them."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line with a code, like those of the verbs."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **given})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but what a verb does not know is its own complaint, with the nearest name."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            asked = getattr(options, "asked", "")
            verb = self.verbs().get(asked, self)
            near = difflib.get_close_matches(unknown[0].partition("=")[0], verb._option_string_actions, n=1)
            verb.error(f"unrecognized arguments: {' '.join(unknown)}{_did_you_mean(near)}")
        return options

    def verbs(self) -> dict[str, Parser]:
        """All verbs below, by their words as typed after this parser's own."""
        found: dict[str, Parser] = {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, below in action.choices.items():
                    found |= {f"{name} {words}".strip(): verb for words, verb in below.verbs().items()} or {name: below}
        return found

    def error(self, message: str) -> NoReturn:
        """Raise BadCall, where argparse would print the usage and exit."""
        asked = self.prog.removeprefix(PROGRAM).strip()
        before = f"{asked}: " if asked else ""
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        if wrong is not None and (verbs := self.verbs()):
            message += _did_you_mean([f"{asked} {words}".strip() for words in _nearest(wrong[1], list(verbs))])
        raise BadCall("V029", f"{before}{message}; `{self.prog} --help` shows an example")


def _nearest(word: str, verbs: Sequence[str]) -> list[str]:
    """Verbs, or the begin of several, one of whose words is nearest to ``word``."""
    near = difflib.get_close_matches(word, {each for verb in verbs for each in verb.split()}, n=1)
    if not near:
        return []
    begins = [near[0]] if any(verb.startswith(f"{near[0]} ") for verb in verbs) else []
    return begins or [verb for verb in verbs if near[0] in verb.split()][:2]


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def add_verb(
    parent: Verbs, name: str, handler: Handler, about: str, *examples: str, needs: tuple[str, ...] = ()
) -> argparse.ArgumentParser:
    """A verb that runs ``handler`` and ``needs`` these extras beside a light installation.

    Args:
        parent: what it is added to.
        name: its word.
        handler: takes the parsed arguments, returns the exit code.
        about: what it does, one sentence.
        examples: whole command lines, without the name of the program.
        needs: extras, see ``scaling_ray.extras``.
    """
    shown = "\n".join(["example:" if len(examples) == 1 else "examples:", *(f"  {PROGRAM} {e}" for e in examples)])
    made: argparse.ArgumentParser = parent.add_parser(name, help=about, description=about, epilog=shown)
    made.set_defaults(handler=handler, needs=needs, asked=made.prog.removeprefix(f"{PROGRAM} "))
    return made


def add_group(parent: Verbs, name: str, about: str) -> Verbs:
    """Verbs of two words: ``census plant``."""
    made = parent.add_parser(name, help=about, description=about)
    return made.add_subparsers(dest=f"{name}_verb", required=True, metavar="VERB")


Completer = Callable[..., Sequence[str]]


def completed(action: argparse.Action, completer: Completer) -> None:
    """Let a shell complete an argument by ``completer`` (see :mod:`scaling_ray.cli.complete`); else by files."""
    action.completer = completer  # type: ignore[attr-defined]


def place(text: str) -> str | Path:
    """A directory, or an ``s3://`` URI as it stands."""
    return text if "://" in text else Path(text)


def local(text: str) -> Path:
    """A file or directory of this machine; a URI would become a folder of that name."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no local path; name one on a disk of this machine")
    return Path(text)


def positive(text: str) -> float:
    """A number above 0: seconds, cells a second."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return found


SPEC_HELP = "the sweep's spec: a TOML file, or the name of a shipped example (scaling-ray init --list)"
SWEEP_HELP = "directory or s3:// URI of the sweep"
CLUSTER_HELP = "the file that `ray up` started the cluster from: what it can become decides which sizes have room"
CENSUS_HELP = "directory, URI or version (such as 2025-11-08) of a Census"
