"""Where the cells came from, what each rule left out, how they were split; and what made the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scaling_ray import __version__
from scaling_ray.report.runs import file_hash, finite

# A rule of the specification -> what it does, for people. Rules that are off say so.
_RULES = {
    "value_filter": "a condition that a cell's metadata meets",
    "keep": "values that a column may have",
    "cap_cells": "most cells per value of cap_by",
    "drop_duplicates": "of cells with equal counts in every gene, one stays",
    "min_counts": "fewest counts over the chosen genes",
}


def data_card(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Source, rules with the cells each took, split and genes, out of the shards' manifest."""
    data, dropped = dict(manifest.get("data") or {}), dict(manifest.get("dropped") or {})
    rules = []
    for rule, about in _RULES.items():
        if rule in data or rule in dropped:
            rules.append(
                {"rule": rule, "about": about, "setting": _words(data.get(rule)), "dropped": dropped.pop(rule, None)}
            )
    rules += [{"rule": rule, "about": "", "setting": "–", "dropped": count} for rule, count in dropped.items()]
    splits = {}
    for name, entry in manifest["splits"].items():
        groups = list(entry.get("groups") or [])
        splits[name] = {"cells": entry["cells"], "groups": groups, "fraction": entry.get("fraction")}
        splits[name]["donors"] = sum(1 for count in entry.get("donor_cells") or [] if count) or None
    return {
        "source": dict(manifest.get("census") or {}),
        "planted": bool(manifest.get("planted", False)),
        "rules": rules,
        "split_by": manifest["split_by"],
        "salt": data.get("salt"),
        "split_from": manifest.get("split_from"),
        "splits": splits,
        "genes": manifest["genes"],
        "gene_rule": data.get("gene_rule"),
        "batch_key": data.get("batch_key"),
        "batches_left_out": list(manifest.get("batches_left_out") or []),
    }


def provenance(
    sweep_dir: Path, manifest: Mapping[str, Any], curves: Iterable[list[dict[str, Any]]], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Hashes of what went in, versions that made it, and when."""
    stamps = [row["timestamp_ms"] for rows in curves for row in rows if finite(row.get("timestamp_ms"))]
    return {
        "data_hash": manifest["data_hash"],
        "data_hashes_of_runs": sorted({run["data_hash"] for run in runs if run["data_hash"]}),
        "spec_sha256": file_hash(sweep_dir / "spec.toml"),
        "results_sha256": file_hash(sweep_dir / "results.parquet"),
        "plan_sha256": file_hash(sweep_dir / "plan.json"),
        "report_made_with": f"scaling-ray {__version__}",
        "shards_made_with": dict(manifest.get("made_with") or {}),
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
