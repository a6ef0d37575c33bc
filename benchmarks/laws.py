"""Count what the verdict rule promises on tables of known truth, and what it says of real ones.

Writes reports/benchmarks/laws.json, each entry with the machine, the date and the commit. Seeds are fixed. Nothing here
judges: bars and figures stand side by side in ``bars``.

- sizes: six of the study's ladder (TINY to XL) and eight equally spaced; 3 seeds unless said;
- misfit: ``1 + x^-0.3`` and a deviation from it, with a standard deviation that is a share of the loss drop: smooth (a
  Gaussian process in log size, length a third of the range) or drawn for each size; noise likewise a share of the drop;
- wrong: tables that no power law with a floor made (pure noise, a floor reached at the second size, a law that stops at
  the third size, two largest sizes 0.015 worse than the fourth, a logarithm); a law that stops at the fourth beside;
- uneven noise: means and standard deviations of a real sweep of seven sizes, whose smallest spreads 15 times as far as
  its largest; its right law is the power law with a floor through those means;
- clean: laws with a floor (the smallest size 1.0 above it) and without, where the truth alone bounds alpha to a factor
  of two;
- flags: a tenth of the runs flagged at random, and raised by up to 3% of the drop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from scaling_ray.laws import refit
from scaling_ray.laws.fit import Problem, gather
from scaling_ray.laws.forms import PARAMS_CELLS
from scaling_ray.laws.intervals import profiles
from scaling_ray.laws.many import Design
from scaling_ray.laws.simulate import JudgedTables, draw, expected_ratio, judge_tables
from scaling_ray.results.cohorts import fit_columns
from scaling_ray.results.foreign import read_table
from scaling_ray.storage import write_json

HERE = Path(__file__).resolve().parent
SEEDS = 3
NOISES = (0.006, 0.02)
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
SIX = np.array([9_953.0, 132_993.0, 859_137.0, 19_178_497.0, 100_510_801.0, 340_770_817.0])
LADDERS = {"six of the ladder": SIX, "eight equally spaced": np.geomspace(SIX[0], SIX[-1], 8)}
CHINCHILLA = {"E": 1.8172, "a": 482.01, "b": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def say(line: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def law_of(params: np.ndarray, alpha: float, floor: bool) -> np.ndarray:
    """Loss (S,) of the clean law that the docstring of this file fixes."""
    return 1.0 + (params / params[0]) ** -alpha if floor else 0.5 * (params / params[-1]) ** -alpha


def share(flags: np.ndarray) -> float | None:
    """Share of true; None of nothing."""
    return float(np.mean(flags)) if len(flags) else None


def describe(judged: JudgedTables, truth: dict[str, float] | None, seen: np.ndarray | None = None) -> dict[str, Any]:
    """Figures of one setting of the simulation; ``seen`` (B,) are losses of the predicted place."""
    answered = judged.answered
    found: dict[str, Any] = {
        "tables": int(answered.size),
        "answered": share(answered),
        "supported": share(np.array([verdict == "supported" for verdict in judged.verdicts])),
        "refused_by": {reason: count / answered.size for reason, count in judged.refused_by.most_common(5)},
    }
    if "alpha" in judged.shown and answered.any():
        found["median_ratio"] = float(np.median(judged.ratio("alpha")[answered]))
    for name, value in (truth or {}).items():
        covers = judged.covers(name, value)
        found[f"{name}_covered"] = share(covers[answered])
        found[f"{name}_covered_of_all"] = share(covers)
        found[f"{name}_statistical"] = share(judged.covers(name, value, shown=False)[answered])
    if seen is not None:
        inside = judged.predicts(seen)
        found["loss_covered"] = share(inside[answered])
        found["loss_covered_of_all"] = share(inside)
    return found


def smooth(x: np.ndarray, length: float, rng: np.random.Generator, tables: int) -> np.ndarray:
    """Draws (B, N) of a Gaussian process of unit variance at log sizes (N,)."""
    covariance = np.exp(-0.5 * ((x[:, None] - x[None, :]) / length) ** 2) + 1e-9 * np.eye(x.size)
    drawn: np.ndarray = (np.linalg.cholesky(covariance) @ rng.standard_normal((x.size, tables))).T
    return drawn


MISFITS = (("none", 0.0), *((kind, size) for kind in ("smooth", "per size") for size in (0.005, 0.01, 0.02)))


def drawn_tables(
    params: np.ndarray, kind: str, size: float, noise: float, tables: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
    """Losses (B, S, R), the mean of as many runs at ten times the largest size (B,), and the loss drop."""
    x = np.log(np.append(params, params[-1] * 10.0))
    law = 1.0 + np.exp(-0.3 * (x - x[0]))
    drop = law[0] - law[-2]
    away = np.zeros((tables, x.size))
    if kind == "smooth":
        away = size * drop * smooth(x, (x[-2] - x[0]) / 3.0, rng, tables)
    elif kind == "per size":
        away = size * drop * rng.standard_normal((tables, x.size))
    losses = (law + away)[:, :, None] + rng.normal(0.0, noise * drop, (tables, x.size, SEEDS))
    return losses[:, :-1], losses[:, -1].mean(axis=1), float(drop)


def misfit(tables: int) -> dict[str, Any]:
    """True laws with a misfit: answers, coverage of alpha and of the loss at ten times the largest size."""
    settings: list[dict[str, Any]] = []
    for title, params in LADDERS.items():
        for noise in (0.001, 0.0025, 0.005):
            for kind, size in MISFITS:
                rng = np.random.default_rng([121, len(settings)])
                losses, seen, _ = drawn_tables(params, kind, size, noise, tables, rng)
                judged = judge_tables({"params": params}, losses, place={"params": params[-1] * 10.0})
                row = {"ladder": title, "noise": noise, "misfit": kind, "size": size}
                settings.append(row | describe(judged, {"alpha": 0.3}, seen))
        say(f"misfit, {title}: done")
    return _pooled(settings)


def _pooled(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over settings, and the lowest of each figure."""
    names = [name for name in settings[0] if name.endswith(("answered", "covered", "median_ratio"))]
    known = {name: [s[name] for s in settings if s.get(name) is not None] for name in names}
    return {
        "mean": {name: float(np.mean(values)) for name, values in known.items() if values},
        "lowest": {name: float(np.min(values)) for name, values in known.items() if values},
        "highest_median_ratio": max(s.get("median_ratio", 0.0) for s in settings),
        "settings": settings,
    }


