"""Numbers that are not finite: named by layer and sample on every path, or left out and counted."""

import dataclasses
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xcalib
from xcalib.collect import CollectSettings, Curves, collect, collect_lengths, load_curves
from xcalib.collect.curves import ARRAYS
from xcalib.collect.gains import GainMeter
from xcalib.collect.measure import Sweeper
from xcalib.collect.ranks import Place, Ranks
from xcalib.collect.skipping import Skipping, kept_samples
from xcalib.collect.slopes import SlopeMeter
from xcalib.collect.units import Units
from xcalib.data import SampleSet
from xcalib.errors import NonFiniteError, RankError, TargetError, XcalibWarning
from xcalib.evaluation import answer_score, evaluate_plans
from xcalib.models.logits import LogitHead, sampled_positions
from xcalib.models.sparse import SparsePlan
from xcalib.profile import load_profile, save_profile
from xcalib.progress import silent
from xcalib.search import drop
from xcalib.search._meter import Meter

Build = Callable[..., Any]
Run = Callable[..., tuple[int, str, str]]

SETTINGS = CollectSettings(
    stride=16, block_size=64, grid=(0.0, 0.4, 0.6, 0.75, 0.9, 1.0), gain_samples=2, gain_density=0.6, measures=("mass",)
)
LENGTHS = (330, 350, 370, 390)
BAD = 200  # a token whose embedding is NaN
REASON = "layer 0 of LlamaForCausalLM cannot be measured: query holds NaN or infinite numbers, expected finite ones"


@pytest.fixture(scope="module")
def model(tiny_model: Build) -> Any:
    built = tiny_model(vocab_size=256)
    built.get_input_embeddings().weight.data[BAD] = float("nan")
    return built


@pytest.fixture
def data(random_samples: Build) -> Callable[..., SampleSet]:
    """Four samples, those of the given indices bad."""

    def make(*bad: int, seed: int = 0) -> SampleSet:
        made = random_samples(LENGTHS, seed)
        samples = []
        for index, sample in enumerate(made.samples):
            tokens = sample.tokens.copy()
            tokens[40] = BAD if index in bad else tokens[40]
            samples.append(dataclasses.replace(sample, tokens=tokens))
        return dataclasses.replace(made, samples=tuple(samples))

    return make


def only(samples: SampleSet, *indices: int) -> SampleSet:
    return dataclasses.replace(samples, samples=tuple(samples.samples[index] for index in indices))


def same(found: Curves, expected: Curves) -> None:
    for name in (*ARRAYS, "mass"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if issubclass(warning.category, XcalibWarning)]


@pytest.mark.parametrize("bad", [0, 2])
def test_a_bad_sample_is_left_out_of_a_collection(model: Any, data: Build, tmp_path: Path, bad: int) -> None:
    """The curves are those of the other three, and the record says so; 0 is a gain sample, 2 is none."""
    samples = data(bad)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = collect(model, samples, tmp_path / "skip", settings=SETTINGS, skip_bad=True)
    assert said(caught) == [f"skipped sample {bad} (random, document {bad:016x}): {REASON}"]
    kept = only(samples, *(index for index in range(4) if index != bad))
    same(found, collect(model, kept, tmp_path / "kept", settings=SETTINGS))
    record = found.calibration
    assert (record["skipped"], record["samples"]) == (1, 3)
    assert record["dropped"] == {f"random: numbers that are not finite (sample {bad})": 1}
    assert record["tokens_sha256"] == kept.tokens_sha256
    assert f"{bad:016x}" not in record["documents"]
    assert found.skipped == load_curves(tmp_path / "skip").skipped == (bad,)
    assert kept_samples(samples, found).tokens_sha256 == kept.tokens_sha256
    other = data(bad, seed=1)
    assert kept_samples(other, found) is other


def test_without_the_option_it_stops(model: Any, data: Build, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        collect(model, data(2), tmp_path, settings=SETTINGS)
    assert str(caught.value) == (
        f"sample 2: {REASON} (random, document 0000000000000002); --skip-bad leaves such samples out"
    )
    assert caught.value.sample == 2
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.sample) == (str(caught.value), 2)
    assert not (tmp_path / "curves.json").exists()


