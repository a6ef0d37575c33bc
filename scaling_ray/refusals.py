"""Every refusal of the package, read from its source: code, line, cause and way out, and where it is raised.

``python -m scaling_ray.refusals docs/errors.md`` writes the list (``make errors``), ``--check`` says whether it is the
one that the source gives. ``scaling-ray explain CODE`` reads the same source, so it needs no list beside it.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scaling_ray import errors
from scaling_ray.errors import EXIT_CODES, FAMILIES, ScalingRayError

RETIRED: frozenset[str] = frozenset()
"""Codes of refusals that are gone. They are never given again: somebody's log may hold one."""

CODE = re.compile(rf"[{''.join(FAMILIES)}]\d{{3}}")
_INSTRUCTION = re.compile(r"(add|choose|expected|give|goes with|must|name|needs)\b")
_ORDER = re.compile(r"(add|choose|give|name)\b")
_ANOTHER_VALUE = "another value is needed here"
_WAYS_OUT = {
    "ClusterUnreachable": "start Ray on this machine, or show the token of its cluster",
    "DamagedFiles": "restore the files that are named, or build the shards again",
    "Diverged": "lower the learning rate",
    "LeaseHeld": "wait until that driver has ended, or stop it; then call again",
    "Lost": "none is needed: the sweep tries the run again",
    "MetadataFailure": "none is needed: it is asked again; `scaling-ray node-watch --once` shows what it answers",
    "ScalingRayError": "see what the server says, and call again",
    "Stalled": "none is needed: the sweep tries the run again",
    "StorageFailed": "make room, and call again to go on",
}
"""What to do about errors whose line does not say it."""


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
        return _classes()[self.error].exit_code if self.error in _classes() else ScalingRayError.exit_code

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.code}  {FAMILIES[self.code[0]]}; exit code {self.exit_code} ({EXIT_CODES[self.exit_code]})",
            f"  line:    {self.about}: {self.words}" if self.error == "BadInput" else f"  line:    {self.words}",
            f"  cause:   {self.cause}",
            f"  way out: {self.way_out}",
            f"  from:    {self.where}",
        ]


@dataclass(frozen=True)
class Site:
    """A call that constructs an error: its class, its arguments, the names that stand for texts around it."""

    file: str
    function: str
    call: ast.Call
    name: str
    texts: Mapping[str, tuple[ast.expr, ...]]

    @property
    def code(self) -> str | None:
        """The code that is written here; None where that of another error is passed on, or where none is written."""
        first = self.call.args[0] if self.call.args else None
        return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None

    @property
    def passes_on(self) -> bool:
        """Whether the code is that of an error that was caught."""
        first = self.call.args[0] if self.call.args else None
        return isinstance(first, ast.Attribute) and first.attr == "code"


def sources_here() -> list[Path]:
    """The folders that are read: the package and, in a checkout, its jobs and benchmarks."""
    package = Path(__file__).parent
    beside = [package.parent / name for name in ("jobs", "benchmarks")]
    return [package, *(folder for folder in beside if (package.parent / "pyproject.toml").is_file())]


def sites(folders: Iterable[Path]) -> Iterator[Site]:
    """Every call that constructs an error of the package, in the order of files and lines."""
    trees = {
        f"{folder.name}/{path.relative_to(folder).as_posix()}": ast.parse(path.read_text(encoding="utf-8"), str(path))
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
    }
    names = _error_names(trees.values())
    constants = _constants(trees.values())
    for file, tree in trees.items():
        if not file.endswith("scaling_ray/errors.py"):
            yield from sorted(_sites_in(file, tree, names, constants), key=lambda site: site.call.lineno)