def wrong(tables: int) -> dict[str, Any]:
    """How often tables that no power law with a floor made are answered; elbows at the fourth size beside."""
    x = np.append(SIX, 10 * SIX[-1]) / SIX[0]
    found: dict[str, dict[str, Any]] = {"bar": {}, "elbow at the fourth size": {}}
    kinds: list[tuple[str, str, np.ndarray, float, float | None]] = []
    for noise in NOISES:
        kinds.append(("bar", f"noise, {noise:g}", np.full(7, 1.5), noise, None))
        kinds.append(("bar", f"edge-floor, {noise:g}", 1.45 + x**-4.0, noise, None))
        kinds.append(("bar", f"log-linear, {noise:g}", 2.0 - 0.05 * np.log(x), noise, None))
        turned = 1.45 + 0.16 * x**-0.3
        turned[4:] = turned[3] + 0.015
        kinds.append(("bar", f"two largest worse, {noise:g}", turned, noise, 0.3))
        for alpha in (0.2, 0.3, 0.4):
            for last, where in ((2, "bar"), (3, "elbow at the fourth size")):
                law = 1.5 * np.minimum(x, x[last]) ** -alpha
                kinds.append((where, f"elbow at size {last + 1}, alpha {alpha}, {noise:g}", law, noise, alpha))
    for i, (where, name, law, noise, truth) in enumerate(kinds):
        rng = np.random.default_rng([122, i])
        losses = draw(law, noise, tables, SEEDS, rng)
        judged = judge_tables({"params": SIX}, losses[:, :-1], place={"params": SIX[-1] * 10.0})
        covered = None if truth is None else {"alpha": truth}
        found[where][name] = describe(judged, covered, losses[:, -1].mean(axis=1))
    return found


