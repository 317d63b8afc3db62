"""The public functions: they check their arguments, choose the backend and call it."""

import math
from typing import Literal

import torch

from xcalib.kernels import reference
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.reference import SweepResult

__all__ = [
    "block_density",
    "block_sparse_attention",
    "estimate_blocks",
    "select_blocks",
    "sweep_thresholds",
    "visible_blocks",
    "xattention",
]

Backend = Literal["reference", "triton"]
Pattern = Literal["antidiagonal", "diagonal", "random"]
Policy = Literal["threshold", "top-k", "ratio"]

STRIDES = (4, 8, 16, 32, 64)
BLOCK_SIZES = (64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (32, 256)


def estimate_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    stride: int = 16,
    block_size: int = 128,
    causal: bool = True,
    scale: float | None = None,
    pattern: Pattern = "antidiagonal",
    seed: int = 0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """How much attention each query block pays each key block, from strided samples (paper section 2.1).

    Groups of ``stride`` queries meet groups of ``stride`` keys through one sum along the sampled pattern; a softmax over
    the visible key groups is summed inside each key block and averaged over the query block's groups.

    Args:
        query: fp32, fp16 or bf16 ``(batch, q_heads, q_len, head_dim)``, ``q_len <= k_len``; query ``t`` stands at key
            position ``t + k_len - q_len``.
        key: same dtype, ``(batch, k_heads, k_len, head_dim)``; ``k_heads`` divides ``q_heads``.
        stride: tokens per group (S), one of 4, 8, 16, 32, 64.
        block_size: tokens per block (B), 64 or 128.
        causal: whether a query sees only keys up to its own position.
        scale: factor of the dot product, default ``1 / sqrt(head_dim)``; the score divides it by ``stride`` as well.
        pattern: which query of a group meets which key: antidiagonal, diagonal or random (one permutation drawn from ``seed``).
        seed: of the random pattern.
        backend: ``"reference"``, ``"triton"`` or None for the fastest that exists for the tensors' device.

    Returns:
        fp32 ``(batch, q_heads, q_blocks, k_blocks)``; each row sums to 1 over its visible blocks and is 0 elsewhere.

    Raises:
        ValueError: an argument is not as above; the message names it, its value and what is allowed.
    """
    geometry = _check_attention(query, key, None, block_size, causal)
    _check_method(stride, pattern)
    _check_backend(backend)
    return reference.estimate_blocks(
        query,
        key,
        stride=stride,
        block_size=block_size,
        causal=geometry.causal,
        scale=_scale(scale, query),
        pattern=pattern,
        seed=seed,
    )


def select_blocks(
    scores: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    q_len: int,
    k_len: int,
    block_size: int = 128,
    causal: bool = True,
    policy: Policy = "threshold",
    backend: Backend | None = None,
) -> torch.Tensor:
    """The fewest key blocks of each row whose probability reaches the threshold (paper section 2.2).

    The sink (key block 0) and the blocks that hold the row's own positions are always kept and count towards the
    threshold. Ties go to the lower block index. 0 keeps only those; 1 keeps every visible block.

    Args:
        scores: fp32 ``(batch, q_heads, q_blocks, k_blocks)`` from :func:`estimate_blocks`.
        threshold: one value, or fp32 ``(q_heads,)``. By policy: ``threshold`` the cumulative probability to keep, in
            [0, 1]; ``top-k`` the number of blocks per row, >= 0, those always kept counted in; ``ratio`` the share of the visible
            blocks, in [0, 1], rounded up.
        q_len: queries, in tokens.
        k_len: keys, in tokens.
        block_size: tokens per block (B), 64 or 128.
        causal: as the scores were made.
        policy: ``"threshold"``, ``"top-k"`` or ``"ratio"``.
        backend: as in :func:`estimate_blocks`.

    Returns:
        bool mask of the scores' shape, False on invisible blocks.

    Raises:
        ValueError: an argument is not as above, or scores are NaN.
    """
    _check_backend(backend)
    geometry = _check_geometry(q_len, k_len, block_size, causal)
    _check_scores(scores, geometry)
    if policy not in ("threshold", "top-k", "ratio"):
        raise ValueError(f"policy is {policy!r}, allowed are 'threshold', 'top-k' and 'ratio'")
    limits = _thresholds(threshold, scores.shape[1], upper=math.inf if policy == "top-k" else 1.0)
    if policy == "top-k" and not torch.equal(limits, limits.round()):
        raise ValueError(f"threshold is {limits.tolist()}, expected whole numbers of blocks for policy 'top-k'")
    return reference.select_blocks(scores, limits, geometry, policy)


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    block_size: int = 128,
    causal: bool = True,
    scale: float | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Attention over the kept blocks only; exactly dense attention when the mask keeps every visible block.

    Args:
        query: as in :func:`estimate_blocks`.
        key: as in :func:`estimate_blocks`.
        value: like ``key``.
        mask: bool ``(batch, q_heads, q_blocks, k_blocks)``; what causality hides is ignored.
        block_size: tokens per block (B), 64 or 128.
        causal: whether a query sees only keys up to its own position.
        scale: factor of the dot product, default ``1 / sqrt(head_dim)``.
        backend: as in :func:`estimate_blocks`.

    Returns:
        Like ``query``. A query that sees none of its kept keys gives zero.

    Raises:
        ValueError: an argument is not as above.
    """
    geometry = _check_attention(query, key, value, block_size, causal)
    _check_backend(backend)
    _check_mask(mask, geometry, tuple(query.shape[:2]))
    return reference.block_sparse_attention(query, key, value, mask, geometry, _scale(scale, query))


def xattention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    stride: int = 16,
    block_size: int = 128,
    causal: bool = True,
    scale: float | None = None,
    pattern: Pattern = "antidiagonal",
    backend: Backend | None = None,
) -> torch.Tensor:
    """Score, select and attend: XAttention (arXiv 2503.16428) of one layer.

    Args:
        query: as in :func:`estimate_blocks`.
        key: as in :func:`estimate_blocks`.
        value: like ``key``.
        threshold: cumulative probability to keep, one value or fp32 ``(q_heads,)``, in [0, 1].
        stride: tokens per group (S).
        block_size: tokens per block (B).
        causal: whether a query sees only keys up to its own position.
        scale: factor of the dot product, default ``1 / sqrt(head_dim)``.
        pattern: as in :func:`estimate_blocks`.
        backend: as in :func:`estimate_blocks`.

    Returns:
        Like ``query``.

    Raises:
        ValueError: an argument is not as above.
    """
    scores = estimate_blocks(
        query,
        key,
        stride=stride,
        block_size=block_size,
        causal=causal,
        scale=scale,
        pattern=pattern,
        backend=backend,
    )
    mask = select_blocks(
        scores,
        threshold,
        q_len=query.shape[2],
        k_len=key.shape[2],
        block_size=block_size,
        causal=causal,
        backend=backend,
    )
    return block_sparse_attention(
        query, key, value, mask, block_size=block_size, causal=causal, scale=scale, backend=backend
    )


def sweep_thresholds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: torch.Tensor,
    projection: torch.Tensor,
    *,
    stride: int = 16,
    block_size: int = 128,
    causal: bool = True,
    scale: float | None = None,
    pattern: Pattern = "antidiagonal",
    backend: Backend | None = None,
) -> SweepResult:
    """What every threshold of a grid costs and does to each head, in one pass over the blocks in order of level.

    Args:
        query: as in :func:`estimate_blocks`.
        key: as in :func:`estimate_blocks`.
        value: like ``key``.
        grid: ``(levels,)`` ascending thresholds, the first 0 and the last 1.
        projection: fp32 ``(q_heads, head_dim, R)``: W_o,h, or any factor of the same Gram matrix W_o,h W_o,h^T.
        stride: tokens per group (S).
        block_size: tokens per block (B).
        causal: whether a query sees only keys up to its own position.
        scale: factor of the dot product, default ``1 / sqrt(head_dim)``.
        pattern: as in :func:`estimate_blocks`.
        backend: as in :func:`estimate_blocks`.

    Returns:
        Errors and block counts per head and level, summed over batch and tokens.

    Raises:
        ValueError: an argument is not as above, is not finite, or gives logits more than 700 apart in one row.
    """
    geometry = _check_attention(query, key, value, block_size, causal)
    _check_method(stride, pattern)
    _check_grid(grid)
    _check_projection(projection, query)
    for name, tensor in (("query", query), ("key", key), ("value", value), ("projection", projection)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite numbers, expected finite ones")
    scores = estimate_blocks(
        query,
        key,
        stride=stride,
        block_size=block_size,
        causal=causal,
        scale=scale,
        pattern=pattern,
        backend=backend,
    )
    result = reference.sweep_thresholds(
        query, key, value, scores, grid.to(query.device), projection, geometry, _scale(scale, query)
    )
    if not bool(result.error.isfinite().all()):
        raise ValueError("query and key give attention logits that overflow or lie more than 700 apart in one row")
    return result


def visible_blocks(
    q_len: int, k_len: int, *, block_size: int = 128, causal: bool = True, device: torch.device | None = None
) -> torch.Tensor:
    """Blocks that dense attention computes: bool ``(ceil(q_len / block_size), ceil(k_len / block_size))``.

    Raises:
        ValueError: a length or the block size is not allowed.
    """
    return _check_geometry(q_len, k_len, block_size, causal).visible(device)


def block_density(
    mask: torch.Tensor, *, q_len: int, k_len: int, block_size: int = 128, causal: bool = True
) -> torch.Tensor:
    """Blocks kept over blocks that causality allows, per head.

    Args:
        mask: bool ``(batch, q_heads, q_blocks, k_blocks)``.

    Returns:
        fp32 ``(batch, q_heads)`` in [0, 1].

    Raises:
        ValueError: the mask, a length or the block size is not allowed.
    """
    geometry = _check_geometry(q_len, k_len, block_size, causal)
    _check_mask(mask, geometry)
    kept = (mask & geometry.visible(mask.device)).sum(dim=(-2, -1))
    return kept.float() / geometry.visible_count


def _scale(scale: float | None, query: torch.Tensor) -> float:
    if scale is None:
        return float(query.shape[-1] ** -0.5)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, expected a finite number or None")
    return float(scale)


def _check_backend(backend: str | None) -> None:
    if backend == "triton":
        raise ValueError(
            "backend is 'triton', but this version carries the reference kernels only: use None or 'reference'"
        )
    if backend not in (None, "reference"):
        raise ValueError(f"backend is {backend!r}, allowed are None, 'reference' and 'triton'")


def _check_geometry(q_len: int, k_len: int, block_size: int, causal: bool) -> Geometry:
    _check_block_size(block_size)
    _check_lengths(q_len, k_len)
    return Geometry(q_len, k_len, block_size, bool(causal))


def _check_mask(mask: torch.Tensor, geometry: Geometry, heads: tuple[int, ...] | None = None) -> None:
    blocks = (geometry.q_blocks, geometry.k_blocks)
    batch = ", ".join(str(size) for size in heads) if heads else "batch, q_heads"
    fits = mask.ndim == 4 and mask.shape[2:] == blocks and heads in (None, tuple(mask.shape[:2]))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool ({batch}, {blocks[0]}, {blocks[1]})"
        )


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES or not isinstance(block_size, int):
        raise ValueError(f"block_size is {block_size!r}, allowed are {BLOCK_SIZES}")


def _check_lengths(q_len: int, k_len: int) -> None:
    if q_len < 1:
        raise ValueError(f"q_len is {q_len}, expected at least 1")
    if q_len > k_len:
        raise ValueError(
            f"q_len is {q_len} and k_len {k_len}, expected q_len <= k_len: the queries are the last keys' positions"
        )


def _check_method(stride: int, pattern: str) -> None:
    if stride not in STRIDES or not isinstance(stride, int):
        raise ValueError(f"stride is {stride!r}, allowed are {STRIDES}")
    if pattern not in ("antidiagonal", "diagonal", "random"):
        raise ValueError(f"pattern is {pattern!r}, allowed are 'antidiagonal', 'diagonal' and 'random'")


def _check_attention(
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
    _check_shapes(query, key, value)
    return _check_geometry(query.shape[2], key.shape[2], block_size, causal)


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None) -> None:
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
    _check_lengths(q_len, key.shape[2])


def _check_scores(scores: torch.Tensor, geometry: Geometry) -> None:
    blocks = (geometry.q_blocks, geometry.k_blocks)
    if scores.dtype != torch.float32 or scores.ndim != 4 or scores.shape[2:] != blocks:
        raise ValueError(
            f"scores is {scores.dtype} {tuple(scores.shape)}, expected torch.float32 (batch, q_heads, {blocks[0]}, {blocks[1]})"
        )
    if not bool(scores.isfinite().all()):
        kind = "NaN" if bool(scores.isnan().any()) else "inf"
        raise ValueError(f"scores holds {kind}, expected finite probabilities")


def _check_projection(projection: torch.Tensor, query: torch.Tensor) -> None:
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


def _check_grid(grid: torch.Tensor) -> None:
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or not bool((grid.diff() > 0).all()):
        raise ValueError(f"grid is {grid.tolist()}, expected ascending thresholds from 0 to 1")


def _thresholds(threshold: float | torch.Tensor, q_heads: int, upper: float) -> torch.Tensor:
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
