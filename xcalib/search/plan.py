"""Curves and a target give one level per head, what it should cost, and a bound on what was missed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xcalib.choices import SearchMethod
from xcalib.collect.curves import Curves
from xcalib.errors import TargetError
from xcalib.profile import Bound, SearchRound
from xcalib.search.knapsack import knapsack, knapsack_min_cost
from xcalib.search.objectives import Objective, losses
from xcalib.search.paper import paper_thresholds
from xcalib.search.targets import Target

__all__ = ["Planned", "SearchMethod", "Tables", "all_layers", "plan_point", "uniform_thresholds"]

AccuracyDrop = Callable[[list[np.ndarray]], list[float]]


@dataclass(frozen=True, eq=False)
class Planned:
    """Thresholds for one operating point.

    Attributes:
        thresholds: fp64 ``(layers, heads)`` of the measured layers.
        density: predicted, over the measured layers.
        kl: predicted, nats per token.
        bound: optimality record (knapsack only).
        rounds: steps that were tried from there (:mod:`xcalib.search.sequential`).
    """

    thresholds: np.ndarray
    density: float
    kl: float
    bound: Bound | None
    rounds: tuple[SearchRound, ...] = ()


@dataclass(frozen=True, eq=False)
class Tables:
    """What the search reads off the curves, one row per head of the model.

    Attributes:
        grid: taus ``(levels,)``.
        cost: share of all visible blocks ``(layers * heads, levels)``; a choice's sum is its density.
        loss: what is minimised, same shape.
        kl: KL in nats per token that each head alone would cause, same shape: gain times relative output error.
        shape: ``(layers, heads)``.
        curves: where all this was read; knows how losses combine.
    """

    grid: np.ndarray
    cost: np.ndarray
    loss: np.ndarray
    kl: np.ndarray
    shape: tuple[int, int]
    curves: Curves

    @classmethod
    def of(cls, curves: Curves, objective: Objective = "tempered") -> "Tables":
        """Read curves; the objectives are those of :func:`xcalib.search.objectives.losses`.

        Raises:
            TargetError: the curves were measured without what the objective needs.
        """
        layers, heads, levels = curves.relative_error.shape
        kl = curves.gain[:, None, None] * curves.relative_error
        loss = losses(curves, objective)
        cost = curves.density / (layers * heads)
        flat = (layers * heads, levels)
        return cls(curves.grid, cost.reshape(flat), loss.reshape(flat), kl.reshape(flat), (layers, heads), curves)

    def at(self, table: np.ndarray, thresholds: np.ndarray) -> float:
        """Sum over heads of a table at thresholds ``(layers, heads)``, linear in tau between levels."""
        return float(sum(values_at(self.grid, table, thresholds).flat))

    def predicted_kl(self, thresholds: np.ndarray) -> float:
        """Nats per token with all heads at their thresholds together, on new text."""
        return self.curves.joint(self.at(self.kl, thresholds))


def values_at(grid: np.ndarray, table: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Each head's value of a table, whose last axis has the grid's levels, at its threshold, linear in tau between levels.

    Of the thresholds' shape, ``(layers, heads)``.
    """
    rows = zip(thresholds.reshape(-1), table.reshape(-1, len(grid)), strict=True)
    return np.array([np.interp(tau, grid, row) for tau, row in rows]).reshape(thresholds.shape)


