"""An evaluation by length: what each plan does on samples of each length, and which of its length bins served them."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from xcalib.data import SampleSet
from xcalib.evaluation.results import DenseResult, PlanResult, SampleResult, summarise

__all__ = ["Bins", "LengthResult", "length_cuts", "part_by_length"]

Bins = Sequence[tuple[int, int | None]]  # key lengths, (min, max) with max exclusive and None for no end


@dataclass(frozen=True)
class LengthResult:
    """The samples of one range of lengths.

    Attributes:
        min_tokens: length of the shortest sample.
        max_tokens: of the longest.
        samples: how many.
        tokens: of all of them.
        asking: how many ask something.
        length_bin: the bin that served them, as (min, max) in tokens with max exclusive; None below the first, where attention
            is dense.
        extrapolated: whether they are longer than the last bin was made for.
        dense: as for all samples.
        plans: as for all samples, in the same order.
    """

    min_tokens: int
    max_tokens: int
    samples: int
    tokens: int
    asking: int
    length_bin: tuple[int, int | None] | None
    extrapolated: bool
    dense: DenseResult
    plans: tuple[PlanResult, ...]


def length_cuts(bins: Bins, lengths: Sequence[int], tokens: Sequence[int]) -> tuple[int, ...]:
    """Where to part samples, ascending; each cut is the first length of a group.

    Always at the bins' borders. Samples drawn at several ``lengths`` are also parted above each of these. Without lengths and
    with one bin only, samples that differ by a factor of two or more are parted above each power of two.
    """
    cuts = {border for ends in bins for border in ends if border is not None}
    if len(lengths) > 1:
        cuts |= {length + 1 for length in lengths}
    elif len(bins) == 1 and max(tokens) >= 2 * min(tokens):
        cuts |= {(1 << power) + 1 for power in range(min(tokens).bit_length() - 1, max(tokens).bit_length())}
    return tuple(sorted(cuts))


def part_by_length(
    names: Sequence[str], results: Sequence[SampleResult], data: SampleSet, bins: Bins, lengths: Sequence[int] = ()
) -> tuple[LengthResult, ...]:
    """Pool the samples of each range of lengths, ascending; nothing where one bin serves samples of one length.

    Args:
        names: of the plans.
        results: of the samples.
        data: the samples, in the same order.
        bins: of the plans, in tokens.
        lengths: that samples were drawn at, if several.
    """
    tokens = [len(sample.tokens) for sample in data.samples]
    cuts = length_cuts(bins, lengths, tokens)
    groups: dict[int, list[int]] = {}
    for index, count in enumerate(tokens):
        groups.setdefault(bisect_right(cuts, count), []).append(index)
    if len(groups) < 2 and len(bins) < 2:
        return ()
    return tuple(_group(names, results, data, bins, groups[place]) for place in sorted(groups))


def _group(
    names: Sequence[str], results: Sequence[SampleResult], data: SampleSet, bins: Bins, chosen: Sequence[int]
) -> LengthResult:
    samples = tuple(data.samples[index] for index in chosen)
    part = SampleSet(samples, {}, data.specs, data.split, data.seed)
    found = summarise(names, [results[index] for index in chosen], part)
    tokens = [len(sample.tokens) for sample in samples]
    reached = [one for one in bins if tokens[0] >= one[0]]
    end = bins[-1][1]
    return LengthResult(
        min_tokens=min(tokens),
        max_tokens=max(tokens),
        samples=found.samples,
        tokens=found.tokens,
        asking=found.asking,
        length_bin=reached[-1] if reached else None,
        extrapolated=end is not None and tokens[0] >= end,
        dense=found.dense,
        plans=found.plans,
    )
