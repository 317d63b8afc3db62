"""Figures of an evaluation against independent ones: full softmax, recomputed masks, transformers' own generation."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import xcalib
from xcalib.collect import CollectSettings
from xcalib.collect.units import Units
from xcalib.data import Sample, SampleSet
from xcalib.errors import CurvesError, DataError, ModelError, ProfileError
from xcalib.evaluation import Evaluation, evaluate, evaluate_plans, plans_to_evaluate, uniform_at
from xcalib.evaluation.results import DenseResult, PlanResult
from xcalib.kernels import block_sparse_attention, estimate_blocks, select_blocks, visible_blocks
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.loading import load_model
from xcalib.models.logits import LogitHead
from xcalib.models.sparse import SparseAttention, SparsePlan
from xcalib.profile import Profile, make_profile

Build = Callable[..., Any]
LENGTHS = (330, 448)
SETTINGS = CollectSettings(block_size=64, grid=(0.0, 0.4, 0.55, 0.65, 0.75, 1.0), gain_samples=1)


@pytest.fixture(scope="module")
def model(tiny_model: Build) -> Any:
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def samples(random_samples: Build) -> Any:
    return random_samples(LENGTHS, seed=1, split="heldout")


@pytest.fixture(scope="module")
def profile(model: Any, random_samples: Build) -> Profile:
    return xcalib.search(
        model, random_samples([448]), target=["a:density=0.6", "b:density=0.8"], settings=SETTINGS, name="tiny"
    )


def plan_of(model: Any, tau: float | np.ndarray, **fields: Any) -> SparsePlan:
    config = model.config
    thresholds = torch.as_tensor(tau, dtype=torch.float32).expand(
        1, config.num_hidden_layers, config.num_attention_heads
    )
    return SparsePlan(16, 64, "antidiagonal", ((0, None),), thresholds.clone(), **fields)


def mixed(model: Any, seed: int = 3) -> np.ndarray:
    """A threshold of its own for every head."""
    shape = (model.config.num_hidden_layers, model.config.num_attention_heads)
    return np.random.default_rng(seed).uniform(0.2, 0.7, shape)


def log_probabilities(model: Any, tokens: torch.Tensor, plan: SparsePlan | None = None) -> torch.Tensor:
    """The whole model's, fp64 ``(length, vocabulary)``."""
    with torch.no_grad():
        if plan is None:
            return functional.log_softmax(model(tokens[None]).logits[0].double(), -1)
        with SparseAttention(model, plan):
            return functional.log_softmax(model(tokens[None]).logits[0].double(), -1)


def test_threshold_1_changes_nothing(model: Any, samples: Any) -> None:
    found = evaluate(model, samples, uniform=[1.0])
    plan = found.plan("tau=1")
    assert (plan.kl, plan.kl_p99, plan.kl_by_sample) == (0.0, 0.0, (0.0, 0.0))
    assert plan.perplexity == found.dense.perplexity
    assert plan.density == 1
    assert plan.density_by_layer == (1.0, 1.0, 1.0)


def test_the_dense_model_alone(model: Any, samples: Any) -> None:
    found = evaluate(model, samples)
    assert found.plans == ()
    assert (found.samples, found.tokens, found.asking, found.sources) == (2, sum(LENGTHS), 0, ("random",))
    assert found.dense.accuracy is None
    assert found.dense.perplexity > 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_kl_and_perplexity_equal_full_softmax(tiny_model: Build, samples: Any, family: str) -> None:
    model = tiny_model(family, num_hidden_layers=3)
    if family == "gemma2":  # its attention has a soft cap, so nothing is sparse
        plans = {"mixed": plan_of(model, 0.0)}
    else:
        plans = {"mixed": plan_of(model, mixed(model)), "none": plan_of(model, 0.0)}
    found = evaluate_plans(model, samples, plans)
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in ("dense", *plans)}
    kls: dict[str, list[torch.Tensor]] = {name: [] for name in plans}
    for sample in samples.samples:
        tokens = torch.tensor(sample.tokens)
        dense = log_probabilities(model, tokens)
        losses["dense"].append(-dense[:-1].gather(-1, tokens[1:, None])[:, 0])
        for name, plan in plans.items():
            sparse = log_probabilities(model, tokens, plan)
            losses[name].append(-sparse[:-1].gather(-1, tokens[1:, None])[:, 0])
            kls[name].append((dense.exp() * (dense - sparse)).sum(-1))
    assert found.dense.perplexity == pytest.approx(math.exp(torch.cat(losses["dense"]).mean()), rel=1e-5)
    for name in plans:
        plan = found.plan(name)
        kl = torch.cat(kls[name]).numpy()
        assert plan.kl == pytest.approx(kl.mean(), rel=1e-3, abs=1e-7)
        assert plan.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3, abs=1e-6)
        assert plan.kl_by_sample == pytest.approx([float(k.mean()) for k in kls[name]], rel=1e-3, abs=1e-7)
        assert plan.perplexity == pytest.approx(math.exp(torch.cat(losses[name]).mean()), rel=1e-5)
        assert (plan.kl > 1e-4) == (family != "gemma2")


