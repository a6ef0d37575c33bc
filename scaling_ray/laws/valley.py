"""The valley of good exponents: the misfit of a law on a grid, and intervals from the part of it below a limit.

At given exponents a law is linear in its coefficients, and with one column per exponent all sums of products over the
settings are matrix products over the grid. So hundreds of settings cost little, and leaving some of them out is another
weight. Ends between grid points are interpolated, on a grid that is narrowed to the part below the limit first; the
exact ends of the statistical profile are found in :mod:`intervals`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_ray.laws.fit import Floats
from scaling_ray.laws.forms import EXPONENT_SEARCH, Form
from scaling_ray.laws.intervals import Interval

_COARSE = {1: 121, 2: 41}
_FINE = {1: 41, 2: 31}
_LAST = {1: 81, 2: 45}
_ZOOMS = {1: 3, 2: 4}
_NARROWINGS = 3
_SEARCH = (float(np.log(EXPONENT_SEARCH[0])), float(np.log(EXPONENT_SEARCH[1])))
_TINY = 1e-300
_NO_LEVERAGE = 1e-250  # a combination that no change of the coefficients moves
POWER_OF, LOGARITHM, STOPS, EXPONENTIAL = "power", "logarithm", "stops", "exponential"
SHAPES = {
    POWER_OF: "x^-exponent",
    LOGARITHM: "-log(x), falling for ever",
    STOPS: "log(x0 / x) up to x0 and nothing after it",
    EXPONENTIAL: "exp(-x / x0)",
}
"""How a term may depend on its axis."""


@dataclass(frozen=True)
class _Face:
    """One set of coefficients in use, on a grid (K,): centred where the floor is among them."""

    centred: bool
    use: tuple[bool, bool]
    rss: Floats
    slopes: tuple[Floats, Floats]  # coefficients of both columns in scaled units
    level: Floats  # the floor
    inverse: tuple[Floats, Floats, Floats]  # of the 2x2 matrix: uu, vv, uv
    means: tuple[Floats, Floats]  # of the columns; zero where not centred


@dataclass(frozen=True)
class Scan:
    """A grid of log exponents, (A,) by (B,), flattened to K, with the best non-negative law at each point."""

    grids: tuple[Floats, ...]
    faces: tuple[_Face, ...]
    rss: Floats  # (K,)
    parameters: Floats  # (K, 3): floor and both scaled coefficients

    @property
    def best(self) -> int:
        """Index of the lowest grid point."""
        return int(np.argmin(self.rss))

    def logs_at(self, index: int) -> Floats:
        """Log exponents (q,) of one grid point."""
        if len(self.grids) == 1:
            return np.array([self.grids[0][index]])
        i, j = divmod(index, self.grids[1].size)
        return np.array([self.grids[0][i], self.grids[1][j]])

    def along(self, index: int) -> Floats:
        """Lowest misfit at each value of one exponent, the other free: a parabola through the grid's lowest three."""
        if len(self.grids) == 1:
            return self.rss
        table = self.rss.reshape(self.grids[0].size, -1)
        table = table if index == 0 else table.T
        rows, k = np.arange(len(table)), np.clip(np.argmin(table, axis=1), 1, table.shape[1] - 2)
        low, mid, high = table[rows, k - 1], table[rows, k], table[rows, k + 1]
        bend = low - 2 * mid + high
        inner = (bend > 0) & (mid <= low) & (mid <= high)
        lowest = np.where(inner, mid - (high - low) ** 2 / (8 * np.where(bend > 0, bend, 1.0)), table.min(axis=1))
        return np.asarray(lowest)


