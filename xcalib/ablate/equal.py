"""Variants at one density: log KL and accuracy on a line between the two measured densities around it.

A single tau, a top-k or a ratio gives every variant another density, and whoever keeps more blocks looks better. So each is
measured on both sides of a common density and read off there. Samples are what the bootstrap draws, the same draws for
all variants: differences between them are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xcalib.ablate.measure import FloatArray, Measured
from xcalib.evaluation.bootstrap import CONFIDENCE, RESAMPLES, SEED, Interval

__all__ = ["AtDensity", "at_density", "draw_weights", "interval_of"]

_LEAST_KL = 1e-12
_SAME = 1e-9


@dataclass(frozen=True, eq=False)
class AtDensity:
    """A variant at a density.

    Attributes:
        kl: nats per token.
        accuracy: in [0, 1], None where no sample asks something.
        limit: the single value that would give the density, None where heads differ.
        around: the two measured densities that it lies between.
        log_kl_draws: fp64 ``(resamples,)``, empty with fewer than two samples.
        accuracy_draws: the same, NaN where a draw asks nothing.
    """

    kl: float
    accuracy: float | None
    limit: float | None
    around: tuple[float, float]
    log_kl_draws: FloatArray
    accuracy_draws: FloatArray


def draw_weights(samples: int, resamples: int = RESAMPLES, seed: int = SEED) -> FloatArray:
    """How often each sample is drawn in each resample: fp64 ``(resamples, samples)``, without rows for fewer than two samples."""
    if samples < 2:
        return np.zeros((0, samples))
    draws = np.random.default_rng(seed).integers(samples, size=(resamples, samples))
    return np.stack([(draws == index).sum(axis=1) for index in range(samples)], axis=1).astype(np.float64)


def interval_of(draws: FloatArray, confidence: float = CONFIDENCE) -> Interval | None:
    """Percentile interval of draws, those that are NaN left out; None without any."""
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def at_density(
    measured: Sequence[Measured], limits: Sequence[float | None], density: float, weights: FloatArray
) -> AtDensity | None:
    """Read a variant off at a density.

    Args:
        measured: of each setting.
        limits: of each setting, None where heads differ.
        density: in (0, 1).
        weights: of :func:`draw_weights`.

    Returns:
        None where the measured densities do not lie on both sides.
    """
    densities = np.array([one.density for one in measured])
    below, above = densities <= density + _SAME, densities >= density - _SAME
    if not below.any() or not above.any():
        return None
    low = int(np.flatnonzero(below)[densities[below].argmax()])
    high = int(np.flatnonzero(above)[densities[above].argmin()])
    ends = (measured[low], measured[high])
    everything = np.ones((1, len(measured[0].kl)))
    log_kl, accuracy = _between(ends, density, everything)
    log_kl_draws, accuracy_draws = _between(ends, density, weights)
    first, second = limits[low], limits[high]
    limit = None
    if first is not None and second is not None:
        limit = float(np.interp(density, [densities[low], densities[high]], [first, second]))
    return AtDensity(
        kl=float(np.exp(log_kl[0])),
        accuracy=None if np.isnan(accuracy[0]) else float(accuracy[0]),
        limit=limit,
        around=(float(densities[low]), float(densities[high])),
        log_kl_draws=log_kl_draws,
        accuracy_draws=accuracy_draws,
    )


def _between(ends: tuple[Measured, Measured], density: float, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Log KL and accuracy of every row of weights ``(n, samples)``, on the line through the two settings' own pooled figures."""
    (x0, kl0, accuracy0), (x1, kl1, accuracy1) = (_pooled(one, weights) for one in ends)
    width = x1 - x0
    flat = np.abs(width) < _SAME  # one setting, or two that keep the same blocks
    share = np.where(flat, 0.0, (density - x0) / np.where(flat, 1.0, width))
    return kl0 + share * (kl1 - kl0), accuracy0 + share * (accuracy1 - accuracy0)


def _pooled(one: Measured, weights: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Density, log of mean KL and mean accuracy of each row of weights."""
    density = (weights @ one.kept) / (weights @ one.visible)
    kl = (weights @ one.kl) / (weights @ one.positions)
    asked = ~np.isnan(one.accuracy)
    asking = weights[:, asked].sum(axis=1)
    score = weights[:, asked] @ one.accuracy[asked]
    accuracy = np.where(asking > 0, score / np.maximum(asking, 1), np.nan)
    return density, np.log(np.maximum(kl, _LEAST_KL)), accuracy
