"""What each kernel must compute and move, and the least time that takes on a GPU of given ceilings.

``python -m xcalib.bench.floors`` prints the tables of docs/kernels.md. Counts are of whole blocks, as the kernels compute them: a
causal diagonal block costs as much as any other.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "H200",
    "Ceilings",
    "Cost",
    "Shape",
    "attention",
    "level_attention",
    "level_merge",
    "projection",
    "scoring",
    "selection",
    "tables",
]

FP32_BYTES = 4
INDEX_BYTES = 2


@dataclass(frozen=True)
class Ceilings:
    """What a GPU reached in its simplest kernels: matrix products on random data, copies (bytes read plus bytes written)."""

    name: str
    flops: float
    bytes_per_second: float


H200 = Ceilings("H200", flops=788e12, bytes_per_second=4.3e12)


@dataclass(frozen=True)
class Shape:
    """One causal prefill: ``length`` queries and keys, 16-bit elements."""

    length: int
    q_heads: int = 32
    k_heads: int = 8
    head_dim: int = 128
    block_size: int = 128
    batch: int = 1
    element_bytes: int = 2

    @property
    def blocks(self) -> int:
        """Blocks along one side."""
        return -(-self.length // self.block_size)

    @property
    def visible(self) -> int:
        """Block pairs that causality allows, over all heads and sequences."""
        return self.batch * self.q_heads * self.blocks * (self.blocks + 1) // 2

    def tensor_bytes(self, heads: int) -> int:
        """Of one tensor ``(batch, heads, length, head_dim)``."""
        return self.batch * heads * self.length * self.head_dim * self.element_bytes


@dataclass(frozen=True)
class Cost:
    """Floating-point operations on tensor cores, and bytes that must cross the memory bus once."""

    flops: float
    bytes: float

    def floor_ms(self, ceilings: Ceilings) -> float:
        """Least time if arithmetic and memory overlap perfectly."""
        return 1e3 * max(self.flops / ceilings.flops, self.bytes / ceilings.bytes_per_second)


def attention(shape: Shape, density: float = 1.0) -> Cost:
    """Query, key, value and output once; two products per kept block. Density 1 is dense attention."""
    flops = 4 * shape.block_size**2 * shape.head_dim * density * shape.visible
    return Cost(flops, 2 * shape.tensor_bytes(shape.q_heads) + 2 * shape.tensor_bytes(shape.k_heads))


def scoring(shape: Shape, stride: int) -> Cost:
    """``B / S`` row groups meet ``B / S`` column groups in each visible block pair, over ``S * D`` products each.

    Written: one fp32 log-sum-exp per row group and visible key block.
    """
    groups = shape.block_size // stride
    flops = 2 * groups**2 * stride * shape.head_dim * shape.visible
    read = shape.tensor_bytes(shape.q_heads) + shape.tensor_bytes(shape.k_heads)
    return Cost(flops, read + FP32_BYTES * groups * shape.visible)


def selection(shape: Shape, stride: int, density: float) -> Cost:
    """Reads the log-sum-exps once, writes the kept blocks' indices; its arithmetic is not on tensor cores."""
    groups = shape.block_size // stride
    return Cost(0.0, FP32_BYTES * groups * shape.visible + INDEX_BYTES * density * shape.visible)


def projection(shape: Shape) -> Cost:
    """Values times one square factor per query head, in 16 bits."""
    flops = 2 * shape.batch * shape.q_heads * shape.length * shape.head_dim**2
    return Cost(flops, shape.tensor_bytes(shape.k_heads) + shape.tensor_bytes(shape.q_heads))


def level_attention(shape: Shape, levels: int = 32) -> Cost:
    """The sweep's walk: every visible block, and one mean per query and level written (fewer where levels are empty)."""
    dense = attention(shape)
    return Cost(dense.flops, dense.bytes - shape.tensor_bytes(shape.k_heads) + _means_bytes(shape, levels))


def level_merge(shape: Shape, levels: int = 32) -> Cost:
    """The sweep's end of a row: reads the means, writes differences in their place and reads those; no tensor cores."""
    return Cost(0.0, 3 * _means_bytes(shape, levels))


def _means_bytes(shape: Shape, levels: int) -> float:
    return min(levels, shape.blocks) * shape.tensor_bytes(shape.q_heads)


LENGTHS = (32_768, 131_072, 262_144)
STRIDES = (8, 16)
DENSITIES = (0.05, 0.10, 0.25, 0.50)


def tables(ceilings: Ceilings = H200, lengths: Sequence[int] = LENGTHS) -> str:
    """Markdown: counts and floors for 32 query and 8 KV heads of 128 dimensions, 16 bits, blocks of 128."""
    shapes = [Shape(length) for length in lengths]
    counts = []
    for shape in shapes:
        kernels = [("dense attention", attention(shape))]
        for stride in STRIDES:
            kernels.append((f"scoring, S = {stride}", scoring(shape, stride)))
            kernels.append((f"selection, S = {stride}, 10 %", selection(shape, stride, 0.1)))
        kernels.append(("sweep, 32 levels, attention", level_attention(shape)))
        kernels.append(("sweep, 32 levels, merge", level_merge(shape)))
        counts += [
            (_length(shape), name, f"{cost.flops / 1e12:.3g}", f"{cost.bytes / 1e9:.3g}", _ms(cost.floor_ms(ceilings)))
            for name, cost in kernels
        ]
    wholes = [_whole_row(shape, stride, ceilings) for shape in shapes for stride in STRIDES]
    percent = [f"{density:.0%}" for density in DENSITIES]
    return "\n\n".join(
        [
            _table(["L", "kernel", "TFLOP", "GB", f"{ceilings.name} floor, ms"], counts),
            _table(["L", "S", "dense, ms", *(f"whole at {p}, ms (x dense)" for p in percent)], wholes),
        ]
    )


def _whole_row(shape: Shape, stride: int, ceilings: Ceilings) -> tuple[str, ...]:
    """Floors of scoring, selection and attention one after the other, and how many times faster than dense that is."""
    dense = attention(shape).floor_ms(ceilings)
    cells = []
    for density in DENSITIES:
        parts = (scoring(shape, stride), selection(shape, stride, density), attention(shape, density))
        whole = sum(part.floor_ms(ceilings) for part in parts)
        cells.append(f"{_ms(whole)} ({dense / whole:.1f}x)")
    return (_length(shape), str(stride), _ms(dense), *cells)


def _length(shape: Shape) -> str:
    return f"{shape.length // 1024}k"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(tables() + "\n")
