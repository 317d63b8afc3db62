"""The Triton selection against the reference, set by set, in Triton's interpreter (tests/test_gpu.py repeats it on a GPU).

What the kernels must not read (scores that causality hides) and what they must write (lists, scores) is poisoned first.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from xcalib.kernels import reference
from xcalib.kernels.geometry import Geometry

pytest.importorskip("triton")
from xcalib.kernels import selection  # needs Triton
from xcalib.kernels.selection import BlockLists

torch.set_num_threads(1)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REPRODUCIBLE: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
ONE = 2**52  # of the fixed point, as the design states it
ORDERS = ("score", "recent")
POLICIES = ("threshold", "top-k", "ratio")
KINDS = ("dyadic", "equal", "zeros", "smooth", "sharp", "one block", "neighbours", "tiny", "negative zeros", "large")
LAYOUTS = ("contiguous", "heads last", "one sequence for all", "every second block")


@dataclass(frozen=True)
class Case:
    """One selection; hypothesis prints it when it fails."""

    q_len: int
    k_len: int
    block_size: int
    causal: bool
    batch: int
    heads: int
    kind: str
    layout: str
    policy: str
    limits: tuple[float, ...]
    seed: int
    order: str = "score"

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.q_len, self.k_len, self.block_size, self.causal)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size = draw(st.sampled_from([64, 128]))
    blocks = st.integers(5, 40)  # small numbers are drawn more often than their share
    edges = st.sampled_from([1, 63, 64, 65, 128, 129, 1000])
    k_len = draw(edges | st.builds(lambda n, rest: n * block_size - rest, blocks, st.integers(0, block_size - 1)))
    # rows cost time in the interpreter: a few query blocks, at any offset
    q_len = draw(st.just(1) | st.sampled_from([block_size, 2 * block_size]) | st.integers(1, 3 * block_size))
    heads = draw(st.integers(1, 2))
    policy = draw(st.sampled_from(POLICIES))
    one = {
        "threshold": st.sampled_from([0.0, 1.0, 0.5, 2.0**-20, 1 - 2.0**-24]) | st.floats(0, 1, width=32),
        "top-k": st.integers(0, 50).map(float),
        "ratio": st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]) | st.floats(0, 1, width=32),
    }[policy]
    return Case(
        q_len=min(q_len, k_len),
        k_len=k_len,
        block_size=block_size,
        causal=draw(st.booleans()),
        batch=draw(st.integers(1, 2)),
        heads=heads,
        kind=draw(st.sampled_from(KINDS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        policy=policy,
        limits=tuple(draw(st.lists(one, min_size=heads, max_size=heads))),
        seed=draw(st.integers(0, 2**16)),
        order=draw(st.sampled_from(ORDERS)),
    )


def make_scores(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    coin = torch.randint(0, 5, shape, generator=generator)
    made: dict[str, Callable[[], torch.Tensor]] = {
        "dyadic": lambda: coin / 64,  # sums that fall on thresholds exactly, full of ties
        "equal": lambda: torch.full(shape, 1 / shape[-1]),
        "zeros": lambda: torch.zeros(shape),
        "smooth": lambda: normal.softmax(-1),
        "sharp": lambda: (normal * 12.0).softmax(-1),
        "one block": lambda: torch.nn.functional.one_hot(normal.argmax(-1), shape[-1]).float(),
        "neighbours": lambda: 2.0**-6 * (1 + coin * 2.0**-23),  # next to each other in fp32
        # about the fixed point's last digit and below, subnormal numbers too
        "tiny": lambda: torch.exp2(-45 - normal.double().abs() * 40).float(),
        "negative zeros": lambda: torch.where(normal > 0, -0.0, coin / 64),
        "large": lambda: normal.abs().clamp(max=2.0),  # no distribution, but allowed
    }
    return made[kind]()


def in_layout(scores: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "heads last":
        return scores.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "one sequence for all":
        return scores[:1].expand_as(scores)
    if layout == "every second block":
        wide = torch.full((*scores.shape[:3], 2 * scores.shape[3]), torch.nan, device=scores.device)
        wide[..., ::2] = scores
        return wide[..., ::2]
    return scores


def scores_of(case: Case) -> torch.Tensor:
    """Scores whose hidden blocks are NaN."""
    geometry = case.geometry
    scores = make_scores(case.kind, (case.batch, case.heads, geometry.q_blocks, geometry.k_blocks), case.seed)
    return in_layout(scores.masked_fill(~geometry.visible(), torch.nan).to(DEVICE), case.layout)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory comes full of NaN, or of numbers that no list holds."""
    empty = torch.empty

    def poisoned_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)

    with mock.patch.object(torch, "empty", poisoned_empty):
        yield