def all_layers(curves: Curves, thresholds: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Thresholds ``(measured layers, heads)`` to those of every layer; layers that stay dense get 1."""
    full = np.ones((int(curves.model["layers"]), thresholds.shape[1]))
    full[list(curves.layers)] = thresholds
    return tuple(tuple(float(tau) for tau in row) for row in full)


def uniform_thresholds(tables: Tables, density: float) -> float:
    """The single tau whose predicted density is ``density``."""
    return float(np.interp(density, tables.cost.sum(axis=0), tables.grid))


def plan_point(
    tables: Tables,
    target: Target,
    *,
    method: SearchMethod = "knapsack",
    start_threshold: float = 0.9,
    accuracy_drop: AccuracyDrop | None = None,
) -> Planned:
    """Find the thresholds of one operating point.

    Args:
        tables: from :meth:`Tables.of`.
        target: what is bounded.
        method: ``knapsack`` or ``paper`` (the published recurrence, docs/paper-dp.md).
        start_threshold: of the paper's method.
        accuracy_drop: for ``drop`` targets: thresholds of several candidates to their measured relative drops.

    Raises:
        TargetError: the target cannot be reached, or needs measurements that are not at hand.
    """
    if method == "paper" and not 0 < start_threshold <= 1:
        raise TargetError(f"start_threshold is {start_threshold}, expected a number above 0 and at most 1")
    if target.kind == "kl":
        return _bounded_kl(tables, target, method, start_threshold)
    if target.kind == "drop":
        return _bounded_drop(tables, target, method, start_threshold, accuracy_drop)
    # On a CPU the cost model of a speed-up is the block count: attention runs 1 / density times as fast.
    density = target.value if target.kind == "density" else 1 / target.value
    return _bounded_density(tables, target, density, method, start_threshold)


def _bounded_density(tables: Tables, target: Target, density: float, method: SearchMethod, start: float) -> Planned:
    least = float(tables.cost.min(axis=1).sum())
    if density < least:
        raise TargetError(
            f"target {target} is out of reach: the blocks that are always kept are already {least:.3f} of all; "
            "choose a higher density, longer samples or smaller blocks"
        )
    if method == "paper":
        result = paper_thresholds(
            tables.grid, tables.cost, tables.loss, budget=density, start_threshold=start, max_steps=_steps(tables)
        )
        return _at(tables, result.thresholds.reshape(tables.shape), None)
    choice = knapsack(tables.cost, tables.loss, density)
    bound = Bound(cost=choice.cost, error=choice.error, lower_bound=choice.lower_bound, gap=_finite(choice.gap))
    return _at(tables, tables.grid[choice.choice].reshape(tables.shape), bound)


def _bounded_kl(tables: Tables, target: Target, method: SearchMethod, start: float) -> Planned:
    most = float(tables.kl.max(axis=1).sum())  # what the worst choice loses: a larger target asks nothing
    largest = tables.curves.alone(target.value) if target.value < tables.curves.joint(most) else most
    if method == "paper":
        result = paper_thresholds(
            tables.grid, tables.cost, tables.kl, max_error=largest, start_threshold=start, max_steps=_steps(tables)
        )
        return _at(tables, result.thresholds.reshape(tables.shape), None)
    choice = knapsack_min_cost(tables.cost, tables.kl, largest)
    bound = Bound(cost=choice.cost, error=choice.error, lower_bound=choice.lower_bound, gap=_finite(choice.gap))
    return _at(tables, tables.grid[choice.choice].reshape(tables.shape), bound)


def _bounded_drop(
    tables: Tables, target: Target, method: SearchMethod, start: float, accuracy_drop: AccuracyDrop | None
) -> Planned:
    if accuracy_drop is None:
        raise TargetError(
            f"target {target} needs the model and samples with answers: give MODEL and data such as 'ruler'"
        )
    least = float(tables.cost.min(axis=1).sum())
    densities = np.geomspace(0.9, max(least, 0.02) * 1.02, 8)
    plans = [_bounded_density(tables, target, float(d), method, start) for d in densities]
    drops = accuracy_drop([plan.thresholds for plan in plans])
    chosen = None
    for plan, drop in zip(plans, drops, strict=True):
        if drop > target.value + 1e-9:  # what lies beyond the first miss would be luck
            break
        chosen = plan
    if chosen is None:
        raise TargetError(
            f"target {target} is out of reach: at density {densities[0]:.2f} the accuracy drops by {drops[0]:.1%} already; "
            "choose a larger drop or more samples"
        )
    return chosen


def _at(tables: Tables, thresholds: np.ndarray, bound: Bound | None) -> Planned:
    return Planned(thresholds, tables.at(tables.cost, thresholds), tables.predicted_kl(thresholds), bound)


def _finite(gap: float) -> float | None:
    return gap if np.isfinite(gap) else None


def _steps(tables: Tables) -> int:
    # The published M = 1000 is one drop per head of a 32 x 32 model; 22 drops take a head from 0.9 to below 0.1.
    return max(1000, 22 * len(tables.cost))
