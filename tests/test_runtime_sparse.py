"""Models that prefill by a plan: exact at threshold 1, right layer and head below, counted everywhere."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from xcalib import kernels
from xcalib.errors import ModelError
from xcalib.models.attention import patch_attention
from xcalib.models.sparse import SparseAttention, SparsePlan

Build = Callable[..., Any]
PLAIN = ["llama", "qwen3", "mistral", "phi3"]
OTHER = "mask that is not plain causal (padding, packing or a static cache)"


def tokens(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_plan(model: Any, tau: float | torch.Tensor = 1.0, bins: Any = ((64, None),), **fields: Any) -> SparsePlan:
    config = model.config
    shape = (len(bins), config.num_hidden_layers, config.num_attention_heads)
    thresholds = torch.as_tensor(tau, dtype=torch.float32).expand(shape).clone()
    return SparsePlan(16, 64, "antidiagonal", bins, thresholds, **fields)


def patched(model: Any, plan: SparsePlan, kernels: bool = True) -> SparseAttention:
    """``kernels``: send rows of threshold 1 through the sparse kernels too."""
    attention = SparseAttention(model, plan)
    attention._all_ones_is_dense = not kernels
    return attention


def assert_as_exact(actual: torch.Tensor, dense: torch.Tensor, model: Any, ids: torch.Tensor, **inputs: Any) -> None:
    """Within twice the dense model's own rounding error, measured against the same weights in fp64."""
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(ids, **inputs).logits
    assert actual.isfinite().all()
    allowed = 2 * (dense - truth).abs().max() + 1e-7 * truth.abs().max()
    assert (actual - truth).abs().max() <= allowed


