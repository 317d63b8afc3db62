"""Packed sequences: each is what it is alone, on both backends; bad borders are one clear error."""

from typing import Any

import pytest
import torch

from xcalib.kernels import xattention, xattention_varlen

LENGTHS = [((70, 70), (1, 200), (133, 133), (64, 257)), ((300, 300),), ((1, 1), (1, 64), (65, 65))]


def packed(lengths: tuple[tuple[int, int], ...], heads: int, k_heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(len(lengths))
    total_q, total_k = (sum(pair[side] for pair in lengths) for side in (0, 1))
    shapes = ((total_q, heads, dim), (total_k, k_heads, dim), (total_k, k_heads, dim))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    borders = [torch.tensor([0, *(pair[side] for pair in lengths)]).cumsum(0).int() for side in (0, 1)]
    return (*tensors, *borders)


@pytest.mark.parametrize("order", ["score", "recent"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_sequence_is_what_it_is_alone(lengths: tuple[tuple[int, int], ...], backend: Any, order: Any) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    query, key, value, cu_q, cu_k = packed(lengths, 6, 2, 40)
    taus = torch.linspace(0.0, 0.9, 6)
    output = xattention_varlen(query, key, value, taus, cu_q, cu_k, block_size=64, order=order, backend=backend)
    assert output.shape == query.shape
    for index in range(len(lengths)):
        rows, columns = slice(cu_q[index], cu_q[index + 1]), slice(cu_k[index], cu_k[index + 1])
        alone = xattention(
            *(each.transpose(0, 1)[None] for each in (query[rows], key[columns], value[columns])),
            taus,
            block_size=64,
            order=order,
            backend="reference",
        )
        torch.testing.assert_close(output[rows], alone[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "message"),
    [
        ([0, 10], [0, 5, 10], "cu_seqlens_q is of 1 sequences and cu_seqlens_k of 2, expected as many in both"),
        ([0, 5], [0, 10], r"cu_seqlens_q is \[0, 5\], expected ascending integers from 0 to 10"),
        ([0, 5, 5, 10], [0, 4, 5, 10], r"cu_seqlens_q is \[0, 5, 5, 10\], expected ascending"),
        ([1, 10], [0, 10], r"cu_seqlens_q is \[1, 10\], expected ascending integers from 0"),
        ([0, 6, 10], [0, 5, 10], "q_len is 6 and k_len 5, expected q_len <= k_len"),
        ([0.0, 10.0], [0, 10], r"cu_seqlens_q is \[0.0, 10.0\], expected ascending integers"),
    ],
    ids=["count", "short", "empty", "start", "more-queries", "floats"],
)
def test_bad_borders(cu_q: list[float], cu_k: list[float], message: str) -> None:
    query = torch.randn(10, 2, 32)
    with pytest.raises(ValueError, match=message):
        xattention_varlen(query, query, query, 0.5, torch.tensor(cu_q), torch.tensor(cu_k))


def test_packed_tensors_have_three_dimensions() -> None:
    query, borders = torch.randn(1, 2, 10, 32), torch.tensor([0, 10])
    with pytest.raises(ValueError, match=r"query has 4 dimensions, expected \(tokens, heads, head_dim\)"):
        xattention_varlen(query, query, query, 0.5, borders, borders)
