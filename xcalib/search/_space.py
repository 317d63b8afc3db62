"""Where a refinement looks: one shift of the price of a block for every group of layers."""

import dataclasses
from typing import get_args

import numpy as np
import numpy.typing as npt

from xcalib.collect.curves import Curves
from xcalib.errors import CurvesError, TargetError, XcalibError
from xcalib.profile import OperatingPoint, Profile
from xcalib.search.objectives import Objective
from xcalib.search.plan import Tables, plan_point
from xcalib.search.targets import Target, parse_target

__all__ = ["MAX_DIMENSIONS", "PriceSpace", "price_space"]

MAX_DIMENSIONS = 24
FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class PriceSpace:
    """Shifts to thresholds; shifts of 0 give the point that is refined.

    Attributes:
        tables: what the point was searched on, or, where it was searched again from there, these tables anchored at it.
        target: what the search bounds at every shift.
        start: fp64 ``(layers of the model, heads)``, the point's thresholds.
        layers: indices of the measured layers, ascending; the others stay dense.
        groups: of every measured layer, int64 ``(measured layers,)``.
    """

    tables: Tables
    target: Target
    layers: tuple[int, ...]
    start: FloatArray
    groups: npt.NDArray[np.int64]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the dimensions: ``layers 0-2``, ``layer 7``."""
        names = []
        for group in range(int(self.groups[-1]) + 1):
            inside = [layer for layer, of in zip(self.layers, self.groups, strict=True) if of == group]
            names.append(f"layer {inside[0]}" if len(inside) == 1 else f"layers {inside[0]}-{inside[-1]}")
        return tuple(names)

    def thresholds(self, shifts: npt.ArrayLike) -> FloatArray:
        """Solve again with the price of a block times ``exp(shift)`` in each group, that is, its loss times ``exp(-shift)``.

        Args:
            shifts: ``(dimensions,)``.

        Returns:
            fp64 ``(layers of the model, heads)``.
        """
        if not np.any(shifts):
            return self.start.copy()
        heads = self.tables.shape[1]
        weight = np.exp(-np.asarray(shifts, dtype=np.float64)[self.groups])  # (measured layers,)
        rows = np.repeat(weight, heads)[:, None]  # (measured layers * heads, 1)
        tables = dataclasses.replace(self.tables, loss=self.tables.loss * rows, kl=self.tables.kl * rows)
        full = np.ones_like(self.start)
        full[list(self.layers)] = plan_point(tables, self.target).thresholds
        return full


def price_space(profile: Profile, point: OperatingPoint, curves: Curves, *, groups: int, bin_index: int) -> PriceSpace:
    """The space around one operating point in one length bin.

    Args:
        profile: that has the point.
        point: found by the knapsack on ``curves``.
        curves: of that length bin.
        groups: dimensions wanted, 1 to 24; with fewer measured layers there is one for each.
        bin_index: whose thresholds are refined.

    Raises:
        TargetError: the point is no knapsack's, or ``groups`` is out of range.
        CurvesError: the curves are another model's, or no objective gives the point's thresholds on them.
    """
    if not 1 <= groups <= MAX_DIMENSIONS:
        raise TargetError(f"groups is {groups}, expected 1 to {MAX_DIMENSIONS}")
    if point.method != "knapsack":
        raise TargetError(
            f"point {point.name!r} is by method {point.method!r}: only points of the knapsack can be refined"
        )
    if curves.model.get("config_sha256") != profile.model.config_sha256:
        raise CurvesError(f"the curves are of {curves.model.get('name')!r}, the profile is of {profile.model.name!r}")
    layers = tuple(layer for layer in range(profile.model.layers) if layer not in profile.dense_layers)
    if layers != tuple(curves.layers):
        raise CurvesError("the curves are of other layers than the profile's: give the curves that it was searched on")
    parts = np.array_split(np.arange(len(layers)), min(groups, len(layers)))
    of_layer = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    wanted = np.asarray(point.thresholds[bin_index], dtype=np.float64)
    if point.rounds is not None and any(one.taken for one in point.rounds[bin_index]):
        tables = _anchored(Tables.of(curves), wanted[list(layers)])
        density = float(np.take_along_axis(tables.cost, _levels(tables, wanted[list(layers)]), axis=1).sum())
        return PriceSpace(tables, Target(point.name, "density", density), layers, wanted, of_layer)
    target = _bounded(point, bin_index)
    for objective in get_args(Objective):  # the profile tells it in words; its thresholds tell it for certain
        try:
            tables = Tables.of(curves, objective)
            found = plan_point(tables, target).thresholds
        except (XcalibError, ValueError):
            continue  # these curves lack what the objective needs, or cannot reach the target
        if np.array_equal(found, wanted[list(layers)]):
            return PriceSpace(tables, target, layers, wanted, of_layer)
    raise CurvesError(
        f"searching these curves for {point.target} does not give the thresholds of point {point.name!r}: give the curves that "
        "the profile was searched on (a point that was refined before cannot be refined again)"
    )


def _levels(tables: Tables, thresholds: FloatArray) -> npt.NDArray[np.int64]:
    """Places of thresholds ``(layers, heads)`` on the grid, ``(layers * heads, 1)``."""
    return np.abs(thresholds.reshape(-1, 1, 1) - tables.grid).argmin(-1)


def _anchored(tables: Tables, thresholds: FloatArray) -> Tables:
    """Losses of each head scaled so that it takes its threshold at a price of 1 for all blocks, though no knapsack found these.

    A level off the lower hull of its head's curve is put on it.
    """
    level = _levels(tables, thresholds)
    cost = tables.cost - np.take_along_axis(tables.cost, level, axis=1)  # (heads, levels), 0 at the head's own
    gain = np.take_along_axis(tables.loss, level, axis=1) - tables.loss  # what a level saves
    with np.errstate(divide="ignore", invalid="ignore"):
        price = cost / gain
    most = np.where((gain > 0) & (cost > 0), price, np.inf).min(axis=1)  # a larger scale would buy more blocks
    least = np.where((gain < 0) & (cost < 0), price, 0.0).max(axis=1)  # a smaller one would sell some
    scale = np.where(np.isfinite(most), np.sqrt(np.maximum(least, most / 4) * most), np.maximum(2 * least, 1e-12))
    loss = tables.loss * scale[:, None]
    best = (loss + tables.cost).min(axis=1, keepdims=True) - np.take_along_axis(tables.cost, level, axis=1)
    loss = loss - loss.min(axis=1, keepdims=True) + 1e-12
    np.put_along_axis(
        loss, level, np.maximum(best - (tables.loss * scale[:, None]).min(axis=1, keepdims=True), 0.0), axis=1
    )
    return dataclasses.replace(tables, loss=loss, kl=loss)


def _bounded(point: OperatingPoint, bin_index: int) -> Target:
    target = parse_target(point.target, point.name)
    if target.kind != "drop":
        return target
    if point.predicted is None:
        raise TargetError(f"point {point.name!r} has no predicted density: search again")
    parts = point.predicted.by_length
    found = parts[bin_index] if parts else point.predicted
    return Target(point.name, "density", found.density)  # the density at which the search stopped
