"""The kernels against the truth, on this machine: a verdict on each, with its largest error and what it may be."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch.nn import functional

from xcalib._yaml import one_line
from xcalib.choices import Order, Pattern
from xcalib.doctor.truth import Case, attention_truth, scores_truth, selection_truth, sweep_truth
from xcalib.kernels import block_sparse_attention, estimate_blocks, select_blocks, sweep_thresholds, xattention
from xcalib.kernels.arguments import Backend
from xcalib.kernels.tuning import interpreted

__all__ = ["Check", "Target", "check_kernels", "targets"]

TAU = 0.8
GRID = (0.0, 0.5, 0.8, 0.95, 1.0)
# Odd lengths, several query heads to a key head, and more keys than queries.
SMALL = (Case(333, 333, 4, 2, 64, 64, 8), Case(150, 407, 6, 2, 80, 64, 16))
TINY = (Case(70, 333, 4, 2, 32, 64, 16),)  # for Triton's interpreter, which takes its time
# As models have them, so that the kernels of Hopper GPUs take their part.
LARGE = (Case(1000, 1111, 8, 2, 128, 128, 16),)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key, value
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Target:
    """One way in which kernels are called: backend, device and dtype."""

    backend: Backend
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Check:
    """What came of one check.

    Attributes:
        name: what was checked.
        error: largest error over its cases, NaN where it broke off.
        bound: what the error may be.
        seconds: it took.
        problem: why it failed, None where it passed.
    """

    name: str
    error: float
    bound: float
    seconds: float
    problem: str | None


def targets() -> list[Target]:
    """Everything that can be called here: the reference, and Triton on the first GPU or in its interpreter."""
    found = [Target("reference", "cpu", torch.float32)]
    if torch.cuda.is_available():
        found += [Target("triton", "cuda", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    elif interpreted():
        found += [Target("triton", "cpu", dtype) for dtype in (torch.float32, torch.float16)]
    return found


def check_kernels(target: Target) -> Iterator[Check]:
    """Run all checks of one target; a kernel that raises fails its check, and the others go on."""
    cases = SMALL + LARGE if target.device == "cuda" else TINY if target.backend == "triton" else SMALL
    for name, check in CHECKS.items():
        began, worst, bound, problem = time.monotonic(), 0.0, 0.0, None
        for case in cases:
            try:
                with torch.no_grad():
                    error, allowed = check(target, case)
            except Exception as failure:  # a compiler or a driver raises anything
                worst, problem = float("nan"), one_line(f"{case}: {type(failure).__name__}: {failure}", 200)
                break
            if bound == 0.0 or error * bound > worst * allowed:  # the case nearest to its bound
                worst, bound = error, allowed
            if not error <= allowed:  # NaN fails too
                worst, bound = error, allowed
                problem = f"{case}: the error is {error:.2g}, at most {allowed:.2g} is expected"
                break
        yield Check(name, worst, bound, time.monotonic() - began, problem)


def _inputs(target: Target, case: Case) -> Tensors:
    """Query, key and value on the CPU, rounded to the target's dtype; the same every time."""
    generator = torch.Generator().manual_seed(case.k_len)
    shapes = ((case.q_heads, case.q_len), (case.k_heads, case.k_len), (case.k_heads, case.k_len))
    drawn = [torch.randn(1, *shape, case.head_dim, generator=generator) for shape in shapes]
    drawn[0] *= 2  # attention far from uniform
    query, key, value = (tensor.to(target.dtype) for tensor in drawn)
    return query, key, value


def _there(target: Target, tensors: Tensors) -> Tensors:
    query, key, value = (tensor.to(target.device) for tensor in tensors)
    return query, key, value


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())


def _check_scores(pattern: Pattern) -> Callable[[Target, Case], tuple[float, float]]:
    def check(target: Target, case: Case) -> tuple[float, float]:
        query, key, _ = _inputs(target, case)
        found = estimate_blocks(
            query.to(target.device), key.to(target.device), stride=case.stride, block_size=case.block_size,
            pattern=pattern, backend=target.backend,
        )  # fmt: skip
        truth = scores_truth(case, pattern, query, key)
        plain = scores_truth(case, pattern, query, key, torch.float32)
        largest = _largest(query.float()) * _largest(key.float()) * case.head_dim**0.5  # of a logit, at most
        return _largest(found.cpu().double() - truth), 2 * _largest(plain.double() - truth) + EPS * (1 + largest)

    return check


