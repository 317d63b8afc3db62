"""XAttention of several sequences of different lengths, packed one after the other."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from xcalib.kernels.api import attend
from xcalib.kernels.arguments import (
    Backend,
    Order,
    Pattern,
    Precision,
    check_attention,
    check_method,
    limits_of,
    scale_of,
)
from xcalib.kernels.backends import resolve
from xcalib.kernels.geometry import Geometry

__all__ = ["xattention_varlen"]


def xattention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    threshold: float | torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
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
    """:func:`xcalib.kernels.xattention` of each sequence for itself; on Triton the attention of all is one launch.

    Args:
        query: fp32, fp16 or bf16 ``(total_q, q_heads, head_dim)``, the sequences one after the other.
        key: same dtype, ``(total_k, k_heads, head_dim)``.
        value: like ``key``.
        threshold: cumulative probability to keep, one value or fp32 ``(q_heads,)``, in [0, 1].
        cu_seqlens_q: integers ``(sequences + 1,)``, where each sequence begins in ``query``, and at last ``total_q``.
            Launches need the lengths on the host: give CPU tensors to spare the GPU a wait.
        cu_seqlens_k: the same for ``key``; no sequence has more queries than keys.
        stride: tokens per group (S).
        block_size: tokens per block (B).
        causal: whether a query sees only keys up to its own position, the last query standing at its sequence's last key.
        scale: factor of the dot product, default ``1 / sqrt(head_dim)``.
        pattern: as in :func:`xcalib.kernels.estimate_blocks`.
        order: of preference, as in :func:`xcalib.kernels.select_blocks`.
        precision: of the scores, as in :func:`xcalib.kernels.estimate_blocks`.
        backend: as in :func:`xcalib.kernels.estimate_blocks`.

    Returns:
        Like ``query``.

    Raises:
        ValueError: an argument is not as above; the message names it, its value and what is allowed.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 3:
            raise ValueError(f"{name} has {tensor.ndim} dimensions, expected (tokens, heads, head_dim)")
    queries = _sequences("cu_seqlens_q", cu_seqlens_q, query)
    keys, values = (_sequences("cu_seqlens_k", cu_seqlens_k, tensor) for tensor in (key, value))
    if len(queries) != len(keys):
        raise ValueError(
            f"cu_seqlens_q is of {len(queries)} sequences and cu_seqlens_k of {len(keys)}, expected as many in both"
        )
    check_method(stride, pattern, precision, order)
    limits = limits_of(threshold, query.shape[1], upper=1.0).to(query.device)
    sequences = list(zip(queries, keys, values, strict=True))
    geometries = [check_attention(*sequence, block_size, causal) for sequence in sequences]
    if resolve(backend, query, key, value) == "triton":
        return _packed(query, key, value, sequences, geometries, limits, stride, pattern, order, precision, scale)
    outputs = [
        attend(
            *sequence,
            limits,
            stride=stride,
            block_size=block_size,
            causal=causal,
            scale=scale,
            pattern=pattern,
            order=order,
            precision=precision,
            backend="reference",
        )[0]
        for sequence in sequences
    ]
    return torch.cat([output[0].transpose(0, 1) for output in outputs])


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    geometries: Sequence[Geometry],
    limits: torch.Tensor,
    stride: int,
    pattern: str,
    order: str,
    precision: str,
    scale: float | None,
) -> torch.Tensor:
    from xcalib.kernels.attention import block_sparse_attention_varlen, pack_lists
    from xcalib.kernels.pipeline import choose_blocks

    factor = scale_of(scale, query)
    lists = [
        choose_blocks(
            sequence[0],
            sequence[1],
            limits,
            geometry,
            stride=stride,
            scale=factor,
            pattern=pattern,
            order=order,
            precision=precision,
        )
        for sequence, geometry in zip(sequences, geometries, strict=True)
    ]
    return block_sparse_attention_varlen(query, key, value, pack_lists(lists, geometries), factor)


def _sequences(name: str, borders: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Views ``(1, heads, length, head_dim)``, one a sequence, of packed ``(total, heads, head_dim)``."""
    places = borders.tolist() if borders.ndim == 1 and not borders.is_floating_point() else []
    ascending = all(first < second for first, second in pairwise(places))
    if len(places) < 2 or places[0] != 0 or places[-1] != tokens.shape[0] or not ascending:
        raise ValueError(
            f"{name} is {borders.tolist()}, expected ascending integers from 0 to {tokens.shape[0]}, the tokens there are"
        )
    return [
        tokens[first:last].transpose(0, 1)[None] for first, last in pairwise(places)
    ]  # (1, heads, length, head_dim)
