"""How sure a figure is: the percentile bootstrap, with the sample as what is drawn.

Tokens of one sample depend on each other, so they are never drawn apart: a resample takes whole samples, each with its
sum and its count.
"""

import numpy as np
import numpy.typing as npt

from xcalib.errors import DataError

__all__ = ["CONFIDENCE", "RESAMPLES", "SEED", "Interval", "ratio_interval"]

CONFIDENCE = 0.95
RESAMPLES = 4000  # the place of a 2.5 % quantile is then known to 0.25 %
SEED = 0  # one for all figures: plans that were measured on the same samples are compared on the same draws

Interval = tuple[float, float]


def ratio_interval(
    sums: npt.ArrayLike,
    counts: npt.ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval | None:
    """The interval of ``sum(sums) / sum(counts)`` over samples.

    Args:
        sums: ``(samples,)``, what is averaged, added up over each sample: KL in nats over its tokens, say.
        counts: ``(samples,)``, not negative: over how much, the tokens, say.
        confidence: share of resamples that the interval holds, between 0 and 1.
        resamples: how many are drawn.
        seed: of the draws.

    Returns:
        Lower and upper end, in the unit of the ratio. None where there is none: fewer than two samples, or no resample
        whose counts are not all 0 (those are left out).

    Raises:
        DataError: the shapes differ, a number is not finite, or ``confidence`` is out of range.
    """
    top, bottom = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if top.ndim != 1 or top.shape != bottom.shape:
        raise DataError(f"sums and counts must be two lists of one length, got shapes {top.shape} and {bottom.shape}")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all() and (bottom >= 0).all()):
        raise DataError("sums must be finite, and counts finite and not negative")
    if not (0 < confidence < 1 and resamples >= 1):
        raise DataError(
            f"confidence must be between 0 and 1 and resamples at least 1, got {confidence} and {resamples}"
        )
    if len(top) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(top), size=(resamples, len(top)))
    drawn_top, drawn_bottom = top[draws].sum(axis=1), bottom[draws].sum(axis=1)  # (resamples,)
    defined = drawn_bottom > 0
    if not defined.any():
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn_top[defined] / drawn_bottom[defined], [tail, 1 - tail])
    return float(low), float(high)
