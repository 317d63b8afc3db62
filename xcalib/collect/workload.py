"""A decoder and its samples in plain numbers, and what a prediction of memory says of them."""

from dataclasses import dataclass
from typing import Literal, get_args

from xcalib.kernels.api import Pattern

__all__ = ["PHASES", "Peak", "Phase", "Workload"]

Phase = Literal["sweep", "gains", "joint", "slopes", "gradients", "mass", "evaluate"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class Workload:
    """A decoder and the sample that it is measured on, in plain numbers.

    Attributes:
        layers: decoder blocks, all of them attending.
        query_heads: of each layer.
        kv_heads: of each layer.
        head_dim: of each head (D).
        hidden: width of the residual stream.
        intermediate: width of the MLP; of a mixture, that of all experts that a token visits.
        vocabulary: logits of a position.
        weight_bytes: of all parameters and buffers.
        length: tokens of the longest sample.
        element: bytes of an activation, 2 or 4.
        samples: of one set, those that this process measures.
        block_size: tokens per block (B).
        levels: thresholds of the grid.
        every: KLs are taken at every such position.
        allocations: joint densities.
        plans: thresholds that an evaluation compares.
        asking: whether an evaluation's samples ask something: their caches are kept.
        triton: whether the Triton kernels run, not the reference.
        host: whether the device's memory is the host's.
        stride: tokens per group of the scoring (S).
        pattern: of the scoring.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    weight_bytes: int
    length: int
    element: int = 4
    samples: int = 1
    block_size: int = 128
    levels: int = 28
    every: int = 7
    allocations: int = 3
    plans: int = 3
    asking: bool = False
    triton: bool = False
    host: bool = True
    stride: int = 16
    pattern: Pattern = "rows"

    @property
    def block_pairs(self) -> int:
        """Entries of one head's block scores."""
        return (-(-self.length // self.block_size)) ** 2

    @property
    def stream(self) -> int:
        """Bytes of one activation of every token, ``(length, hidden)``."""
        return self.element * self.length * self.hidden

    @property
    def heads(self) -> int:
        """Bytes of all queries, ``(query_heads, length, head_dim)``."""
        return self.element * self.length * self.query_heads * self.head_dim

    @property
    def key_values(self) -> int:
        """Bytes of one layer's keys and values."""
        return 2 * self.element * self.length * self.kv_heads * self.head_dim

    @property
    def compared(self) -> int:
        """Positions at which KLs are taken."""
        return self.length // self.every


@dataclass(frozen=True)
class Peak:
    """Bytes at the worst moment of a phase.

    Attributes:
        phase: what runs.
        weights: of the model.
        activations: what the decoder itself works on in one layer.
        working: what measuring works on in one layer: with some key/value heads at a time it is less.
        kept: for later, of all layers of the sample in work.
        logits: of a few positions.
        host: on the host, of all samples; part of ``total`` where the device's memory is the host's.
        total: on the device.
    """

    phase: Phase
    weights: int
    activations: int
    working: int
    kept: int
    logits: int
    host: int
    total: int
