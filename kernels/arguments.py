"""Checks of the public functions' arguments: a ValueError names the argument, its value and what is allowed."""

import math
from typing import Literal, get_args

import torch

from xcalib.choices import BLOCK_SIZES, STRIDES, Order, Pattern
from xcalib.kernels.geometry import Geometry

__all__ = [
    "BLOCK_SIZES",
    "DTYPES",
    "HEAD_DIMS",
    "STRIDES",
    "Backend",
    "NonFiniteValueError",
    "Order",
    "Pattern",
    "Policy",
    "Precision",
    "check_attention",
    "check_block_size",
    "check_geometry",
    "check_grid",
    "check_lengths",
    "check_mask",
    "check_method",
    "check_order",
    "check_projection",
    "check_scores",
    "check_shapes",
    "exponent_factor",
    "limits_of",
    "refuse_fp8",
    "scale_of",
]

Backend = Literal["reference", "triton"]
Policy = Literal["threshold", "top-k", "ratio"]
Precision = Literal["native", "fp8"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (32, 256)


class NonFiniteValueError(ValueError):
    """A tensor holds NaN or infinite numbers, or what follows from it would."""


def scale_of(scale: float | None, query: torch.Tensor) -> float:
    if scale is None:
        return float(query.shape[-1] ** -0.5)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, expected a finite number or None")
    return float(scale)


def exponent_factor(scale: float) -> float:
    """What turns a dot product into a power of 2 of softmax: ``scale * log2(e)``, for a scale that is not negative.

    Instead of 0 a factor so small that it makes all weights of a row equal as well, and minus infinity stays what it is.
    """
    return max(scale * math.log2(math.e), 1e-30)


def check_geometry(q_len: int, k_len: int, block_size: int, causal: bool) -> Geometry:
    check_block_size(block_size)
    check_lengths(q_len, k_len)
    return Geometry(q_len, k_len, block_size, bool(causal))


def check_mask(mask: torch.Tensor, geometry: Geometry, heads: tuple[int, ...] | None = None) -> None:
    blocks = (geometry.q_blocks, geometry.k_blocks)
    batch = ", ".join(str(size) for size in heads) if heads else "batch, q_heads"
    fits = mask.ndim == 4 and mask.shape[2:] == blocks and heads in (None, tuple(mask.shape[:2]))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool ({batch}, {blocks[0]}, {blocks[1]})"
        )


def check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES or not isinstance(block_size, int):
        raise ValueError(f"block_size is {block_size!r}, allowed are {BLOCK_SIZES}")


def check_lengths(q_len: int, k_len: int) -> None:
    if q_len < 1:
        raise ValueError(f"q_len is {q_len}, expected at least 1")
    if q_len > k_len:
        raise ValueError(
            f"q_len is {q_len} and k_len {k_len}, expected q_len <= k_len: the queries are the last keys' positions"
        )


def check_method(stride: int, pattern: str, precision: str = "native", order: str = "score") -> None:
    if stride not in STRIDES or not isinstance(stride, int):
        raise ValueError(f"stride is {stride!r}, allowed are {STRIDES}")
    if pattern not in get_args(Pattern):
        raise ValueError(f"pattern is {pattern!r}, allowed are 'antidiagonal', 'diagonal', 'random' and 'rows'")
    if precision not in ("native", "fp8"):
        raise ValueError(f"precision is {precision!r}, allowed are 'native' and 'fp8'")
    check_order(order)


def check_order(order: str) -> None:
    if order not in ("score", "recent"):
        raise ValueError(f"order is {order!r}, allowed are 'score' and 'recent'")


def refuse_fp8(precision: str) -> None:
    if precision == "fp8":
        raise ValueError("precision is 'fp8', but the reference backend serves this call: it scores in fp32 only")


def check_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, block_size: int, causal: bool
) -> Geometry:
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, tensor in tensors.items():
        if tensor.ndim != 4:
            raise ValueError(f"{name} has {tensor.ndim} dimensions, expected (batch, heads, seq, head_dim)")
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}, allowed are {', '.join(str(dtype) for dtype in DTYPES)}"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, expected {query.dtype} on {query.device} like query"
            )
    check_shapes(query, key, value)
    return check_geometry(query.shape[2], key.shape[2], block_size, causal)


def check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None) -> None:
    batch, q_heads, q_len, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"key has shape {tuple(key.shape)}, expected batch {batch} and head_dim {head_dim} like query")
    if value is not None and value.shape != key.shape:
        raise ValueError(f"value has shape {tuple(value.shape)}, expected {tuple(key.shape)} like key")
    if batch < 1 or key.shape[1] < 1 or q_heads < 1 or q_heads % key.shape[1]:
        raise ValueError(
            f"query has {q_heads} heads and key {key.shape[1]}: expected key heads that divide the query heads"
        )
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        raise ValueError(f"query has head_dim {head_dim}, allowed are {HEAD_DIMS[0]} to {HEAD_DIMS[1]}")
    check_lengths(q_len, key.shape[2])


def check_scores(scores: torch.Tensor, geometry: Geometry) -> None:
    blocks = (geometry.q_blocks, geometry.k_blocks)
    if scores.dtype != torch.float32 or scores.ndim != 4 or scores.shape[2:] != blocks:
        raise ValueError(
            f"scores is {scores.dtype} {tuple(scores.shape)}, expected torch.float32 (batch, q_heads, {blocks[0]}, {blocks[1]})"
        )
    if not bool(scores.isfinite().all()):
        kind = "NaN" if bool(scores.isnan().any()) else "inf"
        raise ValueError(f"scores holds {kind}, expected finite probabilities")


def check_projection(projection: torch.Tensor, query: torch.Tensor) -> None:
    heads, head_dim = query.shape[1], query.shape[3]
    if projection.ndim != 3 or projection.shape[:2] != (heads, head_dim) or not projection.shape[2]:
        raise ValueError(
            f"projection has shape {tuple(projection.shape)}, expected ({heads}, {head_dim}, R): "
            "one (head_dim, R) matrix per query head, R at least 1"
        )
    if projection.dtype != torch.float32 or projection.device != query.device:
        raise ValueError(
            f"projection is {projection.dtype} on {projection.device}, expected torch.float32 on {query.device}"
        )


def check_grid(grid: torch.Tensor) -> None:
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or not bool((grid.diff() > 0).all()):
        raise ValueError(f"grid is {grid.tolist()}, expected ascending thresholds from 0 to 1")


def limits_of(threshold: float | torch.Tensor, q_heads: int, upper: float) -> torch.Tensor:
    values = torch.as_tensor(threshold, dtype=torch.float32)
    if values.ndim == 0:
        values = values.expand(q_heads)
    if values.shape != (q_heads,):
        raise ValueError(
            f"threshold has shape {tuple(values.shape)}, expected one value or ({q_heads},), one per query head"
        )
    if not bool(((values >= 0) & (values <= upper)).all()):
        raise ValueError(f"threshold is {values.tolist()}, expected values in [0, {upper:g}]")
    return values
