"""The ship gate: how sure a held-out figure is, when a target counts as missed, and what then happens to the profile."""

import dataclasses
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xcalib
from xcalib.collect import CollectSettings, Curves, collect
from xcalib.data import Sample, SampleSet
from xcalib.errors import DataError, ProfileError, TargetError, TargetMissedError, XcalibWarning
from xcalib.evaluation.bootstrap import RESAMPLES, SEED, ratio_interval
from xcalib.evaluation.results import SampleResult, summarise
from xcalib.profile import (
    Evidence,
    Intervals,
    OperatingPoint,
    Prediction,
    Profile,
    dump_profile,
    make_profile,
    parse_profile,
)
from xcalib.search import judge
from xcalib.search.gate import enforce

Build = Callable[..., Any]
DOC = (Path(__file__).parent.parent / "docs" / "profile-format.md").read_text("utf-8")
EXAMPLE = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)[0]
SETTINGS = CollectSettings(block_size=64, grid=(0.0, 0.4, 0.55, 0.65, 0.75, 1.0), gain_samples=1)


# --- the interval


def direct(sums: list[float], counts: list[float], confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    """Sample by sample, in plain Python; the quantile by its definition (linear between order statistics)."""
    draws = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    ratios = sorted(sum(sums[i] for i in row) / sum(counts[i] for i in row) for row in draws.tolist())

    def quantile(share: float) -> float:
        place = share * (resamples - 1)
        low = int(place)
        return ratios[low] + (place - low) * (ratios[min(low + 1, resamples - 1)] - ratios[low])

    return quantile((1 - confidence) / 2), quantile((1 + confidence) / 2)


@pytest.mark.parametrize("samples", [2, 3, 7, 40])
@pytest.mark.parametrize(("confidence", "resamples", "seed"), [(0.95, RESAMPLES, SEED), (0.8, 501, 3), (0.5, 1, 4)])
def test_interval_equals_a_direct_loop(samples: int, confidence: float, resamples: int, seed: int) -> None:
    rng = np.random.default_rng(samples)
    sums, counts = rng.lognormal(0, 1, samples).tolist(), rng.integers(1, 3000, samples).astype(float).tolist()
    found = ratio_interval(sums, counts, confidence=confidence, resamples=resamples, seed=seed)
    assert found == pytest.approx(direct(sums, counts, confidence, resamples, seed), rel=1e-12)


def test_two_samples_give_the_two() -> None:
    """A quarter of the draws takes the one twice, a quarter the other; tokens weigh."""
    assert ratio_interval([1.0, 9.0], [1, 3]) == (1.0, 3.0)


def test_equal_samples_leave_no_doubt() -> None:
    assert ratio_interval([2.0] * 5, [4] * 5) == (0.5, 0.5)
    assert ratio_interval([1.0, 2.0, 3.0], [10, 20, 30]) == pytest.approx((0.1, 0.1))


def test_many_samples_agree_with_the_normal_approximation() -> None:
    sums = np.random.default_rng(1).normal(5, 2, 400)
    half = 1.96 * sums.std() / 20
    assert ratio_interval(sums, np.ones(400)) == pytest.approx((sums.mean() - half, sums.mean() + half), abs=half / 10)


def test_draws_are_seeded() -> None:
    sums = np.random.default_rng(2).random(9)
    assert ratio_interval(sums, np.ones(9)) == ratio_interval(sums, np.ones(9))
    assert ratio_interval(sums, np.ones(9)) != ratio_interval(sums, np.ones(9), seed=1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**6)), min_size=2, max_size=12))
def test_interval_lies_between_the_samples(samples: list[tuple[float, int]]) -> None:
    found = ratio_interval(*zip(*samples, strict=True), resamples=200)
    assert found is not None
    ratios = [total / count for total, count in samples]
    assert min(ratios) * (1 - 1e-12) <= found[0] <= found[1] <= max(ratios) * (1 + 1e-12)


def test_no_interval() -> None:
    assert ratio_interval([], []) is None
    assert ratio_interval([1.0], [2]) is None
    assert ratio_interval([0.0, 0.0], [0, 0]) is None  # no accuracy to lose
    assert ratio_interval([0.5, 0.0], [1, 0]) == (0.5, 0.5)  # draws of nothing but the second say nothing


