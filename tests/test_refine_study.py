"""A study of exactly N trials: several workers, killed ones, resumed ones, and what storages may be given."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from xcalib.errors import StudyError
from xcalib.search import _study, _workers
from xcalib.search._sampler import DRAW, MERIT, ShiftSampler
from xcalib.search._storage import open_storage, open_study
from xcalib.search._study import place_of, run_trials

FORK = multiprocessing.get_context("fork")  # real processes, without the seconds that importing torch takes
NAMES = ("layer 0", "layers 1-2", "layers 3-4")
SPACE = {name: FloatDistribution(-1.0, 1.0) for name in NAMES}
STEPS = 5
IDENTITY = {"point": "balanced", "seed": 3}


def opened(location: str | None, seed: int = 3, name: str = "s", resume: bool | None = None) -> Study:
    identity = {"point": "balanced", "seed": seed}
    sampler = ShiftSampler(SPACE, seed)
    return open_study(open_storage(location), name, identity, metric="KL", resume=resume, sampler=sampler)


def value_of(trial: Trial, before_step: Callable[[int], None] = lambda _step: None) -> float:
    """A round bowl whose lowest point is not the start, five samples; shifts of the third dimension are bounded."""
    x = [trial.suggest_float(name, -1, 1) for name in NAMES]
    bowl = (x[0] - 0.3) ** 2 + (x[1] + 0.2) ** 2 + x[2] ** 2
    values = [bowl + 0.01 * step for step in range(STEPS)]
    trial.set_user_attr(MERIT, bowl - 0.13)
    for step, value in enumerate(values):
        before_step(step)
        trial.report(value, step)
        if step > 2 and any(x) and trial.should_prune():
            trial.set_constraint("third", x[2] - 0.5)
            raise optuna.TrialPruned
    trial.set_constraint("third", x[2] - 0.5)
    return sum(values) / STEPS


def finished(study: Study) -> list[FrozenTrial]:
    return [
        trial for trial in study.get_trials(deepcopy=False) if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]


def summary(study: Study) -> list[tuple[Any, ...]]:
    return [(trial.state, trial.params, trial.value, trial.constraints) for trial in finished(study)]


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def work(location: str, count: int, before_step: Callable[[int], None] = lambda _step: None) -> None:
    """What a worker process runs."""
    run_trials(opened(location), count, lambda trial: value_of(trial, before_step))


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return f"journal:{tmp_path / 'refine.journal'}"


# --- one worker


def test_start_then_pairs_and_their_minimum_then_tpe() -> None:
    study = opened(None)
    run_trials(study, 14, value_of)
    params = [list(trial.params.values()) for trial in finished(study)]
    assert params[0] == [0.0, 0.0, 0.0]
    pairs = np.array(params[1:7]).reshape(3, 2, 3)
    assert np.array_equal(pairs[:, 0], -pairs[:, 1])
    gram = pairs[:, 0] @ pairs[:, 0].T
    assert gram == pytest.approx(np.diag(np.diag(gram)), abs=1e-12)  # orthogonal
    assert params[7] == pytest.approx(
        [0.3, -0.2, 0.0], abs=1e-9
    )  # a round bowl: the parabolas meet in its lowest point
    assert len({tuple(values) for values in params}) == len(params)
    assert all(-1 <= value <= 1 for values in params for value in values)


def test_the_minimum_goes_no_further_than_was_measured() -> None:
    """Downhill all the way: one step's length, in all directions; and without merits TPE takes the place."""

    def slope(trial: Trial) -> float:
        total = sum(trial.suggest_float(name, -1, 1) for name in NAMES)
        trial.set_user_attr(MERIT, total)
        return total

    study = opened(None)
    run_trials(study, 8, slope)
    steps = np.array([list(trial.params.values()) for trial in study.trials[1:7:2]])
    reached = sum(-np.sign(step.sum()) * step for step in steps)
    reached *= np.linalg.norm(steps[0]) / np.linalg.norm(reached)
    assert list(study.trials[7].params.values()) == pytest.approx(reached.tolist())
    unknown = opened(None)
    run_trials(unknown, 8, lambda trial: sum(trial.suggest_float(name, -1, 1) for name in NAMES))
    assert unknown.trials[7].params != study.trials[7].params


def test_trials_are_seeded() -> None:
    a, b, other = opened(None), opened(None), opened(None, seed=4)
    for study in (a, b, other):
        run_trials(study, 14, value_of)
    assert summary(a) == summary(b) != summary(other)


