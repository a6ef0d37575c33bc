"""Every file below SWEEP_DIR, on a disk or on S3: names, and reading and writing them whole. No torch, no Ray.

spec.toml  plan.json  shards_manifest.json  chosen_rates.json  results.parquet  results.csv  budgets.csv
genes.parquet  test_split.parquet   the panel's genes; data set, donor and cell type of each test cell
references/<name>.json|parquet      baselines and planted floors
runs/<run_id>/                      see RunFiles
stacks/<name>/attempts/<token>/     checkpoints of runs that train as one
trunks/<name>/                      states of schedule wsd that longer budgets go on from
events.jsonl  queue.json  spent.json  attempts that were cut off; what waits and trains now; hours and money so far
mlflow.json  tracked.json           what a tracking server has been told
jobs.json                           the sweep's jobs of Ray: what a killed one still holds is freed by the next call
.lease  .stop                       who drives the sweep; exists once a stop was requested
"""

from __future__ import annotations

import io
import json
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scaling_ray.errors import BadInput
from scaling_ray.records import FailureClass, RunFailure, RunResult, ShardManifest
from scaling_ray.runs import RunSpec, differing
from scaling_ray.spec import SweepSpec, parse_spec
from scaling_ray.storage import Place, open_place, sealed_json, unseal

SPEC, PLAN, MANIFEST, GENES = "spec.toml", "plan.json", "shards_manifest.json", "genes.parquet"
TEST_SPLIT = "test_split.parquet"
CHOSEN_RATES, RESULTS, RESULTS_CSV = "chosen_rates.json", "results.parquet", "results.csv"
BUDGETS_CSV = "budgets.csv"
EVENTS, QUEUE, SPENT = "events.jsonl", "queue.json", "spent.json"
MLFLOW, TRACKED, STOP, LEASE = "mlflow.json", "tracked.json", ".stop", ".lease"
JOBS = "jobs.json"
RUN_SPEC, RESULT, FAILURE, MEMORY, METRICS = "spec.json", "result.json", "failure.json", "memory.json", "metrics.jsonl"
TEST_CELLS, TEST_GENES, CHECKPOINTS, ATTEMPTS = "test_cells.parquet", "test_genes.parquet", "checkpoints", "attempts"

_TOKEN = re.compile(r"(\d{6,})-(\d{20})-[0-9a-f]{8}")


def read_sealed(place: Place, name: str) -> dict[str, Any] | None:
    """The fields of a sealed JSON file, None where there is none; raises BadInput if it was changed or cut short."""
    data = place.read_if_there(name)
    return unseal(data, f"{place}/{name}", "move it away and call again") if data is not None else None


def write_sealed(place: Place, name: str, fields: dict[str, Any]) -> None:
    """Write JSON that is read back later, with a hash of itself; NaN and infinity are refused (they are not JSON)."""
    place.write(name, sealed_json(fields).encode())


