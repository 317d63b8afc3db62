"""Pictures of a few heads' attention: block scores of one sample, and what was kept of them at their tau."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xcalib._colours import cividis
from xcalib.data import Sample
from xcalib.kernels import block_density, estimate_blocks, select_blocks
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.logits import LogitHead
from xcalib.models.placement import input_device
from xcalib.models.sparse import SparsePlan
from xcalib.profile import Profile
from xcalib.report.raster import Colour, data_uri, indexed_png
from xcalib.runtime import check_fits, sparse_plan

__all__ = ["AttentionPicture", "attention_pictures"]

Place = tuple[int, int]  # layer and head

PICTURES = 6
KEPT_BLOCKS = 50_000_000  # of all heads, 5 bytes each
MOST_BLOCKS = 160  # pixels a side; longer samples are pooled
LEVELS = 24
FAINTEST = 1e-4  # probability of a block that is drawn as the darkest
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
        sample: whose tokens are prefilled; twice where the blocks of all heads are too many to keep.
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
    side = -(-len(sample.tokens) // plan.block_size)
    keep_all = plan.thresholds[0].numel() * side**2 <= KEPT_BLOCKS
    first = _run(model, plan, length_bin, sample, None if keep_all else set())
    density: dict[Place, float] = {}
    for seen in first:
        density |= {(seen.layer, head): share for head, share in enumerate(seen.shares)}
    ranked = sorted(density, key=lambda place: (density[place], place))
    ranks = sorted({round(rank) for rank in np.linspace(0, len(ranked) - 1, min(count, len(ranked)))})
    chosen = [ranked[rank] for rank in ranks]
    again = first if keep_all else _run(model, plan, length_bin, sample, set(chosen))
    seen_again = {seen.layer: seen for seen in again}
    return tuple(
        _picture(
            place, _place(rank, len(ranked)), float(plan.thresholds[length_bin, *place]), seen_again[place[0]], sample
        )
        for rank, place in zip(ranks, chosen, strict=True)
    )


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one sparse layer saw: shares of visible blocks kept by each head, and of wanted heads scores and masks."""

    layer: int
    shares: list[float]
    blocks: dict[int, tuple[np.ndarray, np.ndarray]]  # fp32 and bool (blocks, blocks)


def _place(rank: int, heads: int) -> str:
    if rank in (0, heads - 1):
        return "lowest density" if rank == 0 else "highest density"
    return f"denser than {100 * rank / (heads - 1):.0f}\u202f% of the heads"


def _run(model: Any, plan: SparsePlan, length_bin: int, sample: Sample, wanted: set[Place] | None) -> list[_Seen]:
    """One dense prefill, looked at layer by layer; layers that cannot be sparse are left out. None wants the blocks of all."""
    found: list[_Seen] = []

    def compute(call: AttentionCall) -> None:
        length, heads = call.key.shape[2], call.query.shape[1]
        taus = plan.thresholds[length_bin, call.layer].to(call.query.device)
        if call.dense_reason is not None or call.layer in plan.dense_layers or heads != len(taus):
            return
        scores = estimate_blocks(
            call.query, call.key, stride=plan.stride, block_size=plan.block_size, scale=call.scale, pattern=plan.pattern
        )
        mask = select_blocks(scores, taus, q_len=length, k_len=length, block_size=plan.block_size, order=plan.order)
        shares = block_density(mask, q_len=length, k_len=length, block_size=plan.block_size)[0]
        blocks = {
            head: (scores[0, head].float().cpu().numpy(), mask[0, head].cpu().numpy())
            for head in range(heads)
            if wanted is None or (call.layer, head) in wanted
        }
        found.append(_Seen(call.layer, shares.tolist(), blocks))

    with torch.inference_mode(), patch_attention(model, compute):
        LogitHead(model).prefill(torch.tensor(sample.tokens, device=input_device(model)), use_cache=False)
    return found


def _picture(place: Place, rank: str, tau: float, seen: _Seen, sample: Sample) -> AttentionPicture:
    layer, head = place
    scores, mask = seen.blocks[head]
    side = len(scores)
    visible = np.tril(np.ones((side, side), dtype=bool))
    return AttentionPicture(
        layer=layer,
        head=head,
        tau=tau,
        density=seen.shares[head],
        place=rank,
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
    return [(*cividis(float(place)), 255) for place in np.linspace(0, 1, LEVELS)]


def _shades() -> list[Colour]:
    return [
        (r, g, b, a)
        for r, g, b, a in (
            tuple(round(low + (high - low) * place) for low, high in zip(_LEFT_OUT, _KEPT, strict=True))
            for place in np.linspace(0, 1, LEVELS)
        )
    ]
