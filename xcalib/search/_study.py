"""One Optuna study that several workers share, that outlives every one of them, and that ends with exactly N trials."""

import time
from collections.abc import Callable

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import Trial, TrialState

from xcalib.progress import Progress, silent
from xcalib.search._sampler import DRAW, RETRY
from xcalib.search._workers import Heartbeat, StaleWatch, Worker, is_signed

__all__ = ["place_of", "run_trials"]

POLL_SECONDS = 0.2


def place_of(study: Study, number: int) -> int:
    """How many trials before trial ``number`` count; those that failed do not."""
    return sum(t.number < number and t.state != TrialState.FAIL for t in study.get_trials(deepcopy=False))


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
        kept = {key: trial.user_attrs[key] for key in (DRAW,) if key in trial.user_attrs}
        study.enqueue_trial(params, user_attrs={RETRY: number, **kept})
