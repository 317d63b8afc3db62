"""Scores and masks against an oracle in plain Python: loops over tokens and groups, exact fractions where ties matter.

Nothing here is shared with kernels/; the oracle follows the design's "Numbers that define the objects".
"""

import functools
import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xcalib.kernels import estimate_blocks, select_blocks, visible_blocks

torch.set_num_threads(1)

REPRODUCIBLE: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
STRIDES = (4, 8, 16, 32, 64)
PATTERNS = ("antidiagonal", "diagonal", "random", "rows")
ORDERS: tuple[Any, ...] = ("score", "recent")


@dataclass(frozen=True)
class Shape:
    """Lengths and blocks of one selection; hypothesis prints it when it fails."""

    q_len: int
    k_len: int
    block_size: int
    causal: bool

    @property
    def offset(self) -> int:
        return self.k_len - self.q_len

    @property
    def q_blocks(self) -> int:
        return math.ceil(self.q_len / self.block_size)

    @property
    def k_blocks(self) -> int:
        return math.ceil(self.k_len / self.block_size)

    @property
    def lengths(self) -> dict[str, Any]:
        return {"q_len": self.q_len, "k_len": self.k_len, "block_size": self.block_size, "causal": self.causal}

    def visible(self, row: int) -> list[int]:
        """Key blocks that hold at least one key which at least one query of the row may see, token by token."""
        last_position = self.offset + min((row + 1) * self.block_size, self.q_len) - 1
        seen = [k for k in range(self.k_len) if not self.causal or k <= last_position]
        return sorted({k // self.block_size for k in seen})

    def always_kept(self, row: int) -> set[int]:
        """The sink and every key block that holds the position of one of the row's queries."""
        queries = range(row * self.block_size, min((row + 1) * self.block_size, self.q_len))
        return {0} | {(self.offset + query) // self.block_size for query in queries}

    def previous(self, row: int) -> list[int]:
        """The key block just before that of the row's first query, unless that is the sink or the first query's is."""
        first = (self.offset + row * self.block_size) // self.block_size
        return [first - 1] if first > 1 else []


def shape_id(shape: Shape) -> str:
    return f"q{shape.q_len}-k{shape.k_len}-B{shape.block_size}-{'causal' if shape.causal else 'full'}"


# --- scores ---------------------------------------------------------------------------------------------------------


@functools.cache
def sampled_order(stride: int, pattern: Any, seed: int = 0) -> tuple[int, ...]:
    """Which query of a group meets key 0, 1, ..., S-1, read off the public scores.

    Query ``t`` of one single group is the unit vector ``e_t``. Key block ``s * S + t`` holds ``e_t`` as its token
    ``s`` and zeros elsewhere, so it shares the probability exactly when query ``t`` meets key ``s``.
    """
    width = max(stride, 32)
    query = torch.eye(stride, width).view(1, 1, stride, width)
    key = torch.zeros(stride, stride, 64, width)
    for s in range(stride):
        for t in range(stride):
            key[s, t, s, t] = 1.0
    scores = estimate_blocks(
        query,
        key.view(1, 1, -1, width),
        stride=stride,
        block_size=64,
        causal=False,
        scale=20.0 * stride,
        pattern=pattern,
        seed=seed,
    )
    meets = scores.view(stride, stride) > 0.5 / stride
    assert bool((meets.sum(0) == 1).all()), "each query is sampled once"
    assert bool((meets.sum(1) == 1).all()), "each key is sampled once"
    return tuple(meets.int().argmax(1).tolist())


def oracle_row_group(
    dots: list[list[float]], shape: Shape, i: int, order: tuple[int, ...], scale: float
) -> list[float]:
    """Probability that row group ``i`` gives each visible column group."""
    stride = len(order)
    logits = []
    for j in range(math.ceil(shape.k_len / stride)):
        if shape.causal and j * stride > shape.offset + i * stride + stride - 1:
            break
        total = 0.0
        for s in range(stride):
            q, k = i * stride + order[s], j * stride + s
            if q < shape.q_len and k < shape.k_len:
                total += dots[q][k]
        logits.append(total * scale / stride)
    weights = [math.exp(x - max(logits)) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


def oracle_scores(dots: list[list[float]], shape: Shape, order: tuple[int, ...], scale: float) -> list[list[float]]:
    """Block scores of one head from its token dot products ``dots[q][k]``."""
    stride = len(order)
    scores = [[0.0] * shape.k_blocks for _ in range(shape.q_blocks)]
    groups = range(math.ceil(shape.q_len / stride))
    for row in range(shape.q_blocks):
        members = [i for i in groups if i * stride // shape.block_size == row]
        for i in members:
            for j, probability in enumerate(oracle_row_group(dots, shape, i, order, scale)):
                scores[row][j * stride // shape.block_size] += probability / len(members)
    return scores


def oracle_rows(dots: list[list[float]], shape: Shape, stride: int, scale: float) -> list[list[float]]:
    """Block scores of one head by the pattern ``rows``, query by query."""
    scores = [[0.0] * shape.k_blocks for _ in range(shape.q_blocks)]
    for row in range(shape.q_blocks):
        queries = range(row * shape.block_size, min((row + 1) * shape.block_size, shape.q_len))
        sampled = [q for q in queries if (q + 1) % stride == 0 or q == shape.q_len - 1]
        for q in sampled:
            seen = [k for k in range(shape.k_len) if not shape.causal or k <= shape.offset + q]
            weights = [math.exp((dots[q][k] - max(dots[q][: len(seen)])) * scale) for k in seen]
            for k, weight in zip(seen, weights, strict=True):
                scores[row][k // shape.block_size] += weight / math.fsum(weights) / len(sampled)
    return scores


def assert_scores_match(
    shape: Shape, *, heads: tuple[int, int, int], head_dim: int, stride: int, pattern: Any, seed: int, magnitude: float
) -> None:
    """``heads``: batch, key heads, query heads per key head."""
    batch, k_heads, group = heads
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, k_heads * group, shape.q_len, head_dim, generator=generator) * magnitude
    key = torch.randn(batch, k_heads, shape.k_len, head_dim, generator=generator) * magnitude
    # ask for scale None half of the time; what it means is part of the contract
    scale = None if seed % 2 else 0.2
    scores = estimate_blocks(
        query,
        key,
        stride=stride,
        block_size=shape.block_size,
        causal=shape.causal,
        scale=scale,
        pattern=pattern,
        seed=seed % 5,
    )
    factor = 1 / math.sqrt(head_dim) if scale is None else scale
    assert scores.dtype == torch.float32
    assert scores.shape == (batch, k_heads * group, shape.q_blocks, shape.k_blocks)
    for b in range(batch):
        for h in range(k_heads * group):
            dots = (query[b, h].double() @ key[b, h // group].double().T).tolist()
            if pattern == "rows":
                expected = oracle_rows(dots, shape, stride, factor)
            else:
                expected = oracle_scores(dots, shape, sampled_order(stride, pattern, seed % 5), factor)
            torch.testing.assert_close(scores[b, h].double(), torch.tensor(expected).double(), rtol=2e-5, atol=1e-6)
            for row in range(shape.q_blocks):
                visible = shape.visible(row)
                assert float(scores[b, h, row, visible].double().sum()) == pytest.approx(1.0, abs=2e-6)
                assert not scores[b, h, row, visible[-1] + 1 :].any()


@st.composite
def shapes(draw: st.DrawFn, max_len: int = 300) -> Shape:
    awkward = [n for n in (1, 3, 5, 63, 64, 65, 127, 128, 129, 191, 192, 200, 256, 257) if n <= max_len]
    k_len = draw(st.sampled_from(awkward) | st.integers(1, max_len))
    q_len = draw(st.just(k_len) | st.integers(1, k_len))
    return Shape(q_len, k_len, draw(st.sampled_from([64, 128])), draw(st.booleans()))


@settings(max_examples=120, **REPRODUCIBLE)
@given(
    shape=shapes(),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 2, 3])),
    head_dim=st.sampled_from([32, 40, 80]),
    stride=st.sampled_from(STRIDES),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 2**16),
    magnitude=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_scores_equal_the_oracle(
    *, shape: Shape, heads: tuple[int, int, int], head_dim: int, stride: int, pattern: Any, seed: int, magnitude: float
) -> None:
    assert_scores_match(
        shape, heads=heads, head_dim=head_dim, stride=stride, pattern=pattern, seed=seed, magnitude=magnitude
    )


# Offsets 0, 77 and 133 (no multiple of a stride or block), 128 and exact multiples; ragged last blocks and groups.
FIXED_SHAPES = [
    Shape(q_len, k_len, block_size, causal)
    for q_len, k_len in [(201, 201), (90, 167), (130, 263), (70, 198), (256, 256), (1, 130), (5, 5)]
    for block_size in (64, 128)
    for causal in (True, False)
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("stride", STRIDES, ids=lambda stride: f"S{stride}")
@pytest.mark.parametrize("shape", FIXED_SHAPES, ids=shape_id)
def test_scores_equal_the_oracle_at_fixed_shapes(shape: Shape, stride: int, pattern: Any) -> None:
    seed = stride + shape.q_len
    assert_scores_match(shape, heads=(1, 1, 2), head_dim=32, stride=stride, pattern=pattern, seed=seed, magnitude=1.5)


@pytest.mark.parametrize("stride", STRIDES, ids=lambda stride: f"S{stride}")
def test_the_antidiagonal_meets_the_last_query_with_the_first_key(stride: int) -> None:
    assert sampled_order(stride, "antidiagonal") == tuple(reversed(range(stride)))


@pytest.mark.parametrize("stride", STRIDES, ids=lambda stride: f"S{stride}")
def test_the_diagonal_meets_equals(stride: int) -> None:
    assert sampled_order(stride, "diagonal") == tuple(range(stride))


@pytest.mark.parametrize("stride", STRIDES, ids=lambda stride: f"S{stride}")
def test_the_random_pattern_is_a_permutation_drawn_from_the_seed(stride: int) -> None:
    seeds = range(3 if stride > 16 else 8)
    orders = [sampled_order(stride, "random", seed) for seed in seeds]
    assert all(sorted(order) == list(range(stride)) for order in orders)
    assert len(set(orders)) > 1, "different seeds draw different permutations"
    assert orders[0] == sampled_order.__wrapped__(stride, "random", 0), "the same seed draws the same permutation"
    if stride >= 16:
        assert len(set(orders)) == len(orders)


def test_the_random_pattern_depends_on_its_seed_alone() -> None:
    query, key = (torch.randn(1, 1, 200, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    torch.manual_seed(1)
    first = estimate_blocks(query, key, pattern="random", seed=7)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(estimate_blocks(query, key, pattern="random", seed=7), first)
    assert not torch.equal(estimate_blocks(query, key, pattern="random", seed=8), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not drawn from"


@pytest.mark.parametrize(
    "shape", [Shape(1, 1, 64, True), Shape(64, 64, 64, True), Shape(90, 128, 128, False)], ids=shape_id
)
@pytest.mark.parametrize("stride", STRIDES, ids=lambda stride: f"S{stride}")
def test_a_single_visible_block_takes_all(shape: Shape, stride: int) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 2, shape.q_len, 32, generator=generator)
    key = torch.randn(1, 1, shape.k_len, 32, generator=generator)
    scores = estimate_blocks(query, key, stride=stride, block_size=shape.block_size, causal=shape.causal)
    torch.testing.assert_close(scores[..., :1], torch.ones_like(scores[..., :1]), rtol=0, atol=1e-6)
    for threshold in (0.0, 0.5, 1.0):
        assert bool(select_blocks(scores, threshold, **shape.lengths)[:, :, :, 0].all())


# --- masks ----------------------------------------------------------------------------------------------------------


def by_preference(row_scores: list[Fraction], candidates: list[int]) -> list[int]:
    return sorted(candidates, key=lambda block: (-row_scores[block], block))


def oracle_row(
    row_scores: list[Fraction], shape: Shape, row: int, threshold: Fraction, policy: str, order: str
) -> list[bool]:
    """The kept key blocks of one row, in exact arithmetic."""
    visible = shape.visible(row)
    kept = shape.always_kept(row)
    queue = shape.previous(row) if order == "recent" else []
    queue += by_preference(row_scores, [block for block in visible if block not in kept and block not in queue])
    if policy == "threshold":
        if order == "recent" and threshold > 0:
            kept |= set(queue[: len(shape.previous(row))])
            del queue[: len(shape.previous(row))]
        total = sum((row_scores[block] for block in kept), Fraction(0))
        while queue and (threshold >= 1 or total < threshold):
            total += row_scores[queue[0]]
            kept.add(queue.pop(0))
    else:
        wanted = math.ceil(threshold * len(visible)) if policy == "ratio" else math.ceil(threshold)
        while queue and len(kept) < wanted:
            kept.add(queue.pop(0))
    return [block in kept for block in range(shape.k_blocks)]


def oracle_mask(
    scores: torch.Tensor, thresholds: list[Fraction], shape: Shape, policy: str, order: str = "score"
) -> torch.Tensor:
    rows = [
        [
            [
                oracle_row([Fraction(x) for x in row_scores], shape, row, thresholds[h], policy, order)
                for row, row_scores in enumerate(head)
            ]
            for h, head in enumerate(sequence)
        ]
        for sequence in scores.tolist()
    ]
    return torch.tensor(rows)


def counted_scores(shape: Shape, batch: int, heads: int, units: int, seed: int) -> torch.Tensor:
    """Scores that are multiples of ``1 / units`` and sum to 1: exact in fp32 for a power of two, full of ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.zeros(batch, heads, shape.q_blocks, shape.k_blocks)
    for row in range(shape.q_blocks):
        visible = len(shape.visible(row))
        for b in range(batch):
            for h in range(heads):
                balls = torch.randint(visible, (units,), generator=generator)
                scores[b, h, row, :visible] = torch.bincount(balls, minlength=visible) / units
    return scores


@settings(max_examples=500, **REPRODUCIBLE)
@given(
    shape=shapes(max_len=1500),
    units=st.sampled_from([2, 8, 16, 64]),
    levels=st.lists(st.integers(0, 64), min_size=1, max_size=3),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 2**16),
)
def test_masks_equal_the_oracle_where_everything_ties(
    shape: Shape, units: int, levels: list[int], order: Any, seed: int
) -> None:
    """Thresholds in 64ths fall on cumulative sums exactly, time and again; one threshold per head."""
    scores = counted_scores(shape, 2, len(levels), units, seed)
    thresholds = torch.tensor([level / 64 for level in levels])
    expected = oracle_mask(scores, [Fraction(level, 64) for level in levels], shape, "threshold", order)
    assert torch.equal(select_blocks(scores, thresholds, order=order, **shape.lengths), expected)


@settings(max_examples=300, **REPRODUCIBLE)
@given(
    shape=shapes(max_len=1500),
    sharpness=st.sampled_from([0.1, 1.0, 4.0, 12.0]),
    thresholds=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=3),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 2**16),
)
def test_masks_equal_the_oracle_for_smooth_scores(
    shape: Shape, sharpness: float, thresholds: list[float], order: Any, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, len(thresholds), shape.q_blocks, shape.k_blocks, generator=generator) * sharpness
    scores = torch.zeros_like(logits)
    for row in range(shape.q_blocks):
        visible = len(shape.visible(row))
        scores[:, :, row, :visible] = logits[:, :, row, :visible].softmax(-1)
    expected = oracle_mask(scores, [Fraction(tau) for tau in thresholds], shape, "threshold", order)
    assert torch.equal(select_blocks(scores, torch.tensor(thresholds), order=order, **shape.lengths), expected)


@settings(max_examples=200, **REPRODUCIBLE)
@given(
    shape=shapes(max_len=1500),
    units=st.sampled_from([4, 64]),
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 2**16),
)
def test_top_k_masks_equal_the_oracle(shape: Shape, units: int, counts: list[int], order: Any, seed: int) -> None:
    scores = counted_scores(shape, 1, len(counts), units, seed)
    expected = oracle_mask(scores, [Fraction(count) for count in counts], shape, "top-k", order)
    mask = select_blocks(scores, torch.tensor(counts).float(), policy="top-k", order=order, **shape.lengths)
    assert torch.equal(mask, expected)


@settings(max_examples=200, **REPRODUCIBLE)
@given(
    shape=shapes(max_len=1500),
    units=st.sampled_from([4, 64]),
    ratios=st.lists(st.fractions(0, 1, max_denominator=20), min_size=1, max_size=3),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 2**16),
)
def test_ratio_masks_equal_the_oracle(shape: Shape, units: int, ratios: list[Fraction], order: Any, seed: int) -> None:
    """A tenth of ten blocks is one block, although fp32 holds a little more than a tenth."""
    scores = counted_scores(shape, 1, len(ratios), units, seed)
    expected = oracle_mask(scores, ratios, shape, "ratio", order)
    limits = torch.tensor([float(ratio) for ratio in ratios])
    mask = select_blocks(scores, limits, policy="ratio", order=order, **shape.lengths)
    assert torch.equal(mask, expected)


# fp32 holds 0.1, 0.3 and 0.6 a little too large: times this many blocks, the excess must not count as a block.
RATIOS = [
    pytest.param(ratio, blocks, id=f"ratio{ratio:g}-of-{blocks}-blocks")
    for ratio in (0.1, 0.3, 0.5, 0.6, 0.7, 0.9)
    for blocks in (20, 50, 100, 1000, 2000)
]


@pytest.mark.parametrize("ratio,blocks", RATIOS)
def test_a_ratio_of_many_blocks_is_not_rounded_up_past_a_whole_number(ratio: float, blocks: int) -> None:
    shape = Shape(64, 64 * blocks, 64, False)
    scores = torch.full((1, 1, 1, blocks), 1 / blocks)
    mask = select_blocks(scores, ratio, policy="ratio", **shape.lengths)
    assert int(mask.sum()) == round(blocks * ratio)


@settings(max_examples=60, **REPRODUCIBLE)
@given(
    shape=shapes(max_len=700),
    stride=st.sampled_from(STRIDES),
    thresholds=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2),
    seed=st.integers(0, 2**16),
)
def test_masks_of_estimated_scores_equal_the_oracle(
    shape: Shape, stride: int, thresholds: list[float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 2, shape.q_len, 32, generator=generator) * 3
    key = torch.randn(1, 1, shape.k_len, 32, generator=generator) * 3
    scores = estimate_blocks(query, key, stride=stride, block_size=shape.block_size, causal=shape.causal)
    expected = oracle_mask(scores, [Fraction(tau) for tau in thresholds], shape, "threshold")
    assert torch.equal(select_blocks(scores, torch.tensor(thresholds), **shape.lengths), expected)


def one_row(values: list[float]) -> tuple[torch.Tensor, Shape]:
    """Scores of a single query at the end of ``len(values)`` key blocks."""
    return torch.tensor(values).view(1, 1, 1, -1), Shape(1, 64 * len(values), 64, True)


EXACT_SUMS = [
    (0.0, "100001"),
    (0.25, "100001"),  # sink and own block hold 2/8 already
    (0.25 + 2**-20, "100101"),  # the least bit more asks for the largest other block
    (0.625, "100101"),  # exactly the cumulative sum: reached, so no further block
    (0.625 + 2**-20, "110101"),  # a tie of blocks 1, 2 and 4: the lower index first
    (0.75, "110101"),
    (0.75 + 2**-20, "111101"),
    (0.875, "111101"),
    (0.875 + 2**-20, "111111"),
    (1.0, "111111"),
]


@pytest.mark.parametrize("threshold,expected", EXACT_SUMS, ids=str)
def test_a_threshold_equal_to_a_cumulative_sum_is_reached(threshold: float, expected: str) -> None:
    scores, shape = one_row([1 / 8, 1 / 8, 1 / 8, 3 / 8, 1 / 8, 1 / 8])
    mask = select_blocks(scores, threshold, **shape.lengths)
    assert "".join(str(int(kept)) for kept in mask.flatten()) == expected


# --- the order "recent" ---------------------------------------------------------------------------------------------


def kept_recent(scores: torch.Tensor, threshold: float, shape: Shape, policy: Any = "threshold", row: int = 0) -> str:
    mask = select_blocks(scores, threshold, policy=policy, order="recent", **shape.lengths)
    return "".join(str(int(kept)) for kept in mask[0, 0, row])


RECENT = [
    ("threshold", 0.0, "100001"),
    ("threshold", 2**-20, "100011"),  # the sink and the own block hold more already: block 4 is taken all the same
    ("threshold", 0.25, "100011"),
    ("threshold", 0.25 + 2**-20, "100011"),  # block 4 before block 3, which scores three times as much
    ("threshold", 0.375, "100011"),  # block 4 counts: 3/8 are reached
    ("threshold", 0.375 + 2**-20, "100111"),
    ("threshold", 0.75, "100111"),
    ("threshold", 0.75 + 2**-20, "110111"),  # a tie of blocks 1 and 2: the lower index first
    ("threshold", 0.875 + 2**-20, "111111"),
    ("threshold", 1.0, "111111"),
    ("top-k", 0.0, "100001"),
    ("top-k", 2.0, "100001"),  # as many as are always kept
    ("top-k", 3.0, "100011"),
    ("top-k", 4.0, "100111"),
    ("top-k", 5.0, "110111"),
    ("ratio", 0.3, "100001"),  # 1.8 of 6 blocks
    ("ratio", 0.5, "100011"),
]


@pytest.mark.parametrize("policy,threshold,expected", RECENT, ids=str)
def test_the_block_before_the_own_ones_comes_right_after_those_always_kept(
    policy: str, threshold: float, expected: str
) -> None:
    scores, shape = one_row([1 / 8, 1 / 8, 1 / 8, 3 / 8, 1 / 8, 1 / 8])
    assert kept_recent(scores, threshold, shape, policy) == expected


def test_a_previous_block_without_any_probability_is_taken_all_the_same() -> None:
    scores, shape = one_row([0.5, 0.25, 0.0, 0.0, 0.25])
    assert kept_recent(scores, 0.0, shape) == "10001"
    assert kept_recent(scores, 0.75, shape) == "10011"
    assert kept_recent(scores, 0.75 + 2**-20, shape) == "11011"


def test_the_first_rows_have_no_previous_block_but_the_sink() -> None:
    """Row 0 is the sink, row 1 has the sink before it: both orders agree; row 2 prefers block 1."""
    shape = Shape(256, 256, 64, False)
    scores = torch.tensor([1 / 8, 1 / 8, 1 / 4, 1 / 2]).expand(1, 1, 4, 4)
    just_above = [1 / 8, 1 / 4, 3 / 8, 5 / 8]  # of what is always kept
    kept = [kept_recent(scores, tau + 2**-20, shape, row=row) for row, tau in enumerate(just_above)]
    assert kept == ["1001", "1101", "1110", "1011"]
    by_score = [select_blocks(scores, tau + 2**-20, **shape.lengths)[0, 0, row] for row, tau in enumerate(just_above)]
    assert by_score[0].tolist() == [True, False, False, True]
    assert by_score[1].tolist() == [True, True, False, True]
    assert by_score[2].tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("q_len", "k_len", "least", "more"),
    [(64, 352, "100011", "100111"), (33, 352, "100011", "100111"), (32, 352, "100001", "100011"), (64, 96, "11", "11")],
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_queries_across_two_blocks_look_back_from_the_first(
    q_len: int, k_len: int, least: str, more: str, causal: bool
) -> None:
    shape = Shape(q_len, k_len, 64, causal)
    scores = torch.zeros(1, 1, 1, shape.k_blocks)
    scores[..., 0], scores[..., 1] = 0.25, 0.75  # block 1 scores most, and comes after the previous one
    held = 1.0 if k_len == 96 else 0.25
    assert kept_recent(scores, 0.0, shape) == least
    assert kept_recent(scores, held, shape) == more
    number = float(least.count("1"))
    assert kept_recent(scores, number, shape, "top-k") == least
    assert kept_recent(scores, number + 1, shape, "top-k") == more


def test_without_causality_later_blocks_follow_by_score() -> None:
    shape = Shape(384, 384, 64, False)
    scores = torch.tensor([1 / 8, 1 / 8, 0.0, 1 / 8, 1 / 8, 1 / 2]).expand(1, 1, 6, 6)
    kept = [kept_recent(scores, count, shape, "top-k", row=3) for count in (2.0, 3.0, 4.0, 5.0)]
    assert kept == ["100100", "101100", "101101", "111101"]


def test_blocks_without_any_probability_are_kept_at_one_only() -> None:
    scores, shape = one_row([0.5, 0.0, 0.25, 0.0, 0.25])
    below = select_blocks(scores, 1 - 2**-24, **shape.lengths)
    assert below.flatten().tolist() == [True, False, True, False, True]
    assert bool(select_blocks(scores, 1.0, **shape.lengths).all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", FIXED_SHAPES, ids=shape_id)
def test_zero_keeps_sink_and_own_blocks_and_one_keeps_all_visible(shape: Shape, order: Any) -> None:
    scores = counted_scores(shape, 2, 3, 64, 1)
    least, most = (select_blocks(scores, threshold, order=order, **shape.lengths) for threshold in (0.0, 1.0))
    visible = visible_blocks(shape.q_len, shape.k_len, block_size=shape.block_size, causal=shape.causal)
    for row in range(shape.q_blocks):
        assert visible[row].nonzero().flatten().tolist() == shape.visible(row)
        for b in range(2):
            for h in range(3):
                assert set(least[b, h, row].nonzero().flatten().tolist()) == shape.always_kept(row)
                assert most[b, h, row].nonzero().flatten().tolist() == shape.visible(row)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_equal_scores_keep_the_lower_indices(causal: bool) -> None:
    """As many equal blocks as a sort may shuffle: always kept ones first, then 1, 2, 3, ... without a gap."""
    shape = Shape(64, 64 * 512, 64, causal)
    scores = torch.full((1, 1, 1, 512), 1 / 512)
    mask = select_blocks(scores, 0.5, **shape.lengths)
    assert mask.flatten().nonzero().flatten().tolist() == [*range(255), 511]


@settings(max_examples=60, **REPRODUCIBLE)
@given(shape=shapes(max_len=1500), order=st.sampled_from(ORDERS), seed=st.integers(0, 2**16))
def test_a_higher_threshold_never_drops_a_block(shape: Shape, order: Any, seed: int) -> None:
    scores = counted_scores(shape, 1, 1, 64, seed)
    masks = [select_blocks(scores, level / 32, order=order, **shape.lengths) for level in range(33)]
    for lower, higher in itertools.pairwise(masks):
        assert not bool((lower & ~higher).any())


def test_one_threshold_is_that_threshold_for_every_head() -> None:
    shape = Shape(300, 700, 64, True)
    scores = counted_scores(shape, 2, 4, 64, 5)
    shared = select_blocks(scores, 0.6, **shape.lengths)
    each = select_blocks(scores, torch.full((4,), 0.6), **shape.lengths)
    scalar = select_blocks(scores, torch.tensor(0.6), **shape.lengths)
    assert torch.equal(shared, each)
    assert torch.equal(shared, scalar)
