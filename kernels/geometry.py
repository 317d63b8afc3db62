"""Which blocks exist, which are visible and which are always kept.

Queries are aligned to the bottom right of the keys: query ``t`` stands at key position ``t + k_len - q_len``.
"""

from dataclasses import dataclass

import torch

__all__ = ["Geometry"]


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


@dataclass(frozen=True)
class Geometry:
    """Block geometry of one attention call (lengths in tokens, ``q_len <= k_len``)."""

    q_len: int
    k_len: int
    block_size: int
    causal: bool

    @property
    def offset(self) -> int:
        """Key position of the first query."""
        return self.k_len - self.q_len

    @property
    def q_blocks(self) -> int:
        return _ceil_div(self.q_len, self.block_size)

    @property
    def k_blocks(self) -> int:
        return _ceil_div(self.k_len, self.block_size)

    def query_span(self, row: int) -> tuple[int, int]:
        """Half-open range of query indices in query block ``row``."""
        return row * self.block_size, min((row + 1) * self.block_size, self.q_len)

    def visible_k_blocks(self, row: int) -> int:
        """How many key blocks, from the first, query block ``row`` may look at."""
        if not self.causal:
            return self.k_blocks
        _, stop = self.query_span(row)
        return (self.offset + stop - 1) // self.block_size + 1

    def own_k_blocks(self, row: int) -> tuple[int, int]:
        """Half-open range of the key blocks that hold the positions of query block ``row`` (one or two of them)."""
        start, stop = self.query_span(row)
        return (self.offset + start) // self.block_size, (self.offset + stop - 1) // self.block_size + 1

    def visible(self, device: torch.device | None = None) -> torch.Tensor:
        """Bool ``(q_blocks, k_blocks)``."""
        counts = torch.tensor([self.visible_k_blocks(row) for row in range(self.q_blocks)], device=device)
        return torch.arange(self.k_blocks, device=device) < counts[:, None]

    def always_kept(self, device: torch.device | None = None) -> torch.Tensor:
        """Bool ``(q_blocks, k_blocks)``: the sink (key block 0) and each query block's own key blocks."""
        own = torch.tensor([self.own_k_blocks(row) for row in range(self.q_blocks)], device=device)  # (nq, 2)
        blocks = torch.arange(self.k_blocks, device=device)
        return (blocks == 0) | ((blocks >= own[:, :1]) & (blocks < own[:, 1:]))

    @property
    def visible_count(self) -> int:
        """Blocks that dense attention computes for one head of one sequence."""
        return sum(self.visible_k_blocks(row) for row in range(self.q_blocks))
