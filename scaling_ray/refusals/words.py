"""The texts of a call as they stand in the source, and what they say: what is wrong, what to do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping

Texts = Mapping[str, tuple[ast.expr, ...]]
"""Name -> what may be assigned to it; function -> the texts it may return."""

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


def halves(text: str, error: str) -> tuple[str, str]:
    """What is wrong and what to do, of the words of an error of this class."""
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


def text_of(node: ast.expr, texts: Texts, depth: int = 0) -> str:
    """A text as it stands in the source, with {names} for values; ``|`` between what may be one text or another."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, texts, depth) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, texts, depth)
    if isinstance(node, ast.IfExp):
        return _bracketed([text_of(each, texts, depth) for each in (node.body, node.orelse)])
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return text_of(node.values[0], texts, depth)
    if isinstance(node, ast.BinOp) and is_text(node):
        return text_of(node.left, texts, depth) + text_of(node.right, texts, depth)
    if isinstance(node, ast.List | ast.Tuple):
        return ", ".join(text_of(each, texts, depth) for each in node.elts) or "[]"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in texts:
        return text_of(node.func, texts, depth)
    if isinstance(node, ast.Name) and node.id in texts and depth < 3 and all(map(is_text, texts[node.id])):
        return _bracketed([text_of(value, texts, depth + 1) for value in texts[node.id]])
    return "{" + _name(node) + "}"


def texts_of(node: ast.expr, texts: Texts) -> list[str]:
    """Each text that an argument may be."""
    if isinstance(node, ast.IfExp):
        return [*texts_of(node.body, texts), *texts_of(node.orelse, texts)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in texts:
        node = node.func
    if isinstance(node, ast.Name) and node.id in texts and all(map(is_text, texts[node.id])):
        return [text for value in texts[node.id] for text in texts_of(value, texts)]
    return [text_of(node, texts)]


def is_text(node: ast.expr) -> bool:
    """Whether an expression is a text that the source spells out."""
    if isinstance(node, ast.IfExp):
        return is_text(node.body) and is_text(node.orelse)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and is_text(node.left) and is_text(node.right)
    if isinstance(node, ast.Name):  # a constant of a module
        return node.id.lstrip("_").isupper()
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def either(texts: Iterable[str]) -> str:
    """Texts of which one is meant."""
    return " | ".join(text for text in dict.fromkeys(texts) if text)


def _bracketed(texts: list[str]) -> str:
    """One of several texts within another."""
    return texts[0] if len(set(texts)) == 1 else f"[{either(texts)}]"


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
        called = _name(node.func)
        if called in ("join", "str", "repr", "sorted", "len", "max", "list") and inner:
            return ("number of " if called == "len" else "") + _name(inner[0])
        return _name(node.func.value) if isinstance(node.func, ast.Attribute) else called
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return _name(node.generators[0].iter)
    return next((_name(each) for each in ast.walk(node) if isinstance(each, ast.Name | ast.Attribute)), "value")
