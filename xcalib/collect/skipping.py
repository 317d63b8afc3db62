"""Samples that give numbers that are not finite: named, or left out and counted."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from xcalib.collect.chunks import memory_error
from xcalib.collect.curves import Curves
from xcalib.collect.ranks import ALONE, Ranks
from xcalib.data import Sample, SampleSet
from xcalib.errors import MemoryLimitError, ModelError, NonFiniteError, RankError, XcalibWarning

__all__ = ["Skipping", "UnitStore", "kept_samples", "of_sample", "refuse_skipping"]

T = TypeVar("T")
Arrays = dict[str, np.ndarray]
# Units whose figures do not depend on which other samples there are.
INDEPENDENT = ("sample-", "evaluated-", "slopes-", "kl-")


class UnitStore(Protocol):
    """What keeps finished units: :class:`xcalib.collect.units.Units`, or a part of one."""

    folder: Path

    def load(self, name: str) -> Arrays | None:
        """A finished unit's arrays, or None."""

    def begin(self, name: str) -> None:
        """Say that a unit is being measured from now on."""

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a unit."""


def refuse_skipping(skip_bad: bool, ranks: Ranks) -> None:
    """Refuse to leave samples out where there are several ranks.

    Raises:
        RankError: ranks would have to agree on what is left out before any of them goes on, and they do not.
    """
    if skip_bad and ranks.size > 1:
        raise RankError(
            "--skip-bad (skip_bad) goes with one process: ranks do not agree on the samples that are left out; run without "
            "--workers and torchrun, or take the bad samples out of the data"
        )


@contextmanager
def of_sample(index: int) -> Iterator[None]:
    """Errors of the model say which sample they are of; so does memory that runs out."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(error.reason, index) from error
    except ModelError as error:
        raise ModelError(f"sample {index}: {error}") from error
    except MemoryLimitError as error:
        raise MemoryLimitError(f"sample {index}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        known = memory_error(error)
        if known is None:
            raise
        raise MemoryLimitError(f"sample {index}: {known}") from error


class Skipping:
    """Does work on a set of samples, and again without those that gave numbers that are not finite.

    Attributes:
        reasons: index in the given set, to what was wrong, of samples that are left out.
    """

    def __init__(
        self,
        samples: SampleSet,
        units: UnitStore | None,
        *,
        allowed: bool,
        ranks: Ranks = ALONE,
        remembers: bool = True,
        offered: bool = True,
    ) -> None:
        """Prepare.

        Args:
            samples: of which up to half may be left out.
            units: where finished work is kept, and which samples were left out in an earlier run.
            allowed: whether samples may be left out; if not, the first one ends the work.
            ranks: that share the samples.
            remembers: whether a run that goes on begins without the samples that an earlier one left out. Not so where work that
                came before the bad sample had a use for it: it is found bad again then, at the same place.
            offered: whether the error says that samples may be left out.

        Raises:
            RankError: as :func:`refuse_skipping`.
        """
        refuse_skipping(allowed, ranks)
        self._remembers = remembers
        self._samples = samples
        self._units = units
        self._allowed = allowed
        self._hint = "; --skip-bad leaves such samples out" if offered else ""
        self._hint += ", in one process only" if offered and ranks.size > 1 else ""
        self.reasons: dict[int, str] = {}
        for index in range(len(samples.samples)) if allowed and remembers and units is not None else ():
            known = units.load(_skipped(index)) if units is not None else None
            if known is not None:
                self._drop(index, bytes(known["reason"]).decode())

    @property
    def indices(self) -> list[int]:
        """Those that are left, ascending."""
        return [index for index in range(len(self._samples.samples)) if index not in self.reasons]

    @property
    def samples(self) -> SampleSet:
        """What is left; what is left out is counted under ``dropped``."""
        return without(self._samples, self.reasons)

    def run(self, work: Callable[[SampleSet, UnitStore | None], T]) -> T:
        """The work's result, on as many samples as it can be done on.

        Args:
            work: of a set and of where its units are kept; raises NonFiniteError with the index in that set.

        Raises:
            NonFiniteError: a sample is bad and may not be left out, or more than half are bad.
        """
        while True:
            try:
                return work(self.samples, self._store())
            except NonFiniteError as error:
                if error.sample is None:
                    raise
                self.skip(self.indices[error.sample], error)

    def skip(self, index: int, error: NonFiniteError) -> None:
        """Leave sample ``index`` of the given set out, and say so.

        Raises:
            NonFiniteError: as :meth:`run`.
        """
        if not self._allowed:
            named = f"{error.reason} ({_name(self._samples.samples[index])}){self._hint}"
            raise NonFiniteError(named, index) from error
        self._drop(index, error.reason)
        if self._units is not None and self._remembers:
            self._units.save(_skipped(index), {"reason": np.frombuffer(error.reason.encode(), dtype=np.uint8)})

    def _drop(self, index: int, reason: str) -> None:
        self.reasons[index] = reason
        count, total = len(self.reasons), len(self._samples.samples)
        if 2 * count > total:
            raise NonFiniteError(
                f"{count} of {total} samples give numbers that are not finite, sample {index} the last of them ({reason}): "
                "that is the model, or its --dtype, rather than the data"
            )
        name = _name(self._samples.samples[index])
        warnings.warn(f"skipped sample {index} ({name}): {reason}", XcalibWarning, stacklevel=3)

    def _store(self) -> UnitStore | None:
        return self._units if self._units is None or not self.reasons else _Part(self._units, self.indices)


class _Part:
    """The units of some samples, numbered anew."""

    def __init__(self, units: UnitStore, indices: list[int]) -> None:
        self.folder = units.folder
        self._units = units
        self._indices = indices
        self._left = hashlib.sha256(repr(indices).encode()).hexdigest()[:8]

    def load(self, name: str) -> Arrays | None:
        return self._units.load(self._own(name))

    def begin(self, name: str) -> None:
        self._units.begin(self._own(name))

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        self._units.save(self._own(name), arrays)

    def _own(self, name: str) -> str:
        kind, _, number = name.rpartition("-")
        if not name.startswith(INDEPENDENT):
            kind = f"{kind}-{self._left}"
        return f"{kind}-{self._indices[int(number)]:05d}"


def without(samples: SampleSet, left_out: Mapping[int, str]) -> SampleSet:
    """The set without some of its samples, which are counted."""
    if not left_out:
        return samples
    dropped = dict(samples.dropped)
    for index in sorted(left_out):
        reason = f"{samples.samples[index].source}: numbers that are not finite (sample {index})"
        dropped[reason] = dropped.get(reason, 0) + 1
    kept = tuple(sample for index, sample in enumerate(samples.samples) if index not in left_out)
    return replace(samples, samples=kept, dropped=dropped)


def kept_samples(samples: SampleSet, curves: Curves) -> SampleSet:
    """The samples that curves were measured on, of those that were given; others come back as they are."""
    if not curves.skipped or max(curves.skipped) >= len(samples.samples):
        return samples
    kept = without(samples, dict.fromkeys(curves.skipped, ""))
    return kept if kept.tokens_sha256 == curves.calibration["tokens_sha256"] else samples


def _skipped(index: int) -> str:
    return f"skipped-{index:05d}"


def _name(sample: Sample) -> str:
    documents: Any = ", ".join(sample.documents[:2]) + (", ..." if len(sample.documents) > 2 else "")
    return f"{sample.source}, document {documents}" if documents else sample.source
