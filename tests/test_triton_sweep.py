"""The Triton sweep against the reference's, in Triton's interpreter (tests/test_gpu.py repeats it on a GPU).

fp32 agrees to the reference's own accuracy. In fp16 the kernel rounds weights, factors, projected values, and the
levels' means and their differences to 11 bits; what that may do to an error is bounded from the data of each case.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from xcalib.kernels import SweepResult, reference
from xcalib.kernels.geometry import Geometry
from xcalib.models.structure import compact_projection

pytest.importorskip("triton")
from xcalib.kernels import sweep  # needs Triton

torch.set_num_threads(1)

EPS = torch.finfo(torch.float32).eps
HALF_UNIT = 2.0**-11  # of fp16's rounding
ROUNDINGS = 4
REPRODUCIBLE: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@dataclass(frozen=True)
class Case:
    """One sweep; hypothesis prints it when it fails."""

    batch: int
    k_heads: int
    group: int
    q_len: int
    k_len: int
    head_dim: int
    rank: int
    levels: int
    block_size: int = 64
    causal: bool = True
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0
    gap: float = 0.0
    scale: float | None = None
    layout: str = "contiguous"
    seed: int = 0
    order: str = "score"

    @property
    def q_heads(self) -> int:
        return self.k_heads * self.group

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.q_len, self.k_len, self.block_size, self.causal)


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scores: torch.Tensor
    grid: torch.Tensor
    projection: torch.Tensor
    geometry: Geometry
    scale: float
    order: str

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers: contiguous, as transformers lays them out, or from an address that TMA cannot load from."""
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "odd address":
        storage = tensor.new_empty(tensor.numel() + 1)
        return storage[1:].view(tensor.shape).copy_(tensor)
    return tensor


def inputs(case: Case) -> Inputs:
    """Random tensors; with a gap the second key block's logits lie that far above all others."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inner = torch.rand(case.levels - 2, generator=generator).clamp(1e-4, 0.9999)
    grid = torch.cat([torch.tensor([0.0]), torch.unique(inner), torch.tensor([1.0])])
    query = draw(case.batch, case.q_heads, case.q_len, case.head_dim) * case.magnitude
    key = draw(case.batch, case.k_heads, case.k_len, case.head_dim) * case.magnitude
    value = draw(case.batch, case.k_heads, case.k_len, case.head_dim)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    if case.gap:
        query[..., 0], key[..., 0] = 8.0, 0.0
        key[:, :, case.block_size : 2 * case.block_size, 0] = case.gap / (8.0 * scale)
    query, key, value = (laid_out(tensor.to(case.dtype), case.layout) for tensor in (query, key, value))
    scores = reference.estimate_blocks(
        query,
        key,
        stride=16,
        block_size=case.block_size,
        causal=case.causal,
        scale=scale,
        pattern="antidiagonal",
        seed=0,
    )
    projection = draw(case.q_heads, case.head_dim, case.rank) / math.sqrt(case.head_dim)
    return Inputs(query, key, value, scores, grid, projection, case.geometry, scale, case.order)


@dataclass(frozen=True)
class Truth:
    """fp64 ``(q_heads, levels)`` errors and what one rounding of everything may add to their roots; ``peak`` of |logit|."""

    error: torch.Tensor
    kept: torch.Tensor
    noise: torch.Tensor
    energy: torch.Tensor
    peak: float


def truth_of(case: Case, data: Inputs) -> Truth:
    """Attention in fp64 once per threshold.

    A relative rounding ``u`` of weights or values moves a mean of projected values by at most ``u`` times the mean of their
    norms, and the difference from dense by the dropped mass times that, for what is kept and for what is dropped.
    """
    query = data.query.double()
    key, value = (tensor.double().repeat_interleave(case.group, 1) for tensor in (data.key, data.value))
    logits = query @ key.mT * data.scale
    visible = torch.ones(case.q_len, case.k_len, dtype=torch.bool)
    if case.causal:
        visible = visible.tril(case.k_len - case.q_len)
    values = value @ data.projection.double()
    with_norms = torch.cat([values, values.norm(dim=-1, keepdim=True)], -1)
    dense = logits.masked_fill(~visible, -torch.inf).softmax(-1) @ with_norms
    errors, counts, noises = [], [], []
    for tau in data.grid:
        limits = tau.expand(case.q_heads)
        mask = reference.select_blocks(data.scores, limits, data.geometry, "threshold", case.order)
        tokens = mask.repeat_interleave(case.block_size, -2).repeat_interleave(case.block_size, -1)
        kept = tokens[..., : case.q_len, : case.k_len] & visible
        dropped_logits = logits.masked_fill(kept | ~visible, -torch.inf)
        all_mass = logits.masked_fill(~visible, -torch.inf).logsumexp(-1)
        share = (dropped_logits.logsumexp(-1) - all_mass).exp()[..., None]
        kept_mean = logits.masked_fill(~kept, -torch.inf).softmax(-1) @ with_norms
        dropped_mean = torch.nan_to_num(dropped_logits.softmax(-1)) @ with_norms
        difference = share * (kept_mean - dropped_mean)[..., :-1]
        errors.append(difference.square().sum(dim=(0, 2, 3)))
        noises.append((share * (kept_mean + dropped_mean))[..., -1].square().sum(dim=(0, 2)).sqrt())
        counts.append(mask.sum(dim=(0, 2, 3)))
    energy = dense[..., :-1].square().sum(dim=(0, 2, 3))
    stacked = (torch.stack(numbers, -1) for numbers in (errors, counts, noises))
    return Truth(*stacked, energy, float(logits.abs().max()))


def assert_matches(case: Case, result: SweepResult, truth: Truth) -> None:
    """fp32: the reference's tolerance, relative 1e-5, more where logits are large since a logit l carries eps * l."""
    relative = max(1e-5, 4 * EPS * truth.peak)
    allowed = relative * truth.error + 1e-12 * truth.energy[:, None]
    if case.dtype == torch.float16:
        noise = ROUNDINGS * HALF_UNIT * truth.noise
        allowed = allowed + 2 * truth.error.sqrt() * noise + noise.square()
    assert torch.equal(result.kept, truth.kept)
    assert result.visible == case.batch * case.geometry.visible_count
    excess = (result.error - truth.error).abs() - allowed
    assert bool((excess <= 0).all()), f"off by {float(excess.max()):.3g} more than allowed (relative {relative:.2g})"
    assert int(result.error[:, -1].count_nonzero()) == 0, "tau = 1 is exactly dense"
    assert (result.error.dtype, result.kept.dtype) == (torch.float64, torch.int64)