def test_density_equals_recomputed_masks(model: Any, samples: Any) -> None:
    """Selection again in a sparse run of our own, pooled over samples by blocks."""
    taus = torch.tensor(mixed(model), dtype=torch.float32)
    kept, visible = np.zeros(3), 0

    def compute(call: AttentionCall) -> torch.Tensor:
        length = call.query.shape[2]
        scores = estimate_blocks(call.query, call.key, stride=16, block_size=64, scale=call.scale)
        mask = select_blocks(scores, taus[call.layer], q_len=length, k_len=length, block_size=64)
        kept[call.layer] += int(mask.sum())
        return block_sparse_attention(call.query, call.key, call.value, mask, block_size=64, scale=call.scale)

    with torch.no_grad(), patch_attention(model, compute):
        for sample in samples.samples:
            model(torch.tensor(sample.tokens)[None])
            visible += 4 * int(visible_blocks(len(sample.tokens), len(sample.tokens), block_size=64).sum())
    plan = evaluate_plans(model, samples, {"mixed": plan_of(model, taus.numpy())}).plan("mixed")
    assert plan.density_by_layer == pytest.approx(kept / visible)
    assert plan.density == pytest.approx(kept.sum() / (3 * visible))
    assert 0.4 < plan.density < 0.9


def test_dense_layers_are_left_out_of_the_density(model: Any, samples: Any) -> None:
    plans = {
        "all": plan_of(model, 0.0),
        "two": plan_of(model, torch.tensor([[0.0], [1.0], [0.0]]), dense_layers=frozenset({1})),
    }
    found = evaluate_plans(model, samples, plans)
    assert found.plan("two").density_by_layer[1] is None
    assert found.plan("two").density == pytest.approx(found.plan("all").density)  # tau 0: the same blocks in each layer
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["plans"][1]["density_by_layer"][1] is None


def test_sliding_layers_count_as_dense(tiny_model: Build, samples: Any) -> None:
    found = evaluate_plans(tiny_model("gemma3_text"), samples, {"none": plan_of(tiny_model("gemma3_text"), 0.0)})
    assert found.plan("none").density_by_layer[0] == 1
    assert found.plan("none").density_by_layer[1] < 0.6


def test_points_of_a_profile(model: Any, samples: Any, profile: Profile) -> None:
    found = evaluate(model, samples, profile, uniform=[0.5])
    assert [plan.name for plan in found.plans] == ["a", "b", "tau=0.5"]
    assert found.plan("a").density < found.plan("b").density
    assert found.plan("a").kl > found.plan("b").kl > 0
    only = evaluate(model, samples, profile, point="b")
    assert [plan.name for plan in only.plans] == ["b"]
    assert only.plan("b").kl == found.plan("b").kl
    with pytest.raises(KeyError):
        only.plan("a")


def test_single_taus_use_the_method_of_the_profile(model: Any, profile: Profile) -> None:
    with_profile = plans_to_evaluate(model, profile, uniform=[0.25])["tau=0.25"]
    assert (with_profile.block_size, with_profile.bins) == (64, ((256, 449),))
    alone = plans_to_evaluate(model, None, uniform=[0.25])["tau=0.25"]
    assert (alone.stride, alone.block_size, alone.bins) == (16, 128, ((0, None),))
    assert with_profile.thresholds.unique().tolist() == alone.thresholds.unique().tolist() == [0.25]
    recent = make_profile(**{**dict(profile), "method": {**profile.method.model_dump(), "order": "recent"}})
    assert plans_to_evaluate(model, recent, uniform=[0.25])["tau=0.25"].order == "recent"
    assert alone.order == "score"


