"""The directive ``ran``: a command of this package that the build runs, shown with what it printed.

Commands of a page run in order, in one folder that looks like the root of a clone: it holds its ``reports`` and
``docs/tables``.
``exit`` is the code that a command must end with (0); any other one fails the build. ``lines`` shows that many lines.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAM = "scaling-ray "
_TIME_OF_DAY = re.compile(r"^\d\d:\d\d:\d\d ", re.MULTILINE)


class Workshop:
    """The folders in which the commands of pages run."""

    def __init__(self) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="scaling_ray-docs-")

    def folder(self, page: str) -> Path:
        """The folder of one page, made at its first command."""
        folder = Path(self._root.name) / page.replace("/", "-")
        if not folder.exists():
            (folder / "docs").mkdir(parents=True)
            for name in ("reports", "docs/tables"):
                (folder / name).symlink_to(REPOSITORY / name)
        return folder

    def run(self, page: str, command: str, wanted: int) -> str:
        """What ``command`` prints; AssertionError unless it ends with the code ``wanted``."""
        folder = self.folder(page)
        done = subprocess.run(
            [sys.executable, "-m", "scaling_ray.cli", *shlex.split(command.removeprefix(PROGRAM))],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == wanted, f"`{command}` ended with {done.returncode}, not {wanted}: {done.stdout}"
        return _TIME_OF_DAY.sub("", done.stdout).replace(f"{folder}/", "")


_WORKSHOP = Workshop()


class Ran(SphinxDirective):
    """A block of commands, one a line, each with its output below it."""

    has_content = True
    option_spec = {"exit": directives.nonnegative_int, "lines": directives.nonnegative_int}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """One literal block."""
        told = []
        for command in self.content:
            if not command.startswith(PROGRAM):
                raise self.error(f"{command!r} does not begin with {PROGRAM}")
            said = _WORKSHOP.run(self.env.docname, command, self.options.get("exit", 0)).splitlines()
            most = self.options.get("lines", len(said))
            told += [f"$ {command}", *said[:most], *(["..."] if len(said) > most else [])]
        text = "\n".join(told)
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Make the directive known to Sphinx."""
    app.add_directive("ran", Ran)
    return {"version": "1", "parallel_read_safe": False}
