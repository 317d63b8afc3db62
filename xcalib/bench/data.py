"""Random inputs whose attention is structured as trained models' is, and thresholds that keep a wanted share of it.

Noise of one size everywhere would make every block weigh the same: no threshold would find anything to drop.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from xcalib.kernels import block_density, select_blocks

__all__ = ["Inputs", "copies", "structured_inputs", "thresholds_for_density"]

SINKS = 4
TOKENS_PER_VERTICAL = 700
TOPICS = 24
MEAN_SEGMENT = 400
LONGEST_PERIOD = 32_768.0
MOST_COPIES = 8


@dataclass(frozen=True)
class Inputs:
    """``(batch, q_heads, L, D)`` and twice ``(batch, k_heads, L, D)``, contiguous."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.query, self.key, self.value))

    def clone(self) -> "Inputs":
        return Inputs(self.query.clone(), self.key.clone(), self.value.clone())


@dataclass(frozen=True)
class _Layout:
    """Where a sequence's structure lies: fp32 features of its tokens, and which tokens are special.

    Attributes:
        waves: ``(L, 2 n)``, sines and cosines whose products depend on the distance of two tokens: a local band.
        topics: ``(L, T)`` one-hot; tokens of one topic lie in segments far apart.
        sinks: bool ``(L,)``, the first tokens.
        verticals: bool ``(L,)``, tokens that many queries look at.
    """

    waves: torch.Tensor
    topics: torch.Tensor
    sinks: torch.Tensor
    verticals: torch.Tensor


def structured_inputs(
    length: int,
    *,
    batch: int,
    q_heads: int,
    k_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Inputs:
    """Queries and keys with sinks, a local band, verticals and recurring topics, each head with strengths of its own.

    A head's features share its dimensions: two for sinks and verticals, a quarter for the band, a quarter for topics, the
    rest noise. One head is made at a time.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    query = torch.empty((batch, q_heads, length, head_dim), dtype=dtype, device=device)
    key = torch.empty((batch, k_heads, length, head_dim), dtype=dtype, device=device)
    group = q_heads // k_heads
    for sequence in range(batch):
        layout = _layout(length, head_dim, device, generator)
        directions = _directions(layout.topics.shape[1], head_dim // 4, device, generator)
        for k_head in range(k_heads):
            key[sequence, k_head] = _key_features(layout, directions, head_dim, generator)
            for q_head in range(k_head * group, (k_head + 1) * group):
                query[sequence, q_head] = _query_features(layout, directions, head_dim, generator)
    value = torch.randn((batch, k_heads, length, head_dim), generator=generator, device=device, dtype=dtype)
    return Inputs(query, key, value)


def _layout(length: int, head_dim: int, device: torch.device, generator: torch.Generator) -> _Layout:
    positions = torch.arange(length, device=device, dtype=torch.float32)
    waves = head_dim // 8
    periods = torch.logspace(math.log10(64.0), math.log10(LONGEST_PERIOD), waves, device=device)
    angles = positions[:, None] * (2 * math.pi / periods)
    starts = torch.rand(length, generator=generator, device=device) < 1 / MEAN_SEGMENT
    segment_topics = torch.randint(TOPICS, (length + 1,), generator=generator, device=device)
    topics = torch.nn.functional.one_hot(segment_topics[starts.long().cumsum(0)], TOPICS).float()
    verticals = torch.rand(length, generator=generator, device=device) < 1 / TOKENS_PER_VERTICAL
    return _Layout(torch.cat([angles.sin(), angles.cos()], -1), topics, positions < SINKS, verticals)


def _directions(count: int, dims: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn((count, dims), generator=generator, device=device), dim=-1)


def _key_features(layout: _Layout, directions: torch.Tensor, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    special = torch.stack([layout.sinks.float(), layout.verticals.float()], -1)
    structure = torch.cat([special, layout.waves, layout.topics @ directions], -1)
    return _with_noise(structure, head_dim, generator)


def _query_features(
    layout: _Layout, directions: torch.Tensor, head_dim: int, generator: torch.Generator
) -> torch.Tensor:
    """Strengths are logits that a feature's match adds, log-uniform per head."""

    def strength(low: float, high: float) -> float:
        share = float(torch.rand((), generator=generator, device=generator.device))
        return float(low * (high / low) ** share)

    root = math.sqrt(head_dim)
    special = layout.sinks.new_tensor([strength(6.0, 16.0), strength(2.0, 9.0)], dtype=torch.float32)
    waves = layout.waves * (strength(1.0, 8.0) / (layout.waves.shape[1] / 2))
    topics = layout.topics @ directions * strength(0.5, 6.0)
    structure = torch.cat([special.expand(len(waves), -1), waves, topics], -1) * root
    return _with_noise(structure, head_dim, generator)


def _with_noise(structure: torch.Tensor, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """Pads with noise of variance one to ``(L, head_dim)``."""
    shape = (len(structure), head_dim - structure.shape[1])
    return torch.cat([structure, torch.randn(shape, generator=generator, device=structure.device)], -1)


def copies(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """The inputs at as many addresses as it takes to leave the GPU's second-level cache twice over before one comes again."""
    if device.type != "cuda":
        return [inputs]
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    count = min(MOST_COPIES, max(1, math.ceil(3 * cache / inputs.bytes)))
    return [inputs, *(inputs.clone() for _ in range(count - 1))]


def thresholds_for_density(
    scores: torch.Tensor,
    density: float,
    length: int,
    block_size: int,
    select: Callable[..., torch.Tensor] = select_blocks,
) -> tuple[torch.Tensor, float]:
    """Per-head thresholds, spread as a search spreads them, with which the mean density comes closest to the wanted one.

    Args:
        scores: fp32 ``(batch, q_heads, q_blocks, k_blocks)``.
        density: wanted, over all heads.
        length: queries and keys.
        block_size: tokens per block.
        select: for tests.

    Returns:
        (fp32 ``(q_heads,)``, the density that they give: what is always kept may be more than was wanted).
    """
    heads = scores.shape[1]
    # what a head drops differs by a factor of up to four, in an order that has nothing to do with the heads' strengths
    spread = 2.0 ** (2 * ((torch.arange(heads) * 0.618034) % 1.0) - 1)

    def reached(drop: float) -> tuple[torch.Tensor, float]:
        thresholds = (1 - drop * spread).clamp(0.0, 1.0)
        mask = select(scores, thresholds, q_len=length, k_len=length, block_size=block_size)
        found = block_density(mask, q_len=length, k_len=length, block_size=block_size)
        return thresholds, float(found.double().mean())

    low, high = 0.0, 2.0
    best = min((reached(low), reached(high)), key=lambda pair: abs(pair[1] - density))
    for _ in range(14):
        middle = (low + high) / 2
        candidate = reached(middle)
        best = min(best, candidate, key=lambda pair: abs(pair[1] - density))
        low, high = (middle, high) if candidate[1] > density else (low, middle)
    return best
