"""XAttention on Triton from end to end: the scores never reach memory as such, the mask does not exist."""

import torch

from xcalib.kernels.attention import block_sparse_attention
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.scoring import block_lse, scoring_chunk
from xcalib.kernels.selection import BlockLists, select_from_lse

__all__ = ["attend", "choose_blocks"]

LSE_BYTES = 1 << 30  # of the scores' intermediate; what needs more is done in chunks of key heads


def choose_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    limits: torch.Tensor,
    geometry: Geometry,
    *,
    stride: int,
    scale: float,
    pattern: str,
    precision: str,
    order: str = "score",
) -> BlockLists:
    """Scoring and selection, a few key heads at a time when the log-sum-exps would take more than ``LSE_BYTES``.

    Args:
        query: ``(batch, q_heads, q_len, head_dim)``.
        key: ``(batch, k_heads, k_len, head_dim)``.
        limits: fp32 ``(q_heads,)``, cumulative probabilities to keep.
        geometry: of the two.
        stride: tokens per group (S).
        scale: factor of the dot product.
        pattern: of the scored samples.
        precision: of the scores, ``"native"`` or ``"fp8"``.
        order: of preference, ``"score"`` or ``"recent"``.
    """
    batch, q_heads, q_len, _ = query.shape
    k_heads = key.shape[1]
    group = q_heads // k_heads
    chunk = scoring_chunk(q_heads, k_heads, -(-q_len // stride), geometry.k_blocks, LSE_BYTES // batch)
    parts = []
    for first in range(0, k_heads, chunk):
        heads = slice(first, min(first + chunk, k_heads))
        lse = block_lse(
            query,
            key,
            stride=stride,
            block_size=geometry.block_size,
            causal=geometry.causal,
            scale=scale,
            pattern=pattern,
            precision=precision,
            k_heads=heads,
        )
        of_heads = limits[heads.start * group : heads.stop * group]
        parts.append(select_from_lse(lse, of_heads, geometry, stride, order=order))
    if len(parts) == 1:
        return parts[0]
    return BlockLists(torch.cat([part.indices for part in parts], 1), torch.cat([part.counts for part in parts], 1))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    limits: torch.Tensor,
    geometry: Geometry,
    *,
    stride: int,
    scale: float,
    pattern: str,
    precision: str,
    order: str = "score",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score, select and attend; arguments as in :func:`choose_blocks`, ``value`` like ``key``.

    Returns:
        (output like ``query``, blocks kept of each query block, int32 ``(batch, q_heads, q_blocks)``); nothing makes the host
        wait.
    """
    lists = choose_blocks(
        query, key, limits, geometry, stride=stride, scale=scale, pattern=pattern, precision=precision, order=order
    )
    return block_sparse_attention(query, key, value, lists, geometry, scale), lists.counts
