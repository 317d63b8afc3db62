"""The knapsack against brute force and a textbook table, its bounds, its time, its errors."""

import importlib
import itertools
import math
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from xcalib.search.knapsack import Choice, knapsack, knapsack_min_cost

module = importlib.import_module("xcalib.search.knapsack")  # the package rebinds the name to the function
FloatArray = npt.NDArray[np.float64]
KINDS = ["integers", "quarters", "floats", "decimals", "constant"]


def brute_force(cost: FloatArray, error: FloatArray, budget: float) -> tuple[float, float]:
    """Least (error, cost) over all choices within the budget."""
    heads, levels = cost.shape
    found = []
    for choice in itertools.product(range(levels), repeat=heads):
        total = math.fsum(cost[head, level] for head, level in enumerate(choice))
        if total <= budget * (1 + 1e-12):
            found.append((math.fsum(error[head, level] for head, level in enumerate(choice)), total))
    return min(found)


def small_instance(seed: int) -> tuple[str, FloatArray, FloatArray, float]:
    rng = np.random.default_rng(seed)
    kind, shape = KINDS[seed % len(KINDS)], (int(rng.integers(1, 6)), int(rng.integers(1, 6)))
    cost: npt.NDArray[np.floating[Any]]
    error: npt.NDArray[np.floating[Any]]
    if kind == "integers":
        cost, error = rng.integers(0, 10, shape) * 1.0, rng.integers(0, 10, shape) * 1.0
    elif kind == "quarters":
        cost, error = rng.integers(0, 40, shape) / 4, np.sort(rng.integers(0, 40, shape) / 4)[:, ::-1]
    elif kind == "floats":
        cost, error = rng.random(shape), rng.random(shape) * 10.0 ** rng.integers(-6, 3, (shape[0], 1))
    elif kind == "decimals":
        cost, error = rng.integers(0, 4, shape) / 10, rng.choice([0, 0.1, 0.2, 0.7], shape)
    else:
        cost, error = np.full(shape, 3.0), rng.integers(0, 2, shape) * 0.0
    at_some_sum = math.fsum(cost[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])])
    budget = at_some_sum if seed % 2 else math.fsum(cost.min(axis=1)) * (1 + rng.random())
    return kind, np.asarray(cost, np.float64), np.ascontiguousarray(error, np.float64), budget


@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_equals_brute_force_and_its_mirror_image(first: int) -> None:
    for seed in range(first, first + 100):
        kind, cost, error, budget = small_instance(seed)
        found, (least_error, its_cost) = knapsack(cost, error, budget), brute_force(cost, error, budget)
        assert found.optimal, seed
        assert found.error == pytest.approx(least_error, rel=1e-12), seed
        if kind in ("integers", "quarters", "floats"):  # elsewhere decimal sums that should be equal differ by rounding
            assert (found.error, found.cost) == (least_error, its_cost), seed
        check_record(found, cost, error, budget)
        mirrored = knapsack_min_cost(error, cost, budget)
        assert (mirrored.cost, mirrored.error, mirrored.gap) == (found.error, found.cost, found.gap), seed


def check_record(found: Choice, cost: FloatArray, error: FloatArray, budget: float) -> None:
    rows = np.arange(len(cost))
    assert found.choice.dtype == np.int64
    assert found.cost == math.fsum(cost[rows, found.choice]) <= budget * (1 + 1e-12)
    assert found.error == math.fsum(error[rows, found.choice])
    assert 0 <= found.lower_bound <= found.error
    if found.lower_bound > 0:
        assert found.gap == (found.error - found.lower_bound) / found.lower_bound


def textbook(cost: npt.NDArray[np.int64], error: FloatArray, budget: int) -> float:
    """Least error for every integer budget, head by head."""
    best = np.zeros(budget + 1)
    for head_cost, head_error in zip(cost, error, strict=True):
        new = np.full(budget + 1, np.inf)
        for c, e in zip(head_cost, head_error, strict=True):
            if c <= budget:
                new[c:] = np.minimum(new[c:], best[: budget + 1 - c] + e)
        best = new
    return float(best[-1])


@pytest.mark.parametrize("seed", range(12))
def test_equals_a_table_over_integer_budgets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost, error = rng.integers(0, 40, (50, 9)), rng.random((50, 9)) * np.exp(rng.normal(0, 2, (50, 1)))
    if seed % 3 == 0:  # strongly correlated: every slope is the same and the bound says little
        error = 41.0 - cost + 5.0 * (cost == cost.min(axis=1, keepdims=True))
    budget = int(cost.min(axis=1).sum() + rng.integers(0, 600))
    found = knapsack(cost, error, budget)
    assert found.optimal
    assert found.error == pytest.approx(textbook(cost, error, budget), rel=1e-12)
    check_record(found, cost.astype(np.float64), error, budget)


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1e9, 1e280])
def test_units_do_not_matter(scale: float) -> None:
    _, cost, error, budget = small_instance(2)
    expected = knapsack(cost, error, budget)
    assert knapsack(cost * scale, error, budget * scale).choice.tolist() == expected.choice.tolist()
    assert knapsack(cost, error * scale, budget).choice.tolist() == expected.choice.tolist()