def assert_lists(lists: BlockLists, expected: torch.Tensor) -> None:
    """Ascending, complete, and nothing else."""
    assert lists.indices.dtype == torch.int16
    assert lists.counts.dtype == torch.int32
    assert lists.indices.shape == expected.shape
    assert torch.equal(lists.counts.long(), expected.sum(-1))
    listed = torch.arange(expected.shape[-1], device=DEVICE) < lists.counts[..., None]
    indices = torch.where(listed, lists.indices, -1)
    numbers = torch.where(expected, torch.arange(expected.shape[-1], device=DEVICE), expected.shape[-1]).sort(-1).values
    assert torch.equal(torch.where(listed, numbers, -1), indices.long())


@settings(max_examples=500, **REPRODUCIBLE)
@given(case=cases())
@example(case=Case(1, 1, 64, True, 1, 1, "zeros", "contiguous", "threshold", (0.0,), 0))
@example(case=Case(1, 40, 128, False, 2, 2, "one block", "heads last", "ratio", (0.0, 1.0), 0))
@example(case=Case(130, 263, 64, True, 1, 2, "equal", "contiguous", "threshold", (1.0, 0.999), 0))
@example(case=Case(130, 263, 64, True, 1, 2, "equal", "contiguous", "top-k", (3.0, 4.0), 0, "recent"))
@example(case=Case(128, 263, 64, False, 1, 2, "zeros", "contiguous", "threshold", (0.0, 2.0**-20), 0, "recent"))
def test_the_set_is_the_reference_set(case: Case) -> None:
    scores, limits = scores_of(case), torch.tensor(case.limits)
    expected = reference.select_blocks(scores, limits, case.geometry, case.policy, case.order)
    with poisoned():
        lists = selection.select_blocks(scores, limits, case.geometry, case.policy, case.order)
    assert_lists(lists, expected)
    assert torch.equal(selection.mask_from_lists(lists, case.geometry), expected)


def kept_by_the_rule(scores: list[float], forced: set[int], first: set[int], threshold: float) -> list[bool]:
    """One row in whole numbers, from the rule's wording; ``first`` is what any threshold above 0 keeps, before the others."""
    fixed = [math.floor(Fraction(score) * ONE) for score in scores]
    limit = math.ceil(Fraction(threshold) * ONE)
    order = sorted(
        range(len(scores)), key=lambda block: (block not in forced, block not in first, -scores[block], block)
    )
    kept = [False] * len(scores)
    total = 0
    for block in order:
        kept[block] = block in forced or threshold >= 1 or total < limit or (block in first and limit > 0)
        total += fixed[block]
    return kept


@settings(max_examples=100, **REPRODUCIBLE)
@given(
    kind=st.sampled_from(KINDS[:-1]),
    blocks=st.integers(1, 70),
    taken=st.integers(0, 70),
    nudge=st.sampled_from([-1, 0, 1]),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 2**16),
)
def test_a_threshold_at_a_cumulative_sum_cuts_exactly(
    kind: str, blocks: int, taken: int, nudge: int, order: str, seed: int
) -> None:
    """Thresholds are the sum of the preferred blocks of a row, the fp32 number below it and the one above."""
    scores = make_scores(kind, (1, 1, 1, blocks), seed)
    geometry = Geometry(1, 64 * blocks, 64, True)
    row = scores.flatten().tolist()
    first = {blocks - 2} if order == "recent" else set()
    preferred = sorted(range(blocks), key=lambda block: (block in (0, blocks - 1), block in first, row[block]))[::-1]
    threshold = torch.tensor(math.fsum(row[block] for block in preferred[:taken]))
    if nudge:
        threshold = threshold.nextafter(torch.tensor(float(nudge > 0) * 4))
    threshold = threshold.clamp(0, 1)
    expected = torch.tensor(kept_by_the_rule(row, {0, blocks - 1}, first, float(threshold))).view(1, 1, 1, -1)
    assert torch.equal(reference.select_blocks(scores, threshold[None], geometry, "threshold", order), expected)
    lists = selection.select_blocks(scores.to(DEVICE), threshold[None], geometry, "threshold", order)
    assert_lists(lists, expected.to(DEVICE))


