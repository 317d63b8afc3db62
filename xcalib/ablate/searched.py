"""Per-head thresholds for the table that compares searches: solved on one collection, at densities around the compared ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from xcalib.ablate.limits import BRACKET
from xcalib.collect import Curves
from xcalib.errors import TargetError
from xcalib.search import SearchMethod, Target, build_profile

__all__ = ["Solved", "solve"]

START = 0.9  # of the published recurrence


@dataclass(frozen=True, eq=False)
class Solved:
    """Thresholds fp32 ``(layers, heads)``, one table a density, and why a density has none or another than asked for."""

    thresholds: list[npt.NDArray[np.float32]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def solve(curves: Curves, densities: Sequence[float], method: SearchMethod, name: str) -> Solved:
    """Thresholds at ``BRACKET`` times each density, with the default objective.

    The published recurrence starts with every head at 0.9 and only goes down, so no state keeps more blocks than that.
    """
    found = Solved()
    floor = float(curves.density[:, :, 0].mean())
    start = float(np.interp(START, curves.grid, curves.density.mean(axis=(0, 1))))
    for density in densities:
        if floor >= density:
            continue  # no variant gets there, and the table says so
        if method == "paper" and start < density:
            found.remarks.append(
                f"{name}: starts at tau {START:g} for every head, which keeps {start:.1%} of the blocks: "
                f"it has no state at density {density:g}"
            )
        targets = (max(BRACKET[0] * density, 0.5 * (floor + density)), min(BRACKET[1] * density, 1.0))
        for target in targets:
            try:
                profile = build_profile(
                    curves, [Target("point", "density", target)], method=method, start_threshold=START
                )
            except TargetError as error:
                found.remarks.append(f"{name} at density {target:.3f}: {error}")
                continue
            table = np.asarray(profile.point("point").thresholds[0], dtype=np.float32)  # (layers, heads)
            if not any(np.array_equal(table, other) for other in found.thresholds):
                found.thresholds.append(table)
    return found
