"""The Triton attention against fp64 and the reference, in Triton's interpreter (tests/test_gpu.py repeats it on a GPU).

Everything that a result must not hang on is poisoned: memory that the kernel allocates, list entries past the counts, and keys
and values of blocks that no list names.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xcalib.kernels import reference
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.order import launch_order

pytest.importorskip("triton")
from xcalib.kernels import attention  # needs Triton
from xcalib.kernels.selection import BlockLists
from xcalib.kernels.tuning import Config

torch.set_num_threads(1)

REPRODUCIBLE: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
AWKWARD_LENGTHS = (1, 2, 17, 63, 64, 65, 127, 128, 129, 191, 200, 257, 300)
HEAD_DIMS = (32, 33, 40, 64, 72, 80, 96, 128, 192, 256)
MASKS = ("random", "sparse", "full", "sink", "own", "last", "none")
LAYOUTS = ("heads first", "tokens first", "unaligned")
PEERS = 8  # torch computations that each sum in another order


@dataclass(frozen=True)
class Case:
    """One attention call; hypothesis prints it when it fails."""

    batch: int
    k_heads: int
    group: int
    q_len: int
    k_len: int
    head_dim: int
    block_size: int = 64
    causal: bool = True
    dtype: torch.dtype = torch.float32
    mask: str = "random"
    magnitude: float = 1.0
    scale: float = 0.125
    layout: str = "tokens first"
    tiles: tuple[int, int] = (128, 128)
    pointers: bool = False
    seed: int = 0

    @property
    def q_heads(self) -> int:
        return self.k_heads * self.group

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.q_len, self.k_len, self.block_size, self.causal)

    @property
    def config(self) -> Config:
        block_m, block_n = self.tiles
        return Config(4, 2, {"BLOCK_M": block_m, "BLOCK_N": block_n})


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Case:
    k_len = draw(st.sampled_from(AWKWARD_LENGTHS) | st.integers(1, 300))
    q_len = draw(st.just(k_len) | st.just(1) | st.integers(1, k_len))
    group = draw(st.sampled_from([1, 3, 7, 8]))
    rows = -(-q_len // 64) * group
    return Case(
        batch=draw(st.integers(1, 2 if rows <= 8 else 1)),
        k_heads=draw(st.integers(1, 2 if rows <= 4 else 1)),
        group=group,
        q_len=q_len,
        k_len=k_len,
        head_dim=draw(st.sampled_from(HEAD_DIMS) | st.integers(32, 256)),
        block_size=draw(st.sampled_from([64, 128])),
        causal=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        mask=draw(st.sampled_from(MASKS)),
        magnitude=draw(st.sampled_from([0.25, 1.0, 3.0])),
        scale=draw(st.sampled_from([0.125, 0.3, -0.2])),
        layout=draw(st.sampled_from(LAYOUTS)),
        tiles=draw(st.sampled_from([(128, 128), (128, 64), (64, 128), (64, 64), (32, 32)])),
        pointers=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor  # visible blocks only

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value


def make_mask(case: Case, generator: torch.Generator) -> torch.Tensor:
    geometry = case.geometry
    shape = (case.batch, case.q_heads, geometry.q_blocks, geometry.k_blocks)
    blocks = torch.arange(geometry.k_blocks)
    last = torch.tensor([geometry.visible_k_blocks(row) - 1 for row in range(geometry.q_blocks)])[:, None]
    keep = {"random": 0.5, "sparse": 0.15, "full": 1.0}.get(case.mask, 0.0)
    mask = torch.rand(shape, generator=generator) < keep
    if case.mask == "sink":
        mask |= blocks == 0
    elif case.mask == "own":
        mask |= geometry.always_kept() & (blocks > 0)
    elif case.mask == "last":
        mask |= blocks == last
    return mask & geometry.visible()


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)

    def draw(heads: int, length: int, magnitude: float) -> torch.Tensor:
        shape = (case.batch, heads, length, case.head_dim)
        if case.layout == "tokens first":
            storage = torch.empty(case.batch, length, heads, case.head_dim, dtype=case.dtype).transpose(1, 2)
        elif case.layout == "unaligned":
            storage = torch.empty(case.batch, heads, length, case.head_dim + 1, dtype=case.dtype)[..., 1:]
        else:
            storage = torch.empty(shape, dtype=case.dtype)
        return storage.copy_(torch.randn(shape, generator=generator) * magnitude)

    query = draw(case.q_heads, case.q_len, case.magnitude)
    key, value = draw(case.k_heads, case.k_len, case.magnitude), draw(case.k_heads, case.k_len, 1.0)
    mask = make_mask(case, generator)
    unlisted = ~mask.unflatten(1, (case.k_heads, case.group)).any(dim=(2, 3))  # (B, Hkv, nk)
    unlisted = unlisted.repeat_interleave(case.block_size, -1)[..., : case.k_len, None]
    for tensor in (key, value):
        tensor.masked_fill_(unlisted, math.nan)
    return Inputs(query, key, value, mask)


def make_lists(mask: torch.Tensor, seed: int = 0) -> BlockLists:
    counts = mask.sum(-1, dtype=torch.int32)
    indices = mask.logical_not().to(torch.int8).argsort(dim=-1, stable=True).to(torch.int16)
    junk = torch.randint(-(2**15), 2**15, indices.shape, generator=torch.Generator().manual_seed(seed))
    listed = torch.arange(mask.shape[-1]) < counts[..., None]
    return BlockLists(torch.where(listed, indices, junk.to(torch.int16)), counts)


@contextmanager
def launching(case: Case) -> Iterator[None]:
    """The case's configuration; memory that the wrappers allocate is full of NaN (or of the largest integer)."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    def choose(*_: Any) -> Config:
        return case.config

    with mock.patch.object(torch, "empty", poisoned), mock.patch.object(attention, "choose", choose):
        if case.pointers:
            with mock.patch.object(attention, "fits_tma", lambda *tensors: False):
                yield
        else:
            yield


