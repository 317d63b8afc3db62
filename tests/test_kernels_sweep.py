"""The one-pass curve of every threshold against one selection and one attention per threshold.

The truth is computed in fp64 from the (upcast) inputs, for the masks that select_blocks gives. Two fp32 outputs cannot
serve: they differ by about eps * ||O||, so the square of their difference is wrong by its own size wherever tau drops
only 1e-6 of the mass, and curves go there. The fp32 outputs of block_sparse_attention are compared as well, in norm,
within the noise that they carry.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xcalib.kernels import SweepResult, block_sparse_attention, estimate_blocks, select_blocks, sweep_thresholds

torch.set_num_threads(1)

EPS = torch.finfo(torch.float32).eps
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
    stride: int
    block_size: int
    causal: bool
    dtype: torch.dtype
    magnitude: float
    pattern: str
    seed: int
    order: Any = "score"

    @property
    def q_heads(self) -> int:
        return self.k_heads * self.group

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "block_size": self.block_size, "causal": self.causal, "pattern": self.pattern}

    @property
    def lengths(self) -> dict[str, Any]:
        return {"q_len": self.q_len, "k_len": self.k_len, "block_size": self.block_size, "causal": self.causal}


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grid: torch.Tensor
    projection: torch.Tensor


def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inner = torch.rand(case.levels - 2, generator=generator).clamp(1e-4, 0.9999)
    grid = torch.cat([torch.tensor([0.0]), torch.unique(inner), torch.tensor([1.0])])
    query = draw(case.batch, case.q_heads, case.q_len, case.head_dim) * case.magnitude
    key = draw(case.batch, case.k_heads, case.k_len, case.head_dim) * case.magnitude
    value = draw(case.batch, case.k_heads, case.k_len, case.head_dim)
    projection = draw(case.q_heads, case.head_dim, case.rank) / math.sqrt(case.head_dim)
    return Inputs(query.to(case.dtype), key.to(case.dtype), value.to(case.dtype), grid, projection)


@dataclass(frozen=True)
class Truth:
    """fp64 ``(q_heads, levels)`` errors, int64 counts, fp64 ``(q_heads,)`` dense energy, largest |logit|."""

    error: torch.Tensor
    kept: torch.Tensor
    energy: torch.Tensor
    peak: float


def attend_fp64(logits: torch.Tensor, allowed: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ value


def masks_of(case: Case, data: Inputs) -> list[torch.Tensor]:
    scores = estimate_blocks(data.query, data.key, **case.options)
    return [select_blocks(scores, float(tau), order=case.order, **case.lengths) for tau in data.grid]


def truth_of(case: Case, data: Inputs, masks: list[torch.Tensor], scale: float | None = None) -> Truth:
    query, value = data.query.double(), data.value.double().repeat_interleave(case.group, 1)
    key = data.key.double().repeat_interleave(case.group, 1)
    logits = query @ key.mT * (case.head_dim**-0.5 if scale is None else scale)
    causal = torch.ones(case.q_len, case.k_len, dtype=torch.bool)
    if case.causal:
        causal = causal.tril(case.k_len - case.q_len)
    projection = data.projection.double()
    dense = attend_fp64(logits, causal, value)
    errors = []
    for mask in masks:
        tokens = mask.repeat_interleave(case.block_size, -2).repeat_interleave(case.block_size, -1)
        allowed = tokens[..., : case.q_len, : case.k_len] & causal
        difference = (attend_fp64(logits, allowed, value) - dense) @ projection
        errors.append(difference.square().sum(dim=(0, 2, 3)))
    kept = torch.stack([mask.sum(dim=(0, 2, 3)) for mask in masks], dim=-1)
    energy = (dense @ projection).square().sum(dim=(0, 2, 3))
    return Truth(torch.stack(errors, dim=-1), kept, energy, float(logits.abs().max()))


def assert_matches(result: SweepResult, truth: Truth) -> None:
    """Relative 1e-5, more where logits are large: a logit l carries eps * l, and its weight moves by as much."""
    relative = max(1e-5, 4 * EPS * truth.peak)
    assert torch.equal(result.kept, truth.kept)
    allowed = relative * truth.error + 1e-12 * truth.energy[:, None]
    excess = (result.error - truth.error).abs() - allowed
    assert bool((excess <= 0).all()), f"off by {float(excess.max()):.3g} more than allowed (relative {relative:.2g})"
    assert int(result.error[:, -1].count_nonzero()) == 0, "tau = 1 is exactly dense"
    assert result.error.dtype == torch.float64
    assert result.kept.dtype == torch.int64


def sweep(case: Case, data: Inputs, scale: float | None = None) -> SweepResult:
    tensors = (data.query, data.key, data.value, data.grid, data.projection)
    return sweep_thresholds(*tensors, scale=scale, order=case.order, **case.options)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    k_len = draw(st.sampled_from([1, 64, 65, 127, 200, 256, 300, 385]) | st.integers(1, 420))
    group = draw(st.sampled_from([1, 2, 3, 7]))
    return Case(
        batch=draw(st.integers(1, 2)),
        k_heads=draw(st.integers(1, 2 if group <= 3 else 1)),
        group=group,
        q_len=draw(st.just(k_len) | st.integers(1, k_len)),
        k_len=k_len,
        head_dim=draw(st.sampled_from([32, 40, 80, 96])),
        # From 8 on: the one number of a single query at rank 1 may cancel, and fp32 has no relative precision left.
        rank=draw(st.sampled_from([8, 16, 33, 96])),
        levels=draw(st.integers(26, 40)),
        stride=draw(st.sampled_from([4, 8, 16, 32, 64])),
        block_size=draw(st.sampled_from([64, 128])),
        causal=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16])),
        magnitude=draw(st.sampled_from([0.5, 1.0, 1.5])),
        pattern=draw(st.sampled_from(["antidiagonal", "diagonal", "random"])),
        seed=draw(st.integers(0, 2**16)),
        order=draw(st.sampled_from(["score", "recent"])),
    )


@settings(max_examples=150, **REPRODUCIBLE)
@given(case=cases())
def test_the_sweep_equals_one_run_per_threshold(case: Case) -> None:
    data = inputs(case)
    assert len(data.grid) >= 24
    truth = truth_of(case, data, masks_of(case, data))
    result = sweep(case, data)
    assert_matches(result, truth)
    assert result.error.shape == result.kept.shape == (case.q_heads, len(data.grid))
    assert bool((result.kept.diff(dim=-1) >= 0).all())
    assert bool((result.kept[:, -1] == result.visible).all()), "tau = 1 keeps every visible block"


@settings(max_examples=40, **REPRODUCIBLE)
@given(case=cases())
def test_the_sweep_equals_the_fp32_outputs_within_their_noise(case: Case) -> None:
    data = inputs(case)
    masks = masks_of(case, data)
    tensors = (data.query.float(), data.key.float(), data.value.float())
    options: dict[str, Any] = {"block_size": case.block_size, "causal": case.causal}
    outputs = [block_sparse_attention(*tensors, mask, **options).double() @ data.projection.double() for mask in masks]
    norms = torch.stack([(output - outputs[-1]).square().sum(dim=(0, 2, 3)).sqrt() for output in outputs], dim=-1)
    truth = truth_of(case, data, masks[-1:])
    result = sweep(case, data)
    # Two outputs, each off by some eps of its values and eps * |logit| of its weights.
    noise = 2 * EPS * (4 + truth.peak) * data.value.double().square().mean().sqrt() * data.projection.norm(dim=(1, 2))
    bound = noise * math.sqrt(case.batch * case.q_len)
    assert bool(((result.error.sqrt() - norms).abs() <= 1e-5 * norms + bound[:, None]).all())


FIXED = [
    Case(2, 2, 3, 300, 300, 40, 24, 32, 8, 64, True, torch.float32, 1.0, "antidiagonal", 1),
    Case(1, 1, 7, 129, 1000, 80, 32, 26, 16, 128, True, torch.float32, 1.5, "antidiagonal", 2),
    Case(3, 1, 1, 512, 512, 32, 8, 40, 4, 128, False, torch.float32, 1.0, "diagonal", 3),
    Case(1, 2, 2, 65, 641, 192, 192, 26, 64, 64, False, torch.bfloat16, 1.0, "random", 4),
    Case(1, 1, 2, 1, 777, 64, 16, 30, 32, 64, True, torch.float16, 2.0, "antidiagonal", 5),
    Case(2, 1, 1, 200, 333, 96, 1, 24, 16, 64, True, torch.float32, 1.0, "antidiagonal", 6),
]


def shape_id(case: Case) -> str:
    kind = "causal" if case.causal else "full"
    dtype = str(case.dtype).removeprefix("torch.")
    return (
        f"b{case.batch}-h{case.q_heads}over{case.k_heads}-q{case.q_len}-k{case.k_len}-d{case.head_dim}-{kind}-{dtype}"
    )


@pytest.mark.parametrize("case", FIXED, ids=shape_id)
def test_the_sweep_at_fixed_shapes(case: Case) -> None:
    data = inputs(case)
    assert_matches(sweep(case, data), truth_of(case, data, masks_of(case, data)))


@pytest.mark.parametrize("case", FIXED, ids=shape_id)
def test_only_the_gram_matrix_of_the_projection_matters(case: Case) -> None:
    data = inputs(case)
    generator = torch.Generator().manual_seed(9)
    rotation = torch.linalg.qr(torch.randn(case.rank, case.rank, generator=generator, dtype=torch.float64)).Q
    turned = Inputs(data.query, data.key, data.value, data.grid, (data.projection.double() @ rotation).float())
    expected, actual = sweep(case, data).error, sweep(case, turned).error
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=float(expected.max()) * 1e-9)


def test_equal_values_make_no_error_at_any_level() -> None:
    """Whatever is dropped, an average of equal values is that value; rounding alone remains."""
    case = FIXED[0]
    data = inputs(case)
    flat = Inputs(data.query, data.key, torch.ones_like(data.value), data.grid, data.projection)
    truth = truth_of(case, flat, masks_of(case, flat))
    result = sweep(case, flat)
    assert bool((result.error <= 1e-12 * truth.energy[:, None]).all())
    assert torch.equal(result.kept, truth.kept)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_input_that_is_not_finite_is_refused(name: str, number: float) -> None:
    data = inputs(FIXED[0])
    getattr(data, name)[0, 0, 17, 3] = number
    with pytest.raises(ValueError, match=rf"{name}.*finite"):
        sweep(FIXED[0], data)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_a_key_at_minus_infinity_is_refused_although_its_weight_is_zero(causal: bool) -> None:
    case = replace(FIXED[0], causal=causal)
    data = inputs(case)
    data.query.abs_()
    data.key[0, 0, 17] = -torch.inf
    with pytest.raises(ValueError, match=r"key.*finite"):
        sweep(case, data)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_the_message_names_the_projection_that_is_not_finite(number: float) -> None:
    data = inputs(FIXED[0])
    data.projection[1, 2, 3] = number
    with pytest.raises(ValueError, match="projection"):
        sweep(FIXED[0], data)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_projection_that_is_not_finite_is_refused(number: float) -> None:
    data = inputs(FIXED[0])
    data.projection[1, 2, 3] = number
    with pytest.raises(ValueError, match="finite"):
        sweep(FIXED[0], data)


def planted(gap: float, causal: bool, block: int = 2) -> tuple[Case, Inputs]:
    """One key block's logits lie ``gap`` above all others: the sink, or block 2, which is never always kept."""
    case = Case(1, 1, 2, 128, 512, 32, 16, 26, 16, 64, causal, torch.float32, 0.5, "antidiagonal", 11)
    data = inputs(case)
    data.query[..., 0] = 8.0
    data.key[..., 0] = 0.0
    data.key[:, :, 64 * block : 64 * (block + 1), 0] = gap * math.sqrt(case.head_dim) / 8.0
    return case, data


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("block", [0, 2], ids=lambda block: f"block{block}")
@pytest.mark.parametrize("gap", [1.0, 4.0, 8.0, 12.0, 16.0, 30.0], ids=lambda gap: f"gap{gap:g}")
def test_one_block_that_holds_nearly_all_leaves_the_rest_right(gap: float, block: int, causal: bool) -> None:
    """An attention sink: what is dropped weighs exp(-gap) of what is kept, and its square is all the error there is."""
    case, data = planted(gap, causal, block)
    assert_matches(sweep(case, data), truth_of(case, data, masks_of(case, data)))


