"""A quick choice of levels for measurements: Lagrangian, not the exact search."""

import numpy as np

__all__ = ["TEMPER", "allocate"]

# Power of gain x error that searches minimise the sum of by default: docs/search.md has the figures.
TEMPER = 0.75


def allocate(cost: np.ndarray, error: np.ndarray, budget: float) -> np.ndarray:
    """Levels ``(heads,)`` that minimise ``error + price * cost`` at the lowest price whose mean cost is within the budget.

    Args:
        cost: ``(heads, levels)``.
        error: ``(heads, levels)``.
        budget: of the mean cost per head; where even the cheapest levels exceed it, these are taken.
    """
    low, high = 0.0, 1.0
    while _mean_cost(cost, error, high) > budget and high < 1e12:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_cost(cost, error, middle) > budget else (low, middle)
    return _cheapest(cost, error, high)


def _cheapest(cost: np.ndarray, error: np.ndarray, price: float) -> np.ndarray:
    return (error + price * cost).argmin(axis=1)


def _mean_cost(cost: np.ndarray, error: np.ndarray, price: float) -> float:
    levels = _cheapest(cost, error, price)
    return float(np.take_along_axis(cost, levels[:, None], axis=1).mean())