def test_published_single_taus_go_by_the_published_rule(model: Any, samples: Any, profile: Profile) -> None:
    ours = make_profile(
        **{**dict(profile), "method": {**profile.method.model_dump(), "pattern": "rows", "order": "recent"}}
    )
    plans = plans_to_evaluate(model, ours, point="a", uniform=[0.5], published=[0.5])
    assert list(plans) == ["a", "tau=0.5", "published tau=0.5"]
    rules = {name: (plan.pattern, plan.order, plan.stride, plan.block_size) for name, plan in plans.items()}
    assert rules["tau=0.5"] == rules["a"] == ("rows", "recent", profile.method.stride, 64)
    assert rules["published tau=0.5"] == ("antidiagonal", "score", profile.method.stride, 64)
    found = evaluate(model, samples, ours, uniform=[0.2, 0.9], published=[0.2, 0.9])
    density = found.plan("published tau=0.9").density
    assert uniform_at(found, density, "published tau=").kl == pytest.approx(found.plan("published tau=0.9").kl)
    assert uniform_at(found, found.plan("tau=0.9").density).tau == pytest.approx(0.9)


def test_the_record_of_a_plan_tells_two_orders_apart(model: Any) -> None:
    """An interrupted evaluation goes on with the same plans only."""
    first, second = (plan_of(model, 0.5, order=order) for order in ("score", "recent"))
    changed = {key for key, value in first.record().items() if value != second.record()[key]}
    assert changed == {"order"}
    assert json.loads(json.dumps(first.record()))["thresholds"] == first.thresholds.tolist()


@pytest.mark.parametrize("tau", [-0.1, 1.1, math.nan, math.inf])
def test_single_taus_are_checked(model: Any, samples: Any, tau: float) -> None:
    with pytest.raises(DataError, match=r"single tau is .*, expected a number in \[0, 1\]"):
        evaluate(model, samples, uniform=[tau])


def test_refusals(model: Any, tiny_model: Build, samples: Any, random_samples: Build, profile: Profile) -> None:
    with pytest.raises(ProfileError, match="no operating point 'c'; this profile has: a, b"):
        evaluate(model, samples, profile, point="c")
    with pytest.raises(ModelError, match="the profile is for another model"):
        evaluate(tiny_model("llama"), samples, profile)
    with pytest.raises(DataError, match="1 of the 1 documents were used to calibrate this profile"):
        evaluate(model, random_samples([448]), profile)
    both = SampleSet((*samples.samples, *random_samples([448]).samples), {}, ("random",), "all", 0)
    with pytest.raises(DataError, match="1 of the 3 documents were used to calibrate this profile"):
        evaluate(model, both, profile)


def test_nan_names_the_sample(tiny_model: Build, samples: Any) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"^sample 0: layer 1 of LlamaForCausalLM: its output holds NaN"):
        evaluate(model, samples, uniform=[0.5])
    assert model.config._attn_implementation == "sdpa"


# --- answers


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Any:
    return load_model(str(tiny_folder))


def asking(length: int, seed: int, answers: tuple[str, ...] = ("x",), new: int = 12) -> Sample:
    tokens = np.random.default_rng(seed).integers(3, 500, length)
    return Sample(tokens, "asking", (f"{seed:016x}",), answers, new)


