"""Units of work, each measured once by one of the ranks, kept on disk, and known to all of them."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xcalib.collect.ranks import ALONE, Ranks
from xcalib.collect.skipping import UnitStore
from xcalib.collect.units import Units
from xcalib.errors import CurvesError, RankError
from xcalib.progress import Progress, silent

__all__ = ["Advance", "Arrays", "Shares", "open_units", "stamped_units"]

Advance = Callable[[int], None]
Arrays = dict[str, np.ndarray]
MeasureUnit = Callable[[int, Advance], Arrays | None]


def open_units(folder: Any, identity: Mapping[str, Any], *, resume: bool, ranks: Ranks = ALONE) -> Units:
    """The folder of a job's units: rank 0 opens or makes it, then the others, whether or not they see the same disk.

    Raises:
        BusyError, CurvesError: as :class:`Units`.
        RankError: a rank's job is another one: its host has other data, say.
    """
    keys = sorted(identity)
    differs = _differ(ranks, [json.dumps(identity[key], sort_keys=True) for key in keys])
    if differs.any():
        names = ", ".join(key for key, other in zip(keys, differs, strict=True) if other)
        raise RankError(f"ranks were given another {names}: take the same model, data and versions on all hosts")
    return ranks.in_turn(lambda: Units(folder, identity, resume=resume or not ranks.leader))


def stamped_units(folder: Path, identity: Mapping[str, Any], *, resume: bool = True, ranks: Ranks = ALONE) -> Units:
    """Units in a folder of their own below ``folder``, named after what they measure: others are no reason to refuse."""
    stamp = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return open_units(folder / stamp, identity, resume=resume, ranks=ranks)


@dataclass(frozen=True)
class Shares:
    """Hands units of work out to ranks.

    Attributes:
        units: where finished ones are kept; None keeps them in memory.
        progress: draws the work.
        ranks: that share it.
    """

    units: UnitStore | None = None
    progress: Progress = silent
    ranks: Ranks = ALONE

    def each(
        self,
        what: str,
        names: Sequence[str],
        measure: MeasureUnit,
        steps: Sequence[int],
        *,
        local: Collection[str] = (),
    ) -> Iterator[Arrays]:
        """Every unit in the order of its name, on all ranks; all must take all of them.

        A unit that a rank finds on its disk is finished. Of the others, rank r of n takes every n-th, from the r-th.

        Args:
            what: is done, for the progress.
            names: of the units on disk.
            measure: makes the unit of an index, and advances the progress. One rank by itself may find that there is none to
                make: None is left out.
            steps: of progress that each unit is worth.
            local: arrays that only stay on the disk of the rank that made them.

        Raises:
            CurvesError: a unit cannot be written, or is gone before the others were told.
            RankError: a rank has other units, or a share takes too long.
        """
        with self.ranks.progress(self.progress)(what, sum(steps)) as advance:
            if self.ranks.size == 1:
                for unit in self._one_by_one(names, measure, steps, advance):
                    yield _without(unit, local)
                return
            owner, mine = self._measure_share(names, measure, steps, advance)
        for index, name in enumerate(names):
            arrays = None
            if owner[index] == self.ranks.rank:
                kept = mine.pop(index) if self.units is None else self._kept(name)
                arrays = _without(kept, local)
            yield self.ranks.broadcast(arrays, int(owner[index]))

    def _one_by_one(
        self,
        names: Sequence[str],
        measure: MeasureUnit,
        steps: Sequence[int],
        advance: Advance,
    ) -> Iterator[Arrays]:
        for index, name in enumerate(names):
            unit = None if self.units is None else self.units.load(name)
            if unit is None:
                unit = self._measured(index, name, measure, advance)
            else:
                advance(steps[index])
            if unit is not None:
                yield unit

    def _measure_share(
        self,
        names: Sequence[str],
        measure: MeasureUnit,
        steps: Sequence[int],
        advance: Advance,
    ) -> tuple[np.ndarray, dict[int, Arrays]]:
        """Which rank has each unit, and without a disk this rank's units; returns when all are measured."""
        ranks, mine = self.ranks, dict[int, Arrays]()
        owner = self._found(names)
        for index in np.flatnonzero(owner == ranks.rank).tolist():
            advance(steps[index])
        missing = np.flatnonzero(owner == ranks.size)
        owner[missing] = np.arange(len(missing)) % ranks.size
        for index in missing[owner[missing] == ranks.rank].tolist():
            unit = self._measured(index, names[index], measure, advance)
            assert unit is not None  # ranks make all units
            if self.units is None:
                mine[index] = unit
        ranks.arrive()
        return owner, mine

    def _found(self, names: Sequence[str]) -> np.ndarray:
        """For every unit the rank that has it, ``size`` where none does; int64 ``(units,)``.

        Each rank looks for its own share first: on a shared disk every file is read once.
        """
        ranks = self.ranks
        if _differ(ranks, ["\n".join(names)]).any():
            raise RankError("ranks came to different levels: their processors or libraries differ; take one kind")
        owner = np.full(len(names), ranks.size)
        if self.units is None:
            return owner
        for mine in (range(ranks.rank, len(names), ranks.size), range(len(names))):
            for index in mine:
                if owner[index] == ranks.size and self.units.load(names[index]) is not None:
                    owner[index] = ranks.rank
            owner = ranks.lowest(owner)
        return owner

    def _measured(self, index: int, name: str, measure: MeasureUnit, advance: Advance) -> Arrays | None:
        if self.units is not None:
            self.units.begin(name)  # a rank looks for all units first
        unit = measure(index, advance)
        if self.units is not None and unit is not None:
            self.units.save(name, unit)
        return unit

    def _kept(self, name: str) -> Arrays:
        assert self.units is not None  # else the unit is in memory
        unit = self.units.load(name)
        if unit is None:
            raise CurvesError(f"{self.units.folder}: unit {name} is gone or damaged; go on with --resume")
        return unit


def _differ(ranks: Ranks, texts: Sequence[str]) -> np.ndarray:
    """Which texts are not the same on all ranks, bool ``(texts,)``."""
    digests = np.array([int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) for text in texts], dtype=np.int64)
    lowest, highest = np.split(ranks.lowest(np.concatenate([digests, -digests])), 2)
    return np.asarray(lowest != -highest)


def _without(unit: Arrays, names: Collection[str]) -> Arrays:
    return {name: array for name, array in unit.items() if name not in names}
