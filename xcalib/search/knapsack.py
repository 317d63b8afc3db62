"""Multiple-choice knapsack: one level per head, the sum of one table within a budget, the sum of another the least.

A linear relaxation gives a lower bound and a first solution, reduced costs fix most heads, and dynamic programming over
Pareto states decides the rest (the plan of Pisinger, "A minimal algorithm for the multiple-choice knapsack problem",
EJOR 83, 1995).

Sums do not depend on their order: both tables are rounded to a power of two so small that 53 bits hold every sum that
matters. That changes neither integers nor quarters. For other numbers a budget counts as kept when
``sum(cost) <= budget * (1 + max(1e-12, heads * 2**-52))``.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Choice", "knapsack", "knapsack_min_cost"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_MANTISSA = 53
_LARGEST = 1e290  # slopes, quotients of these values and the grid's unit, stay finite
_EXACT = 1e-12  # an error this close to its bound (relative) is optimal: float64 sums cannot tell more
_CLOSE = 1e-9  # so close that the exact round is not worth its time
_ROUNDS = (1_000_000, 10_000_000)  # states tried: a quick round to improve the incumbent, then the exact round
_MIN_STATES, _MAX_STATES = 100, 200_000  # kept per stage
_MAX_TAILS = 200_000_000  # stages times hull steps
_FILL_ROUNDS = 64


@dataclass(frozen=True, eq=False)
class Choice:
    """One level per head.

    Attributes:
        choice: (heads,) int64, the level of each head.
        cost: sum of ``cost[h, choice[h]]``.
        error: sum of ``error[h, choice[h]]``.
        lower_bound: Lagrangian bound: no choice within the budget has a smaller error. From :func:`knapsack_min_cost`:
            no choice within the largest error has a smaller cost.
        gap: ``(error - lower_bound) / lower_bound``, or of the cost from :func:`knapsack_min_cost`; 0 when both are 0,
            infinite when only the bound is.
        optimal: proven: no choice is better by more than 1e-12 (relative). False when states were dropped for time.
    """

    choice: IntArray
    cost: float
    error: float
    lower_bound: float
    gap: float
    optimal: bool


def knapsack(cost: npt.ArrayLike, error: npt.ArrayLike, budget: float) -> Choice:
    """The choice of least error whose cost is within the budget; among equal errors, the least cost.

    The result depends on the arguments only, never on time. Errors within 1e-12 (relative) may count as equal.

    Args:
        cost: (heads, levels), finite, >= 0, any unit that adds up over heads. Need not grow with the level.
        error: (heads, levels), finite, >= 0. Need be neither monotone nor convex in the level.
        budget: largest sum of cost, in the unit of ``cost``.

    Raises:
        ValueError: a table or the budget is malformed, or the budget is below the cheapest choice.
    """
    costs, errors = _checked_tables(cost, error)
    levels, bound, optimal = _solve(costs, errors, _checked_limit("budget", budget, costs, "cost"))
    return _finished(costs, errors, levels, bound, optimal, bound_on_cost=False)


def knapsack_min_cost(cost: npt.ArrayLike, error: npt.ArrayLike, max_error: float) -> Choice:
    """The choice of least cost whose error is at most ``max_error``; among equal costs, the least error.

    Tables as in :func:`knapsack`. ``lower_bound`` and ``gap`` of the result are about the cost.

    Raises:
        ValueError: a table or ``max_error`` is malformed, or ``max_error`` is below the smallest error of any choice.
    """
    costs, errors = _checked_tables(cost, error)
    levels, bound, optimal = _solve(errors, costs, _checked_limit("max_error", max_error, errors, "error"))
    return _finished(costs, errors, levels, bound, optimal, bound_on_cost=True)


def _checked_tables(cost: npt.ArrayLike, error: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    tables = []
    for name, values in (("cost", cost), ("error", error)):
        table = np.asarray(values, dtype=np.float64)
        if table.ndim != 2 or table.size == 0:
            raise ValueError(f"{name} has shape {table.shape}: it must be (heads, levels), both at least 1")
        bad = np.argwhere(~((table >= 0) & (table <= _LARGEST)))
        if bad.size:
            head, level = bad[0]
            raise ValueError(f"{name}[{head}, {level}] is {table[head, level]}: it must be in [0, {_LARGEST:g}]")
        tables.append(table)
    if tables[0].shape != tables[1].shape:
        raise ValueError(f"error has shape {tables[1].shape}: it must be the shape of cost, {tables[0].shape}")
    return tables[0], tables[1]


def _checked_limit(name: str, limit: float, table: FloatArray, what: str) -> float:
    limit = float(limit)
    if not 0 <= limit <= _LARGEST:
        raise ValueError(f"{name} is {limit}: it must be in [0, {_LARGEST:g}]")
    least = math.fsum(table.min(axis=1))
    if least > limit * (1 + _tolerance(len(table)) / 2):
        raise ValueError(f"{name} is {limit!r}: it must be at least {least!r}, the sum of every head's smallest {what}")
    return limit


def _tolerance(heads: int) -> float:
    return max(1e-12, heads * 2.0**-52)


def _finished(
    cost: FloatArray, error: FloatArray, levels: IntArray, bound: float, optimal: bool, *, bound_on_cost: bool
) -> Choice:
    rows = np.arange(len(levels))
    total_cost, total_error = math.fsum(cost[rows, levels]), math.fsum(error[rows, levels])
    value = total_cost if bound_on_cost else total_error
    bound = min(bound, value)  # rounding only
    gap = (value - bound) / bound if bound > 0 else (math.inf if value > 0 else 0.0)
    return Choice(levels, total_cost, total_error, bound, gap, optimal)


def _solve(cost: FloatArray, error: FloatArray, budget: float) -> tuple[IntArray, float, bool]:
    """Levels of the best choice found, the lower bound on the error, and whether the choice is proven optimal."""
    order = np.lexsort((error, cost), axis=-1)
    table = _within(np.take_along_axis(cost, order, 1), np.take_along_axis(error, order, 1), budget)
    columns, bound, slope = _relaxed(table)
    columns = _filled(table, columns)
    optimal = False
    for work, enough in zip(_ROUNDS, (_EXACT, _CLOSE), strict=True):
        best = table.error[np.arange(len(columns)), columns].sum()
        optimal = optimal or bool(best - bound <= _EXACT * best)
        if optimal or best - bound <= enough * best:
            break
        columns, optimal = _Core(table, columns, bound, slope).run(work)
    return order[np.arange(len(order)), columns], bound, optimal


@dataclass(frozen=True, eq=False)
class _Table:
    """(heads, levels) by increasing cost and decreasing error; a level that is ruled out is infinite in both."""

    cost: FloatArray
    error: FloatArray
    limit: float


def _pareto(cost: FloatArray, error: FloatArray, limit: float) -> _Table:
    """Rules out each level that another of its head beats. The rows come sorted by cost, then error."""
    least = np.minimum.accumulate(error, axis=1)
    useful = np.ones(error.shape, dtype=np.bool_)
    useful[:, 1:] = error[:, 1:] < least[:, :-1]
    return _Table(np.where(useful, cost, np.inf), np.where(useful, error, np.inf), limit)


def _within(cost: FloatArray, error: FloatArray, budget: float) -> _Table:
    """Costs in units that make the budget 0.5 to 1, on the grid of 2**-53, less what is too dear for any choice."""
    limit, exponent = math.frexp(budget * (1 + _tolerance(len(cost)) / 2))
    with np.errstate(over="ignore"):
        scaled = np.ldexp(cost, -exponent) if budget > 0 else np.where(cost > 0, np.inf, 0.0)
        units = np.rint(np.ldexp(scaled, _MANTISSA))
    least = units[:, 0].sum()
    most = max(math.floor(math.ldexp(limit, _MANTISSA)), int(least))
    dear = units - units[:, :1] > most - least
    # What all costs are multiples of, a sum is too: a budget of 7.3 is one of 7 for integers, which sharpens the bound.
    common = int(np.bitwise_or.reduce(np.where(dear, 0.0, units).astype(np.int64), axis=None))
    step = max(common & -common, 1)
    limit = math.ldexp(most // step * step, -_MANTISSA)
    return _pareto(np.where(dear, np.inf, np.ldexp(units, -_MANTISSA)), np.where(dear, np.inf, error), limit)


@dataclass(frozen=True, eq=False)
class _Steps:
    """(steps,) arrays: the steps along the heads' lower convex hulls, steepest first; cost and error are changes."""

    head: IntArray
    level: IntArray
    slope: FloatArray
    cost: FloatArray
    error: FloatArray

    def only(self, chosen: BoolArray) -> "_Steps":
        return _Steps(self.head[chosen], self.level[chosen], self.slope[chosen], self.cost[chosen], self.error[chosen])


