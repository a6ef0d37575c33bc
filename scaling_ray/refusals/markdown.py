"""The list of refusals as a page, and the command that writes it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from scaling_ray.errors import EXIT_CODES, FAMILIES
from scaling_ray.refusals.listing import Refusal, complaints, refusals
from scaling_ray.refusals.scan import sources_here


def page(found: Iterable[Refusal]) -> str:
    """The list as Markdown."""
    lines = [
        "# Errors",
        "",
        "<!-- Written by `make errors` from the source; do not edit. -->",
        "",
        "A refusal is one line, `scaling-ray: FIELD: VALUE: CAUSE; WAY OUT [CODE]`, and an exit code. The code stays",
        "when the words change. `scaling-ray explain CODE` prints its entry offline. Below, {words} in braces stand",
        "for what differs from case to case, `a | b` for one of two texts, and `[a]` for one that may be absent.",
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "|---|---|",
        *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()),
    ]
    listed = list(found)
    for family, about in FAMILIES.items():
        rows = [refusal for refusal in listed if refusal.code[0] == family]
        lines += ["", f"## {family}: {about}", "", "| code | exit | field and value | cause | way out | from |"]
        lines.append("|---|---|---|---|---|---|")
        for row in rows:
            shown = " | ".join(_cell(cell) for cell in (row.about, row.cause, row.way_out))
            lines.append(f'| <a id="{row.code.lower()}"></a>{row.code} | {row.exit_code} | {shown} | `{row.where}` |')
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text as a cell of a Markdown table; what stands in backticks stays code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        parts = [text.replace("`", "'")]
    for at in range(0, len(parts), 2):
        for raw, safe in (("\\", "\\\\"), ("<", "&lt;"), (">", "&gt;"), ("*", "\\*"), ("_", "\\_"), ("\n", " ")):
            parts[at] = parts[at].replace(raw, safe)
    return "`".join(parts).replace("|", "\\|") or "-"


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or compare; 1 where it differs or a code is wrong."""
    parser = argparse.ArgumentParser(prog="python -m scaling_ray.refusals", description="every refusal, as Markdown")
    parser.add_argument("file", type=Path, help="the page")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    options = parser.parse_args(arguments)
    wrong = complaints(sources_here())
    for line in wrong:
        print(line, file=sys.stderr)
    made = page(refusals())
    if options.check:
        current = options.file.is_file() and options.file.read_text(encoding="utf-8") == made
        if not current:
            print(f"{options.file} is out of date; `make errors` writes it anew", file=sys.stderr)
        return int(bool(wrong) or not current)
    options.file.write_text(made, encoding="utf-8")
    return int(bool(wrong))
