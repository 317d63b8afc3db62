"""The public functions: they check their arguments, choose the backend and call it."""

import math
from typing import Any

import torch

from xcalib.kernels import reference
from xcalib.kernels.arguments import (
    BLOCK_SIZES,
    DTYPES,
    HEAD_DIMS,
    STRIDES,
    Backend,
    NonFiniteValueError,
    Order,
    Pattern,
    Policy,
    Precision,
    check_attention,
    check_geometry,
    check_grid,
    check_mask,
    check_method,
    check_order,
    check_projection,
    check_scores,
    limits_of,
    refuse_fp8,
    scale_of,
)
from xcalib.kernels.backends import resolve
from xcalib.kernels.reference import SweepResult

__all__ = [
    "BLOCK_SIZES",
    "DTYPES",
    "HEAD_DIMS",
    "STRIDES",
    "Backend",
    "Order",
    "Pattern",
    "Policy",
    "Precision",
    "attend",
    "block_density",
    "block_sparse_attention",
    "estimate_blocks",
    "select_blocks",
    "sweep_thresholds",
    "visible_blocks",
    "xattention",
]


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
    precision: Precision = "native",
    backend: Backend | None = None,
) -> torch.Tensor:
    """How much attention each query block pays each key block, from strided samples (paper section 2.1).

    Groups of ``stride`` queries meet groups of ``stride`` keys through one sum along the sampled pattern; a softmax over
    the visible key groups is summed inside each key block and averaged over the query block's groups. By pattern ``rows``, which
    is ours and not the paper's, the last query of a group, or the last there is, meets every key by itself: the weights of one
    query in ``stride`` are exact, for as many products.

    Args:
        query: fp32, fp16 or bf16 ``(batch, q_heads, q_len, head_dim)``, ``q_len <= k_len``; query ``t`` stands at key
            position ``t + k_len - q_len``.
        key: same dtype, ``(batch, k_heads, k_len, head_dim)``; ``k_heads`` divides ``q_heads``.
        stride: tokens per group (S), one of 4, 8, 16, 32, 64.
        block_size: tokens per block (B), 64 or 128.
        causal: whether a query sees only keys up to its own position.
        scale: factor of the dot product, default ``1 / sqrt(head_dim)``; the score divides it by ``stride`` as well, but not by
            ``rows``.
        pattern: which query of a group meets which key: antidiagonal, diagonal or random (one permutation drawn from ``seed``),
            or ``rows``.
        seed: of the random pattern.
        precision: ``"native"``, or ``"fp8"``: both operands are rounded to e4m3 first, with one scale per group of tokens
            (Triton only; on GPUs that have fp8).
        backend: ``"reference"``, ``"triton"`` or None: Triton on CUDA, the reference elsewhere, unless the environment variable
            ``XCALIB_BACKEND`` names one; see :mod:`xcalib.kernels.backends`.

    Returns:
        fp32 ``(batch, q_heads, q_blocks, k_blocks)``; each row sums to 1 over its visible blocks and is 0 elsewhere.

    Raises:
        ValueError: an argument is not as above; the message names it, its value and what is allowed.
    """
    geometry = check_attention(query, key, None, block_size, causal)
    check_method(stride, pattern, precision)
    settings: dict[str, Any] = {
        "stride": stride,
        "block_size": block_size,
        "causal": geometry.causal,
        "scale": scale_of(scale, query),
        "pattern": pattern,
        "seed": seed,
    }
    if resolve(backend, query, key) == "triton":
        from xcalib.kernels import scoring

        return scoring.estimate_blocks(query, key, precision=precision, **settings)
    refuse_fp8(precision)
    return reference.estimate_blocks(query, key, **settings)


