"""Several lengths: one set of curves and one length bin each, from the samples to the runtime and its counts."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import xcalib
from xcalib.collect import CollectSettings, Curves, collect, collect_lengths, load_curve_sets, load_curves
from xcalib.data import Sample, SampleSet, boundary, check_lengths, length_sets, load_samples, parse_lengths, pooled
from xcalib.errors import CurvesError, DataError, ProfileError, TargetError, TargetMissedError
from xcalib.evaluation import evaluate_plans, plans_to_evaluate
from xcalib.evaluation.by_length import length_cuts
from xcalib.profile import (
    Evidence,
    Intervals,
    LengthEvidence,
    LengthPrediction,
    OperatingPoint,
    Prediction,
    Profile,
    load_profile,
    make_profile,
)
from xcalib.search import CalibrationData, build_profile, judge, parse_targets
from xcalib.search.lengths import length_bins

Build = Callable[..., Any]
SETTINGS = CollectSettings(
    block_size=64, grid=(0.0, 0.4, 0.55, 0.65, 0.75, 1.0), gain_samples=1, pattern="antidiagonal"
)
BINS = [(192, 363), (363, 513)]  # of 256 and 512 tokens: three quarters of 256, and sqrt(256 x 512) = 362.04


@pytest.fixture(scope="module")
def model(tiny_model: Build) -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def sets(random_samples: Build) -> tuple[SampleSet, ...]:
    return random_samples([256, 256], seed=0), random_samples([512], seed=1)


@pytest.fixture(scope="module")
def heldout(random_samples: Build) -> SampleSet:
    return pooled(
        [random_samples([256, 250], seed=2, split="heldout"), random_samples([512, 500], seed=3, split="heldout")]
    )


@pytest.fixture(scope="module")
def folder(model: Any, sets: tuple[SampleSet, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished curves of 256 and 512 tokens."""
    root = tmp_path_factory.mktemp("lengths") / "curves"
    collect_lengths(model, sets, root, settings=SETTINGS)
    return root


@pytest.fixture(scope="module")
def curves(folder: Path) -> tuple[Curves, ...]:
    return load_curve_sets(folder)


def same(one: Curves, other: Curves) -> bool:
    fields = [field.name for field in dataclasses.fields(Curves)]
    return all(np.array_equal(getattr(one, f), getattr(other, f), equal_nan=f == "joint_kl") for f in fields)


# --- which lengths


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("1k,2k,4k", (1024, 2048, 4096)),
        ("4096, 1K ,2048", (1024, 2048, 4096)),
        ("64", (64,)),
        ("100000k", (102_400_000,)),
    ],
)
def test_lengths_are_read(text: str, lengths: tuple[int, ...]) -> None:
    assert parse_lengths(text) == lengths


HOSTILE = [
    "",
    ",",
    "1k,",
    "k",
    "-1k",
    "+1k",
    "1.5k",
    "1e3",
    "1m",
    "1kk",
    "1 k",
    "٢k",
    "²",
    "0x400",
    "1k;2k",
    "9" * 5000,
]
WRONG = {
    **dict.fromkeys(HOSTILE, "expected token counts with commas between, as 1k,2k,4096"),
    "0,1k": "at least 64, got 0",
    "63": "at least 64, got 63",
    "1k,2k,1024": "1,024 tokens are given twice",
    ",".join(str(100 + number) for number in range(65)): "expected 1 to 64 of them, got 65",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:12])
