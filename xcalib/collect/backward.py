"""Backward passes through models whose kernels have none: attention in plain torch, recomputed instead of kept.

Attention is computed a chunk of queries at a time and computed again in the backward pass, as is every decoder block, so that
what is kept between the passes grows with length x hidden size x layers, and with nothing else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from xcalib.models.structure import attention_layers

__all__ = ["differentiable", "gradient_by_chunks", "masked_attention"]

ROWS = 512  # queries of one chunk; every block size divides it
POSITIONS = 256  # whose logits exist at a time


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    block_size: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention over the kept blocks, as :func:`xcalib.kernels.block_sparse_attention`, that autograd can follow.

    Args:
        query: ``(batch, q_heads, length, head_dim)``.
        key: ``(batch, k_heads, length, head_dim)``.
        value: like ``key``.
        mask: bool ``(batch, q_heads, blocks, blocks)`` that keeps each row's own block, as those of
            :func:`xcalib.kernels.select_blocks`; None keeps all.
        block_size: tokens per block (B), 64 or 128.
        scale: factor of the dot product.

    Returns:
        Like ``query``.
    """
    length = query.shape[2]
    parts = []
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        rows = None
        if mask is not None:
            blocks = -(-stop // block_size)
            rows = mask[:, :, start // block_size : blocks, :blocks]
        chunk = partial(_chunk, rows=rows, start=start, block_size=block_size, scale=scale)
        tensors = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
        parts.append(checkpoint(chunk, *tensors, use_reentrant=False))
    return torch.cat(parts, dim=2)


def _chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    rows: torch.Tensor | None,
    start: int,
    block_size: int,
    scale: float,
) -> torch.Tensor:
    """Queries from token ``start`` on over all keys up to their last one; ``rows`` is their part of the mask."""
    queries, keys = query.shape[2], key.shape[2]
    positions = start + torch.arange(queries, device=query.device)
    allowed = torch.arange(keys, device=query.device) <= positions[:, None]  # (queries, keys)
    if rows is not None:
        columns = rows.repeat_interleave(block_size, -1)[..., :keys]
        allowed = allowed & columns.repeat_interleave(block_size, -2)[..., :queries, :]  # (B, Hq, queries, keys)
    group = query.shape[1] // key.shape[1]
    return functional.scaled_dot_product_attention(
        query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), attn_mask=allowed, scale=scale
    )


def gradient_by_chunks(
    hidden: torch.Tensor, loss: Callable[[torch.Tensor, slice], torch.Tensor]
) -> tuple[float, torch.Tensor]:
    """A sum over positions and its gradient, with the logits of a few positions at a time.

    Args:
        hidden: last hidden states ``(positions, hidden)``, detached.
        loss: a chunk of them, and which rows it is, to its part of the sum.

    Returns:
        (the sum, its gradient with respect to ``hidden``).
    """
    total, gradients = 0.0, []
    for start in range(0, len(hidden), POSITIONS):
        rows = slice(start, start + POSITIONS)
        chunk = hidden[rows].clone().requires_grad_(True)
        part = loss(chunk, rows)
        gradients.append(torch.autograd.grad(part, chunk)[0])
        total += float(part.detach())
    return total, torch.cat(gradients)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let gradients flow through a decoder to its activations only, each decoder block computed again in the backward pass.

    Parameters want no gradients meanwhile; afterwards the model is as it was, also after an exception. Nothing wants gradients
    until a tensor is made to: set ``requires_grad`` on the first attention output of interest. What a block calls is called
    a second time in the backward pass.

    Raises:
        ModelError: as :func:`xcalib.models.structure.attention_layers`.
    """
    blocks = [layer.block for layer in attention_layers(model)]
    own = [vars(block).get("forward") for block in blocks]  # set on the instance where a library hooks the module
    # By name: a library that fetches weights for each call puts other parameters in their place.
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    try:
        for name in trained:
            model.get_parameter(name).requires_grad_(False)
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        with torch.enable_grad():
            yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward
        for name in trained:
            model.get_parameter(name).requires_grad_(True)
