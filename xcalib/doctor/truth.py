"""What the kernels should give, worked out anew from the definitions: whole matrices, token by token, in any precision.

It shares no code with :mod:`xcalib.kernels`, so an error there cannot hide here. For small inputs only.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

__all__ = ["Case", "attention_truth", "scores_truth", "selection_truth", "sweep_truth"]


@dataclass(frozen=True)
class Case:
    """One causal attention call: lengths in tokens, heads, and the method's sizes."""

    q_len: int
    k_len: int
    q_heads: int
    k_heads: int
    head_dim: int
    block_size: int
    stride: int

    def __str__(self) -> str:
        heads = f"{self.q_heads}/{self.k_heads} heads of {self.head_dim}"
        return f"{self.q_len} x {self.k_len} tokens, {heads}, B {self.block_size}, S {self.stride}"

    @cached_property
    def positions(self) -> torch.Tensor:
        """Key position of every query: int64 ``(q_len,)``."""
        return torch.arange(self.k_len - self.q_len, self.k_len)

    @cached_property
    def causal(self) -> torch.Tensor:
        """Keys that a query sees: bool ``(q_len, k_len)``."""
        return torch.arange(self.k_len) <= self.positions[:, None]

    @cached_property
    def visible(self) -> torch.Tensor:
        """Key blocks of which a query block sees a key: bool ``(q_blocks, k_blocks)``."""
        return _by_block(self.causal[None, None].double(), self.block_size)[0, 0] > 0

    @cached_property
    def own(self) -> torch.Tensor:
        """Key blocks that hold a query block's own positions, and key block 0: bool ``(q_blocks, k_blocks)``."""
        here = torch.zeros(self.q_len, self.k_len, dtype=torch.float64)
        here[torch.arange(self.q_len), self.positions] = 1
        kept = _by_block(here[None, None], self.block_size)[0, 0] > 0
        kept[:, 0] = True
        return kept


def _by_block(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """Sums over ``size x size`` blocks of ``(batch, heads, rows, columns)``."""
    rows, columns = matrix.shape[-2:]
    padded = torch.nn.functional.pad(matrix, (0, -columns % size, 0, -rows % size))
    return padded.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).sum((-1, -3))


def _logits(case: Case, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query @ key.repeat_interleave(case.q_heads // case.k_heads, 1).mT / math.sqrt(case.head_dim)


def scores_truth(
    case: Case, pattern: str, query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """``(batch, q_heads, q_blocks, k_blocks)`` by pattern ``rows`` or ``antidiagonal``, computed in ``dtype``."""
    logits, stride = _logits(case, query.to(dtype), key.to(dtype)), case.stride
    if pattern == "rows":
        chosen = [min(start + stride, case.q_len) - 1 for start in range(0, case.q_len, stride)]
        weights = logits[:, :, chosen].masked_fill(~case.causal[chosen], -torch.inf).softmax(-1)
        width = case.block_size
    else:
        padded = torch.nn.functional.pad(logits, (0, -case.k_len % stride, 0, -case.q_len % stride))
        groups = padded.unflatten(-1, (-1, stride)).unflatten(-3, (-1, stride))  # (B, H, rows, S, columns, S)
        sums = groups.flip(3).diagonal(dim1=3, dim2=5).sum(-1) / stride  # query S-1-t of a group meets its key t
        rows, columns = sums.shape[-2:]
        last = case.k_len - case.q_len + stride * torch.arange(1, rows + 1) - 1
        weights = sums.masked_fill(stride * torch.arange(columns) > last[:, None], -torch.inf).softmax(-1)
        width = case.block_size // stride
    total = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % width)).unflatten(-1, (-1, width)).sum(-1)
    per_block = case.block_size // stride
    return torch.stack([rows.mean(-2) for rows in total.split(per_block, -2)], -2)


def selection_truth(case: Case, scores: torch.Tensor, tau: float, order: str) -> torch.Tensor:
    """The kept blocks of ``scores``, row by row in exact sums: bool of the same shape."""
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    limit = float(torch.tensor(tau, dtype=torch.float32))
    for batch, head, row in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        line, visible, own = scores[batch, head, row].double().tolist(), case.visible[row], case.own[row]
        chosen = [block for block in range(len(line)) if own[block]]
        rest = sorted((b for b in range(len(line)) if visible[b] and not own[b]), key=lambda b: (-line[b], b))
        before = min(b for b in chosen if b > 0 or len(chosen) == 1) - 1
        if order == "recent" and before in rest and tau > 0:
            rest.remove(before)
            chosen.append(before)
        while rest and (tau >= 1 or math.fsum(line[b] for b in chosen) < limit):
            chosen.append(rest.pop(0))
        kept[batch, head, row, chosen] = True
    return kept


def attention_truth(
    case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """fp64 attention over the kept blocks of ``mask``, dense without one; like ``query``."""
    seen = case.causal
    if mask is not None:
        tokens = mask.repeat_interleave(case.block_size, -2).repeat_interleave(case.block_size, -1)
        seen = seen & tokens[..., : case.q_len, : case.k_len]
    weights = _logits(case, query.double(), key.double()).masked_fill(~seen, -torch.inf).softmax(-1)
    return weights @ value.double().repeat_interleave(case.q_heads // case.k_heads, 1)


def sweep_truth(
    case: Case,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    projection: torch.Tensor,
    masks: list[torch.Tensor],
) -> torch.Tensor:
    """Squared error of every mask after the projection ``(q_heads, head_dim, R)``: fp64 ``(q_heads, masks)``."""
    dense = attention_truth(case, *tensors)
    errors = [(attention_truth(case, *tensors, mask) - dense) @ projection.double() for mask in masks]
    return torch.stack([error.square().sum((0, 2, 3)) for error in errors], -1)
