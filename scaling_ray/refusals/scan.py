"""Where errors of the package are constructed."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scaling_ray import errors
from scaling_ray.errors import ScalingRayError
from scaling_ray.refusals.words import Texts, is_text


@dataclass(frozen=True)
class Site:
    """A call that constructs an error: its class, its arguments, the names that stand for texts around it."""

    file: str
    function: str
    call: ast.Call
    name: str
    texts: Texts

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
    package = Path(__file__).parent.parent
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


def _sites_in(file: str, tree: ast.Module, names: frozenset[str], constants: Texts) -> Iterator[Site]:
    def walk(node: ast.AST, path: tuple[str, ...], texts: Texts) -> Iterator[Site]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            path = (*path, node.name)
        if isinstance(node, ast.FunctionDef):
            own = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
            texts = {name: values for name, values in texts.items() if name not in own}
        if isinstance(node, ast.Call) and (name := _called(node.func)) in names:
            yield Site(file, ".".join(path), node, name, texts)
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


def _called(function: ast.expr) -> str:
    """The class that is called, as BadInput or as errors.BadInput."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _perhaps_assigned(node: ast.stmt, known: Texts) -> dict[str, tuple[ast.expr, ...]]:
    """Name -> what it may be after a statement that has others inside."""
    inside = _assigned(node)
    return {name: (*(known[name] if name in known else ()), *values) for name, values in inside.items()}


def _assigned(node: ast.AST, deep: bool = True) -> dict[str, tuple[ast.expr, ...]]:
    """Name -> what is assigned to it in a statement, or at the top of a module; function -> the texts it returns."""
    found: dict[str, tuple[ast.expr, ...]] = {}
    for each in ast.walk(node) if deep else ast.iter_child_nodes(node):
        if isinstance(each, ast.FunctionDef) and not deep:
            returned = tuple(one.value for one in ast.walk(each) if isinstance(one, ast.Return) and one.value)
            if returned and all(map(is_text, returned)):
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
    names = set(error_classes())
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in names for b in node.bases):
                names.add(node.name)
    return frozenset(names)


@cache
def error_classes() -> Mapping[str, type[ScalingRayError]]:
    """Name -> class of everything in ``scaling_ray.errors``."""
    every = vars(errors).items()
    return {name: each for name, each in every if isinstance(each, type) and issubclass(each, ScalingRayError)}
