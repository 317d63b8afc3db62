"""Samples of several lengths: which lengths, one set of samples for each, and where one length ends and the next begins."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from xcalib.data._sample import SampleSet
from xcalib.errors import DataError

__all__ = ["MOST", "SHORTEST", "boundary", "check_lengths", "check_sets", "length_sets", "parse_lengths", "pooled"]

SHORTEST = 64  # tokens: one block of the smaller kind
MOST = 64  # lengths: a profile holds no more bins
_ITEM = re.compile(r"(\d{1,9})(k?)\Z", re.ASCII | re.IGNORECASE)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Read ``1k,2k,4096``: token counts, where k stands for 1,024; ascending, whatever the order in ``text``.

    Raises:
        DataError: an item is no such count, below 64, or given twice.
    """
    lengths = []
    for item in text.split(","):
        match = _ITEM.match(item.strip())
        if match is None:
            raise DataError(f"lengths {text!r}: expected token counts with commas between, as 1k,2k,4096; got {item!r}")
        lengths.append(int(match[1]) * (1024 if match[2] else 1))
    return check_lengths(lengths)


def check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The lengths in ascending order.

    Raises:
        DataError: there is none, there are more than 64, or one is no whole number, below 64 or given twice.
    """
    if not 1 <= len(lengths) <= MOST:
        raise DataError(f"lengths: expected 1 to {MOST} of them, got {len(lengths)}")
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int) or length < SHORTEST:
            raise DataError(f"lengths: expected whole numbers of tokens, at least {SHORTEST}, got {length!r}")
    twice = [length for length, count in Counter(lengths).items() if count > 1]
    if twice:
        raise DataError(f"lengths: {twice[0]:,} tokens are given twice")
    return tuple(sorted(lengths))


def boundary(lower: int, upper: int) -> int:
    """The first length that belongs to ``upper`` when ``lower`` and ``upper`` are measured: just above their geometric mean.

    What attention does changes with the logarithm of the length, so a prompt goes with the length that is nearer on
    that scale. ``lower < boundary <= upper`` for all whole numbers ``lower < upper``.
    """
    return math.isqrt(lower * upper) + 1


def length_sets(lengths: Sequence[int], read: Callable[[int], SampleSet]) -> tuple[SampleSet, ...]:
    """One set of samples for each length, by ``read(length)``.

    Raises:
        DataError: as :func:`check_lengths` and :func:`check_sets`.
    """
    sets = tuple(read(length) for length in check_lengths(lengths))
    check_sets(sets)
    return sets


def check_sets(sets: Sequence[SampleSet]) -> None:
    """Check sets of samples of several lengths.

    Raises:
        DataError: they are not in ascending order, or a sample is so short that a shorter length's thresholds would serve it.
    """
    lengths = [one.length for one in sets]
    if list(check_lengths(lengths)) != lengths:
        raise DataError(f"sets of samples must be in ascending order of length, got {lengths}")
    for (lower, upper), one in zip(pairwise(lengths), sets[1:], strict=True):
        least = boundary(lower, upper)
        for sample in one.samples:
            if len(sample.tokens) < least:
                raise DataError(
                    f"{sample.source}: a sample of {len(sample.tokens):,} tokens among those of {upper:,}, where those below "
                    f"{least:,} belong to {lower:,}: give data with longer prompts, or lengths that are further apart"
                )


def pooled(sets: Sequence[SampleSet]) -> SampleSet:
    """All samples of several sets in one, set after set; what was dropped is added up. DataError where there is no set."""
    if not sets:
        raise DataError("there are no samples")
    if len(sets) == 1:
        return sets[0]
    dropped: Counter[str] = Counter()
    for one in sets:
        dropped.update(one.dropped)
    samples = tuple(sample for one in sets for sample in one.samples)
    first = sets[0]
    return SampleSet(samples, dict(dropped), first.specs, first.split, first.seed, max(one.length for one in sets))