def write_json(place: Place, name: str, value: Any) -> None:
    """Write ``value`` as indented JSON for others to read; NaN and infinity are refused."""
    place.write(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_table(place: Place, name: str, columns: list[str] | None = None) -> pa.Table:
    """A small Parquet file, read whole; FileNotFoundError where there is none."""
    return pq.read_table(io.BytesIO(place.read(name)), columns=columns)


def write_table(place: Place, name: str, table: pa.Table) -> None:
    """Write a small table as Parquet."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    place.write(name, sink.getvalue().to_pybytes())


def parse_rows(data: bytes) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    return [json.loads(line) for line in data.decode().splitlines(keepends=True) if line.endswith("\n")]


def read_rows(place: Place) -> list[dict[str, Any]]:
    """The whole rows of ``metrics.jsonl`` in a place; none where there is no such file."""
    return parse_rows(place.read_if_there(METRICS) or b"")


@dataclass(frozen=True, order=True)
class AttemptName:
    """The name of one attempt at a run or stack. The number decides which is later; clocks may step back."""

    number: int
    token: str

    @classmethod
    def next_of(cls, place: Place) -> AttemptName:
        """A new name below ``place``, later than that of every attempt begun there."""
        number = attempts_begun(place) + 1
        return cls(number, f"{number:06d}-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}")

    @classmethod
    def all_of(cls, place: Place) -> list[AttemptName]:
        """The names of attempts with files below ``place``, the latest first."""
        tokens = {name.split("/")[1] for name in place.names(f"{ATTEMPTS}/")}
        matches = (_TOKEN.fullmatch(token) for token in tokens)
        return sorted((cls(int(match[1]), match[0]) for match in matches if match), reverse=True)


def attempts_begun(place: Place) -> int:
    """How many attempts at a run were begun, including earlier ones whose files were removed."""
    names = AttemptName.all_of(place)
    return names[0].number if names else 0


class RunFiles:
    """The files of one run.

    ``spec.json``, ``result.json`` (committed once), ``failure.json``, ``memory.json``, ``mlflow.json`` and, while it
    trains, ``attempts/<token>/`` with ``metrics.jsonl``, ``test_cells.parquet``, ``test_genes.parquet`` and
    ``checkpoints/``. Once a result is committed, its attempt's files move up beside it and all attempts are removed.
    """

    def __init__(self, place: Place, trunks: Place | None = None) -> None:
        """``trunks`` is where the runs of a sweep leave states that longer budgets go on from."""
        self.place, self.trunks = place, trunks

    def prepare(self, run: RunSpec) -> None:
        """Write the run's own spec; raises BadInput if that of another run is there under the same id."""
        there = self.spec()
        # A chosen rate may not have been known when the file was first written.
        fields = [name for name in differing(there.identity, run.identity) if name != "lr"] if there else []
        if fields:
            raise BadInput(
                "W008", "run_id", run.run_id, f"stands for another {fields[0]} here; sweep into a new directory"
            )
        write_sealed(self.place, RUN_SPEC, run.model_dump(mode="json"))

    def spec(self) -> RunSpec | None:
        """The run's own spec, None where it has not begun; raises BadInput for a file that is no such spec."""
        fields = read_sealed(self.place, RUN_SPEC)
        if fields is None:
            return None
        try:
            return RunSpec.model_validate_json(json.dumps(fields))
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise BadInput("W009", f"{self.place}/{RUN_SPEC}", reason, "is not a run's spec; remove it") from error

    def result(self) -> RunResult | None:
        """The committed result, or None."""
        data = self.place.committed(RESULT)
        return RunResult.parse(data, f"{self.place}/{RESULT}") if data is not None else None

    def failure(self) -> RunFailure | None:
        """The failure that was recorded last, or None."""
        data = self.place.read_if_there(FAILURE)
        return RunFailure.parse(data, f"{self.place}/{FAILURE}") if data is not None else None

    def record_failure(self, run: RunSpec, failure: FailureClass, message: str) -> None:
        """Leave ``failure.json``; a later success supersedes it."""
        count = attempts_begun(self.place)
        now = time.time_ns() // 1_000_000
        record = RunFailure(run_id=run.run_id, failure=failure, message=message, attempts=count, ended_ms=now)
        self.place.write(FAILURE, record.to_json().encode())

    def clear_failure(self) -> None:
        """Forget an earlier failure: the run is tried again."""
        self.place.remove(FAILURE)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the finished run, or those of its latest attempt."""
        if self.place.exists(METRICS):
            return read_rows(self.place)
        attempts = AttemptName.all_of(self.place)
        return read_rows(self.place.below(f"{ATTEMPTS}/{attempts[0].token}")) if attempts else []

    def mlflow_run_id(self) -> str | None:
        """The id of the run on the tracking server, or None."""
        found = read_sealed(self.place, MLFLOW)
        return str(found["mlflow_run_id"]) if found else None


class SweepFiles:
    """A sweep's directory or ``s3://`` prefix."""

    def __init__(self, place: Place) -> None:
        self.place = place

    @classmethod
    def at(cls, where: Path | str | Place, field: str = "sweep") -> SweepFiles:
        """The files at a path or URI; nothing is created or read."""
        return cls(open_place(where, field))

    def __str__(self) -> str:
        return str(self.place)

    def run(self, run_id: str) -> RunFiles:
        """The files of one run."""
        return RunFiles(self.place.below(f"runs/{run_id}"), self.place.below("trunks"))

    def stack(self, name: str) -> Place:
        """The place of the common state of runs that train as one."""
        return self.place.below(f"stacks/{name}")

    @property
    def references(self) -> Place:
        """The place of baselines and planted floors."""
        return self.place.below("references")

    def run_ids(self) -> set[str]:
        """Ids of all runs that have files."""
        return {name.split("/")[1] for name in self.place.names("runs/")}

    def spec_text(self) -> str:
        """The sweep's spec as it was given; raises BadInput where the place holds no sweep."""
        data = self.place.read_if_there(SPEC)
        if data is None:
            raise BadInput(
                "W010", self.place.field, str(self), f"holds no {SPEC}; name the --out of a `scaling-ray sweep`"
            )
        return data.decode()

    def spec(self) -> SweepSpec:
        """The sweep's spec."""
        return parse_spec(self.spec_text(), f"{self}/{SPEC}")

    def manifest(self) -> ShardManifest | None:
        """The sweep's copy of its shards' manifest, None where it has not begun."""
        data = self.place.read_if_there(MANIFEST)
        return ShardManifest.parse(data, f"{self}/{MANIFEST}") if data is not None else None

    def known_manifest(self) -> ShardManifest:
        """The sweep's copy of its shards' manifest; raises BadInput where there is none."""
        manifest = self.manifest()
        if manifest is None:
            raise BadInput(
                "W011", self.place.field, str(self), f"holds no {MANIFEST}; name the --out of a `scaling-ray sweep`"
            )
        return manifest

    def plan(self) -> dict[str, Any] | None:
        """The plan, None where there is none."""
        return read_sealed(self.place, PLAN)

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Write the plan."""
        write_sealed(self.place, PLAN, plan)

    def chosen_rates(self) -> dict[str, float]:
        """The learning rates that have been chosen, by run id."""
        return read_sealed(self.place, CHOSEN_RATES) or {}

    def write_chosen_rates(self, rates: dict[str, float]) -> None:
        """Write the chosen rates; a choice never changes afterwards."""
        write_sealed(self.place, CHOSEN_RATES, dict(rates))

    def request_stop(self) -> None:
        """Ask every run to save its state and end."""
        self.place.write(STOP, b"")

    def stop_requested(self) -> bool:
        """Whether a stop was requested."""
        return self.place.exists(STOP)

    def clear_stop(self) -> None:
        """Forget an earlier request."""
        self.place.remove(STOP)
