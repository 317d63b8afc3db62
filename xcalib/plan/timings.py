"""Small layers of every kind, timed on one device."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from xcalib.collect.backward import masked_attention
from xcalib.collect.curves import DEFAULT_GRID
from xcalib.kernels import block_sparse_attention, estimate_blocks, select_blocks, sweep_thresholds
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.reference import block_levels
from xcalib.kernels.slopes import sweep_slopes
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.logits import LogitHead
from xcalib.models.structure import attention_layers, compact_projection, decoder_of, head_projection
from xcalib.plan import cost
from xcalib.plan.cost import Work
from xcalib.plan.machine import Timing
from xcalib.plan.shape import ModelShape, shape_of

__all__ = ["Clock", "Heads", "attention_timings", "model_timings", "own_time"]

LEVELS = len(DEFAULT_GRID)
STRIDE = 16
FAR = 40  # times the queries: weights of what is always kept are then too small for fp32, and the reference takes fp64


@dataclass(frozen=True)
class Heads:
    """Attention of one layer: query heads, key heads, dimensions of a head, tokens, block size."""

    query: int
    key: int
    dimensions: int
    length: int
    block_size: int


class Clock:
    def __init__(self, device: torch.device, least: float) -> None:
        self.device = device
        self.least = least
        self._now = time.process_time if own_time(device) else time.perf_counter

    def __call__(self, call: Callable[[], Any], most: int = 50) -> float:
        """Median seconds of a call, after one that is not counted."""
        call()
        seconds: list[float] = []
        while not seconds or (sum(seconds) < self.least and len(seconds) < most):
            self._wait()
            start = self._now()
            call()
            self._wait()
            seconds.append(self._now() - start)
        return float(torch.tensor(seconds).median())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def own_time(device: torch.device) -> bool:
    return device.type == "cpu" and torch.get_num_threads() == 1


def attention_timings(size: Heads, clock: Clock, dtype: torch.dtype) -> Iterator[Timing]:
    generator = torch.Generator(clock.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=clock.device, dtype=dtype)
    query, gradient = (draw(1, size.query, size.length, size.dimensions) for _ in range(2))
    key, value = (draw(1, size.key, size.length, size.dimensions) for _ in range(2))
    shape = (size.query, size.dimensions, size.length)
    rule: dict[str, Any] = {"stride": STRIDE, "block_size": size.block_size}
    label = f"{size.query}/{size.key} heads of {size.dimensions}, {size.length} tokens, blocks of {size.block_size}"

    def timed(what: str, work: Work, call: Callable[[], Any]) -> Timing:
        return Timing(f"{what}: {label}", work, clock(call))

    with torch.inference_mode():
        scores = estimate_blocks(query, key, **rule)
        scored = cost.scoring(*shape, **rule)
        yield timed("scoring", scored, lambda: estimate_blocks(query, key, **rule))
        yield timed("attention", cost.attention(*shape), lambda: _own_attention(query, key, value))
        for tau in (0.2, 0.5):
            select = partial(
                select_blocks,
                scores,
                tau,
                q_len=size.length,
                k_len=size.length,
                block_size=size.block_size,
                order="recent",
            )
            mask = select()
            density = float(mask.sum()) / (
                size.query * Geometry(size.length, size.length, size.block_size, True).visible_count
            )
            kept = cost.sparse(*shape, density, block_size=size.block_size)
            attend = partial(block_sparse_attention, query, key, value, mask, block_size=size.block_size)
            yield timed("sparse", kept, attend)
        yield timed("selection", cost.selection(size.query, size.length, block_size=size.block_size), select)
        for factor in (1, FAR) if clock.device.type == "cpu" else (1,):
            yield timed("sweep", *_sweep(query * factor, key, value, size, scored))
    yield timed("masked", cost.masked(*shape), lambda: _masked(query, key, value, gradient, size))
    with torch.inference_mode():
        yield timed("slopes", *_slopes(query, key, value, gradient, scores, size))


def _own_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True, training=False)
    return sdpa_attention_forward(module, query, key, value, None, scaling=query.shape[-1] ** -0.5)


def _sweep(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, size: Heads, scored: Work
) -> tuple[Work, Callable[[], Any]]:
    hidden = size.query * size.dimensions
    projection = torch.randn(size.query, size.dimensions, size.dimensions, device=query.device)
    grid = torch.tensor(DEFAULT_GRID, dtype=torch.float64)
    output = query.transpose(1, 2).flatten(2)
    shape = (size.query, size.dimensions, size.length, hidden)
    double = float(float(query.std()) > 2)
    work = cost.sweep(*shape, block_size=size.block_size, levels=LEVELS, double=double)
    options: dict[str, Any] = {"stride": STRIDE, "block_size": size.block_size, "order": "recent"}

    def call() -> None:
        sweep_thresholds(query, key, value, grid, projection, **options)
        float(output.float().double().square().sum())  # the layer's energy

    return scored + work, call


def _masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, size: Heads) -> None:
    tensors = [tensor.detach().clone().requires_grad_(True) for tensor in (query, key, value)]
    scale = size.dimensions**-0.5

    def attend(*three: torch.Tensor) -> torch.Tensor:
        # what follows asks for the output, as in a decoder block: only then is all of it computed again
        query, key, value = three
        return masked_attention(query, key, value, None, block_size=size.block_size, scale=scale).square()

    with torch.enable_grad():
        checkpoint(attend, *tensors, use_reentrant=False).backward(gradient)


def _slopes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gradient: torch.Tensor,
    scores: torch.Tensor,
    size: Heads,
) -> tuple[Work, Callable[[], Any]]:
    grid = torch.tensor(DEFAULT_GRID, dtype=torch.float64, device=query.device)
    level = block_levels(scores, grid, Geometry(size.length, size.length, size.block_size, True), "recent")
    work = cost.slopes(size.query, size.dimensions, size.length, block_size=size.block_size, levels=LEVELS)
    options: dict[str, Any] = {"block_size": size.block_size, "scale": size.dimensions**-0.5}
    return work, lambda: sweep_slopes(query, key, value, gradient, level, LEVELS, **options)


def model_timings(
    numbers: tuple[int, int, int, int, int], lengths: Sequence[int], positions: int, clock: Clock, dtype: torch.dtype
) -> Iterator[Timing]:
    model = _random_model(numbers, max(lengths), clock.device, dtype)
    shape = shape_of(model)
    label = f"hidden {shape.hidden}, MLP {shape.intermediate}, vocabulary {shape.vocabulary}"
    decoder, head = decoder_of(model), LogitHead(model)

    def skip(call: AttentionCall) -> torch.Tensor:
        return call.query

    with torch.inference_mode():
        for length in lengths:
            tokens = torch.randint(shape.vocabulary, (1, length), device=clock.device)
            with patch_attention(model, skip):
                seconds = clock(partial(decoder, input_ids=tokens, use_cache=False))
            yield Timing(f"linear: {label}, {length} tokens", cost.linear(shape, length), seconds)
        for number, sets in ((positions, 4), (2 * positions, 2)):
            states = [torch.randn(number, shape.hidden, device=clock.device, dtype=dtype) for _ in range(sets)]
            seconds = clock(partial(head.kl, states[0], states[1:]))
            yield Timing(f"logits: {label}, {number} positions", cost.logits(shape, number, sets), seconds)
    yield _projection_timing(model, shape, clock, label)


def _projection_timing(model: Any, shape: ModelShape, clock: Clock, label: str) -> Timing:
    layers = attention_layers(model)
    seconds = clock(lambda: [compact_projection(head_projection(layer, shape.q_heads)) for layer in layers])
    return Timing(f"projection: {label}", cost.projections(shape), seconds)


def _random_model(numbers: Sequence[int], length: int, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, heads, intermediate, vocabulary = numbers
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
