"""What a donor label says: which spellings are one person, and which labels name nobody.

Two spellings of one person on two sides of a split would let the test cells of that person into training, so labels
are compared by a key and not by their letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

UNKNOWN, POOLED = "unknown", "pooled"
"""Labels of cells without a donor: nothing is known of it, or several people were mixed."""

LEAST_DONORS = 3
"""Of a split by donor: one each to train, to choose by and to test on."""

_NOBODY = frozenset(
    "unknown unk unkn unassigned unavailable unspecified undetermined undefined unidentified unmapped nan na n/a n.a. "
    "#n/a null nil none missing notavailable notapplicable notprovided notreported notcollected notspecified "
    "notassigned nodonor doublet doublets multiplet multiplets multiple several ambiguous negative mixed mixture "
    "other others ? - . --".split()
)
_POOL = re.compile(r"(donor|sample)?pool(ed)?(of)?(donors?|samples?|cells)?\d*")
_GAP = re.compile(r"[\s_\-./:,;#]+")


def is_nobody(label: str) -> bool:
    """Whether a label names no single person: "unknown", "nan", "pooled", "doublet", nothing at all."""
    folded = unicodedata.normalize("NFKC", label).casefold().strip()
    letters = re.sub(r"[\s_\-]+", "", folded)
    return not folded or folded in _NOBODY or letters in _NOBODY or is_pool(label)


def serves_a_split(labels: Iterable[str]) -> bool:
    """Whether these donors can be split: one each to train, choose by and test on. Nobody's cells may be the first."""
    found = set(labels)
    people = sum(not is_nobody(label) for label in found)
    return people + (people < len(found)) >= LEAST_DONORS


def is_pool(label: str) -> bool:
    """Whether a label names a mixture of people."""
    return bool(_POOL.fullmatch(_GAP.sub("", unicodedata.normalize("NFKC", label).casefold())))


def donor_key(label: str) -> str:
    """The same text for spellings of one person.

    Case, outer blanks, the kind of separator, a separator between letters and digits, leading zeros and the ".0" of a
    number that was read as a fraction do not count: "P1 ", "p1", "P-01" and "P_1" are one, and so are "1" and "1.0".
    "P1.1" and "P11" stay two.
    """
    text = unicodedata.normalize("NFKC", label).casefold().strip()
    text = re.sub(r"^(\d+)\.0+$", r"\1", text)
    parts = re.findall(r"\d+|[^\W\d_]+|[^\w\s\-./:,;#]+", text)
    words = [part.lstrip("0") or "0" if part.isdigit() else part for part in parts]
    # digits that a separator parted stay apart; letters and digits join whatever stands between them
    joined = "".join(
        ("-" if at and words[at - 1][-1].isdigit() and word[0].isdigit() else "") + word
        for at, word in enumerate(words)
    )
    return joined or text


def as_labels(values: pd.Series) -> np.ndarray:
    """(N,) labels as text: whole numbers without ".0", UNKNOWN or POOLED where a value names nobody."""
    given = values.astype(object).to_numpy()
    codes, distinct = pd.factorize(given)
    labels = [_as_label(value) for value in distinct]
    return np.array([*labels, UNKNOWN], dtype=object)[codes]  # factorize gives -1 to what is missing


def _as_label(value: object) -> str:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    text = re.sub(r"^(\d+)\.0+$", r"\1", text.strip())
    if is_nobody(text):
        return POOLED if is_pool(text) else UNKNOWN
    return text


def one_spelling(labels: Iterable[str]) -> dict[str, str]:
    """Label -> the spelling that its person gets: the most common one, of equally common ones the shortest.

    Args:
        labels: one for each cell (or data set); repeats count.
    """
    counts = Counter(labels)
    chosen: dict[str, str] = {}
    for label, _ in sorted(counts.items(), key=lambda item: (-item[1], len(item[0]), item[0])):
        chosen.setdefault(label if is_nobody(label) else donor_key(label), label)
    return {label: chosen[label if is_nobody(label) else donor_key(label)] for label in counts}


def respelled(spelling: Mapping[str, str]) -> list[str]:
    """A text for each person with several spellings: "p1, P1  -> P1"."""
    found: dict[str, list[str]] = {}
    for label, chosen in spelling.items():
        if label != chosen:
            found.setdefault(chosen, []).append(label)
    return [f"{', '.join(repr(name) for name in sorted(names))} as {chosen!r}" for chosen, names in found.items()]