@pytest.mark.parametrize(
    ("sums", "counts", "options", "said"),
    [
        ([1.0, 2.0], [1.0], {}, r"two lists of one length, got shapes \(2,\) and \(1,\)"),
        ([[1.0]], [[1.0]], {}, r"got shapes \(1, 1\)"),
        ([1.0, np.nan], [1, 1], {}, "must be finite"),
        ([1.0, 1.0], [1, -1], {}, "not negative"),
        ([1.0, 1.0], [1, 1], {"confidence": 1.0}, "between 0 and 1 and resamples at least 1, got 1.0 and 4000"),
        ([1.0, 1.0], [1, 1], {"resamples": 0}, "got 0.95 and 0"),
    ],
)
def test_what_cannot_be_drawn_from(sums: Any, counts: Any, options: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        ratio_interval(sums, counts, **options)


# --- figures of an evaluation


def evaluated(accuracy: list[list[float]], lengths: list[int]) -> Any:
    """One plan; accuracy ``[sample][dense, plan]``, NaN for samples that ask nothing."""
    rng = np.random.default_rng(0)
    results = [
        SampleResult(
            kl=rng.lognormal(-4, 1, (1, length)).astype(np.float32),
            loss=np.array([2.0, 2.1]) * length,
            targets=np.array(length),
            density=np.full((1, 2, 3), 0.3),
            blocks=np.array([float(length)]),
            accuracy=np.array(row),
            seconds=np.array([1.0, 0.5]),
        )
        for row, length in zip(accuracy, lengths, strict=True)
    ]
    samples = tuple(Sample(np.arange(length), "test", (f"{length:016x}",)) for length in lengths)
    return results, summarise(["a"], results, SampleSet(samples, {}, ("test",), "heldout", 0))


def test_evaluation_resamples_samples_with_their_tokens() -> None:
    nan = float("nan")
    results, found = evaluated([[1.0, 0.5], [nan, nan], [0.5, 0.5], [1.0, 0.0]], [100, 900, 300, 50])
    plan = found.plan("a")
    sums = [float(result.kl.astype(np.float64).sum()) for result in results]
    assert plan.kl == pytest.approx(sum(sums) / 1350)
    assert plan.kl_interval == pytest.approx(ratio_interval(sums, [100, 900, 300, 50]))
    assert plan.kl_interval[0] < plan.kl < plan.kl_interval[1]
    assert plan.accuracy_interval == ratio_interval([0.5, 0.5, 0.0], [1, 1, 1])
    assert plan.drop_interval == ratio_interval([0.5, 0.0, 1.0], [1.0, 0.5, 1.0])  # the same questions on both sides
    assert found.dense.accuracy_interval == ratio_interval([1.0, 0.5, 1.0], [1, 1, 1])
    printed = found.to_dict()
    assert (printed["confidence"], printed["resamples"]) == (0.95, RESAMPLES)
    assert printed["plans"][0]["kl_interval"] == plan.kl_interval


def test_one_sample_has_no_interval() -> None:
    _, found = evaluated([[1.0, 0.5]], [100])
    plan = found.plan("a")
    assert plan.kl > 0 and plan.accuracy == 0.5
    assert (plan.kl_interval, plan.accuracy_interval, plan.drop_interval) == (None, None, None)
    _, found = evaluated([[1.0, 0.5], [float("nan")] * 2], [100, 200])
    assert found.plan("a").kl_interval is not None
    assert found.plan("a").accuracy_interval is None


# --- the rule


def evidence(**figures: Any) -> Evidence:
    ends = {name: figures.pop(name) for name in ("kl_ends", "drop_ends") if name in figures}
    intervals = Intervals(confidence=0.95, resamples=9, kl=ends.get("kl_ends", (0.0, 9.0)), drop=ends.get("drop_ends"))
    settled = {"density": 0.2, "kl": 0.01, "samples": 6, "tokens": 6000, "intervals": intervals if ends else None}
    return Evidence(**{**settled, **figures})


def point_of(target: str, heldout: Evidence | None) -> OperatingPoint:
    return OperatingPoint(
        name="p",
        target=target,
        objective="any",
        method="knapsack",
        thresholds=(((0.5,),),),
        predicted=Prediction(density=0.2, kl=0.01),
        heldout=heldout,
    )


RULE = {
    "kl below": ("kl=0.01", {"kl": 0.009, "kl_ends": (0.007, 0.012)}, "met"),
    "kl at the target": ("kl=0.01", {"kl": 0.01, "kl_ends": (0.007, 0.012)}, "met"),
    "kl above, interval reaches it": ("kl=0.01", {"kl": 0.012, "kl_ends": (0.0099, 0.015)}, "uncertain"),
    "kl above, interval ends at it": ("kl=0.01", {"kl": 0.012, "kl_ends": (0.01, 0.015)}, "uncertain"),
    "kl above, interval above": ("kl=0.01", {"kl": 0.012, "kl_ends": (0.0101, 0.015)}, "missed"),
    "kl half above": ("kl=0.01", {"kl": 0.015, "kl_ends": (0.005, 0.04)}, "uncertain"),
    "kl far above, wide interval": ("kl=0.01", {"kl": 0.0151, "kl_ends": (0.005, 0.04)}, "missed"),
    "kl below, one sample": ("kl=0.01", {"kl": 0.009, "samples": 1}, "met"),
    "kl above, one sample": ("kl=0.01", {"kl": 0.0101, "samples": 1}, "missed"),
    "density below": ("density=0.25", {"density": 0.24}, "met"),
    "density within the tolerance": ("density=0.25", {"density": 0.274}, "met"),
    "density above": ("density=0.25", {"density": 0.276}, "missed"),
    "density 1": ("density=0.95", {"density": 1.0}, "met"),
    "density does not ask for a kl": ("density=0.25", {"density": 0.25, "kl": 9.0, "kl_ends": (8.0, 9.5)}, "met"),
    "speedup reached": ("speedup=4", {"density": 0.25}, "met"),
    "speedup within the tolerance": ("speedup=4", {"density": 0.274}, "met"),
    "speedup missed": ("speedup=4", {"density": 0.276}, "missed"),
    "no drop": ("drop=1%", {"accuracy": 0.9, "accuracy_dense": 0.9, "drop_ends": (-0.1, 0.1)}, "met"),
    "better than dense": ("drop=0", {"accuracy": 0.9, "accuracy_dense": 0.8, "drop_ends": (-0.2, 0.1)}, "met"),
    "drop, interval reaches": (
        "drop=1%",
        {"accuracy": 0.97, "accuracy_dense": 1.0, "drop_ends": (0, 0.1)},
        "uncertain",
    ),
    "drop, interval above": ("drop=1%", {"accuracy": 0.97, "accuracy_dense": 1.0, "drop_ends": (0.02, 0.1)}, "missed"),
    "drop, far above": ("drop=1%", {"accuracy": 0.6, "accuracy_dense": 1.0, "drop_ends": (0, 1.0)}, "missed"),
    "drop, one sample": ("drop=1%", {"accuracy": 0.97, "accuracy_dense": 1.0, "samples": 1}, "missed"),
    "no questions": ("drop=1%", {}, "unmeasured"),
    "dense answers nothing": ("drop=1%", {"accuracy": 0.0, "accuracy_dense": 0.0}, "unmeasured"),
    "no target of ours": ("a table", {}, "unmeasured"),
}


@pytest.mark.parametrize("case", RULE)
def test_the_rule(case: str) -> None:
    target, figures, outcome = RULE[case]
    verdict = judge(point_of(target, evidence(**figures)))
    assert verdict.outcome == outcome
    assert verdict.verified == (outcome in ("met", "uncertain"))
    assert verdict.text.startswith(f"p: {target}")
    assert "\n" not in verdict.text


def test_the_text_has_the_figures() -> None:
    def text(target: str, **figures: Any) -> str:
        return judge(point_of(target, evidence(**figures))).text

    assert text("kl=0.01", kl=0.012, kl_ends=(0.011, 0.015)) == (
        "p: kl=0.01 missed on held-out data: measured 0.012 nats per token, 20.0% above, 95% interval 0.011 to 0.015 (6 samples)"
    )
    assert text("kl=0.01", kl=0.012, samples=1).endswith("20.0% above (no interval: 1 sample)")
    assert text("kl=0.01", kl=0.02, kl_ends=(0.001, 0.1)).endswith("too far above for an interval to excuse")
    assert text("kl=0.01", kl=0.012, kl_ends=(0.001, 0.1)).endswith("more held-out samples would tell")
    assert text("density=0.2", density=0.25) == (
        "p: density=0.2 missed on held-out data: measured density 0.250, 25.0% above where 10% is allowed (6 samples)"
    )
    assert "density 0.250 (a speed-up of 4.00 by blocks), 25.0% above" in text("speedup=5", density=0.25)
    assert "measured 4.0% of the dense model's accuracy, 3.0 points above, 95% interval 2.0% to 10.0%" in text(
        "drop=0.01", accuracy=0.96, accuracy_dense=1.0, drop_ends=(0.02, 0.1)
    )
    assert judge(point_of("kl=0.01", None)).text == "p: kl=0.01: not verified: there are no held-out figures"


# --- the file


def without(text: str, *keys: str) -> str:
    """The example as it was before there were these keys: with the lines that belong to them left out."""
    for key in keys:
        text = re.sub(rf"^( *){key}:.*\n(?:\1 +.*\n)*", "", text, flags=re.MULTILINE)
    return text


OLD_SHA256 = "15446c7464916040a94a4f1a88aef14a9b867a5081d8f309b895b2b57bdfcb1e"


def test_a_file_from_before_is_valid() -> None:
    """Its content_sha256 is that which the example had then."""
    old = re.sub(r"(?<=content_sha256: \")\w+", OLD_SHA256, without(EXAMPLE, "intervals", "verified"))
    profile = parse_profile(old)
    point = profile.point()
    assert point.verified is None
    assert point.heldout is not None and point.heldout.intervals is None
    assert dump_profile(profile) == old
    assert make_profile(**dict(profile)) == profile


def test_the_published_order_is_not_written() -> None:
    """So files from before there were two keep their content_sha256; the other order is written and hashed."""
    profile = parse_profile(EXAMPLE)
    assert profile.method.order == "score"
    assert "order" not in dump_profile(profile)
    stated = {**profile.method.model_dump(), "order": "score"}
    assert make_profile(**{**dict(profile), "method": stated}) == profile
    recent = make_profile(**{**dict(profile), "method": {**stated, "order": "recent"}})
    assert recent.content_sha256 != profile.content_sha256
    assert "\n  order: recent\n" in dump_profile(recent)
    assert parse_profile(dump_profile(recent)) == recent
    assert parse_profile(dump_profile(recent, format="json")) == recent


def test_new_keys_are_kept_and_checked() -> None:
    profile = parse_profile(EXAMPLE)
    point = profile.point()
    assert point.verified is True
    assert point.heldout is not None and point.heldout.intervals is not None
    assert point.heldout.intervals.kl == (0.0112, 0.0171)
    assert judge(point).verified

    def refused(said: str, **changes: Any) -> None:
        with pytest.raises(ProfileError, match=said):
            make_profile(**{**dict(profile), "points": [{**point.model_dump(), **changes}]})

    heldout = point.heldout.model_dump()
    swapped = {**heldout, "intervals": {**heldout["intervals"], "kl": [0.02, 0.01]}}
    refused(r"intervals: kl must be a lower and an upper end, got 0\.02 and 0\.01", heldout=swapped)
    refused("verified must not be true where heldout is null", heldout=None)
    refused("verified: must be a valid boolean, got 'yes'", verified="yes")


# --- enforcing it


def profile_with(*points: tuple[str, Evidence | None]) -> Profile:
    base = parse_profile(EXAMPLE)
    changed = [
        base.points[0].model_copy(update={"name": f"p{number}", "target": target, "heldout": heldout, "verified": None})
        for number, (target, heldout) in enumerate(points)
    ]
    return make_profile(**{**dict(base), "points": changed, "default_point": "p0"})


MET, MISSED = ("kl=0.01", evidence(kl=0.009)), ("density=0.1", evidence(density=0.2))


def test_all_met_is_silent() -> None:
    enforce(profile_with(MET, MET))


def test_one_miss_is_enough() -> None:
    profile = profile_with(MET, MISSED)
    with pytest.raises(TargetMissedError) as caught:
        enforce(profile)
    error = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(error, TargetError)
    assert error.profile == profile
    assert [(verdict.point, verdict.outcome) for verdict in error.verdicts] == [("p0", "met"), ("p1", "missed")]
    assert str(error).startswith("p1: density=0.1 missed on held-out data: measured density 0.200, 100.0% above")
    assert "more samples or a looser target" in str(error) and "force=True" in str(error)
    with pytest.warns(XcalibWarning, match=r"p1: density=0\.1 missed .*; kept, marked unverified"):
        enforce(profile, force=True)


def test_points_that_nobody_asked_for_are_left_out_where_they_missed() -> None:
    profile = profile_with(MET, MISSED)
    with pytest.warns(XcalibWarning, match=r"p1: density=0\.1 missed .*; left out, since nobody asked for this point"):
        kept = enforce(profile, offered={"p1"})
    assert [point.name for point in kept.points] == ["p0"] and kept == make_profile(**dict(kept))
    assert enforce(profile_with(MET, MET), offered={"p1"}).points == profile_with(MET, MET).points
    with pytest.warns(XcalibWarning, match=r"p1: .*; kept, marked unverified"):
        assert enforce(profile, force=True, offered={"p1"}) == profile
    with pytest.raises(TargetMissedError, match=r"^p0: .* missed"):  # what was asked for still stops
        enforce(profile_with(MISSED, MISSED), offered={"p1"})


def test_what_is_not_met_is_warned_of() -> None:
    with pytest.warns(XcalibWarning, match="not refuted on held-out data"):
        enforce(profile_with(("kl=0.01", evidence(kl=0.012, kl_ends=(0.008, 0.02)))))
    with pytest.warns(XcalibWarning, match="no held-out sample asks a question that the dense model answers"):
        enforce(profile_with(("drop=0.01", evidence())))


# --- searches of a real, small model


@pytest.fixture(scope="module")
def model(tiny_model: Build) -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def data(random_samples: Build) -> Any:
    return random_samples([448])


@pytest.fixture(scope="module")
def heldout(random_samples: Build) -> Any:
    return random_samples([300, 330], seed=1, split="heldout")


@pytest.fixture(scope="module")
def hopeful(model: Any, data: Any, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    """Curves that promise a thousandth of the KL that comes out."""
    curves = collect(model, data, tmp_path_factory.mktemp("curves"), settings=SETTINGS)
    return dataclasses.replace(curves, gain=curves.gain / 1000)


def test_a_met_target_is_verified(model: Any, data: Any, heldout: Any) -> None:
    profile = xcalib.search(model, data, target="a:kl=5", heldout=heldout, settings=SETTINGS)
    point = profile.point()
    assert point.verified is True
    assert point.heldout is not None and point.heldout.intervals is not None
    low, high = point.heldout.intervals.kl
    assert 0 < low <= point.heldout.kl <= high
    evaluation = xcalib.evaluate(model, heldout, profile)
    assert evaluation.plan("a").kl_interval == (low, high)


def test_a_missed_target_raises_and_is_kept_by_force(
    model: Any, data: Any, heldout: Any, hopeful: Curves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"target": ["a:kl=1e-5", "b:density=1"], "heldout": heldout, "curves": hopeful}
    with pytest.raises(TargetMissedError, match=r"a: kl=1e-05 missed on held-out data") as caught:
        xcalib.search(model, data, folder=tmp_path, **asked)
    assert [point.verified for point in caught.value.profile.points] == [False, True]
    monkeypatch.setattr(type(model), "forward", None)  # what was measured is still there
    with pytest.warns(XcalibWarning, match="a: kl=1e-05 missed .*kept, marked unverified"):
        profile = xcalib.search(model, data, folder=tmp_path, resume=True, force=True, **asked)
    assert profile == caught.value.profile
    assert not (tmp_path / "heldout").exists()


def test_without_heldout_data_nothing_is_verified(model: Any, data: Any, hopeful: Curves) -> None:
    profile = xcalib.search(model, data, target="a:kl=1e-5", curves=hopeful)
    assert profile.point().verified is False


def test_calibration_documents_prove_nothing(model: Any, data: Any, hopeful: Curves) -> None:
    for curves in (None, hopeful):
        with pytest.raises(DataError, match="1 of the 1 documents were used to calibrate this profile"):
            xcalib.search(model, data, target="a:kl=1", heldout=data, curves=curves, settings=SETTINGS)


def test_serving_an_unverified_point_warns_once(model: Any, data: Any, hopeful: Curves) -> None:
    found = xcalib.search(model, data, target=["a:kl=1e-5", "b:density=0.9"], curves=hopeful)
    with pytest.warns(XcalibWarning, match=r"'a' \(kl=1e-05\) is not verified: it has no held-out figures") as caught:
        handle = xcalib.apply_profile(model, found)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(XcalibWarning, match="'b'"), handle:
        handle.use("b")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handle.use("a")
            handle.use("b")
    for verified in (None, True):
        figures = evidence(kl=0.009)
        points = [point.model_copy(update={"verified": verified, "heldout": figures}) for point in found.points]
        with xcalib.apply_profile(model, make_profile(**{**dict(found), "points": points})):
            pass
    missed = [point.model_copy(update={"heldout": evidence(kl=1.0)}) for point in found.points]
    with pytest.warns(XcalibWarning, match="held-out data do not confirm its target"):
        xcalib.apply_profile(model, make_profile(**{**dict(found), "points": missed})).remove()
    with warnings.catch_warnings(), pytest.raises(XcalibWarning):
        warnings.simplefilter("error")
        xcalib.apply_profile(model, found)
    assert model.config._attn_implementation == "sdpa"  # not left patched
