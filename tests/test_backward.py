"""The backward pass against autograd through the model's own attention, and the Fisher matrices against loops over tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from xcalib.collect import CollectSettings
from xcalib.collect.backward import differentiable, masked_attention
from xcalib.collect.fisher import FisherMeter, square_roots
from xcalib.errors import ModelError
from xcalib.kernels import block_sparse_attention, estimate_blocks, select_blocks
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.structure import attention_layers

Build = Callable[..., Any]

SETTINGS = CollectSettings(block_size=64, grid=(0.0, 0.4, 0.7, 1.0), gain_every=5)


def random_tensors(length: int, q_heads: int, k_heads: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length + q_heads)
    shapes = [(batch, heads, length, 32) for heads in (q_heads, k_heads, k_heads)]
    return tuple(torch.randn(shape, generator=generator).requires_grad_(True) for shape in shapes)


def dense_weights(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention probabilities, spelled out: ``(batch, q_heads, length, length)``."""
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    logits = (query * scale) @ key.repeat_interleave(group, 1).mT
    return logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


# --- attention that autograd can follow


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 1200),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)]),
    batch=st.integers(1, 2),
    tau=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]),
    block_size=st.sampled_from([64, 128]),
)
def test_masked_attention_is_the_kernels(
    length: int, heads: tuple[int, int], batch: int, tau: float, block_size: int
) -> None:
    query, key, value = random_tensors(length, *heads, batch)
    with torch.no_grad():
        scores = estimate_blocks(query, key, block_size=block_size, scale=0.3)
        mask = select_blocks(scores, tau, q_len=length, k_len=length, block_size=block_size)
        expected = block_sparse_attention(query, key, value, mask, block_size=block_size, scale=0.3)
        found = masked_attention(query, key, value, mask, block_size=block_size, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 200, 512, 700])