def generated(model: Any, sample: Sample) -> list[int]:
    ids = torch.tensor(sample.tokens)[None]
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=sample.max_new_tokens
        )
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("length", [130, 330, 384])
def test_answers_equal_greedy_generation(loaded: Any, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Dense and sparse: prefill by the plan, then greedy tokens from its cache."""
    model, sample = loaded.model, asking(length, length)
    texts: list[str] = []
    monkeypatch.setattr("xcalib.evaluation.score", lambda _sample, text: texts.append(text) or 1.0)
    plan = plan_of(model, 0.0)
    data = SampleSet((sample,), {}, ("asking",), "heldout", 0)
    found = evaluate_plans(model, data, {"none": plan}, tokenizer=loaded.tokenizer)
    dense = generated(model, sample)
    with SparseAttention(model, plan) as attention:
        sparse = generated(model, sample)
    assert attention.stats()["sparse_calls"] == 3
    assert texts == [loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in (dense, sparse)]
    assert dense != sparse
    assert (found.asking, found.dense.accuracy, found.plan("none").accuracy) == (1, 1.0, 1.0)


def test_generation_stops_at_the_end_token(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = loaded.model, asking(200, 5)
    whole = generated(model, sample)
    stop = next(token for token in whole if token != whole[0])
    texts: list[str] = []
    monkeypatch.setattr("xcalib.evaluation.score", lambda _sample, text: texts.append(text) or 1.0)
    data = SampleSet((sample,), {}, ("asking",), "heldout", 0)
    for ends in (stop, [2, stop]):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        evaluate_plans(model, data, {}, tokenizer=loaded.tokenizer)
    expected = loaded.tokenizer.decode(whole[: whole.index(stop)], skip_special_tokens=True)
    assert texts == [expected, expected]


class Says:
    """A tokenizer whose every text is the same."""

    def __init__(self, text: str) -> None:
        self.text = text

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        del ids, skip_special_tokens
        return self.text


def test_accuracy_is_the_mean_over_samples_that_ask(loaded: Any, random_samples: Build) -> None:
    asked = (asking(130, 1, ("48213",)), asking(130, 2, ("48213", "7")), *random_samples([140]).samples)
    data = SampleSet(asked, {}, ("asking", "random"), "heldout", 0)
    plans = {"none": plan_of(loaded.model, 0.0)}
    found = evaluate_plans(loaded.model, data, plans, tokenizer=Says("it is 48213."))
    assert (found.samples, found.asking) == (3, 2)
    assert found.dense.accuracy == found.plan("none").accuracy == 0.75
    without = evaluate_plans(loaded.model, data, plans)
    assert (without.asking, without.dense.accuracy, without.plan("none").accuracy) == (0, None, None)
    assert without.plan("none").kl == pytest.approx(found.plan("none").kl)


# --- units


def timeless(found: Evaluation) -> dict[str, Any]:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "seconds"}
        return [strip(item) for item in value] if isinstance(value, list | tuple) else value

    return strip(found.to_dict())  # type: ignore[no-any-return]


def test_an_interrupted_evaluation_goes_on(
    model: Any, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = {"mixed": plan_of(model, mixed(model))}
    whole = evaluate_plans(model, samples, plans)
    calls: list[int] = []
    prefill = LogitHead.prefill

    def counted(self: LogitHead, tokens: torch.Tensor, **options: Any) -> Any:
        calls.append(len(tokens))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prefill(self, tokens, **options)

    monkeypatch.setattr(LogitHead, "prefill", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_plans(model, samples, plans, units=Units(tmp_path, {"a": 1}, resume=False))
    assert calls == [330, 330, 448]
    with pytest.raises(CurvesError, match="already holds a collection; go on with --resume"):
        Units(tmp_path, {"a": 1}, resume=False)
    resumed = evaluate_plans(model, samples, plans, units=Units(tmp_path, {"a": 1}, resume=True))
    assert calls[3:] == [448, 448]
    assert timeless(resumed) == timeless(whole)
    again = evaluate_plans(model, samples, plans, units=Units(tmp_path, {"a": 1}, resume=True))
    assert again == resumed
    assert len(calls) == 5


# --- the single tau at a density


def measured(*rows: tuple[str, float, float]) -> Evaluation:
    plans = [PlanResult(name, density, (density,), kl, kl, (kl,), 2.0, None, 1.0) for name, density, kl in rows]
    return Evaluation(DenseResult(2.0, None, 1.0), tuple(plans), ("random",), 1, 100, 0)


def test_uniform_at_interpolates_log_kl() -> None:
    found = measured(("balanced", 0.3, 9.9), ("tau=0.8", 0.4, 0.01), ("tau=0.6", 0.2, 0.04), ("tau=0.9", 0.5, 0.001))
    middle = uniform_at(found, 0.3)
    assert (middle.tau, middle.density, middle.kl) == (pytest.approx(0.7), 0.3, pytest.approx(0.02))
    for density, tau, kl in ((0.2, 0.6, 0.04), (0.4, 0.8, 0.01), (0.5, 0.9, 0.001)):
        at = uniform_at(found, density)
        assert (at.tau, at.kl) == (pytest.approx(tau), pytest.approx(kl))


@pytest.mark.parametrize(
    ("rows", "density", "said"),
    [
        ([], 0.3, "none"),
        ([("balanced", 0.3, 0.1)], 0.3, "none"),
        ([("tau=0.8", 0.3, 0.1)], 0.3, "0.300"),
        ([("tau=0.8", 0.3, 0.1), ("tau=0.9", 0.4, 0.1)], 0.29, "0.300, 0.400"),
        ([("tau=0.8", 0.3, 0.1), ("tau=0.9", 0.4, 0.1)], 0.41, "0.300, 0.400"),
        ([("tau=0.8", 0.3, 0.1), ("tau=0.9", 0.4, 0.1)], math.nan, "0.300, 0.400"),
    ],
    ids=["none", "no tau", "one tau", "below", "above", "nan"],
)
def test_uniform_at_needs_taus_around(rows: list[tuple[str, float, float]], density: float, said: str) -> None:
    with pytest.raises(DataError, match=rf"is not between those of the measured single taus \({said}\): measure more"):
        uniform_at(measured(*rows), density)


def test_uniform_at_of_a_real_evaluation(model: Any, samples: Any) -> None:
    found = evaluate(model, samples, uniform=[0.0, 0.5, 1.0])
    at = uniform_at(found, found.plan("tau=0.5").density)
    assert (at.tau, at.kl) == (pytest.approx(0.5), pytest.approx(found.plan("tau=0.5").kl))


# --- the head


def headed(tiny_model: Build, family: str, values: dict[str, Any]) -> Any:
    if family in ("llama", "gemma2", "gemma3_text"):
        return tiny_model(family, **values)
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **shape, **heads, **special, **values)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3_text", {"final_logit_softcapping": 0.5}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
    ids=["llama", "tied", "gemma2", "gemma2-uncapped", "gemma3", "granite", "cohere"],
)
def test_head_equals_the_models_own(tiny_model: Build, family: str, values: dict[str, Any], chunk: int) -> None:
    model = headed(tiny_model, family, values)
    tokens = torch.randint(3, 128, (150,), generator=torch.Generator().manual_seed(0))
    head = LogitHead(model, chunk=chunk)
    prefill = head.prefill(tokens)
    with torch.no_grad():
        own = model(tokens[None]).logits[0]
    with torch.inference_mode():
        torch.testing.assert_close(head.logits(prefill.hidden), own)
    if values.get("final_logit_softcapping"):
        assert own.abs().max() <= 0.5
    other = prefill.hidden.flip(0)
    dense, changed = (functional.log_softmax(own.double(), -1), functional.log_softmax(own.flip(0).double(), -1))
    expected = (dense.exp() * (dense - changed)).sum(-1)
    torch.testing.assert_close(head.kl(prefill.hidden, [other])[0].double(), expected, rtol=1e-3, atol=1e-6)
    found = head.compare(prefill.hidden, [other, prefill.hidden], tokens[1:])
    torch.testing.assert_close(found.kl[0].double(), expected, rtol=1e-3, atol=1e-6)
    assert found.kl.shape == (2, 150)
    assert (found.kl[1] == 0).all()
    assert found.loss.shape == (3, 149)
    for row, logs in enumerate((dense, changed, dense)):
        loss = -logs[:-1].gather(-1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(found.loss[row].double(), loss, rtol=1e-4, atol=1e-5)


def test_an_unknown_head_is_refused(tiny_model: Build, samples: Any) -> None:
    model = tiny_model("llama")

    def scaled(_module: Any, _inputs: Any, output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    model.register_forward_hook(scaled)
    with pytest.raises(ModelError, match="its logits are not its output embedding's; this head is not supported"):
        evaluate(model, samples, uniform=[0.5])


def test_a_model_without_a_head_is_refused(tiny_model: Build) -> None:
    with pytest.raises(ModelError, match="no decoder with an output embedding was found"):
        LogitHead(tiny_model("llama").model)
