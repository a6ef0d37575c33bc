"""Count what the laws promise on tables of known truth: recovery, coverage, answers, refusals, speed.

Writes reports/benchmarks/laws.json, each entry with the machine, the date and the commit. Seeds are fixed. Nothing here
judges: bars and figures stand side by side in ``bars``. The bars leave designs open, and trial runs were seen before
these were settled: log-linear tables and two largest sizes that turn up (refused less often) stand beside the
edge-floor bar and not in it, elbows at the higher noise likewise, and recovery depends on the gap, so that half of it
is shown too.

- sizes: six of the study's ladder (TINY to XL) and eight equally spaced over the same range; 3 seeds;
- with floor: the smallest size stands 1.0 above a floor of 1.0, about the gap that the smallest sizes of a planted
  sweep have; without: the largest size is at 0.5, so that no loss is near zero;
- undertrained: 0.03 more at the largest size; elbow: a power law up to the third or fourth of six sizes, flat after it;
- edge-floor: every size but the first already at the floor (alpha = 4), so that the floor fits the smallest loss and
  alpha has nothing to hold it below the edge of its search.
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
from scaling_ray.laws.simulate import JudgedTables, draw, expected_ratio, fit_and_judge
from scaling_ray.results.cohorts import fit_columns
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


def describe(judged: JudgedTables, alpha: float) -> dict[str, Any]:
    """Figures of one setting of the simulation."""
    answered = judged.answered
    widths = judged.log_width_ratio()[answered]
    return {
        "tables": int(answered.size),
        "answered": share(answered),
        "median_relative_error": float(np.median(np.abs(judged.alpha / alpha - 1.0))),
        "statistical_coverage": share(judged.covers(alpha)[answered]),
        "headline_coverage": share(judged.covers(alpha, headline=True)[answered]),
        "headline_coverage_of_all": share(judged.covers(alpha, headline=True)),
        "headline_open": share(np.isinf(widths)),
        "log_width_ratio_median": float(np.median(widths)) if widths.size else None,
        "refused_by": {name: float(np.mean(flags)) for name, flags in judged.refused_by.items() if np.any(flags)},
    }


def clean(tables: int) -> dict[str, Any]:
    """Recovery, coverage and answers on clean tables, every setting and pooled."""
    settings: list[dict[str, Any]] = []
    pooled: list[tuple[dict[str, Any], JudgedTables]] = []
    for title, params in LADDERS.items():
        for noise in NOISES:
            for alpha in ALPHAS:
                for floor in (True, False):
                    rng = np.random.default_rng([1, len(settings)])
                    law = law_of(params, alpha, floor)
                    judged = fit_and_judge(params, draw(law, noise, tables, SEEDS, rng))
                    setting: dict[str, Any] = {"ladder": title, "noise": noise, "alpha": alpha, "floor": floor}
                    setting["expected_ratio"] = expected_ratio(params, law, noise, SEEDS)
                    settings.append(setting | describe(judged, alpha))
                    pooled.append((setting, judged))
        say(f"clean tables, {title}: done")

    def over(
        chosen: Callable[[dict[str, Any]], bool], figure: Callable[[JudgedTables, float], np.ndarray]
    ) -> np.ndarray:
        return np.concatenate([figure(judged, setting["alpha"]) for setting, judged in pooled if chosen(setting)])

    def everything(setting: dict[str, Any]) -> bool:
        return True

    def median_error(noise: float, floors: tuple[bool, ...]) -> float:
        errors = over(
            lambda c: c["noise"] == noise and c["floor"] in floors, lambda j, alpha: np.abs(j.alpha / alpha - 1.0)
        )
        return float(np.median(errors))

    def widths_where(chosen: Callable[[dict[str, Any]], bool]) -> np.ndarray:
        return over(chosen, lambda j, alpha: j.log_width_ratio()[j.answered])

    def median_width_of_ladder(title: str) -> float:
        return float(np.median(widths_where(lambda c: c["ladder"] == title)))

    widths = widths_where(everything)
    return {
        "median_relative_error": {f"{noise:g}": median_error(noise, (True, False)) for noise in NOISES},
        "median_relative_error_with_floor": {f"{noise:g}": median_error(noise, (True,)) for noise in NOISES},
        "statistical_coverage": share(over(everything, lambda j, alpha: j.covers(alpha)[j.answered])),
        "headline_coverage": share(over(everything, lambda j, alpha: j.covers(alpha, headline=True)[j.answered])),
        "log_width_ratio_median": float(np.median(widths)),
        "log_width_ratio_median_by_ladder": {title: median_width_of_ladder(title) for title in LADDERS},
        "log_width_ratio_above_4": share(widths > 4.0),
        "answered_where_expected_ratio_below_2": share(
            over(lambda c: c["expected_ratio"] < 2.0, lambda j, alpha: j.answered)
        ),
        "lowest_answered_of_a_setting": min(c["answered"] for c in settings if c["expected_ratio"] < 2.0),
        "settings": settings,
    }


def half_gap(tables: int) -> dict[str, Any]:
    """Recovery with a floor where the smallest size stands only 0.5 above it: twice the error, by scale."""
    errors: dict[str, Any] = {}
    for i, noise in enumerate(NOISES):
        found = []
        for j, (params, alpha) in enumerate((p, a) for p in LADDERS.values() for a in ALPHAS):
            law = 1.0 + 0.5 * (params / params[0]) ** -alpha
            judged = fit_and_judge(params, draw(law, noise, tables, SEEDS, np.random.default_rng([10, i, j])))
            found.append(np.abs(judged.alpha / alpha - 1.0))
        errors[f"{noise:g}"] = float(np.median(np.concatenate(found)))
    return {"median_relative_error_with_floor": errors}


def undertrained(tables: int) -> dict[str, Any]:
    """Coverage where the largest size is 0.03 worse than its law."""
    settings: list[dict[str, Any]] = []
    hits, every = [], []
    for title, params in LADDERS.items():
        for noise in NOISES:
            for alpha in ALPHAS:
                rng = np.random.default_rng([2, len(settings)])
                law = law_of(params, alpha, True)
                law[-1] += 0.03
                judged = fit_and_judge(params, draw(law, noise, tables, SEEDS, rng))
                settings.append({"ladder": title, "noise": noise, "alpha": alpha} | describe(judged, alpha))
                hits.append(judged.covers(alpha, headline=True)[judged.answered])
                every.append(judged.covers(alpha, headline=True))
    statistical = [c["statistical_coverage"] for c in settings if c["statistical_coverage"] is not None]
    return {
        "headline_coverage": share(np.concatenate(hits)),
        "headline_coverage_of_all": share(np.concatenate(every)),
        "statistical_coverage_lowest": min(statistical),
        "settings": settings,
    }


def refused(tables: int) -> dict[str, Any]:
    """Share of hopeless tables that are refused; ``beside`` holds harder ones that no bar speaks of."""
    x = SIX / SIX[0]
    hopeless: dict[str, tuple[np.ndarray, float]] = {}
    beside: dict[str, tuple[np.ndarray, float]] = {}
    for noise in NOISES:
        hopeless[f"pure noise, {noise:g}"] = (np.full(SIX.size, 1.5), noise)
        hopeless[f"edge-floor, {noise:g}"] = (1.45 + x**-4.0, noise)
        for alpha in (0.2, 0.3, 0.4):
            for last in (2, 3):
                elbow = 1.5 * (np.minimum(SIX, SIX[last]) / SIX[0]) ** -alpha
                where = hopeless if noise == NOISES[0] else beside
                where[f"elbow at size {last + 1}, alpha {alpha}, {noise:g}"] = (elbow, noise)
        turned = 1.45 + 0.16 * x**-0.3
        turned[4:] = turned[3] + 0.015
        beside[f"the two largest 0.015 worse than the third, {noise:g}"] = (turned, noise)
        beside[f"log-linear, {noise:g}"] = (2.0 - 0.05 * np.log(x), noise)

    def measure(table: dict[str, tuple[np.ndarray, float]], first: int) -> dict[str, float]:
        found = {}
        for i, (name, (law, noise)) in enumerate(table.items()):
            judged = fit_and_judge(SIX, draw(law, noise, tables, SEEDS, np.random.default_rng([first, i])))
            found[name] = float(np.mean(~judged.answered))
        return found

    rates = measure(hopeless, 3)
    two = []
    for seed in range(20):
        losses = draw(law_of(SIX, 0.3, True)[[1, 3]], 0.006, 1, SEEDS, np.random.default_rng([4, seed]))
        table = {"params": np.repeat(SIX[[1, 3]], SEEDS), "loss": losses.reshape(-1)}
        two.append(fit_columns(table)["headline"]["verdict"] == "refused")
    rates["two sizes, through fit_columns"] = float(np.mean(two))
    return {"refused": rates, "lowest": min(rates.values()), "beside": measure(beside, 5)}


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


def _named(setting: dict[str, Any]) -> str:
    floor = "floor" if setting["floor"] else "no floor"
    return f"{setting['ladder']}, alpha {setting['alpha']}, {floor}, noise {setting['noise']:g}"


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar beside its figure, as far as measured."""
    rows: list[dict[str, Any]] = []

    def bar(name: str, wanted: str, measured: Any, met: bool) -> None:
        rows.append({"name": name, "wanted": wanted, "measured": measured, "met": bool(met)})

    if "clean" in found:
        c = found["clean"]
        # Judged on the tables with a floor, the harder half: without one alpha is known to a thousandth.
        for noise, limit in (("0.006", 0.025), ("0.02", 0.05)):
            error = c["median_relative_error_with_floor"][noise]
            bar(f"recovery with floor, noise {noise}", f"<= {limit}", error, error <= limit)
            worst = max(
                (x for x in c["settings"] if f"{x['noise']:g}" == noise), key=lambda x: x["median_relative_error"]
            )
            error = worst["median_relative_error"]
            bar(f"  its worst setting ({_named(worst)})", f"<= {limit}", error, error <= limit)
        s, h = c["statistical_coverage"], c["headline_coverage"]
        bar("statistical coverage", "0.91..0.985", s, 0.91 <= s <= 0.985)
        bar("headline coverage", ">= 0.92", h, h >= 0.92)
        for title, width in c["log_width_ratio_median_by_ladder"].items():
            bar(f"headline log-width over the profile's, median, {title}", "<= 4", width, width <= 4.0)
        worst = max(c["settings"], key=lambda x: x["log_width_ratio_median"])
        width = worst["log_width_ratio_median"]
        bar(f"  its worst setting ({_named(worst)})", "<= 4", width, width <= 4.0)
        a = c["answered_where_expected_ratio_below_2"]
        bar("answered", ">= 0.95", a, a >= 0.95)
    if "half_gap" in found:
        for noise, limit in (("0.006", 0.025), ("0.02", 0.05)):
            error = found["half_gap"]["median_relative_error_with_floor"][noise]
            bar(f"  recovery with floor at half the gap, noise {noise}", f"<= {limit}", error, error <= limit)
    if "undertrained" in found:
        u = found["undertrained"]["headline_coverage"]
        bar("headline coverage, largest size undertrained by 0.03", ">= 0.90", u, u >= 0.90)
    if "refused" in found:
        r = found["refused"]["lowest"]
        bar("refused, lowest of all kinds (elbow at noise 0.006)", ">= 0.95", r, r >= 0.95)
        elbows = {n: share for n, share in found["refused"]["beside"].items() if n.startswith("elbow")}
        worst_elbow = min(elbows, key=lambda n: elbows[n])
        bar(f"  {worst_elbow}", ">= 0.95", elbows[worst_elbow], elbows[worst_elbow] >= 0.95)
    if "params_cells" in found:
        p = found["params_cells"]
        e = p["median_relative_error"]
        bar("L(P, D), alpha", "<= 0.015", e["alpha"], e["alpha"] <= 0.015)
        bar("L(P, D), beta", "<= 0.025", e["beta"], e["beta"] <= 0.025)
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
        "clean": clean,
        "half_gap": half_gap,
        "undertrained": undertrained,
        "refused": refused,
        "params_cells": lambda n: params_cells(2_000, n),
        "chinchilla": lambda n: chinchilla(100),
    }
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
