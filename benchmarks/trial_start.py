"""How soon a Tune trial that finds the shards resident has its first batch: seconds, trial by trial, on one node."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from scaling_ray.cluster import ray, ray_session  # before ray.tune: it sets what ray reads once
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.shards.format import SPLITS, read_manifest, row_groups
from scaling_ray.shards.stream import read_resident
from scaling_ray.spec import parse_spec
from scaling_ray.train.loop import RunData

TRIALS = 8
SPEC = """
name = "trials"
[data]
genes = {genes}
[grid]
sizes = ["TINY"]
genes = [{genes}]
cells = ["all"]
seeds = {seeds}
[lr]
rates = [1e-2]
"""


def _trial(config: dict[str, str], splits: dict[str, Any], edges: Any) -> None:
    from ray import tune

    began = time.perf_counter()
    run = RunSpec.model_validate_json(config["run"])
    held = {name: ray.get(reference).narrowed(run.genes) for name, reference in splits.items()}
    feed = RunData(held["train"], held["val"], held["test"], "", edges).feed(run)
    feed.batch(0, run.train.cells_per_step)
    tune.report({"seconds": time.perf_counter() - began, "process": os.getpid(), "at": time.time()})


def main() -> int:
    """Run the trials one after the other and print their seconds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True, help="directory of shards")
    options = parser.parse_args()
    manifest = read_manifest(options.shards)
    genes = min(512, manifest.genes)
    runs = runs_of(parse_spec(SPEC.format(genes=genes, seeds=list(range(TRIALS)))))
    with ray_session(1):
        from ray import tune

        splits = {name: ray.put(read_resident(options.shards, manifest, name, genes)) for name in SPLITS}
        trainable = tune.with_parameters(_trial, splits=splits, edges=row_groups(manifest, "train"))
        results = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space={"run": tune.grid_search([run.model_dump_json() for run in runs])},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(verbose=0),
        ).fit()
    ended = [results[index].metrics or {} for index in range(len(results))]
    metrics = sorted(ended, key=lambda row: row["at"])
    seconds = [row["seconds"] for row in metrics]
    between = [later["at"] - earlier["at"] for earlier, later in zip(metrics, metrics[1:], strict=False)]
    found = {
        "first_seconds": seconds[0],
        "later_seconds": seconds[1:],
        "most_seconds_after_first": max(seconds[1:]),
        "most_seconds_between_ends_of_trials": max(between),
        "train_cells": manifest.splits["train"].cells,
        "genes": genes,
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
