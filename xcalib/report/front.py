"""Density against KL: what the curves predict for the search and its rivals, and what was measured."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from xcalib.collect import Curves
from xcalib.errors import DataError, TargetError
from xcalib.evaluation import uniform_at
from xcalib.evaluation.results import PlanResult
from xcalib.evaluation.uniform import PUBLISHED, UNIFORM
from xcalib.profile import Method, OperatingPoint
from xcalib.report.inputs import Inputs, published
from xcalib.report.theme import Look
from xcalib.search.knapsack import knapsack
from xcalib.search.lengths import pooled_prediction
from xcalib.search.objectives import OBJECTIVE_NAMES, Objective
from xcalib.search.paper import paper_thresholds
from xcalib.search.plan import Planned, Tables, uniform_thresholds

__all__ = [
    "LINE_NAMES",
    "POINT",
    "Group",
    "Mark",
    "Rival",
    "front_lines",
    "front_objective",
    "groups_of",
    "marks",
    "method_name",
    "rivals",
]

MOST_DENSITY = 0.85  # beyond it KL is not of use, and the log axis would show little else
BEYOND = 1.4  # times the density of the densest point: so far go the lines
BUDGETS = 28
# The published recurrence takes steps x max(steps, heads) operations: with thousands of heads few budgets, and fewer steps than
# reach the sparsest of them.
PAPER_BUDGETS = ((600, 10), (2000, 6), (20_000, 3))
PAPER_OPERATIONS = 2e8

POINT, OTHER = "operating point", "another profile's point"
SEARCH, SINGLE_TAU, PAPER = "search", "single", "paper"
# Lines have c1 to c3. Rules other than the profile's and the published one are few: another stride or block size.
POINT_LOOK, OWN_LOOK, PUBLISHED_LOOK = Look("circle", "ink"), Look("triangle-up", "c4"), Look("square", "c5")
OTHER_LOOK = Look("diamond", "muted")
RULE_LOOKS = [
    Look(shape, colour)
    for colours in (("c5", "c4", "muted", "c5"), ("c4", "muted", "c5", "c4"))
    for shape, colour in zip(("triangle-down", "cross", "triangle-left", "triangle-right"), colours, strict=True)
]
LINE_NAMES = {
    SEARCH: "search over the curves",
    SINGLE_TAU: "one tau for all heads",
    PAPER: "published recurrence (--method paper)",
}


@dataclass(frozen=True)
class Mark:
    """A point of the chart.

    Attributes:
        name: of the operating point, or of the single tau.
        kind: ``predicted`` or ``measured``.
        group: ``operating point``, or ``single`` and its method.
        density: in [0, 1].
        kl: nats per token.
        interval: of ``kl``, None without one.
        source: where the figure comes from.
    """

    name: str
    kind: str
    group: str
    density: float
    kl: float
    interval: tuple[float, float] | None
    source: str

    def row(self) -> dict[str, Any]:
        """For the chart."""
        low, high = self.interval or (None, None)
        return {
            "name": self.name,
            "kind": self.kind,
            "group": self.group,
            "density": self.density,
            "kl": self.kl,
            "low": low,
            "high": high,
            "source": self.source,
        }


@dataclass(frozen=True)
class Group:
    """What marks are of, and how they look.

    Attributes:
        name: ``operating point``, ``another profile's point``, or ``single tau`` and its method.
        look: of its marks, which no line and no other group has.
    """

    name: str
    look: Look


@dataclass(frozen=True)
class Rival:
    """The single tau that would keep as many blocks as an operating point, from measured ones on both sides of it."""

    point: str
    density: float
    kl_point: float
    kl_single: float
    tau: float
    method: str
    source: str


def method_name(method: Method) -> str:
    """``rows, order recent, S 16, B 64``; the published rule is called so."""
    known = "published rule: " if method == published(method) else ""
    return f"{known}{method.pattern}, order {method.order}, S {method.stride}, B {method.block_size}"


def marks(inputs: Inputs) -> list[Mark]:
    """Predicted and held-out figures of every operating point, and what the evaluations measured beyond these."""
    found = [mark for point in inputs.profile.points for mark in _point_marks(inputs, point)]
    known = {(mark.name, mark.density, mark.kl) for mark in found}
    points = {point.name for point in inputs.profile.points}
    for evaluated in inputs.evaluations:
        for plan in evaluated.found.plans:
            if (plan.name, plan.density, plan.kl) in known:
                continue  # the profile's own evidence
            method = evaluated.method_of(plan.name)
            group = (POINT if plan.name in points else OTHER) if method is None else _single_group(method)
            found.append(Mark(plan.name, "measured", group, plan.density, plan.kl, plan.kl_interval, evaluated.source))
    return [mark for mark in found if mark.kl > 0]  # of a dense plan: no place on a log axis


def groups_of(inputs: Inputs, found: Sequence[Mark]) -> list[Group]:
    """The operating points first, then single taus, those of the profile's own method before others.

    A kind of group looks the same in every report; only single taus by other rules than the profile's and the published one
    take their looks in turn.
    """
    method = inputs.profile.method
    present = {mark.group for mark in found}
    looks = {POINT: POINT_LOOK, _single_group(method): OWN_LOOK}
    looks.setdefault(_single_group(published(method)), PUBLISHED_LOOK)
    looks |= zip(sorted(present - {*looks, OTHER}), cycle(RULE_LOOKS), strict=False)
    looks[OTHER] = OTHER_LOOK
    return [Group(name, look) for name, look in looks.items() if name in present or name == POINT]


def _single_group(method: Method) -> str:
    return f"single tau ({method_name(method)})"


def _point_marks(inputs: Inputs, point: OperatingPoint) -> Iterator[Mark]:
    if point.predicted is not None:
        yield Mark(
            point.name, "predicted", POINT, point.predicted.density, point.predicted.kl, None, "profile, predicted"
        )
    elif inputs.curves:
        density, kl = _predicted(inputs, point)
        yield Mark(point.name, "predicted", POINT, density, kl, None, "curves")
    if point.heldout is not None:
        ends = point.heldout.intervals.kl if point.heldout.intervals else None
        yield Mark(
            point.name, "measured", POINT, point.heldout.density, point.heldout.kl, ends, "profile, held-out data"
        )


def _predicted(inputs: Inputs, point: OperatingPoint) -> tuple[float, float]:
    """What the curves say of thresholds that no search made."""
    planned = []
    for curves, rows in zip(inputs.curves, point.thresholds, strict=True):
        tables, taus = Tables.of(curves, "gain"), np.asarray(rows)[list(curves.layers)]
        planned.append(Planned(taus, tables.at(tables.cost, taus), tables.predicted_kl(taus), None))
    prediction = pooled_prediction(inputs.curves, planned)
    return prediction.density, prediction.kl


def front_objective(inputs: Inputs) -> Objective:
    """What the profile's search minimised, where the curves have it; the default objective otherwise."""
    said = inputs.profile.point().objective
    by_name: dict[str, Objective] = {text: key for key, text in OBJECTIVE_NAMES.items()}
    objective = by_name.get(said, "tempered")
    measured = all(getattr(curves, objective, True) is not None for curves in inputs.curves)
    return objective if measured else "tempered"


