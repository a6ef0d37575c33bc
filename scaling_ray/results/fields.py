"""One field of a table as a number: thousands, decimal commas, 125M and 1.3B, percent, and fields that say nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scaling_ray.errors import BadInput

Sign = Literal[".", ","]

_MULTIPLES = {
    "k": 1e3,
    "thousand": 1e3,
    "m": 1e6,
    "mm": 1e6,
    "mn": 1e6,
    "mio": 1e6,
    "million": 1e6,
    "b": 1e9,
    "g": 1e9,
    "bn": 1e9,
    "mrd": 1e9,
    "billion": 1e9,
    "t": 1e12,
    "tn": 1e12,
    "trillion": 1e12,
}
_THINGS = r"(?:params?|parameters?|tokens?|toks?|cells?|flops?)"
_NUMBER = re.compile(r"([+-]?(?:\d[\d.,]*|\.\d+))(?:[eE]([+-]?\d+)|\s*[x×*]\s*10\s*(?:\^|\*\*)\s*([+-]?\d+))?\s*(.*)")
_GAPS = re.compile(r"(?<=\d)[ \u00a0\u2009\u202f'’_](?=\d{3}(?!\d))")
_BY_COMMA, _BY_POINT = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+"), re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+")
_UNKNOWN = frozenset(("", "nan", "none", "null", "na", "n/a", "#n/a", "<na>", "nil", "-", "--", "?"))


@dataclass(frozen=True)
class Number:
    """What a field says: ``value`` with its multiple and percent applied, and the ``mark`` that said so ("", M, %)."""

    value: float
    mark: str


def is_unknown(value: Any) -> bool:
    """Whether a field says that its value is not known: empty, NaN in words or as a number, n/a, null."""
    if value is None:
        return True
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, str) and value.strip().lower() in _UNKNOWN


def multiple_of(word: str) -> float | None:
    """The factor that "M", "billions", "in thousands", "1e6" or "10^9 tokens" stand for; None for another word."""
    plain = re.sub(rf"^(?:in|x|×)\s*|\s*(?:of\s+)?{_THINGS}$", "", word.strip().lower()).strip()
    if re.fullmatch(r"1e\+?\d+", plain):
        return float(plain)
    if power := re.fullmatch(r"10\s*(?:\^|\*\*)\s*(\d+)", plain):
        return 10.0 ** int(power[1])
    return _MULTIPLES.get(plain) or _MULTIPLES.get(plain.removesuffix("s"))


def decimal_sign(fields: Iterable[Any], separator: str) -> Sign:
    """The decimal sign that the numbers of a table are written with, from those that can be read in one way only.

    Args:
        fields: texts of all columns that are read as numbers.
        separator: between the fields of a line. Where nothing else decides, a semicolon or tab lets 2,001 be decimal.

    Raises:
        BadInput: one number has a decimal comma and another a decimal point.
    """
    comma = point = unsure = ""
    for field in fields:
        text = _digits(field)
        last, commas, points = max(text.rfind(","), text.rfind(".")), text.count(","), text.count(".")
        if last < 0:
            continue
        if commas and points:
            comma, point = (text, point) if text[last] == "," else (comma, text)
        elif commas > 1:
            point = text
        elif points > 1:
            comma = text
        elif commas and not _BY_COMMA.fullmatch(text):
            comma = text
        elif points and not _BY_POINT.fullmatch(text):
            point = text
        elif commas:
            unsure = text
    if comma and point:
        raise BadInput(
            "T024", "table", f"{comma} and {point}", "a decimal comma and a decimal point; write numbers in one way"
        )
    return "," if comma or (unsure and not point and separator in ";\t|") else "."


def _digits(field: Any) -> str:
    """Digits, commas and points at the beginning of a field; nothing for a field that is no number."""
    found = _NUMBER.fullmatch(_GAPS.sub("", field.strip())) if isinstance(field, str) else None
    return found[1] if found and (found[4] in ("", "%") or multiple_of(found[4])) else ""


def parse(field: Any, sign: Sign = ".") -> Number | None:
    """The number that a field holds; None where it holds none.

    "125M", "1.3 billion", "100,000", "1 000", "3e8", "2 x 10^9", "45 %" are numbers, and "0,5" with a decimal comma.
    """
    if isinstance(field, bool) or field is None:
        return None
    if not isinstance(field, str):
        try:
            return Number(float(field), "")
        except (TypeError, ValueError):
            return None
    text = _GAPS.sub("", field.strip().replace("\u2212", "-"))
    found = _NUMBER.fullmatch(text)
    if not found:
        return Number(float(text), "") if text.lower().lstrip("+-") in ("inf", "infinity", "nan") else None
    digits, power, ten, word = found.groups()
    factor = 0.01 if word == "%" else 1.0 if not word else multiple_of(word)
    if re.fullmatch(_THINGS, word, re.IGNORECASE):
        factor, word = 1.0, ""
    grouped, other = (_BY_POINT, ".") if sign == "," else (_BY_COMMA, ",")
    whole, _, fraction = digits.partition(sign)
    if factor is None or other in fraction or sign in fraction or (other in whole and not grouped.fullmatch(whole)):
        return None
    # The text goes to float in one piece, so that a plain number is read to its last digit.
    value = float(f"{whole.replace(other, '')}.{fraction or '0'}e{power or ten or 0}")
    return Number(value if factor == 1.0 else value / 100 if word == "%" else value * factor, word)


def numbers(name: str, fields: Sequence[Any], sign: Sign, scale: float = 1.0) -> tuple[list[Any], set[str]]:
    """The fields of one column as numbers, times ``scale``, and the marks (M, B, %) that they carry.

    A field that is not known is None; one that is no number stays as it is, for the fit to name. Fields that carry a
    multiple of their own are not multiplied again.

    Raises:
        BadInput: marks of different kinds, or a small plain number beside others that are in millions.
    """
    read = [None if is_unknown(field) and not _is_nan(field) else parse(field, sign) for field in fields]
    marks = {number.mark for number in read if number is not None}
    shown = marks - {""}
    plain = [number.value for number in read if number is not None and not number.mark]
    if "%" in marks and len(marks) > 1:
        raise BadInput(
            "T025", name, ", ".join(sorted(marks - {"%", ""}) or ["plain numbers"]), "beside percent; use one of them"
        )
    if shown - {"%"} and any(0 < abs(value) < 1e3 for value in plain):
        small = min((value for value in plain if value), key=abs)
        raise BadInput(
            "T026", name, f"{small:g}", f"beside numbers in {', '.join(sorted(shown))}; write all of them in one way"
        )
    values: list[Any] = []
    for field, number in zip(fields, read, strict=True):
        if number is None:
            values.append(None if is_unknown(field) else field)
        else:
            values.append(number.value if number.mark or scale == 1.0 else number.value * scale)
    return values, shown


def _is_nan(field: Any) -> bool:
    """A loss that is NaN is a run that went wrong, and not one that was not measured."""
    return isinstance(field, str) and field.strip().lower() == "nan"
