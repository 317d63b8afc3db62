"""What passes of a calibration compute: FLOPs, and the other amounts that their time depends on, from plain numbers.

An amount has a name, ``operation.term``: ``sweep.flops``, ``linear.elements``. A machine has a time for one unit of each
(:mod:`xcalib.plan.machine`). FLOPs count a multiplication and an addition as two. Attention counts the pairs of query and key
that causality allows; where a kernel works in blocks or chunks, the pairs in all that it touches.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from xcalib.collect.backward import ROWS as MASKED_ROWS
from xcalib.kernels.slopes import ROWS as SLOPE_ROWS
from xcalib.plan.shape import ModelShape

__all__ = [
    "Work",
    "attention",
    "blocks",
    "dense_pass",
    "linear",
    "logits",
    "masked",
    "projections",
    "scoring",
    "selection",
    "slope_pass",
    "slopes",
    "sparse",
    "sparse_pass",
    "sweep",
    "sweep_pass",
    "total",
]

# Attention that autograd follows runs forward in the forward pass, again where its block is computed again, and again where it
# is itself; its backward pass has five products of matrices where a forward one has two.
FORWARDS, BACKWARD = 3, 2.5

# Of the rows of blocks that the reference sweeps, those whose weights need fp64: where a query's peak lies far above all that is
# always kept. It depends on the model and the text: 45 % of the retrieval model's rows (docs/scale.md).
DOUBLE = 0.5
# Bytes of the reference's largest temporary, the levels of one row of blocks, above which it no longer stays in a CPU's cache.
CACHE = 4 << 20


@dataclass(frozen=True)
class Work:
    """Amounts of computation by ``operation.term``; sums and multiples are work too."""

    amounts: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        names = self.amounts.keys() | other.amounts.keys()
        return Work({name: self.amounts.get(name, 0.0) + other.amounts.get(name, 0.0) for name in sorted(names)})

    def __mul__(self, count: float) -> "Work":
        return Work({name: amount * count for name, amount in self.amounts.items()})

    __rmul__ = __mul__

    @property
    def flops(self) -> float:
        """Multiplications and additions of matrix products."""
        return sum(amount for name, amount in self.amounts.items() if name.endswith(".flops"))

    def without(self, *names: str) -> "Work":
        """All but some amounts."""
        return Work({name: amount for name, amount in self.amounts.items() if name not in names})


def total(parts: Iterable[Work]) -> Work:
    """The sum of any number of works."""
    return sum(parts, Work())


def _work(operation: str, **terms: float) -> Work:
    return Work({f"{operation}.{term}": float(amount) for term, amount in terms.items()})


def blocks(length: int, block_size: int) -> int:
    """Blocks of a sequence, the last one perhaps in part."""
    return math.ceil(length / block_size)


def _causal(length: int) -> float:
    return length * (length + 1) / 2


def _block_pairs(length: int, block_size: int) -> float:
    """Pairs of query and key in the blocks that causality allows."""
    full = blocks(length, block_size) - 1
    own = length - full * block_size  # queries of the last row of blocks
    return block_size**2 * full * (full + 1) / 2 + own * (full + 1) * block_size


def _chunk_pairs(length: int, rows: int) -> float:
    """Pairs where ``rows`` queries at a time meet all keys up to their last."""
    starts = range(0, length, rows)
    return float(sum((min(start + rows, length) - start) * min(start + rows, length) for start in starts))


def linear(shape: ModelShape, length: int) -> Work:
    """All decoder blocks without their attention: products with weights, and element by element norms, rotations, gates and sums.

    ``link.values`` are added up over devices where these share the heads, after the attention and after the MLP.
    """
    heads = (shape.q_heads + shape.kv_heads) * shape.head_dim
    elements = length * shape.layers * (14 * shape.hidden + 6 * heads + 3 * shape.intermediate)
    own = _work("linear", flops=2 * length * shape.linear_weights, elements=elements, calls=shape.layers)
    return own + _work("link", values=2 * length * shape.hidden * shape.layers)


def attention(heads: int, head_dim: int, length: int, *, masked: bool = False) -> Work:
    """The model's own attention in one layer, causal; ``masked``: with a mask as a tensor, which computes all pairs."""
    pairs = heads * (float(length) ** 2 if masked else _causal(length))
    return _work("attention", flops=4 * head_dim * pairs, pairs=pairs, calls=1)


def scoring(heads: int, head_dim: int, length: int, *, stride: int, block_size: int) -> Work:
    """Block scores of one layer (:func:`xcalib.kernels.estimate_blocks`)."""
    cells = 0.0  # pairs of a group of queries and a group of keys
    for row in range(blocks(length, block_size)):
        stop = min((row + 1) * block_size, length)
        cells += math.ceil((stop - row * block_size) / stride) * math.ceil(stop / stride)
    cells *= heads
    return _work("scoring", flops=2 * stride * head_dim * cells, cells=cells, rows=blocks(length, block_size))


def selection(heads: int, length: int, *, block_size: int) -> Work:
    """Scores to blocks, in one layer."""
    return _work("selection", entries=heads * blocks(length, block_size) ** 2, calls=1)