def select_blocks(
    scores: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    q_len: int,
    k_len: int,
    block_size: int = 128,
    causal: bool = True,
    policy: Policy = "threshold",
    order: Order = "score",
    backend: Backend | None = None,
) -> torch.Tensor:
    """The fewest key blocks of each row whose probability reaches the threshold (paper section 2.2).

    The sink (key block 0) and the blocks that hold the row's own positions are always kept and count towards the
    threshold. The others follow by score, ties by the lower block index. 0 keeps only those that are always kept; 1 keeps every
    visible block.

    ``order="recent"`` departs from the paper: right after the blocks always kept comes the one before the row's own, whatever its
    score, for the score is a mean over the row and the row's first queries look there. Every threshold above 0 keeps it, and it
    counts towards the threshold; by the other policies it is kept where there is room.

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
        order: of preference among the blocks that are not always kept: ``"score"`` (the paper's) or ``"recent"``.
        backend: as in :func:`estimate_blocks`.

    Returns:
        bool mask of the scores' shape, False on invisible blocks.

    Raises:
        ValueError: an argument is not as above, or scores are NaN.
    """
    geometry = check_geometry(q_len, k_len, block_size, causal)
    check_scores(scores, geometry)
    if policy not in ("threshold", "top-k", "ratio"):
        raise ValueError(f"policy is {policy!r}, allowed are 'threshold', 'top-k' and 'ratio'")
    check_order(order)
    limits = limits_of(threshold, scores.shape[1], upper=math.inf if policy == "top-k" else 1.0)
    if policy == "top-k" and not torch.equal(limits, limits.round()):
        raise ValueError(f"threshold is {limits.tolist()}, expected whole numbers of blocks for policy 'top-k'")
    if resolve(backend, scores) == "triton":
        from xcalib.kernels import selection

        return selection.mask_from_lists(selection.select_blocks(scores, limits, geometry, policy, order), geometry)
    return reference.select_blocks(scores, limits, geometry, policy, order)


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
    geometry = check_attention(query, key, value, block_size, causal)
    check_mask(mask, geometry, tuple(query.shape[:2]))
    if resolve(backend, query, key, value) == "triton":
        from xcalib.kernels import attention, selection

        lists = selection.lists_from_mask(mask, geometry)
        return attention.block_sparse_attention(query, key, value, lists, geometry, scale_of(scale, query))
    return reference.block_sparse_attention(query, key, value, mask, geometry, scale_of(scale, query))


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
    order: Order = "score",
    precision: Precision = "native",
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
        order: of preference, as in :func:`select_blocks`.
        precision: of the scores, as in :func:`estimate_blocks`.
        backend: as in :func:`estimate_blocks`.

    Returns:
        Like ``query``.

    Raises:
        ValueError: an argument is not as above.
    """
    check_attention(query, key, value, block_size, causal)  # before the threshold is held against the query's heads
    limits = limits_of(threshold, query.shape[1], upper=1.0)
    output, _ = attend(
        query,
        key,
        value,
        limits,
        stride=stride,
        block_size=block_size,
        causal=causal,
        scale=scale,
        pattern=pattern,
        order=order,
        precision=precision,
        backend=backend,
    )
    return output


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    thresholds: torch.Tensor,
    *,
    stride: int = 16,
    block_size: int = 128,
    causal: bool = True,
    scale: float | None = None,
    pattern: Pattern = "antidiagonal",
    order: Order = "score",
    precision: Precision = "native",
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`xattention` for callers that run it often: thresholds were checked before, and the blocks kept are counted.

    Args:
        query: as in :func:`estimate_blocks`.
        key: as in :func:`estimate_blocks`.
        value: like ``key``.
        thresholds: fp32 ``(q_heads,)`` in [0, 1], which is not checked: reading values of a GPU makes the host wait.
        stride: tokens per group (S).
        block_size: tokens per block (B).
        causal: whether a query sees only keys up to its own position.
        scale: factor of the dot product, default ``1 / sqrt(head_dim)``.
        pattern: as in :func:`estimate_blocks`.
        order: of preference, as in :func:`select_blocks`.
        precision: as in :func:`estimate_blocks`.
        backend: as in :func:`estimate_blocks`.

    Returns:
        (output like ``query``, blocks kept of each query block, int32 ``(batch, q_heads, q_blocks)``, on the same device).

    Raises:
        ValueError: a shape, dtype or setting is not as above.
    """
    geometry = check_attention(query, key, value, block_size, causal)
    check_method(stride, pattern, precision, order)
    factor = scale_of(scale, query)
    if resolve(backend, query, key, value) == "triton":
        from xcalib.kernels import pipeline

        settings: dict[str, Any] = {"stride": stride, "scale": factor, "pattern": pattern, "precision": precision}
        return pipeline.attend(query, key, value, thresholds, geometry, order=order, **settings)
    refuse_fp8(precision)
    scores = reference.estimate_blocks(
        query,
        key,
        stride=stride,
        block_size=block_size,
        causal=geometry.causal,
        scale=factor,
        pattern=pattern,
        seed=0,
    )
    mask = reference.select_blocks(scores, thresholds, geometry, "threshold", order)
    return reference.block_sparse_attention(query, key, value, mask, geometry, factor), mask.sum(-1, dtype=torch.int32)


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
    order: Order = "score",
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
        order: of preference, as in :func:`select_blocks`.
        backend: as in :func:`estimate_blocks`.

    Returns:
        Errors and block counts per head and level, summed over batch and tokens.

    Raises:
        ValueError: an argument is not as above.
        NonFiniteValueError: an argument is not finite, or gives logits more than 700 apart in one row.
    """
    geometry = check_attention(query, key, value, block_size, causal)
    check_method(stride, pattern, order=order)
    check_grid(grid)
    check_projection(projection, query)
    for name, tensor in (("query", query), ("key", key), ("value", value), ("projection", projection)):
        if not bool(torch.stack(tensor.aminmax()).isfinite().all()):  # read once: NaN is the least and the largest
            raise NonFiniteValueError(f"{name} holds NaN or infinite numbers, expected finite ones")
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
    arguments = (query, key, value, scores, grid.to(query.device), projection, geometry, scale_of(scale, query))
    if resolve(backend, query, key, value) == "triton":
        from xcalib.kernels import sweep

        result = sweep.sweep_thresholds(*arguments, order)
    else:
        result = reference.sweep_thresholds(*arguments, order)
    if not bool(result.error.isfinite().all()):
        raise NonFiniteValueError(
            "query and key give attention logits that overflow or lie more than 700 apart in one row"
        )
    return result


def visible_blocks(
    q_len: int, k_len: int, *, block_size: int = 128, causal: bool = True, device: torch.device | None = None
) -> torch.Tensor:
    """Blocks that dense attention computes: bool ``(ceil(q_len / block_size), ceil(k_len / block_size))``.

    Raises:
        ValueError: a length or the block size is not allowed.
    """
    return check_geometry(q_len, k_len, block_size, causal).visible(device)


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
    geometry = check_geometry(q_len, k_len, block_size, causal)
    check_mask(mask, geometry)
    kept = (mask & geometry.visible(mask.device)).sum(dim=(-2, -1))
    return kept.float() / geometry.visible_count
