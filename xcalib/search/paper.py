"""XAttention's "minimum threshold prediction" (arXiv 2503.16428), from measured curves instead of model evaluations.

The paper's recurrence over heads h and steps m, with D the best performance found::

    D[h][m] = max(D[h-1][m], P(h, m))
    P(h, m): performance after one more step on head h from the state of D[h-1][m-1]

``docs/paper-dp.md`` says what the paper leaves open and what is decided here.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xcalib.errors import TargetError

__all__ = ["PaperResult", "paper_thresholds"]

FloatArray = npt.NDArray[np.float64]
CountArray = npt.NDArray[np.int32]

_ROUNDING = 1e-12  # relative; the sums over heads are kept by adding one step's change at a time


@dataclass(frozen=True, eq=False)
class PaperResult:
    """The state that was taken, and all states of the last pass.

    Attributes:
        thresholds: (heads,) float64 tau of each head.
        steps: m, the number of steps taken.
        passes: how often the recurrence went over the heads; a head has taken at most this many steps.
        cost: sum over heads of the interpolated cost.
        error: sum over heads of the interpolated error; the performance is its negative.
        path: (states, 2) float64, (cost, error) of D[last head][m] for m = 0, 1, ...; row ``steps`` is the state taken.
    """

    thresholds: FloatArray
    steps: int
    passes: int
    cost: float
    error: float
    path: FloatArray


def paper_thresholds(
    grid: npt.ArrayLike,
    cost: npt.ArrayLike,
    error: npt.ArrayLike,
    *,
    budget: float | None = None,
    max_error: float | None = None,
    start_threshold: float = 0.9,
    step: float = 0.9,
    max_steps: int = 1000,
) -> PaperResult:
    """Thresholds by the paper's recurrence: the fewest steps that meet ``budget`` or the most that keep ``max_error``.

    Args:
        grid: (levels,) taus, increasing, from 0 to 1.
        cost: (heads, levels) measured at ``grid``, finite, >= 0, any unit that adds up over heads. Where it falls with
            tau it is raised to the running maximum.
        error: (heads, levels) predicted loss at ``grid``, finite, >= 0. Both are interpolated linearly in tau.
        budget: largest sum of cost. Give either this or ``max_error``; both hold up to 1e-12 (relative).
        max_error: largest sum of error.
        start_threshold: every head's tau before the first step, in (0, 1].
        step: factor on a head's tau per step, in (0, 1).
        max_steps: M, the largest m. The time grows with ``max_steps * max(max_steps, heads)``.

    Raises:
        ValueError: a malformed argument.
        TargetError: no state within ``max_steps`` meets the target.
    """
    taus, costs, errors = _checked_curves(grid, cost, error)
    _check_settings(budget, max_error, start_threshold, step, max_steps)
    settings = f"start_threshold={start_threshold}, step={step}, max_steps={max_steps}, {len(costs)} heads"
    ladder: FloatArray = start_threshold * np.float64(step) ** np.arange(math.ceil(max_steps / len(costs)) + 1)
    rungs = _Rungs(
        _interpolated(taus, np.maximum.accumulate(costs, axis=1), ladder), _interpolated(taus, errors, ladder)
    )
    target = _Target(budget, max_error, settings)
    target.check_floor(float(costs[:, 0].sum()))
    states, passes = rungs.first_states(), 0
    while (steps := target.chosen(states, last=states.cost.size > max_steps)) is None:
        states = _next_pass(rungs, states, max_steps)
        passes += 1
    return PaperResult(
        thresholds=ladder[states.drops[:, steps]],
        steps=steps,
        passes=passes,
        cost=float(states.cost[steps]),
        error=float(states.error[steps]),
        path=np.stack([states.cost, states.error], axis=1),
    )


@dataclass(frozen=True, eq=False)
class _States:
    """D[last head][m] of one pass: (states,) cost and error, (heads, states) steps taken by each head."""

    cost: FloatArray
    error: FloatArray
    drops: CountArray


@dataclass(frozen=True, eq=False)
class _Rungs:
    """(heads, rungs) cost and error of a head after 0, 1, 2, ... steps."""

    cost: FloatArray
    error: FloatArray

    def first_states(self) -> _States:
        """The base case: no step taken, m = 0 only."""
        drops = np.zeros((len(self.cost), 1), dtype=np.int32)
        return _States(self.cost[:, 0].sum(keepdims=True), self.error[:, 0].sum(keepdims=True), drops)


def _next_pass(rungs: _Rungs, before: _States, max_steps: int) -> _States:
    """The recurrence once over the heads, all m at once, from the states that the pass before ended in."""
    heads, known = before.drops.shape
    states = min(known + heads, max_steps + 1)
    cost, error = np.zeros(states), np.full(states, np.inf)  # a state that no step has reached yet has infinite error
    cost[:known], error[:known] = before.cost, before.error
    origin = np.minimum(np.arange(states), known - 1)  # the state of the pass before that this one grew from
    stepped = np.zeros((heads, states), dtype=np.bool_)
    cost_change, error_change = np.diff(rungs.cost, axis=1), np.diff(rungs.error, axis=1)
    for head in range(heads):
        drops = before.drops[head, origin[:-1]]
        after = error[:-1] + error_change[head, drops]  # -P(h, m) for m = 1, 2, ...
        better = after < error[1:]
        after_cost = cost[:-1] + cost_change[head, drops]
        np.copyto(cost[1:], after_cost, where=better)
        np.copyto(error[1:], after, where=better)
        np.copyto(origin[1:], origin[:-1].copy(), where=better)
        stepped[head, 1:] = better
    return _States(cost, error, _traced(stepped, before.drops))


def _traced(stepped: npt.NDArray[np.bool_], before: CountArray) -> CountArray:
    """Steps per head of every state, read back from the last head to the first: (heads, states)."""
    state = np.arange(stepped.shape[1])
    drops = np.zeros(stepped.shape, dtype=np.int32)
    for head in range(len(stepped) - 1, -1, -1):
        drops[head] = stepped[head, state]
        state = state - drops[head]
    drops += before[:, state]
    return drops


@dataclass(frozen=True)
class _Target:
    budget: float | None
    max_error: float | None
    settings: str

    def check_floor(self, floor: float) -> None:
        if self.budget is not None and floor > self.budget * (1 + _ROUNDING):
            raise TargetError(
                f"budget {self.budget:g} cannot be reached: every head at tau 0 costs {floor:g}; raise the budget"
            )

    def chosen(self, states: _States, *, last: bool) -> int | None:
        """m, or None when another pass is needed."""
        if self.budget is not None:
            fits = np.flatnonzero(states.cost <= self.budget * (1 + _ROUNDING))
            if fits.size == 0 and last:
                raise TargetError(
                    f"budget {self.budget:g} cannot be reached: the least cost is {states.cost.min():g} "
                    f"({self.settings}); raise max_steps or the budget"
                )
            return int(fits[0]) if fits.size else None
        assert self.max_error is not None
        fits = np.flatnonzero(states.error <= self.max_error * (1 + _ROUNDING))
        if fits.size == 0:
            raise TargetError(
                f"max_error {self.max_error:g} cannot be kept: the least error is {states.error.min():g} "
                f"({self.settings}); raise start_threshold or max_error"
            )
        return int(fits[-1]) if last or fits.size < states.error.size else None


def _interpolated(grid: FloatArray, table: FloatArray, taus: FloatArray) -> FloatArray:
    """(heads, taus) values of (heads, levels) measured at ``grid``, linear in between."""
    left = np.clip(np.searchsorted(grid, taus, side="right") - 1, 0, grid.size - 2)
    weight = (taus - grid[left]) / (grid[left + 1] - grid[left])
    values: FloatArray = table[:, left] * (1 - weight) + table[:, left + 1] * weight
    return values


def _checked_curves(
    grid: npt.ArrayLike, cost: npt.ArrayLike, error: npt.ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    taus = np.asarray(grid, dtype=np.float64)
    if taus.ndim != 1 or taus.size < 2:
        raise ValueError(f"grid has shape {taus.shape}: it must be (levels,) with at least 2 levels")
    if taus[0] != 0 or taus[-1] != 1 or not (np.diff(taus) > 0).all():
        raise ValueError(f"grid is {taus.tolist()}: it must increase from 0 to 1")
    tables = []
    for name, values in (("cost", cost), ("error", error)):
        table = np.asarray(values, dtype=np.float64)
        if table.ndim != 2 or len(table) == 0 or table.shape[1] != taus.size:
            raise ValueError(
                f"{name} has shape {table.shape}: it must be (heads, {taus.size}), a column per tau of grid"
            )
        bad = np.argwhere(~(np.isfinite(table) & (table >= 0)))
        if bad.size:
            head, level = bad[0]
            raise ValueError(f"{name}[{head}, {level}] is {table[head, level]}: it must be finite and >= 0")
        tables.append(table)
    if tables[0].shape != tables[1].shape:
        raise ValueError(f"error has shape {tables[1].shape}: it must be the shape of cost, {tables[0].shape}")
    return taus, tables[0], tables[1]


def _check_settings(
    budget: float | None, max_error: float | None, start_threshold: float, step: float, max_steps: int
) -> None:
    if (budget is None) == (max_error is None):
        raise ValueError(f"budget is {budget} and max_error is {max_error}: exactly one must be given")
    for name, limit in (("budget", budget), ("max_error", max_error)):
        if limit is not None and not (math.isfinite(limit) and limit >= 0):
            raise ValueError(f"{name} is {limit}: it must be finite and >= 0")
    if not 0 < start_threshold <= 1:
        raise ValueError(f"start_threshold is {start_threshold}: it must be in (0, 1]")
    if not 0 < step < 1:
        raise ValueError(f"step is {step}: it must be in (0, 1)")
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}: it must be at least 1")
