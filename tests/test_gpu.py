"""The kernels on a real GPU: bf16 at real sizes, against fp32 arithmetic row block by row block; skipped without one."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from xcalib.kernels import (
    block_sparse_attention,
    estimate_blocks,
    reference,
    select_blocks,
    sweep_thresholds,
    xattention,
)
from xcalib.kernels.api import attend
from xcalib.kernels.geometry import Geometry

pytest.importorskip("triton")
from xcalib.kernels import attention, attention_hopper, selection  # need Triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the interpreter's tests stand in"),
]

SIZES = [
    # (batch, q_heads, k_heads, q_len, k_len, head_dim, block_size)
    (1, 32, 8, 8192, 8192, 128, 128),
    (1, 8, 2, 32768, 32768, 128, 128),
    (1, 4, 1, 131072, 131072, 128, 128),
    (2, 9, 3, 2000, 2000, 64, 64),
    (1, 7, 1, 1000, 5003, 80, 128),
    (1, 8, 8, 3001, 3001, 192, 64),
    (2, 6, 2, 2049, 4111, 256, 128),
    (1, 4, 2, 1, 3000, 128, 128),
    (3, 4, 4, 130, 130, 96, 64),
]
IDS = ["x".join(map(str, size)) for size in SIZES]


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs with attention structure: a sink, a local band and a few columns that every query looks at."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    block_size: int

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.query.shape[2], self.key.shape[2], self.block_size, causal=True)

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)


def make(size: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Case:
    batch, q_heads, k_heads, q_len, k_len, head_dim, block_size = size
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32)

    def tokens_first(heads: int, length: int) -> torch.Tensor:
        """The layout that transformers gives: (B, L, H, D) seen as (B, H, L, D)."""
        return normal(batch, length, heads, head_dim).transpose(1, 2)

    query, key, value = tokens_first(q_heads, q_len), tokens_first(k_heads, k_len), tokens_first(k_heads, k_len)
    direction = torch.nn.functional.normalize(normal(head_dim), dim=0) * math.sqrt(head_dim)
    query += 0.7 * direction
    key[:, :, :4] += 2.0 * direction
    key[:, :, torch.randperm(k_len, generator=generator, device="cuda")[: max(1, k_len // 500)]] += 1.5 * direction
    return Case(query.to(dtype), key.to(dtype), value.to(dtype), block_size)


def rows_to_check(case: Case) -> list[int]:
    """Query blocks: the first, the last, and some between."""
    count = case.geometry.q_blocks
    return sorted({0, count - 1, count // 2, count // 3, min(1, count - 1)})


def row_truth(case: Case, mask: torch.Tensor, row: int) -> torch.Tensor:
    """fp32 attention of one query block over its kept blocks: (B, Hq, rows, D)."""
    start, stop = case.geometry.query_span(row)
    query = case.query[:, :, start:stop].float()
    group = query.shape[1] // case.key.shape[1]
    key, value = (each.float().repeat_interleave(group, dim=1) for each in (case.key, case.value))
    columns = torch.arange(case.geometry.k_len, device="cuda")
    kept = mask[:, :, row].repeat_interleave(case.block_size, dim=-1)[..., : case.geometry.k_len]
    positions = case.geometry.offset + torch.arange(start, stop, device="cuda")
    visible = kept[:, :, None] & (columns <= positions[:, None])
    logits = ((query * case.scale) @ key.mT).masked_fill(~visible, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ value


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    assert bool(found.isfinite().all())
    return float((found.float() - truth).norm() / truth.norm())


@pytest.mark.parametrize("order", ["score", "recent"])
@pytest.mark.parametrize("size", SIZES, ids=IDS)
def test_scores_and_selection(size: tuple[int, ...], order: Any) -> None:
    case = make(size)
    _, q_heads, _, q_len, k_len, _, block_size = size
    if q_len > 40000:
        case = dataclasses.replace(case, query=case.query[:, :, -4096:])
    settings: dict[str, Any] = {"stride": 16, "block_size": block_size}
    scores = estimate_blocks(case.query, case.key, **settings, backend="triton")
    wide = {name: each.float() for name, each in (("query", case.query), ("key", case.key))}
    torch.backends.cuda.matmul.allow_tf32 = False
    truth = estimate_blocks(wide["query"], wide["key"], **settings, backend="reference")
    assert relative(scores, truth) < 1e-4
    lengths: dict[str, Any] = {"q_len": case.query.shape[2], "k_len": k_len, "block_size": block_size}
    taus = torch.linspace(0.0, 1.0, q_heads)
    ours = select_blocks(scores, taus, **lengths, order=order, backend="triton")
    assert torch.equal(ours, select_blocks(scores, taus, **lengths, order=order, backend="reference"))
    fused = attend(case.query, case.key, case.key, taus.cuda(), **settings, order=order, backend="triton")[1]
    assert torch.equal(fused, ours.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("size", SIZES, ids=IDS)
@pytest.mark.parametrize("tau", [0.0, 0.8, 1.0])
def test_attention_by_row_blocks(size: tuple[int, ...], tau: float) -> None:
    case = make(size, seed=1)
    lengths: dict[str, Any] = {"q_len": size[3], "k_len": size[4], "block_size": case.block_size}
    scores = estimate_blocks(case.query, case.key, block_size=case.block_size, backend="triton")
    mask = select_blocks(scores, tau, **lengths, backend="triton")
    output = block_sparse_attention(
        case.query, case.key, case.value, mask, block_size=case.block_size, backend="triton"
    )
    again = xattention(case.query, case.key, case.value, tau, block_size=case.block_size, backend="triton")
    assert torch.equal(output, again), "two runs of the same input differ"
    for row in rows_to_check(case):
        start, stop = case.geometry.query_span(row)
        assert relative(output[:, :, start:stop], row_truth(case, mask, row)) < 1e-2


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is poisoned: what a kernel leaves unwritten would come out as NaN or as a wild block index."""
    case = make((2, 8, 2, 3001, 4001, 128, 128), seed=2)
    truth = xattention(case.query, case.key, case.value, 0.7, backend="triton")
    junk = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(16)]
    del junk  # the caching allocator hands this memory out again
    again = xattention(case.query, case.key, case.value, 0.7, backend="triton")
    assert torch.equal(truth, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("size", "order"),
    [(SIZES[3], "score"), (SIZES[4], "recent"), ((1, 8, 2, 4096, 4096, 128, 128), "recent")],
    ids=str,
)
def test_sweep(size: tuple[int, ...], order: str, dtype: torch.dtype) -> None:
    case = make(size, dtype, seed=3)
    q_heads, head_dim = size[1], size[5]
    grid = torch.tensor([0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
    projection = torch.randn(q_heads, head_dim, head_dim, device="cuda")
    settings: dict[str, Any] = {"stride": 16, "block_size": case.block_size, "order": order}
    ours = sweep_thresholds(case.query, case.key, case.value, grid, projection, **settings, backend="triton")
    wide = [each.float() for each in (case.query, case.key, case.value)]
    torch.backends.cuda.matmul.allow_tf32 = False
    truth = sweep_thresholds(*wide, grid, projection, **settings, backend="reference")
    error = (ours.error - truth.error).abs() / truth.error[:, :1]
    assert float(error.max()) < (1e-4 if dtype == torch.float32 else 2e-2)
    assert torch.equal(ours.kept[:, -1], truth.kept[:, -1])
    assert float((ours.kept - truth.kept).abs().max()) <= (0 if dtype == torch.float32 else 4)
    again = sweep_thresholds(case.query, case.key, case.value, grid, projection, **settings, backend="triton")
    assert torch.equal(ours.error, again.error)


HOPPER_SIZES = [
    # (batch, q_heads, k_heads, q_len, k_len, head_dim, block_size)
    (1, 8, 2, 4096, 4096, 128, 128),
    (2, 6, 3, 1000, 1901, 128, 128),
    (1, 16, 1, 129, 7000, 64, 128),
    (3, 4, 4, 2500, 2500, 64, 128),
    (1, 2, 1, 1, 128, 128, 128),
    (1, 1, 1, 64, 64, 64, 128),
]


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="Hopper's own kernel"
)
@pytest.mark.parametrize("size", HOPPER_SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hopper_kernel(size: tuple[int, ...], causal: bool, dtype: torch.dtype) -> None:
    """Masks of all densities, rows without a block among them: as the plain kernel, which gives the log-sum-exp, computes."""
    case = make(size, dtype, seed=6)
    geometry = dataclasses.replace(case.geometry, causal=causal)
    assert attention_hopper.serves(case.query, case.key, case.value, geometry)
    generator = torch.Generator("cuda").manual_seed(7)
    shape = (*case.query.shape[:2], geometry.q_blocks, geometry.k_blocks)
    density = torch.rand(shape[:3], generator=generator, device="cuda").mul(1.4).sub(0.2)[..., None]
    mask = torch.rand(shape, generator=generator, device="cuda") < density
    lists = selection.lists_from_mask(mask, geometry)
    truth, _ = attention.block_sparse_attention_with_lse(case.query, case.key, case.value, lists, geometry, case.scale)
    junk = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(4)]
    del junk  # poisons what the caching allocator hands out next
    output = attention.block_sparse_attention(case.query, case.key, case.value, lists, geometry, case.scale)
    assert bool(output.isfinite().all())
    assert float((output.float() - truth.float()).norm()) <= 5e-3 * float(truth.float().norm())
    again = attention.block_sparse_attention(case.query, case.key, case.value, lists, geometry, case.scale)
    assert torch.equal(output, again)


def test_cuda_graph() -> None:
    case = make((1, 8, 2, 2048, 2048, 128, 128), seed=4)
    limits = torch.full((8,), 0.8, device="cuda")
    expected, _ = attend(case.query, case.key, case.value, limits, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = attend(case.query, case.key, case.value, limits, backend="triton")
    graph.replay()
    assert torch.equal(output, expected)


def test_reference_runs_on_the_gpu_too() -> None:
    case = make((1, 4, 2, 700, 900, 64, 64), torch.float32, seed=5)
    ours = xattention(case.query, case.key, case.value, 0.8, block_size=64, backend="triton")
    truth = xattention(case.query, case.key, case.value, 0.8, block_size=64, backend="reference")
    assert relative(ours, truth) < 1e-5
    assert reference.ONE == 2**52
