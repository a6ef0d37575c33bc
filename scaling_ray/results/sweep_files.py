"""Every file below SWEEP_DIR that a report reads, on a disk or on S3: names, and reading them whole.

spec.toml  plan.json  shards_manifest.json  results.parquet
runs/<run_id>/{metrics.jsonl, mlflow.json}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaling_ray.errors import BadInput
from scaling_ray.records import ShardManifest
from scaling_ray.spec import SweepSpec, parse_spec
from scaling_ray.storage import Place, open_place

SPEC, PLAN, MANIFEST, RESULTS = "spec.toml", "plan.json", "shards_manifest.json", "results.parquet"
METRICS, MLFLOW = "metrics.jsonl", "mlflow.json"


def read_if_there(place: Place, name: str) -> bytes | None:
    """Bytes of a file, None where there is none."""
    try:
        return place.read(name)
    except FileNotFoundError:
        return None


def read_json(place: Place, name: str) -> Any:
    """What a JSON file holds, None where there is none; BadInput where it is not JSON."""
    data = read_if_there(place, name)
    if data is None:
        return None
    try:
        return json.loads(data)
    except ValueError as error:
        raise BadInput(name, f"{place}/{name}", "is damaged (not JSON); move it away and call again") from error


def write_json(place: Place, name: str, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity are refused (they are not JSON)."""
    place.write(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


class RunFiles:
    """The files of one run."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def rows(self) -> list[dict[str, Any]]:
        """The whole rows of ``metrics.jsonl``; a last line cut short by a kill is left out."""
        data = read_if_there(self.place, METRICS) or b""
        return [json.loads(line) for line in data.decode().splitlines(keepends=True) if line.endswith("\n")]


class SweepFiles:
    """A sweep's directory or ``s3://`` prefix."""

    def __init__(self, place: Place) -> None:
        self.place = place

    @classmethod
    def at(cls, where: Path | str | Place, field: str = "sweep") -> SweepFiles:
        """The files at a path or URI; nothing is created or asked."""
        return cls(open_place(where, field))

    def __str__(self) -> str:
        return str(self.place)

    def run(self, run_id: str) -> RunFiles:
        """The files of one run."""
        return RunFiles(self.place.below(f"runs/{run_id}"))

    def spec_text(self) -> str:
        """The sweep's spec as it was given; BadInput where the place holds no sweep."""
        data = read_if_there(self.place, SPEC)
        if data is None:
            raise BadInput(self.place.field, str(self), f"holds no {SPEC}; name the --out of a `scaling-ray sweep`")
        return data.decode()

    def spec(self) -> SweepSpec:
        """The sweep's spec."""
        return parse_spec(self.spec_text(), f"{self}/{SPEC}")

    def known_manifest(self) -> ShardManifest:
        """The sweep's copy of its shards' manifest; BadInput where there is none."""
        data = read_if_there(self.place, MANIFEST)
        if data is None:
            raise BadInput(self.place.field, str(self), f"holds no {MANIFEST}; name the --out of a `scaling-ray sweep`")
        return ShardManifest.parse(data, f"{self}/{MANIFEST}")

    def plan(self) -> dict[str, Any] | None:
        """What was planned, None where nothing was."""
        found: dict[str, Any] | None = read_json(self.place, PLAN)
        return found
