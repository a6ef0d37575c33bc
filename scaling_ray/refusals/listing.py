"""Refusals with what they say, and what is wrong with their codes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scaling_ray.errors import EXIT_CODES, FAMILIES, ScalingRayError
from scaling_ray.refusals.scan import Site, error_classes, sites, sources_here
from scaling_ray.refusals.words import either, halves, text_of, texts_of

RETIRED: frozenset[str] = frozenset({"C064", "C065", "V023"})
"""Codes of refusals that are gone. They are never given again: somebody's log may hold one."""

CODE = re.compile(rf"[{''.join(FAMILIES)}]\d{{3}}")


@dataclass(frozen=True)
class Refusal:
    """One place that refuses something.

    ``about`` is the field and the value that are refused, or the class of an error that names none. ``words`` say why,
    with {names} for what differs from case to case; ``cause`` and ``way_out`` are their two halves. ``where`` is the
    module and the function.
    """

    code: str
    error: str
    about: str
    words: str
    cause: str
    way_out: str
    where: str

    @property
    def exit_code(self) -> int:
        """What the command line returns after it."""
        return error_classes()[self.error].exit_code if self.error in error_classes() else ScalingRayError.exit_code

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.code}  {FAMILIES[self.code[0]]}; exit code {self.exit_code} ({EXIT_CODES[self.exit_code]})",
            f"  line:    {self.about}: {self.words}" if self.error == "BadInput" else f"  line:    {self.words}",
            f"  cause:   {self.cause}",
            f"  way out: {self.way_out}",
            f"  from:    {self.where}",
        ]


def refusals(folders: Iterable[Path] | None = None) -> list[Refusal]:
    """Every refusal that has a code, sorted by it."""
    found = [
        refusal_at(site, site.code)
        for site in sites(sources_here() if folders is None else folders)
        if site.code is not None
    ]
    return sorted(found, key=lambda refusal: refusal.code)


def complaints(folders: Iterable[Path]) -> list[str]:
    """What is wrong with the codes: one that is missing or badly formed, given twice, or given again."""
    first: dict[str, str] = {}
    wrong = []
    for site in sites(folders):
        where = f"{site.file}:{site.call.lineno}"
        if site.passes_on:
            continue
        if site.code is None or not CODE.fullmatch(site.code):
            shown = ast.unparse(site.call.args[0]) if site.call.args else "nothing"
            wrong.append(f"{where}: {site.name} begins with {shown}; give a code such as {next_code(folders, 'W')}")
        elif site.code in first:
            wrong.append(f"{where}: {site.code} is that of {first[site.code]}; give another")
        elif site.code in RETIRED:
            wrong.append(f"{where}: {site.code} was that of a refusal that is gone; give another")
        else:
            first[site.code] = where
    return wrong


def next_code(folders: Iterable[Path], family: str) -> str:
    """The first code of a family that was never given."""
    given = [*RETIRED, *(site.code for site in sites(folders) if site.code)]
    numbers = [int(code[1:]) for code in given if CODE.fullmatch(code) and code[0] == family]
    return f"{family}{max(numbers, default=0) + 1:03d}"


def refusal_at(site: Site, code: str) -> Refusal:
    """What the call at a place says."""
    *before, last = site.call.args[1:4] if site.name == "BadInput" else site.call.args[1:2]
    where = f"{site.file} {site.function}".strip()
    about = ": ".join(text_of(each, site.texts) for each in before)
    texts = texts_of(last, site.texts)
    pairs = [halves(text, site.name) for text in texts]
    cause, way_out = (either(half) for half in zip(*pairs, strict=True))
    if not about:
        about = f"({site.name})"
        if not re.search("[a-z]{3}", re.sub(r"{[^}]*}", "", cause)):  # the words come from elsewhere
            described = error_classes()[site.name].__doc__ if site.name in error_classes() else None
            cause = (described or site.name).split("\n")[0].split(";")[0].rstrip(".")
    return Refusal(code, site.name, about, either(texts), cause, way_out, where)
