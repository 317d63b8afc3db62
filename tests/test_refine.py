"""Refinement of a point: what is tried, what is accepted, what is written; the commands on a tiny model."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xcalib.collect import CollectSettings, Curves, collect, load_curves
from xcalib.collect.curves import save_curves
from xcalib.data import SampleSet
from xcalib.errors import CurvesError, DataError, StudyError, TargetError, XcalibError
from xcalib.evaluation import evaluate_plans
from xcalib.profile import Profile, dump_profile, load_profile, make_profile, parse_profile, save_profile
from xcalib.runtime import sparse_plan
from xcalib.search import Refinement, build_profile, parse_targets, refine_point
from xcalib.search._judge import Aim
from xcalib.search._meter import Figures, Meter
from xcalib.search._space import price_space

SETTINGS = CollectSettings(
    stride=8,
    block_size=64,
    grid=(0.0, 0.4, 0.55, 0.65, 0.75, 0.85, 0.95, 1.0),
    gain_samples=1,
    order="score",
    pattern="antidiagonal",
)
REFINEMENT, VALIDATION = 300, 310  # tokens of a sample: how the fake measurements below tell the two sets apart


@dataclasses.dataclass(frozen=True)
class Job:
    """A searched tiny model and what it takes to refine it."""

    model: Any
    curves: Curves
    profile: Profile
    samples: SampleSet
    validation: SampleSet

    def refine(self, **options: Any) -> Refinement:
        given = {"trials": 12, "every": 3, "profile": self.profile, "curves": self.curves} | options
        samples, validation = given.pop("samples", self.samples), given.pop("validation", self.validation)
        return refine_point(self.model, given.pop("profile"), given.pop("curves"), samples, validation, **given)


@pytest.fixture(scope="module")
def job(
    tiny_model: Callable[..., Any], random_samples: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Job:
    model = tiny_model("llama", num_hidden_layers=4)
    folder = tmp_path_factory.mktemp("curves")
    curves = collect(model, random_samples([300, 320]), folder / "c", settings=SETTINGS)
    profile = build_profile(curves, parse_targets(["balanced:density=0.75", "kl:kl=0.03", "speed:speedup=1.2"]))
    samples = random_samples([REFINEMENT] * 5, seed=5)
    return Job(model, curves, profile, samples, random_samples([VALIDATION] * 6, seed=9))


# --- the space


@pytest.mark.parametrize("point", ["balanced", "kl", "speed"])
def test_no_shift_is_the_searched_point(job: Job, point: str) -> None:
    chosen = job.profile.point(point)
    space = price_space(job.profile, chosen, job.curves, groups=24, bin_index=0)
    assert space.names == ("layer 0", "layer 1", "layer 2", "layer 3")
    assert space.thresholds([0.0] * 4).tolist() == [list(row) for row in chosen.thresholds[0]]


@settings(max_examples=25, deadline=None)
@given(shifts=st.lists(st.floats(-2, 2), min_size=2, max_size=2))
def test_every_shift_keeps_the_budget(job: Job, shifts: list[float]) -> None:
    space = price_space(job.profile, job.profile.point("balanced"), job.curves, groups=2, bin_index=0)
    assert space.names == ("layers 0-1", "layers 2-3")
    thresholds = space.thresholds(shifts)
    assert space.tables.at(space.tables.cost, thresholds) <= 0.75 * (1 + 1e-9)
    common = space.thresholds([shift + 0.7 for shift in shifts])
    assert np.array_equal(common, thresholds)  # a common factor changes no choice under a budget


def test_dearer_groups_keep_fewer_blocks(job: Job) -> None:
    space = price_space(job.profile, job.profile.point("balanced"), job.curves, groups=2, bin_index=0)
    low, high = (space.thresholds([0.0, shift]) for shift in (2.0, -2.0))
    assert high[2:].mean() > low[2:].mean() and high[:2].mean() < low[:2].mean()


def test_layers_that_stay_dense_stay_dense(
    job: Job, tiny_model: Callable[..., Any], tmp_path: Path, random_samples: Any
) -> None:
    """Gemma 3's first layer slides over a window."""
    model = tiny_model("gemma3_text")
    samples = random_samples([300, 320])
    curves = collect(model, samples, tmp_path / "c", settings=SETTINGS)
    profile = build_profile(curves, parse_targets(["balanced:density=0.75"]))
    space = price_space(profile, profile.point(), curves, groups=24, bin_index=0)
    assert space.names == ("layer 1", "layer 2") and (space.thresholds([1.0, -1.0])[0] == 1).all()
    found = refine_point(model, profile, curves, job.samples, job.validation, trials=2)
    assert found.trials == {"complete": 2, "pruned": 0, "failed": 0}


