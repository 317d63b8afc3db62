"""What a trial measures: thresholds from its shifts, end to end, sample by sample."""

from typing import TYPE_CHECKING, Any

import numpy as np
from optuna import TrialPruned
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from xcalib.progress import Progress
from xcalib.search._judge import Aim
from xcalib.search._meter import Figures, Meter
from xcalib.search._sampler import MERIT, is_start
from xcalib.search._space import PriceSpace
from xcalib.search._study import place_of

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

__all__ = ["PointObjective"]

BY_SAMPLE = {"kl": "kl by sample", "density": "density by sample"}  # user attributes of a trial


class PointObjective:
    """Value of a trial: thresholds from its shifts, measured sample by sample."""

    def __init__(self, space: PriceSpace, meter: Meter, price_range: float, seed: int) -> None:
        self.space, self.meter = space, meter
        self.aim = Aim("density" if space.target.kind == "kl" else "kl")
        self._range, self._seed = price_range, seed
        self.start_thresholds = space.thresholds(np.zeros(len(space.names)))

    def distributions(self) -> dict[str, Any]:
        """Of every dimension."""
        return {name: FloatDistribution(-self._range, self._range) for name in self.space.names}

    def prepare(self, study: "Study", progress: Progress) -> None:
        """Know the start's figures, which every trial is held to: from the study, or measured."""
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if is_start(trial, len(self.space.names)) and set(BY_SAMPLE.values()) <= trial.user_attrs.keys():
                self.meter.remember(self.start_thresholds, self.recorded(trial))
        with progress(f"Measuring the start on {len(self.meter)} samples", len(self.meter)) as advance:
            self.start = self.meter.all(self.start_thresholds, advance)

    def recorded(self, trial: "FrozenTrial") -> Figures:
        """The figures of a complete trial."""
        return self.meter.figures(*(trial.user_attrs[BY_SAMPLE[what]] for what in ("kl", "density")))

    def __call__(self, trial: "Trial") -> float:
        shifts = [trial.suggest_float(name, -self._range, self._range) for name in self.space.names]
        thresholds = self.space.thresholds(shifts)
        place = place_of(trial.study, trial.number)
        trial.set_user_attr("place", place)
        # Another order in every trial: else the first samples alone would decide what is pruned.
        order = np.random.default_rng([self._seed, place]).permutation(len(self.meter)).tolist()
        kl, density = np.full(len(order), np.nan), np.full(len(order), np.nan)
        for done, index in enumerate(order, start=1):
            kl[index], density[index] = self.meter.one(index, thresholds)
            figures = self.meter.figures(kl, density)
            trial.report(float(self.aim.values(figures)[index]), index)
            if any(shifts) and done < len(order) and trial.should_prune():
                self._record(trial, figures.only(order[:done]), self.start.only(order[:done]))
                raise TrialPruned
        self._record(trial, figures, self.start)
        for what, name in BY_SAMPLE.items():
            trial.set_user_attr(name, getattr(figures, what).tolist())
        return self.aim.mean(figures)

    def _record(self, trial: "Trial", figures: Figures, start: Figures) -> None:
        trial.set_user_attr("kl", figures.mean_kl)
        trial.set_user_attr("density", figures.mean_density)
        trial.set_user_attr(MERIT, self.aim.merit(figures, start))
        trial.set_constraint(
            f"{self.aim.bounded} above the start's", self.aim.excess(figures, start) - self.aim.tolerance
        )