def visible_tokens(case: Case, mask: torch.Tensor) -> torch.Tensor:
    """Bool ``(batch, q_heads, q_len, k_len)``."""
    tokens = mask.repeat_interleave(case.block_size, -2).repeat_interleave(case.block_size, -1)
    tokens = tokens[..., : case.q_len, : case.k_len]
    if case.causal:
        positions = torch.arange(case.k_len - case.q_len, case.k_len)
        tokens = tokens & (torch.arange(case.k_len) <= positions[:, None])
    return tokens


def exact(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in fp64."""
    query, key, value = (tensor.double().nan_to_num(0.0) for tensor in inputs.tensors)
    key, value = (tensor.repeat_interleave(case.group, 1) for tensor in (key, value))
    logits = (query @ key.mT * case.scale).masked_fill(~visible_tokens(case, inputs.mask), -math.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ value, logits.logsumexp(-1)


def peer(case: Case, inputs: Inputs, order: torch.Tensor) -> torch.Tensor:
    """Torch's attention in the case's precision: weights rounded to the values' type, sums in fp32, in one order.

    The transposed keys are copied because the BLAS sums a dot product of a transposed view in several lanes: its error is then a
    third of what a sum from the first feature to the last has, which is what tensor cores and the interpreter make.
    """
    query, key, value = (tensor.float().nan_to_num(0.0) for tensor in inputs.tensors)
    key, value = (tensor.repeat_interleave(case.group, 1) for tensor in (key, value))
    logits = query[..., order].contiguous() @ key[..., order].mT.contiguous() * case.scale
    logits = logits.masked_fill(~visible_tokens(case, inputs.mask), -math.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
    output = weights.to(case.dtype).float() @ value / weights.sum(-1, keepdim=True).clamp(min=1.0)
    return output.to(case.dtype)


def assert_near(actual: torch.Tensor, case: Case, inputs: Inputs) -> None:
    """At most three times the error of torch in the same precision, plus two roundings of one value.

    Of few queries an error is one draw of luck: torch draws several times, and the worst counts.
    """
    truth, _ = exact(case, inputs)
    generator = torch.Generator().manual_seed(case.seed)
    orders = [torch.randperm(case.head_dim, generator=generator) for _ in range(PEERS)]
    peers = torch.stack([peer(case, inputs, order) for order in orders]).double() - truth
    assert (actual.dtype, actual.shape) == (inputs.query.dtype, inputs.query.shape)
    assert bool(actual.isfinite().all())
    error = actual.double() - truth
    floor = 2 * torch.finfo(case.dtype).eps * float(inputs.value.nan_to_num(0.0).abs().max())
    assert float(error.abs().max()) <= 3 * float(peers.abs().max()) + floor
    peer_deviation = float(peers.square().flatten(1).mean(1).max().sqrt())
    assert float(error.square().mean().sqrt()) <= 3 * peer_deviation + floor / 4
    assert bool((actual[~visible_tokens(case, inputs.mask).any(-1)] == 0).all())


def check(case: Case) -> None:
    inputs = make_inputs(case)
    lists = make_lists(inputs.mask, case.seed)
    with launching(case):
        output = attention.block_sparse_attention(*inputs.tensors, lists, case.geometry, case.scale)
    assert_near(output, case, inputs)


@settings(max_examples=200, **REPRODUCIBLE)
@given(case=cases((torch.float32,)))
def test_random_shapes_and_masks_in_fp32(case: Case) -> None:
    check(case)


@settings(max_examples=120, **REPRODUCIBLE)
@given(case=cases((torch.float16,)))
def test_random_shapes_and_masks_in_fp16(case: Case) -> None:
    check(case)


BASE = Case(1, 1, 2, 130, 203, 64)
FIXED = {
    "head-dim-80": replace(BASE, head_dim=80),
    "head-dim-96": replace(BASE, head_dim=96),
    "head-dim-192": replace(BASE, head_dim=192),
    "head-dim-256": replace(BASE, head_dim=256),
    "head-dim-80-pointers": replace(BASE, head_dim=80, pointers=True),
    "offset-of-no-block": replace(BASE, q_len=67, k_len=300, mask="full"),
    "one-token": replace(BASE, q_len=1, k_len=257, mask="full"),
    "one-key": replace(BASE, q_len=1, k_len=1, mask="full"),
    "group-of-8": replace(BASE, group=8, q_len=64, k_len=150),
    "not-causal": replace(BASE, causal=False, mask="full"),
    "not-causal-ragged-block-only": replace(BASE, causal=False, mask="last"),
    "two-parts-of-a-row": replace(BASE, block_size=128, q_len=256, k_len=300, tiles=(64, 64), mask="full"),
    "second-part-empty": replace(BASE, block_size=128, q_len=129, k_len=300, tiles=(64, 32), mask="full"),
    "parts-that-see-no-tile-of-the-last-block": replace(BASE, block_size=128, q_len=256, k_len=256, tiles=(32, 32)),
    "equal-weights": replace(BASE, scale=0.0, mask="full"),
    "vanishing-scale": replace(BASE, scale=1e-60, mask="full"),
    "negative-scale": replace(BASE, scale=-0.3, mask="full"),
    "one-sequence-of-odd-strides": replace(BASE, layout="unaligned", mask="full"),
}


@pytest.mark.parametrize("case", FIXED.values(), ids=FIXED.keys())
def test_fixed_shapes(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("magnitude", [1e2, 3e4])
def test_far_apart_logits_stay_finite(magnitude: float) -> None:
    case = replace(BASE, mask="full")
    inputs = make_inputs(case)
    query = inputs.query * magnitude
    with launching(case):
        output = attention.block_sparse_attention(
            query, inputs.key, inputs.value, make_lists(inputs.mask), case.geometry, case.scale
        )
    expected = reference.block_sparse_attention(query, inputs.key, inputs.value, inputs.mask, case.geometry, case.scale)
    torch.testing.assert_close(output, expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("pointers", [False, True], ids=["tma", "pointers"])
def test_a_batch_that_shares_its_keys(pointers: bool) -> None:
    """A stride of 0 is a stride."""
    case = replace(BASE, batch=2, pointers=pointers, mask="full")
    inputs = make_inputs(case)
    shared = replace(inputs, key=inputs.key[:1].expand_as(inputs.key), value=inputs.value[:1].expand_as(inputs.value))
    with launching(case):
        output = attention.block_sparse_attention(*shared.tensors, make_lists(shared.mask), case.geometry, case.scale)
    assert_near(output, case, shared)


@pytest.mark.parametrize("mask", ["random", "sparse", "none"])
def test_log_sum_exp(mask: str) -> None:
    case = replace(BASE, batch=2, mask=mask, head_dim=32)
    inputs = make_inputs(case)
    with launching(case):
        output, lse = attention.block_sparse_attention_with_lse(
            *inputs.tensors, make_lists(inputs.mask), case.geometry, case.scale
        )
    assert_near(output, case, inputs)
    torch.testing.assert_close(lse, exact(case, inputs)[1].float(), atol=1e-5, rtol=1e-5)


def test_output_transposes_to_contiguous() -> None:
    inputs = make_inputs(replace(BASE, mask="full"))
    output = attention.block_sparse_attention(*inputs.tensors, make_lists(inputs.mask), BASE.geometry, BASE.scale)
    assert output.transpose(1, 2).is_contiguous()


@settings(max_examples=40, **REPRODUCIBLE)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 300)),
    longest=st.sampled_from([1, 2, 300, 32_767]),
    seed=st.integers(0, 99),
)
def test_rows_are_launched_longest_first_and_near_rows_together(
    shape: tuple[int, int, int, int], longest: int, seed: int
) -> None:
    batch, k_heads, group, rows = shape
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, longest + 1, (batch, k_heads * group, rows), dtype=torch.int32, generator=generator)
    order = launch_order(counts, k_heads)
    assert order[-1] == 0
    numbers = torch.arange(counts.numel()).view(batch, k_heads, group, rows)
    near = numbers.flip(3).transpose(2, 3).flatten().tolist()  # batch, key head, row from the last, member
    lengths = counts.flatten().tolist()
    assert order[:-1].tolist() == sorted(near, key=lambda number: -lengths[number].bit_length())  # sorted is stable


@dataclass(frozen=True)
class Packed:
    """Sequences one after the other, and each as a call of its own."""

    cases: list[Case]
    inputs: list[Inputs]

    def attend(self, case: Case, spoilt: tuple[int, ...] = ()) -> list[torch.Tensor]:
        """The sequences' outputs; keys and values of the ``spoilt`` ones are NaN."""
        query, key, value = (
            torch.cat([inputs.tensors[place][0].transpose(0, 1) for inputs in self.inputs]) for place in range(3)
        )
        sequence = torch.repeat_interleave(torch.tensor([each.k_len for each in self.cases]))
        for tensor in (key, value):
            tensor[torch.isin(sequence, torch.tensor(spoilt))] = math.nan
        lists = attention.pack_lists(
            [make_lists(inputs.mask) for inputs in self.inputs], [each.geometry for each in self.cases]
        )
        with launching(case):
            output = attention.block_sparse_attention_varlen(query, key, value, lists, case.scale)
        assert output.is_contiguous()
        pieces = output.split([each.q_len for each in self.cases])
        return [piece.transpose(0, 1).unsqueeze(0) for piece in pieces]


def pack(case: Case, lengths: list[tuple[int, int]]) -> Packed:
    """Sequences of (queries, keys before the first query)."""
    each = [replace(case, q_len=q, k_len=q + before, seed=case.seed + i) for i, (q, before) in enumerate(lengths)]
    return Packed(each, [make_inputs(its_case) for its_case in each])


LENGTHS = st.lists(st.tuples(st.integers(1, 140) | st.just(1), st.integers(0, 150)), min_size=1, max_size=4)


@settings(max_examples=60, **REPRODUCIBLE)
@given(case=cases((torch.float32, torch.float16)), lengths=LENGTHS)
def test_packed_sequences_are_as_if_alone(case: Case, lengths: list[tuple[int, int]]) -> None:
    case = replace(case, batch=1, k_heads=1, group=min(case.group, 3))
    packed = pack(case, lengths)
    for its_case, inputs, output in zip(packed.cases, packed.inputs, packed.attend(case), strict=True):
        assert_near(output, its_case, inputs)


@pytest.mark.parametrize("pointers", [False, True], ids=["tma", "pointers"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_packed_sequences_do_not_read_their_neighbours(causal: bool, pointers: bool) -> None:
    case = replace(BASE, mask="full", causal=causal, pointers=pointers, head_dim=80)
    packed = pack(case, [(70, 30), (1, 0), (129, 60), (1, 63), (64, 64)])
    for parity in (0, 1):
        spoilt = tuple(index for index in range(5) if index % 2 == parity)
        outputs = packed.attend(case, spoilt)
        for index in {0, 1, 2, 3, 4} - set(spoilt):
            assert_near(outputs[index], packed.cases[index], packed.inputs[index])


def test_packed_sequences_must_fit_together() -> None:
    packed = pack(BASE, [(5, 3), (64, 0)])
    lists = [make_lists(inputs.mask) for inputs in packed.inputs]
    with pytest.raises(ValueError, match=r"lists are 1 and geometries .* expected as many"):
        attention.pack_lists(lists[:1], [BASE.geometry, BASE.geometry])
    with pytest.raises(ValueError, match="the same block_size and causal"):
        attention.pack_lists(lists, [Geometry(5, 8, 64, True), Geometry(64, 64, 64, False)])
    tokens = torch.zeros(70, 2, 64)
    fitting = attention.pack_lists(lists, [each.geometry for each in packed.cases])
    with pytest.raises(ValueError, match="query holds 70 tokens and key 70, expected 69 and 72"):
        attention.block_sparse_attention_varlen(tokens, tokens[:, :1], tokens[:, :1], fitting, 0.125)
