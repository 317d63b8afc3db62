"""What a target ``drop`` needs: the accuracy that thresholds lose on the calibration's own questions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from xcalib.collect import Curves
from xcalib.collect.ranks import ALONE, Ranks
from xcalib.data import Sample, SampleSet
from xcalib.errors import TargetError
from xcalib.evaluation import evaluate_plans
from xcalib.models.sparse import SparsePlan
from xcalib.progress import Progress
from xcalib.search.plan import AccuracyDrop, all_layers

__all__ = ["drop_meters"]


def drop_meters(
    model: Any,
    sets: Sequence[SampleSet],
    measured: Sequence[Curves],
    tokenizer: Any,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> list[AccuracyDrop | None]:
    """A meter for each length, None where nothing is asked; none at all where the lengths are not those of the curves."""
    if len(sets) != len(measured):
        return [None] * len(measured)
    pairs = zip(sets, measured, strict=True)
    return [_drop_meter(model, samples, curves, tokenizer, progress, ranks) for samples, curves in pairs]


def _drop_meter(
    model: Any, samples: SampleSet, curves: Curves, tokenizer: Any, progress: Progress, ranks: Ranks
) -> AccuracyDrop | None:
    """Measures by how much accuracy falls on the calibration samples that have answers; None without any."""
    asking: tuple[Sample, ...] = tuple(sample for sample in samples.samples if sample.answers)
    if not asking or tokenizer is None:
        return None

    def measure(candidates: list[np.ndarray]) -> list[float]:
        settings = curves.settings
        method = (settings.stride, settings.block_size, settings.pattern, ((0, None),))
        plans = {
            str(number): SparsePlan(*method, torch.tensor(all_layers(curves, taus))[None], order=settings.order)
            for number, taus in enumerate(candidates)
        }
        data = SampleSet(samples=asking, dropped={}, specs=samples.specs, split=samples.split, seed=samples.seed)
        found = evaluate_plans(model, data, plans, tokenizer=tokenizer, progress=progress, ranks=ranks)
        dense = found.dense.accuracy
        if not dense:
            raise TargetError(
                "the dense model answers none of the calibration questions: a drop of accuracy means nothing here"
            )
        return [1 - (plan.accuracy or 0.0) / dense for plan in found.plans]

    return measure
