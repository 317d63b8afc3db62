"""How a loss changes, to first order, with every threshold of a grid: plain torch, on any device."""

import torch
from torch.nn import functional

from xcalib.kernels.geometry import Geometry

__all__ = ["sweep_slopes"]

ROWS = 256  # queries of one chunk, at least a block


def sweep_slopes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gradient: torch.Tensor,
    level: torch.Tensor,
    levels: int,
    *,
    block_size: int,
    scale: float,
) -> torch.Tensor:
    """Inner product of a gradient with the output that each threshold gives, summed over tokens; causal.

    The difference of two levels is the loss's first-order change when a head goes from one to the other. As in the sweep, all
    levels come from one pass: a level's output is a quotient of sums over the blocks that enter up to it.

    Args:
        query: ``(batch, q_heads, q_len, head_dim)``.
        key: ``(batch, k_heads, k_len, head_dim)``.
        value: like ``key``.
        gradient: of the loss with respect to the attention output, like ``query``.
        level: int64 or uint8 ``(batch, q_heads, q_blocks, k_blocks)``, the first threshold that keeps each block,
            ``levels`` where none does, as :func:`xcalib.kernels.reference.block_levels` gives it.
        levels: thresholds of the grid.
        block_size: tokens per block (B).
        scale: factor of the dot product.

    Returns:
        fp64 ``(q_heads, levels)``, in the unit of the loss.
    """
    geometry = Geometry(query.shape[2], key.shape[2], block_size, True)
    total = torch.zeros((query.shape[1], levels), dtype=torch.float64, device=query.device)
    step = max(1, ROWS // block_size)
    for first in range(0, geometry.q_blocks, step):
        last = min(first + step, geometry.q_blocks)
        mass, slope = _by_block(query, key, value, gradient, geometry, first, last, scale)  # (B, Hq, rows, blocks)
        rows = first + torch.arange(mass.shape[2], device=level.device) // block_size
        place = level[:, :, rows, : mass.shape[-1]].long()
        empty = mass.new_zeros((*mass.shape[:3], levels + 1))
        kept = empty.scatter_add(-1, place, mass).cumsum(-1)[..., :levels]  # (B, Hq, rows, levels)
        along = empty.scatter_add(-1, place, slope).cumsum(-1)[..., :levels]
        total += (along / kept.clamp(min=torch.finfo(torch.float64).tiny)).sum((0, 2))
    return total


def _by_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gradient: torch.Tensor,
    geometry: Geometry,
    first: int,
    last: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of query blocks ``first`` to ``last``: softmax weights, and weights times ``gradient . value``, summed over each key block.

    Both fp64 ``(batch, q_heads, queries, blocks)``, and both times the same number in each row, whatever it is.
    """
    start, stop = geometry.query_span(first)[0], geometry.query_span(last - 1)[1]
    blocks, size = geometry.visible_k_blocks(last - 1), geometry.block_size
    reach = min(blocks * size, geometry.k_len)
    heads = (key.shape[1], -1)
    keys, values = key[:, :, None, :reach].float(), value[:, :, None, :reach].float()  # (B, Hkv, 1, reach, D)
    logits = (query[:, :, start:stop].float() * scale).unflatten(1, heads) @ keys.mT  # (B, Hkv, G, rows, reach)
    positions = geometry.offset + torch.arange(start, stop, device=query.device)
    logits.masked_fill_(torch.arange(reach, device=query.device) > positions[:, None], -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    slopes = gradient[:, :, start:stop].float().unflatten(1, heads) @ values.mT * weights
    padded = [functional.pad(part.flatten(1, 2), (0, blocks * size - reach)) for part in (weights, slopes)]
    mass, slope = (part.unflatten(-1, (blocks, size)).sum(-1).double() for part in padded)
    return mass, slope