# --- the measurement


def test_meter_agrees_with_an_evaluation(job: Job) -> None:
    plan = sparse_plan(job.profile, "balanced")
    mixed = dataclasses.replace(job.samples, samples=(*job.samples.samples[:2], *job.validation.samples[:1]))
    found = Meter(job.model, plan, mixed, bin_index=0, every=3).all(plan.thresholds[0].double().numpy())
    expected = evaluate_plans(job.model, mixed, {"p": plan}, every=3).plan("p")
    assert found.mean_kl == pytest.approx(expected.kl, rel=1e-5)
    assert found.mean_density == pytest.approx(expected.density, rel=1e-9)
    assert found.kl.tolist() == pytest.approx(list(expected.kl_by_sample), rel=1e-5)


def test_trials_measure_each_sample_densely_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, calls = Meter._measure, []

    def counting(self: Meter, index: int, thresholds: np.ndarray) -> Any:
        before = len(self._dense)
        result = sparse(self, index, thresholds)
        calls.append((len(self._dense) - before, thresholds.tobytes(), index, id(self)))
        return result

    monkeypatch.setattr(Meter, "_measure", counting)
    job.refine(trials=6)
    assert len({call[1:] for call in calls}) == len(calls)  # nothing twice
    by_meter = {meter: sum(new for new, _, _, of in calls if of == meter) for *_, meter in calls}
    assert set(by_meter.values()) <= {len(job.samples.samples), len(job.validation.samples)}


# --- what is accepted


def figures(kl: list[float], density: list[float]) -> Figures:
    ones = np.ones(len(kl))
    return Figures(np.array(kl), np.array(density), 10 * ones, 3 * ones)


START = figures([0.05, 0.08, 0.11, 0.06], [0.33, 0.32, 0.34, 0.33])


@pytest.mark.parametrize(
    ("kl", "density", "accepted"),
    [
        ([0.045, 0.07, 0.10, 0.055], START.density, True),
        ([0.045, 0.07, 0.10, 0.065], START.density, False),  # better in the mean, but not for certain
        ([0.055, 0.09, 0.12, 0.065], START.density, False),
        (START.kl, START.density, False),
        ([0.045, 0.07, 0.10, 0.055], START.density * 1.01, False),  # above the tolerance
        (START.kl * 0.985, START.density * 1.004, False),  # 1.6 % is what that many blocks buy
        (START.kl * 0.98, START.density * 1.004, True),
        (START.kl * 0.985, START.density * 0.99, True),
    ],
)
def test_rule(kl: Any, density: Any, accepted: bool) -> None:
    found = Aim("kl").compare(figures(list(kl), list(density)), START, among=1)
    assert found.accepted is accepted
    assert found.interval is not None and found.interval[0] <= found.ratio * (1 + 1e-12)


@pytest.mark.parametrize(
    ("kl", "density", "accepted"),
    [
        (1.0, 0.99, True),
        (1.019, 0.99, True),
        (1.019, 0.996, False),  # 0.5 % of the blocks is what that KL buys
        (1.03, 0.9, False),
        (0.9, 1.0, False),
    ],
)
def test_rule_for_a_bounded_kl(kl: float, density: float, accepted: bool) -> None:
    found = figures((START.kl * kl).tolist(), (START.density * density).tolist())
    assert Aim("density").compare(found, START, among=1).accepted is accepted


def test_more_finalists_need_more_certainty() -> None:
    found = figures([0.045, 0.07, 0.10, 0.055], START.density.tolist())
    one, three = (Aim("kl").compare(found, START, among=among) for among in (1, 3))
    assert one.interval is not None and three.interval is not None
    assert three.confidence == pytest.approx(1 - 0.05 / 3) and three.interval[1] >= one.interval[1]


def test_a_dense_start_has_nothing_to_gain() -> None:
    dense = figures([0.0] * 4, [1.0] * 4)
    found = Aim("kl").compare(dense, dense, among=1)
    assert found.ratio == 1 and not found.accepted and found.interval is None