@pytest.mark.parametrize("heads", [(4, 2), (9, 3)], ids=lambda heads: f"heads{heads[0]}of{heads[1]}")
@pytest.mark.parametrize("shape", [(1, 128), (1, 203), (3, 150)], ids=lambda shape: f"batch{shape[0]}-len{shape[1]}")
@pytest.mark.parametrize("family", [*PLAIN, "gemma3_text"])
def test_threshold_1_is_dense(tiny_model: Build, family: str, shape: tuple[int, int], heads: tuple[int, int]) -> None:
    model = tiny_model(family, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    ids = tokens(shape[1], shape[0])
    with torch.no_grad():
        dense = model(ids).logits
        with patched(model, make_plan(model)) as attention:
            sparse = model(ids).logits
        assert torch.equal(model(ids).logits, dense)
    assert_as_exact(sparse, dense, model, ids)
    stats = attention.stats()
    assert stats["sparse_calls"] == 2
    assert stats["density"] == 1
    assert stats["dense_reasons"] == ({"sliding window": 1} if family == "gemma3_text" else {})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bf16_and_eager(tiny_model: Build, implementation: str) -> None:
    model, ids = tiny_model(attn_implementation=implementation).bfloat16(), tokens(203, 2)
    with torch.no_grad():
        dense = model(ids).logits
        with patched(model, make_plan(model)) as attention:
            sparse = model(ids).logits
    assert sparse.dtype == torch.bfloat16
    assert_as_exact(sparse, dense, model, ids)
    assert attention.stats()["sparse_calls"] == 2


@pytest.mark.parametrize("chunks", [(128, 75), (70, 64, 69), (130, 66, 7), (66, 64, 64, 9)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_chunked_prefill_is_one_prefill(tiny_model: Build, family: str, chunks: tuple[int, ...]) -> None:
    from transformers import DynamicCache

    model, ids = tiny_model(family), tokens(203)
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        dense = model(ids).logits
        with patched(model, make_plan(model)) as attention:
            parts = [model(chunk, past_key_values=cache).logits for chunk in ids.split(chunks, 1)]
    assert_as_exact(torch.cat(parts, 1), dense, model, ids)
    stats, short = attention.stats(), sum(chunk < 64 for chunk in chunks)
    assert stats["sparse_calls"] == 2 * (len(chunks) - short)
    assert stats["dense_reasons"].get("query shorter than a block", 0) == 2 * short


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_generate(tiny_model: Build, family: str) -> None:
    model, ids = tiny_model(family), tokens(150)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    dense = model.generate(ids, **arguments)
    with patched(model, make_plan(model)) as attention:
        assert torch.equal(model.generate(ids, **arguments), dense)
    stats, layers = attention.stats(), model.config.num_hidden_layers
    assert stats["dense_reasons"]["decode (one query token)"] == 5 * layers
    assert stats["sparse_calls"] == (0 if family == "gpt_oss" else 2)
    assert stats["density"] == 1


def test_generate_after_sparse_prefill_and_with_a_padded_batch(tiny_model: Build) -> None:
    model, ids = tiny_model(), tokens(150, 2)
    padding = torch.ones_like(ids)
    padding[0, :30] = 0
    dense = model.generate(ids, attention_mask=padding, max_new_tokens=4, do_sample=False)
    with patched(model, make_plan(model, 0.0)) as attention:
        assert torch.equal(model.generate(ids, attention_mask=padding, max_new_tokens=4, do_sample=False), dense)
        assert attention.stats()["sparse_calls"] == 0
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert attention.stats()["sparse_calls"] == 2


@pytest.mark.parametrize("window", [64, 149, 150, 512, None])
def test_mistral_with_a_sliding_window(tiny_model: Build, window: int | None) -> None:
    model, ids = tiny_model("mistral", sliding_window=window), tokens(150)
    with torch.no_grad():
        dense = model(ids).logits
        with patched(model, make_plan(model)) as attention:
            logits = model(ids).logits
    if window is None or window >= 150:  # hides nothing yet
        assert_as_exact(logits, dense, model, ids)
        assert attention.stats()["dense_reasons"] == {}
    else:
        assert torch.equal(logits, dense)
        assert attention.stats()["dense_reasons"] == {"sliding window": 2}


@pytest.mark.parametrize("tau", [0.0, 0.6])
@pytest.mark.parametrize("head", range(0, 9, 2))
def test_a_threshold_reaches_its_layer_and_head(tiny_model: Build, head: int, tau: float) -> None:
    """A low threshold for one head of layer 1: its output is that of the kernels, and no other head's changes."""
    model, ids = tiny_model(num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=3), tokens(250, 2)
    model.model.layers[1].self_attn.scaling *= 2  # not what the kernels take by default
    captured, outputs = {}, []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
    thresholds = torch.ones(1, 3, 9)
    thresholds[0, 1, head] = tau
    with torch.no_grad():
        with patch_attention(model, lambda call: captured.update({call.layer: call})):
            model(ids)
        with SparseAttention(model, make_plan(model, thresholds)) as attention:
            model(ids)
    call = captured[1]
    by_hand = kernels.xattention(
        call.query, call.key, call.value, thresholds[0, 1], stride=16, block_size=64, scale=call.scale
    )
    dense, sparse = (output.unflatten(-1, (9, 32)).transpose(1, 2) for output in outputs)  # (B, Hq, Q, D)
    assert torch.equal(sparse, by_hand)
    others = [other for other in range(9) if other != head]
    # how far fp32 rounding goes depends on the processor (2e-5 was seen); a threshold moves outputs by 0.1
    torch.testing.assert_close(sparse[:, others], dense[:, others], atol=1e-3, rtol=0)
    density = attention.density()
    if tau == 0:
        assert (sparse[:, head] - dense[:, head]).abs().max() > 0.1
        assert density[1, head] == 7 / 10  # the sink and the diagonal of 4 block rows
    assert (np.delete(density.ravel(), 9 + head) == 1).all()
    assert attention.stats()["dense_reasons"] == {"thresholds all 1": 2}


@pytest.mark.parametrize("order", ["score", "recent"])
def test_blocks_are_kept_in_the_plans_order(tiny_model: Build, order: Any) -> None:
    """Against a selection by hand: output and blocks kept."""
    model, ids, captured, outputs = tiny_model(num_hidden_layers=1), tokens(380), [], []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
    with torch.no_grad():
        with patch_attention(model, captured.append):
            model(ids)
        with SparseAttention(model, make_plan(model, 0.5, order=order)) as attention:
            model(ids)
    (call,), (_, sparse) = captured, outputs
    scores = kernels.estimate_blocks(call.query, call.key, block_size=64, scale=call.scale)
    mask = kernels.select_blocks(scores, 0.5, q_len=380, k_len=380, block_size=64, order=order)
    by_hand = kernels.block_sparse_attention(call.query, call.key, call.value, mask, block_size=64, scale=call.scale)
    assert torch.equal(sparse, by_hand.transpose(1, 2).flatten(2))
    np.testing.assert_allclose(attention.density()[0], mask.sum((0, 2, 3)) / 21)
    other = kernels.select_blocks(scores, 0.5, q_len=380, k_len=380, block_size=64)
    assert torch.equal(mask, other) == (order == "score")


def test_length_bins(tiny_model: Build) -> None:
    model = tiny_model()
    thresholds = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    plan = make_plan(model, thresholds, bins=((100, 150), (150, 250)))
    with torch.no_grad(), patched(model, plan, kernels=False) as attention:
        ones = "thresholds all 1"
        for length, reason in {99: "shorter than 100 tokens", 100: None, 149: None, 150: ones, 250: ones}.items():
            attention.reset_stats()
            model(tokens(length))
            assert attention.stats()["dense_reasons"] == ({reason: 2} if reason else {})
            assert attention.stats()["extrapolated_calls"] == 0  # nothing sparse was beyond the last bin
        attention.plan = make_plan(model, 0.0, bins=((100, 150), (150, 250)))
        attention.reset_stats()
        model(tokens(249))
        assert attention.stats()["extrapolated_calls"] == 0
        model(tokens(250))
    assert attention.stats()["extrapolated_calls"] == 2


def test_density_counts_dense_prefill_and_not_decoding(tiny_model: Build) -> None:
    model, ids = tiny_model(), tokens(256, 2)
    plan = make_plan(model, 0.0, dense_layers=frozenset({1}))
    with torch.no_grad(), SparseAttention(model, plan) as attention:
        assert np.isnan(attention.density()).all()
        assert attention.stats()["density"] is None
        cache = model(ids).past_key_values
        first = attention.density()
        model(ids[:, :1], past_key_values=cache)
        np.testing.assert_array_equal(attention.density(), first)
        assert first.shape == (2, 4)
        assert first.dtype == np.float64
        np.testing.assert_array_equal(first, [[7 / 10] * 4, [1.0] * 4])
        model(ids[:, :60])  # one block per row: dense, 2 blocks of the 2 rows in the batch
    np.testing.assert_array_equal(attention.density()[0], [(14 + 2) / (20 + 2)] * 4)
    stats = json.loads(json.dumps(attention.stats(), allow_nan=False))
    assert stats["by_layer"][0] == {"layer": 0, "sparse_calls": 1, "dense_calls": 2, "density": pytest.approx(16 / 22)}
    assert stats["density"] == pytest.approx((16 + 22) / 44)
    assert (stats["sparse_calls"], stats["dense_calls"]) == (1, 5)
    assert stats["dense_reasons"] == {
        "layer kept dense by the profile": 1,
        "decode (one query token)": 2,
        "shorter than 64 tokens": 2,
    }


@pytest.mark.parametrize("case", ["left padding", "right padding", "packed positions"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_and_packing_stay_dense(tiny_model: Build, case: str, implementation: str) -> None:
    model, ids = tiny_model(attn_implementation=implementation), tokens(150, 2)
    padding = torch.ones_like(ids)
    padding[0, :40] = 0
    inputs = {
        "left padding": {"attention_mask": padding},
        "right padding": {"attention_mask": padding.flip(1)},
        "packed positions": {"position_ids": (torch.arange(150) % 70).expand(2, -1), "use_cache": False},
    }[case]
    with torch.no_grad():
        dense = model(ids, **inputs).logits
        with SparseAttention(model, make_plan(model, 0.0)) as attention:
            assert torch.equal(model(ids, **inputs).logits, dense)
    assert attention.stats()["dense_reasons"] == {OTHER: 2}
    assert attention.stats()["density"] == 1


def test_two_models_with_two_plans(tiny_model: Build) -> None:
    first, second, ids = tiny_model(seed=1), tiny_model(seed=2), tokens(150)
    with torch.no_grad():
        alone = []
        for model, tau in ((first, 0.3), (second, 0.0)):
            with SparseAttention(model, make_plan(model, tau)):
                alone.append(model(ids).logits)
        dense = first(ids).logits
        assert not torch.allclose(alone[0], dense, atol=0.1)
        with (
            SparseAttention(first, make_plan(first, 0.3)) as one,
            SparseAttention(second, make_plan(second, 0.0)) as two,
        ):
            assert torch.equal(first(ids).logits, alone[0])
            assert torch.equal(second(ids).logits, alone[1])
            assert one.stats()["sparse_calls"] == two.stats()["sparse_calls"] == 2
            one.remove()
            assert torch.equal(first(ids).logits, dense)
            assert torch.equal(second(ids).logits, alone[1])


def test_gradients_flow_through_a_patched_model(tiny_model: Build) -> None:
    model, ids = tiny_model(), tokens(100)
    with SparseAttention(model, make_plan(model, 0.0)) as attention:
        model(ids, labels=ids).loss.backward()
    assert attention.stats()["dense_reasons"] == {"gradients wanted": 2}
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_unfit_plans_are_refused_and_leave_the_model_alone(tiny_model: Build) -> None:
    model = tiny_model()
    for layers, heads in ((1, 4), (3, 4), (2, 3)):
        plan = SparsePlan(16, 64, "antidiagonal", ((0, None),), torch.ones(1, layers, heads))
        with pytest.raises(ModelError, match=f"{layers} layers of {heads} query heads, the model has 2 layers of 4"):
            SparseAttention(model, plan)
        assert model.config._attn_implementation == "sdpa"
    with SparseAttention(model, make_plan(model)) as attention, pytest.raises(ModelError, match="3 query heads"):
        attention.use(plan)


@pytest.mark.parametrize(
    ("bins", "thresholds", "message"),
    [
        (((0, None),), torch.ones(2, 2, 4), r"expected torch.float32 \(1, layers, q_heads\)"),
        (((0, None),), torch.ones(1, 2, 4).double(), "torch.float64"),
        (((0, None),), torch.full((1, 2, 4), 1.5), r"expected \[0, 1\]"),
        (((0, None),), torch.full((1, 2, 4), torch.nan), r"expected \[0, 1\]"),
        ((), torch.ones(0, 2, 4), "ascending"),
        (((0, 100), (200, None)), torch.ones(2, 2, 4), "ascending"),
        (((0, None), (100, None)), torch.ones(2, 2, 4), "ascending"),
        (((100, 100),), torch.ones(1, 2, 4), "ascending"),
    ],
)
def test_malformed_plans(bins: Any, thresholds: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsePlan(16, 64, "antidiagonal", bins, thresholds)


def test_below_the_crossover_prefill_stays_dense(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr("xcalib.models.sparse.crossover", lambda device: 200)
    reason = "shorter than 200 tokens, where dense attention is faster"
    for least, length, expected in ((None, 199, {reason: 2}), (None, 200, {}), (0, 199, {}), (200, 199, {reason: 2})):
        plan = make_plan(model, torch.tensor(0.5))
        with torch.no_grad(), SparseAttention(model, plan, min_length=least) as attention:
            model(tokens(length))
            assert attention.stats()["dense_reasons"] == expected, (least, length)
