"""One Optuna study that several workers share, that outlives every one of them, and that ends with exactly N trials."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from xcalib.progress import Progress, silent
from xcalib.search._workers import Heartbeat, StaleWatch, Worker, is_signed

__all__ = ["ShiftSampler", "is_start", "place_of", "run_trials"]

FIRST_TRIALS = 8  # after the start and before TPE: pairs x, -x around it
FIRST_SPREAD = 0.35  # of their normal distribution, as a share of the range
POLL_SECONDS = 0.2
_WRONG_SPACE = "this sampler needs all dimensions in one space"


def is_start(trial: FrozenTrial, dimensions: int) -> bool:
    """Whether the trial measures the point that is refined: all shifts 0."""
    return len(trial.params) == dimensions and not any(trial.params.values())


def place_of(study: Study, number: int) -> int:
    """How many trials before trial ``number`` count; those that failed do not."""
    return sum(t.number < number and t.state != TrialState.FAIL for t in study.get_trials(deepcopy=False))


class ShiftSampler(BaseSampler):
    """First the start, then pairs of opposite shifts around it, then multivariate TPE under the trials' constraints.

    A proposal depends on the seed, the trial's place and the trials before it, never on the process: a study that was
    killed and resumed by one worker gives the same trials as one that was not.
    """

    def __init__(self, space: Mapping[str, BaseDistribution], seed: int) -> None:
        self._space = dict(space)
        self._seed = seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All dimensions, always."""
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A value for every dimension."""
        before = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number and t.state != TrialState.FAIL]
        undecided = [t for t in before if not t.state.is_finished() and len(t.params) < len(self._space)]
        if not undecided and not any(is_start(t, len(self._space)) for t in before):
            return dict.fromkeys(self._space, 0.0)
        place = len(before)
        if place <= FIRST_TRIALS:
            return self._near_start(place)
        state = int(np.random.SeedSequence([self._seed, place]).generate_state(1)[0])
        tpe = TPESampler(multivariate=True, n_startup_trials=1, seed=state)
        found = tpe.sample_relative(study, trial, tpe.infer_relative_search_space(study, trial))
        return found or self._near_start(place)  # many workers began at once: nothing is finished yet

    def _near_start(self, place: int) -> dict[str, float]:
        """Near the start the objective is about linear: where a shift is of harm, its opposite is of use."""
        draw = np.random.default_rng([self._seed, (place - 1) // 2]).normal(0, FIRST_SPREAD, len(self._space))
        sign = 1 if place % 2 else -1
        return {
            name: float(np.clip(sign * z, -1, 1)) * distribution.high  # type: ignore[attr-defined]
            for (name, distribution), z in zip(self._space.items(), draw, strict=True)
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never asked for."""
        raise NotImplementedError(_WRONG_SPACE)


def run_trials(
    study: Study,
    count: int,
    objective: Callable[[Trial], float],
    *,
    description: str = "Refining",
    progress: Progress = silent,
) -> None:
    """Work on the study until ``count`` trials are complete or pruned, those of all workers and earlier runs included.

    A trial counts when fewer than ``count`` trials with lower numbers have not failed. A failed trial stays failed, so that
    however many workers race for the last place, one gets it: no lock is needed. A trial that its worker left (killed, say)
    is failed, and its parameters wait for the next worker. While others work on the last trials this waits, to take over
    if they die.

    Args:
        study: with the same objective in every worker.
        count: trials wanted in all.
        objective: value of a trial; raises ``optuna.TrialPruned`` to prune it.
        description: of the progress bar.
        progress: draws it.
    """
    watch, shown = StaleWatch(), 0
    with progress(description, count) as advance, Worker() as worker:
        while True:
            _fail_left(study, watch)
            counted = [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.FAIL]
            finished = sum(t.state.is_finished() for t in counted)
            advance(min(finished, count) - shown)
            shown = min(finished, count)
            if finished >= count:
                return
            room = len(counted) < count or any(t.state == TrialState.WAITING for t in counted)
            # An unsigned trial is signed at once or was left: to wait keeps a resumed study's trials in their order.
            if room and all(is_signed(t) or t.state != TrialState.RUNNING for t in counted):
                _run_one(study, count, objective, worker)
            else:
                time.sleep(POLL_SECONDS)


def _run_one(study: Study, count: int, objective: Callable[[Trial], float], worker: Worker) -> None:
    trial = study.ask()
    try:
        worker.sign(trial)
        if place_of(study, trial.number) >= count:  # another worker took the last place in the meantime
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            return
        with Heartbeat(trial):
            value = objective(trial)
        study.tell(trial, value, skip_if_finished=True)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    except UpdateFinishedTrialError:
        pass  # this worker was silent for so long that another one took the trial over
    except BaseException:
        _fail(study, trial.number)
        raise


def _fail_left(study: Study, watch: StaleWatch) -> None:
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if watch.is_stale(trial):
            _fail(study, trial.number)


def _fail(study: Study, number: int) -> None:
    """End a trial that does not count, and let its parameters wait for the next worker."""
    try:
        study.tell(number, state=TrialState.FAIL)
    except (ValueError, UpdateFinishedTrialError):
        return  # another worker was faster
    trial = study.get_trials(deepcopy=False)[number]
    params = trial.system_attrs.get("fixed_params", {}) | trial.params
    if params:
        study.enqueue_trial(params, user_attrs={"retry of trial": number})