@pytest.mark.parametrize("policy,limit", [("threshold", 0.5), ("threshold", 0.999), ("top-k", 5000.0), ("ratio", 0.3)])
@pytest.mark.parametrize("kind", ["equal", "dyadic", "sharp", "smooth", "zeros"])
@pytest.mark.parametrize("blocks", [8191, 8192])
def test_rows_of_8192_blocks(blocks: int, kind: str, policy: str, limit: float) -> None:
    geometry = Geometry(100, blocks * 128 - 28, 128, True)
    scores = make_scores(kind, (1, 1, 1, blocks), blocks).to(DEVICE)
    if kind == "dyadic":
        scores /= 256
    for order in ORDERS:
        expected = reference.select_blocks(scores, torch.tensor([limit]), geometry, policy, order)
        with poisoned():
            lists = selection.select_blocks(scores, torch.tensor([limit]), geometry, policy, order)
        assert_lists(lists, expected)


def test_longer_rows_are_refused() -> None:
    geometry = Geometry(1, 8193 * 64, 64, True)
    with pytest.raises(ValueError, match=r"k_len is 524352: 8193 key blocks, at most 8192 are allowed"):
        selection.select_blocks(torch.zeros(1, 1, 1, 8193, device=DEVICE), torch.zeros(1), geometry)


# --- lists and masks ------------------------------------------------------------------------------------------------


@settings(max_examples=100, **REPRODUCIBLE)
@given(case=cases(), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_lists_from_a_mask_drop_what_is_hidden(case: Case, density: float) -> None:
    geometry = case.geometry
    shape = (case.batch, case.heads, geometry.q_blocks, geometry.k_blocks)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(case.seed)) < density
    strided = mask.to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
    with poisoned():
        lists = selection.lists_from_mask(strided, geometry)
    expected = (mask & geometry.visible()).to(DEVICE)
    assert_lists(lists, expected)
    back = selection.mask_from_lists(lists, geometry)
    assert back.dtype == torch.bool
    assert torch.equal(back, expected)


# --- from log-sum-exps ----------------------------------------------------------------------------------------------


def make_lse(case: Case, stride: int, magnitude: float) -> torch.Tensor:
    """As the scoring kernel leaves it: hidden blocks never written, some visible ones -inf but for the sink."""
    geometry = case.geometry
    generator = torch.Generator().manual_seed(case.seed)
    groups = -(-case.q_len // stride)
    lse = torch.randn(case.batch, case.heads, groups, geometry.k_blocks, generator=generator) * magnitude
    unseen = torch.rand(lse.shape, generator=generator) < 0.2
    unseen[..., 0] = False
    row_of_group = torch.arange(groups) * stride // case.block_size
    hidden = ~geometry.visible()[row_of_group]
    return lse.masked_fill(unseen, -torch.inf).masked_fill(hidden, torch.nan).to(DEVICE)


def average_fp64(lse: torch.Tensor, geometry: Geometry, stride: int, dtype: torch.dtype) -> torch.Tensor:
    row_of_group = torch.arange(lse.shape[2], device=DEVICE) * stride // geometry.block_size
    hidden = ~geometry.visible(DEVICE)[row_of_group]
    probabilities = (lse.masked_fill(hidden, -torch.inf).to(dtype) * math.log(2)).softmax(-1)
    rows = [probabilities[:, :, row_of_group == row].mean(2) for row in range(geometry.q_blocks)]
    return torch.stack(rows, 2).double()


@settings(max_examples=200, **REPRODUCIBLE)
@given(case=cases(), stride=st.sampled_from([16, 32, 64]), magnitude=st.sampled_from([0.5, 2.0, 5.0, 40.0]))
def test_log_sum_exps_become_scores_and_the_same_lists(case: Case, stride: int, magnitude: float) -> None:
    geometry, limits = case.geometry, torch.tensor(case.limits)
    lse = in_layout(make_lse(case, stride, magnitude), case.layout)
    with poisoned():
        scores = selection.average_lse(lse, geometry, stride)
        fused = selection.select_from_lse(lse, limits, geometry, stride, case.policy, case.order)
    truth = average_fp64(lse, geometry, stride, torch.float64)
    error = (scores.double() - truth).abs().max()
    plain_error = (average_fp64(lse, geometry, stride, torch.float32) - truth).abs().max()
    assert float(error) <= 2 * float(plain_error) + 2.0**-23
    hidden = ~geometry.visible(DEVICE)
    assert not scores.masked_select(hidden).any(), "what causality hides is 0"
    expected = reference.select_blocks(scores, limits, geometry, case.policy, case.order)
    assert_lists(selection.select_blocks(scores, limits, geometry, case.policy, case.order), expected)
    assert_lists(fused, expected)
