"""Refinement workers of several machines on a real PostgreSQL: exact counts, killed workers, a server that goes away."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from xcalib.errors import StudyError
from xcalib.search import _workers
from xcalib.search._sampler import DRAW, MERIT, ShiftSampler
from xcalib.search._storage import open_storage, open_study, storage_errors
from xcalib.search._study import run_trials

FORK = multiprocessing.get_context("fork")
NAMES = ("layer 0", "layers 1-2", "layers 3-4")
SPACE = {name: FloatDistribution(-1.0, 1.0) for name in NAMES}
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
BEAT, SILENCE = 0.2, 4.0  # seconds


def opened(url: str) -> Study:
    return open_study(
        open_storage(url), "s", {"point": "a"}, metric="KL", resume=None, sampler=ShiftSampler(SPACE, seed=3)
    )


def work(url: str, count: int, machine: str, during: Callable[[Trial], None]) -> None:
    """What a worker process runs, on a machine of its own: heartbeats alone tell whether it lives."""
    _workers._machine = lambda: machine
    _workers.BEAT_SECONDS, _workers.SILENCE_SECONDS = BEAT, SILENCE

    def objective(trial: Trial) -> float:
        bowl = sum((trial.suggest_float(name, -1, 1) - 0.2) ** 2 for name in NAMES)
        trial.set_user_attr(MERIT, bowl - 0.12)
        during(trial)
        return bowl

    run_trials(opened(url), count, objective)


def start(url: str, count: int, machine: str, during: Callable[[Trial], None]) -> Any:
    process = FORK.Process(target=work, args=(url, count, machine, during))
    process.start()
    return process


def finished(study: Study) -> list[FrozenTrial]:
    return list(study.get_trials(deepcopy=False, states=FINISHED))


def wait_for(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def values_of(trial: FrozenTrial) -> tuple[float, ...]:
    return tuple(trial.params.values())


def test_a_worker_of_three_is_killed_in_a_trial(postgresql: Any) -> None:
    """Exactly 14 trials; the killed one is tried again with its numbers; no two draw with the same seed."""
    url = postgresql.new_database()
    opened(url)

    def stuck(trial: Trial) -> None:
        if trial.number >= 3:
            trial.set_user_attr("stuck", True)
            time.sleep(600)

    victim = start(url, 14, "host-a", stuck)
    others = [start(url, 14, f"host-{name}", lambda _trial: time.sleep(0.1)) for name in "bc"]
    wait_for(lambda: any("stuck" in trial.user_attrs for trial in opened(url).get_trials(deepcopy=False)))
    victim.kill()
    for worker in others:
        worker.join(120)
    assert [worker.exitcode for worker in others] == [0, 0]
    trials = opened(url).get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state in FINISHED]
    assert len(done) == 14 and all(trial.state in (*FINISHED, TrialState.FAIL) for trial in trials)
    assert {trial.user_attrs["worker"]["pid"] for trial in done} >= {worker.pid for worker in others}
    (left,) = (trial for trial in trials if "stuck" in trial.user_attrs and trial.state == TrialState.FAIL)
    (retry,) = (trial for trial in trials if trial.user_attrs.get("retry of trial") == left.number)
    assert retry.state in FINISHED and values_of(retry) == values_of(left)
    assert retry.user_attrs[DRAW] == left.user_attrs[DRAW]
    assert sorted(trial.user_attrs[DRAW] for trial in done) == list(range(14))
    assert len({values_of(trial) for trial in done}) == 14


def test_a_slow_worker_keeps_its_trial_while_its_heart_beats(postgresql: Any) -> None:
    url = postgresql.new_database()
    opened(url)
    slow = start(url, 1, "host-a", lambda _trial: time.sleep(1.7 * SILENCE))
    wait_for(lambda: bool(opened(url).get_trials(states=(TrialState.RUNNING,))))
    other = start(url, 1, "host-b", lambda _trial: None)
    for worker in (slow, other):
        worker.join(120)
        assert worker.exitcode == 0
    (trial,) = opened(url).trials
    assert trial.state == TrialState.COMPLETE and trial.user_attrs["worker"]["pid"] == slow.pid


def test_a_stopped_worker_loses_its_trial_and_gives_it_up(postgresql: Any) -> None:
    """A machine that hangs: the other takes over, and the first one, awake again, does not count it twice."""
    url = postgresql.new_database()
    opened(url)
    hung = start(url, 2, "host-a", lambda _trial: time.sleep(0.5))
    wait_for(lambda: any(trial.params for trial in opened(url).trials))
    os.kill(hung.pid, signal.SIGSTOP)
    other = start(url, 2, "host-b", lambda _trial: time.sleep(0.1))
    wait_for(lambda: len(finished(opened(url))) == 2)
    os.kill(hung.pid, signal.SIGCONT)
    for worker in (hung, other):
        worker.join(120)
        assert worker.exitcode == 0
    assert [trial.state.name for trial in opened(url).trials] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_server_that_goes_away_is_one_line_and_loses_nothing(postgresql: Any) -> None:
    url = postgresql.new_database()

    def objective(trial: Trial) -> float:
        if trial.number == 3:
            postgresql.stop()
        return float(trial.suggest_float(NAMES[0], -1, 1))

    try:
        with (
            pytest.raises(
                StudyError, match=r"^the storage of the trials failed \(.*; finished trials are kept"
            ) as caught,
            storage_errors(),
        ):
            run_trials(opened(url), 6, objective)
    finally:
        postgresql.start()
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert len(finished(opened(url))) == 3
    run_trials(opened(url), 6, lambda trial: float(trial.suggest_float(NAMES[0], -1, 1)))
    assert len(finished(opened(url))) == 6


def test_an_idle_connection_that_was_closed_is_made_again(postgresql: Any) -> None:
    """A server restarted during a trial that takes long and says nothing meanwhile."""
    url = postgresql.new_database()

    def objective(trial: Trial) -> float:
        if trial.number == 1:
            postgresql.stop()
            postgresql.start()
        return 1.0

    run_trials(opened(url), 3, objective)
    assert [trial.state for trial in opened(url).trials] == [TrialState.COMPLETE] * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [(("secret", "wrong"), "password authentication failed"), (("/postgres", "/nosuch"), '"nosuch" does not exist')],
)
def test_a_url_that_does_not_open_is_one_line(postgresql: Any, change: tuple[str, str], said: str) -> None:
    with pytest.raises(StudyError, match=said) as caught:
        open_storage(postgresql.url.replace(*change))
    message = str(caught.value)
    assert "\n" not in message and "secret" not in message and "wrong" not in message


SEARCH = ["--data", "builtin:prose", "--max-length", "384", "--num-samples", "2", "--block-size", "64", "--rounds", "0"]
REFINE = ["--samples", "2", "--validation-samples", "2", "--heldout-samples", "0", "--trials", "3"]


def test_refine_on_postgresql(
    postgresql: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    """The command: the second worker finds the work done, and returns the same profile as a journal."""
    monkeypatch.chdir(tmp_path)
    target = ["--target", "a:density=0.8", "--heldout-samples", "0", "--work", "work"]
    code, _, err = run("search", tiny_folder, *SEARCH, *target, "--out", "p.yaml")
    assert code == 0, err
    command = ["refine", "p.yaml", *REFINE, "--model", tiny_folder, "--work", "work"]
    url = postgresql.new_database()
    for storage, out in ((url, "a.yaml"), (url, "b.yaml"), ("journal:c.journal", "c.yaml")):
        code, _, err = run(*command, "--storage", storage, "--out", out)
        assert code == 0 and "secret" not in err, err
        assert "trials: 3 complete, 0 pruned, 0 failed" in err
    assert Path("a.yaml").read_bytes() == Path("b.yaml").read_bytes() == Path("c.yaml").read_bytes()