def sweep(
    heads: int, head_dim: int, length: int, hidden: int, *, block_size: int, levels: int, double: float = DOUBLE
) -> Work:
    """Every threshold's error in one layer, scoring left out (:func:`xcalib.kernels.sweep_thresholds`), and the layer's energy.

    Values are projected, every visible block is attended to once, and what the blocks give is added up by levels; ``members`` is
    what the reference adds with products of matrices, ``double`` the share of its rows that it sums in fp64,
    and ``spilled`` whether a row's levels outgrow a cache.
    """
    pairs = heads * _block_pairs(length, block_size)
    number, by_level = blocks(length, block_size), levels * heads * length * (head_dim + 1)
    spilled = 4 * levels * heads * min(block_size, length) * (head_dim + 1) > CACHE
    return _work(
        "sweep",
        flops=4 * head_dim * pairs + 2 * heads * length * head_dim**2,
        pairs=pairs,
        members=2 * levels * pairs / block_size * (head_dim + 1),
        levels=by_level,
        spilled_levels=by_level * spilled,
        doubled=double * pairs * head_dim,
        doubled_levels=double * by_level,
        entries=heads * number**2,
        energy=length * hidden,
        rows=number,
        calls=1,
    )


def sparse(heads: int, head_dim: int, length: int, density: float, *, block_size: int) -> Work:
    """Attention over kept blocks in one layer, scoring and selection left out."""
    pairs = heads * _block_pairs(length, block_size) * density
    return _work(
        "sparse",
        flops=4 * head_dim * pairs,
        pairs=pairs,
        gathered=2 * head_dim * pairs / block_size,
        tiles=heads * blocks(length, block_size),
        calls=1,
    )


def masked(heads: int, head_dim: int, length: int) -> Work:
    """Attention that gradients pass through, in one layer, both ways (:func:`xcalib.collect.backward.masked_attention`)."""
    pairs = heads * _chunk_pairs(length, MASKED_ROWS)
    passes = FORWARDS + BACKWARD
    return _work("masked", flops=passes * 4 * head_dim * pairs, pairs=passes * pairs, calls=1)


def slopes(heads: int, head_dim: int, length: int, *, block_size: int, levels: int) -> Work:
    """First-order changes with every threshold in one layer (:func:`xcalib.kernels.slopes.sweep_slopes`)."""
    rows = max(SLOPE_ROWS, block_size)
    pairs = 0.0
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        pairs += (stop - start) * min(blocks(stop, block_size) * block_size, length)
    pairs *= heads
    return _work(
        "slopes",
        flops=4 * head_dim * pairs,
        pairs=pairs,
        levels=levels * heads * length,
        rows=math.ceil(length / rows),
    )


def logits(shape: ModelShape, positions: int, sets: int) -> Work:
    """Next-token distributions of ``sets`` sets of hidden states at ``positions`` positions, and their KL."""
    cells = float(sets) * positions * shape.vocabulary
    return _work("logits", flops=2 * shape.hidden * cells, cells=cells)


def projections(shape: ModelShape) -> Work:
    """Small factors of W_o by head, once for every process that sweeps."""
    each = 2 * shape.hidden * shape.head_dim**2
    return _work("projection", flops=float(shape.sparse_layers * shape.q_heads * each))


def _own_attention(shape: ModelShape, length: int) -> Work:
    """The model's own attention in the layers that are never sparse."""
    one = attention(shape.q_heads, shape.head_dim, length, masked=True)
    return one * (shape.layers - shape.sparse_layers)


def dense_pass(shape: ModelShape, length: int) -> Work:
    """One prefill by the model itself, without logits."""
    full = attention(shape.q_heads, shape.head_dim, length) * shape.sparse_layers
    return linear(shape, length) + full + _own_attention(shape, length)


def sparse_layer(shape: ModelShape, length: int, density: float, *, stride: int, block_size: int) -> Work:
    """Sparse attention of one layer, scoring and selection included."""
    heads, head_dim = shape.q_heads, shape.head_dim
    return (
        scoring(heads, head_dim, length, stride=stride, block_size=block_size)
        + selection(heads, length, block_size=block_size)
        + sparse(heads, head_dim, length, density, block_size=block_size)
    )


def sparse_pass(shape: ModelShape, length: int, density: float, *, stride: int, block_size: int) -> Work:
    """One prefill with all layers sparse that can be, without logits."""
    one = sparse_layer(shape, length, density, stride=stride, block_size=block_size)
    return linear(shape, length) + one * shape.sparse_layers + _own_attention(shape, length)


def sweep_pass(shape: ModelShape, length: int, *, stride: int, block_size: int, levels: int) -> Work:
    """One dense prefill that carries the sweep of every layer."""
    heads, head_dim = shape.q_heads, shape.head_dim
    scores = scoring(heads, head_dim, length, stride=stride, block_size=block_size)
    swept = sweep(heads, head_dim, length, shape.hidden, block_size=block_size, levels=levels)
    return dense_pass(shape, length) + (scores + swept) * shape.sparse_layers


def slope_pass(shape: ModelShape, length: int, *, stride: int, block_size: int, levels: int) -> Work:
    """One forward pass with every block computed again in one backward pass, and in it a pass over the blocks; without logits."""
    heads, head_dim = shape.q_heads, shape.head_dim
    scores = scoring(heads, head_dim, length, stride=stride, block_size=block_size)
    chosen = selection(heads, length, block_size=block_size)
    layer = (
        (scores + chosen) * 2
        + masked(heads, head_dim, length)
        + slopes(heads, head_dim, length, block_size=block_size, levels=levels)
    )
    # forward, forward again, and gradients of activations alone
    return linear(shape, length) * 3 + layer * shape.sparse_layers + _own_attention(shape, length) * (2 + BACKWARD)