def test_search_finds_the_bowl_and_keeps_the_bound() -> None:
    study = opened(None)
    run_trials(study, 60, value_of)
    assert study.best_trial.value is not None and study.best_trial.value < 0.5 * finished(study)[0].value  # type: ignore[operator]
    assert study.best_trial.params["layers 3-4"] <= 0.5
    assert "PRUNED" in states(study)


def test_more_trials_can_be_asked_for_later(journal: str) -> None:
    run_trials(opened(journal), 4, value_of)
    run_trials(opened(journal), 4, value_of)
    assert len(states(opened(journal))) == len(finished(opened(journal))) == 4
    run_trials(opened(journal), 7, value_of)
    assert len(finished(opened(journal))) == 7


def test_an_error_leaves_the_trial_to_the_next_run(journal: str) -> None:
    def fails(step: int) -> None:
        if len(finished(opened(journal))) == 3:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        work(journal, 6, fails)
    assert states(opened(journal))[3:] == ["FAIL", "WAITING"]
    work(journal, 6)
    left, retried = opened(journal).get_trials(deepcopy=False)[3:5]
    assert left.params == retried.params and retried.user_attrs["retry of trial"] == 3
    assert len(finished(opened(journal))) == 6


# --- killed workers


def die_at(moment: str, place: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """SIGKILL to the own process at a moment of the trial at ``place``."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "unsigned":
        sign = _workers.Worker.sign

        def killing_sign(self: _workers.Worker, trial: Trial) -> None:
            if place_of(trial.study, trial.number) == place:
                die()
            sign(self, trial)

        monkeypatch.setattr(_workers.Worker, "sign", killing_sign)
    if moment == "unnamed":
        suggest = Trial.suggest_float

        def killing_suggest(self: Trial, name: str, low: float, high: float, **options: Any) -> float:
            if name == NAMES[1] and place_of(self.study, self.number) == place:
                die()
            return suggest(self, name, low, high, **options)

        monkeypatch.setattr(Trial, "suggest_float", killing_suggest)
    told = iter(range(10**6))

    def before_step(step: int) -> None:
        if moment == "measuring" and step == 2 and next(told) == place:
            die()

    return before_step


@pytest.mark.parametrize("moment", ["unsigned", "unnamed", "measuring"])
@pytest.mark.parametrize("place", [0, 4, 11])
def test_killed_and_resumed_gives_the_same_trials(
    moment: str, place: int, journal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = opened(None)
    run_trials(whole, 13, value_of)
    monkeypatch.setattr(_workers, "UNSIGNED_SECONDS", 0.1)
    before_step = die_at(moment, place, monkeypatch)
    worker = FORK.Process(target=work, args=(journal, 13, before_step))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert states(opened(journal)).count("RUNNING") == 1
    monkeypatch.undo()
    monkeypatch.setattr(_workers, "UNSIGNED_SECONDS", 0.1)
    run_trials(opened(journal), 13, value_of)
    resumed = opened(journal)
    assert summary(resumed) == summary(whole)
    assert states(resumed).count("FAIL") == 1 and len(states(resumed)) == 14


@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgresql"])
def test_two_workers_finish_exactly_n(kind: str, journal: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    location = {"journal": journal, "sqlite": f"sqlite:///{tmp_path / 'study.db'}"}.get(kind)
    location = location or request.getfixturevalue("postgresql").new_database()
    count = 24 if kind == "journal" else 8
    opened(location)
    slow = [lambda _step: time.sleep(0.004), lambda _step: time.sleep(0.007)]
    workers = [FORK.Process(target=work, args=(location, count, pause)) for pause in slow]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    study = opened(location)
    done = finished(study)
    assert len(done) == count
    assert set(states(study)) <= {"COMPLETE", "PRUNED", "FAIL"}
    assert {trial.user_attrs["worker"]["pid"] for trial in done} == {worker.pid for worker in workers}
    assert len({tuple(trial.params.values()) for trial in done}) == count  # nobody ran another one's trial
    assert sorted(trial.user_attrs[DRAW] for trial in done) == list(range(count))


def test_a_worker_killed_among_others_costs_nothing(journal: str) -> None:
    opened(journal)
    workers = [FORK.Process(target=work, args=(journal, 24, lambda _step: time.sleep(0.01))) for _ in range(3)]
    for worker in workers:
        worker.start()
    victim = workers[0]

    def has_begun() -> bool:
        running = opened(journal).get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return any(trial.user_attrs.get("worker", {}).get("pid") == victim.pid for trial in running)

    deadline = time.monotonic() + 60
    while not has_begun() and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.kill()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0]
    study = opened(journal)
    assert len(finished(study)) == 24
    assert set(states(study)) <= {"COMPLETE", "PRUNED", "FAIL"}


def test_a_live_worker_keeps_its_trial(journal: str) -> None:
    """Stopped, even: it holds its trial until it is dead, and then the other takes it over."""
    opened(journal)
    inside = FORK.Event()  # its trial, and not writing to the journal: stopped there, it would hold the file's lock

    def hold(_step: int) -> None:
        inside.set()
        time.sleep(60)

    first = FORK.Process(target=work, args=(journal, 1, hold))
    first.start()
    assert inside.wait(60)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)
    second = FORK.Process(target=work, args=(journal, 1))
    second.start()
    second.join(1.0)
    assert second.is_alive() and states(opened(journal)) == ["RUNNING"]
    first.kill()
    second.join(60)
    assert second.exitcode == 0
    first.join(60)
    assert states(opened(journal)) == ["FAIL", "COMPLETE"]
    assert opened(journal).trials[1].user_attrs["worker"]["pid"] == second.pid


def test_the_last_place_goes_to_one(journal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker asks between this one's look and its own question."""
    study, other = opened(journal), opened(journal)
    run_trials(study, 2, value_of)
    ask = study.ask

    def late() -> Trial:
        if len(study.get_trials(deepcopy=False)) == 2:
            other.tell(other.ask(), 1.0)
        return ask()

    monkeypatch.setattr(study, "ask", late)
    run_trials(study, 3, value_of)
    assert states(study)[2:] == ["COMPLETE", "FAIL"]


def test_a_trial_that_was_taken_over_is_given_up(journal: str) -> None:
    study, other = opened(journal), opened(journal)

    def taken(trial: Trial) -> float:
        if trial.number == 1:
            other.tell(1, state=TrialState.FAIL)  # as a worker does that saw no heartbeat for long
        return value_of(trial)

    run_trials(study, 3, taken)
    assert states(study)[1] == "FAIL" and len(finished(study)) == 3 and len(states(study)) == 4


def draw(trial: Trial) -> None:
    for name in NAMES:
        trial.suggest_float(name, -1, 1)


def test_no_two_trials_draw_with_the_same_number(journal: str) -> None:
    """Two workers ask at once while a third, which took a trial and never drew, is found dead between their looks."""
    study = opened(journal)
    run_trials(study, 1, value_of)
    left, first = study.ask(), study.ask()
    write, second = study._storage.set_trial_user_attr, opened(journal)

    def late(trial_id: int, key: str, value: Any) -> None:
        if trial_id == first._trial_id and states(study)[1] == "RUNNING":
            second.tell(left.number, state=TrialState.FAIL)
            draw(second.ask())
        write(trial_id, key, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study._storage, "set_trial_user_attr", late)
        draw(first)
    draw(study.ask())
    drawn = [trial.user_attrs.get(DRAW) for trial in study.get_trials(deepcopy=False)]
    assert drawn == [0, None, 1, 2, 3]
    params = [tuple(trial.params.values()) for trial in study.get_trials(deepcopy=False)]
    assert len(set(params)) == 5 and params[2][0] == -params[3][0]  # the pair that a single worker would have tried


def test_a_retried_trial_keeps_its_number(journal: str) -> None:
    """Killed after its first value of three, while another worker went on: the other two come from the same draw."""
    study = opened(journal)
    run_trials(study, 2, value_of)
    left, other = study.ask(), study.ask()
    begun = left.suggest_float(NAMES[0], -1, 1)
    draw(other)
    _study._fail(study, left.number)
    retry = study.ask()
    draw(retry)
    trials = study.get_trials(deepcopy=False)
    assert [trial.user_attrs[DRAW] for trial in trials] == [0, 1, 2, 3, 2]
    whole = opened(None)
    run_trials(whole, 3, value_of)
    assert trials[retry.number].params == whole.trials[2].params
    assert trials[retry.number].params[NAMES[0]] == begun


# --- who is alive


def running(study: Study) -> FrozenTrial:
    (trial,) = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return trial


def test_this_process_is_alive_only_while_it_works() -> None:
    study, watch = opened(None), _workers.StaleWatch()
    with _workers.Worker() as worker:
        worker.sign(study.ask())
        assert not watch.is_stale(running(study))
    assert watch.is_stale(running(study))  # left by an earlier call, in a notebook say


def test_a_process_number_used_again_is_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    study, watch = opened(None), _workers.StaleWatch()
    trial = study.ask()
    other = FORK.Process(target=time.sleep, args=(60,))
    other.start()
    monkeypatch.setattr(os, "getpid", lambda: other.pid)
    _workers.Worker().sign(trial)
    monkeypatch.undo()
    assert not watch.is_stale(running(study))
    signature = running(study).user_attrs["worker"]
    trial.set_user_attr("worker", signature | {"started": signature["started"] - 1})
    assert watch.is_stale(running(study))
    other.kill()
    other.join()


def test_another_machine_is_judged_by_its_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    study, watch, clock = opened(None), _workers.StaleWatch(), [0.0]
    monkeypatch.setattr(_workers.time, "monotonic", lambda: clock[0])
    trial = study.ask()
    trial.set_user_attr("worker", {"machine": "elsewhere", "pid": os.getpid(), "started": 1, "run": "x"})
    assert not watch.is_stale(running(study))
    for beat in range(1, 5):
        clock[0] += _workers.SILENCE_SECONDS * 0.9
        trial.set_user_attr("beat", beat)
        assert not watch.is_stale(running(study))
    clock[0] += _workers.SILENCE_SECONDS * 0.9
    assert not watch.is_stale(running(study))
    clock[0] += _workers.SILENCE_SECONDS * 0.2
    assert watch.is_stale(running(study))


def test_heartbeat_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workers, "BEAT_SECONDS", 0.01)
    study = opened(None)
    trial = study.ask()
    with _workers.Heartbeat(trial):
        deadline = time.monotonic() + 30
        while study.trials[0].user_attrs.get("beat", 0) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert study.trials[0].user_attrs["beat"] >= 3


