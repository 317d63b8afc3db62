"""The vectorised recurrence against the literal one, and what the targets take from it."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from xcalib.errors import TargetError
from xcalib.search.paper import paper_thresholds

FloatArray = npt.NDArray[np.float64]
GRID = np.array([0.0, 0.05, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])


def curves(heads: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """Cost grows with tau, error falls to 0 at tau = 1; scales differ from head to head."""
    rng = np.random.default_rng(seed)
    cost = 0.05 + np.cumsum(rng.random((heads, GRID.size)), axis=1) / GRID.size
    error = np.cumsum(rng.random((heads, GRID.size)), axis=1)[:, ::-1] * np.exp(rng.normal(0, 1.5, (heads, 1)))
    error[:, -1] = 0
    return cost, error


def value(curve: FloatArray, tau: float) -> float:
    """Linear interpolation, written out."""
    for left in range(len(GRID) - 1):
        if tau <= GRID[left + 1]:
            weight = (tau - GRID[left]) / (GRID[left + 1] - GRID[left])
            return float(curve[left] * (1 - weight) + curve[left + 1] * weight)
    raise AssertionError(tau)


def literal(error: FloatArray, passes: int, max_steps: int) -> list[tuple[float, ...]]:
    """D[h][m] = max(D[h-1][m], P(h, m)) with every state's vector of taus; the taus of D[last head][m] for each m."""
    heads = len(error)

    def performance(taus: tuple[float, ...]) -> float:
        return -sum(value(error[head], taus[head]) for head in range(heads))

    row: dict[int, tuple[float, ...]] = {0: (0.9,) * heads}
    for _ in range(passes):
        for head in range(heads):
            above, row = row, {}
            for m in range(max_steps + 1):
                options = [above[m]] if m in above else []
                if m - 1 in above:
                    taus = list(above[m - 1])
                    taus[head] *= 0.9
                    options.append(tuple(taus))
                if options:
                    row[m] = max(options, key=performance)
    return [row[m] for m in sorted(row)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("heads", "max_steps", "passes"), [(1, 4, 1), (5, 1000, 1), (5, 3, 1), (4, 1000, 3), (3, 7, 3)]
)
def test_equals_the_literal_recurrence(heads: int, max_steps: int, passes: int, seed: int) -> None:
    cost, error = curves(heads, seed)
    states = literal(error, passes, max_steps)
    costs = [sum(value(cost[head], tau) for head, tau in enumerate(taus)) for taus in states]
    found = paper_thresholds(GRID, cost, error, budget=min(costs[-1], costs[-2]), max_steps=max_steps)
    fewer = next((p for p in range(passes) if p == found.passes), None)  # an earlier pass may happen to be cheap enough
    if fewer is not None:
        states = literal(error, fewer, max_steps)
        costs = [sum(value(cost[head], tau) for head, tau in enumerate(taus)) for taus in states]
    np.testing.assert_allclose(found.path[:, 0], costs)
    np.testing.assert_allclose(found.path[:, 1], [sum(value(error[h], t) for h, t in enumerate(s)) for s in states])
    np.testing.assert_allclose(found.thresholds, states[found.steps])


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3, 0.05])
def test_budget_takes_the_fewest_steps(share: float) -> None:
    cost, error = curves(30, 0)
    lowest = cost[:, 0].sum()
    at_start = sum(value(row, 0.9) for row in cost)
    budget = lowest + share * (at_start - lowest)
    found = paper_thresholds(GRID, cost, error, budget=budget, max_steps=2000)
    assert found.cost <= budget * (1 + 1e-12)
    assert (found.path[: found.steps, 0] > budget).all()
    assert found.path[found.steps].tolist() == [found.cost, found.error]
    assert found.cost == pytest.approx(sum(value(cost[h], t) for h, t in enumerate(found.thresholds)))
    assert found.error == pytest.approx(sum(value(error[h], t) for h, t in enumerate(found.thresholds)))
    steps = np.log(found.thresholds / 0.9) / math.log(0.9)
    assert round(steps.sum()) == found.steps
    assert round(steps.max()) <= found.passes


def test_more_steps_never_lower_the_error() -> None:
    cost, error = curves(30, 1)
    assert (np.diff(paper_thresholds(GRID, cost, error, budget=0.5 * cost[:, -1].sum()).path[:, 1]) >= 0).all()


