"""Scoring by rows in Triton: the exact logits of one query in S, reduced on chip to one log-sum-exp per query and key block.

One program takes BLOCK_M sampled queries of one head, keeps them on chip, and walks the keys that their query blocks see: dense
attention's first product without its second. The programs with the most keys start first, those of one key head side by side.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from xcalib.kernels.geometry import Geometry
from xcalib.kernels.quantise import quantise_groups
from xcalib.kernels.tma import descriptor_strides, fits_tma
from xcalib.kernels.tuning import Config, choose, interpreted, milliseconds

__all__ = ["log_sum", "rows_lse"]


def _candidate(rows: int, columns: int, features: int, warps: int, stages: int) -> Config:
    return Config(warps, stages, {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_D": features})


CANDIDATES = (
    _candidate(64, 128, 256, 4, 3),
    _candidate(64, 128, 256, 4, 2),
    _candidate(128, 128, 256, 8, 2),
    _candidate(128, 128, 256, 4, 2),
    _candidate(128, 128, 128, 8, 3),
    _candidate(64, 64, 256, 4, 3),
    _candidate(64, 128, 16, 8, 2),
    _candidate(64, 128, 32, 8, 2),
)


def rows_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    stride: int,
    geometry: Geometry,
    scale: float,
    precision: str = "native",
) -> torch.Tensor:
    """As :func:`xcalib.kernels.scoring.block_lse`, by pattern ``rows``: the last query of each row group meets every key.

    Args:
        query: fp32, fp16 or bf16 ``(batch, q_heads, q_len, head_dim)``, any strides but the last, which is 1.
        key: same dtype, ``(batch, k_heads, k_len, head_dim)``.
        stride: tokens per row group (S); the last group's last query is the last there is.
        geometry: of the two.
        scale: factor of the dot product.
        precision: ``"native"``, or ``"fp8"``: queries are copied to e4m3 with one scale per group, keys with one per token.

    Returns:
        fp32 ``(batch, q_heads, ceil(q_len / S), k_blocks)``.
    """
    q_scales = k_scales = None
    if precision == "fp8":
        query, q_scales = quantise_groups(query, stride)
        key, k_scales = quantise_groups(key, 1)
    groups = -(-geometry.q_len // stride)
    lse = torch.empty((*query.shape[:2], groups, geometry.k_blocks), dtype=torch.float32, device=query.device)

    def launch(config: Config) -> None:
        settings = _settings(query, key, config)
        grid = (triton.cdiv(groups, settings["BLOCK_M"]) * query.shape[0] * query.shape[1],)
        _rows_kernel[grid](
            query,
            key,
            *query.stride()[:3],
            *key.stride()[:3],
            q_scales_ptr=q_scales,
            k_scales_ptr=k_scales,
            lse_ptr=lse,
            q_len=geometry.q_len,
            k_len=geometry.k_len,
            k_heads=key.shape[1],
            batch=query.shape[0],
            factor=scale * math.log2(math.e),
            CAUSAL=geometry.causal,
            BLOCK_SIZE=geometry.block_size,
            STRIDE=stride,
            HEAD_DIM=query.shape[3],
            GROUP=query.shape[1] // key.shape[1],
            INTERPRETED=interpreted(),
            **settings,
        )

    launch(_config(query, geometry.block_size, launch))
    return lse


def _config(query: torch.Tensor, block_size: int, launch: Callable[[Config], None]) -> Config:
    dtype = str(query.dtype).removeprefix("torch.")
    width = max(16, int(triton.next_power_of_2(query.shape[3])))
    traits = {"dtype": dtype, "width": width, "block_size": block_size}
    # a tile holds whole blocks; IEEE arithmetic uses no tensor cores, and takes few features at a time
    fitting = tuple(
        one
        for one in CANDIDATES
        if one.tiles["BLOCK_N"] % block_size == 0
        and (interpreted() or (dtype == "float32") == (one.tiles["BLOCK_D"] < 64))
    )
    return choose("scoring_rows", traits, fitting, query.device, lambda config: milliseconds(lambda: launch(config)))


def _settings(query: torch.Tensor, key: torch.Tensor, config: Config) -> dict[str, Any]:
    """Launch arguments of a configuration; all features at once where it allows."""
    settings = config.launch_arguments()
    least = 32 // min(2, query.element_size())  # of the tensor cores: 16 features of 2 bytes, or 32 of 1
    columns = max(least, min(settings["BLOCK_D"], int(triton.next_power_of_2(query.shape[3]))))
    descriptor = None
    if fits_tma(key):
        shape, steps = list(key.shape), [*descriptor_strides(key), 1]
        descriptor = TensorDescriptor(key, shape, steps, [1, 1, settings["BLOCK_N"], columns])
    return settings | {"BLOCK_D": columns, "key_desc": descriptor, "K_TMA": descriptor is not None}


@triton.jit
def _log2(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        result = tl.log2(x)
    else:  # one instruction, right to 22 bits, for the twenty of tl.log2; log2(0) is -inf
        result = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def log_sum(logits, scales, PER_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """log2(sum(2 ** (logits * scales))) over each PER_BLOCK columns, relative to the row's peak over all columns.

    ``scales``, one for each row, are above 0; None are all 1.
    """
    BLOCK_M: tl.constexpr = logits.shape[0]
    BLOCK_N: tl.constexpr = logits.shape[1]
    peak = tl.max(logits, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    if scales is not None:
        peak *= scales
        logits *= scales[:, None]
    weights = tl.exp2(logits - peak[:, None])
    total = tl.sum(weights.reshape(BLOCK_M, BLOCK_N // PER_BLOCK, PER_BLOCK), 2)
    return _log2(total, INTERPRETED) + peak[:, None]


@triton.jit
def _load_keys(
    key_ptr,  # the head's first token
    key_desc,
    sequence,
    k_head,
    stride_k_token,
    first,
    first_feature,
    k_len,
    HEAD_DIM: tl.constexpr,
    K_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys ``first`` and on, (BLOCK_N, BLOCK_D); what does not exist is zero."""
    if K_TMA:
        keys = key_desc.load([sequence, k_head, first, first_feature]).reshape(BLOCK_N, BLOCK_D)
    else:
        tokens = first + tl.arange(0, BLOCK_N)
        features = first_feature + tl.arange(0, BLOCK_D)
        pointers = key_ptr + tokens.to(tl.int64)[:, None] * stride_k_token + features[None, :]
        keys = tl.load(pointers, mask=(tokens < k_len)[:, None] & (features < HEAD_DIM)[None, :], other=0.0)
    return keys


