"""The command line. A module for each family of verbs holds their arguments beside what they do.

Verbs parse their arguments first and import what is heavy after: a handler imports in its body, and ``main`` checks the
extras that its verb names before it runs. That is why the parser is argparse, with rich for its looks and argcomplete
for shells, and not typer: there a verb is a function whose signature is the command line, so arguments could not be
shared among verbs, generated into the reference or checked against extras before anything is imported.

What a verb returns is the same everywhere: ``scaling_ray.errors.EXIT_CODES``.
"""

from __future__ import annotations

from scaling_ray.cli.program import build_parser, main

__all__ = ["build_parser", "main"]