# (batch, KV heads, group) and how many query blocks then keep a case quick: the interpreter's time goes by tiles.
HEADS = {(1, 1, 1): 4, (1, 2, 1): 2, (2, 1, 1): 2, (1, 1, 3): 2, (2, 1, 2): 1, (1, 2, 3): 1, (1, 1, 7): 1, (1, 1, 8): 1}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads = draw(st.sampled_from(list(HEADS)))
    block_size = draw(st.sampled_from([64, 64, 128]))
    longest = HEADS[heads] * block_size
    k_len = draw(st.sampled_from([1, 64, 65, 127, 128, 130, 200, 257, 320]) | st.integers(1, 330))
    q_len = draw(st.sampled_from([1, k_len]) | st.integers(1, k_len))
    return Case(
        *heads,
        q_len=min(q_len, longest),
        k_len=k_len,
        head_dim=draw(st.sampled_from([32, 40, 64, 80, 96, 100, 128])),
        # From 8 on: the one number of a single query at rank 1 may cancel, and fp32 has no relative precision left.
        rank=draw(st.sampled_from([8, 33, 96])),
        levels=draw(st.sampled_from([2, 3, 9, 16, 32, 33, 40])),
        block_size=block_size,
        causal=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        magnitude=draw(st.sampled_from([0.2, 1.0, 1.5])),
        gap=draw(st.sampled_from([0.0, 0.0, 0.0, 4.0, 12.0, 30.0])),
        scale=draw(st.sampled_from([None, None, None, 0.05, -0.1])),
        layout=draw(st.sampled_from(["contiguous", "transposed", "odd address"])),
        seed=draw(st.integers(0, 2**16)),
        order=draw(st.sampled_from(["score", "recent"])),
    )


@settings(max_examples=300, **REPRODUCIBLE)
@given(case=cases())
def test_the_sweep_equals_one_attention_per_threshold(case: Case) -> None:
    data = inputs(case)
    result = sweep.sweep_thresholds(*data.arguments)
    assert_matches(case, result, truth_of(case, data))
    expected = reference.sweep_thresholds(*data.arguments)
    assert torch.equal(result.kept, expected.kept)
    assert result.visible == expected.visible


