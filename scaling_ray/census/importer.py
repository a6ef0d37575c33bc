"""Makes a local Census out of files of cells with raw counts: each file a data set, genes joined on feature_id.

Nothing is taken without a word: a table says what was believed of each file and of all together, and why.
``check_files`` makes the same table and no Census.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scaling_ray.census.beliefs import Rules, believe
from scaling_ray.census.columns import DONOR_IS_FILE, has_column
from scaling_ray.census.features import known_names
from scaling_ray.census.h5ad import CellFile
from scaling_ray.census.joining import File, Joined, counts_of, join
from scaling_ray.census.layout import OBS_STRING_COLUMNS, TWIN_OF, CensusWriter, Dataset, existing
from scaling_ray.census.matrices import FoundCounts, find_counts
from scaling_ray.census.readers import cell_file_name, open_cells
from scaling_ray.errors import BadInput
from scaling_ray.pace import Pace
from scaling_ray.storage import file_sha256

BELIEFS_NAME = "import.json"
"""Beside the Census: the table of its import, for whoever asks later."""

Say = Callable[[str], None]


def import_h5ad(
    files: Sequence[Path],
    out: Path,
    *,
    layer: str | None = None,
    rules: Rules | None = None,
    progress: Say | None = None,
    before: Callable[[Joined], None] | None = None,
) -> Path:
    """Writes a local Census at ``out`` from one or more files of cells (``census.readers`` names the formats).

    Args:
        files: each becomes one data set, named after the file.
        out: directory to appear; ``Census.open(out)`` reads it. A complete import of the same files by the same rules
            is left as is.
        layer: ``X``, ``raw.X`` or the name of a layer, where more than one place holds raw counts.
        rules: what the user asked for; ``layer`` is one of them.
        progress: called with one line of text now and then, and with the table of what was believed.
        before: called with what was believed before anything is written; what it raises ends the import.

    Raises:
        BadInput: a file that cannot be read, no raw counts (with the reason for each place), differing candidates, gene
            ids that repeat, several species, or ``out`` holding something else.
    """
    out, files = Path(out), [Path(f) for f in files]
    say = progress or (lambda line: None)
    asked = rules or Rules(layer=layer)
    names = _dataset_ids(files)
    about = {
        "kind": "imported",
        "files": {name: _content_sha256(file) for name, file in zip(names, files, strict=True)},
        "rules": json.loads(json.dumps(asdict(asked))),
    }
    record = existing(out)
    if record is not None:
        if {name: record["about"].get(name) for name in about} == about:
            say(f"{out}: already there")
            return out
        other = "of other files" if record["about"].get("files") != about["files"] else "by other flags"
        made = f"holds a Census that was imported {other}" if "files" in record["about"] else "holds another Census"
        raise BadInput("C012", "out", str(out), f"{made}; remove it or name a new directory")
    with _believed(files, names, asked, say) as found:
        if before is not None and found is not None:
            before(found)
        return _write(out, found, asked, about, say)


def check_files(files: Sequence[Path], rules: Rules, show: Say) -> None:
    """Show what an import would believe of the files, and why; nothing is written.

    A file that would be refused is told in its place in the table, and the others are looked at all the same.

    Raises:
        BadInput: the first refusal, after the table.
    """
    files = [Path(f) for f in files]
    with _believed(files, _dataset_ids(files), rules, show, keep_going=True):
        pass


def _dataset_ids(files: Sequence[Path]) -> list[str]:
    """A name for each file: its own, with its folder's before it where two have one name."""
    if not files:
        raise BadInput("C013", "files", [], "name at least one file of cells")
    for file in files:
        if not file.exists():
            raise BadInput("C014", "file", str(file), "does not exist; correct its name")
    names = [cell_file_name(file) for file in files]
    again = Counter(names)
    names = [
        f"{file.absolute().parent.name}.{name}" if again[name] > 1 else name
        for name, file in zip(names, files, strict=True)
    ]
    if len(set(names)) < len(names):
        raise BadInput("C015", "files", names, "two files of one name; a file's name becomes its dataset_id")
    return names


def _content_sha256(path: Path) -> str:
    """Of a file, or of a folder's files with their places in it."""
    if path.is_file():
        return file_sha256(path)
    whole = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\n".encode())
    return whole.hexdigest()


