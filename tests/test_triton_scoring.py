"""The Triton scoring against fp64 and the reference, in Triton's interpreter (tests/test_gpu.py repeats it on a GPU).

Errors may be twice those of the same computation in fp32 torch, and some last digits of the numbers involved. Memory that the
kernels must not read, or must write, is full of NaN.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from xcalib.kernels import reference
from xcalib.kernels.geometry import Geometry

pytest.importorskip("triton")
from xcalib.kernels import quantise, scoring, scoring_rows  # need Triton
from xcalib.kernels.selection import average_lse
from xcalib.kernels.tuning import Config

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = torch.finfo(torch.float32).eps
LOG2_E = math.log2(math.e)
REPRODUCIBLE: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
LAYOUTS = ("contiguous", "tokens first", "amid NaN", "one head for all", "not aligned")
TILES = ((64, 64, 64, 2), (32, 128, 128, 1), (128, 32, 128, 16))  # BLOCK_M, BLOCK_N, BLOCK_D, GROUP_M
ROWS_TILES = (TILES[1], (64, 128, 32, 1))  # of whole blocks


@dataclass(frozen=True)
class Case:
    """One call; hypothesis prints it when it fails."""

    batch: int
    k_heads: int
    group: int
    q_len: int
    k_len: int
    head_dim: int
    stride: int
    block_size: int
    causal: bool = True
    dtype: torch.dtype = torch.float32
    pattern: str = "antidiagonal"
    layout: str = "contiguous"
    tma: bool = True
    tiles: tuple[int, int, int, int] = TILES[0]
    scale: float = 0.2
    magnitude: float = 1.0
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.q_len, self.k_len, self.block_size, self.causal)

    @property
    def options(self) -> dict[str, Any]:
        names = ("stride", "block_size", "causal", "scale", "pattern", "seed")
        return {name: getattr(self, name) for name in names}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few programs and steps each: the interpreter takes a millisecond a step."""
    stride = draw(st.sampled_from([4, 8, 8, 16, 16, 32, 64]))
    longest = min(70 * stride, 520)
    k_len = draw(st.sampled_from([1, stride, 64, 127, 256, 263]) | st.integers(1, longest))
    q_len = draw(st.just(k_len) | st.just(1) | st.integers(1, k_len))
    group = draw(st.sampled_from([1, 1, 1, 2, 3, 4, 6, 7, 8]))
    odd = (33, 72, 80, 96) if stride <= (8 if group > 4 else 16) else ()  # in chunks of 16 features, or 32
    large = (128, 192) if stride <= 16 or group == 1 else ()
    pattern = draw(st.sampled_from(["antidiagonal", "diagonal", "random", "rows", "rows"]))
    head_dim = draw(st.sampled_from([32, 64, *odd, *large]))
    return Case(
        batch=draw(st.integers(1, 2 if group <= 2 else 1)),
        k_heads=draw(st.integers(1, 2 if group <= 3 else 1)),
        group=group,
        q_len=q_len,
        k_len=k_len,
        head_dim=head_dim,
        stride=stride,
        block_size=draw(st.sampled_from([64, 128])),
        causal=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        pattern=pattern,
        layout=draw(st.sampled_from(LAYOUTS)),
        tma=draw(st.sampled_from([True, True, False])),
        tiles=draw(st.sampled_from(ROWS_TILES if pattern == "rows" else TILES)),
        scale=draw(st.sampled_from([0.5, 1.0, 1.0, 2.0, -1.0, 0.0])) / math.sqrt(head_dim),
        magnitude=draw(st.sampled_from([0.5, 1.0, 3.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def in_layout(tokens: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers, or one head's for all, in other memory."""
    batch, heads, length, head_dim = tokens.shape
    if layout == "tokens first":
        return tokens.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "amid NaN":
        wide = torch.full((batch, heads, length + 200, head_dim), torch.nan, dtype=tokens.dtype, device=tokens.device)
        wide[:, :, 8 : 8 + length] = tokens
        return wide[:, :, 8 : 8 + length]
    if layout == "one head for all":
        return tokens[:, :1].expand_as(tokens)
    if layout == "not aligned":
        return torch.cat([tokens.new_zeros(1), tokens.flatten()])[1:].view(tokens.shape)
    return tokens


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    query = torch.randn(case.batch, case.k_heads * case.group, case.q_len, case.head_dim, generator=generator)
    key = torch.randn(case.batch, case.k_heads, case.k_len, case.head_dim, generator=generator)
    query, key = ((tokens * case.magnitude).to(DEVICE, case.dtype) for tokens in (query, key))
    return in_layout(query, case.layout), in_layout(key, case.layout)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory comes full of NaN."""
    empty = torch.empty

    def poisoned_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs).fill_(torch.nan)

    with mock.patch.object(torch, "empty", poisoned_empty):
        yield


@contextmanager
def launched_as(case: Case) -> Iterator[None]:
    """The case's tiles, and its way to read memory, whatever the device would get."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "GROUP_M")
    tiles = dict(zip(names, case.tiles, strict=True))
    if case.pattern == "rows":
        del tiles["GROUP_M"]
    config = Config(4, 2, tiles)
    with ExitStack() as stack:
        stack.enter_context(poisoned())
        for module in (scoring, scoring_rows):
            stack.enter_context(mock.patch.object(module, "choose", lambda *_: config))
            if not case.tma:
                stack.enter_context(mock.patch.object(module, "fits_tma", lambda *_: False))
        yield


def plain_lse(query: torch.Tensor, key: torch.Tensor, case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Log-sum-exps to base 2 from all logits at once, -inf where nothing is visible."""
    stride, geometry = case.stride, case.geometry
    if case.pattern == "rows":
        return plain_rows_lse(query.to(dtype), key.to(dtype), case)
    query, key = (
        functional.pad(t.to(dtype), (0, 0, 0, -t.shape[2] % stride)).unflatten(2, (-1, stride)) for t in (query, key)
    )
    order = reference.strided_order(case.pattern, stride, case.seed, query.device)
    rows = query.index_select(3, order).flatten(3)  # (B, Hq, q_groups, S * D)
    columns = key.flatten(3).repeat_interleave(case.group, 1)  # (B, Hq, k_groups, S * D)
    logits = rows @ columns.mT * (case.scale / stride * LOG2_E)
    if case.causal:
        last_keys = geometry.offset + stride * torch.arange(1, rows.shape[2] + 1, device=query.device) - 1
        ahead = torch.arange(columns.shape[2], device=query.device) * stride > last_keys[:, None]
        logits = logits.masked_fill(ahead, -torch.inf)
    per_block = case.block_size // stride
    logits = functional.pad(logits, (0, -logits.shape[3] % per_block), value=-torch.inf).unflatten(3, (-1, per_block))
    return (logits * math.log(2)).logsumexp(-1) / math.log(2)


def key_stride(case: Case) -> int:
    """Keys that one scale of fp8 serves."""
    return 1 if case.pattern == "rows" else case.stride


def plain_rows_lse(query: torch.Tensor, key: torch.Tensor, case: Case) -> torch.Tensor:
    """As :func:`plain_lse`: the last query of each row group, or of all, and every key."""
    groups = torch.arange(-(-case.q_len // case.stride), device=query.device)
    sampled = (groups * case.stride + case.stride - 1).clamp(max=case.q_len - 1)
    logits = query[:, :, sampled] @ key.repeat_interleave(case.group, 1).mT * (case.scale * LOG2_E)
    if case.causal:
        ahead = torch.arange(case.k_len, device=key.device) > case.geometry.offset + sampled[:, None]
        logits = logits.masked_fill(ahead, -torch.inf)
    blocks = functional.pad(logits, (0, -case.k_len % case.block_size), value=-torch.inf).unflatten(
        3, (-1, case.block_size)
    )
    return (blocks * math.log(2)).logsumexp(-1) / math.log(2)


def allowed_error(
    plain: torch.Tensor, truth: torch.Tensor, tokens: tuple[torch.Tensor, torch.Tensor], case: Case
) -> float:
    """Twice what fp32 torch is off by; where few numbers make that a matter of luck, a rounding of each step's result.

    Args:
        plain: in fp32.
        truth: in fp64.
        tokens: query and key, whose products add up to the logits.
        case: how they were scored.
    """
    query, key = (t.double().abs() for t in tokens)
    pattern = "rows" if case.pattern == "rows" else "diagonal"
    products = replace(case, scale=abs(case.scale), pattern=pattern, causal=False)
    logits = plain_lse(query, key, products, torch.float64).max()
    return float(2 * (plain - truth).abs().max() + EPS * (1 + truth.abs().max()) + EPS / 4 * logits)


def plain_scores(lse: torch.Tensor, case: Case) -> torch.Tensor:
    """Block scores from log-sum-exps of any precision."""
    probabilities = (lse * math.log(2)).softmax(-1)
    row = torch.arange(lse.shape[2], device=lse.device) * case.stride // case.block_size
    return torch.stack([probabilities[:, :, row == r].mean(2) for r in range(case.geometry.q_blocks)], 2)


def readable(case: Case) -> torch.Tensor:
    """Where block_lse may be read: bool ``(q_groups, k_blocks)``."""
    rows = torch.arange(-(-case.q_len // case.stride), device=DEVICE) * case.stride // case.block_size
    return case.geometry.visible(DEVICE)[rows]


def assert_lse(lse: torch.Tensor, query: torch.Tensor, key: torch.Tensor, case: Case) -> None:
    truth = plain_lse(query, key, case, torch.float64)
    plain = plain_lse(query, key, case, torch.float32)
    assert lse.dtype == torch.float32
    assert lse.shape == truth.shape
    may_read = readable(case)
    assert bool((truth == -torch.inf).masked_fill(may_read, True).all()), "nothing visible is left unwritten"
    seen = (truth > -torch.inf) & may_read
    assert torch.equal(lse[..., may_read] > -torch.inf, seen[..., may_read])
    assert float((lse - truth)[seen].abs().max()) <= allowed_error(plain[seen], truth[seen], (query, key), case)


def assert_scores(scores: torch.Tensor, query: torch.Tensor, key: torch.Tensor, case: Case) -> None:
    lse = plain_lse(query, key, case, torch.float64)
    truth = plain_scores(lse, case)
    plain = reference.estimate_blocks(query, key, **case.options)
    assert scores.shape == truth.shape
    largest = EPS * float(
        lse[lse > -torch.inf].abs().max()
    )  # a log-sum-exp is off by as much, and its power relatively so
    assert float((scores - truth).abs().max()) <= largest + allowed_error(plain, truth, (query, key), case)
    assert not scores.masked_select(~case.geometry.visible(DEVICE)).any(), "what causality hides is 0"


@settings(max_examples=300, **REPRODUCIBLE)
@given(case=cases())
@example(case=Case(1, 1, 8, 1, 130, 80, 4, 64))
@example(case=Case(1, 1, 7, 97, 301, 80, 8, 128, dtype=torch.float16))
@example(case=Case(2, 1, 3, 61, 200, 192, 16, 64, layout="tokens first", dtype=torch.float16))
@example(case=Case(1, 1, 8, 600, 600, 32, 8, 128, tma=False))
@example(case=Case(1, 1, 1, 60, 60, 32, 64, 64))  # not one full group
@example(case=Case(1, 1, 8, 100, 164, 32, 4, 128, tiles=TILES[2]))  # tiles of half a query block
@example(case=Case(2, 1, 3, 61, 200, 192, 16, 64, pattern="rows", tiles=TILES[1], layout="tokens first"))
@example(case=Case(1, 1, 1, 60, 60, 32, 64, 64, pattern="rows", tiles=TILES[1]))
@example(case=Case(1, 2, 1, 130, 130, 33, 16, 128, pattern="rows", tiles=TILES[1], dtype=torch.float16))
def test_scores_equal_the_truth(case: Case) -> None:
    query, key = inputs(case)
    with launched_as(case):
        lse = scoring.block_lse(query, key, **case.options)
        scores = average_lse(lse, case.geometry, case.stride)
    assert_lse(lse, query, key, case)
    assert_scores(scores, query, key, case)


# Lengths around the edges of groups, blocks and tiles (64 groups), offsets that are multiples of nothing.
FIXED_LENGTHS = [
    (1, 1),
    (5, 5),
    (64, 64),
    (256, 256),
    (257, 257),
    (255, 511),
    (90, 167),
    (130, 263),
    (300, 520),
    (1, 513),
    (9, 256),
]


@pytest.mark.parametrize("pattern", ["antidiagonal", "rows"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("stride,block_size", [(4, 128), (8, 64), (16, 128), (64, 64)])
@pytest.mark.parametrize("q_len,k_len", FIXED_LENGTHS)
def test_scores_at_the_edges_of_groups_blocks_and_tiles(
    q_len: int, k_len: int, stride: int, block_size: int, causal: bool, pattern: str
) -> None:
    tiles = TILES[1] if pattern == "rows" else TILES[0]
    shape = (1, 1, 2, q_len, k_len, 64, stride, block_size, causal)
    case = Case(*shape, layout="amid NaN", seed=q_len, pattern=pattern, tiles=tiles)
    query, key = inputs(case)
    with launched_as(case):
        scores = scoring.estimate_blocks(query, key, **case.options)
    assert_scores(scores, query, key, case)


def test_blocks_far_below_the_peak_count_as_nothing() -> None:
    """Logits 5,000 apart: no NaN, no infinity, and the scores of the truth."""
    case = Case(1, 1, 1, 300, 300, 64, 8, 64, scale=1.0, magnitude=30.0)
    query, key = inputs(case)
    with launched_as(case):
        lse = scoring.block_lse(query, key, **case.options)
        scores = average_lse(lse, case.geometry, case.stride)
    assert not lse[..., readable(case)].isnan().any()
    assert_scores(scores, query, key, case)


@pytest.mark.parametrize("precision", ["native", "fp8"])
def test_key_heads_one_at_a_time(precision: str) -> None:
    case = Case(2, 3, 2, 70, 90, 32, 8, 64)
    query, key = inputs(case)
    with launched_as(case):
        whole = scoring.block_lse(query, key, precision=precision, **case.options)
        parts = [
            scoring.block_lse(query, key, precision=precision, k_heads=slice(head, head + 1), **case.options)
            for head in range(3)
        ]
    may_read = readable(case)
    assert torch.equal(torch.cat(parts, 1)[..., may_read], whole[..., may_read])


def test_a_chunk_of_heads_fits_the_limit() -> None:
    # 128k tokens, 32 query and 8 key heads, S = 16, B = 128
    heads, groups, blocks = (32, 8), 131_072 // 16, 131_072 // 128
    assert scoring.scoring_chunk(*heads, groups, blocks, 1 << 30) == 8
    assert scoring.scoring_chunk(*heads, groups, blocks, (1 << 30) - 1) == 7
    assert scoring.scoring_chunk(*heads, groups, blocks, 1) == 1
    assert scoring.scoring_chunk(*heads, 1, 1, 1 << 30) == 8


# --- fp8 ------------------------------------------------------------------------------------------------------------


def peaks(tokens: torch.Tensor, stride: int) -> torch.Tensor:
    """Largest magnitude of each group of tokens, fp32 ``(batch, heads, groups)``."""
    padded = functional.pad(tokens.float().abs(), (0, 0, 0, -tokens.shape[2] % stride))
    return padded.unflatten(2, (-1, stride)).amax((3, 4))


def of_tokens(per_group: torch.Tensor, tokens: torch.Tensor, stride: int) -> torch.Tensor:
    """A group's number for each of its tokens, to be broadcast over their features."""
    return per_group.repeat_interleave(stride, 2)[:, :, : tokens.shape[2], None]


def on_the_grid(tokens: torch.Tensor, stride: int, exponents: tuple[int, ...]) -> torch.Tensor:
    """Numbers that e4m3 holds once their group is scaled: nothing is left to rounding, which the interpreter gets wrong.

    The groups' scales are two to the power of the exponents, in turn.
    """
    peak = peaks(tokens, stride)
    scaled = tokens * of_tokens(448 / peak, tokens, stride)
    rounded = scaled.to(torch.float8_e4m3fn).float()
    rounded = torch.where(rounded.abs() < 2.0**-6, 0.0, rounded)
    turns = torch.arange(peak.shape[2], device=DEVICE) % len(exponents)
    scales = 2.0 ** torch.tensor(exponents, device=DEVICE)[turns]
    return (rounded * of_tokens(scales.expand_as(peak), tokens, stride)).to(tokens.dtype)


@settings(max_examples=40, **REPRODUCIBLE)
@given(case=cases(), exponents=st.sampled_from([(-9,), (-9, -7), (-8, -10, -7)]))
def test_fp8_scores_are_those_of_the_scaled_tokens(case: Case, exponents: tuple[int, ...]) -> None:
    case = replace(case, magnitude=1.0)
    strides = (case.stride, key_stride(case))
    query, key = (on_the_grid(tokens, size, exponents) for tokens, size in zip(inputs(case), strides, strict=True))
    for tokens, size in zip((query, key), strides, strict=True):
        with poisoned():
            copy, scales = quantise.quantise_groups(tokens, size)
        assert torch.equal(scales, peaks(tokens, size) / 448)
        assert torch.equal(copy.float() * of_tokens(scales, tokens, size), tokens.float())
    with launched_as(case):
        lse = scoring.block_lse(query, key, precision="fp8", **case.options)
    assert_lse(lse, query, key, case)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter's rounding to e4m3 loses carries")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fp8_copies_hold_the_nearest_numbers(dtype: torch.dtype) -> None:
    tokens = torch.randn(2, 3, 300, 80, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    copy, scales = quantise.quantise_groups(tokens, 8)
    torch.testing.assert_close(scales, peaks(tokens, 8) / 448, rtol=2 * EPS, atol=0)
    scales = of_tokens(scales, tokens, 8)
    error = (copy.float() * scales - tokens.float()).abs()
    # three bits of mantissa, or the step of the smallest numbers
    step = torch.maximum(tokens.float().abs() / 16, scales * 2.0**-10)
    assert bool((error <= step * (1 + 4 * EPS)).all())


def test_fp8_of_zeros_is_zero() -> None:
    tokens = torch.zeros(1, 2, 40, 33, device=DEVICE)
    tokens[:, :, 8:16] = 448.0
    with poisoned():
        copy, scales = quantise.quantise_groups(tokens, 8)
    assert torch.equal(copy.float(), tokens)
    assert torch.equal(scales, torch.ones(1, 2, 5, device=DEVICE))


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "family", lambda _: "sm80")
    query = torch.zeros(1, 1, 64, 32, device=DEVICE)
    options = Case(1, 1, 1, 64, 64, 32, 8, 64).options
    with pytest.raises(ValueError, match=r"precision is 'fp8', which needs .* 9\.0 or more, this one is sm80"):
        scoring.block_lse(query, query, precision="fp8", **options)


# --- as the tables of a real GPU launch it ---------------------------------------------------------------------------

LARGE_CASES = [
    Case(1, 2, 4, 16 * 128, 16 * 128, 128, 16, 128),
    Case(2, 2, 3, 16 * 555, 16 * 777, 128, 16, 128, seed=1),
    Case(1, 1, 1, 8 * 2345, 8 * 2500, 128, 8, 64, causal=False, layout="tokens first", seed=2),
    Case(1, 2, 2, 8 * 700, 8 * 701, 256, 8, 128, pattern="diagonal", layout="amid NaN", seed=3),
    Case(1, 4, 8, 4 * 1300, 4 * 1300, 128, 4, 128, seed=4),
    Case(1, 2, 4, 2100, 4321, 128, 16, 128, pattern="rows", seed=5),
    Case(1, 1, 3, 4096, 4096, 64, 16, 64, pattern="rows", layout="tokens first", seed=6),
]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU that has fp8"
)
@pytest.mark.parametrize("precision", ["native", "fp8"])
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_scores_in_both_precisions(case: Case, precision: str) -> None:
    case = replace(case, dtype=torch.bfloat16)
    query, key = inputs(case)
    if precision == "fp8":
        strides = (case.stride, key_stride(case))
        tokens = zip((query, key), strides, strict=True)
        query, key = (in_layout(on_the_grid(t, size, (-8, -7)), case.layout) for t, size in tokens)
    with poisoned():
        lse = scoring.block_lse(query, key, precision=precision, **case.options)
    truth = plain_lse(query, key, case, torch.float64)
    may_read = readable(case)
    assert torch.equal((lse > -torch.inf)[..., may_read], (truth > -torch.inf)[..., may_read])
    # the tensor cores keep 13 bits of a sum of e4m3 products
    tolerance = 2e-2 if precision == "fp8" else 1e-3
    torch.testing.assert_close(lse[..., may_read].double(), truth[..., may_read], atol=tolerance, rtol=0)