def _hull(cost: FloatArray, error: FloatArray) -> _Steps:
    """All heads walk their hulls at once, a vertex per round. Rows as in :class:`_Table`, with column 0 usable."""
    columns = np.arange(cost.shape[1])
    head = np.arange(len(cost))
    at, ceiling = np.zeros(len(cost), dtype=np.int64), np.full(len(cost), np.inf)
    rounds: list[tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray]] = []
    while head.size or not rounds:
        row_cost, row_error = cost[head], error[head]
        rows = np.arange(head.size)
        ahead = np.isfinite(row_error) & (columns > at[:, None])
        fall = row_error[rows, at][:, None] - np.where(ahead, row_error, np.inf)
        rise = np.where(ahead, row_cost, np.inf) - row_cost[rows, at][:, None]
        slope = np.divide(fall, rise, out=np.full(fall.shape, -np.inf), where=ahead)
        level = slope.argmax(axis=1)  # the nearest of collinear vertices: short steps stop closer to a budget
        steepest = np.minimum(slope[rows, level], ceiling)  # rounding must not put a head's steps out of order
        going = steepest > 0
        rounds.append((head[going], level[going], steepest[going], rise[rows, level][going], -fall[rows, level][going]))
        head, at, ceiling = head[going], level[going], steepest[going]
    heads, levels, slopes, costs, errors = (np.concatenate(parts) for parts in zip(*rounds, strict=True))
    order = np.argsort(-slopes, kind="stable")
    return _Steps(heads[order], levels[order], slopes[order], costs[order], errors[order])


