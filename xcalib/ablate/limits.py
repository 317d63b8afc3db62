"""Which limits to measure, so that their densities lie on both sides of every density that is compared."""

from collections.abc import Sequence

import numpy as np

from xcalib.ablate.measure import FloatArray
from xcalib.ablate.variants import Scoring
from xcalib.kernels.api import Policy

__all__ = ["BRACKET", "candidates", "limits_around"]

# Multiples of a compared density at which a variant is measured: far enough apart that held-out text, and a model that attends
# sparsely in the layers before, still lie on both sides; near enough for log KL to be a line between them.
BRACKET = (0.9, 1.1)
NEAR = (0.95, 1.05)  # for policies that come in steps: the nearest step outside of these
_TAUS = (0.0, 0.2, 0.35, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.88, 0.9, 0.92, 0.94, 0.96, 0.975, 0.99, 1.0)
_MOST_BLOCKS = 48


def candidates(policy: Policy, k_blocks: int) -> tuple[float, ...]:
    """Ascending limits whose densities are read off; between them density is taken as linear."""
    if policy == "threshold":
        return _TAUS
    if policy == "ratio":
        return tuple(float(value) for value in np.linspace(0, 1, 41))
    numbers = np.unique(np.geomspace(1, k_blocks, _MOST_BLOCKS).round().astype(int))
    return tuple(float(number) for number in numbers)


def limits_around(scoring: Scoring, limits: Sequence[float], density: FloatArray, wanted: float) -> list[float]:
    """Limits on both sides of a density, ascending.

    Args:
        scoring: whose limits these are.
        limits: ascending candidates.
        density: of each.
        wanted: the density to enclose.

    Returns:
        Two limits; empty where no limit comes as low as ``wanted``: what is always kept is more.
    """
    if density[0] >= wanted:
        return []
    if scoring.policy == "top-k":  # whole blocks: nothing lies between two of them
        below = np.flatnonzero(density <= NEAR[0] * wanted)
        above = np.flatnonzero(density >= NEAR[1] * wanted)
        picked = (below[-1] if len(below) else 0, above[0] if len(above) else len(limits) - 1)
        return [float(limits[index]) for index in picked]
    rising = np.maximum.accumulate(density)
    keep = np.r_[True, np.diff(rising) > 0]  # np.interp wants ascending densities
    targets = [max(BRACKET[0] * wanted, 0.5 * (rising[0] + wanted)), min(BRACKET[1] * wanted, 1.0)]
    found = np.interp(targets, rising[keep], np.asarray(limits)[keep])
    return [float(value) for value in np.round(found, 4)]