REAL_MEANS = np.array([0.24, 0.13, 0.115, 0.077, 0.058, 0.051, 0.050])
REAL_SDS = np.array([0.035, 0.037, 0.029, 0.003, 0.008, 0.003, 0.002])
SEVEN = np.geomspace(1e3, 1e6, 7)


def uneven(tables: int) -> dict[str, Any]:
    """Noise that falls 15-fold from the smallest to the largest size, 7 sizes, 4 seeds."""
    x = np.append(SEVEN, SEVEN[-1] * 10.0) / SEVEN[0]
    # The right law: the means' own weighted power law with a floor.
    grid = np.linspace(0.05, 2.0, 400)
    weight = (1 / REAL_SDS) ** 2
    best = min(
        ((*np.polyfit(x[:7] ** -alpha, REAL_MEANS, 1, w=np.sqrt(weight)), alpha) for alpha in grid),
        key=lambda p: float(np.sum(weight * (p[0] * x[:7] ** -p[2] + p[1] - REAL_MEANS) ** 2)),
    )
    a, c, alpha = (float(value) for value in best)
    right = a * x**-alpha + c
    elbow = right.copy()
    elbow[3:] = right[3]
    laws = {
        "right": right,
        "elbow": elbow,
        "log-linear": right[0] - (right[0] - right[6]) * np.log(x) / np.log(x[6]),
        "exponential": c + (right[0] - c) * np.exp(-(x - 1.0) / x[2]),
        "largest +0.02": right + 0.02 * (np.arange(8) == 6),
        "largest +0.05": right + 0.05 * (np.arange(8) == 6),
    }
    sds = np.append(REAL_SDS, REAL_SDS[-1])
    found: dict[str, Any] = {"law": {"a": a, "c": c, "alpha": alpha}}
    for i, (name, law) in enumerate(laws.items()):
        losses = draw(law, sds, tables, 4, np.random.default_rng([123, i]))
        judged = judge_tables({"params": SEVEN}, losses[:, :-1], place={"params": SEVEN[-1] * 10.0})
        found[name] = describe(judged, {"alpha": alpha, "c": c}, losses[:, -1].mean(axis=1))
    rng = np.random.default_rng([123, 99])
    losses = draw(right[:-1], REAL_SDS, tables, 4, rng)
    shuffled = np.stack([rng.permutation(table.reshape(-1)).reshape(7, 4) for table in losses])
    found["shuffled"] = describe(judge_tables({"params": SEVEN}, shuffled), None)
    return found


def clean(tables: int) -> dict[str, Any]:
    """Answers and coverage on clean tables that the truth alone bounds to a factor of two."""
    settings: list[dict[str, Any]] = []
    for title, params in LADDERS.items():
        for noise in NOISES:
            for alpha in ALPHAS:
                for floor in (True, False):
                    law = law_of(params, alpha, floor)
                    if expected_ratio(params, law, noise, SEEDS) >= 2.0:
                        continue
                    rng = np.random.default_rng([126, len(settings)])
                    judged = judge_tables({"params": params}, draw(law, noise, tables, SEEDS, rng))
                    error = float(np.median(np.abs(np.array(judged.values["alpha"]) / alpha - 1.0)))
                    row = {"ladder": title, "noise": noise, "alpha": alpha, "floor": floor}
                    settings.append(row | {"median_relative_error": error} | describe(judged, {"alpha": alpha}))
        say(f"clean tables, {title}: done")
    statistical = float(np.mean([s["alpha_statistical"] for s in settings if s["alpha_statistical"] is not None]))
    return _pooled(settings) | {"statistical_coverage": statistical}