def refusals(folders: Iterable[Path] | None = None) -> list[Refusal]:
    """Every refusal that has a code, sorted by it."""
    found = [
        _refusal(site, site.code)
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


def _sites_in(
    file: str, tree: ast.Module, names: frozenset[str], constants: Mapping[str, tuple[ast.expr, ...]]
) -> Iterator[Site]:
    def walk(node: ast.AST, path: tuple[str, ...], texts: Mapping[str, tuple[ast.expr, ...]]) -> Iterator[Site]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            path = (*path, node.name)
        if isinstance(node, ast.FunctionDef):
            own = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
            texts = {name: values for name, values in texts.items() if name not in own}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield Site(file, ".".join(path), node, node.func.id, texts)
        for _, below in ast.iter_fields(node):
            known = texts
            for each in below if isinstance(below, list) else [below]:
                if isinstance(each, ast.AST):
                    yield from walk(each, path, known)
                if isinstance(each, ast.Assign):
                    known = {**known, **_assigned(each)}
                elif isinstance(each, ast.stmt) and not isinstance(each, ast.FunctionDef | ast.ClassDef):
                    known = {**known, **_perhaps_assigned(each, known)}

    return walk(tree, (), {**constants, **_assigned(tree, deep=False)})


def _perhaps_assigned(node: ast.stmt, known: Mapping[str, tuple[ast.expr, ...]]) -> dict[str, tuple[ast.expr, ...]]:
    """Name -> what it may be after a statement that has others inside."""
    inside = _assigned(node)
    return {name: (*(known[name] if name in known else ()), *values) for name, values in inside.items()}


def _assigned(node: ast.AST, deep: bool = True) -> dict[str, tuple[ast.expr, ...]]:
    """Name -> what is assigned to it in a statement, or at the top of a module; function -> the texts it returns."""
    found: dict[str, tuple[ast.expr, ...]] = {}
    for each in ast.walk(node) if deep else ast.iter_child_nodes(node):
        if isinstance(each, ast.FunctionDef) and not deep:
            returned = tuple(one.value for one in ast.walk(each) if isinstance(one, ast.Return) and one.value)
            if returned and all(map(_is_text, returned)):
                found[each.name] = returned
        if isinstance(each, ast.Assign):
            for target in each.targets:
                pairs = [(target, each.value)]
                if isinstance(target, ast.Tuple) and isinstance(each.value, ast.Tuple):
                    pairs = list(zip(target.elts, each.value.elts, strict=False))
                for name, value in pairs:
                    if isinstance(name, ast.Name):
                        found[name.id] = (*(found[name.id] if name.id in found else ()), value)
    return found


def _constants(trees: Iterable[ast.Module]) -> dict[str, tuple[ast.expr, ...]]:
    """Names in capitals that stand for one text in the whole package: a module imports them from another."""
    found: dict[str, dict[str, ast.expr]] = {}
    for tree in trees:
        for name, values in _assigned(tree, deep=False).items():
            for value in values:
                if name.lstrip("_").isupper() and isinstance(value, ast.Constant | ast.JoinedStr):
                    found.setdefault(name, {})[ast.unparse(value)] = value
    return {name: tuple(values.values()) for name, values in found.items() if len(values) == 1}


def _error_names(trees: Iterable[ast.Module]) -> frozenset[str]:
    """Names of the error classes: those of ``errors``, and what other modules derive from them."""
    names = set(_classes())
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in names for b in node.bases):
                names.add(node.name)
    return frozenset(names)


@cache
def _classes() -> Mapping[str, type[ScalingRayError]]:
    every = vars(errors).items()
    return {name: each for name, each in every if isinstance(each, type) and issubclass(each, ScalingRayError)}


def _refusal(site: Site, code: str) -> Refusal:
    *before, last = site.call.args[1:4] if site.name == "BadInput" else site.call.args[1:2]
    where = f"{site.file} {site.function}".strip()
    about = ": ".join(_text(each, site.texts) for each in before)
    texts = _texts(last, site.texts)
    halves = [_halves(text, site.name) for text in texts]
    cause, way_out = (_either(half) for half in zip(*halves, strict=True))
    if not about:
        about = f"({site.name})"
        if not re.search("[a-z]{3}", re.sub(r"{[^}]*}", "", cause)):  # the words come from elsewhere
            described = _classes()[site.name].__doc__ if site.name in _classes() else None
            cause = (described or site.name).split("\n")[0].split(";")[0].rstrip(".")
    return Refusal(code, site.name, about, _either(texts), cause, way_out, where)