FIXED = [
    Case(2, 1, 3, 130, 300, 40, 24, 32),
    Case(1, 1, 7, 129, 600, 80, 32, 26, block_size=128, magnitude=1.5, seed=2),
    Case(3, 1, 1, 256, 256, 32, 8, 40, block_size=128, causal=False, seed=3),
    Case(1, 2, 2, 65, 641, 192, 192, 26, causal=False, dtype=torch.float16, seed=4),
    Case(1, 1, 2, 1, 777, 64, 16, 30, dtype=torch.float16, magnitude=2.0, seed=5),
    Case(1, 1, 2, 70, 200, 192, 64, 12, layout="odd address", seed=6),
    Case(1, 1, 1, 128, 500, 256, 256, 12, block_size=128, dtype=torch.float16, layout="transposed", seed=7),
    Case(2, 1, 1, 100, 233, 96, 1, 24, seed=8),
    Case(1, 1, 1, 64, 1100, 32, 8, 101, seed=9),
    Case(1, 1, 1, 1, 1, 32, 8, 2, seed=10),
    Case(1, 1, 2, 130, 420, 40, 16, 26, seed=11, order="recent"),
    Case(1, 1, 1, 200, 256, 32, 8, 20, causal=False, dtype=torch.float16, seed=12, order="recent"),
]


SMALL = Case(1, 1, 3, 130, 300, 40, 24, 12)


def shape_id(case: Case) -> str:
    kind = "causal" if case.causal else "full"
    dtype = str(case.dtype).removeprefix("torch.")
    shape = f"b{case.batch}-h{case.q_heads}over{case.k_heads}-q{case.q_len}-k{case.k_len}-d{case.head_dim}"
    return f"{shape}-l{case.levels}-{kind}-{dtype}-{case.order}"


