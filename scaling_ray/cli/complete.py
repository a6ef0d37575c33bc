"""What a shell offers at Tab where an argument is no plain file: specs, runs, codes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def complete_here(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, and end; return at once where nobody does."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def specs(prefix: str, **_: Any) -> Sequence[str]:
    """Names of shipped examples, and TOML files."""
    from argcomplete.completers import FilesCompleter

    from scaling_ray.specs import example_names

    return [*example_names(), *FilesCompleter(["toml"])(prefix)]


def examples(prefix: str, **_: Any) -> Sequence[str]:
    """Names of shipped examples."""
    from scaling_ray.specs import example_names

    return example_names()


def runs(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Sequence[str]:
    """Runs of the sweep that stands before on the line, where it lies on a disk."""
    folder = Path(str(parsed_args.sweep)) / "runs"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def codes(prefix: str, **_: Any) -> Sequence[str]:
    """Codes of refusals."""
    from scaling_ray.refusals import refusals

    return [refusal.code for refusal in refusals()]