def test_hostile_lengths(text: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_lengths(text)
    assert WRONG[text] in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("lengths", [(), (True, 128), (128.0,), ("128",)], ids=str)
def test_lengths_in_python_are_checked(lengths: Any) -> None:
    with pytest.raises(DataError, match="lengths: expected"):
        check_lengths(lengths)


@given(st.integers(1, 10**7), st.integers(1, 10**7))
def test_boundary_is_above_the_geometric_mean(a: int, b: int) -> None:
    lower, upper = min(a, b), max(a, b) + 1
    found = boundary(lower, upper)
    assert lower < found <= upper
    assert (found - 1) ** 2 <= lower * upper < found**2


def test_samples_are_drawn_for_each_length(tiny_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    def read(length: int) -> SampleSet:
        return load_samples(["builtin:prose"], tokenizer, num_samples=2, max_length=length)

    small, large = length_sets([600, 200], read)
    assert [len(sample.tokens) for one in (small, large) for sample in one.samples] == [200, 200, 600, 600]
    with pytest.raises(DataError, match="there are no samples"):
        pooled([])
    together = pooled([small, large])
    assert together.samples == (*small.samples, *large.samples)
    assert together.documents == small.documents | large.documents
    assert (small.length, together.length) == (200, 600)


def test_a_sample_must_be_in_the_bin_of_its_length(random_samples: Build) -> None:
    short = {256: random_samples([256]), 512: random_samples([512, 362], seed=1)}
    with pytest.raises(DataError, match=r"random: a sample of 362 tokens among those of 512.* below 363 belong to 256"):
        length_sets([512, 256], short.__getitem__)
    assert len(length_sets([256, 512], {256: short[256], 512: random_samples([363, 512])}.__getitem__)) == 2


# --- curves


def test_each_length_is_a_collection_of_its_own(
    model: Any, sets: tuple[SampleSet, ...], folder: Path, curves: tuple[Curves, ...], tmp_path: Path
) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["256", "512", "lengths.json"]
    assert [one.calibration["lengths"] for one in curves] == [[256], [512]]
    assert same(curves[1], collect(model, sets[1], tmp_path / "alone", settings=SETTINGS))
    assert same(curves[1], load_curves(folder / "512"))
    (alone,) = load_curve_sets(tmp_path / "alone")
    assert same(alone, curves[1])
    (one,) = collect_lengths(model, sets[1:], tmp_path / "one", settings=SETTINGS)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )
    assert same(one, alone)


def test_resume_after_a_kill_between_two_lengths(
    model: Any, sets: tuple[SampleSet, ...], curves: tuple[Curves, ...], tmp_path: Path
) -> None:
    begun: list[str] = []

    @contextmanager
    def killing(description: str, total: int) -> Iterator[Callable[[int], None]]:
        begun.append(description)
        if description.startswith("512 tokens: "):
            raise KeyboardInterrupt
        yield lambda _steps: None

    with pytest.raises(KeyboardInterrupt):
        collect_lengths(model, sets, tmp_path, settings=SETTINGS, progress=killing)
    assert begun[0] == "256 tokens: Measuring 2 samples"
    with pytest.raises(CurvesError, match="several lengths is unfinished: go on with --resume"):
        load_curve_sets(tmp_path)
    with pytest.raises(CurvesError, match="already holds a collection; go on with --resume"):
        collect_lengths(model, sets, tmp_path, settings=SETTINGS)

    @contextmanager
    def watching(description: str, total: int) -> Iterator[Callable[[int], None]]:
        assert description.startswith("512 tokens: ")  # 256 is done
        yield lambda _steps: None

    resumed = collect_lengths(model, sets, tmp_path, settings=SETTINGS, resume=True, progress=watching)
    assert all(same(one, other) for one, other in zip(resumed, curves, strict=True))
    assert all(same(one, other) for one, other in zip(load_curve_sets(tmp_path), curves, strict=True))


def test_folders_that_are_refused(model: Any, sets: tuple[SampleSet, ...], folder: Path, tmp_path: Path) -> None:
    def refused(said: str, where: Path, chosen: Any = sets, *, resume: bool = True) -> None:
        before = sorted(where.rglob("*")) if where.is_dir() else None
        with pytest.raises(CurvesError, match=said):
            collect_lengths(model, chosen, where, settings=SETTINGS, resume=resume)
        assert before is None or sorted(where.rglob("*")) == before

    refused("already holds a collection", folder, resume=False)
    refused("holds the collection of one length", folder / "256")
    refused(r"was started with other lengths \(512\)", folder, [sets[0], _cut(sets[1], 400)])
    (tmp_path / "file").write_text("")
    refused("is not a folder", tmp_path / "file")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    refused("is not empty and holds no collection", tmp_path / "used")
    with pytest.raises(DataError, match="ascending order"):
        collect_lengths(model, sets[::-1], tmp_path / "new", settings=SETTINGS)
    with pytest.raises(CurvesError, match="holds no curves"):
        load_curve_sets(tmp_path / "gone")


def _cut(samples: SampleSet, length: int) -> SampleSet:
    cut = tuple(Sample(sample.tokens[:length], sample.source, sample.documents) for sample in samples.samples)
    return dataclasses.replace(samples, samples=cut)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1}', "damaged"),
        ('{"format": 1, "lengths": ["../x"]}', "damaged"),
        ('{"format": 1, "lengths": [256, 256]}', "damaged"),
        ('{"format": 2, "lengths": [256]}', "index format 2, this version reads 1"),
        ('{"format": 1, "lengths": [256, 1024]}', "1024: holds no curves.json"),
        ('{"format": 1, "lengths": [256, 768]}', "768: holds curves of 512 tokens"),
    ],
)
def test_damaged_index(folder: Path, tmp_path: Path, index: str, said: str) -> None:
    shutil.copytree(folder / "256", tmp_path / "256")
    shutil.copytree(folder / "512", tmp_path / "768")
    (tmp_path / "lengths.json").write_text(index)
    with pytest.raises(CurvesError, match=said):
        load_curve_sets(tmp_path)


