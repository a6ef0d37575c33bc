"""A file of runs as named columns of fields: separators, byte-order marks, blank lines, an index column, Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_ray.errors import BadInput
from scaling_ray.results.fields import is_unknown, parse

if TYPE_CHECKING:
    import pyarrow as pa

_SEPARATORS = ",;\t|"
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
_INDEX = re.compile(r"Unnamed: 0|__index_level_\d+__|index|idx|#|row|row_?number|", re.IGNORECASE)
_UNNAMED = re.compile(r"Unnamed: \d+")


@dataclass(frozen=True)
class Fields:
    """A table as it stands in its file: ``columns`` header -> R fields (None where empty), in the order of the file.

    ``separator`` stood between the fields of a line; ``notes`` say what was left out, one line each.
    """

    columns: dict[str, list[Any]]
    separator: str
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), []))


def read_fields(path: Path) -> Fields:
    """The fields of a .parquet file, or of a text file with one line per run under a line of names.

    Raises:
        BadInput: no such file, not a table, no rows, or two columns of one name that differ.
    """
    if not path.is_file():
        raise BadInput(
            "T009",
            "table",
            str(path),
            "no such file; correct its name" if not path.exists() else "is no file; name one",
        )
    if path.suffix == ".parquet":
        header, records, separator, notes = *_parquet(path), ",", list[str]()
    else:
        header, records, separator = _lines(path)
        notes = [] if separator == "," else [f"fields are separated by {_NAMES[separator]}"]
    return _fields(header, records, separator, notes, str(path))


def fields_in(table: pa.Table, name: str) -> Fields:
    """The fields of a table that is in memory; BadInput as :func:`read_fields`, about a table of this name."""
    return _fields(*_arrow(table), ",", [], name)


def _fields(header: list[str], records: list[list[Any]], separator: str, notes: list[str], source: str) -> Fields:
    blank = [all(value is None for value in record) for record in records]
    if any(blank):
        notes.append(f"{sum(blank)} blank rows left out")
    records = [record for record, nothing in zip(records, blank, strict=True) if not nothing]
    if not records:
        raise BadInput("T010", "table", source, "has no rows; give a row for each run")
    if all(parse(name) is not None for name in header):
        raise BadInput(
            "T011",
            "table",
            ", ".join(header),
            "its first line should name the columns, as in params,seed,loss; add that line",
        )
    columns: dict[str, list[Any]] = {}
    for number, (name, *values) in enumerate(zip(header, *records, strict=True)):
        name = name or f"Unnamed: {number}"
        if _UNNAMED.fullmatch(name) and all(value is None for value in values):
            continue
        if _is_index(name, values):
            notes.append(f"{name or 'the first column'!r} numbers the rows and is not read")
        elif name not in columns:
            columns[name] = values
        elif columns[name] == values:
            notes.append(f"{name} stands in the table twice with equal values; one is read")
        else:
            raise BadInput(
                "T012", name, f"{header.count(name)} columns", "two columns of one name; rename or remove one"
            )
    return Fields(columns, separator, tuple(notes))


def _is_index(name: str, values: Sequence[Any]) -> bool:
    """Whether a column does nothing but number the rows."""
    if not _INDEX.fullmatch(name):
        return False
    texts = [str(value) for value in values]
    return all(re.fullmatch(r"\d+(\.0)?", text) for text in texts) and len(set(texts)) == len(texts)


def _lines(path: Path) -> tuple[list[str], list[list[Any]], str]:
    """Names, records and separator of a text file."""
    text = _text(path)
    said = re.match(r'"?sep=(.)"?\r?\n', text)
    if said:
        text = text[said.end() :]
    # Lines of comment stand above the names only.
    while re.match(r"#[^,;\t|\r\n]*\r?\n", text):
        text = text.partition("\n")[2]
    separator = said[1] if said else _separator(text)
    try:
        if separator == " ":
            spaced = csv.reader(io.StringIO(text, newline=""), delimiter=" ", skipinitialspace=True, strict=True)
            lines = [[field for field in line if field] for line in spaced]
        else:
            lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise BadInput("T013", "table", str(path), f"is not a CSV table ({error}); correct that line") from error
    first = _line_of_names(lines)
    header = [name.strip() for name in lines[first]] if lines[first:] else []
    rows = lines[first + 1 :]
    filled = [line for line in rows if any(field.strip() for field in line)]
    if header and filled and all(len(line) == len(header) + 1 and line[-1].strip() for line in filled):
        header = ["", *header]  # as R writes the names of rows: without a name above them
    records = []
    for number, line in enumerate(rows, start=first + 2):
        fields = [field.strip() for field in line]
        if not any(fields):
            fields = [""] * len(header)
        if len(fields) < len(header) or any(fields[len(header) :]):
            raise BadInput(
                "T014",
                "table",
                f"{path.name} line {number}",
                f"does not have the {len(header)} fields of its header; correct that line",
            )
        records.append([field or None for field in fields[: len(header)]])
    return header, records, separator


def _line_of_names(lines: Sequence[Sequence[str]]) -> int:
    """Position of the header: the first line that is not blank, and not a title over lines of several fields."""
    widths = [sum(bool(field.strip()) for field in line) for line in lines]
    several = sum(width > 1 for width in widths) > len([width for width in widths if width]) / 2
    return next((i for i, width in enumerate(widths) if width > int(several)), len(lines))


def _text(path: Path) -> str:
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadInput("T015", "table", str(path), f"is not a CSV table in UTF-8 ({error}); save it as one") from error
    if "\0" in text:
        raise BadInput("T016", "table", str(path), "is not a CSV table; save it as one")
    return text


def _separator(text: str) -> str:
    """What separates most names of the header, of those that give every line as many fields."""
    lines = [line for line in text.splitlines() if line.strip()][:200]
    best, most = ",", (False, 1)
    for separator in _SEPARATORS:
        widths = [len(fields) for fields in csv.reader(lines, delimiter=separator) if any(fields)]
        found = (min(widths, default=0) >= widths[0], widths[0]) if widths else (False, 0)
        if widths and widths[0] > 1 and found > most:
            best, most = separator, found
    if most == (False, 1) and lines and len(lines[0].split()) > 1:
        widths = [len(line.split()) for line in lines]
        return " " if len(set(widths[1:])) == 1 and widths[1] - widths[0] in (0, 1) else ","
    return best


def _parquet(path: Path) -> tuple[list[str], list[list[Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput("T017", "table", str(path), f"is not a Parquet file ({error}); write it again") from error
    return _arrow(table)


def _arrow(table: pa.Table) -> tuple[list[str], list[list[Any]]]:
    fields = [[None if is_unknown(value) else value for value in column.to_pylist()] for column in table.columns]
    return list(table.column_names), [list(record) for record in zip(*fields, strict=True)]