@triton.jit(do_not_specialize=["q_len", "k_len", "k_heads", "batch"])
def _rows_kernel(
    query_ptr,
    key_ptr,
    stride_q_batch,
    stride_q_head,
    stride_q_token,
    stride_k_batch,
    stride_k_head,
    stride_k_token,
    key_desc,
    q_scales_ptr,  # fp32 (batch, q_heads, q_groups), fp8 only
    k_scales_ptr,  # fp32 (batch, k_heads, k_len), fp8 only
    lse_ptr,  # (batch, q_heads, q_groups, k_blocks)
    q_len,
    k_len,
    k_heads,
    batch,
    factor,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    K_TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    PER_TILE: tl.constexpr = BLOCK_N // BLOCK_SIZE
    q_groups, k_blocks = (q_len + STRIDE - 1) // STRIDE, (k_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    side, unit = tl.program_id(0) % GROUP, tl.program_id(0) // GROUP
    first_row = (tl.cdiv(q_groups, BLOCK_M) - 1 - unit // (batch * k_heads)) * BLOCK_M
    sequence, k_head = unit % (batch * k_heads) // k_heads, unit % k_heads
    head = k_head * GROUP + side
    rows = first_row + tl.arange(0, BLOCK_M)
    sampled = tl.minimum(rows * STRIDE + STRIDE - 1, q_len - 1)  # the last query of each group
    places = (sequence.to(tl.int64) * k_heads * GROUP + head) * q_groups + rows  # (BLOCK_M,)
    lse_ptrs = lse_ptr + places[:, None] * k_blocks + tl.arange(0, PER_TILE)[None, :]  # (BLOCK_M, PER_TILE)
    q_scales = None
    if q_scales_ptr is not None:
        q_scales = tl.load(q_scales_ptr + places, mask=rows < q_groups, other=1.0)
        k_scales_ptr += (sequence.to(tl.int64) * k_heads + k_head) * k_len
    query_ptr += sequence.to(tl.int64) * stride_q_batch + head.to(tl.int64) * stride_q_head
    key_ptr += sequence.to(tl.int64) * stride_k_batch + k_head.to(tl.int64) * stride_k_head
    features = tl.arange(0, BLOCK_D)
    query_ptrs = query_ptr + sampled.to(tl.int64)[:, None] * stride_q_token + features[None, :]
    query = tl.load(query_ptrs, mask=(features < HEAD_DIM)[None, :], other=0.0)  # (BLOCK_M, BLOCK_D)

    # key k is visible to a row when k <= offset + sampled; selection reads up to the last block of the rows' query blocks
    end, seen_by_all = k_len, k_len
    if CAUSAL:
        last = ((first_row + BLOCK_M) * STRIDE + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE
        end = k_len - q_len + tl.minimum(last, q_len)
        seen_by_all = k_len - q_len + tl.minimum((first_row + 1) * STRIDE, q_len)
    for first in range(0, end, BLOCK_N):
        keys = _load_keys(
            key_ptr, key_desc, sequence, k_head, stride_k_token, first, 0, k_len, HEAD_DIM, K_TMA, BLOCK_N, BLOCK_D
        )
        dots = tl.dot(query, keys.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        for chunk in tl.static_range(1, CHUNKS):
            start = chunk * BLOCK_D
            keys = _load_keys(
                key_ptr,
                key_desc,
                sequence,
                k_head,
                stride_k_token,
                first,
                start,
                k_len,
                HEAD_DIM,
                K_TMA,
                BLOCK_N,
                BLOCK_D,
            )
            more = tl.load(query_ptrs + start, mask=(start + features < HEAD_DIM)[None, :], other=0.0)
            dots = tl.dot(more, keys.T, dots, input_precision="ieee")
        columns = first + tl.arange(0, BLOCK_N)
        if k_scales_ptr is None:
            logits = dots * factor
        else:
            logits = dots * (factor * tl.load(k_scales_ptr + columns, mask=columns < k_len, other=0.0))
        if first + BLOCK_N > seen_by_all:
            exists = (columns < k_len)[None, :]
            if CAUSAL:
                exists = exists & (columns[None, :] <= (k_len - q_len + sampled)[:, None])
            logits = tl.where(exists, logits, float("-inf"))
        lse = log_sum(logits, q_scales, BLOCK_SIZE, INTERPRETED)  # (BLOCK_M, PER_TILE)
        blocks = first // BLOCK_SIZE + tl.arange(0, PER_TILE)
        tl.store(lse_ptrs + first // BLOCK_SIZE, lse, mask=(rows < q_groups)[:, None] & (blocks < k_blocks)[None, :])