class Valley:
    """A form with one exponent or two on settings with known axes, ready for any losses and weights."""

    def __init__(self, form: Form, axes: Mapping[str, Floats], shapes: Mapping[str, str] | None = None) -> None:
        """Take the axes, each (S,); ``shapes`` replaces the power of an axis by a rival (see :data:`SHAPES`)."""
        self.form = form
        powers = [term for term in form.terms if term.axis is not None]
        self.names = [str(term.exponent) for term in powers]
        self.coefficients = [term.coefficient for term in powers]
        self.axis_names = [str(term.axis) for term in powers]
        self.reference = [float(np.exp(np.mean(np.log(axes[name])))) for name in self.axis_names]
        self.logs = [np.log(axes[name] / ref) for name, ref in zip(self.axis_names, self.reference, strict=True)]
        self.has_floor = form.floor is not None
        self.dimensions = len(powers)
        self.shapes = [(shapes or {}).get(name, POWER_OF) for name in self.axis_names]
        self.ranges = [self._range(i, axes[name]) for i, name in enumerate(self.axis_names)]

    def _range(self, i: int, values: Floats) -> tuple[float, float]:
        """Ends of the logarithm that is searched: of the exponent, or of the place where a rival turns."""
        if self.shapes[i] == POWER_OF:
            return _SEARCH
        if self.shapes[i] == LOGARITHM:
            return 0.0, 0.0
        sorted_logs = np.unique(self.logs[i])
        if self.shapes[i] == STOPS:
            return float(sorted_logs[min(1, sorted_logs.size - 1)]), float(sorted_logs[-1])
        return float(sorted_logs[0]) - 1.0, float(sorted_logs[-1]) + 1.0

    def column(self, i: int, grid: Floats, logs: Floats) -> Floats:
        """One axis' column (A, N) at log axes (N,), for each value (A,) of what is searched."""
        if self.shapes[i] == POWER_OF:
            return np.asarray(np.exp(-np.exp(grid)[:, None] * logs[None, :]))
        if self.shapes[i] == LOGARITHM:
            return np.broadcast_to(-logs[None, :], (grid.size, logs.size))
        if self.shapes[i] == STOPS:
            return np.maximum(grid[:, None] - logs[None, :], 0.0)
        return np.asarray(np.exp(-np.exp(np.clip(logs[None, :] - grid[:, None], -50.0, 50.0))))

    def scan(self, loss: Floats, weight: Floats, grids: Sequence[Floats]) -> Scan:
        """The best laws at every point of a grid of log exponents."""
        columns = [self.column(i, grid, self.logs[i]) for i, grid in enumerate(grids)]
        shape = tuple(g.size for g in grids)
        two = self.dimensions == 2
        total = float(weight.sum())

        def spread(values: Floats, axis: int) -> Floats:
            if not two:
                return values
            return np.broadcast_to(values[:, None] if axis == 0 else values[None, :], shape).reshape(-1)

        faces = []
        zero = np.zeros(int(np.prod(shape)))
        for centred in (True, False) if self.has_floor else (False,):
            mean_y = float(weight @ loss) / total if centred else 0.0
            y = loss - mean_y
            means = [c @ weight / total if centred else np.zeros(len(c)) for c in columns]
            some = [c - m[:, None] for c, m in zip(columns, means, strict=True)]
            yy = float(weight @ y**2)
            uu, uy = spread((some[0] ** 2) @ weight, 0), spread(some[0] @ (weight * y), 0)
            mean_u = spread(means[0], 0)
            if two:
                vv, vy = spread((some[1] ** 2) @ weight, 1), spread(some[1] @ (weight * y), 1)
                uv = ((some[0] * weight) @ some[1].T).reshape(-1)
                mean_v = spread(means[1], 1)
            else:
                vv, vy, uv, mean_v = zero, zero, zero, zero
            for use in ((True, True), (True, False), (False, True), (False, False)):
                if not two and use[1]:
                    continue
                if all(use):
                    determinant = np.maximum(uu * vv - uv**2, 1e-14 * uu * vv + _TINY)
                    inverse = (vv / determinant, uu / determinant, -uv / determinant)
                elif use[0]:
                    inverse = (1.0 / np.maximum(uu, _TINY), zero, zero)
                elif use[1]:
                    inverse = (zero, 1.0 / np.maximum(vv, _TINY), zero)
                else:
                    inverse = (zero, zero, zero)
                a, b = inverse[0] * uy + inverse[2] * vy, inverse[2] * uy + inverse[1] * vy
                rss = np.maximum(yy - a * uy - b * vy, 0.0)
                level = mean_y - a * mean_u - b * mean_v if centred else zero
                faces.append(_Face(centred, use, rss, (a, b), level, inverse, (mean_u, mean_v)))
        lowest, parameters = np.full(zero.size, np.inf), np.zeros((zero.size, 3))
        for face in faces:
            feasible = (face.slopes[0] >= 0) & (face.slopes[1] >= 0) & (face.level >= 0) & (face.rss < lowest)
            lowest = np.where(feasible, face.rss, lowest)
            stacked = np.stack([face.level, *face.slopes], axis=1)
            parameters = np.where(feasible[:, None], stacked, parameters)
        return Scan(tuple(grids), tuple(faces), lowest, parameters)

    def whole(self, loss: Floats, weight: Floats) -> Scan:
        """The scan of the whole search."""
        return self.scan(loss, weight, [np.linspace(*ends, _COARSE[self.dimensions]) for ends in self.ranges])

    def minimum(self, loss: Floats, weight: Floats, coarse: Scan) -> tuple[float, Floats]:
        """Lowest misfit and its log exponents (q,), zooming in from the lowest point of a coarse scan."""
        scan, reach = coarse, [float(g[1] - g[0]) for g in coarse.grids]
        for _ in range(_ZOOMS[self.dimensions]):
            centre = scan.logs_at(scan.best)
            grids = [
                np.linspace(max(c - r, low), min(c + r, high), _FINE[self.dimensions])
                for c, r, (low, high) in zip(centre, reach, self.ranges, strict=True)
            ]
            scan = self.scan(loss, weight, grids)
            reach = [2.0 * float(g[1] - g[0]) for g in grids]
        return float(scan.rss[scan.best]), scan.logs_at(scan.best)

    def below(self, loss: Floats, weight: Floats, coarse: Scan, centre: Floats, limit: float) -> Scan:
        """A scan of the box that holds every exponent whose misfit is at most ``limit``."""
        scan, inside = coarse, centre
        for step in range(_NARROWINGS):
            grids = []
            for i, grid in enumerate(scan.grids):
                under = np.flatnonzero(scan.along(i) <= limit)
                first = under[0] if under.size else grid.size
                last = under[-1] if under.size else -1
                low = min(int(first), int(np.searchsorted(grid, inside[i]))) - 1
                high = max(int(last), int(np.searchsorted(grid, inside[i], side="right")) - 1) + 1
                ends = grid[max(low, 0)], grid[min(high, grid.size - 1)]
                count = (_LAST if step == _NARROWINGS - 1 else _FINE)[self.dimensions]
                grids.append(np.linspace(*ends, count))
            scan = self.scan(loss, weight, grids)
        return scan

    def exponent(self, scan: Scan, index: int, limit: float, centre: float) -> Interval:
        """Outermost values of an exponent at ``limit``; an end on the edge of the search is open."""
        grid, along = scan.grids[index], scan.along(index)
        under = along <= limit
        ends: list[float | None] = []
        for step in (1, -1):
            values, inside, low_enough = grid[::step], along[::step], under[::step]
            edge = _SEARCH[0] if step == 1 else _SEARCH[1]
            if not low_enough.any():
                at_edge = abs(centre - edge) < 1e-6
                ends.append(None if at_edge else centre)
                continue
            first = int(np.argmax(low_enough))
            if first == 0:
                ends.append(None if abs(values[0] - edge) < 1e-6 else float(values[0]))
                continue
            # Misfit is near a square of the distance, so its root is interpolated.
            least = float(along.min())
            outer, inner = np.sqrt(inside[first - 1] - least), np.sqrt(max(inside[first] - least, 0.0))
            share = (np.sqrt(max(limit - least, 0.0)) - inner) / max(outer - inner, _TINY)
            ends.append(float(values[first] + share * (values[first - 1] - values[first])))
        low, high = (None if end is None else float(np.exp(end)) for end in ends)
        return Interval(low, high)

    def parameter_weights(self, scan: Scan, name: str) -> tuple[float, Floats, Floats]:
        """What floor and coefficients (K,) are multiplied with to give one coefficient in plain units."""
        exponents = self._exponents(scan)
        zero = np.zeros(scan.rss.size)
        if name == self.form.floor:
            return 1.0, zero, zero
        i = self.coefficients.index(name)
        units = self.reference[i] ** exponents[i]
        return (0.0, units, zero) if i == 0 else (0.0, zero, units)

    def place_weights(self, scan: Scan, place: Mapping[str, float]) -> tuple[float, Floats, Floats]:
        """The same for the loss at a place (axis -> value)."""
        columns = [
            self.column(i, scan.grids[i], np.array([np.log(place[name] / ref)]))[:, 0]
            for i, (name, ref) in enumerate(zip(self.axis_names, self.reference, strict=True))
        ]
        if len(columns) == 1:
            return float(self.has_floor), columns[0], np.zeros(scan.rss.size)
        u, v = np.meshgrid(*columns, indexing="ij")
        return float(self.has_floor), u.reshape(-1), v.reshape(-1)

    def _exponents(self, scan: Scan) -> list[Floats]:
        """Each exponent at every grid point, (K,)."""
        grids = np.meshgrid(*[np.exp(g) for g in scan.grids], indexing="ij")
        return [g.reshape(-1) for g in grids]

    def value(self, scan: Scan, combined: tuple[float, Floats, Floats]) -> float:
        """A combination of coefficients at the lowest grid point."""
        k, (floor, u, v) = scan.best, combined
        level, a, b = scan.parameters[k]
        return float(floor * level + u[k] * a + v[k] * b)

    def ends(
        self, scan: Scan, weight: Floats, combined: tuple[float, Floats, Floats], limit: float, *, open_at_edge: bool
    ) -> Interval:
        """Range of a combination of coefficients over all laws whose misfit is at most ``limit``."""
        floor, u, v = combined
        total = float(weight.sum())
        found: list[float | None] = []
        for sign in (-1.0, 1.0):
            best = np.full(scan.rss.size, -np.inf)
            for face in scan.faces:
                z = (u - floor * face.means[0], v - floor * face.means[1])
                towards = (
                    face.inverse[0] * z[0] + face.inverse[2] * z[1],
                    face.inverse[2] * z[0] + face.inverse[1] * z[1],
                )
                at_mean = floor / total if face.centred else 0.0
                leverage = at_mean * floor + z[0] * towards[0] + z[1] * towards[1]
                movable = leverage > _NO_LEVERAGE
                inside = (face.rss <= limit) & movable
                step = sign * np.sqrt(np.maximum(limit - face.rss, 0.0) / np.where(movable, leverage, 1.0))
                a, b = face.slopes[0] + step * towards[0], face.slopes[1] + step * towards[1]
                moved = at_mean - towards[0] * face.means[0] - towards[1] * face.means[1]
                level = face.level + (step * moved if face.centred else 0.0)
                slack = 1e-9 * (np.abs(face.level) + np.abs(face.slopes[0]) + np.abs(face.slopes[1]))
                feasible = inside & (a >= -slack) & (b >= -slack) & (level >= -slack)
                value = sign * (floor * level + u * a + v * b)
                best = np.where(feasible & (value > best), value, best)
            own = sign * (floor * scan.parameters[:, 0] + u * scan.parameters[:, 1] + v * scan.parameters[:, 2])
            best = np.where((scan.rss <= limit) & (own > best), own, best)
            k = int(np.argmax(best))
            logs = scan.logs_at(k)
            stuck = bool(np.any((logs < _SEARCH[0] + 1e-6) | (logs > _SEARCH[1] - 1e-6)))
            found.append(None if (stuck and open_at_edge) or not np.isfinite(best[k]) else sign * float(best[k]))
        return Interval(found[0], found[1])
