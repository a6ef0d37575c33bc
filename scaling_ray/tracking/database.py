"""A sqlite tracking database, looked at before MLflow opens it: locked, half-made or no database at all.

A migration that was cut off (a full disk, a kill) leaves tables that every later start of MLflow trips over. All that
the database held is in the sweeps' own files, so the way out is to move it aside and replay.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from scaling_ray.errors import BadInput

_WAY_OUT = "move that file aside; `scaling-ray track replay SWEEP_DIR` logs all of it again from the sweep's files"
_LOCKED = "is locked by another program; end that one, or name a tracking server in MLFLOW_TRACKING_URI"


def check_database(uri: str, wait_seconds: float = 5.0) -> None:
    """Raise BadInput where ``uri`` names a sqlite file that MLflow could not use; other URIs are not looked at."""
    path = database_file(uri)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            "K001", "MLFLOW_TRACKING_URI", uri, f"its folder cannot be made ({error.strerror}); name another"
        ) from error
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=wait_seconds)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
            versioned = "alembic_version" in tables and bool(list(database.execute("SELECT 1 FROM alembic_version")))
    except sqlite3.OperationalError as error:
        remedy = _LOCKED if "locked" in str(error) else f"cannot be used ({error}); {_WAY_OUT}"
        raise BadInput("K002", "MLFLOW_TRACKING_URI", uri, remedy) from error
    except sqlite3.DatabaseError as error:
        raise BadInput("K003", "MLFLOW_TRACKING_URI", uri, f"is no whole database ({error}); {_WAY_OUT}") from error
    left = sorted(name for name in tables if name.startswith("_alembic_tmp_"))
    if left or (tables and not versioned):
        why = f"table {left[0]} was left behind" if left else "it has tables and no version"
        raise BadInput("K004", "MLFLOW_TRACKING_URI", uri, f"is half-migrated ({why}); {_WAY_OUT}")


def why_unusable(uri: str, error: Exception) -> BadInput | None:
    """The way out of an error at the opening of a sqlite database, None for other places."""
    if database_file(uri) is None:
        return None
    said = " ".join(str(error).split())
    if "out-of-date database schema" in said:
        remedy = f"was made by another version of MLflow; `mlflow db upgrade {uri}`, or {_WAY_OUT}"
    elif "locked" in said:
        remedy = _LOCKED
    else:
        remedy = f"cannot be opened ({said[:160]}), so perhaps a migration was cut off; {_WAY_OUT}"
    return BadInput("K005", "MLFLOW_TRACKING_URI", uri, remedy)


def database_file(uri: str) -> Path | None:
    """The file of a sqlite URI; None for other URIs and for a database in memory."""
    name = uri.removeprefix("sqlite:///")
    return None if name == uri or not name or name.startswith(":") else Path(name)
