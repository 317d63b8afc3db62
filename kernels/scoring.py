"""Scoring in Triton: the strided GEMM of XAttention, reduced on chip to one log-sum-exp per row group and key block.

Row ``i`` of the left operand is query group ``i``, column ``j`` of the right one key group ``j``; the inner dimension runs over
the S tokens of a group and their features: token ``s`` of a key group meets query ``order[s]`` of the row group. Both are read
in place, by TMA as blocks (1, 1, 1, groups, features) of a view (batch, heads, S, length // S, head_dim) of the tokens' own
memory, or through pointers.
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
from xcalib.kernels.reference import strided_order
from xcalib.kernels.scoring_rows import log_sum, rows_lse
from xcalib.kernels.selection import average_lse
from xcalib.kernels.tma import descriptor_strides, fits_tma
from xcalib.kernels.tuning import Config, choose, interpreted, milliseconds

__all__ = ["block_lse", "estimate_blocks", "scoring_chunk"]

MIN_ROWS_PER_HEAD = 8  # of a tile that several heads share


def _candidate(rows: int, columns: int, features: int, warps: int, stages: int) -> Config:
    tiles = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_D": features, "GROUP_M": 16}
    return Config(warps, stages, tiles)


CANDIDATES = (
    _candidate(64, 64, 128, 8, 3),
    _candidate(128, 256, 64, 8, 4),
    _candidate(128, 256, 64, 8, 3),
    _candidate(128, 256, 128, 8, 4),
    _candidate(128, 256, 128, 8, 3),
    _candidate(256, 128, 128, 8, 4),
    _candidate(128, 128, 128, 4, 3),
    _candidate(256, 128, 64, 8, 3),
    _candidate(128, 128, 64, 8, 3),
    _candidate(128, 128, 64, 4, 3),
    _candidate(128, 128, 32, 4, 4),
    _candidate(64, 64, 16, 8, 2),
)


def estimate_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float,
    pattern: str,
    seed: int,
    precision: str = "native",
) -> torch.Tensor:
    """See :func:`xcalib.kernels.estimate_blocks`; ``precision`` as in :func:`block_lse`."""
    geometry = Geometry(query.shape[2], key.shape[2], block_size, causal)
    lse = block_lse(
        query,
        key,
        stride=stride,
        block_size=block_size,
        causal=causal,
        scale=scale,
        pattern=pattern,
        seed=seed,
        precision=precision,
    )
    return average_lse(lse, geometry, stride)


def scoring_chunk(q_heads: int, k_heads: int, q_groups: int, k_blocks: int, limit_bytes: int) -> int:
    """How many key heads, at least 1, :func:`block_lse` can take at once for an output of ``limit_bytes`` per sequence."""
    bytes_per_head = 4 * (q_heads // k_heads) * q_groups * k_blocks
    return max(1, min(k_heads, limit_bytes // bytes_per_head))


def block_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float,
    pattern: str = "antidiagonal",
    seed: int = 0,
    precision: str = "native",
    k_heads: slice = slice(None),
) -> torch.Tensor:
    """How strongly each row group looks at each key block: the sum of ``2 ** (logit * log2(e))``, as its logarithm to base 2.

    Args:
        query: fp32, fp16 or bf16 ``(batch, q_heads, q_len, head_dim)``, any strides but the last, which is 1.
        key: same dtype, ``(batch, k_heads, k_len, head_dim)``.
        stride: tokens per group (S).
        block_size: tokens per block (B), a multiple of S.
        causal: whether a query sees only keys up to its own position.
        scale: factor of the dot product; the logit divides it by S as well, but not by ``rows``.
        pattern: which query of a group meets which key: antidiagonal, diagonal or random (one permutation drawn from ``seed``);
            ``rows``: :func:`xcalib.kernels.scoring_rows.rows_lse`.
        seed: of the random pattern.
        precision: ``"native"``, or ``"fp8"``: both operands are copied to e4m3, one scale per group of S tokens.
        k_heads: the key heads to score; their query heads come along.

    Returns:
        fp32 ``(batch, q_heads of k_heads, ceil(q_len / S), k_blocks)``. -inf where a row group sees nothing of a key block, or
        2^-126 of its most in the same tile. Not written where causality hides the key block from the whole query block: only
        the first ``geometry.visible_k_blocks(i * S // B)`` of row ``i`` may be read.

    Source: arXiv 2503.16428, section 2.1.
    """
    group = query.shape[1] // key.shape[1]
    first, last, _ = k_heads.indices(key.shape[1])
    query, key = query[:, first * group : last * group], key[:, first:last]
    geometry = Geometry(query.shape[2], key.shape[2], block_size, causal)
    if pattern == "rows":
        return rows_lse(query, key, stride=stride, geometry=geometry, scale=scale, precision=precision)
    q_scales = k_scales = None
    if precision == "fp8":
        query, q_scales = quantise_groups(query, stride)
        key, k_scales = quantise_groups(key, stride)
    shape = (*query.shape[:2], -(-geometry.q_len // stride), geometry.k_blocks)
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    order = strided_order(pattern, stride, seed, query.device).int() if pattern == "random" else None

    def launch(config: Config) -> None:
        arguments = _arguments(query, key, geometry, stride, config)
        _score_kernel[_grid(query, key, geometry, stride, config, arguments["PACK"])](
            query,
            key,
            *query.stride()[:3],
            *key.stride()[:3],
            order_ptr=order,
            q_scales_ptr=q_scales,
            k_scales_ptr=k_scales,
            lse_ptr=lse,
            q_len=geometry.q_len,
            k_len=geometry.k_len,
            k_heads=key.shape[1],
            factor=scale / stride * math.log2(math.e),
            PATTERN=pattern,
            **arguments,
        )

    launch(_config(query, stride, block_size // stride, launch))
    return lse


def _config(query: torch.Tensor, stride: int, per_block: int, launch: Callable[[Config], None]) -> Config:
    traits = {
        "dtype": str(query.dtype).removeprefix("torch."),
        "head_dim": query.shape[3],
        "stride": stride,
        "per_block": per_block,
    }
    return choose("scoring", traits, CANDIDATES, query.device, lambda config: milliseconds(lambda: launch(config)))


def _grid(
    query: torch.Tensor, key: torch.Tensor, geometry: Geometry, stride: int, config: Config, pack: int
) -> tuple[int]:
    rows = config.tiles["BLOCK_M"] // pack
    tiles_m = triton.cdiv(geometry.q_len, rows * stride)
    tiles_n = triton.cdiv(geometry.k_len, config.tiles["BLOCK_N"] * stride)
    return (query.shape[0] * query.shape[1] // pack * tiles_m * tiles_n,)


def _arguments(
    query: torch.Tensor, key: torch.Tensor, geometry: Geometry, stride: int, config: Config
) -> dict[str, Any]:
    """Tile sizes, what depends on them, and the descriptors where the tensors and the GPU allow TMA."""
    block_m, group = config.tiles["BLOCK_M"], query.shape[1] // key.shape[1]
    chunk = _feature_chunk(query.shape[3], config.tiles["BLOCK_D"], 32 // min(2, query.element_size()))
    pack = _pack(group, -(-geometry.q_len // stride), block_m)
    # a descriptor addresses full groups, of which there must be one
    q_tma = pack == 1 and geometry.q_len >= stride and fits_tma(query)
    k_tma = geometry.k_len >= stride and fits_tma(key)
    return {
        **config.launch_arguments(),
        "BLOCK_D": chunk,
        "query_desc": _descriptor(query, stride, block_m, chunk) if q_tma else None,
        "key_desc": _descriptor(key, stride, config.tiles["BLOCK_N"], chunk) if k_tma else None,
        "Q_TMA": q_tma,
        "K_TMA": k_tma,
        "Q_RAGGED": q_tma and geometry.q_len % stride != 0,
        "K_RAGGED": k_tma and geometry.k_len % stride != 0,
        "CAUSAL": geometry.causal,
        "BLOCK_SIZE": geometry.block_size,
        "STRIDE": stride,
        "HEAD_DIM": query.shape[3],
        "GROUP": group,
        "PACK": pack,
        "INTERPRETED": interpreted(),
    }


def _pack(group: int, q_groups: int, block_m: int) -> int:
    """How many query heads of one key head share a tile's rows: as many as fill it, where one head has too few groups.

    More would save nothing: tiles are at least as wide as they are high, so rows in steps of fewer groups meet as many tiles
    along the causal diagonal, and heads that run side by side find their keys in L2.
    """
    pack = 1
    while group % (2 * pack) == 0 and pack * q_groups < block_m and 2 * pack * MIN_ROWS_PER_HEAD <= block_m:
        pack *= 2
    return pack


def _feature_chunk(head_dim: int, limit: int, least: int) -> int:
    """Features per step of the GEMM: the largest power of two up to ``limit`` that divides ``head_dim``, at least ``least``.

    The tensor cores take 16 features of 2 bytes at once, or 32 of 1.
    """
    return max(least, min(limit, head_dim & -head_dim))


def _descriptor(tokens: torch.Tensor, stride: int, groups: int, features: int) -> TensorDescriptor:
    """Of the full groups of ``tokens`` as (batch, heads, S, length // S, head_dim), in blocks (1, 1, 1, groups, features)."""
    batch, heads, length, head_dim = tokens.shape
    steps = descriptor_strides(tokens)
    return TensorDescriptor(
        tokens,
        shape=[batch, heads, stride, length // stride, head_dim],
        strides=[steps[0], steps[1], steps[2], steps[2] * stride, 1],
        block_shape=[1, 1, 1, groups, features],
    )


@triton.jit
def _dots(
    query_source,  # a descriptor if Q_TMA, else pointers to the first token of each row's group, (BLOCK_M, 1)
    key_source,  # a descriptor if K_TMA, else pointers to the first token of each column's group, (BLOCK_N, 1)
    stride_q_token,
    stride_k_token,
    order_ptr,
    sequence,
    q_head,
    k_head,
    rows,
    columns,
    first_row,
    first_column,
    q_len,
    k_len,
    PATTERN: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    Q_TMA: tl.constexpr,
    K_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sampled dot products; missing tokens count as zeros, and so does, by TMA, a last group that is not full."""
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(STRIDE * CHUNKS):
        token, first_feature = step // CHUNKS, step % CHUNKS * BLOCK_D
        # the query of a row group that meets key `token` of a column group
        if PATTERN == "antidiagonal":
            partner = STRIDE - 1 - token
        elif PATTERN == "diagonal":
            partner = token
        else:
            partner = tl.load(order_ptr + token)
        if Q_TMA:
            query = query_source.load(
                [sequence, q_head, partner, first_row, first_feature]
            )  # (1, 1, 1, BLOCK_M, BLOCK_D)
            query = query.reshape(BLOCK_M, BLOCK_D)
        else:
            features = (first_feature + tl.arange(0, BLOCK_D))[None, :]
            q_exists = (rows * STRIDE + partner < q_len)[:, None] & (features < HEAD_DIM)
            query_ptrs = query_source + partner * stride_q_token + features
            query = tl.load(query_ptrs, mask=q_exists, other=0.0)  # (BLOCK_M, BLOCK_D)
        if K_TMA:
            key = key_source.load([sequence, k_head, token, first_column, first_feature])  # (1, 1, 1, BLOCK_N, BLOCK_D)
            key = key.reshape(BLOCK_N, BLOCK_D)
        else:
            features = (first_feature + tl.arange(0, BLOCK_D))[None, :]
            k_exists = (columns * STRIDE + token < k_len)[:, None] & (features < HEAD_DIM)
            key_ptrs = key_source + token * stride_k_token + features
            key = tl.load(key_ptrs, mask=k_exists, other=0.0)  # (BLOCK_N, BLOCK_D)
        dots = tl.dot(query, key.T, dots, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
    return dots


@triton.jit
def _tile(
    k_heads,
    q_len,
    k_len,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """(sequence, key head, which of the SIDE heads or packs side by side, tile of rows, tile of columns) of this program.

    Heads that share a key head run side by side, then GROUP_M row tiles go down the columns together; the rows that see most
    keys come first.
    """
    tiles_m = tl.cdiv(q_len, ROWS * STRIDE)
    tiles_n = tl.cdiv(k_len, BLOCK_N * STRIDE)
    program = tl.program_id(0)
    side, program = program % SIDE, program // SIDE
    tile, unit = program % (tiles_m * tiles_n), program // (tiles_m * tiles_n)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    in_group = tile % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = tiles_m - 1 - (first_m + in_group % height)
    return unit // k_heads, unit % k_heads, side, tile_m, in_group // height


@triton.jit(do_not_specialize=["q_len", "k_len", "k_heads"])
def _score_kernel(
    query_ptr,
    key_ptr,
    stride_q_batch,
    stride_q_head,
    stride_q_token,
    stride_k_batch,
    stride_k_head,
    stride_k_token,
    query_desc,
    key_desc,
    order_ptr,  # int32 (STRIDE,), random pattern only
    q_scales_ptr,  # fp32 (batch, q_heads, q_groups), fp8 only
    k_scales_ptr,  # fp32 (batch, k_heads, k_groups), fp8 only
    lse_ptr,  # (batch, q_heads, q_groups, k_blocks)
    q_len,
    k_len,
    k_heads,
    factor,
    PATTERN: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    Q_TMA: tl.constexpr,
    K_TMA: tl.constexpr,
    Q_RAGGED: tl.constexpr,
    K_RAGGED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_M // PACK  # row groups of each head
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // STRIDE
    sequence, k_head, side, tile_m, tile_n = _tile(k_heads, q_len, k_len, STRIDE, ROWS, BLOCK_N, GROUP // PACK, GROUP_M)
    first_row, first_column = tile_m * ROWS, tile_n * BLOCK_N
    offset = k_len - q_len
    if CAUSAL:
        # selection reads up to the last block that the last query block of this tile can see
        end = ((first_row + ROWS) * STRIDE + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE
        if first_column * STRIDE >= offset + tl.minimum(end, q_len):
            return
    q_head = k_head * GROUP + side * PACK
    heads = q_head + tl.arange(0, BLOCK_M) // ROWS  # (BLOCK_M,)
    rows = first_row + tl.arange(0, BLOCK_M) % ROWS
    columns = first_column + tl.arange(0, BLOCK_N)
    q_groups, k_groups = (q_len + STRIDE - 1) // STRIDE, (k_len + STRIDE - 1) // STRIDE
    places = (sequence.to(tl.int64) * k_heads * GROUP + heads) * q_groups + rows  # (BLOCK_M,)
    q_scales = None
    if q_scales_ptr is not None:  # now: the loads pass behind the products
        q_scales = tl.load(q_scales_ptr + places, mask=rows < q_groups, other=1.0)
        k_scales_ptr += (sequence.to(tl.int64) * k_heads + k_head) * k_groups
        factor *= tl.load(k_scales_ptr + columns, mask=columns < k_groups, other=0.0)  # (BLOCK_N,)

    # TMA sees full groups only: tiles that hold a part of one are read through pointers
    whole = True
    if Q_RAGGED:
        whole = (first_row + ROWS) * STRIDE <= q_len
    if K_RAGGED:
        whole = whole & ((first_column + BLOCK_N) * STRIDE <= k_len)
    query_ptr += sequence.to(tl.int64) * stride_q_batch
    query_ptrs = (
        query_ptr + (heads.to(tl.int64) * stride_q_head + (rows * STRIDE).to(tl.int64) * stride_q_token)[:, None]
    )
    key_ptr += sequence.to(tl.int64) * stride_k_batch + k_head.to(tl.int64) * stride_k_head
    key_ptrs = key_ptr + ((columns * STRIDE).to(tl.int64) * stride_k_token)[:, None]
    if whole:
        dots = _dots(
            query_desc if Q_TMA else query_ptrs, key_desc if K_TMA else key_ptrs, stride_q_token, stride_k_token,
            order_ptr, sequence, q_head, k_head, rows, columns, first_row, first_column, q_len, k_len,
            PATTERN, STRIDE, HEAD_DIM, Q_TMA, K_TMA, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        dots = _dots(
            query_ptrs, key_ptrs, stride_q_token, stride_k_token,
            order_ptr, sequence, q_head, k_head, rows, columns, first_row, first_column, q_len, k_len,
            PATTERN, STRIDE, HEAD_DIM, False, False, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    logits = dots * factor  # (BLOCK_M, BLOCK_N), to base 2, but for q_scales
    # column j is visible to row i when j * S <= offset + i * S + S - 1
    end_column = k_groups - first_column
    first_hidden = (offset + STRIDE - 1) // STRIDE + 1 - first_column
    edge = end_column < BLOCK_N
    if CAUSAL:
        edge = edge | (first_hidden + first_row < BLOCK_N)
    if edge:
        exists = (tl.arange(0, BLOCK_N) < end_column)[None, :]
        if CAUSAL:
            exists = exists & (tl.arange(0, BLOCK_N)[None, :] < (first_hidden + rows)[:, None])
        logits = tl.where(exists, logits, float("-inf"))
    lse = log_sum(logits, q_scales, PER_BLOCK, INTERPRETED)  # (BLOCK_M, BLOCK_N / PER_BLOCK)

    k_blocks = (k_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    blocks = first_column // PER_BLOCK + tl.arange(0, BLOCK_N // PER_BLOCK)
    lse_ptrs = lse_ptr + places[:, None] * k_blocks + blocks[None, :]
    tl.store(lse_ptrs, lse, mask=(rows < q_groups)[:, None] & (blocks < k_blocks)[None, :])