def _points(steps: _Steps, first_cost: float, last_error: float) -> tuple[FloatArray, FloatArray]:
    """(steps + 1,) total cost and error after each step. Errors add up from the small end, which keeps their digits."""
    cost = np.concatenate([[0.0], np.cumsum(steps.cost)]) + first_cost
    error = np.concatenate([np.cumsum(-steps.error[::-1])[::-1], [0.0]]) + last_error
    return cost, error


def _relaxed(table: _Table) -> tuple[IntArray, float, float]:
    """The linear relaxation: levels before the first step that does not fit, the lower bound, that step's slope."""
    steps = _hull(table.cost, table.error)
    cost, error = _points(steps, table.cost[:, 0].sum(), table.error.min(axis=1).sum())
    taken = int(np.searchsorted(cost, table.limit, side="right")) - 1
    columns = np.zeros(len(table.cost), dtype=np.int64)
    columns[steps.head[:taken]] = steps.level[:taken]
    if taken == steps.head.size:
        return columns, float(error[-1]), 0.0
    slope = float(steps.slope[taken])
    return columns, float(error[taken]) - slope * (table.limit - float(cost[taken])), slope


def _filled(table: _Table, columns: IntArray) -> IntArray:
    """Spends what the greedy left: while some level fits, the one that lowers the error most."""
    columns, rows = columns.copy(), np.arange(len(columns))
    for _ in range(_FILL_ROUNDS):
        cost, error = table.cost[rows, columns], table.error[rows, columns]
        fits = table.cost - cost[:, None] <= table.limit - cost.sum()
        gain = np.where(fits, error[:, None] - table.error, -np.inf)
        head, level = np.unravel_index(gain.argmax(), gain.shape)
        if gain[head, level] <= 0:
            break
        columns[head] = level
    return columns


