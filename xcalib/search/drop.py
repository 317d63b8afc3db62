"""What a target ``drop`` needs: the accuracy that thresholds lose on the calibration's own questions."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xcalib.collect import Curves
from xcalib.collect.ranks import ALONE, Ranks
from xcalib.collect.shares import stamped_units
from xcalib.collect.units import Units
from xcalib.data import Sample, SampleSet
from xcalib.errors import TargetError
from xcalib.evaluation import evaluate_plans
from xcalib.models.sparse import SparsePlan
from xcalib.progress import Progress
from xcalib.search.plan import AccuracyDrop, all_layers

__all__ = ["DropMeters"]


class DropMeters:
    """By how much accuracy falls on the calibration samples that have answers; finished samples are kept below ``folder``."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: Path,
        progress: Progress,
        ranks: Ranks = ALONE,
        *,
        skip_bad: bool = False,
    ) -> None:
        self._skip_bad = skip_bad
        self._model, self._tokenizer, self._folder, self._progress = model, tokenizer, folder, progress
        self._ranks = ranks
        self._units: list[Units] = []

    def of(self, sets: Sequence[SampleSet], measured: Sequence[Curves]) -> list[AccuracyDrop | None]:
        """A meter for each length, None where nothing is asked; none at all where the lengths are not those of the curves."""
        if len(sets) != len(measured):
            return [None] * len(measured)
        return [self._meter(samples, curves) for samples, curves in zip(sets, measured, strict=True)]

    def discard(self) -> None:
        """Remove the measurements, once what they led to is known for good."""
        for units in self._units:
            units.remove()

    def _meter(self, samples: SampleSet, curves: Curves) -> AccuracyDrop | None:
        asking: tuple[Sample, ...] = tuple(sample for sample in samples.samples if sample.answers)
        if not asking or self._tokenizer is None:
            return None
        data = SampleSet(samples=asking, dropped={}, specs=samples.specs, split=samples.split, seed=samples.seed)

        def measure(candidates: list[np.ndarray]) -> list[float]:
            settings = curves.settings
            method = (settings.stride, settings.block_size, settings.pattern, ((0, None),))
            plans = {
                str(number): SparsePlan(*method, torch.tensor(all_layers(curves, taus))[None], order=settings.order)
                for number, taus in enumerate(candidates)
            }
            units = self._keep(curves, data, plans)
            found = evaluate_plans(
                self._model, data, plans, tokenizer=self._tokenizer, units=units, skip_bad=self._skip_bad,
                progress=self._progress, ranks=self._ranks,
            )  # fmt: skip
            dense = found.dense.accuracy
            if not dense:
                raise TargetError(
                    "the dense model answers none of the calibration questions: a drop of accuracy means nothing here"
                )
            return [1 - (plan.accuracy or 0.0) / dense for plan in found.plans]

        return measure

    def _keep(self, curves: Curves, data: SampleSet, plans: dict[str, SparsePlan]) -> Units:
        identity = {
            "plans": {name: plan.record() for name, plan in plans.items()},
            "data": data.tokens_sha256,
            "questions": data.questions_sha256,
            "config": curves.model["config_sha256"],
            "curves": hashlib.sha256(curves.error.tobytes()).hexdigest(),  # tells weights of one configuration apart
        }
        units = stamped_units(self._folder, identity, ranks=self._ranks)
        self._units.append(units)
        return units