def flags(tables: int) -> dict[str, Any]:
    """A tenth of the runs flagged at random; the truth a law with or without misfit."""
    settings: list[dict[str, Any]] = []
    for title, params in LADDERS.items():
        for noise in (0.0025, 0.005):
            for kind, size in (("none", 0.0), ("smooth", 0.01), ("per size", 0.01)):
                rng = np.random.default_rng([124, len(settings)])
                losses, _, drop = drawn_tables(params, kind, size, noise, tables, rng)
                flagged = rng.random(losses.shape) < 0.1
                losses = losses + flagged * rng.uniform(0.0, 0.03, losses.shape) * drop
                judged = judge_tables({"params": params}, losses, keep=~flagged)
                row = {"ladder": title, "noise": noise, "misfit": kind, "size": size}
                settings.append(row | describe(judged, {"alpha": 0.3}))
    return _pooled(settings)


def both(tables: int) -> dict[str, Any]:
    """L(P, D) on 5 sizes by 5 numbers of cells with the same misfits: alpha, beta and E covered."""
    sizes, cells = (g.ravel() for g in np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(2e3, 2e5, 5), indexing="ij"))
    x, y = np.log(np.unique(sizes)), np.log(np.unique(cells))
    law = 1.0 + (sizes / 1e5) ** -0.34 + (cells / 2e3) ** -0.28
    drop = float(law.max() - law.min())
    settings: list[dict[str, Any]] = []
    for kind, size in MISFITS:
        rng = np.random.default_rng([125, len(settings)])
        away = np.zeros((tables, law.size))
        if kind == "smooth":
            root = [
                np.linalg.cholesky(np.exp(-0.5 * ((z[:, None] - z) / ((z[-1] - z[0]) / 3)) ** 2) + 1e-9 * np.eye(5))
                for z in (x, y)
            ]
            away = size * drop * (root[0] @ rng.standard_normal((tables, 5, 5)) @ root[1].T).reshape(tables, -1)
        elif kind == "per size":
            away = size * drop * rng.standard_normal((tables, law.size))
        losses = (law + away)[:, :, None] + rng.normal(0.0, 0.0025 * drop, (tables, law.size, SEEDS))
        judged = judge_tables({"params": sizes, "cells": cells}, losses, form=PARAMS_CELLS)
        truth = {"alpha": 0.34, "beta": 0.28, "E": 1.0}
        settings.append({"misfit": kind, "size": size} | describe(judged, truth))
    return _pooled(settings)


WHOLE = (
    "chin_epoch_240 chin_epoch_245 kyo_native oac_ml_scalefit__massivetext__chinchilla "
    "oac_marin_202603__comma__llama_2 oac_misfitting__fineweb_c4__transformer gadre_c4_original_c4val_nolr "
    "gadre_rpj_c4val_nolr olmo_ladder_final steplaw_best gemstone_final"
).split()


def real(folder: Path) -> dict[str, Any]:
    """What the rule says of real tables in a folder: verdicts, intervals, held-out largest sizes, CPU seconds.

    Two of them hold checkpoints, many of one run, and are read with all rows as runs: their verdicts count for nothing,
    their seconds do.
    """
    found: dict[str, Any] = {}
    for name in [*WHOLE, "gemstone_checkpoints_renamed", "olmo_ckpt_small"]:
        path = folder / f"{name}.csv"
        if not path.is_file():
            continue
        began = time.process_time()
        fit = fit_columns(read_table(path, same=() if name in WHOLE else ("run",)))
        head = fit["headline"]
        found[name] = {
            "whole": name in WHOLE,
            "cpu_seconds": time.process_time() - began,
            "verdict": head["verdict"],
            "size": head["size"]["verdict"],
            "data": head["data"]["verdict"],
            "predictions": head["predictions"]["verdict"],
            "held_out": head["predictions"]["held_out"],
            "parameters": {n: [p["value"], p["low"], p["high"]] for n, p in head.get("parameters", {}).items()},
            "reasons": head["reasons"],
            "sentences": head["sentences"],
        }
    return found