def _check_selection(target: Target, case: Case) -> tuple[float, float]:
    """Blocks that differ: none may."""
    query, key, _ = _inputs(target, case)
    scores = scores_truth(case, "rows", query, key).float()
    wrong = 0
    for order in get_args(Order):
        for tau in (0.0, TAU, 1.0):
            found = select_blocks(
                scores.to(target.device), tau, q_len=case.q_len, k_len=case.k_len, block_size=case.block_size,
                order=order, backend=target.backend,
            )  # fmt: skip
            wrong += int((found.cpu() != selection_truth(case, scores, tau, order)).sum())
    return float(wrong), 0.5


def _attention_bound(case: Case, tensors: Tensors, mask: torch.Tensor, truth: torch.Tensor) -> float:
    """Three times the error of torch's own attention in the same dtype, and some last digits of the largest value."""
    tokens = mask.repeat_interleave(case.block_size, -2).repeat_interleave(case.block_size, -1)
    seen = tokens[..., : case.q_len, : case.k_len] & case.causal
    query, key, value = tensors
    plain = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    digits = 2 * torch.finfo(value.dtype).eps + 32 * EPS
    return 3 * _largest(plain.double() - truth) + digits * _largest(value.float())


def _check_attention(target: Target, case: Case) -> tuple[float, float]:
    query, key, value = tensors = _inputs(target, case)
    mask = selection_truth(case, scores_truth(case, "rows", query, key).float(), TAU, "score")
    found = block_sparse_attention(
        *_there(target, tensors), mask.to(target.device), block_size=case.block_size, backend=target.backend
    )
    truth = attention_truth(case, query, key, value, mask)
    return _largest(found.cpu().double() - truth), _attention_bound(case, tensors, mask, truth)


def _check_together(pattern: Pattern, tau: float) -> Callable[[Target, Case], tuple[float, float]]:
    def check(target: Target, case: Case) -> tuple[float, float]:
        query, key, value = tensors = _inputs(target, case)
        found = xattention(
            *_there(target, tensors), tau, stride=case.stride, block_size=case.block_size,
            pattern=pattern, order="recent", backend=target.backend,
        )  # fmt: skip
        mask = selection_truth(case, scores_truth(case, pattern, query, key), tau, "recent")
        truth = attention_truth(case, query, key, value, mask)
        return _largest(found.cpu().double() - truth), _attention_bound(case, tensors, mask, truth)

    return check


def _check_sweep(target: Target, case: Case) -> tuple[float, float]:
    """Relative error of the errors; infinite where a count of blocks is not exact."""
    query, key, _ = tensors = _inputs(target, case)
    projection = torch.randn(case.q_heads, case.head_dim, 16, generator=torch.Generator().manual_seed(1))
    found = sweep_thresholds(
        *_there(target, tensors), torch.tensor(GRID), projection.to(target.device),
        stride=case.stride, block_size=case.block_size, pattern="rows", order="recent", backend=target.backend,
    )  # fmt: skip
    allowed = max(1e-4, 4 * torch.finfo(target.dtype).eps)  # projected values are rounded to the dtype
    scores = scores_truth(case, "rows", query, key)
    masks = [selection_truth(case, scores, tau, "recent") for tau in GRID]
    if not torch.equal(found.kept.cpu(), torch.stack([mask.sum((0, 2, 3)) for mask in masks], -1)):
        return float("inf"), allowed
    truth = sweep_truth(case, tensors, projection, masks)
    return _largest((found.error.cpu() - truth) / truth[:, :1]), allowed


CHECKS: dict[str, Callable[[Target, Case], tuple[float, float]]] = {
    "scores, rows": _check_scores("rows"),
    "scores, antidiagonal": _check_scores("antidiagonal"),
    "selection": _check_selection,
    "sparse attention": _check_attention,
    "all together, rows": _check_together("rows", TAU),
    "all together, antidiagonal": _check_together("antidiagonal", TAU),
    "tau 1 is dense attention": _check_together("rows", 1.0),
    "sweep": _check_sweep,
}
