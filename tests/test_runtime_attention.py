"""Patching models: what comes through, what stays as it was, and that remove() leaves nothing behind."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from xcalib.errors import ModelError
from xcalib.models import attention
from xcalib.models.attention import AttentionCall, patch_attention

Build = Callable[..., Any]


def tokens(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def watch(calls: list[AttentionCall]) -> Callable[[AttentionCall], None]:
    return calls.append


def snapshot(model: Any) -> Any:
    """Everything that a patch could leave behind: attributes and hooks of all modules, and the configs."""
    modules = {name: sorted(vars(module)) for name, module in model.named_modules()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return modules, hooks, model.config.to_dict(), dict(vars(model.config))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3", "gemma3_text"])
def test_calls_are_seen_and_the_model_computes_the_same_bits(
    tiny_model: Build, family: str, implementation: str
) -> None:
    model, ids = tiny_model(family, attn_implementation=implementation), tokens(150, batch=2)
    before, calls = snapshot(model), []
    with torch.no_grad():
        dense = model(ids).logits
        with patch_attention(model, watch(calls)) as patch:
            assert model.config._attn_implementation == f"xcalib_{implementation}"
            assert torch.equal(model(ids).logits, dense)
        assert torch.equal(model(ids).logits, dense)
    layers = model.config.num_hidden_layers
    assert patch.calls == len(calls) == layers
    assert [call.layer for call in calls] == list(patch.layers) == list(range(layers))
    assert calls[-1].query.shape == (2, 4, 150, 32)
    assert calls[-1].key.shape == calls[-1].value.shape == (2, 2, 150, 32)
    assert calls[-1].scale == pytest.approx({"gemma3_text": 16}.get(family, 32) ** -0.5)
    assert [call.dense_reason for call in calls[-2:]] == [None, None]
    assert snapshot(model) == before


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_eager_models_keep_their_own_eager_function(tiny_model: Build, family: str) -> None:
    model, ids, calls = tiny_model(family), tokens(150), []
    assert model.config._attn_implementation == "eager"  # softcaps and sinks: what sdpa would ignore
    with torch.no_grad():
        dense = model(ids).logits
        with patch_attention(model, watch(calls)):
            assert torch.equal(model(ids).logits, dense)
    reason = {"gemma2": "logit softcapping", "gpt_oss": "attention sinks"}[family]
    assert [call.dense_reason for call in calls] == [reason] * 2


def test_what_compute_returns_is_what_the_layer_gets(tiny_model: Build) -> None:
    model, ids = tiny_model(), tokens(70)
    seen = []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    answer = torch.arange(4.0)[None, :, None, None].expand(1, 4, 70, 32)
    with torch.no_grad(), patch_attention(model, lambda call: answer if call.layer == 1 else None):
        model(ids)
    assert torch.equal(seen[0], torch.arange(4.0).repeat_interleave(32).expand(1, 70, 128))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["left padding", "right padding", "packed positions", "4D mask"])
def test_masks_reach_the_own_attention(tiny_model: Build, case: str, implementation: str) -> None:
    model, ids, calls = tiny_model("gemma3_text", attn_implementation=implementation), tokens(150, batch=2), []
    padding = torch.ones_like(ids)
    padding[0, :40] = 0
    positions = torch.cat([torch.arange(70), torch.arange(80)]).expand(2, -1)
    own = torch.ones(2, 1, 150, 150, dtype=torch.bool).tril()
    own[1, :, :, 3] = False
    inputs = {
        "left padding": {"attention_mask": padding},
        "right padding": {"attention_mask": padding.flip(1)},
        "packed positions": {"position_ids": positions, "use_cache": False},
        "4D mask": {
            "attention_mask": own if implementation == "sdpa" else torch.zeros(own.shape).masked_fill(~own, -1e9)
        },
    }[case]
    with torch.no_grad():
        dense, plain = model(ids, **inputs).logits, model(ids).logits
        assert not torch.equal(dense, plain)
        with patch_attention(model, watch(calls)):
            assert torch.equal(model(ids, **inputs).logits, dense)
    assert [call.dense_reason for call in calls] == [
        "sliding window",
        *["mask that is not plain causal (padding, packing or a static cache)"] * 2,
    ]


def test_caches(tiny_model: Build) -> None:
    from transformers import DynamicCache, StaticCache

    model, ids, reasons = tiny_model(), tokens(200), []
    steps = [(0, 128), (128, 199), (199, 200)]
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=256)):
        with torch.no_grad(), patch_attention(model, lambda call: reasons.append(call.dense_reason)):
            parts = [model(ids[:, start:stop], past_key_values=cache).logits for start, stop in steps]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-4, rtol=1e-4)
    decode, other = "decode (one query token)", "mask that is not plain causal (padding, packing or a static cache)"
    assert reasons[::2] == reasons[1::2]
    assert reasons[::2] == [None, None, decode, "static cache", other, decode]


def test_a_full_mask_of_ones_is_no_padding(tiny_model: Build) -> None:
    model, ids, calls = tiny_model(), tokens(90, batch=2), []
    with torch.inference_mode(), patch_attention(model, watch(calls)):
        model(ids, attention_mask=torch.ones_like(ids))
    assert [call.dense_reason for call in calls] == [None, None]


def test_two_models_and_a_shared_config(tiny_model: Build) -> None:
    from transformers import LlamaForCausalLM

    first, ids = tiny_model(seed=1), tokens(80)
    second, third = LlamaForCausalLM(first.config).eval(), tiny_model(seed=3)
    calls: list[list[AttentionCall]] = [[], [], []]
    patches = [patch_attention(model, watch(seen)) for model, seen in zip((first, second, third), calls, strict=True)]
    with torch.no_grad():
        for model in (first, second, third, third):
            model(ids)
        assert [len(seen) for seen in calls] == [2, 2, 4]
        patches[0].remove()
        first(ids), second(ids)
        assert [len(seen) for seen in calls] == [2, 4, 4]
    assert second.config._attn_implementation == "xcalib_sdpa"
    patches[1].remove()
    assert first.config._attn_implementation == "sdpa"
    assert third.config._attn_implementation == "xcalib_sdpa"
    patches[2].remove()


def test_patching_twice_and_removing_twice(tiny_model: Build) -> None:
    model = tiny_model()
    patch = patch_attention(model, lambda _: None)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM is patched already: call remove\(\)"):
        patch_attention(model, lambda _: None)
    patch.remove()
    patch.remove()
    assert model.config._attn_implementation == "sdpa"
    with patch_attention(model, lambda _: None) as patch:
        model.set_attn_implementation("eager")  # somebody's later choice stays
    assert model.config._attn_implementation == "eager"


def test_an_error_inside_the_block_removes_the_patch(tiny_model: Build) -> None:
    model = tiny_model()
    with pytest.raises(KeyError), patch_attention(model, lambda _: None):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_a_copy_of_a_patched_model_attends_as_before(tiny_model: Build) -> None:
    model, ids, calls = tiny_model(), tokens(80), []
    with torch.no_grad():
        dense = model(ids).logits
        with patch_attention(model, watch(calls)):
            twin = copy.deepcopy(model)
            assert torch.equal(twin(ids).logits, dense)
        assert torch.equal(twin(ids).logits, dense)
        with patch_attention(twin, watch(calls)):
            assert not calls
            twin(ids)
    assert len(calls) == 2
    assert twin.config._attn_implementation == "sdpa"


def test_a_patch_does_not_keep_the_model_alive(tiny_model: Build) -> None:
    model = tiny_model()
    gc.collect()
    patched = len(attention._patches)
    patch = patch_attention(model, lambda _: None)
    assert len(attention._patches) == patched + 2
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert len(attention._patches) == patched
    patch.remove()


def test_models_that_do_not_use_the_interface_are_refused(tiny_model: Build) -> None:
    class OwnAttention(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnAttention
    with pytest.raises(ModelError, match="LlamaForCausalLM does not use transformers' AttentionInterface"):
        patch_attention(model, lambda _: None)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ModelError, match="Linear is not a transformers model"):
        patch_attention(torch.nn.Linear(2, 2), lambda _: None)


def test_a_config_that_cannot_be_switched_is_refused(tiny_model: Build) -> None:
    model = tiny_model()

    class Stubborn(type(model.config)):  # type: ignore[misc]
        _attn_implementation = property(lambda _: "sdpa", lambda _self, _value: None)

    model.config.__class__ = Stubborn
    before = snapshot(model)
    with pytest.raises(ModelError, match="LlamaForCausalLM does not let its attention implementation be changed"):
        patch_attention(model, lambda _: None)
    assert snapshot(model) == before
    assert not any(module in attention._patches for module in model.modules())


def test_encoder_decoders_and_doubled_layers_are_refused(tiny_model: Build) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=32, **sizes))
    with pytest.raises(ModelError, match="BartForConditionalGeneration is an encoder-decoder"):
        patch_attention(bart, lambda _: None)
    model = tiny_model()
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(ModelError, match="LlamaAttention and LlamaAttention both are layer 0"):
        patch_attention(model, lambda _: None)


def test_only_the_text_decoder_of_a_multi_modal_model_is_patched(tiny_model: Build) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=tiny_model("gemma3_text").config.to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=127,
    )
    model, ids, calls = Gemma3ForConditionalGeneration(config).eval(), tokens(100), []
    next(m for m in model.modules() if type(m).__name__ == "SiglipAttention").layer_idx = 0
    configs = (model.config, model.config.text_config, model.config.vision_config)
    before = [config._attn_implementation for config in configs]
    with torch.no_grad():
        dense = model(ids).logits
        with patch_attention(model, watch(calls)):
            assert [config._attn_implementation for config in configs] == [before[0], f"xcalib_{before[1]}", before[2]]
            assert torch.equal(model(ids).logits, dense)
    assert [call.layer for call in calls] == [0, 1, 2]
    assert [config._attn_implementation for config in configs] == before


def test_own_implementations_run_under_their_own_name(tiny_model: Build) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    names = []

    def custom(module: Any, *arguments: Any, **kwargs: Any) -> Any:
        names.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *arguments, **kwargs)

    AttentionInterface.register("custom_for_tests", custom)
    AttentionMaskInterface.register("custom_for_tests", sdpa_mask)
    model, calls = tiny_model(attn_implementation="custom_for_tests"), []
    with torch.no_grad(), patch_attention(model, watch(calls)):
        model(tokens(80))
        assert model.config._attn_implementation == "xcalib_custom_for_tests"
    assert names == ["custom_for_tests"] * 2
    assert [call.dense_reason for call in calls] == ["not causal"] * 2  # what its missing mask means is not known


def test_compiled_models(tiny_model: Build) -> None:
    model, ids, calls = tiny_model(), tokens(80), []
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        with patch_attention(model, watch(calls)):
            compiled = torch.compile(model, backend="eager")
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, dense)
            assert len(calls) == 2
            compiled(ids[:, :1], use_cache=False)
            assert len(calls) == 2  # single tokens are compiled with the model's own attention
    torch.compiler.reset()