@pytest.mark.parametrize("case", FIXED, ids=shape_id)
def test_the_sweep_at_fixed_shapes(case: Case) -> None:
    data = inputs(case)
    assert_matches(case, sweep.sweep_thresholds(*data.arguments), truth_of(case, data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("gap", [20.0, 90.0, 300.0, 800.0, 5000.0], ids=lambda gap: f"gap{gap:g}")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_kept_blocks_far_below_the_peak_stay_right(gap: float, dtype: torch.dtype) -> None:
    """exp(-gap) vanishes in fp32 from about 90, in fp64 from 745, and yet it is all that tau = 0 attends to."""
    case = Case(1, 1, 2, 64, 256, 32, 16, 12, dtype=dtype, magnitude=0.5, gap=gap, seed=11)
    data = inputs(case)
    truth = truth_of(case, data)
    assert float(truth.error[:, 0].min()) > 0.1 * float(truth.energy.max()), "tau = 0 is meant to miss the peak"
    assert_matches(case, sweep.sweep_thresholds(*data.arguments), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_equal_values_make_no_error_at_any_level(dtype: torch.dtype) -> None:
    """Whatever is dropped, an average of equal values is that value; rounding alone remains."""
    case = replace(SMALL, dtype=dtype)
    data = inputs(case)
    flat = replace(data, value=torch.ones_like(data.value))
    assert_matches(case, sweep.sweep_thresholds(*flat.arguments), truth_of(case, flat))


@pytest.mark.parametrize("factor", [1e-18, 1e-3, 1e18], ids=lambda factor: f"{factor:g}")
def test_the_projections_size_is_taken_out_exactly(factor: float) -> None:
    data = inputs(replace(SMALL, dtype=torch.float16))
    plain = sweep.sweep_thresholds(*data.arguments)
    scaled = sweep.sweep_thresholds(*replace(data, projection=data.projection * factor).arguments)
    torch.testing.assert_close(scaled.error, plain.error * factor**2, rtol=1e-2, atol=0.0)


def test_a_projection_of_zeros_makes_no_error() -> None:
    data = inputs(SMALL)
    data.projection[1] = 0.0
    error = sweep.sweep_thresholds(*data.arguments).error
    assert int(error[1].count_nonzero()) == 0
    assert bool((error[[0, 2], 0] > 0).all())


def test_values_at_the_end_of_fp16s_range_do_not_overflow() -> None:
    case = replace(SMALL, dtype=torch.float16)
    data = inputs(case)
    large = replace(data, value=(data.value.float().clamp(-2, 2) * 32000).half())
    assert_matches(case, sweep.sweep_thresholds(*large.arguments), truth_of(case, large))


def test_a_scale_of_zero_weighs_all_keys_alike() -> None:
    case = replace(SMALL, scale=0.0)
    data = inputs(case)
    assert_matches(case, sweep.sweep_thresholds(*data.arguments), truth_of(case, data))


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf], ids=str)
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_what_is_not_finite_spoils_its_head_instead_of_being_averaged_in(name: str, number: float) -> None:
    case = Case(1, 2, 1, 100, 200, 32, 16, 8, seed=12)
    data = inputs(case)
    getattr(data, name)[0, 1, 17, 3] = number
    error = sweep.sweep_thresholds(*data.arguments).error
    assert not bool(error[1].isfinite().all())
    assert bool(error[0].isfinite().all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_logits_that_overflow_are_reported(sign: float) -> None:
    case = Case(1, 1, 1, 64, 256, 32, 16, 8, seed=13)
    data = inputs(case)
    overflowing = replace(data, query=torch.full_like(data.query, 1e25), key=torch.full_like(data.key, sign * 1e25))
    assert not bool(sweep.sweep_thresholds(*overflowing.arguments).error.isfinite().all())


@pytest.mark.parametrize(
    ("bound", "size"), [("SCRATCH_BYTES", 700_000), ("SCORE_ELEMENTS", 15), ("PROJECTED_ELEMENTS", 1)]
)
def test_bounded_memory_changes_no_bit(bound: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = inputs(SMALL)
    whole = sweep.sweep_thresholds(*data.arguments)
    monkeypatch.setattr(sweep, bound, size)
    parts = sweep.sweep_thresholds(*data.arguments)
    assert torch.equal(parts.error, whole.error)
    assert torch.equal(parts.kept, whole.kept)


@pytest.mark.parametrize("heads_at_once", [1, 2, 3, 4], ids=lambda heads: f"at most {heads}")
def test_heads_in_parts_change_no_bit(heads_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are whole groups that share a key head, or single heads."""
    data = inputs(Case(2, 2, 2, 70, 130, 40, 24, 9, seed=14, dtype=torch.float16))
    whole = sweep.sweep_thresholds(*data.arguments)
    monkeypatch.setattr(sweep, "PROJECTED_ELEMENTS", data.value[:, 0].numel() * heads_at_once)
    parts = sweep.sweep_thresholds(*data.arguments)
    assert torch.equal(parts.error, whole.error)
    assert torch.equal(parts.kept, whole.kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_a_level_for_each_block(dtype: torch.dtype) -> None:
    """Equal scores: with as many thresholds as blocks every block is a level, and none holds two."""
    case = Case(1, 1, 1, 128, 1088, 32, 40, 20, dtype=dtype, seed=15)
    data = inputs(case)
    even = replace(data, scores=torch.full_like(data.scores, 1 / 17), grid=torch.linspace(0, 1, 20))
    assert_matches(case, sweep.sweep_thresholds(*even.arguments), truth_of(case, even))


def test_a_wide_projection_and_its_square_factor_give_the_same() -> None:
    """A factor is used as it is; a projection to more dimensions than the head's is factored first."""
    data = inputs(replace(SMALL, rank=80))
    square = replace(data, projection=compact_projection(data.projection))
    expected = sweep.sweep_thresholds(*data.arguments).error
    torch.testing.assert_close(sweep.sweep_thresholds(*square.arguments).error, expected, rtol=1e-4, atol=1e-12)


def test_two_runs_give_the_same_bits() -> None:
    data = inputs(SMALL)
    first, second = (sweep.sweep_thresholds(*data.arguments) for _ in range(2))
    assert torch.equal(first.error, second.error)


def test_padding_the_head_changes_nothing() -> None:
    """Components of zero add nothing, and only the Gram matrix of the projection matters."""
    data = inputs(SMALL)
    query, key, value = (functional.pad(tensor, (0, 16)) for tensor in (data.query, data.key, data.value))
    projection = functional.pad(data.projection, (0, 0, 0, 16))
    padded = replace(data, query=query, key=key, value=value, projection=projection)
    expected = sweep.sweep_thresholds(*data.arguments)
    torch.testing.assert_close(sweep.sweep_thresholds(*padded.arguments).error, expected.error, rtol=1e-5, atol=1e-12)
