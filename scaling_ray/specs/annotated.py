"""A spec file with every key, its unit and meaning: keys that are set as lines, the others as commented defaults."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from scaling_ray.resources import BudgetSpec, ResourceSpec
from scaling_ray.rules import Frozen
from scaling_ray.spec import DataSpec, GridSpec, LearningRateSpec, TrainSpec, parse_spec
from scaling_ray.specs import example_names, example_path

STARTER = "cells"
"""The example that a new sweep begins as."""

MARGIN, LONGEST_PAIR, LONGEST_DEFAULT = 40, 60, 60
"""Column of the comments, the characters from which on one stands above its key, and most of a default told in it."""

TABLES: dict[str, type[Frozen]] = {
    "data": DataSpec,
    "grid": GridSpec,
    "train": TrainSpec,
    "lr": LearningRateSpec,
    "resources": ResourceSpec,
    "budget": BudgetSpec,
}

ABOUT_TABLES = {
    "data": "Which cells and genes go into the shards. Other values here need new shards.",
    "grid": "The axes: one run for each combination (a setting) and seed.",
    "train": "How every run trains.",
    "lr": "Learning rates.",
    "resources": "What runs may use. No part of what a run is: ids stay the same.",
    "budget": "Where the whole sweep stops, at a checkpoint; raise a limit and the same command goes on.",
}

ABOUT_KEYS: dict[str, dict[str, str]] = {
    "data": {
        "title": "what reports call these cells; changes no cell",
        "source": "citation or address of the cells; changes no cell",
        "value_filter": "SOMA condition that a cell must meet; it reads obs columns",
        "keep": "obs column -> values, one of which a cell must have",
        "cap_by": "obs column that cap_cells counts by",
        "cap_cells": "most cells for each value of cap_by, or a table value -> cells; no cap if left out",
        "drop_duplicates": "of cells with the same counts in every gene, keep one",
        "min_counts": "counts over the chosen genes that a cell must have",
        "split_by": "what stays together in train, val or test: donor_id, dataset_id or cell",
        "split_from": "manifest.json of older shards whose groups keep their split; none if left out",
        "fractions": "shares of the cells; they add up to 1",
        "salt": "another text draws another split and another order of cells",
        "genes": "genes in the shards, best ranked first; the largest V of the grid",
        "gene_rule": "seurat_v3 (variance on training cells), by_mean, first_n, or list",
        "batch_key": "rank genes within each dataset_id and take the median rank; over all cells if left out",
        "gene_list": 'feature_ids, for gene_rule = "list"',
    },
    "grid": {
        "sizes": "model sizes: XXS, TINY, XS, S, M, L, XL, or tables [sizes.NAME] of this file",
        "genes": "genes in the panel (V), the best ranked of data.genes",
        "cells": 'unique training cells (D), or "all"',
        "seeds": "repeats of each setting: first weights, which D cells, their order, masks",
        "donors": 'donors that the training cells come from, or "all"',
    },
    "train": {
        "recipe": "corrected (normalised by the library), or published (by the panel's sum)",
        "start": "first weights: cells, linear (a regression of them), drawn, or auto (by recipe)",
        "objective": "what is minimised",
        "mask_fraction": "share of a cell's measured genes that are hidden and predicted",
        "umi_fraction": "share of a cell's molecules that the network sees; targets keep all",
        "held_out_in_training": "train on validation and test cells too, as the study did: no honest loss",
        "max_cells_seen": "budget of a run in cell presentations, or a table size -> budget",
        "cells_per_step": "cells in an optimizer update",
        "micro_batch": 'cells in one forward and backward pass; "auto" by size and device, "probe" measures',
        "schedule": "of the rate: constant, linear, cosine, or wsd (constant, then a short decay)",
        "trunk": "of wsd, in cells seen: warm-up, between validations; share of decay; shares branched at",
        "warmup_fraction": "share of the updates in which the learning rate rises; not of wsd",
        "final_lr_fraction": "learning rate at the end, as a share of its peak",
        "weight_decay": "of AdamW",
        "adam_beta2": "of AdamW",
        "grad_clip": "largest norm of a gradient",
        "dropout": "share of units dropped",
        "precision": 'of matrix products: fp32, bf16, or "auto" by size and device',
        "evaluations": "validations in a run; not of wsd",
        "curve_cells": "validation cells of each",
        "smoothing_evaluations": "validations that a smoothed loss averages",
        "patience_evaluations": "validations without a better smoothed loss before a run stops; 0: never",
        "checkpoint_seconds": "seconds between checkpoints",
        "threads": "CPU threads of a run",
    },
    "lr": {
        "rule": "fixed (one rate), grid (an axis), choose (at every size), transfer (at one)",
        "rates": "peak learning rates",
        "per_size": "size -> rates of its own",
        "choose_seed": "seed of the runs that choose a rate; none of grid.seeds",
        "choose_cells": 'unique training cells of those runs, or "all"',
        "choose_fraction": "their budget, as a share of max_cells_seen",
        "width_exponent": "rates of a size of width D are those below times (D / reference_width) ^ this",
        "reference_width": "width that lr.rates are meant for",
        "tune_size": "of transfer: the size that chooses, for all others by width_exponent",
        "check_size": "of transfer: a size that tries its rates too, to check the one it takes over",
    },
    "resources": {
        "cpus": "CPUs that runs share on this machine",
        "workers": "size -> worker processes that train a run together, or [fewest, most] on what there is",
        "engine": "of runs with several workers: ddp or deepspeed",
        "zero_stage": "what DeepSpeed shares out: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights",
        "offload_optimizer": "keep the shared optimizer in the memory of the machine, not of its GPUs",
        "max_failures": "times that a run whose process died is tried again",
        "gflops_per_cpu": "GFLOP/s of one CPU in large matrix products, for planned hours; by device if left out",
        "task_memory_gib": "GiB that one task of a conversion may take",
        "resident_gib": "GiB of training cells held in memory; more are streamed",
        "device": 'cpu, cpu_bf16, cuda, or "auto": what the machine has',
        "stack": 'tiny models of one size trained as one, at most; "auto" where it pays',
        "compile": "torch.compile on GPUs",
        "disk_gib": "GiB that a sweep may take; no limit if left out",
    },
    "budget": {
        "max_gpu_hours": "whole GPUs times hours; no limit if left out",
        "max_cpu_hours": "CPUs times hours; no limit if left out",
        "max_cost": "money by [prices], in their currency; no limit if left out",
        "max_wall_hours": "hours since the sweep's first start; no limit if left out",
    },
}
"""Table -> key -> what it is, with its unit."""

EXAMPLES: dict[str, Any] = {
    "data.title": "Bone marrow of 18 donors",
    "data.source": "van Galen et al. 2019, GEO GSE116256",
    "data.keep": {"tissue_general": ["blood", "lung"]},
    "data.cap_cells": 10_000,
    "data.split_from": "OLDER_SHARDS/manifest.json",
    "data.batch_key": "dataset_id",
    "lr.per_size": {"XS": [1e-3]},
    "lr.tune_size": "TINY",
    "lr.check_size": "S",
    "resources.workers": {"L": 4},
    "resources.gflops_per_cpu": 50.0,
    "resources.disk_gib": 100.0,
    "budget.max_gpu_hours": 100.0,
    "budget.max_cpu_hours": 1000.0,
    "budget.max_cost": 50.0,
    "budget.max_wall_hours": 12.0,
}
"""What a commented line shows for a key that is empty by default."""


def annotated_spec(name: str) -> str:
    """The text of a spec with every key explained: the shipped example ``name``, or a new sweep of that name.

    Raises:
        BadInput: ``name`` cannot be a sweep's name (letters, digits, dot, dash and underscore).
    """
    is_example = name in example_names()
    source = example_path(name if is_example else STARTER).read_text(encoding="utf-8")
    given = tomllib.loads(source) | {"name": name}
    lines = [line for line in source.split("name =")[0].splitlines() if line.startswith("#")] if is_example else []
    lines += ["# Lines that begin with `# key =` show defaults: remove the # to change one.", f"name = {_value(name)}"]
    for table, model in TABLES.items():
        if table == "train":
            lines += _sizes(given.get("sizes", {}))
        lines += ["", f"# {ABOUT_TABLES[table]}", f"[{table}]", *_table(table, model, given.get(table, {}))]
    lines += _prices(given.get("prices"))
    text = "\n".join(lines) + "\n"
    parse_spec(text)
    return text


def _sizes(sizes: dict[str, dict[str, int]]) -> list[str]:
    """The sizes of the spec's own, each a table of its four whole numbers."""
    lines = ["", "# Sizes of your own: width (a multiple of heads), layers, heads, feedforward (a multiple of width)."]
    lines += ["[sizes]"]
    return lines + [f"{_key(name)} = {_value(shape)}" for name, shape in sizes.items()]