def test_curves_that_do_not_belong_together(curves: tuple[Curves, ...]) -> None:
    targets = parse_targets(["a:density=0.8"])
    with pytest.raises(CurvesError, match="ascending order"):
        build_profile(curves[::-1], targets)
    other = dataclasses.replace(curves[1], settings=dataclasses.replace(SETTINGS, stride=8))
    with pytest.raises(CurvesError, match="of another model or with other settings than those of 256"):
        build_profile([curves[0], other], targets)
    with pytest.raises(CurvesError, match="there are no curves"):
        build_profile([], targets)


# --- bins and predictions


def test_bins(curves: tuple[Curves, ...]) -> None:
    assert [(part.min_length, part.max_length) for part in length_bins(curves)] == BINS
    (alone,) = length_bins(curves[1:])
    assert (alone.min_length, alone.max_length) == (256, 513)  # four blocks


@pytest.mark.parametrize("target", ["a:density=0.8", "a:kl=0.03", "a:speedup=1.3"])
@pytest.mark.parametrize("method", ["knapsack", "paper"])
def test_each_bin_is_a_search_of_its_own(curves: tuple[Curves, ...], target: str, method: Any) -> None:
    targets = parse_targets([target])
    point = build_profile(curves, targets, method=method).point()
    alone = [build_profile(one, targets, method=method).point() for one in curves]
    assert point.thresholds == (alone[0].thresholds[0], alone[1].thresholds[0])
    assert point.thresholds[0] != point.thresholds[1]
    assert point.predicted is not None and point.predicted.by_length is not None
    parts = point.predicted.by_length
    assert [(part.density, part.kl) for part in parts] == [
        (one.predicted.density, one.predicted.kl) for one in alone if one.predicted
    ]
    blocks, tokens = [2 * 10, 36], [2 * 256, 512]  # 4 and 8 blocks a row
    assert point.predicted.density == pytest.approx(np.average([part.density for part in parts], weights=blocks))
    assert point.predicted.kl == pytest.approx(np.average([part.kl for part in parts], weights=tokens))
    if method == "knapsack":
        assert point.bound == max((one.bound for one in alone if one.bound), key=lambda bound: bound.gap or 0)
    else:
        assert point.bound is None