def front_lines(inputs: Inputs) -> list[dict[str, Any]]:
    """Rows of the predicted lines: ``series``, ``density``, ``kl`` and, for a single tau, ``tau``.

    With several length bins a row is the same budget in each, pooled as the profile's predictions are.
    """
    if not inputs.curves:
        return []
    tables = [Tables.of(curves, front_objective(inputs)) for curves in inputs.curves]
    least = max(float(table.cost.min(axis=1).sum()) for table in tables)
    heads = max(len(table.cost) for table in tables)
    rows: list[dict[str, Any]] = []
    most = min(MOST_DENSITY, max([0.5, *(BEYOND * mark.density for mark in marks(inputs))]))
    for budget in _budgets(least, most, BUDGETS):
        rows += _row(inputs.curves, tables, SEARCH, budget, _searched)
        rows += _row(inputs.curves, tables, SINGLE_TAU, budget, _single)
    for budget in reversed(_budgets(least, most, next((n for upto, n in PAPER_BUDGETS if heads <= upto), 0))):
        found = list(_row(inputs.curves, tables, PAPER, budget, _paper))
        if not found:
            break  # nor will it reach a smaller budget
        rows += [row for row in found if row not in rows]  # above its start it has one state for every budget
    return [row for row in rows if row["kl"] > 0]


def _budgets(least: float, most: float, count: int) -> list[float]:
    """Closer together where blocks are few, which is where a choice is made."""
    low = min(least * 1.01 + 1e-9, 1.0)
    return [float(value) for value in np.geomspace(low, max(most, low), count)] if count else []


Plan = Callable[[Tables, float], np.ndarray]


def _row(
    sets: Sequence[Curves], tables: Sequence[Tables], series: str, budget: float, plan: Plan
) -> Iterator[dict[str, Any]]:
    planned, tau = [], None
    for table in tables:
        try:
            taus = plan(table, budget)
        except TargetError:
            return  # this method has nothing there
        tau = float(taus.flat[0]) if series == SINGLE_TAU and len(tables) == 1 else None
        planned.append(Planned(taus, table.at(table.cost, taus), table.predicted_kl(taus), None))
    prediction = pooled_prediction(sets, planned)
    yield {"series": series, "density": prediction.density, "kl": prediction.kl, "tau": tau}


def _searched(tables: Tables, budget: float) -> np.ndarray:
    return tables.grid[knapsack(tables.cost, tables.loss, budget).choice].reshape(tables.shape)


def _single(tables: Tables, budget: float) -> np.ndarray:
    return np.full(tables.shape, uniform_thresholds(tables, budget))


def _paper(tables: Tables, budget: float) -> np.ndarray:
    heads = len(tables.cost)
    steps = min(max(1000, 22 * heads), max(1000, round(min(PAPER_OPERATIONS / heads, PAPER_OPERATIONS**0.5))))
    result = paper_thresholds(tables.grid, tables.cost, tables.loss, budget=budget, max_steps=steps)
    return result.thresholds.reshape(tables.shape)


def rivals(inputs: Inputs) -> list[Rival]:
    """For each evaluation and operating point the single tau of the same density, where measured ones enclose it."""
    found = []
    for evaluated in inputs.evaluations:
        plans = {plan.name: plan for plan in evaluated.found.plans}
        for point in inputs.profile.points:
            plan: PlanResult | None = plans.get(point.name)
            if plan is None or plan.kl <= 0:
                continue
            for prefix in (PUBLISHED, UNIFORM):
                with suppress(DataError):  # too few single taus, or all on one side
                    single = uniform_at(evaluated.found, plan.density, prefix)
                    method = method_name(evaluated.method_of(prefix) or evaluated.single_method)
                    found.append(
                        Rival(point.name, plan.density, plan.kl, single.kl, single.tau, method, evaluated.source)
                    )
    return found
