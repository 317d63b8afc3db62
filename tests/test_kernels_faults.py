"""The faults of the public implementation (field notes, section 2): each test here would have caught one of them."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xcalib.kernels import (
    SweepResult,
    block_density,
    block_sparse_attention,
    estimate_blocks,
    select_blocks,
    sweep_thresholds,
    visible_blocks,
    xattention,
)

torch.set_num_threads(1)

SOURCES = sorted((Path(__file__).parents[1] / "kernels").rglob("*.py"))


def lengths(*pairs: tuple[int, int]) -> list[Any]:
    """Query and key lengths as test parameters that print both."""
    return [pytest.param(q_len, k_len, id=f"q{q_len}-k{k_len}") for q_len, k_len in pairs]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def names_in(source: Path) -> Iterator[str]:
    """Every identifier and attribute that a module's code mentions (comments and docstrings excluded)."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


# 1. mask[..., -pad:] with pad = 0 masks everything, at 32k, 64k, 128k, 256k tokens.


@pytest.mark.parametrize("length", [32_768, 65_536, 131_072], ids=lambda n: f"q{n}-k{n}")
def test_fault_1_scores_survive_lengths_without_any_padding(length: int) -> None:
    query, key = draw(1, 1, length, 32, seed=1), draw(1, 1, length, 32, seed=2)
    scores = estimate_blocks(query, key, stride=64)
    visible = visible_blocks(length, length)
    torch.testing.assert_close(scores.sum(-1), torch.ones(1, 1, length // 128), rtol=0, atol=2e-5)
    assert bool((scores[0, 0][visible] > 0).all()), "every visible block holds some probability"
    mask = select_blocks(scores, 0.9, q_len=length, k_len=length)
    density = float(block_density(mask, q_len=length, k_len=length))
    assert 0.5 < density < 1, "random scores are nearly flat, so nine tenths of the mass are most of the blocks"


@pytest.mark.parametrize("q_len,k_len", lengths((4096, 4096), (128, 4096), (1024, 8192)))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_fault_1_attention_survives_lengths_without_any_padding(q_len: int, k_len: int, causal: bool) -> None:
    query, key, value = draw(1, 1, q_len, 32, seed=1), draw(1, 1, k_len, 32, seed=2), draw(1, 1, k_len, 32, seed=3)
    allowed = torch.ones(q_len, k_len, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(k_len - q_len)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    torch.testing.assert_close(xattention(query, key, value, 1.0, causal=causal), expected, rtol=1e-4, atol=1e-5)


# 2. The fast path hangs on "100" in the device's name; otherwise a fallback prints at each call.


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_fault_2_no_source_asks_for_a_device_name(source: Path) -> None:
    names = list(names_in(source))
    found = set(names) & {"get_device_name", "device_name"}
    assert not found, f"{source} uses {found}: a backend is chosen by what a device can do"
    # of a device's properties, only how many programs it runs at once
    assert names.count("get_device_properties") == names.count("multi_processor_count"), source


def test_fault_2_sources_are_found() -> None:
    assert {"__init__.py", "api.py", "geometry.py", "reference.py"} <= {source.name for source in SOURCES}


def test_fault_2_nothing_asks_for_a_device_name_while_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("the device's name was asked for")

    monkeypatch.setattr(torch.cuda, "get_device_name", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    query = draw(1, 2, 300, 32)
    assert bool(xattention(query, query, query, 0.8).isfinite().all())


# 3. q_len < k_len: the offset is counted in whole padded chunks, so recent keys cannot be selected.


@pytest.mark.parametrize("q_len,k_len", lengths((2048, 10_000), (1000, 4097), (777, 1801), (65, 1000)))
@pytest.mark.parametrize("block_size", [64, 128], ids=lambda n: f"B{n}")
def test_fault_3_every_row_sees_all_keys_up_to_its_own_position(q_len: int, k_len: int, block_size: int) -> None:
    visible = visible_blocks(q_len, k_len, block_size=block_size)
    for row in range(-(-q_len // block_size)):
        last_position = k_len - q_len + min((row + 1) * block_size, q_len) - 1
        assert int(visible[row].nonzero().max()) == last_position // block_size
        assert int(visible[row].sum()) == last_position // block_size + 1


@pytest.mark.parametrize("q_len,k_len", lengths((2048, 10_000), (1000, 4097), (777, 1801)))
def test_fault_3_recent_keys_can_be_selected(q_len: int, k_len: int) -> None:
    """All queries look for the block just before the first own one: every row must find it, and the next row's too."""
    target = (k_len - q_len) // 128 - 1
    query = torch.zeros(1, 1, q_len, 32)
    key = torch.zeros(1, 1, k_len, 32)
    query[..., 0], key[:, :, target * 128 : (target + 1) * 128, 0] = 10.0, 10.0
    scores = estimate_blocks(query, key)
    assert bool((scores[..., target] > 0.99).all())
    mask = select_blocks(scores, 0.9, q_len=q_len, k_len=k_len)
    assert bool(mask[..., target].all())
    value = torch.zeros(1, 1, k_len, 32)
    value[:, :, target * 128 : (target + 1) * 128] = 1.0
    output = xattention(query, key, value, 0.9)
    torch.testing.assert_close(output, torch.ones_like(output), rtol=0, atol=1e-3)


def test_fault_3_the_newest_keys_are_always_kept() -> None:
    """k = 10,000 and q = 2,048: with a threshold of 0 each query still attends to itself."""
    q_len, k_len = 2048, 10_000
    key = torch.zeros(1, 1, k_len, 32)
    scores = estimate_blocks(key[:, :, -q_len:], key)
    mask = select_blocks(scores, 0.0, q_len=q_len, k_len=k_len)
    for query in range(0, q_len, 7):
        assert bool(mask[0, 0, query // 128, (k_len - q_len + query) // 128])


# 4. Non-causal: padded keys are never masked and take probability mass.


@pytest.mark.parametrize(
    "k_len,stride,expected",
    [
        (130, 16, [8 / 9, 1 / 9]),  # the second block has one group, of two tokens
        (160, 16, [8 / 10, 2 / 10]),
        (257, 64, [2 / 5, 2 / 5, 1 / 5]),
        (300, 4, [32 / 75, 32 / 75, 11 / 75]),
        (5, 8, [1.0]),
    ],
    ids=["k130-S16", "k160-S16", "k257-S64", "k300-S4", "k5-S8"],
)
def test_fault_4_padded_keys_take_no_mass(k_len: int, stride: int, expected: list[float]) -> None:
    """Zero keys: every group of keys that exists weighs the same, and those that do not exist weigh nothing."""
    query = draw(1, 1, min(100, k_len), 32)
    scores = estimate_blocks(query, torch.zeros(1, 1, k_len, 32), stride=stride, causal=False)
    torch.testing.assert_close(scores[0, 0, 0], torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("k_len", [1, 63, 65, 130, 200], ids=lambda n: f"k{n}")
def test_fault_4_attention_is_an_average_of_keys_that_exist(k_len: int) -> None:
    query, value = draw(1, 1, 1, 32), draw(1, 1, k_len, 32, seed=1)
    output = xattention(query, torch.zeros(1, 1, k_len, 32), value, 1.0, block_size=64, causal=False)
    torch.testing.assert_close(output, value.mean(2, keepdim=True), rtol=1e-5, atol=1e-6)


# 5. keep_sink sets query row 0, not key column 0.


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("q_len,k_len", lengths((1024, 1024), (500, 1300)))
def test_fault_5_the_sink_is_key_column_0_of_every_row(q_len: int, k_len: int, causal: bool) -> None:
    scores = torch.zeros(1, 2, -(-q_len // 128), -(-k_len // 128))
    scores[..., 1] = 1.0  # nothing in the scores asks for column 0
    mask = select_blocks(scores, 0.0, q_len=q_len, k_len=k_len, causal=causal)
    assert bool(mask[..., 0].all()), "every row keeps key block 0"
    own = (k_len - q_len) // 128, (k_len - q_len + 127) // 128
    assert set(mask[0, 0, 0].nonzero().flatten().tolist()) == {0, *own}, "query row 0 is a row like any other"


# 6. Block sums in bf16 and an unstable sort: ties flip masks.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_fault_6_scores_of_half_precision_input_are_fp32(dtype: torch.dtype, causal: bool) -> None:
    query, key = draw(2, 6, 300, 80).to(dtype), draw(2, 2, 700, 80, seed=1).to(dtype)
    scores = estimate_blocks(query, key, causal=causal)
    upcast = estimate_blocks(query.float(), key.float(), causal=causal)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, upcast)
    options: dict[str, Any] = {"q_len": 300, "k_len": 700, "causal": causal}
    for threshold in (0.3, 0.5, 0.9):
        masks = [select_blocks(each, threshold, **options) for each in (scores, upcast)]
        assert torch.equal(*masks)


def test_fault_6_probabilities_below_bf16s_resolution_count() -> None:
    """Block 1 beats block 2 by 2**-12 of the mass, which bf16 cannot tell apart."""
    scores = torch.tensor([0.25, 0.25 + 2**-12, 0.25 - 2**-12, 0.25]).view(1, 1, 1, 4)
    swapped = scores[..., [0, 2, 1, 3]]
    options: dict[str, Any] = {"q_len": 128, "k_len": 512}
    assert select_blocks(scores, 0.75, **options).flatten().tolist() == [True, True, False, True]
    assert select_blocks(swapped, 0.75, **options).flatten().tolist() == [True, False, True, True]


def test_fault_6_many_equal_scores_keep_their_order_every_time() -> None:
    scores = torch.full((2, 3, 1, 1024), 1 / 1024)
    masks = [select_blocks(scores, 0.25, q_len=128, k_len=128 * 1024) for _ in range(3)]
    expected = [*range(255), 1023]
    for mask in masks:
        assert all(head.nonzero().flatten().tolist() == expected for head in mask.view(6, 1024))


# 7. Batch 1 only, equal heads only, block 128 only, power-of-two head_dim, density never computed.


@pytest.mark.parametrize("block_size", [64, 128], ids=lambda n: f"B{n}")
@pytest.mark.parametrize("head_dim", [40, 72, 80, 96, 192], ids=lambda n: f"d{n}")
@pytest.mark.parametrize("k_heads,q_heads", [(1, 7), (3, 9), (2, 16)], ids=["h7over1", "h9over3", "h16over2"])
def test_fault_7_batch_heads_block_and_width_are_free(
    k_heads: int, q_heads: int, head_dim: int, block_size: int
) -> None:
    query = draw(3, q_heads, 150, head_dim)
    key, value = draw(3, k_heads, 410, head_dim, seed=1), draw(3, k_heads, 410, head_dim, seed=2)
    options: dict[str, Any] = {"stride": 8, "block_size": block_size}
    together = xattention(query, key, value, 0.8, **options)
    group = q_heads // k_heads
    repeated = [tensor.repeat_interleave(group, 1) for tensor in (key, value)]
    for b in range(3):
        one = slice(b, b + 1)
        alone = xattention(query[one], repeated[0][one], repeated[1][one], 0.8, **options)
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)
    assert together.shape == query.shape


@pytest.mark.parametrize("q_len,k_len", lengths((1000, 1000), (300, 1111)))
@pytest.mark.parametrize("block_size", [64, 128], ids=lambda n: f"B{n}")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_fault_7_density_is_kept_over_visible_blocks(q_len: int, k_len: int, block_size: int, causal: bool) -> None:
    options: dict[str, Any] = {"q_len": q_len, "k_len": k_len, "block_size": block_size, "causal": causal}
    query, key = draw(2, 4, q_len, 32) * 3, draw(2, 2, k_len, 32, seed=1)
    scores = estimate_blocks(query, key, block_size=block_size, causal=causal)
    mask = select_blocks(scores, torch.tensor([0.0, 0.5, 0.9, 1.0]), **options)
    visible = 0
    for row in range(-(-q_len // block_size)):
        last = k_len - q_len + min((row + 1) * block_size, q_len) - 1 if causal else k_len - 1
        visible += last // block_size + 1
    density = block_density(mask, **options)
    assert density.shape == (2, 4)
    torch.testing.assert_close(density, mask.sum(dim=(-2, -1)).float() / visible)
    assert bool((density[:, 3] == 1).all())
    assert bool((density.diff(dim=1) >= 0).all())
    assert bool((density > 0).all())


def test_fault_7_density_ignores_what_causality_hides() -> None:
    everything = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    assert block_density(everything, q_len=1024, k_len=1024).tolist() == [[1.0]]
    hidden_only = everything.triu(1)
    assert block_density(hidden_only, q_len=1024, k_len=1024).tolist() == [[0.0]]


# 8. The profiler prints a method and saves nothing; its thresholds hang on outliers.


def test_fault_8_the_sweep_returns_its_table() -> None:
    query, key, value = draw(2, 6, 300, 40), draw(2, 3, 500, 40, seed=1), draw(2, 3, 500, 40, seed=2)
    grid = torch.linspace(0, 1, 25)
    result = sweep_thresholds(query, key, value, grid, draw(6, 40, 16, seed=3), block_size=64)
    assert isinstance(result, SweepResult)
    assert isinstance(result.error.tolist(), list), "numbers, not a method"
    assert result.error.shape == result.kept.shape == (6, 25)
    assert bool((result.error[:, 0] > 0).all())
    assert result.visible == 2 * int(visible_blocks(300, 500, block_size=64).sum())


def test_fault_8_no_public_function_prints(capfd: pytest.CaptureFixture[str]) -> None:
    query, key, value = draw(1, 2, 200, 32), draw(1, 1, 300, 32, seed=1), draw(1, 1, 300, 32, seed=2)
    scores = estimate_blocks(query, key)
    mask = select_blocks(scores, 0.5, q_len=200, k_len=300)
    block_density(mask, q_len=200, k_len=300)
    block_sparse_attention(query, key, value, mask)
    xattention(query, key, value, 0.5)
    sweep_thresholds(query, key, value, torch.tensor([0.0, 0.5, 1.0]), draw(2, 32, 8))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_fault_8_no_source_prints(source: Path) -> None:
    assert "print" not in set(names_in(source))


def test_fault_8_an_outlier_in_one_row_leaves_the_other_rows_alone() -> None:
    """Selection is row by row: no minimum or maximum over rows, heads or sequences steers it."""
    query, key = draw(2, 2, 512, 32), draw(2, 2, 512, 32, seed=1)
    options: dict[str, Any] = {"q_len": 512, "k_len": 512, "block_size": 64}
    before = select_blocks(estimate_blocks(query, key, block_size=64), 0.6, **options)
    query[0, 0, 448:] *= 1000
    after = select_blocks(estimate_blocks(query, key, block_size=64), 0.6, **options)
    assert not torch.equal(before[0, 0, 7], after[0, 0, 7]), "the outlier is meant to change its own row"
    before[0, 0, 7] = after[0, 0, 7]
    assert torch.equal(before, after)