def test_calibration_record(curves: tuple[Curves, ...], sets: tuple[SampleSet, ...]) -> None:
    record = build_profile(curves, parse_targets(["a:density=0.8"])).calibration
    assert (record.samples, record.min_length, record.max_length, record.gain_samples) == (3, 256, 512, 2)
    assert record.lengths == (256, 512)
    assert set(record.documents) == sets[0].documents | sets[1].documents
    one = build_profile(curves[0], parse_targets(["a:density=0.8"])).calibration
    assert (one.lengths, one.tokens_sha256) == ((256,), sets[0].tokens_sha256)


def test_out_of_reach_at_one_length(model: Any, sets: tuple[SampleSet, ...], curves: tuple[Curves, ...]) -> None:
    # 7 of the 10 blocks of 256 tokens are always kept, 15 of the 36 of 512
    with pytest.raises(
        TargetError, match=r"point a, at 256 tokens: target density=0\.5 is out of reach.* 0\.700 of all"
    ):
        build_profile(curves, parse_targets(["a:density=0.5"]))

    def never(description: str, total: int) -> Any:
        raise AssertionError("measured all the same")

    for target in ("a:density=0.69", "a:speedup=1.5"):
        with pytest.raises(TargetError, match=r"at 256 tokens.* 0\.700 of all.*or a kl target"):
            xcalib.search(model, sets, target=target, settings=SETTINGS, progress=never)
    with pytest.raises(TargetError, match=r"at 512 tokens.* 0\.417 of all; .* smaller blocks$"):
        xcalib.search(model, sets[1], target="a:density=0.41", settings=SETTINGS, progress=never)


# --- held-out evidence


@pytest.fixture(scope="module")
def profile(model: Any, sets: tuple[SampleSet, ...], heldout: SampleSet, curves: tuple[Curves, ...]) -> Profile:
    found: Profile = xcalib.search(
        model, sets, target=["a:kl=5", "b:density=0.8"], heldout=heldout, curves=curves, settings=SETTINGS
    )
    return found


def test_evidence_of_each_bin(model: Any, profile: Profile, heldout: SampleSet, tmp_path: Path) -> None:
    for point in profile.points:
        assert point.heldout is not None and point.heldout.by_length is not None
        assert point.heldout.samples == 4
        for ends, part in zip(BINS, point.heldout.by_length, strict=True):
            inside = [sample for sample in heldout.samples if ends[0] <= len(sample.tokens) < ends[1]]
            alone = xcalib.evaluate(model, dataclasses.replace(heldout, samples=tuple(inside)), profile).plan(
                point.name
            )
            assert (part.min_length, part.max_length) == ends
            assert (part.samples, part.tokens) == (2, sum(len(sample.tokens) for sample in inside))
            assert (part.density, part.kl) == pytest.approx((alone.density, alone.kl), rel=1e-6)
            assert part.intervals is not None and part.intervals.kl == pytest.approx(alone.kl_interval, rel=1e-6)
    xcalib.save_profile(profile, tmp_path / "p.yaml")
    assert load_profile(tmp_path / "p.yaml") == profile


def test_documents_of_any_length_prove_nothing(
    model: Any, sets: tuple[SampleSet, ...], curves: tuple[Curves, ...], profile: Profile
) -> None:
    for measured in (None, curves):
        with pytest.raises(DataError, match="1 of the 1 documents were used to calibrate"):
            xcalib.search(model, sets, target="a:kl=5", heldout=sets[1], curves=measured, settings=SETTINGS)
    with pytest.raises(DataError, match="1 of the 3 documents were used to calibrate"):
        xcalib.evaluate(model, [_renamed(sets[0]), sets[1]], profile)


def _renamed(samples: SampleSet) -> SampleSet:
    renamed = [Sample(s.tokens, s.source, (f"{index:016x}f",)) for index, s in enumerate(samples.samples)]
    return dataclasses.replace(samples, samples=tuple(renamed))


