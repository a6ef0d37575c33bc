"""Tables by rich: the same rows as plain lines, for files and pipes, and in colours on a terminal."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_WIDE = 10_000  # columns: a line of a log is never broken


def table(head: Sequence[str], rows: Iterable[Sequence[str | Text]], right: Collection[int] = ()) -> Table:
    """A table without lines, two spaces between columns; those of the positions ``right`` are flush right."""
    made = Table(box=None, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(head))
    # As Text: of a str rich would take [data] for a colour.
    listed = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    for position in range(max([len(head), *map(len, listed)])):
        name = Text(head[position] if head else "")
        made.add_column(name, justify="right" if position in right else "left", no_wrap=True)
    for row in listed:
        made.add_row(*row)
    return made


def plain(*parts: RenderableType) -> list[str]:
    """What ``parts`` look like as lines of text, without an escape code."""
    console = Console(file=io.StringIO(), width=_WIDE, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part, markup=False, highlight=False, emoji=False)
    return [line.rstrip() for line in captured.get().splitlines()]
