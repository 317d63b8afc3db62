"""Selection in Triton: from scores, or from the scoring kernel's log-sum-exp, to the lists of kept blocks.

One program takes one row of key blocks (one query block of one head) into registers. No sort: the score at which the row's limit
is reached is found by halving, over the bit patterns (non-negative floats order like their bits). Sums are exact integers, as in
:mod:`xcalib.kernels.reference`, so the kept set is the reference's, ties included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from xcalib.kernels.geometry import Geometry
from xcalib.kernels.tuning import Config, choose, milliseconds

__all__ = [
    "MAX_BLOCKS",
    "BlockLists",
    "average_lse",
    "lists_from_mask",
    "mask_from_lists",
    "select_blocks",
    "select_from_lse",
]

MAX_BLOCKS = 8192

# A thread holds some 100 bytes for each of its blocks: few warps save reductions across warps, many hide the loads.
CANDIDATES = tuple(Config(num_warps, 1) for num_warps in (4, 1, 2, 8, 16))


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The kept key blocks of every query block.

    Attributes:
        indices: int16 ``(batch, q_heads, q_blocks, k_blocks)``, ascending; only the first ``counts`` of a row mean anything.
        counts: int32 ``(batch, q_heads, q_blocks)``.
    """

    indices: torch.Tensor
    counts: torch.Tensor


def select_blocks(
    scores: torch.Tensor, limits: torch.Tensor, geometry: Geometry, policy: str = "threshold", order: str = "score"
) -> BlockLists:
    """The set of :func:`xcalib.kernels.select_blocks`, as lists.

    Args:
        scores: fp32 ``(batch, q_heads, q_blocks, k_blocks)``, any strides; at least 0, rows that sum to less than 2,048.
            What causality hides is not read.
        limits: fp32 ``(q_heads,)``, by policy as ``threshold`` there.
        geometry: lengths and block size.
        policy: ``"threshold"``, ``"top-k"`` or ``"ratio"``.
        order: of preference, ``"score"`` or ``"recent"``.
    """
    return _select(scores, limits, geometry, policy, order, stride=0)


def select_from_lse(
    lse: torch.Tensor,
    limits: torch.Tensor,
    geometry: Geometry,
    stride: int,
    policy: str = "threshold",
    order: str = "score",
) -> BlockLists:
    """``select_blocks(average_lse(lse, geometry, stride), ...)`` in one pass; the scores never reach memory.

    Args:
        lse: fp32 ``(batch, q_heads, q_groups, k_blocks)`` from :func:`xcalib.kernels.scoring.block_lse`.
        limits: as in :func:`select_blocks`.
        geometry: lengths and block size.
        stride: tokens per row group (S).
        policy: as in :func:`select_blocks`.
        order: as in :func:`select_blocks`.
    """
    return _select(lse, limits, geometry, policy, order, stride=stride)


def average_lse(lse: torch.Tensor, geometry: Geometry, stride: int) -> torch.Tensor:
    """Block scores from log-sum-exps: each row group normalised, then the mean over a query block's groups.

    Args:
        lse: as in :func:`select_from_lse`.
        geometry: lengths and block size.
        stride: tokens per row group (S).

    Returns:
        fp32 ``(batch, q_heads, q_blocks, k_blocks)``, as :func:`xcalib.kernels.estimate_blocks`.
    """
    batch, q_heads = lse.shape[:2]
    shape = (batch, q_heads, geometry.q_blocks, geometry.k_blocks)
    scores = torch.empty(shape, dtype=torch.float32, device=lse.device)

    def launch(config: Config) -> None:
        _average_kernel[(geometry.q_blocks, q_heads, batch)](
            lse,
            *lse.stride(),
            scores,
            geometry.q_len,
            geometry.k_len,
            CAUSAL=geometry.causal,
            BLOCK_SIZE=geometry.block_size,
            STRIDE=stride,
            BLOCK_K=_row_size(geometry),
            **config.launch_arguments(),
        )

    launch(_config(geometry, lse.device, launch))
    return scores