def params_cells(tables: int, covered: int) -> dict[str, Any]:
    """L(P, D) on 5 sizes x 5 D over 100x x 3 seeds: errors of ``tables`` refits, coverage of ``covered`` profiles."""
    sizes, cells = (g.ravel() for g in np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(2e3, 2e5, 5)))
    truth = {"alpha": 0.34, "beta": 0.28, "E": 1.0, "a": 1e5**0.34, "b": 2e3**0.28}
    law = truth["E"] + truth["a"] * sizes ** -truth["alpha"] + truth["b"] * cells ** -truth["beta"]
    runs = np.full(sizes.size, float(SEEDS))
    rng = np.random.default_rng(6)
    means = law + rng.normal(0.0, 0.006, (tables, law.size)) / np.sqrt(SEEDS)
    found = Design(PARAMS_CELLS, {"params": sizes, "cells": cells}, runs).fit(means)
    errors = {
        n: float(np.median(np.abs(found.exponents[:, i] / truth[n] - 1))) for i, n in enumerate(("alpha", "beta"))
    }
    hits = {name: 0 for name in ("alpha", "beta", "E")}
    for _ in range(covered):
        losses = np.repeat(law, SEEDS) + rng.normal(0.0, 0.006, law.size * SEEDS)
        points = gather({"params": np.repeat(sizes, SEEDS), "cells": np.repeat(cells, SEEDS)}, losses)
        problem = Problem(PARAMS_CELLS, points)
        intervals = profiles(problem, problem.search(), tuple(hits))
        for name, interval in intervals.items():
            hits[name] += not interval.excludes(truth[name])
    coverage = {name: count / covered for name, count in hits.items()}
    return {"tables": tables, "median_relative_error": errors, "profiles": covered, "coverage": coverage}


def chinchilla(draws: int) -> dict[str, Any]:
    """How many draws from the published law (Besiroglu et al. 2404.10102) each parameter's 95% profile covers."""
    sizes, tokens = (g.ravel() for g in np.meshgrid(np.geomspace(4.4e7, 1.6e10, 9), np.geomspace(1e9, 5e11, 9)))
    c = CHINCHILLA
    law = c["E"] + c["a"] * sizes ** -c["alpha"] + c["b"] * tokens ** -c["beta"]
    hits, rng = {name: 0 for name in c}, np.random.default_rng(7)
    for _ in range(draws):
        losses = np.repeat(law, SEEDS) + rng.normal(0.0, 0.01, law.size * SEEDS)
        points = gather({"params": np.repeat(sizes, SEEDS), "cells": np.repeat(tokens, SEEDS)}, losses)
        problem = Problem(PARAMS_CELLS, points)
        for name, interval in profiles(problem, problem.search(), tuple(c)).items():
            hits[name] += not interval.excludes(c[name])
    return {"draws": draws, "runs": law.size * SEEDS, "noise": 0.01, "covered": hits}


def speed(refits: int = 2_000) -> dict[str, Any]:
    """Seconds for so many refits of L(P, D) on 200 runs (66 settings), the factoring of the design included."""
    sizes, cells = (g.ravel() for g in np.meshgrid(np.geomspace(1e4, 1e8, 11), np.geomspace(2e3, 2e5, 6)))
    law = 1.2 + 6.0 * sizes**-0.3 + 8.0 * cells**-0.4
    seeds = np.where(np.arange(sizes.size) < 2, SEEDS + 1, SEEDS)
    axes = {"params": np.repeat(sizes, seeds), "cells": np.repeat(cells, seeds)}
    losses = np.repeat(law, seeds) + np.random.default_rng(8).normal(0.0, 0.006, (refits, int(seeds.sum())))
    began = time.perf_counter()
    found = refit(PARAMS_CELLS, axes, losses)
    seconds = time.perf_counter() - began
    # The same without a single repeated setting: nothing to gather.
    jitter = np.random.default_rng(9).uniform(0.9, 1.1, (2, int(seeds.sum())))
    apart = {"params": axes["params"] * jitter[0], "cells": axes["cells"] * jitter[1]}
    law_apart = 1.2 + 6.0 * apart["params"] ** -0.3 + 8.0 * apart["cells"] ** -0.4
    losses = law_apart + np.random.default_rng(8).normal(0.0, 0.006, losses.shape)
    began = time.perf_counter()
    refit(PARAMS_CELLS, apart, losses)
    return {
        "refits": refits,
        "runs": int(seeds.sum()),
        "seconds": seconds,
        "seconds_without_repeated_settings": time.perf_counter() - began,
        "median_alpha": float(np.median(found.exponents[:, 0])),
    }