@contextmanager
def _believed(
    files: list[Path], names: list[str], rules: Rules, say: Say, keep_going: bool = False
) -> Iterator[Joined | None]:
    """The files, open and believed, every table told; None where ``keep_going`` met a refusal, raised at the end."""
    refused: dict[int, BadInput] = {}
    found: Joined | None = None
    with ExitStack() as stack:
        opened: dict[int, tuple[CellFile, FoundCounts]] = {}
        for at, path in enumerate(files):
            try:
                cells = stack.enter_context(open_cells(path))
                opened[at] = cells, find_counts(cells, rules.layer, trust_counts=rules.trust_counts)
            except BadInput as error:
                if not keep_going:
                    raise
                refused[at] = error
        _check_donor_flags([cells.obs for cells, _ in opened.values()], rules)
        known: dict[str, str] = {}
        for _, counts in opened.values():
            known = known_names(counts.var) | known
        believed: list[File] = []
        for at, (path, name) in enumerate(zip(files, names, strict=True)):
            try:
                if at in opened:
                    believed.append((opened[at][0], believe(*opened[at], name, rules, known)))
            except BadInput as error:
                if not keep_going:
                    raise
                refused[at] = error
            for line in [path.name, f"  REFUSED    {refused[at]}"] if at in refused else believed[-1][1].table():
                say(line)
        if believed and not refused:
            found = join(believed, rules)
            for line in found.table():
                say(line)
        yield found
    if refused:
        raise refused[min(refused)]


def _check_donor_flags(tables: list[pd.DataFrame], rules: Rules) -> None:
    for name in rules.donor:
        if tables and name != DONOR_IS_FILE and not any(has_column(table, name) for table in tables):
            held = ", ".join(map(str, tables[0].columns[:12])) or "no column"
            raise BadInput("C016", "--donor", name, f"is no obs column of any file; the first has {held}")


def _write(out: Path, joined: Joined | None, rules: Rules, about: dict[str, object], say: Say) -> Path:
    assert joined is not None
    beliefs = [belief for _, belief in joined.files]
    presence = np.zeros((len(beliefs), len(joined.feature_id)), bool)
    for row, column in enumerate(joined.column):
        presence[row, column] = True
    n_cells = sum(len(frame) for frame in joined.obs)
    starts = np.cumsum([0, *(len(frame) for frame in joined.obs)])
    var = pd.DataFrame({"feature_id": joined.feature_id, "feature_name": joined.feature_name, "feature_length": 0})
    title = rules.title
    with CensusWriter(
        out,
        var=var,
        datasets=[
            Dataset(
                belief.dataset_id,
                belief.dataset_id if title is None else title if len(beliefs) == 1 else f"{title}: {belief.dataset_id}",
                "imported" if title is None else title,
                "imported",
                rules.source or belief.file,
            )
            for belief in beliefs
        ],
        presence=presence,
        n_cells=n_cells,
        categories={c: sorted({str(v) for frame in joined.obs for v in frame[c].unique()}) for c in OBS_STRING_COLUMNS},
        build_tag="imported",
        organism=joined.organism,
        twins=joined.twin_of is not None,
    ) as writer:
        pace = Pace("imported", n_cells, say)
        for at, (file, column) in enumerate(zip(joined.files, joined.column, strict=True)):
            frame = joined.obs[at]
            if joined.twin_of is not None:
                frame[TWIN_OF] = joined.twin_of[starts[at] : starts[at + 1]]
            first = 0
            for counts in counts_of(file):
                stop = first + counts.shape[0]
                shape = (counts.shape[0], len(joined.feature_id))
                wide = sp.csr_matrix((counts.data, column[counts.indices], counts.indptr), shape=shape)
                wide.sort_indices()
                if stop > first:
                    writer.append(frame.iloc[first:stop], wide)
                first = stop
                pace.add(counts.shape[0])
        about = about | {
            "counts_from": {belief.file: belief.counts.place for belief in beliefs},
            "columns": {belief.file: belief.columns.mapped for belief in beliefs},
            "set_to_unknown": {belief.file: list(belief.columns.missing) for belief in beliefs},
        }
        told = {"files": [belief.table() for belief in beliefs], "together": joined.table()}
        return writer.publish(about=about, documents={BELIEFS_NAME: json.dumps(told, indent=1) + "\n"})