def test_gradients_of_dense_attention(length: int) -> None:
    tensors = random_tensors(length, 4, 2)
    query, key, value = tensors
    weights = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
    expected = dense_weights(query, key, 0.3) @ value.repeat_interleave(2, 1)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    everything = torch.ones(1, 4, -(-length // 64), -(-length // 64), dtype=torch.bool)
    for mask in (None, everything):
        found = masked_attention(query, key, value, mask, block_size=64, scale=0.3)
        for gradient, other in zip(torch.autograd.grad((found * weights).sum(), tensors), wanted, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_gradients_of_sparse_attention() -> None:
    tensors = random_tensors(700, 4, 2)
    query, key, value = tensors
    with torch.no_grad():
        mask = select_blocks(estimate_blocks(query, key, block_size=64), 0.4, q_len=700, k_len=700, block_size=64)
    assert 0.2 < float(mask.float().mean()) < 0.5
    wide = mask.repeat_interleave(64, -1).repeat_interleave(64, -2)[..., :700, :700]
    kept = dense_weights(query, key, 0.3) * wide
    expected = (kept / kept.sum(-1, keepdim=True)) @ value.repeat_interleave(2, 1)
    wanted = torch.autograd.grad(expected.square().sum(), tensors)
    found = masked_attention(query, key, value, mask, block_size=64, scale=0.3)
    for gradient, other in zip(torch.autograd.grad(found.square().sum(), tensors), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4)


# --- gradients through a model


def head_outputs_and_loss(model: Any, tokens: torch.Tensor, drawn: torch.Tensor) -> tuple[list[Any], torch.Tensor]:
    """Every layer's attention output ``(1, heads, length, head_dim)`` in the graph, and the sum of log p(drawn)."""
    outputs: list[torch.Tensor] = []

    def compute(call: AttentionCall) -> torch.Tensor:
        group = call.query.shape[1] // call.key.shape[1]
        outputs.append(dense_weights(call.query, call.key, call.scale) @ call.value.repeat_interleave(group, 1))
        return outputs[-1]

    with patch_attention(model, compute, gradients=True), torch.enable_grad():
        logits = model(tokens[None]).logits[0, SETTINGS.gain_every - 1 :: SETTINGS.gain_every]
    return outputs, functional.log_softmax(logits.float(), -1).gather(-1, drawn).sum()


def drawn_tokens(model: Any, tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """What the meter draws: int64 ``(positions, 1)``."""
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, SETTINGS.gain_every - 1 :: SETTINGS.gain_every]
    probability = functional.log_softmax(logits.float(), -1).exp()
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.multinomial(rows, 1, generator=generator) for rows in probability.split(256)])


@pytest.mark.parametrize(
    ("family", "overrides", "length"),
    [("llama", {"num_hidden_layers": 1}, 150), ("llama", {"num_hidden_layers": 3}, 600), ("qwen3", {}, 200), ("phi3", {}, 200)],
    ids=["one-layer", "llama", "qwen3", "phi3"],
)  # fmt: skip
def test_gram_equals_autograd(tiny_model: Build, family: str, overrides: dict[str, Any], length: int) -> None:
    """Without checkpoints, chunks or hooks, from the model's own logits; token by token."""
    model = tiny_model(family, **overrides)
    tokens = torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(0))
    layers = [layer.index for layer in attention_layers(model)]
    outputs, score = head_outputs_and_loss(model, tokens, drawn_tokens(model, tokens, seed=7))
    gradients = torch.autograd.grad(score, outputs)
    steps: list[int] = []
    gram = FisherMeter(model, SETTINGS).gram(tokens, layers, seed=7, advance=steps.append)
    assert (gram.shape, gram.dtype) == ((len(layers), 4, 32, 32), np.float64)
    assert steps == [1] * len(layers)
    for row, gradient in enumerate(gradients):
        expected = torch.zeros(4, 32, 32, dtype=torch.float64)
        for token in range(length):
            vectors = gradient[0, :, token].double()  # (heads, head_dim)
            expected += vectors[:, :, None] * vectors[:, None, :]
        np.testing.assert_allclose(gram[row], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_gram_is_seeded(tiny_model: Build) -> None:
    model = tiny_model()
    tokens = torch.arange(3, 120)
    meter = FisherMeter(model, SETTINGS)
    first, again, other = (meter.gram(tokens, [0, 1], seed) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert np.abs(first - other).max() > 0.01 * np.abs(first).max()


def test_gram_of_some_layers(tiny_model: Build) -> None:
    """A sliding layer in front keeps its own attention; the first gradients begin behind it."""
    model = tiny_model("gemma3_text")
    gram = FisherMeter(model, SETTINGS).gram(torch.arange(3, 120), [1, 2], 0)
    assert gram.shape == (2, 4, 32, 32)
    assert (np.linalg.eigvalsh(gram)[..., -1] > 0).all()


def test_gradients_that_are_not_finite_are_refused(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    meter = FisherMeter(model, SETTINGS)
    nothing = torch.tensor(torch.nan)
    monkeypatch.setattr(FisherMeter, "_score_gradient", lambda _s, hidden, _g: torch.full_like(hidden, nothing))
    with pytest.raises(ModelError, match=r"^layer \d of LlamaForCausalLM: its gradients hold NaN or infinite numbers$"):
        meter.gram(torch.arange(3, 120), [0, 1], 0)


def test_square_roots() -> None:
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(3, 8, 8)) * np.array([1e-3, 1.0, 0.0])[:, None, None]
    factors[0, :, 2:] = 0  # of rank 2
    matrices = factors @ factors.swapaxes(-1, -2)
    roots = square_roots(matrices - 1e-18 * np.eye(8))  # rounding leaves eigenvalues a little below 0
    assert (roots.dtype, roots.shape) == (torch.float32, (3, 8, 8))
    for root, matrix in zip(roots.double().numpy(), matrices, strict=True):
        np.testing.assert_allclose(root @ root.T, matrix, atol=1e-6 * max(matrix.max(), 1e-12))


def test_errors_are_what_outputs_lose(tiny_model: Build) -> None:
    """1/2 d^T F d, from the outputs of the sparse and the dense kernel."""
    model = tiny_model()
    tokens = torch.randint(3, 128, (330,), generator=torch.Generator().manual_seed(0))
    meter = FisherMeter(model, SETTINGS)
    covariance = meter.gram(tokens, [0, 1], 0) / len(tokens)
    roots = {layer: square_roots(covariance[layer]) for layer in (0, 1)}
    found = meter.errors(tokens, roots)
    expected = np.zeros_like(found)

    def compute(call: AttentionCall) -> None:
        scores = estimate_blocks(call.query, call.key, block_size=64, scale=call.scale, pattern=SETTINGS.pattern)
        outputs = []
        for tau in SETTINGS.grid:
            mask = select_blocks(scores, tau, q_len=330, k_len=330, block_size=64, order=SETTINGS.order)
            outputs.append(
                block_sparse_attention(call.query, call.key, call.value, mask, block_size=64, scale=call.scale)
            )
        for level, output in enumerate(outputs):
            change = (output - outputs[-1])[0].double().numpy()  # (heads, length, head_dim)
            expected[call.layer, :, level] = np.einsum("htd,hde,hte->h", change, covariance[call.layer], change) / 2

    with torch.no_grad(), patch_attention(model, compute):
        model(tokens[None])
    assert (found[..., -1] == 0).all() and (found[..., 0] > 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_fisher_is_the_hessian_of_the_kl(tiny_model: Build) -> None:
    """One layer and one compared position, the last: only its own output counts there, and no approximation is left."""
    model = tiny_model(num_hidden_layers=1)
    tokens = torch.randint(3, 128, (15,), generator=torch.Generator().manual_seed(0))
    meter = FisherMeter(model, dataclasses.replace(SETTINGS, gain_every=15))
    change = 0.03 * torch.randn(32, generator=torch.Generator().manual_seed(1))

    def changed(call: AttentionCall) -> torch.Tensor:
        output = dense_weights(call.query, call.key, call.scale) @ call.value.repeat_interleave(2, 1)
        output[0, 1, -1] += change
        return output

    with torch.no_grad():
        dense = functional.log_softmax(model(tokens[None]).logits[0, -1].double(), -1)
        with patch_attention(model, changed):
            other = functional.log_softmax(model(tokens[None]).logits[0, -1].double(), -1)
    kl = float((dense.exp() * (dense - other)).sum())
    vector = change.double().numpy()
    draws = np.array([vector @ meter.gram(tokens, [0], seed)[0, 1] @ vector / 2 for seed in range(300)])
    spread = draws.std() / len(draws) ** 0.5
    assert spread < 0.1 * kl
    assert draws.mean() == pytest.approx(kl, abs=3 * spread)


# --- the model is left alone


def state(model: Any) -> tuple[Any, ...]:
    flags = [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]
    forwards = [vars(module).get("forward") for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return flags, forwards, hooks, model.config._attn_implementation, torch.is_grad_enabled(), model.training


@pytest.fixture
def mixed(tiny_model: Build) -> Any:
    """A model with a frozen parameter, and a block whose forward is the instance's own."""
    model = tiny_model()
    model.get_output_embeddings().weight.requires_grad_(False)
    block = attention_layers(model)[1].block
    block.forward = block.forward
    return model


def test_the_model_is_left_as_it_was(mixed: Any) -> None:
    before = state(mixed)
    FisherMeter(mixed, SETTINGS).gram(torch.arange(3, 120), [0, 1], 0)
    assert state(mixed) == before


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_model_is_left_as_it_was_after_an_exception(
    mixed: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(mixed)

    def stop(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"xcalib.collect.fisher.{'masked_attention' if where == 'forward' else '_gram'}", stop)
    with pytest.raises(KeyboardInterrupt):
        FisherMeter(mixed, SETTINGS).gram(torch.arange(3, 120), [0, 1], 0)
    assert state(mixed) == before


def test_gradients_flow_to_activations_only(mixed: Any) -> None:
    with differentiable(mixed):
        assert not any(parameter.requires_grad for parameter in mixed.parameters())
        assert torch.is_grad_enabled()
        assert not mixed(torch.arange(3, 50)[None]).logits.requires_grad
    assert sum(parameter.requires_grad for parameter in mixed.parameters()) == len(list(mixed.parameters())) - 1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpointed_blocks_give_the_same_gradients(tiny_model: Build, family: str) -> None:
    model = tiny_model(family, num_hidden_layers=3)
    embedded = model.get_input_embeddings()(torch.arange(3, 120)[None]).detach()
    calls: list[int] = []
    hook = attention_layers(model)[0].attention.register_forward_hook(lambda *_: calls.append(1))

    def gradient() -> torch.Tensor:
        inputs = embedded.clone().requires_grad_(True)
        model(inputs_embeds=inputs).logits.square().sum().backward()
        assert inputs.grad is not None
        return inputs.grad

    plain = gradient()
    model.zero_grad()
    with differentiable(model):
        checkpointed = gradient()
    hook.remove()
    assert len(calls) == 1 + 2  # the block was computed again
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))
