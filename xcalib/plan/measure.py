"""Times the parts of a calibration on this machine, small ones, and fits its rates to them.

On one CPU thread it is the process's own time that counts, so that other programs on the machine matter little; on a GPU, and
with several threads, the time that passes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from xcalib._machine import host_memory, processor
from xcalib._yaml import one_line
from xcalib.collect.backward import masked_attention
from xcalib.collect.curves import DEFAULT_GRID
from xcalib.errors import PlanError
from xcalib.kernels import block_sparse_attention, estimate_blocks, select_blocks, sweep_thresholds
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.reference import block_levels
from xcalib.kernels.slopes import sweep_slopes
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.logits import LogitHead
from xcalib.models.structure import attention_layers, compact_projection, decoder_of, head_projection
from xcalib.plan import cost
from xcalib.plan.cost import Work
from xcalib.plan.machine import REFERENCE_ONLY, Machine, Timing, fit
from xcalib.plan.shape import ModelShape, shape_of
from xcalib.progress import Progress, silent

__all__ = ["CPU_SIZES", "GPU_SIZES", "Heads", "Sizes", "measure", "measure_machine"]

MARGIN = 0.25  # how far real runs were from what was predicted at most (docs/scale.md)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
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


@dataclass(frozen=True)
class Sizes:
    """What is timed: attention layers; models as (layers, hidden, heads, MLP, vocabulary) with lengths; how often at least."""

    heads: tuple[Heads, ...]
    models: tuple[tuple[int, int, int, int, int], ...]
    lengths: tuple[int, ...]
    positions: int
    least_seconds: float


CPU_SIZES = Sizes(
    heads=tuple(
        Heads(query, key, dimensions, length, block_size)
        for query, key, dimensions in ((8, 2, 32), (9, 3, 64), (2, 1, 128), (6, 2, 128))
        for length, block_size in ((512, 64), (1024, 128), (1536, 64), (2048, 128))
    ),
    models=((2, 128, 4, 512, 2048), (2, 256, 8, 704, 2048), (2, 576, 9, 1536, 16384)),
    lengths=(512, 1024, 2048),
    positions=128,
    least_seconds=0.2,
)
GPU_SIZES = Sizes(
    heads=tuple(
        Heads(query, key, dimensions, length, 128)
        for query, key, dimensions in ((32, 8, 128), (16, 4, 128), (16, 4, 64))
        for length in (4096, 8192, 16384, 32768)
    ),
    models=((2, 1024, 8, 3584, 32768), (2, 4096, 32, 14336, 131072)),
    lengths=(2048, 8192, 32768),
    positions=2048,
    least_seconds=0.1,
)


class _Clock:
    def __init__(self, device: torch.device, least: float) -> None:
        self.device = device
        self.least = least
        self._now = time.process_time if _own_time(device) else time.perf_counter

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


def measure(
    device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None, progress: Progress = silent
) -> list[Timing]:
    """Time small layers of every kind on one device.

    Args:
        device: where.
        dtype: of weights and activations.
        sizes: what is timed; default some that take about a minute.
        progress: draws the work.
    """
    sizes = sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES)
    clock = _Clock(device, sizes.least_seconds)
    timings: list[Timing] = []
    with progress("Timing small layers", 1 + len(sizes.heads) + len(sizes.models)) as advance:
        list(_attention_timings(sizes.heads[-1], clock, dtype))  # the first of a process takes longer
        advance(1)
        for heads in sizes.heads:
            timings += _attention_timings(heads, clock, dtype)
            advance(1)
        for numbers in sizes.models:
            timings += _model_timings(numbers, sizes, clock, dtype)
            advance(1)
    return timings


def measure_machine(
    name: str, device: str | None = None, dtype: str | None = None, progress: Progress = silent, sizes: Sizes | None = None
) -> Machine:
    """This machine's rates.

    Args:
        name: what to call it.
        device: torch device, default ``cuda`` when there is one, else ``cpu``.
        dtype: of weights; default ``bfloat16`` on a GPU, ``float32`` on a CPU.
        progress: draws the work.
        sizes: as for :func:`measure`.

    Raises:
        PlanError: the device or the dtype cannot be used.
    """
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise PlanError(f"device {device!r} cannot be used: {one_line(str(error), 120)}") from error
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise PlanError(f"dtype is {dtype!r}, allowed are {', '.join(DTYPES)}")
    timings = measure(where, DTYPES[dtype], sizes, progress)
    rates, spread = fit(timings, REFERENCE_ONLY if where.type == "cuda" else ())
    clock = "process time, one thread" if _own_time(where) else "wall time"
    memory = torch.cuda.get_device_properties(where).total_memory if where.type == "cuda" else host_memory()
    label = torch.cuda.get_device_name(where) if where.type == "cuda" else processor()
    return Machine(
        name=name,
        device=where.type,
        dtype=dtype,
        memory_bytes=memory,
        rates=rates,
        spread=spread,
        margin=MARGIN,
        assumed=(),
        link_bytes_per_second=None,
        sources=(f"{len(timings)} timings of small layers on this {label}, {dtype}, {clock}, by xcalib plan --measure",),
        measured={"processor": label, "threads": torch.get_num_threads(), "clock": clock},
    )


def _own_time(device: torch.device) -> bool:
    return device.type == "cpu" and torch.get_num_threads() == 1


def _attention_timings(size: Heads, clock: _Clock, dtype: torch.dtype) -> Iterator[Timing]:
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
                select_blocks, scores, tau, q_len=size.length, k_len=size.length, block_size=size.block_size, order="recent"
            )
            mask = select()
            density = float(mask.sum()) / (size.query * Geometry(size.length, size.length, size.block_size, True).visible_count)
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
    attend = partial(masked_attention, mask=None, block_size=size.block_size, scale=size.dimensions**-0.5)
    with torch.enable_grad():
        checkpoint(attend, *tensors, use_reentrant=False).backward(gradient)


def _slopes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, scores: torch.Tensor, size: Heads
) -> tuple[Work, Callable[[], Any]]:
    grid = torch.tensor(DEFAULT_GRID, dtype=torch.float64, device=query.device)
    level = block_levels(scores, grid, Geometry(size.length, size.length, size.block_size, True), "recent")
    work = cost.slopes(size.query, size.dimensions, size.length, block_size=size.block_size, levels=LEVELS)
    options: dict[str, Any] = {"block_size": size.block_size, "scale": size.dimensions**-0.5}
    return work, lambda: sweep_slopes(query, key, value, gradient, level, LEVELS, **options)


def _model_timings(
    numbers: tuple[int, int, int, int, int], sizes: Sizes, clock: _Clock, dtype: torch.dtype
) -> Iterator[Timing]:
    model = _random_model(numbers, max(sizes.lengths), clock.device, dtype)
    shape = shape_of(model)
    label = f"hidden {shape.hidden}, MLP {shape.intermediate}, vocabulary {shape.vocabulary}"
    decoder, head = decoder_of(model), LogitHead(model)

    def skip(call: AttentionCall) -> torch.Tensor:
        return call.query

    with torch.inference_mode():
        for length in sizes.lengths:
            tokens = torch.randint(shape.vocabulary, (1, length), device=clock.device)
            with patch_attention(model, skip):
                seconds = clock(lambda tokens=tokens: decoder(input_ids=tokens, use_cache=False))
            yield Timing(f"linear: {label}, {length} tokens", cost.linear(shape, length), seconds)
        for positions, sets in ((sizes.positions, 4), (2 * sizes.positions, 2)):
            states = [torch.randn(positions, shape.hidden, device=clock.device, dtype=dtype) for _ in range(sets)]
            seconds = clock(lambda states=states: head.kl(states[0], states[1:]))
            yield Timing(f"logits: {label}, {positions} positions", cost.logits(shape, positions, sets), seconds)
    yield _projection_timing(model, shape, clock, label)


def _projection_timing(model: Any, shape: ModelShape, clock: _Clock, label: str) -> Timing:
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


