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
        blocks = torch.arange(self.k_blocks, device=device)
        if not self.causal:
            return (blocks >= 0).expand(self.q_blocks, -1)
        _, last = self._own_blocks(device)
        return blocks <= last[:, None]

    def always_kept(self, device: torch.device | None = None) -> torch.Tensor:
        """Bool ``(q_blocks, k_blocks)``: the sink (key block 0) and each query block's own key blocks."""
        first, last = self._own_blocks(device)
        blocks = torch.arange(self.k_blocks, device=device)
        return (blocks == 0) | ((blocks >= first[:, None]) & (blocks <= last[:, None]))

    def previous(self, device: torch.device | None = None) -> torch.Tensor:
        """Bool ``(q_blocks, k_blocks)``: the key block before each query block's own; none where that is the sink or missing."""
        first, _ = self._own_blocks(device)
        blocks = torch.arange(self.k_blocks, device=device)
        return (blocks > 0) & (blocks == first[:, None] - 1)

    @property
    def visible_count(self) -> int:
        """Blocks that dense attention computes for one head of one sequence."""
        if not self.causal:
            return self.q_blocks * self.k_blocks
        full = self.q_blocks - 1  # rows of block_size queries: each sees one block more than the row before
        first = self.visible_k_blocks(0) if full else 0
        return full * first + full * (full - 1) // 2 + self.visible_k_blocks(full)

    def _own_blocks(self, device: torch.device | None) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last key block of each query block's own positions, int64 ``(q_blocks,)``; nothing makes the host wait."""
        starts = torch.arange(0, self.q_len, self.block_size, device=device)
        ends = (starts + self.block_size).clamp_(max=self.q_len)
        return (self.offset + starts) // self.block_size, (self.offset + ends - 1) // self.block_size