def audit_check() -> dict[str, Any]:
    """Seconds of ``scaling-ray audit`` in a process of its own, and the digits it prints."""
    began = time.perf_counter()
    out = Path("out") / "audit"
    command = [sys.executable, "-m", "scaling_ray.cli", "audit", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return {"seconds": time.perf_counter() - began} | json.loads((out / "audit.json").read_text())["published"]


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar beside its figure, as far as measured."""
    rows: list[dict[str, Any]] = []

    def bar(name: str, wanted: str, measured: Any, met: bool) -> None:
        rows.append({"name": name, "wanted": wanted, "measured": measured, "met": bool(met)})

    def least(name: str, measured: float, limit: float) -> None:
        bar(name, f">= {limit:g}", measured, measured >= limit)

    if "misfit" in found:
        m = found["misfit"]
        least("misfit: answered, in all", m["mean"]["answered"], 0.9)
        least("  its lowest row", m["lowest"]["answered"], 0.9)
        for name, title in (("alpha_covered", "alpha"), ("loss_covered", "loss at 10x")):
            least(f"misfit: {title} covered, mean", m["mean"][name], 0.93)
            least(f"misfit: {title} covered, lowest row", m["lowest"][name], 0.9)
        ratio = float(np.median([s["median_ratio"] for s in m["settings"]]))
        bar("misfit: median factor of the shown interval", "<= 1.6", ratio, ratio <= 1.6)
        bar("  its widest row", "<= 1.6", m["highest_median_ratio"], m["highest_median_ratio"] <= 1.6)
    if "wrong" in found:
        for name, row in found["wrong"]["bar"].items():
            bar(f"answered wrongly: {name}", "<= 0.05", row["answered"], row["answered"] <= 0.05)
        for name, row in found["wrong"]["elbow at the fourth size"].items():
            inside = [row[key] for key in ("alpha_covered", "loss_covered")]
            ok = row["answered"] <= 0.05 or all(value is None or value >= 0.9 for value in inside)
            bar(f"refused or covered: {name}", "<= 0.05 or >= 0.9 each", [row["answered"], *inside], ok)
    if "uneven" in found:
        u = found["uneven"]
        least("uneven noise, right law: answered", u["right"]["answered"], 0.9)
        least("uneven noise, right law: alpha covered", u["right"]["alpha_covered"] or 0.0, 0.9)
        for name in ("elbow", "log-linear", "exponential", "shuffled"):
            bar(f"uneven noise, {name}: answered", "<= 0.1", u[name]["answered"], u[name]["answered"] <= 0.1)
        for name in ("largest +0.02", "largest +0.05"):
            inside = [u[name].get(key) for key in ("alpha_covered", "c_covered")]
            ok = u[name]["answered"] <= 0.1 or all(value is not None and value >= 0.9 for value in inside)
            bar(f"uneven noise, {name}", "<= 0.1 or >= 0.9 each", [u[name]["answered"], *inside], ok)
    if "clean" in found:
        c = found["clean"]
        least("clean: answered, mean", c["mean"]["answered"], 0.98)
        shown = c["mean"]["alpha_covered"]
        bar("clean: shown interval covers", "0.93..0.99", shown, 0.93 <= shown <= 0.99)
        s = c["statistical_coverage"]
        bar("  clean: statistical interval covers", "0.93..0.99", s, 0.93 <= s <= 0.99)
    if "flags" in found:
        f = found["flags"]
        least("flags: answered, mean", f["mean"]["answered"], 0.95)
        least("flags: answered, lowest row", f["lowest"]["answered"], 0.95)
        least("flags: alpha covered, lowest row", f["lowest"]["alpha_covered"], 0.93)
    if "both" in found:
        for name in ("alpha", "beta", "E"):
            least(f"L(P, D): {name} covered, lowest row", found["both"]["lowest"][f"{name}_covered"], 0.9)
        least("  L(P, D): answered, lowest row", found["both"]["lowest"]["answered"], 0.9)
    if "real" in found:
        whole = [row for row in found["real"].values() if isinstance(row, dict) and row.get("whole")]
        given = sum(row["verdict"] != "refused" or row["predictions"] != "refused" for row in whole)
        bar(f"real tables answered, of {len(whole)}", ">= 10 of 11", given, given >= 10)
        chinchilla = found["real"].get("chin_epoch_240", {}).get("parameters", {})
        truth = {"alpha": 0.3478, "beta": 0.3658, "E": 1.8172}
        inside_all = bool(chinchilla) and all(
            chinchilla[n][1] <= value <= chinchilla[n][2] for n, value in truth.items()
        )
        bar("Chinchilla's 240 cover the published values", "all", {n: chinchilla.get(n) for n in truth}, inside_all)
        held = [row["held_out"] for row in whole]
        covered = sum(h["covered"] for h in held) / max(sum(h["settings"] for h in held), 1)
        least("held-out largest settings covered", covered, 0.9)
        wide = [
            n
            for n, row in found["real"].items()
            if isinstance(row, dict) and "parameters" in row
            for p in ("alpha", "beta")
            if p in row["parameters"] and row["parameters"][p][2] >= 3 * row["parameters"][p][1]
        ]
        bar("shown intervals of a factor >= 3", "none", wide, not wide)
        slow = max(row["cpu_seconds"] for row in found["real"].values() if isinstance(row, dict) and "whole" in row)
        bar("slowest real table, CPU seconds", "< 30", slow, slow < 30)
    if "params_cells" in found:
        p = found["params_cells"]
        e = p["median_relative_error"]
        bar("L(P, D), alpha recovered", "<= 0.015", e["alpha"], e["alpha"] <= 0.015)
        bar("L(P, D), beta recovered", "<= 0.025", e["beta"], e["beta"] <= 0.025)
        ok = all(0.91 <= value <= 0.985 for value in p["coverage"].values())
        bar("L(P, D), profile coverage", "0.91..0.985", p["coverage"], ok)
    if "chinchilla" in found:
        hits = found["chinchilla"]["covered"]
        bar("Chinchilla-form check, of 100", ">= 90 each", hits, min(hits.values()) >= 90)
    if "speed" in found:
        bar("2,000 refits of L(P, D), seconds", "<= 10", found["speed"]["seconds"], found["speed"]["seconds"] <= 10)
    if "audit" in found:
        exact = found["audit"]["alpha"] == 0.26642859805500463 and found["audit"]["r2_log"] == 0.8579791737782294
        bar("audit, all digits and seconds", "< 5", found["audit"]["seconds"], exact and found["audit"]["seconds"] < 5)
    return rows


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
    }


def main() -> int:
    """Measure what was asked for and put it into the results file, beside what stands there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("reports/benchmarks/laws.json"))
    parser.add_argument("--tables", type=int, default=300, help="tables in each setting of the simulation")
    measure: dict[str, Callable[[int], dict[str, Any]]] = {
        "audit": lambda n: audit_check(),
        "speed": lambda n: speed(),
        "misfit": misfit,
        "wrong": wrong,
        "uneven": uneven,
        "clean": clean,
        "flags": flags,
        "both": both,
        "real": lambda n: real(options.folder),
        "params_cells": lambda n: params_cells(2_000, n),
        "chinchilla": lambda n: chinchilla(100),
    }
    parser.add_argument("--folder", type=Path, default=Path("tables"), help="real tables, one CSV file each")
    parser.add_argument("--only", nargs="*", default=list(measure))
    options = parser.parse_args()
    for name in options.only:
        say(name)
        began = time.perf_counter()
        found = measure[name](options.tables)
        entry = found | {"measured_in_seconds": time.perf_counter() - began, "machine": machine()}
        text = options.results.read_text() if options.results.is_file() else "{}"
        results = json.loads(text) | {name: entry}
        results["bars"] = bars(results)
        write_json(options.results, results)
    for row in bars(json.loads(options.results.read_text())):
        print(f"{'met ' if row['met'] else 'MISSED'} {row['name']}: {row['measured']} (wanted {row['wanted']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
