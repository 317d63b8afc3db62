"""The best trials against the start, on samples that no trial saw."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.trial import TrialState

from xcalib.data import SampleSet
from xcalib.progress import Progress
from xcalib.search._judge import Comparison
from xcalib.search._meter import Figures, Meter
from xcalib.search._objective import PointObjective
from xcalib.search._sampler import MERIT

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

__all__ = ["Candidate", "Validation"]

FINALISTS = 3


@dataclass(frozen=True, eq=False)
class Candidate:
    """A trial that beat the start on the refinement samples: its thresholds ``(layers, heads)``, and it against the start."""

    trial: "FrozenTrial"
    thresholds: np.ndarray
    refinement: Comparison
    validation: Comparison


class Validation:
    """The best trials against the start on samples that no trial saw; finished figures are kept in the study."""

    def __init__(self, study: "Study", objective: PointObjective, meter: Meter) -> None:
        self._study, self._objective, self._meter = study, objective, meter

    def best(self, validation: SampleSet, progress: Progress) -> Candidate | None:
        """The accepted finalist of least merit; where none is accepted that of least merit."""
        finalists = self._finalists()
        if not finalists:
            return None
        aim, tokens = self._objective.aim, validation.tokens_sha256[:12]
        found = []
        with progress("Validating", (1 + len(finalists)) * len(self._meter)) as advance:
            start = self._measure(f"validation {tokens}: start", self._objective.start_thresholds, advance)
            for trial, thresholds in finalists:
                figures = self._measure(f"validation {tokens}: trial {trial.number}", thresholds, advance)
                refinement = aim.compare(self._objective.recorded(trial), self._objective.start, among=1)
                compared = aim.compare(figures, start, among=len(finalists))
                found.append(Candidate(trial, thresholds, refinement, compared))
        return min(found, key=lambda item: (not item.validation.accepted, item.validation.merit))

    def _finalists(self) -> list[tuple["FrozenTrial", np.ndarray]]:
        """The best feasible trials with thresholds of their own that beat the start."""
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        kept = (trial for trial in complete if all(limit <= 0 for limit in trial.constraints.values()))
        better = [trial for trial in kept if trial.user_attrs[MERIT] < 0]
        found: dict[bytes, tuple[FrozenTrial, np.ndarray]] = {}
        for trial in sorted(better, key=lambda t: (t.user_attrs[MERIT], t.user_attrs["place"])):
            space = self._objective.space
            thresholds = space.thresholds([trial.params[name] for name in space.names])
            found.setdefault(thresholds.tobytes(), (trial, thresholds))
            if len(found) == FINALISTS:
                break
        return list(found.values())

    def _measure(self, key: str, thresholds: np.ndarray, advance: Any) -> Figures:
        known = self._study.user_attrs.get(key)
        if known is not None:
            self._meter.remember(thresholds, self._meter.figures(known["kl"], known["density"]))
        figures = self._meter.all(thresholds, advance)
        if known is None:
            self._study.set_user_attr(key, {"kl": figures.kl.tolist(), "density": figures.density.tolist()})
        return figures