def faked(
    monkeypatch: pytest.MonkeyPatch, start: Any, refinement: float, validation: float, blocks: float = 0.0
) -> None:
    """Measurements that only know how much more the first layers keep than the last (against the start).

    KL falls with it by ``refinement`` on the trials' samples, by ``validation`` on the others; the density grows by ``blocks``.
    """
    begin = np.asarray(start)

    def measure(self: Meter, index: int, thresholds: np.ndarray) -> tuple[float, float]:
        tilt = float((thresholds[:2] - begin[:2]).mean() - (thresholds[2:] - begin[2:]).mean())
        slope = refinement if len(self._tokens[index]) == REFINEMENT else validation
        return (0.03 + 0.01 * index) * float(np.exp(-slope * tilt)), 0.5 * (1 + blocks * max(tilt, 0.0))

    monkeypatch.setattr(Meter, "_measure", measure)


def test_a_gain_is_kept_and_recorded(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    old = job.profile.point("balanced")
    faked(monkeypatch, old.thresholds[0], refinement=2.0, validation=1.0)
    found = job.refine(trials=20)
    assert found.improved and found.validation is not None and found.refinement is not None
    assert found.refinement.ratio < found.validation.ratio < 1
    new = found.profile.point("balanced")
    assert new.thresholds != old.thresholds and new.verified is False and new.heldout is None and new.bound is None
    assert new.refined is not None
    (record,) = new.refined
    assert record is not None and record.ratio == found.validation.ratio
    assert (record.trials, record.dimensions, record.validation_samples) == (20, 4, 6)
    assert new.predicted is not None and old.predicted is not None
    assert new.predicted.kl == pytest.approx(old.predicted.kl * found.validation.ratio)
    assert found.profile.points[1:] == job.profile.points[1:]
    documents = set(found.profile.calibration.documents)
    assert documents == {*job.profile.calibration.documents, *job.samples.documents, *job.validation.documents}
    assert parse_profile(dump_profile(found.profile)) == found.profile
    assert "balanced: refined: " in found.text and json.dumps(found.to_dict())
    with pytest.raises(CurvesError, match=r"does not give the thresholds of point 'balanced'.*refined before"):
        job.refine(profile=found.profile)


def test_overfitted_trials_are_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """What helps the trials' samples is of harm on those that they did not see."""
    faked(monkeypatch, job.profile.point("balanced").thresholds[0], refinement=2.0, validation=-0.5)
    found = job.refine(trials=20)
    assert not found.improved and found.profile is job.profile
    assert found.refinement is not None and found.refinement.ratio < 0.95
    assert found.validation is not None and found.validation.ratio > 1
    assert re.match(
        r"balanced: no gain: the best of 20 trials had 1\.\d+ times the start's KL on 6 validation", found.text
    )


def test_blocks_buy_no_gain(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial that has less KL keeps more blocks than the start: none is feasible."""
    faked(monkeypatch, job.profile.point("balanced").thresholds[0], refinement=2.0, validation=2.0, blocks=10.0)
    found = job.refine(trials=12)
    assert not found.improved and found.trial is None and found.profile is job.profile
    assert "none of 12 trials was better than the start" in found.text


def test_a_bounded_kl_saves_blocks(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = np.asarray(job.profile.point("kl").thresholds[0])

    def measure(self: Meter, index: int, thresholds: np.ndarray) -> tuple[float, float]:
        tilt = float((thresholds[:2] - begin[:2]).mean())
        return 0.03 + 0.01 * index + max(0.0, tilt) * 0.05, 0.5 * float(np.exp(tilt))

    monkeypatch.setattr(Meter, "_measure", measure)
    found = job.refine(point="kl", trials=20)
    assert found.improved and found.least == "density" and found.validation is not None
    assert found.validation.density[1] < found.validation.density[0]
    assert found.validation.kl[1] <= found.validation.kl[0] * 1.02


def test_trials_are_pruned_sample_by_sample(
    job: Job, monkeypatch: pytest.MonkeyPatch, random_samples: Any, tmp_path: Path
) -> None:
    """Every shift that changes a threshold is of harm, on every sample."""
    begin = np.asarray(job.profile.point("balanced").thresholds[0])
    measured: list[bytes] = []

    def measure(self: Meter, index: int, thresholds: np.ndarray) -> tuple[float, float]:
        measured.append(thresholds.tobytes())
        return 0.03 + 0.01 * index + float(np.abs(thresholds - begin).mean()), 0.5

    monkeypatch.setattr(Meter, "_measure", measure)
    samples = random_samples([REFINEMENT] * 12, seed=5)
    found = job.refine(trials=10, price_range=2.0, samples=samples, storage=f"journal:{tmp_path / 'j'}")
    space = price_space(job.profile, job.profile.point("balanced"), job.curves, groups=24, bin_index=0)
    trials = load_trials(tmp_path / "j")
    harmful = [not np.array_equal(space.thresholds(list(params.values())), begin) for _, params, _ in trials]
    assert [state == "PRUNED" for state, _, _ in trials] == harmful
    assert sum(harmful) >= 5 and found.trials == {"complete": 10 - sum(harmful), "pruned": sum(harmful), "failed": 0}
    counts = {thresholds: measured.count(thresholds) for thresholds in measured}
    assert counts.pop(begin.tobytes()) == 12
    assert min(counts.values()) == 4  # the fewest that can tell with p < 0.1
    assert max(counts.values()) < 12


# --- resuming, sharing


def test_same_seed_same_result_and_nothing_is_measured_twice(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job.refine(trials=8)
    where = f"journal:{tmp_path / 'j'}"
    job.refine(trials=3, storage=where)
    assert job.refine(trials=8, storage=where, resume=True).to_dict() == whole.to_dict()

    def measure(self: Meter, index: int, thresholds: np.ndarray) -> tuple[float, float]:
        raise AssertionError("measured again")

    monkeypatch.setattr(Meter, "_measure", measure)
    assert job.refine(trials=8, storage=where).to_dict() == whole.to_dict()
    with pytest.raises(StudyError, match="begun before: go on with --resume"):
        job.refine(storage=where, resume=False)
    with pytest.raises(StudyError, match="another seed 0, now 1: use the same options"):
        job.refine(storage=where, resume=True, seed=1)


# --- what is wrong


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"trials": 0}, TargetError, "trials is 0, expected at least 1"),
        ({"groups": 25}, TargetError, "groups is 25, expected 1 to 24"),
        ({"price_range": 0.0}, TargetError, "price_range is 0.0"),
        ({"bin_index": 1}, TargetError, "bin_index is 1, the profile has 1 length bins"),
        ({"every": 2}, DataError, "every is 2, expected an odd number of at most 300"),
        ({"point": "quick"}, XcalibError, "no operating point 'quick'"),
        ({"storage": "nosuch://x"}, StudyError, "cannot be opened"),
    ],
)
def test_bad_options(job: Job, options: dict[str, Any], error: type[XcalibError], said: str) -> None:
    with pytest.raises(error, match=said):
        job.refine(**options)


def test_samples_must_fit(job: Job, random_samples: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="5 documents are in the samples of the trials and in the validation"):
        job.refine(validation=job.samples)
    with pytest.raises(DataError, match="validation has one sample"):
        job.refine(validation=random_samples([300], seed=9))
    with pytest.raises(DataError, match="sample 1 has 200 tokens, but the thresholds to refine serve 240 to 320"):
        job.refine(samples=random_samples([300, 200], seed=5))


def test_other_points_and_curves_are_refused(job: Job) -> None:
    other = job.profile.points[0].model_copy(update={"method": "paper"})
    with pytest.raises(TargetError, match="by method 'paper': only points of the knapsack"):
        job.refine(profile=make_profile(**{**dict(job.profile), "points": (other,)}))
    with pytest.raises(CurvesError, match="does not give the thresholds"):
        job.refine(curves=dataclasses.replace(job.curves, error=job.curves.error[:, ::-1]))
    model = job.curves.model | {"config_sha256": "0" * 64, "name": "other"}
    with pytest.raises(CurvesError, match="the curves are of 'other'"):
        job.refine(curves=dataclasses.replace(job.curves, model=model))


# --- the commands

DATA = ["--data", "builtin", "--max-length", "320", "--device", "cpu"]
SEARCH = [
    "--order",
    "score",
    *DATA,
    "--num-samples",
    "2",
    "--gain-samples",
    "1",
    "--block-size",
    "64",
    "--heldout-samples",
    "2",
]
REFINE = [*DATA, "--samples", "2", "--validation-samples", "2", "--heldout-samples", "2", "--trials", "3"]


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder but for ``tiny``, the model."""
    (tmp_path / "tiny").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_search_then_refine(
    here: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run("search", "tiny", *SEARCH, "--target", "balanced:density=0.8", "--refine", 2, "--out", "p.yaml")
    assert code == 0, err
    assert "trials: 2 complete, 0 pruned, 0 failed; study 'xcalib balanced " in err
    profile = load_profile("p.yaml")
    assert profile.point().heldout is not None and profile.point().verified
    unrefined = build_profile_of(here, profile)
    save_profile(unrefined, "start.yaml")
    code, out, err = run("refine", "start.yaml", *REFINE, "--out", "r.yaml", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
    assert found["text"] in " ".join(err.split()) and load_profile("r.yaml").point().name == "balanced"
    code, _, err = run("refine", "start.yaml", *REFINE, "--out", "r2.yaml")
    assert (code, "begun before: go on with --resume" in err, Path("r2.yaml").exists()) == (2, True, False)
    code, out, _ = run("refine", "start.yaml", *REFINE, "--out", "r2.yaml", "--resume", "--json")
    again = json.loads(out)
    assert code == 0 and {**again, "profile": 0} == {**found, "profile": 0}
    assert Path("r2.yaml").read_bytes() == Path("r.yaml").read_bytes()
    code, _, err = run("refine", "start.yaml", *REFINE, "--seed", 7, "--out", "r3.yaml", "--resume")
    assert code == 2 and "with another samples" in err and "\n" not in err.strip().splitlines()[-1]


KILLED = """
import os, signal, sys
from xcalib.cli import main
from xcalib.search._meter import Meter

measure, calls = Meter._measure, []

def dying(self, index, thresholds):
    calls.append(index)
    if len(calls) == 6:  # in the third trial: two samples each
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(self, index, thresholds)

Meter._measure = dying
main()
"""


def test_a_search_killed_while_it_refines_resumes(here: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    command = ["search", "tiny", *SEARCH, "--target", "balanced:density=0.8", "--refine", "5"]
    code, _, err = run(*command, "--work", "whole", "--out", "whole.yaml")
    assert code == 0, err
    again = [*command, "--work", "killed", "--out", "p.yaml"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *again], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL and not Path("p.yaml").exists()
    assert "Refining balanced" in killed.stderr
    code, _, err = run(*again, "--resume")
    assert code == 0, err
    assert re.search(r"trials: (\d) complete, (\d) pruned, 1 failed", err)
    first, second = (load_trials(Path(folder) / "refine.journal") for folder in ("whole", "killed"))
    assert len(first) == 5 and second == first
    assert Path("p.yaml").read_bytes() == Path("whole.yaml").read_bytes()


def load_trials(journal: Path) -> list[Any]:
    import optuna

    from xcalib.search._storage import open_storage

    storage = open_storage(str(journal))
    (name,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).trials
    return [(trial.state.name, trial.params, trial.value) for trial in trials if trial.state.name != "FAIL"]


def build_profile_of(here: Path, profile: Profile) -> Profile:
    """The point as the search found it, whatever refining gave."""
    return build_profile(
        load_curves(here / "xcalib-out" / "tiny" / "curves"), parse_targets([f"balanced:{profile.point().target}"])
    )


def test_a_gain_reaches_the_file(
    here: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run("search", "tiny", *SEARCH, "--target", "balanced:density=0.8", "--out", "p.yaml")
    assert code == 0, err
    begin = np.asarray(load_profile("p.yaml").point().thresholds[0])

    def measure(self: Meter, index: int, thresholds: np.ndarray) -> tuple[float, float]:
        return (0.05 + index) * float(np.exp(-np.abs(thresholds - begin).mean())), 0.5

    monkeypatch.setattr(Meter, "_measure", measure)
    where = f"sqlite:///{here / 'study.db'}"
    code, out, err = run("refine", "p.yaml", *REFINE, "--storage", where, "--out", "r.yaml", "--json")
    assert code == 0, err
    found, point = json.loads(out), load_profile("r.yaml").point()
    assert found["improved"] and point.refined is not None and point.heldout is not None and point.verified
    assert {plan["name"] for plan in found["heldout"]["plans"]} == {"balanced", "balanced before"}
    assert "held out (2)" in err
    code, out, _ = run("show", "r.yaml")
    assert code == 0 and ", refined by 3 trials; verified" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["refine", "missing.yaml"], "missing.yaml"),
        (["refine", "p.yaml", "--groups", 25], "--groups': Input should be less than or equal to 24"),
        (["refine", "p.yaml", "--out", "r.txt"], "r.txt: a profile ends in .yaml, .yml or .json"),
        (["refine", "p.yaml", "--point", "quick"], "no operating point 'quick'"),
        (["refine", "p.yaml", "--curves", "nowhere"], "nowhere: holds no curves.json"),
        (["search", "--curves", "c", "--refine", 2, "--out", "s.yaml"], "--refine: needs MODEL"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[Any], said: str, job: Job, here: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    save_profile(job.profile, "p.yaml")
    Path("c").mkdir()
    save_curves(job.curves, Path("c"))
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and said in err and err.startswith("error: ") and err.count("\n") == 1