def test_specs_give_samples_of_each_length(model: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from xcalib.search import profiles

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    amount = CalibrationData(num_samples=2, heldout_samples=1, lengths=(512, 256))
    (small, large), held = profiles._samples(["builtin:prose"], None, tokenizer, amount)
    assert [one.length for one in (small, large)] == [256, 512]
    assert held is not None and [len(sample.tokens) for sample in held.samples] == [256, 512]
    assert not held.documents & (small.documents | large.documents)
    with pytest.raises(TargetError, match="both samples and specs"):
        profiles._samples(["builtin", small], None, tokenizer, amount)
    assert profiles._samples([small, large], [small, large], None, amount) == ((small, large), pooled([small, large]))
    with pytest.raises(TargetError, match="min_length goes with max_length"):
        profiles._samples(["builtin"], None, tokenizer, dataclasses.replace(amount, min_length=64))


def test_specs_follow_curves_of_several_lengths(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    amount = CalibrationData(num_samples=1, heldout_samples=1)
    asked: dict[str, Any] = {"target": "a:kl=5", "tokenizer": tokenizer, "settings": SETTINGS, "folder": tmp_path}
    lengths = dataclasses.replace(amount, lengths=(512, 256))
    first = xcalib.search(model, "builtin:prose", amount=lengths, **asked)
    again = xcalib.search(model, "builtin:prose", amount=amount, curves=load_curve_sets(tmp_path / "curves"), **asked)
    assert again == first
    assert first.calibration.lengths == (256, 512)
    assert first.points[0].heldout is not None and first.points[0].heldout.tokens == 768


# --- the gate


def part_of(length_bin: tuple[int, int], samples: int = 4, **figures: Any) -> LengthEvidence:
    kl = figures.pop("ends", (0.0, 9.0))
    intervals = Intervals(confidence=0.95, resamples=9, kl=kl) if samples > 1 else None
    settled = {"density": 0.2, "kl": 0.01, "tokens": 100, "samples": samples, "intervals": intervals}
    return LengthEvidence(min_length=length_bin[0], max_length=length_bin[1], **{**settled, **figures})


def point_with(target: str, *parts: LengthEvidence) -> OperatingPoint:
    expected = [LengthPrediction(min_length=low, max_length=high, density=0.2, kl=0.01) for low, high in BINS]
    return OperatingPoint(
        name="p",
        target=target,
        objective="any",
        method="knapsack",
        thresholds=(((0.5,),),) * 2,
        predicted=Prediction(density=0.2, kl=0.01, by_length=tuple(expected)),
        heldout=Evidence(density=0.2, kl=0.01, samples=8, tokens=200, by_length=parts),
    )


GOOD = part_of(BINS[0])
RULE = {
    "both met": ("kl=0.01", [GOOD, part_of(BINS[1])], "met", "p: kl=0.01 met on held-out data: measured 0.01"),
    "one missed": (
        "kl=0.01",
        [GOOD, part_of(BINS[1], kl=0.02, ends=(0.015, 0.03))],
        "missed",
        "missed on held-out data at 363 to 512 keys: measured 0.02 nats per token, 100.0% above",
    ),
    "far above": ("kl=0.01", [GOOD, part_of(BINS[1], kl=0.02)], "missed", "too far above for an interval to excuse"),
    "interval reaches": ("kl=0.01", [GOOD, part_of(BINS[1], kl=0.012)], "uncertain", "at 363 to 512 keys"),
    "one sample there": ("kl=0.01", [GOOD, part_of(BINS[1], 1, kl=0.9)], "uncertain", "1 sample), too few to tell"),
    "no sample there": (
        "kl=0.01",
        [GOOD],
        "uncertain",
        "not refuted on held-out data at 363 to 512 keys: no sample is",
    ),
    "density missed by one sample": (
        "density=0.2",
        [GOOD, part_of(BINS[1], 1, density=0.3)],
        "missed",
        "at 363 to 512",
    ),
    "density within the tolerance": ("density=0.2", [GOOD, part_of(BINS[1], density=0.219)], "met", "density=0.2 met"),
}


@pytest.mark.parametrize("case", RULE)
def test_the_gate_judges_every_bin(case: str) -> None:
    target, parts, outcome, said = RULE[case]
    verdict = judge(point_with(target, *parts))
    assert (verdict.outcome, verdict.verified) == (outcome, outcome != "missed")
    assert said in verdict.text
    assert "\n" not in verdict.text


def test_two_bins_that_miss_are_both_named() -> None:
    parts = [part_of(ends, density=0.3) for ends in BINS]
    text = judge(point_with("density=0.2", *parts)).text
    assert "at 192 to 362 keys" in text and "at 363 to 512 keys" in text


def test_a_bin_without_questions_is_not_refuted() -> None:
    asked = {"accuracy": 0.9, "accuracy_dense": 0.9}
    point = point_with("drop=0.05", part_of(BINS[0], **asked), part_of(BINS[1]))
    point = point.model_copy(update={"heldout": point.heldout.model_copy(update=asked)})  # type: ignore[union-attr]
    verdict = judge(point)
    assert verdict.outcome == "uncertain"
    assert "at 363 to 512 keys: no sample there asks a question" in verdict.text


def test_a_search_is_stopped_by_one_bin(
    model: Any, sets: tuple[SampleSet, ...], heldout: SampleSet, curves: tuple[Curves, ...], profile: Profile
) -> None:
    hopeful = (curves[0], dataclasses.replace(curves[1], gain=curves[1].gain / 1000))
    true = build_profile(curves, parse_targets(["a:density=0.8"])).point().predicted
    assert true is not None
    target = f"a:kl={5 * true.kl}"
    said = "a: kl=.* missed on held-out data: measured .*; missed on held-out data at 363 to 512 keys: .*; search with"
    with pytest.raises(TargetMissedError, match=said):
        xcalib.search(model, sets, target=target, heldout=heldout, curves=hopeful, settings=SETTINGS)
    assert [point.verified for point in profile.points] == [True, True]


# --- the file


def test_what_is_said_by_length_must_fit_the_bins(profile: Profile) -> None:
    def refused(said: str, **changes: Any) -> None:
        with pytest.raises(ProfileError, match=said):
            make_profile(**{**dict(profile), **changes})

    point = profile.point()
    assert point.predicted is not None and point.predicted.by_length and point.heldout and point.heldout.by_length
    half = point.predicted.model_copy(update={"by_length": point.predicted.by_length[:1]})
    refused("points.0..predicted.by_length: must have one entry", points=[point.model_copy(update={"predicted": half})])
    turned = point.heldout.model_copy(update={"by_length": point.heldout.by_length[::-1]})
    refused("points.0..heldout.by_length: must have the", points=[point.model_copy(update={"heldout": turned})])
    record = profile.calibration
    few, off = (record.model_copy(update={"lengths": lengths}) for lengths in ((256,), (256, 300)))
    refused("calibration.lengths: 1 lengths, the profile has 2", calibration=few)
    refused(r"calibration.lengths\[1\]: 300 is not in length_bins\[1\]", calibration=off)


# --- the runtime


def with_thresholds(profile: Profile, *taus: float) -> Profile:
    """One point with a single tau for each bin."""
    shape = (profile.model.layers, profile.model.query_heads)
    thresholds = tuple(((tau,) * shape[1],) * shape[0] for tau in taus)
    point = profile.point().model_copy(update={"thresholds": thresholds})
    return make_profile(**{**dict(profile), "points": (point,), "default_point": point.name})


def served(model: Any, profile: Profile, *chunks: int) -> dict[str, Any]:
    """Statistics after a prefill of the chunks, one after the other over a cache."""
    tokens = torch.arange(sum(chunks))[None] % 100 + 3
    with xcalib.apply_profile(model, profile) as handle, torch.inference_mode():
        cache, start = None, 0
        for chunk in chunks:
            cache = model(tokens[:, start : start + chunk], past_key_values=cache, use_cache=True).past_key_values
            start += chunk
        return handle.stats()


def kept(length: int) -> float:
    """Density with threshold 0: of the blocks below the diagonal the sink and each row's own."""
    blocks = -(-length // 64)
    return (2 * blocks - 1) / (blocks * (blocks + 1) / 2)


@pytest.mark.parametrize(
    ("chunks", "sparse", "extrapolated", "reason"),
    [
        ((191,), False, False, "shorter than 192 tokens"),
        ((192,), False, False, "thresholds all 1"),
        ((362,), False, False, "thresholds all 1"),
        ((363,), True, False, None),
        ((512,), True, False, None),
        ((513,), True, True, None),
        ((900,), True, True, None),
    ],
    ids=str,
)
def test_the_key_length_picks_the_bin(
    model: Any, profile: Profile, chunks: tuple[int, ...], sparse: bool, extrapolated: bool, reason: str | None
) -> None:
    stats = served(model, with_thresholds(profile, 1.0, 0.0), *chunks)
    layers = profile.model.layers
    assert (stats["sparse_calls"], stats["extrapolated_calls"]) == (layers * sparse, layers * extrapolated)
    assert stats["dense_reasons"] == ({} if reason is None else {reason: layers})
    assert stats["density"] == pytest.approx(kept(chunks[0]) if sparse else 1.0)


def test_chunks_are_served_by_all_keys_so_far(model: Any, profile: Profile) -> None:
    layers = profile.model.layers
    stats = served(model, with_thresholds(profile, 1.0, 0.0), 256, 128, 128, 128)
    # 256 keys: the first bin; 384 and 512: the second; 640: beyond it
    assert stats["dense_reasons"] == {"thresholds all 1": layers}
    assert (stats["sparse_calls"], stats["extrapolated_calls"]) == (3 * layers, layers)
    # each later chunk's two rows of blocks keep 2 of 5 and 6, 7 and 8, 9 and 10 blocks
    assert stats["density"] == pytest.approx((10 + 12) / (10 + 45))


# --- evaluations by length


def test_cuts() -> None:
    bins = [(192, 363), (363, 513)]
    assert length_cuts(bins, (), (200, 900)) == (192, 363, 513)
    assert length_cuts(bins, (256, 1024), (200, 900)) == (192, 257, 363, 513, 1025)
    assert length_cuts([(0, None)], (), (500, 512)) == (0,)
    assert length_cuts([(0, None)], (), (200, 1024)) == (0, 129, 257, 513, 1025)


@given(st.lists(st.integers(64, 5000), min_size=1, max_size=8))
def test_lengths_without_bins_are_parted_by_doublings(tokens: list[int]) -> None:
    cuts = length_cuts([(0, None)], (), tokens)
    for low, high in pairwise(cuts):
        inside = [count for count in tokens if low <= count < high]
        assert not inside or max(inside) <= 2 * min(inside)


def test_an_evaluation_tabulates_by_length(model: Any, profile: Profile, random_samples: Build) -> None:
    data = [random_samples([length], seed=seed) for seed, length in enumerate((100, 256, 512, 700), start=20)]
    found = xcalib.evaluate(model, data, profile, point="b", uniform=[0.5])
    rows = [(part.min_tokens, part.length_bin, part.extrapolated, part.samples) for part in found.by_length]
    assert rows == [(100, None, False, 1), (256, BINS[0], False, 1), (512, BINS[1], False, 1), (700, BINS[1], True, 1)]
    assert [part.plans[0].kl for part in found.by_length] == pytest.approx(found.plan("b").kl_by_sample)
    assert [plan.density for plan in found.by_length[0].plans] == [1.0, 1.0]
    assert json.loads(json.dumps(found.to_dict()))["by_length"][3]["extrapolated"] is True


def test_one_length_needs_no_table(model: Any, curves: tuple[Curves, ...], random_samples: Build) -> None:
    plans = plans_to_evaluate(model, build_profile(curves[1], parse_targets(["a:density=0.8"])))
    assert evaluate_plans(model, random_samples([512, 480], seed=9), plans).by_length == ()
    assert len(evaluate_plans(model, random_samples([512, 120], seed=9), plans).by_length) == 2
    assert len(xcalib.evaluate(model, random_samples([300, 150], seed=9), uniform=[0.5]).by_length) == 2