@dataclass(frozen=True, eq=False)
class _Record:
    """The best choice met: a state of a stage (its parent and level) and the first steps of the later hulls."""

    error: float
    cost: float
    stage: int = -1  # the incumbent that the search started from
    parent: int = 0
    level: int = 0
    taken: int = 0


class _Core:
    """Dynamic programming over the heads whose level the bound does not fix.

    A state is one (cost, error) of all fixed heads and the heads decided so far. Undominated states are kept, by
    increasing cost, unless the linear relaxation of the remaining heads shows that they cannot beat the incumbent.
    """

    def __init__(self, table: _Table, incumbent: IntArray, bound: float, slope: float) -> None:
        rows = np.arange(len(incumbent))
        best = float(table.error[rows, incumbent].sum())
        usable = np.isfinite(table.error)
        priced = np.where(usable, table.error + slope * np.where(usable, table.cost, 0.0), np.inf)
        reduced = priced - priced.min(axis=1, keepdims=True)
        self.limit, self.slope, self.incumbent = table.limit, slope, incumbent
        self.slack = _EXACT * (best + slope * table.limit)  # the bounds' own rounding
        keep = bound + reduced <= best + self.slack
        keep[rows, incumbent] = True
        # Least decided heads first: the incumbent improves early, and later heads then add few states.
        regret = np.sort(np.where(keep, reduced, np.inf), axis=1)[:, min(1, keep.shape[1] - 1)]
        self.heads = np.argsort(np.where(keep.sum(axis=1) > 1, regret, np.inf), kind="stable")
        self.free = int((keep.sum(axis=1) > 1).sum())
        # Rows in the order of the stages, the levels kept in front; errors on a grid of 2**-53 of the best error.
        self.columns = np.argsort(~keep, axis=1, kind="stable")[self.heads, : keep.sum(axis=1).max()]
        unit = math.ldexp(1.0, max(math.frexp(best)[1] - _MANTISSA, -1074))
        error = np.where(keep, np.rint(np.where(keep, table.error, 0.0) / unit) * unit, np.inf)
        self.error = error[self.heads[:, None], self.columns]
        self.cost = np.where(keep, table.cost, np.inf)[self.heads[:, None], self.columns]
        self.record = _Record(float(error[rows, incumbent].sum()), float(table.cost[rows, incumbent].sum()))
        self.history: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = []
        self._measure_tails()

    def _measure_tails(self) -> None:
        """What the heads after each stage add at least: cost, error, error + slope * cost. All hulls' steps."""
        cost, error = self.cost[: self.free], self.error[: self.free]
        priced = np.where(np.isfinite(error), error + self.slope * np.where(np.isfinite(cost), cost, 0.0), np.inf)
        self.tails = np.zeros((3, self.free + 1))
        for tail, least in zip(self.tails, (cost[:, 0], error.min(axis=1), priced.min(axis=1)), strict=True):
            tail[:-1] = np.cumsum(least[::-1])[::-1]
        self.tails = self.tails[:, 1:]
        self.steps = _hull(cost, error)

    def run(self, work: int) -> tuple[IntArray, bool]:
        """The best columns and whether they are proven best. ``work`` bounds the states tried, over all stages."""
        levels = np.isfinite(self.error[: self.free]).sum(axis=1)
        share = 1.0 / np.cumsum(levels[::-1])[::-1]
        cost, error = (values[self.free :, 0].sum(keepdims=True) for values in (self.cost, self.error))
        # Stages left out leave their heads to the greedy completion of the last stage.
        stages = min(self.free, max(_MAX_TAILS // max(self.steps.head.size, 1), 1))
        exact = stages == self.free
        for stage in range(stages):
            work -= cost.size * int(levels[stage])
            cost, error, parent, level = self._extended(stage, cost, error)
            bounds = self._bounded(stage, cost, error, parent, level)
            kept = np.flatnonzero(bounds <= self.record.error + self.slack)
            most = min(max(int(work * share[min(stage + 1, self.free - 1)]), _MIN_STATES), _MAX_STATES)
            if kept.size > most:
                kept, exact = kept[_best_of_cells(cost[kept], bounds[kept], most)], False
            cost, error = cost[kept], error[kept]
            self.history.append((parent[kept].astype(np.int32), level[kept].astype(np.int32)))
        return self._best_columns(), exact

    def _extended(
        self, stage: int, cost: FloatArray, error: FloatArray
    ) -> tuple[FloatArray, FloatArray, IntArray, IntArray]:
        """Each state with each level of the stage's head: undominated (cost, error), their state and their level."""
        levels = np.flatnonzero(np.isfinite(self.error[stage]))
        new_cost = np.add.outer(self.cost[stage, levels], cost).ravel()
        new_error = np.add.outer(self.error[stage, levels], error).ravel()
        tail_cost, _, tail_priced = self.tails[:, stage]
        ceiling = self.record.error + self.slack + self.slope * self.limit - tail_priced
        index = np.flatnonzero((new_cost <= self.limit - tail_cost) & (new_error + self.slope * new_cost <= ceiling))
        index = index[np.argsort(new_cost[index], kind="stable")]
        best = np.minimum.accumulate(new_error[index])
        index = index[np.flatnonzero(np.diff(best, prepend=np.inf) < 0)]
        # Of equal costs the last has the least error.
        index = index[np.flatnonzero(np.diff(new_cost[index], append=np.inf) > 0)]
        return new_cost[index], new_error[index], index % cost.size, levels[index // cost.size]

    def _bounded(
        self, stage: int, cost: FloatArray, error: FloatArray, parent: IntArray, level: IntArray
    ) -> FloatArray:
        """(states,) lower bounds on what the states can become. Records the best of their greedy completions."""
        later = self.steps.head > stage
        tail_cost, tail_error = _points(self.steps.only(later), self.tails[0, stage], self.tails[1, stage])
        slope = np.append(self.steps.slope[later], 0.0)
        taken = np.searchsorted(tail_cost, self.limit - cost, side="right") - 1
        completed = error + tail_error[taken]
        if completed.size:
            state = int(completed.argmin())
            found = _Record(
                error=float(completed[state]),
                cost=float(cost[state] + tail_cost[taken[state]]),
                stage=stage,
                parent=int(parent[state]),
                level=int(level[state]),
                taken=int(taken[state]),
            )
            self.record = min(self.record, found, key=lambda record: (record.error, record.cost))
        bounds: FloatArray = completed - slope[taken] * (self.limit - cost - tail_cost[taken])
        return bounds

    def _best_columns(self) -> IntArray:
        """The record's columns of the table."""
        record, columns = self.record, self.incumbent.copy()
        if record.stage < 0:
            return columns
        levels = np.zeros(len(columns), dtype=np.int64)  # the first kept level: of a head that is fixed its only one
        later = self.steps.only(self.steps.head > record.stage)
        levels[later.head[: record.taken]] = later.level[: record.taken]
        levels[record.stage], state = record.level, record.parent
        for stage in range(record.stage - 1, -1, -1):
            parent, level = self.history[stage]
            levels[stage], state = level[state], parent[state]
        columns[self.heads] = self.columns[np.arange(len(levels)), levels]
        return columns


def _best_of_cells(cost: FloatArray, bounds: FloatArray, cells: int) -> IntArray:
    """Index of the state with the least bound in each cell of a grid over the (increasing) costs."""
    cell = ((cost - cost[0]) * (cells / (cost[-1] - cost[0]))).astype(np.int64)
    order = np.lexsort((bounds, cell))
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    index: IntArray = order[first]
    return index
