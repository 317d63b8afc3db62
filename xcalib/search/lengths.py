"""Several lengths in one profile: which bin serves which length, and what is said about all bins together."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np

from xcalib.collect import Curves, measured_length
from xcalib.collect.lengths import check_same
from xcalib.data import SampleSet, boundary, pooled
from xcalib.errors import CurvesError, TargetError
from xcalib.profile import Bound, LengthBin, LengthPrediction, Prediction
from xcalib.search.plan import Planned
from xcalib.search.targets import Target

__all__ = [
    "as_sets",
    "at_length",
    "calibration_documents",
    "length_bins",
    "pooled_calibration",
    "pooled_prediction",
    "refuse_unreachable",
    "worst_bound",
]


def as_sets(curves: Curves | Sequence[Curves]) -> tuple[Curves, ...]:
    """Curves of one or of several lengths, the latter checked to belong together; CurvesError where they do not."""
    sets = (curves,) if isinstance(curves, Curves) else tuple(curves)
    if not sets:
        raise CurvesError("there are no curves")
    check_same(sets)
    return sets


def calibration_documents(sets: Sequence[SampleSet], measured: Sequence[Curves] | None) -> frozenset[str]:
    """What held-out samples must not share: documents of the calibration at any length, of the curves where there are some."""
    if measured is None:
        return pooled(sets).documents
    return frozenset(digest for curves in measured for digest in curves.calibration["documents"])


def length_bins(sets: Sequence[Curves]) -> tuple[LengthBin, ...]:
    """One bin for each measured length.

    Two bins meet at the geometric mean of their lengths. The first begins at four blocks, below which nearly every block is
    the sink or a row's own; or at three quarters of the shortest length where that is less, for whole prompts are drawn up to
    a tenth and an answer shorter than asked. The last ends with the longest length: what is longer is extrapolation.
    """
    lengths = [measured_length(curves) for curves in sets]
    first = min(4 * sets[0].settings.block_size, max(1, lengths[0] * 3 // 4))
    borders = [first, *(boundary(lower, upper) for lower, upper in pairwise(lengths)), lengths[-1] + 1]
    return tuple(LengthBin(min_length=start, max_length=end) for start, end in pairwise(borders))


@contextmanager
def at_length(curves: Curves, target: Target, count: int) -> Iterator[None]:
    """A target that cannot be reached at one of ``count`` lengths is said to be out of reach there."""
    try:
        yield
    except TargetError as error:
        if count == 1:
            raise
        raise TargetError(f"point {target.name}, at {measured_length(curves):,} tokens: {error}") from error


def refuse_unreachable(targets: Sequence[Target], sets: Sequence[SampleSet], block_size: int) -> None:
    """Raise TargetError before anything is measured if a density is below what a length's samples must keep anyway."""
    for samples in sets:
        blocks = np.array([-(-len(sample.tokens) // block_size) for sample in samples.samples])
        # Of the n (n + 1) / 2 blocks that causality allows, the sink and each row's own are always kept.
        least = float((2 * blocks - 1).sum() / (blocks * (blocks + 1) / 2).sum())
        for target in targets:
            if target.kind not in ("density", "speedup") or target.offered:
                continue
            if (target.value if target.kind == "density" else 1 / target.value) < least:
                others = ", or a kl target, which every length can meet" if len(sets) > 1 else ""
                raise TargetError(
                    f"point {target.name}, at {samples.length:,} tokens: target {target} is out of reach: the blocks that are "
                    f"always kept are already {least:.3f} of all; choose a higher density, longer samples or smaller "
                    f"blocks{others}"
                )


def pooled_prediction(sets: Sequence[Curves], planned: Sequence[Planned]) -> Prediction:
    """What a point should do in each bin, and over all bins as an evaluation pools samples like the calibration's.

    That is density over blocks and KL over tokens, so a bin counts by the blocks and the tokens of its samples.
    """
    density = [min(one.density, 1.0) for one in planned]
    kl = [one.kl for one in planned]
    if len(sets) == 1:
        return Prediction(density=density[0], kl=kl[0])
    parts = [
        LengthPrediction(min_length=part.min_length, max_length=part.max_length, density=density[index], kl=kl[index])
        for index, part in enumerate(length_bins(sets))
    ]
    return Prediction(
        density=float(np.average(density, weights=[curves.visible.sum() for curves in sets])),
        kl=float(np.average(kl, weights=[curves.tokens.sum() for curves in sets])),
        by_length=tuple(parts),
    )


def worst_bound(planned: Sequence[Planned]) -> Bound | None:
    """The bound of the bin that may be furthest from its best; None where a bin has none."""
    bounds = [one.bound for one in planned if one.bound is not None]
    if len(bounds) < len(planned):
        return None
    return max(bounds, key=lambda bound: -1.0 if bound.gap is None else bound.gap)


def pooled_calibration(sets: Sequence[Curves]) -> dict[str, Any]:
    """The calibration record of a profile: that of one length, or what several have together.

    With several the SHA-256 of the tokens is that of the sets' digests, in ascending order of length, as ASCII.
    """
    records = [curves.calibration for curves in sets]
    dropped: Counter[str] = Counter()
    for record in records:
        dropped.update(record["dropped"])
    together = sha256("".join(record["tokens_sha256"] for record in records).encode()).hexdigest()
    return {
        **records[0],
        "sources": tuple(records[0]["sources"]),
        "samples": sum(record["samples"] for record in records),
        "min_length": min(record["min_length"] for record in records),
        "max_length": max(record["max_length"] for record in records),
        "tokens_sha256": records[0]["tokens_sha256"] if len(records) == 1 else together,
        "documents": tuple(sorted({digest for record in records for digest in record["documents"]})),
        "gain_samples": sum(record["gain_samples"] for record in records),
        "dropped": dict(dropped),
        "lengths": tuple(measured_length(curves) for curves in sets),
        "skipped": sum(record.get("skipped", 0) for record in records),
    }
