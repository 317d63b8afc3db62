"""The rounds of a whole search: one sequential search for each length, and what is kept until the profile is there."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xcalib.collect import Curves, measured_length
from xcalib.collect.chunks import HeadChunks
from xcalib.collect.lengths import labelled
from xcalib.collect.ranks import ALONE, Ranks
from xcalib.collect.shares import Shares, stamped_units
from xcalib.collect.skipping import Skipping, UnitStore
from xcalib.collect.units import Units
from xcalib.data import SampleSet
from xcalib.progress import Progress
from xcalib.search.objectives import Objective
from xcalib.search.plan import Planned, Tables
from xcalib.search.sequential import Sequential
from xcalib.search.targets import Target

__all__ = ["Improve", "Rounds", "are_measured_on"]

Improve = Callable[[Target, Planned], Planned]


def are_measured_on(measured: Sequence[Curves], sets: Sequence[SampleSet]) -> bool:
    """Whether the curves were measured on these samples, of all lengths."""
    return [curves.calibration["tokens_sha256"] for curves in measured] == [samples.tokens_sha256 for samples in sets]


class Rounds:
    """Goes on from the first search by measuring with all layers sparse, where the samples are those of the curves."""

    def __init__(
        self,
        count: int,
        sets: Sequence[SampleSet],
        measured: Sequence[Curves],
        folder: Path,
        ranks: Ranks = ALONE,
        *,
        chunks: HeadChunks | None = None,
        skip_bad: bool = False,
    ) -> None:
        """``count`` rounds at most; finished measurements are kept below ``folder``, from an earlier run too.

        ``chunks`` says how many heads are measured at a time; with ``skip_bad`` samples whose numbers are not finite there, with
        all layers sparse, have no say in the rounds.
        """
        self._ranks = ranks
        self._chunks = chunks
        self._skip_bad = skip_bad
        self._count = count if are_measured_on(measured, sets) else 0
        self._pairs = list(zip(sets, measured, strict=True)) if self._count else []
        self._folder = folder
        self._units: list[Units] = []

    def improvers(self, model: Any, objective: Objective, progress: Progress) -> list[Improve] | None:
        """What goes on from a plan, for each length; None where nothing is to."""
        return [self._improver(model, *pair, objective, progress) for pair in self._pairs] or None

    def discard(self) -> None:
        """Remove the measurements, once what they led to is known for good."""
        for units in self._units:  # those of other curves stay
            units.remove()

    def _improver(
        self, model: Any, samples: SampleSet, curves: Curves, objective: Objective, progress: Progress
    ) -> Improve:
        settings = {key: str(value) for key, value in asdict(curves.settings).items()}
        identity = {
            "config": curves.model["config_sha256"],
            "data": samples.tokens_sha256,
            "curves": hashlib.sha256(curves.error.tobytes()).hexdigest(),  # tells weights of one configuration apart
            **settings,
        }
        # A unit's name says which thresholds it measured: another target, or an objective, may take up what is there.
        units = stamped_units(self._folder, identity, ranks=self._ranks)
        self._units.append(units)
        if len(self._pairs) > 1:
            progress = labelled(progress, measured_length(curves))
        tables = Tables.of(curves, objective)
        skipping = Skipping(samples, units, allowed=self._skip_bad, ranks=self._ranks, remembers=False)
        made: dict[int, Sequential] = {}  # by the number of samples: one goes on from target to target

        def improve(target: Target, planned: Planned) -> Planned:
            def work(kept: SampleSet, store: UnitStore | None) -> Planned:
                count = len(kept.samples)
                if count not in made:
                    made[count] = Sequential(model, kept, tables, Shares(store, progress, self._ranks), self._chunks)
                return made[count].improve(target, planned, self._count)

            return skipping.run(work)

        return improve