def test_budget_of_nothing_takes_only_free_levels() -> None:
    found = knapsack([[0.0, 1e-200, 0.0], [0.0, 2.0, 3.0]], [[5.0, 0.0, 4.0], [1.0, 0.0, 0.0]], 0.0)
    assert (found.choice.tolist(), found.cost, found.error, found.optimal) == ([2, 0], 0.0, 5.0, True)


def test_decimal_costs_that_add_up_to_the_budget_fit() -> None:
    found = knapsack([[0.0, 0.1], [0.0, 0.2]], [[1.0, 0.0], [1.0, 0.0]], 0.3)  # 0.1 + 0.2 > 0.3 in float64
    assert (found.choice.tolist(), found.gap) == ([1, 1], 0.0)


def test_gap_is_zero_without_error_and_without_a_choice() -> None:
    assert knapsack([[1.0, 2.0]], [[3.0, 0.0]], 2.0).gap == 0.0
    one_level = knapsack([[1.0], [2.0]], [[3.0], [4.0]], 3.0)
    assert (one_level.error, one_level.lower_bound, one_level.gap, one_level.optimal) == (7.0, 7.0, 0.0, True)


@pytest.mark.parametrize("rounds", [(1, 1), (2_000, 20_000)])
def test_states_dropped_for_time_leave_a_true_record(monkeypatch: pytest.MonkeyPatch, rounds: tuple[int, int]) -> None:
    monkeypatch.setattr(module, "_ROUNDS", rounds)
    monkeypatch.setattr(module, "_MIN_STATES", 5)
    rng = np.random.default_rng(0)
    cost = np.sort(rng.random((60, 12)), axis=1)
    error = 1.0 - cost + 0.1 * (np.arange(12) == 0)  # all slopes equal: far more states than the rounds allow
    found = knapsack(cost, error, 20.0)
    assert not found.optimal
    assert found.gap < 1e-2
    check_record(found, cost, error, 20.0)


def test_heads_left_out_for_time_take_the_greedy_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_TAILS", 1)
    cost, error = curves("steps", 40, 12)
    found = knapsack(cost, error, 12.0)
    assert not found.optimal
    check_record(found, cost, error, 12.0)


def curves(kind: str, heads: int, levels: int) -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(1)
    scale = np.exp(rng.normal(0, 2.5, (heads, 1)))  # heavy tail: few heads carry most of the error
    tau = np.linspace(0, 1, levels)
    if kind == "measured":
        cost = 0.05 + 0.95 * tau ** rng.uniform(1, 6, (heads, 1))
        noise = np.exp(rng.normal(0, 0.1, (heads, levels)))
        return cost, scale * (np.exp(-rng.uniform(1, 8, (heads, 1)) * tau) - np.exp(-8)) * noise
    cost = np.sort(rng.random((heads, levels)), axis=1)
    if kind == "one slope":
        return cost, 1.0 - cost
    cliffs = np.sort(rng.integers(0, levels, (heads, 3)), axis=1)
    heights = np.sort(rng.random((heads, 4)), axis=1)[:, ::-1] * scale
    passed = (cliffs[:, :, None] < np.arange(levels)).sum(axis=1)
    return cost, np.take_along_axis(heights, passed, axis=1)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("kind", ["measured", "steps", "one slope"])
def test_a_thousand_heads_are_quick_and_close_to_the_bound(kind: str, share: float) -> None:
    cost, error = curves(kind, 1024, 32)
    budget = float(cost.min(axis=1).sum() + share * np.ptp(cost, axis=1).sum())
    start = time.process_time()
    found = knapsack(cost, error, budget)
    assert time.process_time() - start < 10  # measured: 0.5 s at most
    assert found.gap < 1e-3
    check_record(found, cost, error, budget)


def test_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROUNDS", (20_000, 100_000))  # states are dropped
    cost, error = curves("one slope", 60, 8)
    assert knapsack(cost, error, 20.0).choice.tolist() == knapsack(cost, error, 20.0).choice.tolist()


@pytest.mark.parametrize(
    ("cost", "error", "budget", "message"),
    [
        ([1.0, 2.0], [[1.0, 2.0]], 1, r"cost has shape \(2,\): it must be \(heads, levels\)"),
        (np.zeros((0, 3)), np.zeros((0, 3)), 1, r"cost has shape \(0, 3\)"),
        ([[1.0, 2.0]], [[1.0]], 1, r"error has shape \(1, 1\): it must be the shape of cost, \(1, 2\)"),
        ([[1.0, math.nan]], [[1.0, 0.0]], 1, r"cost\[0, 1\] is nan: it must be in \[0, 1e\+290\]"),
        ([[1.0, 2.0]], [[1.0, math.inf]], 1, r"error\[0, 1\] is inf"),
        ([[1.0, -2.0]], [[1.0, 0.0]], 1, r"cost\[0, 1\] is -2.0"),
        ([[1.0, 2.0]], [[1.0, 0.0]], math.nan, r"budget is nan"),
        ([[1.0, 2.0], [3.0, 2.5]], [[1.0, 0.0]] * 2, 3.25, r"budget is 3.25: it must be at least 3.5"),
    ],
)
def test_bad_arguments_are_named(cost: object, error: object, budget: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knapsack(cost, error, budget)  # type: ignore[arg-type]


def test_max_error_below_the_least_error_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"max_error is 0.5: it must be at least 1.0, the sum of every head's smallest"
    ):
        knapsack_min_cost([[1.0, 2.0]], [[3.0, 1.0]], 0.5)