@pytest.mark.parametrize("factor", [1.0, 1.1, 2.0, 100.0])
def test_max_error_takes_the_most_steps(factor: float) -> None:
    cost, error = curves(20, 2)
    limit = factor * sum(value(row, 0.9) for row in error)
    found = paper_thresholds(GRID, cost, error, max_error=limit, max_steps=200)
    assert found.error <= limit * (1 + 1e-12)
    assert (found.path[found.steps + 1 :, 1] > limit).all()
    if factor == 100.0:  # nothing stops it but max_steps
        assert found.steps == 200


def test_a_budget_met_at_the_start_takes_no_step() -> None:
    cost, error = curves(4, 3)
    found = paper_thresholds(GRID, cost, error, budget=100.0)
    assert (found.steps, found.passes, found.thresholds.tolist()) == (0, 0, [0.9] * 4)
    assert found.path.shape == (1, 2)


def test_cost_that_falls_with_tau_is_raised_to_the_running_maximum() -> None:
    error = np.array([[3.0, 2.0, 0.0]])
    found = paper_thresholds([0.0, 0.5, 1.0], [[0.1, 0.8, 0.4]], error, budget=1.0)
    assert found.cost == pytest.approx(0.8)


def test_a_thousand_heads_over_several_passes() -> None:
    cost, error = curves(1024, 4)
    budget = cost[:, 0].sum() * 0.5 + cost[:, -2].sum() * 0.5
    found = paper_thresholds(GRID, cost, error, budget=budget, max_steps=8192)
    assert found.cost <= budget * (1 + 1e-12)
    assert found.passes > 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"budget": 0.01}, r"budget 0.01 cannot be reached: every head at tau 0 costs \S+; raise the budget$"),
        (
            {"budget": 2.0, "max_steps": 5},
            r"budget 2 cannot be reached: the least cost is \S+ \(start_threshold=0.9, step=0.9, max_steps=5, 6 heads",
        ),
        ({"max_error": 1e-9}, r"max_error 1e-09 cannot be kept: the least error is \S+ \(start_threshold=0.9"),
    ],
)
def test_a_target_out_of_reach_says_what_is_in_reach(target: dict[str, float], message: str) -> None:
    cost, error = curves(6, 5)
    with pytest.raises(TargetError, match=message):
        paper_thresholds(GRID, cost, error, **target)  # type: ignore[arg-type]


ONE = np.ones((2, 3))


@pytest.mark.parametrize(
    ("grid", "cost", "error", "settings", "message"),
    [
        ([0.0], ONE, ONE, {}, r"grid has shape \(1,\)"),
        ([0.0, 0.5, 0.9], ONE, ONE, {}, r"grid is \[0.0, 0.5, 0.9\]: it must increase from 0 to 1"),
        ([0.0, 0.0, 1.0], ONE, ONE, {}, "it must increase from 0 to 1"),
        ([0.0, 0.5, 1.0], np.ones((2, 2)), ONE, {}, r"cost has shape \(2, 2\): it must be \(heads, 3\)"),
        ([0.0, 0.5, 1.0], ONE, np.ones((1, 3)), {}, r"error has shape \(1, 3\): it must be the shape of cost"),
        ([0.0, 0.5, 1.0], ONE, -ONE, {}, r"error\[0, 0\] is -1.0: it must be finite and >= 0"),
        ([0.0, 0.5, 1.0], ONE * math.nan, ONE, {}, r"cost\[0, 0\] is nan"),
        ([0.0, 0.5, 1.0], ONE, ONE, {"max_error": 1.0}, "exactly one must be given"),
        ([0.0, 0.5, 1.0], ONE, ONE, {"budget": None}, "budget is None and max_error is None: exactly one"),
        ([0.0, 0.5, 1.0], ONE, ONE, {"budget": -1.0}, "budget is -1.0: it must be finite and >= 0"),
        ([0.0, 0.5, 1.0], ONE, ONE, {"start_threshold": 0.0}, r"start_threshold is 0.0: it must be in \(0, 1\]"),
        ([0.0, 0.5, 1.0], ONE, ONE, {"step": 1.0}, r"step is 1.0: it must be in \(0, 1\)"),
        ([0.0, 0.5, 1.0], ONE, ONE, {"max_steps": 0}, "max_steps is 0: it must be at least 1"),
    ],
)
def test_bad_arguments_are_named(
    grid: list[float], cost: FloatArray, error: FloatArray, settings: dict[str, float | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paper_thresholds(grid, cost, error, **{"budget": 1.0, **settings})  # type: ignore[arg-type]
