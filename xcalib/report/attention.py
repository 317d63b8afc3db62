"""Pictures of a few heads' attention: block scores of one sample, and what was kept of them at their tau."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xcalib.data import Sample
from xcalib.kernels import estimate_blocks, select_blocks, visible_blocks
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.logits import LogitHead
from xcalib.models.placement import input_device
from xcalib.models.sparse import SparsePlan
from xcalib.profile import Profile
from xcalib.report.raster import Colour, data_uri, indexed_png
from xcalib.runtime import check_fits, sparse_plan

__all__ = ["AttentionPicture", "attention_pictures"]

PICTURES = 6
MOST_BLOCKS = 160  # pixels a side; longer samples are pooled
LEVELS = 24
FAINTEST = 1e-4  # probability of a block that is drawn as the darkest
# Cividis at 0, 1/8, ... 1.
_CIVIDIS = ((0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120), (165, 156, 116))
_CIVIDIS += ((195, 179, 105), (254, 232, 56))  # fmt: skip
_CLEAR: Colour = (0, 0, 0, 0)
_KEPT: Colour = (0, 114, 178, 255)
_LEFT_OUT: Colour = (128, 128, 128, 56)


@dataclass(frozen=True)
class AttentionPicture:
    """One head on one sample.

    Attributes:
        layer: of the head.
        head: of the layer.
        tau: of the operating point.
        density: blocks kept over visible ones, on this sample.
        place: the head's place among all by density, in words.
        blocks: of the sample, a side.
        tokens: of the sample.
        source: the sample's data.
        scores: data URI of the PNG of block scores, log scale.
        kept: data URI of the PNG of the blocks that are kept.
    """

    layer: int
    head: int
    tau: float
    density: float
    place: str
    blocks: int
    tokens: int
    source: str
    scores: str
    kept: str


def attention_pictures(
    model: Any, profile: Profile, sample: Sample, point: str | None = None, count: int = PICTURES
) -> tuple[AttentionPicture, ...]:
    """Heads of evenly spread density, from the least to the most, as the model attends densely to ``sample``.

    Args:
        model: a transformers causal language model, the profile's.
        profile: whose thresholds choose blocks.
        sample: whose tokens are prefilled, twice.
        point: operating point, None for the default.
        count: heads at most.

    Returns:
        One picture for each head; none where the sample is shorter than the profile's first length bin.

    Raises:
        ModelError: the model is not the profile's.
    """
    check_fits(model, profile)
    plan = sparse_plan(profile, point)
    length_bin = plan.bin_index(len(sample.tokens))
    if length_bin is None:
        return ()
    density: dict[tuple[int, int], float] = {}

    def look(call: AttentionCall, _scores: torch.Tensor, mask: torch.Tensor, shares: torch.Tensor) -> None:
        density.update({(call.layer, head): float(share) for head, share in enumerate(shares)})

    _run(model, plan, length_bin, sample, look)
    ranked = sorted(density, key=lambda place: (density[place], place))
    if not ranked:
        return ()
    ranks = sorted({round(rank) for rank in np.linspace(0, len(ranked) - 1, min(count, len(ranked)))})
    chosen = {ranked[rank]: _place(rank, len(ranked)) for rank in ranks}
    drawn: dict[tuple[int, int], AttentionPicture] = {}

    def draw(call: AttentionCall, scores: torch.Tensor, mask: torch.Tensor, shares: torch.Tensor) -> None:
        for layer, head in chosen:
            if layer == call.layer:
                blocks = (scores[head].float().cpu().numpy(), mask[head].cpu().numpy())
                tau = float(plan.thresholds[length_bin, layer, head])
                drawn[layer, head] = _picture(
                    layer, head, tau, float(shares[head]), chosen[layer, head], blocks, sample
                )

    _run(model, plan, length_bin, sample, draw)
    return tuple(drawn[place] for place in chosen)


def _place(rank: int, heads: int) -> str:
    if rank in (0, heads - 1):
        return "lowest density" if rank == 0 else "highest density"
    return f"lower than {100 * (heads - 1 - rank) / (heads - 1):.0f} % of the heads"


def _run(model: Any, plan: SparsePlan, length_bin: int, sample: Sample, see: Any) -> None:
    """One dense prefill; ``see`` gets scores and masks ``(heads, blocks, blocks)`` and densities ``(heads,)`` of sparse layers."""
    visible = None

    def compute(call: AttentionCall) -> None:
        nonlocal visible
        length = call.key.shape[2]
        if call.dense_reason is not None or call.layer in plan.dense_layers or call.query.shape[2] != length:
            return
        taus = plan.thresholds[length_bin, call.layer].to(call.query.device)
        if call.query.shape[1] != len(taus):
            return
        size = {"q_len": length, "k_len": length, "block_size": plan.block_size}
        scores = estimate_blocks(
            call.query, call.key, stride=plan.stride, block_size=plan.block_size, scale=call.scale, pattern=plan.pattern
        )
        mask = select_blocks(scores, taus, order=plan.order, **size)
        if visible is None:
            visible = visible_blocks(length, length, block_size=plan.block_size).to(mask.device)
        shares = (mask & visible).sum((-2, -1))[0] / visible.sum()
        see(call, scores[0], mask[0], shares)

    with torch.inference_mode(), patch_attention(model, compute):
        tokens = torch.tensor(sample.tokens, device=input_device(model))
        LogitHead(model).prefill(tokens, use_cache=False)


def _picture(
    layer: int,
    head: int,
    tau: float,
    density: float,
    place: str,
    blocks: tuple[np.ndarray, np.ndarray],
    sample: Sample,
) -> AttentionPicture:
    scores, mask = blocks
    side = len(scores)
    visible = np.tril(np.ones((side, side), dtype=bool))
    return AttentionPicture(
        layer=layer,
        head=head,
        tau=tau,
        density=density,
        place=place,
        blocks=side,
        tokens=len(sample.tokens),
        source=sample.source,
        scores=data_uri(indexed_png(_score_indices(scores, visible), [_CLEAR, *_colours()])),
        kept=data_uri(indexed_png(_mask_indices(mask, visible), [_CLEAR, *_shades()])),
    )


def _score_indices(scores: np.ndarray, visible: np.ndarray) -> np.ndarray:
    strength = np.log(np.maximum(scores, FAINTEST) / FAINTEST) / np.log(1 / FAINTEST)
    level = 1 + np.rint(np.clip(strength, 0, 1) * (LEVELS - 1))
    return _pooled(np.where(visible, level, 0), np.max).astype(np.uint8)


def _mask_indices(mask: np.ndarray, visible: np.ndarray) -> np.ndarray:
    kept, there = _pooled((mask & visible).astype(float), np.sum), _pooled(visible.astype(float), np.sum)
    share = kept / np.maximum(there, 1)
    return np.where(there > 0, 1 + np.rint(share * (LEVELS - 1)), 0).astype(np.uint8)


def _pooled(values: np.ndarray, how: Any) -> np.ndarray:
    """At most MOST_BLOCKS a side; groups of neighbours are one pixel."""
    group = -(-len(values) // MOST_BLOCKS)
    side = -(-len(values) // group)
    padded = np.zeros((side * group, side * group))
    padded[: len(values), : len(values)] = values
    return how(padded.reshape(side, group, side, group), axis=(1, 3))


def _colours() -> list[Colour]:
    places = np.linspace(0, len(_CIVIDIS) - 1, LEVELS)
    channels = [
        np.interp(places, range(len(_CIVIDIS)), [colour[channel] for colour in _CIVIDIS]) for channel in range(3)
    ]
    return [(round(red), round(green), round(blue), 255) for red, green, blue in zip(*channels, strict=True)]


def _shades() -> list[Colour]:
    return [
        (r, g, b, a)
        for r, g, b, a in (
            tuple(round(low + (high - low) * place) for low, high in zip(_LEFT_OUT, _KEPT, strict=True))
            for place in np.linspace(0, 1, LEVELS)
        )
    ]
