"""Data card (source of the cells, rules, splits) and provenance (hashes and versions behind the numbers)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from scaling_ray import __version__
from scaling_ray.records import ShardManifest
from scaling_ray.report.sweep import Sweep
from scaling_ray.results.sweep_files import PLAN, RESULTS, SPEC

# A rule of the specification -> what it does, for people. Rules that are off say so.
_RULES = {
    "value_filter": "a condition that a cell's metadata meets",
    "keep": "values that a column may have",
    "cap_cells": "most cells per value of cap_by",
    "drop_duplicates": "of cells with equal counts in every gene, one stays",
    "min_counts": "fewest counts over the chosen genes",
}


def data_card(manifest: ShardManifest) -> dict[str, Any]:
    """Source, rules with the cells each took, split and genes, out of the shards' manifest."""
    data, dropped = manifest.data, dict(manifest.dropped)
    rules = []
    for rule, about in _RULES.items():
        if rule in data or rule in dropped:
            setting = _words(data[rule]) if rule in data else "off"
            rules.append({"rule": rule, "about": about, "setting": setting, "dropped": dropped.pop(rule, None)})
    rules += [{"rule": rule, "about": "", "setting": "–", "dropped": count} for rule, count in dropped.items()]
    splits = {}
    for name, entry in manifest.splits.items():
        splits[name] = {
            "cells": entry.cells,
            "groups": entry.groups,
            "fraction": entry.fraction,
            "donors": sum(1 for count in entry.donor_cells if count) or None,
        }
    return {
        "source": manifest.census,
        "planted": manifest.planted,
        "rules": rules,
        "split_by": manifest.split_by,
        "split_from": manifest.split_from,
        "splits": splits,
        "genes": manifest.genes,
        **{name: data[name] if name in data else None for name in ("salt", "gene_rule", "batch_key")},
        "batches_left_out": manifest.batches_left_out,
    }


def provenance(sweep: Sweep) -> dict[str, Any]:
    """Hashes of what went in, versions that made it, and when."""
    stamps = [evaluation.timestamp_ms for curve in sweep.curves.values() for evaluation in curve]
    return {
        "data_hash": sweep.manifest.data_hash,
        "data_hashes_of_runs": sorted({row.data_hash for row in sweep.rows if row.data_hash}),
        "spec_sha256": sweep.sha256[SPEC],
        "results_sha256": sweep.sha256[RESULTS],
        "plan_sha256": sweep.sha256[PLAN],
        "report_made_with": f"scaling-ray {__version__}",
        "shards_made_with": sweep.manifest.made_with,
        "first_evaluation": _day(min(stamps)) if stamps else None,
        "last_evaluation": _day(max(stamps)) if stamps else None,
    }


def _day(timestamp_ms: float) -> str:
    return datetime.fromtimestamp(timestamp_ms / 1000, UTC).date().isoformat()


def _words(setting: Any) -> str:
    if setting is None or setting == {} or setting is False or setting == 0:
        return "off"
    if isinstance(setting, dict):
        return "; ".join(f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in setting.items())
    return "on" if setting is True else str(setting)