# --- storages and studies


@pytest.mark.parametrize("form", ["journal:{}", "journal://{}", "{}"])
def test_a_journal_has_three_spellings(form: str, tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    run_trials(opened(form.format(path)), 1, value_of)
    assert len(finished(opened(str(path)))) == 1


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("journal:", "names no file"),
        ("journal:/nowhere/at/all/a.journal", "the folder /nowhere/at/all does not exist"),
        ("nosuch://host/name", r"'nosuch://host/name': cannot be opened \(NoSuchModuleError"),
        ("sqlite:////nowhere/at/all/a.db", "cannot be opened .*unable to open database file"),
        ("://", "cannot be opened"),
        ("mysql+nodriver://me:secret@host/name", r"'mysql\+nodriver://me:\*\*\*@host/name'"),
    ],
)
def test_bad_storage_is_one_line(location: str, said: str) -> None:
    with pytest.raises(StudyError, match=said) as caught:
        open_storage(location)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"schema_version: 1\n", b"\xff\xfe\x00\n", b'["a list"]\n', b'{"op_code": 99}\n', b"text"]
)
def test_a_file_of_another_kind_is_refused_and_kept(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_bytes(content)
    with pytest.raises(StudyError, match="is no journal of Optuna's, or damaged") as caught:
        open_storage(f"journal:{path}")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_a_torn_last_line_is_dropped(journal: str) -> None:
    run_trials(opened(journal), 3, value_of)
    path = Path(journal.removeprefix("journal:"))
    before = path.read_bytes()
    path.write_bytes(before + b'{"op_code":5,"wor')
    run_trials(opened(journal), 5, value_of)
    assert path.read_bytes().startswith(before)
    assert len(finished(opened(journal))) == 5


def test_resume_says_what_differs(journal: str) -> None:
    opened(journal, name="a", resume=True)  # nothing there: begins
    opened(journal, name="a", resume=True)
    with pytest.raises(StudyError, match="begun before: go on with --resume"):
        opened(journal, name="a", resume=False)
    with pytest.raises(StudyError, match="another seed 3, now 4: use the same options"):
        opened(journal, name="b", seed=4, resume=True)
    opened(journal, name="b", seed=4)
    assert set(optuna.get_all_study_names(open_storage(journal))) == {"a", "b"}
    with pytest.raises(StudyError, match="another seed 3, now 5"):
        opened(journal, name="a", seed=5)  # a digest that two studies share, or a name changed by hand


def test_the_study_reads_well(journal: str) -> None:
    """What a dashboard shows: plain names, no pickles; the whole journal is JSON lines."""
    run_trials(opened(journal), 2, value_of)
    study = optuna.load_study(study_name="s", storage=open_storage(journal))
    assert study.user_attrs["refines"] == IDENTITY and study.metric_names == ["KL"]
    assert tuple(study.trials[1].params) == NAMES
    assert set(study.trials[1].constraints) == {"third"}
    for line in Path(journal.removeprefix("journal:")).read_text("utf-8").splitlines():
        assert isinstance(json.loads(line), dict)


def test_optuna_is_imported_where_it_is_used() -> None:
    code = "import sys, xcalib, xcalib.profile, xcalib.search, xcalib.cli.app; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "xcalib" in loaded and not loaded & {"optuna", "sqlalchemy", "scipy", "alembic"}
    assert _study.__name__ in sys.modules