def test_nothing_is_recorded_where_nothing_is_skipped(model: Any, data: Build, tmp_path: Path) -> None:
    collect(model, data(), tmp_path / "plain", settings=SETTINGS)
    collect(model, data(), tmp_path / "skip", settings=SETTINGS, skip_bad=True)
    for name in ("curves.json", "curves.safetensors"):
        assert (tmp_path / "skip" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert b"skipped" not in (tmp_path / "plain" / "curves.json").read_bytes()


@pytest.mark.filterwarnings("ignore::xcalib.errors.XcalibWarning")
@pytest.mark.parametrize("bad", [(0, 1, 2), (0, 1, 2, 3)])
def test_more_than_half_is_the_model(model: Any, data: Build, tmp_path: Path, bad: tuple[int, ...]) -> None:
    with (
        pytest.warns(XcalibWarning, match="skipped sample 1"),
        pytest.raises(
            NonFiniteError, match=r"^3 of 4 samples give numbers that are not finite, sample 2 the last of them"
        ),
    ):
        collect(model, data(*bad), tmp_path, settings=SETTINGS, skip_bad=True)


@pytest.mark.filterwarnings("ignore::xcalib.errors.XcalibWarning")
def test_half_is_allowed_and_one_of_one_is_not(model: Any, data: Build, tmp_path: Path) -> None:
    assert collect(model, data(1, 3), tmp_path / "half", settings=SETTINGS, skip_bad=True).skipped == (1, 3)
    with pytest.raises(NonFiniteError, match="1 of 1 samples"):
        collect(model, only(data(0), 0), tmp_path / "one", settings=SETTINGS, skip_bad=True)


@pytest.mark.filterwarnings("ignore::xcalib.errors.XcalibWarning")
@pytest.mark.parametrize("stop", [1, 3, 7])
def test_an_interrupted_collection_goes_on_with_the_same_samples(
    model: Any, data: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    samples, count = data(0), 0
    whole = collect(model, samples, tmp_path / "whole", settings=SETTINGS, skip_bad=True)
    swept: list[int] = []
    sweep, alone, together = Sweeper.measure, GainMeter.alone, GainMeter.together

    def counted(measure: Any) -> Any:
        def call(self: Any, tokens: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == stop:
                raise KeyboardInterrupt
            if measure is sweep:
                swept.append(len(tokens))
            return measure(self, tokens, *arguments, **options)

        return call

    for owner, name, measure in (
        (Sweeper, "measure", sweep),
        (GainMeter, "alone", alone),
        (GainMeter, "together", together),
    ):
        monkeypatch.setattr(owner, name, counted(measure))
    with pytest.raises(KeyboardInterrupt):
        collect(model, samples, tmp_path / "parts", settings=SETTINGS, skip_bad=True)
    found = collect(model, samples, tmp_path / "parts", settings=SETTINGS, skip_bad=True, resume=True)
    same(found, whole)
    assert found.skipped == (0,)
    assert sorted(swept) == list(LENGTHS)  # each once, the bad one too


@pytest.mark.filterwarnings("ignore::xcalib.errors.XcalibWarning")
@pytest.mark.parametrize("method", ["alone", "together"])
def test_a_sample_that_is_bad_only_later(
    model: Any, data: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """What was measured with its say is measured again without it."""
    measure = getattr(GainMeter, method)

    def fails(self: Any, tokens: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if len(tokens) == LENGTHS[1]:
            raise NonFiniteError("LlamaForCausalLM: its logits hold NaN or infinite numbers")
        return measure(self, tokens, *arguments, **options)

    monkeypatch.setattr(GainMeter, method, fails)
    found = collect(model, data(), tmp_path / "skip", settings=SETTINGS, skip_bad=True)
    assert found.skipped == (1,)
    same(found, collect(model, only(data(), 0, 2, 3), tmp_path / "kept", settings=SETTINGS))


def plans(model: Any) -> dict[str, SparsePlan]:
    shape = (1, model.config.num_hidden_layers, model.config.num_attention_heads)
    return {"p": SparsePlan(16, 64, "antidiagonal", ((0, None),), torch.full(shape, 0.7))}


@pytest.mark.filterwarnings("ignore::xcalib.errors.XcalibWarning")
def test_an_evaluation_leaves_them_out(model: Any, data: Build, tmp_path: Path) -> None:
    samples = data(1)
    with pytest.raises(NonFiniteError) as caught:
        evaluate_plans(model, samples, plans(model))
    assert str(caught.value) == (
        "sample 1: LlamaForCausalLM: its token embeddings hold NaN or infinite numbers (random, document 0000000000000001); "
        "--skip-bad leaves such samples out"
    )
    assert xcalib.evaluate(model, samples, uniform=[0.9], skip_bad=True).skipped == 1
    found = evaluate_plans(model, samples, plans(model), skip_bad=True)
    expected = evaluate_plans(model, only(samples, 0, 2, 3), plans(model))
    assert (found.skipped, found.samples, expected.skipped) == (1, 3, 0)
    assert found.plan("p").kl_by_sample == expected.plan("p").kl_by_sample
    assert (found.plan("p").density, found.tokens) == (expected.plan("p").density, expected.tokens)
    with pytest.raises(NonFiniteError, match="3 of 4 samples"):
        evaluate_plans(model, data(0, 1, 2), plans(model), skip_bad=True)


@pytest.mark.filterwarnings("ignore::xcalib.errors.XcalibWarning")
def test_a_search_leaves_them_out_and_records_it(model: Any, data: Build, tmp_path: Path) -> None:
    samples, heldout = data(3), dataclasses.replace(data(0, seed=1), split="heldout")
    options: dict[str, Any] = {"target": "density=0.6", "settings": SETTINGS, "rounds": 1, "force": True}
    with pytest.raises(NonFiniteError, match=r"^sample 3: layer 0"):
        xcalib.search(model, samples, heldout=heldout, **options)
    profile = xcalib.search(model, samples, heldout=heldout, skip_bad=True, **options)
    assert (profile.calibration.skipped, profile.calibration.samples) == (1, 3)
    (point,) = (point for point in profile.points if point.name == "balanced")
    assert point.heldout is not None
    assert point.heldout.samples == 3
    kept = xcalib.search(model, only(samples, 0, 1, 2), heldout=only(heldout, 1, 2, 3), **options)
    assert [one.thresholds for one in kept.points] == [one.thresholds for one in profile.points]
    assert [one.rounds for one in kept.points] == [one.rounds for one in profile.points]
    save_profile(profile, tmp_path / "skipped.yaml")
    save_profile(kept, tmp_path / "kept.yaml")
    assert load_profile(tmp_path / "skipped.yaml").calibration.skipped == 1
    assert "skipped: 1" in (tmp_path / "skipped.yaml").read_text("utf-8")
    assert "skipped" not in (tmp_path / "kept.yaml").read_text("utf-8")


@pytest.mark.filterwarnings("default::xcalib.errors.XcalibWarning")
def test_what_had_a_use_for_a_sample_has_it_again(data: Build, tmp_path: Path) -> None:
    """Of two targets the first may have used a sample that only the second finds bad: a run that goes on begins with it."""
    samples, error = data(), NonFiniteError("layer 1: NaN")
    for remembers, left in ((True, [0, 1, 3]), (False, [0, 1, 2, 3])):
        with Units(tmp_path / str(remembers), {"a": 1}, resume=False) as units:
            first = Skipping(samples, units, allowed=True, remembers=remembers)
            first.skip(2, error)
            assert first.indices == [0, 1, 3]
            assert Skipping(samples, units, allowed=True, remembers=remembers).indices == left


def test_questions_of_a_drop_may_be_left_out(
    model: Any, data: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = data()
    asked = dataclasses.replace(
        asked, samples=tuple(dataclasses.replace(sample, answers=("a",), max_new_tokens=2) for sample in asked.samples)
    )
    curves = collect(model, data(), tmp_path / "c", settings=SETTINGS)
    given: list[bool] = []

    def record(*_arguments: Any, skip_bad: bool, **_options: Any) -> Any:
        given.append(skip_bad)
        raise TargetError("enough")

    monkeypatch.setattr(drop, "evaluate_plans", record)
    for allowed in (True, False):
        meters = drop.DropMeters(model, object(), tmp_path / "drop", silent, skip_bad=allowed)
        (meter,) = meters.of((asked,), (curves,))
        assert meter is not None
        with pytest.raises(TargetError, match="enough"):
            meter([np.full(curves.gain.shape + curves.error.shape[2:3], 0.5)])
    assert given == [True, False]


def test_several_ranks_leave_nothing_out(model: Any, data: Build, tmp_path: Path) -> None:
    """They would have to agree first: refused before anything is measured or written."""
    samples, ranks = data(1), Ranks(Place(0, 2, 0))
    calls: tuple[Callable[[], Any], ...] = (
        lambda: collect(model, samples, tmp_path / "a", skip_bad=True, ranks=ranks),
        lambda: collect_lengths(model, (samples,), tmp_path / "b", skip_bad=True, ranks=ranks),
        lambda: xcalib.search(model, samples, folder=tmp_path / "c", skip_bad=True, ranks=ranks),
        lambda: evaluate_plans(model, samples, plans(model), skip_bad=True, ranks=ranks),
    )
    for call in calls:
        with pytest.raises(RankError, match=r"^--skip-bad \(skip_bad\) goes with one process: ranks do not agree"):
            call()
    assert not any(tmp_path.iterdir())
    with pytest.raises(NonFiniteError, match=r"--skip-bad leaves such samples out, in one process only$"):
        Skipping(samples, None, allowed=False, ranks=ranks).skip(1, NonFiniteError("bad"))


@pytest.mark.filterwarnings("ignore::xcalib.errors.XcalibWarning")
def test_an_evaluation_goes_on_in_order(model: Any, data: Build, tmp_path: Path) -> None:
    """The bad sample has no unit; those before it are not evaluated again, those after it keep their numbers."""
    samples, identity = data(1), {"a": 1}
    advanced: list[int] = []

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
        assert (what, total) == ("Evaluating 4 samples", 8)
        yield advanced.append

    units = Units(tmp_path, identity, resume=False)
    found = evaluate_plans(model, samples, plans(model), units=units, skip_bad=True, progress=progress)
    assert advanced == [1] * 6
    names = sorted(path.stem for path in (tmp_path / "units").iterdir())
    assert names == ["evaluated-00000", "evaluated-00002", "evaluated-00003", "skipped-00001"]
    again = evaluate_plans(
        model, samples, plans(model), units=Units(tmp_path, identity, resume=True), skip_bad=True, progress=silent
    )
    assert again == found


def test_gradients_of_a_round_name_the_layer(tiny_model: Build, random_samples: Build) -> None:
    model = tiny_model(num_hidden_layers=3)
    tokens = torch.tensor(random_samples([330]).samples[0].tokens)

    def spoil(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    dense = LogitHead(model).prefill(tokens).hidden[sampled_positions(7)].clone()
    model.model.layers[2].mlp.register_forward_hook(spoil)
    levels = np.full((3, 4), 2)
    with pytest.raises(NonFiniteError, match=r"^layer 2 of LlamaForCausalLM: the gradient at its attention holds NaN"):
        SlopeMeter(model, SETTINGS, (0, 1, 2)).measure(tokens, levels, dense)


def test_logits_and_heads_that_are_not_finite(tiny_model: Build, random_samples: Build) -> None:
    model, samples = tiny_model(), random_samples([100])
    model.lm_head.weight.data[5] = float("inf")
    with pytest.raises(NonFiniteError, match=r"^LlamaForCausalLM: its logits hold NaN or infinite numbers$"):
        LogitHead(model).prefill(torch.tensor(samples.samples[0].tokens))
    hidden = torch.randn(20, model.config.hidden_size)
    with pytest.raises(NonFiniteError, match="its logits hold NaN"):
        LogitHead(model).kl(hidden, [hidden + 1])


def test_a_generated_token_whose_logits_are_nan(tiny_model: Build, random_samples: Build) -> None:
    model = tiny_model()
    (given,) = random_samples([100]).samples
    sample = dataclasses.replace(given, answers=("yes",), max_new_tokens=3)
    head = LogitHead(model)
    prefill = head.prefill(torch.tensor(sample.tokens), use_cache=True)

    def spoil(_module: Any, _inputs: Any, output: Any) -> Any:
        output.logits = output.logits * float("nan")
        return output

    model.generation_config.eos_token_id = None
    model.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"^LlamaForCausalLM: the logits of generated token 1 hold NaN$"):
        answer_score(model, head, prefill, sample, None)


def test_half_precision_that_overflows_names_the_layer(
    tiny_model: Build, random_samples: Build, tmp_path: Path
) -> None:
    """65,504 is the largest number of fp16: the MLP of layer 1 gives more, and the sparse layers after it, if any, see Inf."""
    model = tiny_model(num_hidden_layers=2)
    for name in ("up_proj", "down_proj"):
        getattr(model.model.layers[1].mlp, name).weight.data *= 3000
    with pytest.raises(
        NonFiniteError, match=r"^sample 0: layer 1 of LlamaForCausalLM: its output holds NaN or infinite"
    ):
        collect(model.half(), random_samples([330]), tmp_path, settings=SETTINGS)


def test_a_refinement_names_the_sample(model: Any, data: Build) -> None:
    meter = Meter(model, plans(model)["p"], data(1), bin_index=0, every=7)
    with pytest.raises(NonFiniteError, match=r"^sample 1: LlamaForCausalLM: its token embeddings hold NaN"):
        meter.all(np.full((2, 4), 0.7))


@pytest.fixture(scope="module")
def bad_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that gives NaN for one character, and rows of which one holds it."""
    import transformers

    root = tmp_path_factory.mktemp("bad")
    shutil.copytree(tiny_folder, root / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    model.get_input_embeddings().weight.data[tokenizer("\u00a7", add_special_tokens=False)["input_ids"][-1]] = float(
        "nan"
    )
    model.save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    rows = [" ".join(f"{word}" for word in rng.integers(0, 9999, 300)) for _ in range(8)]
    rows[5] = " ".join(f"\u00a7{word}" for word in rng.integers(0, 9999, 300))
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")
    return root / "model", root / "rows.jsonl"


@pytest.mark.filterwarnings("default::xcalib.errors.XcalibWarning")
def test_the_command_line(run: Run, bad_folder: tuple[Path, Path], tmp_path: Path) -> None:
    model, rows = bad_folder
    how = ("--data", f"jsonl:{rows}", "--max-length", "320", "--num-samples", "4", "--block-size", "64")
    codes = {}
    for name in ("collect", "evaluate"):
        options = ("--out", tmp_path / "c") if name == "collect" else ("--uniform", "0.9")
        arguments = tuple(item for item in how if item not in ("--block-size", "64")) if name == "evaluate" else how
        code, printed, error = run(name, model, *arguments, *options, "--json")
        codes[name] = code
        if code:
            (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
            assert code == 2
            assert line.startswith("error: sample ")
            assert line.endswith("--skip-bad leaves such samples out")
            again = ("--resume",) if name == "collect" else ()
            code, printed, error = run(name, model, *arguments, *options, "--json", "--skip-bad", *again)
            assert code == 0, error
            assert "warning: skipped sample " in error
            if name == "evaluate":
                assert json.loads(printed)["skipped"] == 1
            else:
                assert load_curves(tmp_path / "c").calibration["skipped"] == 1
                options = ("--curves", tmp_path / "c", "--target", "a:density=0.9", "-o", tmp_path / "p.yaml")
                code, _, error = run("search", *options)
                assert code == 0, error
                recipe = load_profile(tmp_path / "p.yaml").recipe or {}
                assert (recipe["num_samples"], recipe["skip_bad"]) == (4, True)
    assert sorted(codes.values()) == [0, 2]  # the row is in one split
    code, _, error = run("collect", model, *how, "--skip-bad", "--offload", "--out", tmp_path / "o")
    assert (code, error.count("\n")) == (2, 1) and "--skip-bad (skip_bad) goes without offload" in error