def lists_from_mask(mask: torch.Tensor, geometry: Geometry) -> BlockLists:
    """The lists of a bool mask ``(batch, q_heads, q_blocks, k_blocks)``, any strides; what causality hides is dropped."""
    lists = _empty_lists(mask, geometry)
    batch, q_heads = mask.shape[:2]
    _list_kernel[(geometry.q_blocks, q_heads, batch)](
        mask.view(torch.uint8),
        *mask.stride(),
        lists.indices,
        lists.counts,
        geometry.q_len,
        geometry.k_len,
        CAUSAL=geometry.causal,
        BLOCK_SIZE=geometry.block_size,
        BLOCK_K=_row_size(geometry),
    )
    return lists


def mask_from_lists(lists: BlockLists, geometry: Geometry) -> torch.Tensor:
    """Bool ``(batch, q_heads, q_blocks, k_blocks)``, True where a block is listed."""
    batch, q_heads, q_blocks, k_blocks = lists.indices.shape
    mask = torch.zeros(lists.indices.shape, dtype=torch.uint8, device=lists.indices.device)
    _mask_kernel[(q_blocks, q_heads, batch)](
        lists.indices.contiguous(), lists.counts.contiguous(), mask, k_blocks, BLOCK_K=_row_size(geometry)
    )
    return mask.view(torch.bool)


def _select(
    source: torch.Tensor, limits: torch.Tensor, geometry: Geometry, policy: str, order: str, stride: int
) -> BlockLists:
    lists = _empty_lists(source, geometry)
    batch, q_heads = source.shape[:2]
    limits = limits.to(source.device, torch.float32).contiguous()

    def launch(config: Config) -> None:
        _select_kernel[(geometry.q_blocks, q_heads, batch)](
            source,
            *source.stride(),
            limits,
            lists.indices,
            lists.counts,
            geometry.q_len,
            geometry.k_len,
            POLICY=policy,
            RECENT=order == "recent",
            CAUSAL=geometry.causal,
            BLOCK_SIZE=geometry.block_size,
            STRIDE=stride,
            BLOCK_K=_row_size(geometry),
            **config.launch_arguments(),
        )

    launch(_config(geometry, source.device, launch))
    return lists


def _empty_lists(source: torch.Tensor, geometry: Geometry) -> BlockLists:
    shape = (*source.shape[:2], geometry.q_blocks, geometry.k_blocks)
    indices = torch.empty(shape, dtype=torch.int16, device=source.device)
    return BlockLists(indices, torch.empty(shape[:3], dtype=torch.int32, device=source.device))


def _row_size(geometry: Geometry) -> int:
    if geometry.k_blocks > MAX_BLOCKS:
        raise ValueError(f"k_len is {geometry.k_len}: {geometry.k_blocks} key blocks, at most {MAX_BLOCKS} are allowed")
    return max(16, int(triton.next_power_of_2(geometry.k_blocks)))


def _config(geometry: Geometry, device: torch.device, launch: Callable[[Config], None]) -> Config:
    """One choice for every kernel that adds up a row: the order of summation, hence the last bit, hangs on the warps."""
    traits = {"row_size": _row_size(geometry)}
    return choose("selection", traits, CANDIDATES, device, lambda config: milliseconds(lambda: launch(config)))