PRICES: dict[str, Any] = {
    "as_of": "2026-11-01",
    "currency": "USD",
    "nodes": {
        "cpu_spot": {"cpus": 16, "memory_gib": 32.0, "per_hour": 0.80, "spot_per_hour": 0.35, "max_nodes": 16},
        "gpu_spot": {"cpus": 8, "gpus": 1, "gpu": "L4", "memory_gib": 32.0, "per_hour": 1.00, "spot_per_hour": 0.45},
    },
}
"""The table of prices that a spec without one shows: made-up figures of the right size."""


def _prices(given: dict[str, Any] | None) -> list[str]:
    """The table of prices; one to fill in, every line of it a comment, where the spec has none."""
    told = given if given is not None else PRICES
    lines = [
        "[prices]",
        *(f"{key} = {_value(value)}" for key, value in told.items() if key != "nodes"),
        "[prices.nodes]",
    ]
    lines += [f"{_key(name)} = {_value(node)}" for name, node in told["nodes"].items()]
    about = ["", "# Prices an hour of kinds of nodes, of a day, for what `plan` says of money."]
    if given is not None:
        return [*about, *lines]
    return [
        *about,
        "# Remove the # and spaces of every line below, and fill in your own.",
        *("#    " + x for x in lines),
    ]


def _table(table: str, model: type[Frozen], given: dict[str, Any]) -> list[str]:
    pairs = []
    for key, about in ABOUT_KEYS[table].items():
        field = model.model_fields[key]
        default = None if field.is_required() else field.get_default()
        default = default.model_dump() if isinstance(default, Frozen) else default
        shown = EXAMPLES.get(f"{table}.{key}", default) if default is None or default == {} else default
        if key not in given:
            pairs.append((f"# {key} = {_value(shown)}", about))
            continue
        told = field.is_required() or default in (None, {}, given[key]) or len(_value(default)) > LONGEST_DEFAULT
        pairs.append((f"{key} = {_value(given[key])}", about if told else f"{about}; default {_value(default)}"))
    lines = []
    for pair, about in pairs:
        lines += [f"{pair:{MARGIN}}  # {about}"] if len(pair) <= LONGEST_PAIR else [f"# {about}:", pair]
    return lines


def _value(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)