GAPS = [20.0, 59.0, 61.0, 90.0, 300.0, 600.0]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("gap", GAPS, ids=lambda gap: f"gap{gap:g}")
def test_kept_blocks_far_below_the_peak_stay_right(gap: float, causal: bool) -> None:
    """exp(-gap) vanishes in fp32 from about 90 and yet it is all that tau = 0 attends to."""
    case, data = planted(gap, causal)
    truth = truth_of(case, data, masks_of(case, data))
    assert float(truth.error[:, 0].min()) > 0.1 * float(truth.energy.max()), "tau = 0 is meant to miss the peak"
    assert_matches(sweep(case, data), truth)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("gap", [800.0, 5000.0], ids=lambda gap: f"gap{gap:g}")
def test_kept_blocks_below_fp64s_smallest_weight_are_refused(gap: float, causal: bool) -> None:
    """exp(-gap) vanishes in fp64 too: no trained model has such logits, and the message says what is wrong."""
    case, data = planted(gap, causal)
    with pytest.raises(ValueError, match="700 apart"):
        sweep(case, data)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, -0.3], ids=lambda scale: f"scale{scale:g}")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_large_and_odd_scales_stay_right(scale: float, causal: bool) -> None:
    case = Case(1, 2, 2, 130, 330, 32, 16, 30, 8, 64, causal, torch.float32, 1.0, "antidiagonal", 21)
    data = inputs(case)
    scores = estimate_blocks(data.query, data.key, scale=scale, **case.options)
    masks = [select_blocks(scores, float(tau), **case.lengths) for tau in data.grid]
    assert_matches(sweep(case, data, scale), truth_of(case, data, masks, scale))


def test_a_grid_in_fp64_keeps_what_select_blocks_keeps_at_the_same_thresholds() -> None:
    """Ten equal blocks of one tenth: cumulative sums fall between a threshold in fp64 and the same one in fp32."""
    case = Case(1, 1, 1, 640, 640, 32, 4, 26, 16, 64, False, torch.float32, 1.0, "antidiagonal", 0)
    data = inputs(case)
    query, grid = torch.zeros_like(data.query), torch.linspace(0, 1, 31, dtype=torch.float64)
    scores = estimate_blocks(query, data.key, **case.options)
    kept = [int(select_blocks(scores, float(tau), **case.lengths).sum()) for tau in grid]
    result = sweep_thresholds(query, data.key, data.value, grid, data.projection, **case.options)
    assert result.kept[0].tolist() == kept


def test_two_runs_give_the_same_bits() -> None:
    case = FIXED[1]
    first, second = sweep(case, inputs(case)), sweep(case, inputs(case))
    assert torch.equal(first.error, second.error)
    assert torch.equal(first.kept, second.kept)