@triton.jit
def _row_span(row, q_len, k_len, CAUSAL: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Queries of query block ``row``, its visible key blocks, and the first and last that hold its own positions."""
    first_query = row * BLOCK_SIZE
    queries = tl.minimum(BLOCK_SIZE, q_len - first_query)
    first_position = k_len - q_len + first_query
    first_own = first_position // BLOCK_SIZE
    last_own = (first_position + queries - 1) // BLOCK_SIZE
    visible = last_own + 1
    if not CAUSAL:
        visible = (k_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    return queries, visible, first_own, last_own


@triton.jit
def _average_row(lse_ptr, stride_group, stride_block, groups, columns, visible, BLOCK_K: tl.constexpr):
    """Mean over a query block's row groups of their distributions over the visible key blocks."""
    average = tl.zeros((BLOCK_K,), tl.float32)
    for _ in range(groups):
        lse = tl.load(lse_ptr + columns * stride_block, mask=columns < visible, other=float("-inf"))  # (BLOCK_K,)
        weights = tl.exp2(lse - tl.max(lse, 0))  # every group sees key block 0: the maximum is finite
        average += weights * (1.0 / tl.sum(weights, 0))
        lse_ptr += stride_group
    return average / groups


@triton.jit
def _limit(limit_ptr, visible, POLICY: tl.constexpr):
    """What the blocks preferred to a kept one stay below: int64 multiples of 2^-52 of probability, or int32 blocks."""
    limit = tl.load(limit_ptr).to(tl.float64)
    if POLICY == "ratio":
        # a tenth of ten blocks is one block, although fp32 holds a little more than a tenth
        limit = tl.ceil(limit * visible.to(tl.float64) * 0.99999988079071044921875)
    if POLICY == "threshold":
        fixed = tl.ceil(limit * 4503599627370496.0).to(tl.int64)
        result = tl.where(limit >= 1.0, 9223372036854775807, fixed)
    else:
        result = tl.minimum(limit, 16384.0).to(tl.int32)
    return result


@triton.jit
def _cut_off(bits, weights, base, limit):
    """Bit pattern of the lowest score that is kept, by halving; -2 where all are kept, the largest where perhaps none is.

    ``base + sum(weights where bits > low)`` reaches the limit, and does not with ``high``; one candidate in between ends it.
    """
    count_low = tl.sum((bits > -1).to(tl.int32), 0)
    count_high = tl.zeros_like(count_low)
    total = base + tl.sum(tl.where(bits > -1, weights, 0), 0)
    high = tl.where(total < limit, -2, tl.max(bits, 0))
    low = tl.where((total < limit) | (base >= limit), high, -1)
    while (high - low > 1) & (count_low - count_high > 1):
        middle = low + ((high - low) >> 1)
        above = bits > middle
        count = tl.sum(above.to(tl.int32), 0)
        reached = base + tl.sum(tl.where(above, weights, 0), 0) >= limit
        low = tl.where(reached, middle, low)
        count_low = tl.where(reached, count, count_low)
        high = tl.where(reached, high, middle)
        count_high = tl.where(reached, count_high, count)
    return tl.max(tl.where(bits <= high, bits, -2), 0)


@triton.jit
def _kept(scores, columns, visible, first_own, last_own, limit_ptr, POLICY: tl.constexpr, RECENT: tl.constexpr):
    """Which of a row's key blocks are kept: bool like ``scores``, (BLOCK_K,)."""
    seen = columns < visible
    forced = seen & ((columns == 0) | ((columns >= first_own) & (columns <= last_own)))
    if POLICY == "threshold":
        weights = (scores.to(tl.float64) * 4503599627370496.0).to(tl.int64)
    else:
        weights = tl.full(scores.shape, 1, tl.int32)
    base = tl.sum(tl.where(forced, weights, 0), 0)
    limit = _limit(limit_ptr, visible, POLICY)
    free = seen & (forced == 0)
    if RECENT:
        # the block before the row's own comes first of all that may be dropped, and only a threshold of 0 drops it
        previous = free & (columns == first_own - 1)
        wanted = limit > 0 if POLICY == "threshold" else base < limit
        forced = forced | (previous & wanted)
        free = free & (previous == 0)
        base += tl.sum(tl.where(previous, weights, 0), 0)
    # -0.0 is 0.0; what is no candidate lies below every candidate
    bits = tl.where(free, scores.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -2)
    cut_off = _cut_off(bits, weights, base, limit)
    above = bits > cut_off
    tied = free & (bits == cut_off)
    weight = tl.maximum(tl.max(tl.where(tied, weights, 0), 0), 1)
    rest = tl.maximum(limit - base - tl.sum(tl.where(above, weights, 0), 0), 0)
    ties = tl.minimum((rest + weight - 1) // weight, 16384).to(tl.int32)
    return forced | above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= ties))


