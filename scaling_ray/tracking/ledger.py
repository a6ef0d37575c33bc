"""Where a sweep is tracked and what has been logged there already, known without importing MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from scaling_ray.storage import write_json


def tracking_uri(sweep: Path) -> str:
    """MLFLOW_TRACKING_URI, or a sqlite file beside the sweep."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(sweep.parent / 'mlruns.db').resolve()}"


def record_tracked(sweep: Path, finished: Iterable[str]) -> None:
    """Note the run ids whose end has been logged to today's place."""
    write_json(sweep / "tracked.json", {"uri": tracking_uri(sweep), "finished": sorted(finished)})


def is_tracked(sweep: Path, run_ids: Iterable[str]) -> bool:
    """Whether the end of every one of these runs has been logged to today's place."""
    path = sweep / "tracked.json"
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return bool(found["uri"] == tracking_uri(sweep) and set(found["finished"]) >= set(run_ids))
