"""Is a refined point better than the one it started from, on samples that no trial saw?"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from xcalib.evaluation.bootstrap import CONFIDENCE, Interval, ratio_interval
from xcalib.search._meter import Figures

__all__ = ["Aim", "Comparison", "Measure"]

Measure = Literal["kl", "density"]

# Errors fall about as the fourth power of the blocks (as in Target.scaled): half a percent of blocks is two percent of KL.
_POWER = 4.0
_TOLERANCE: dict[Measure, float] = {"density": 0.005, "kl": 0.02}


@dataclass(frozen=True)
class Comparison:
    """Thresholds against the start on the same samples.

    Attributes:
        samples: how many.
        kl: mean KL in nats per token of the start and of the thresholds.
        density: of both.
        ratio: the thresholds' over the start's, of what is minimised.
        excess: how far the thresholds are above the start in what is bounded, as a share of the start's.
        merit: ``ratio - 1`` plus the excess at its rate of exchange (docs/refine.md): below 0 where better.
        interval: of ``ratio``, paired: whole samples are drawn, each with both figures. None with fewer than two samples.
        confidence: of the interval.
        accepted: the rule of docs/refine.md.
    """

    samples: int
    kl: tuple[float, float]
    density: tuple[float, float]
    ratio: float
    excess: float
    merit: float
    interval: Interval | None
    confidence: float
    accepted: bool


@dataclass(frozen=True)
class Aim:
    """What is minimised; the other of KL and density must stay at the start's.

    Attributes:
        least: ``kl`` for points with a bounded density, ``density`` for points with a bounded KL.
    """

    least: Measure

    @property
    def bounded(self) -> Measure:
        """What must not grow."""
        return "density" if self.least == "kl" else "kl"

    @property
    def tolerance(self) -> float:
        """How far a trial may be above the start in it, as a share: two solutions of one budget differ by that on given text."""
        return _TOLERANCE[self.bounded]

    @property
    def exchange(self) -> float:
        """What one percent more of what is bounded buys of what is minimised, in percent."""
        return _POWER if self.least == "kl" else 1 / _POWER

    def values(self, figures: Figures) -> npt.NDArray[np.float64]:
        """Of each sample, what is minimised."""
        values: npt.NDArray[np.float64] = getattr(figures, self.least)
        return values

    def mean(self, figures: Figures) -> float:
        """Over all samples, what is minimised."""
        return _means(figures)[self.least]

    def excess(self, found: Figures, start: Figures) -> float:
        """See :attr:`Comparison.excess`."""
        return _share(_means(found)[self.bounded], _means(start)[self.bounded]) - 1

    def merit(self, found: Figures, start: Figures) -> float:
        """Change of what is minimised, as a share of the start's, with that of what is bounded at the rate of exchange."""
        return _share(self.mean(found), self.mean(start)) - 1 + self.exchange * self.excess(found, start)

    def compare(self, found: Figures, start: Figures, *, among: int) -> Comparison:
        """Judge one of ``among`` candidates, whose intervals hold together with the usual confidence (Bonferroni).

        Accepted when the excess is within the tolerance and the interval's upper end is below what the start would have
        reached with the same excess.
        """
        weights = start.positions if self.least == "kl" else start.blocks
        confidence = 1 - (1 - CONFIDENCE) / max(among, 1)
        ours, theirs = self.values(found) * weights, self.values(start) * weights
        interval = ratio_interval(ours, theirs, confidence=confidence)
        excess = self.excess(found, start)
        allowed = 1 - self.exchange * max(0.0, excess)
        return Comparison(
            samples=len(ours),
            kl=(start.mean_kl, found.mean_kl),
            density=(start.mean_density, found.mean_density),
            ratio=_share(self.mean(found), self.mean(start)),
            excess=excess,
            merit=self.merit(found, start),
            interval=interval,
            confidence=confidence,
            accepted=interval is not None and excess <= self.tolerance and interval[1] < allowed,
        )


def _means(figures: Figures) -> dict[Measure, float]:
    return {"kl": figures.mean_kl, "density": figures.mean_density}


def _share(found: float, start: float) -> float:
    if start > 0:
        return found / start
    return 1.0 if found == start else float("inf")