@triton.jit
def _write_list(kept, columns, indices_ptr, counts_ptr, place, k_blocks):
    """The kept columns in ascending order, and their number, at row ``place`` (int64)."""
    position = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(indices_ptr + place * k_blocks + position, columns.to(tl.int16), mask=kept)
    tl.store(counts_ptr + place, tl.sum(kept.to(tl.int32), 0))


@triton.jit
def _place():
    """Row of the outputs, which are contiguous, that program (query block, head, sequence) writes."""
    return (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(
        0
    )


@triton.jit(do_not_specialize=["q_len", "k_len"])
def _select_kernel(
    source_ptr,  # scores, or log-sum-exps if STRIDE
    stride_batch,
    stride_head,
    stride_row,
    stride_block,
    limits_ptr,
    indices_ptr,
    counts_ptr,
    q_len,
    k_len,
    POLICY: tl.constexpr,
    RECENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    queries, visible, first_own, last_own = _row_span(row, q_len, k_len, CAUSAL, BLOCK_SIZE)
    columns = tl.arange(0, BLOCK_K)
    source_ptr += sequence * stride_batch + head * stride_head
    if STRIDE:
        source_ptr += (row * (BLOCK_SIZE // STRIDE)).to(tl.int64) * stride_row
        groups = (queries + STRIDE - 1) // STRIDE
        scores = _average_row(source_ptr, stride_row, stride_block, groups, columns, visible, BLOCK_K)
    else:
        source_ptr += row.to(tl.int64) * stride_row
        scores = tl.load(source_ptr + columns * stride_block, mask=columns < visible, other=0.0)  # (BLOCK_K,)
    kept = _kept(scores, columns, visible, first_own, last_own, limits_ptr + head, POLICY, RECENT)
    _write_list(kept, columns, indices_ptr, counts_ptr, _place(), (k_len + BLOCK_SIZE - 1) // BLOCK_SIZE)


@triton.jit(do_not_specialize=["q_len", "k_len"])
def _average_kernel(
    lse_ptr,
    stride_batch,
    stride_head,
    stride_group,
    stride_block,
    scores_ptr,
    q_len,
    k_len,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    queries, visible, _, _ = _row_span(row, q_len, k_len, CAUSAL, BLOCK_SIZE)
    columns = tl.arange(0, BLOCK_K)
    lse_ptr += sequence * stride_batch + head * stride_head
    lse_ptr += (row * (BLOCK_SIZE // STRIDE)).to(tl.int64) * stride_group
    groups = (queries + STRIDE - 1) // STRIDE
    scores = _average_row(lse_ptr, stride_group, stride_block, groups, columns, visible, BLOCK_K)  # (BLOCK_K,)
    k_blocks = (k_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    tl.store(scores_ptr + _place() * k_blocks + columns, scores, mask=columns < k_blocks)


@triton.jit(do_not_specialize=["q_len", "k_len"])
def _list_kernel(
    mask_ptr,
    stride_batch,
    stride_head,
    stride_row,
    stride_block,
    indices_ptr,
    counts_ptr,
    q_len,
    k_len,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, head, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    _, visible, _, _ = _row_span(tl.program_id(0), q_len, k_len, CAUSAL, BLOCK_SIZE)
    columns = tl.arange(0, BLOCK_K)
    mask_ptr += sequence * stride_batch + head * stride_head + row * stride_row
    kept = tl.load(mask_ptr + columns * stride_block, mask=columns < visible, other=0) != 0  # (BLOCK_K,)
    _write_list(kept, columns, indices_ptr, counts_ptr, _place(), (k_len + BLOCK_SIZE - 1) // BLOCK_SIZE)


@triton.jit(do_not_specialize=["k_blocks"])
def _mask_kernel(indices_ptr, counts_ptr, mask_ptr, k_blocks, BLOCK_K: tl.constexpr):
    place = _place()
    columns = tl.arange(0, BLOCK_K)
    listed = columns < tl.load(counts_ptr + place)
    indices = tl.load(indices_ptr + place * k_blocks + columns, mask=listed, other=0)  # (BLOCK_K,)
    tl.store(mask_ptr + place * k_blocks + indices, tl.full((BLOCK_K,), 1, tl.uint8), mask=listed)
