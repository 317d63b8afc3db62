"""The attention mass that thresholds leave out, against a softmax of the whole matrix."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xcalib.kernels import estimate_blocks, select_blocks
from xcalib.kernels.arguments import Order
from xcalib.kernels.mass import dropped_mass

GRID = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0], dtype=torch.float64)


def naive(
    query: torch.Tensor, key: torch.Tensor, stride: int, block_size: int, scale: float, order: Order
) -> torch.Tensor:
    """fp64 ``(q_heads, levels)``, from the masks of each threshold and the whole matrix of probabilities."""
    q_len, k_len = query.shape[2], key.shape[2]
    logits = (query.double() * scale) @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    hidden = torch.arange(k_len) > torch.arange(k_len - q_len, k_len)[:, None]
    probability = logits.masked_fill(hidden, -torch.inf).softmax(-1)  # (B, Hq, q_len, k_len)
    scores = estimate_blocks(query, key, stride=stride, block_size=block_size, scale=scale)
    left_out = []
    for tau in GRID.tolist():
        mask = select_blocks(scores, tau, q_len=q_len, k_len=k_len, block_size=block_size, order=order)
        kept = mask.repeat_interleave(block_size, -2)[..., :q_len, :].repeat_interleave(block_size, -1)[..., :k_len]
        left_out.append(probability.masked_fill(kept, 0.0).sum(dim=(0, 2, 3)))
    return torch.stack(left_out, -1)


@settings(max_examples=40, deadline=None)
@given(
    q_len=st.integers(1, 500),
    more=st.integers(0, 300),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)]),
    batch=st.integers(1, 2),
    stride=st.sampled_from([4, 16, 64]),
    block_size=st.sampled_from([64, 128]),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    order=st.sampled_from(["score", "recent"]),
)
def test_mass_equals_a_whole_softmax(
    q_len: int, more: int, heads: tuple[int, int], batch: int, stride: int, block_size: int, spread: float, order: Order
) -> None:
    generator = torch.Generator().manual_seed(q_len)
    query = spread * torch.randn(batch, heads[0], q_len, 32, generator=generator)
    key = torch.randn(batch, heads[1], q_len + more, 32, generator=generator)
    found = dropped_mass(query, key, GRID, stride=stride, block_size=block_size, scale=0.2, order=order)
    assert (found.shape, found.dtype) == ((heads[0], len(GRID)), torch.float64)
    torch.testing.assert_close(
        found, naive(query, key, stride, block_size, 0.2, order), rtol=1e-4, atol=1e-6 * batch * q_len
    )
    assert bool((found[:, -1] == 0).all())
    assert bool((found.diff(dim=-1) <= 0).all())
    assert bool((found >= 0).all()) and bool((found <= batch * q_len).all())


def test_default_scale() -> None:
    query, key = (torch.randn(1, 2, 300, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.testing.assert_close(
        dropped_mass(query, key, GRID, block_size=64), dropped_mass(query, key, GRID, block_size=64, scale=32**-0.5)
    )
    other = dropped_mass(query, key, GRID, block_size=64, pattern="diagonal")
    assert bool((other != dropped_mass(query, key, GRID, block_size=64)).any())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grid": torch.tensor([0.0, 0.5])}, "grid is"),
        ({"stride": 5}, "stride is 5, allowed are"),
        ({"block_size": 96}, "block_size is 96, allowed are"),
        ({"pattern": "zigzag"}, "pattern is 'zigzag'"),
        ({"order": "newest"}, "order is 'newest'"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"key": torch.zeros(1, 3, 100, 32)}, "expected key heads that divide the query heads"),
        ({"key": torch.zeros(1, 2, 90, 32)}, "expected q_len <= k_len"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_are_checked(change: dict[str, Any], said: str) -> None:
    arguments = {"query": torch.zeros(1, 4, 100, 32), "key": torch.zeros(1, 2, 100, 32), "grid": GRID, **change}
    with pytest.raises(ValueError, match=said):
        dropped_mass(**arguments)