def _halves(text: str, error: str) -> tuple[str, str]:
    """What is wrong, and what to do."""
    first, second = _cut(text, "; ")
    if second:
        return (second, first) if _ORDER.match(first) and not _ORDER.match(second) else (first, second)
    if _INSTRUCTION.match(text):
        return _ANOTHER_VALUE, text
    first, second = _cut(text, ". ")
    if second:
        return first, second
    return text, _WAYS_OUT[error] if error in _WAYS_OUT else "correct what the line names"


def _cut(text: str, separator: str) -> tuple[str, str]:
    """A text before and after the first separator that stands in no bracket; without one, nothing comes after."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0 and text.startswith(separator, at):
            return text[:at], text[at + len(separator) :]
    return text, ""


def _text(node: ast.expr, texts: Mapping[str, tuple[ast.expr, ...]], depth: int = 0) -> str:
    """A text as it stands in the source, with {names} for values; ``|`` between what may be one text or another."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, texts, depth) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, texts, depth)
    if isinstance(node, ast.IfExp):
        return _bracketed([_text(each, texts, depth) for each in (node.body, node.orelse)])
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return _text(node.values[0], texts, depth)
    if isinstance(node, ast.BinOp) and _is_text(node):
        return _text(node.left, texts, depth) + _text(node.right, texts, depth)
    if isinstance(node, ast.List | ast.Tuple):
        return ", ".join(_text(each, texts, depth) for each in node.elts) or "[]"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in texts:
        return _text(node.func, texts, depth)
    if isinstance(node, ast.Name) and node.id in texts and depth < 3 and all(map(_is_text, texts[node.id])):
        return _bracketed([_text(value, texts, depth + 1) for value in texts[node.id]])
    return "{" + _name(node) + "}"


def _texts(node: ast.expr, texts: Mapping[str, tuple[ast.expr, ...]]) -> list[str]:
    """Each text that an argument may be."""
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, texts), *_texts(node.orelse, texts)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in texts:
        node = node.func
    if isinstance(node, ast.Name) and node.id in texts and all(map(_is_text, texts[node.id])):
        return [text for value in texts[node.id] for text in _texts(value, texts)]
    return [_text(node, texts)]


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and _is_text(node.left) and _is_text(node.right)
    if isinstance(node, ast.Name):  # a constant of a module
        return node.id.lstrip("_").isupper()
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _either(texts: Iterable[str]) -> str:
    return " | ".join(text for text in dict.fromkeys(texts) if text)


def _bracketed(texts: list[str]) -> str:
    """One of several texts within another."""
    return texts[0] if len(set(texts)) == 1 else f"[{_either(texts)}]"


def _name(node: ast.AST) -> str:
    """A word for a value."""
    if isinstance(node, ast.Name):
        return node.id.strip("_").lower()
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_").lower()
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.BinOp):
        return _name(node.left)
    if isinstance(node, ast.Call):
        inner = [each for each in node.args if not isinstance(each, ast.Constant)]
        named = {"join": inner, "str": inner, "repr": inner, "sorted": inner, "len": inner, "max": inner, "list": inner}
        called = _name(node.func)
        if called in named and inner:
            return ("number of " if called == "len" else "") + _name(inner[0])
        return _name(node.func.value) if isinstance(node.func, ast.Attribute) else called
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return _name(node.generators[0].iter)
    return next((_name(each) for each in ast.walk(node) if isinstance(each, ast.Name | ast.Attribute)), "value")


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
        "",
        "From the keyboard (Ctrl-C) a verb ends with 130, as in every shell; the same command goes on.",
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


if __name__ == "__main__":
    sys.exit(main())
