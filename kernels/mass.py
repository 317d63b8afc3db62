"""How much attention every threshold of a grid leaves out, in plain torch on any device."""

import torch

from xcalib.kernels.api import estimate_blocks
from xcalib.kernels.arguments import Order, Pattern, check_attention, check_grid, check_method, scale_of
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.reference import block_levels

__all__ = ["dropped_mass"]


def dropped_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: torch.Tensor,
    *,
    stride: int = 16,
    block_size: int = 128,
    scale: float | None = None,
    pattern: Pattern = "antidiagonal",
    order: Order = "score",
) -> torch.Tensor:
    """True attention probability (not the estimated one) outside the blocks that each threshold keeps; causal.

    Args:
        query: ``(batch, q_heads, q_len, head_dim)``.
        key: ``(batch, k_heads, k_len, head_dim)``.
        grid: ``(levels,)`` ascending thresholds, the first 0 and the last 1.
        stride: tokens per group (S).
        block_size: tokens per block (B).
        scale: factor of the dot product, default ``1 / sqrt(head_dim)``.
        pattern: as in :func:`xcalib.kernels.estimate_blocks`.
        order: of preference, as in :func:`xcalib.kernels.select_blocks`.

    Returns:
        fp64 ``(q_heads, levels)``, in [0, 1] per token and summed over batch and tokens.

    Raises:
        ValueError: an argument is not as above.
    """
    geometry = check_attention(query, key, None, block_size, True)
    check_method(stride, pattern, order=order)
    check_grid(grid)
    factor = scale_of(scale, query)
    scores = estimate_blocks(query, key, stride=stride, block_size=block_size, scale=factor, pattern=pattern)
    level = block_levels(scores, grid.to(query.device), geometry, order)  # (B, Hq, nq, nk)
    total = torch.zeros((query.shape[1], len(grid) + 1), dtype=torch.float64, device=query.device)
    for row in range(geometry.q_blocks):
        blocks = geometry.visible_k_blocks(row)
        mass = _block_mass(query, key, geometry, row, factor)  # (B, Hq, nk)
        entered = torch.zeros_like(total).expand(len(mass), -1, -1).clone()
        entered.scatter_add_(-1, level[:, :, row, :blocks], mass.double())
        total += entered.sum(0)
    kept = total[:, :-1].cumsum(-1)  # (Hq, levels)
    return (kept[:, -1:] - kept).clamp_(min=0)


def _block_mass(query: torch.Tensor, key: torch.Tensor, geometry: Geometry, row: int, scale: float) -> torch.Tensor:
    """Probability of each visible key block in one row, summed over its queries: fp32 ``(batch, q_heads, blocks)``."""
    start, stop = geometry.query_span(row)
    blocks, size = geometry.visible_k_blocks(row), geometry.block_size
    reach = min(blocks * size, geometry.k_len)
    queries = (query[:, :, start:stop].float() * scale).unflatten(1, (key.shape[1], -1))  # (B, Hkv, G, Bq, D)
    logits = (queries @ key[:, :, None, :reach].float().mT).flatten(1, 2)  # (B, Hq, Bq, reach)
    positions = geometry.offset + torch.arange(start, stop, device=query.device)
    hidden = torch.arange(reach, device=query.device) > positions[:, None]
    weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1).sum(-2)  # (B, Hq, reach)
    padded = torch.nn.functional.pad(weights, (0, blocks * size - reach))
    return padded.unflatten(-1, (blocks, size)).sum(-1)
