"""Bad arguments are refused by name, value and rule; memory stays linear in the length; the folder is not `kernels`."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from xcalib import kernels

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]

# --- bad arguments --------------------------------------------------------------------------------------------------

BATCH, Q_HEADS, K_HEADS, Q_LEN, K_LEN, HEAD_DIM = 2, 6, 3, 100, 200, 40
BLOCKS = (1, 2)  # of 128


def tensor(
    heads: int = K_HEADS,
    length: int = K_LEN,
    *,
    batch: int = BATCH,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> torch.Tensor:
    return torch.ones(batch, heads, length, head_dim, dtype=dtype, device=device)


def query(**changes: Any) -> torch.Tensor:
    return tensor(changes.pop("heads", Q_HEADS), changes.pop("length", Q_LEN), **changes)


def good_arguments(function: str) -> dict[str, Any]:
    """Arguments that a function accepts, all by keyword."""
    attention = {"query": query(), "key": tensor(), "value": tensor()}
    lengths = {"q_len": Q_LEN, "k_len": K_LEN}
    table: dict[str, dict[str, Any]] = {
        "estimate_blocks": {"query": query(), "key": tensor()},
        "select_blocks": {"scores": torch.full((BATCH, Q_HEADS, *BLOCKS), 0.5), "threshold": 0.5, **lengths},
        "block_sparse_attention": {**attention, "mask": torch.ones(BATCH, Q_HEADS, *BLOCKS, dtype=torch.bool)},
        "xattention": {**attention, "threshold": 0.5},
        "sweep_thresholds": {
            **attention,
            "grid": torch.tensor([0.0, 0.5, 1.0]),
            "projection": torch.ones(Q_HEADS, HEAD_DIM, 8),
        },
        "visible_blocks": dict(lengths),
        "block_density": {"mask": torch.ones(BATCH, Q_HEADS, *BLOCKS, dtype=torch.bool), **lengths},
    }
    return table[function]


ATTENTION = ("estimate_blocks", "block_sparse_attention", "xattention", "sweep_thresholds")
WITH_VALUE = ATTENTION[1:]
SCORING = ("estimate_blocks", "xattention", "sweep_thresholds")
SELECTING = ("select_blocks", "xattention")
BACKENDS = (*ATTENTION, "select_blocks")
GEOMETRY = ("visible_blocks", "block_density")

# functions, what is wrong (the test's id), changed arguments, what the message must hold: the name, the value, the rule
BAD: list[tuple[tuple[str, ...], str, dict[str, Any], list[str]]] = [
    (ATTENTION, "query-3-dimensions", {"query": query()[0]}, ["query", "3", "(batch, heads, seq, head_dim)"]),
    (ATTENTION, "key-5-dimensions", {"key": tensor()[None]}, ["key", "5", "(batch, heads, seq, head_dim)"]),
    (WITH_VALUE, "value-2-dimensions", {"value": torch.ones(3, 4)}, ["value", "2", "(batch, heads, seq, head_dim)"]),
    (ATTENTION, "query-fp64", {"query": query(dtype=torch.float64)}, ["query", "float64", "float32", "bfloat16"]),
    (ATTENTION, "query-int32", {"query": query(dtype=torch.int32)}, ["query", "int32", "float32", "float16"]),
    (ATTENTION, "key-other-dtype", {"key": tensor(dtype=torch.float16)}, ["key", "float16", "float32", "query"]),
    (WITH_VALUE, "value-other-dtype", {"value": tensor(dtype=torch.bfloat16)}, ["value", "bfloat16", "float32"]),
    (ATTENTION, "key-other-device", {"key": tensor(device="meta")}, ["key", "meta", "cpu", "query"]),
    (WITH_VALUE, "value-other-device", {"value": tensor(device="meta")}, ["value", "meta", "cpu", "query"]),
    (ATTENTION, "key-batch-3", {"key": tensor(batch=3)}, ["key", "(3, 3, 200, 40)", "batch 2"]),
    (ATTENTION, "key-head_dim-41", {"key": tensor(head_dim=41)}, ["key", "(2, 3, 200, 41)", "head_dim 40"]),
    (WITH_VALUE, "value-shorter", {"value": tensor(length=199)}, ["value", "(2, 3, 199, 40)", "(2, 3, 200, 40)"]),
    (WITH_VALUE, "value-heads", {"value": tensor(6)}, ["value", "(2, 6, 200, 40)", "(2, 3, 200, 40)"]),
    (("estimate_blocks",), "key-heads-do-not-divide", {"key": tensor(4)}, ["query", "6", "key", "4", "divide"]),
    (("estimate_blocks",), "key-heads-more", {"key": tensor(12)}, ["query", "6", "key", "12", "divide"]),
    (("estimate_blocks",), "key-no-heads", {"key": tensor(0)}, ["key", "0", "divide"]),
    (("estimate_blocks",), "query-no-heads", {"query": query(heads=0)}, ["query", "0", "heads"]),
    (
        ("estimate_blocks",),
        "head_dim-31",
        {"query": query(head_dim=31), "key": tensor(head_dim=31)},
        ["head_dim", "31", "32 to 256"],
    ),
    (
        ("estimate_blocks",),
        "head_dim-257",
        {"query": query(head_dim=257), "key": tensor(head_dim=257)},
        ["head_dim", "257", "32 to 256"],
    ),
    (ATTENTION, "query-empty", {"query": query(length=0)}, ["q_len", "0", "at least 1"]),
    (ATTENTION, "query-longer", {"query": query(length=201)}, ["q_len", "201", "k_len", "200", "q_len <= k_len"]),
    (BACKENDS, "block_size-32", {"block_size": 32}, ["block_size", "32", "(64, 128)"]),
    (BACKENDS, "block_size-0", {"block_size": 0}, ["block_size", "0", "(64, 128)"]),
    (SCORING, "stride-2", {"stride": 2}, ["stride", "2", "(4, 8, 16, 32, 64)"]),
    (SCORING, "stride-12", {"stride": 12}, ["stride", "12", "(4, 8, 16, 32, 64)"]),
    (SCORING, "stride-negative", {"stride": -16}, ["stride", "-16", "(4, 8, 16, 32, 64)"]),
    (
        SCORING,
        "pattern-unknown",
        {"pattern": "Diagonal"},
        ["pattern", "'Diagonal'", "'antidiagonal'", "'diagonal'", "'random'", "'rows'"],
    ),
    (
        ("select_blocks", "xattention", "sweep_thresholds"),
        "order-unknown",
        {"order": "newest"},
        ["order", "'newest'", "'score'", "'recent'"],
    ),
    (ATTENTION, "scale-nan", {"scale": float("nan")}, ["scale", "nan", "finite", "None"]),
    (ATTENTION, "scale-inf", {"scale": float("inf")}, ["scale", "inf", "finite", "None"]),
    (BACKENDS, "backend-unknown", {"backend": "cuda"}, ["backend", "'cuda'", "None", "'reference'", "'triton'"]),
    (SELECTING, "threshold-above-1", {"threshold": 1.5}, ["threshold", "1.5", "[0, 1]"]),
    (SELECTING, "threshold-below-0", {"threshold": -0.25}, ["threshold", "-0.25", "[0, 1]"]),
    (SELECTING, "threshold-nan", {"threshold": float("nan")}, ["threshold", "nan", "[0, 1]"]),
    (
        SELECTING,
        "threshold-one-head-above-1",
        {"threshold": torch.tensor([0.5, 0.5, 2.0, 0.5, 0.5, 0.5])},
        ["threshold", "2.0", "[0, 1]"],
    ),
    (SELECTING, "threshold-5-of-6-heads", {"threshold": torch.full((5,), 0.5)}, ["threshold", "(5,)", "(6,)", "head"]),
    (SELECTING, "threshold-matrix", {"threshold": torch.full((2, 6), 0.5)}, ["threshold", "(2, 6)", "(6,)"]),
    (("select_blocks",), "ratio-above-1", {"policy": "ratio", "threshold": 2.0}, ["threshold", "2.0", "[0, 1]"]),
    (("select_blocks",), "top-k-negative", {"policy": "top-k", "threshold": -1.0}, ["threshold", "-1.0", "[0, inf]"]),
    (
        ("select_blocks",),
        "policy-unknown",
        {"policy": "top_k"},
        ["policy", "'top_k'", "'threshold'", "'top-k'", "'ratio'"],
    ),
    (("select_blocks",), "q_len-0", {"q_len": 0}, ["q_len", "0", "at least 1"]),
    (("select_blocks",), "q_len-negative", {"q_len": -5}, ["q_len", "-5", "at least 1"]),
    (("select_blocks",), "q_len-above-k_len", {"q_len": 201}, ["q_len", "201", "k_len", "200", "q_len <= k_len"]),
    (
        ("select_blocks",),
        "scores-fp16",
        {"scores": torch.full((2, 6, 1, 2), 0.5).half()},
        ["scores", "float16", "float32"],
    ),
    (
        ("select_blocks",),
        "scores-3-dimensions",
        {"scores": torch.full((6, 1, 2), 0.5)},
        ["scores", "(6, 1, 2)", "batch"],
    ),
    (
        ("select_blocks",),
        "scores-of-other-lengths",
        {"scores": torch.full((2, 6, 2, 2), 0.5)},
        ["scores", "(2, 6, 2, 2)", "1, 2)"],
    ),
    (
        ("select_blocks",),
        "scores-nan",
        {"scores": torch.full((2, 6, 1, 2), torch.nan)},
        ["scores", "NaN", "finite"],
    ),
    (
        ("block_sparse_attention",),
        "mask-float",
        {"mask": torch.ones(2, 6, 1, 2)},
        ["mask", "float32", "bool", "(2, 6, 1, 2)"],
    ),
    (
        ("block_sparse_attention",),
        "mask-of-key-heads",
        {"mask": torch.ones(2, 3, 1, 2, dtype=torch.bool)},
        ["mask", "(2, 3, 1, 2)", "(2, 6, 1, 2)"],
    ),
    (
        ("block_sparse_attention",),
        "mask-of-other-block_size",
        {"block_size": 64},
        ["mask", "(2, 6, 1, 2)", "(2, 6, 2, 4)"],
    ),
    (("sweep_thresholds",), "grid-not-from-0", {"grid": torch.tensor([0.5, 1.0])}, ["grid", "[0.5, 1.0]", "0 to 1"]),
    (("sweep_thresholds",), "grid-not-to-1", {"grid": torch.tensor([0.0, 0.5])}, ["grid", "[0.0, 0.5]", "0 to 1"]),
    (("sweep_thresholds",), "grid-descending", {"grid": torch.tensor([1.0, 0.0])}, ["grid", "[1.0, 0.0]", "ascending"]),
    (
        ("sweep_thresholds",),
        "grid-repeats",
        {"grid": torch.tensor([0.0, 0.5, 0.5, 1.0])},
        ["grid", "[0.0, 0.5, 0.5, 1.0]", "ascending"],
    ),
    (("sweep_thresholds",), "grid-nan", {"grid": torch.tensor([0.0, torch.nan, 1.0])}, ["grid", "nan", "ascending"]),
    (("sweep_thresholds",), "grid-of-one", {"grid": torch.tensor([0.0])}, ["grid", "[0.0]", "0 to 1"]),
    (("sweep_thresholds",), "grid-matrix", {"grid": torch.tensor([[0.0, 1.0]])}, ["grid", "[[0.0, 1.0]]", "0 to 1"]),
    (
        ("sweep_thresholds",),
        "projection-of-key-heads",
        {"projection": torch.ones(3, 40, 8)},
        ["projection", "(3, 40, 8)", "(6, 40, R)"],
    ),
    (
        ("sweep_thresholds",),
        "projection-of-other-head_dim",
        {"projection": torch.ones(6, 41, 8)},
        ["projection", "(6, 41, 8)", "(6, 40, R)"],
    ),
    (
        ("sweep_thresholds",),
        "projection-2-dimensions",
        {"projection": torch.ones(6, 40)},
        ["projection", "(6, 40)", "(6, 40, R)"],
    ),
]

# What earlier versions took without a word, or refused with an error of Python's or torch's; each with what it cost.
ONCE_TAKEN: list[tuple[tuple[str, ...], str, dict[str, Any], list[str], str]] = [
    (
        GEOMETRY,
        "q_len-above-k_len",
        {"q_len": 201},
        ["q_len", "201", "k_len", "200"],
        "a negative offset gives a wrong answer in silence",
    ),
    (GEOMETRY, "q_len-0", {"q_len": 0}, ["q_len", "0", "at least 1"], "no check of lengths"),
    (GEOMETRY, "block_size-32", {"block_size": 32}, ["block_size", "32", "(64, 128)"], "no check of block_size"),
    (GEOMETRY, "block_size-0", {"block_size": 0}, ["block_size", "0", "(64, 128)"], "ZeroDivisionError"),
    (
        ("block_density",),
        "mask-of-other-lengths",
        {"mask": torch.ones(2, 6, 3, 5, dtype=torch.bool)},
        ["mask", "(2, 6, 3, 5)", "1, 2)"],
        "RuntimeError of a broadcast",
    ),
    (
        ("block_density",),
        "mask-that-broadcasts",
        {"mask": torch.ones(2, 6, 1, 1, dtype=torch.bool)},
        ["mask", "(2, 6, 1, 1)", "1, 2)"],
        "the mask is broadcast: a wrong density in silence",
    ),
    (
        ("block_density",),
        "mask-float",
        {"mask": torch.ones(2, 6, 1, 2)},
        ["mask", "float32", "bool"],
        "NotImplementedError",
    ),
    (
        ("select_blocks",),
        "scores-inf",
        {"scores": torch.full((2, 6, 1, 2), torch.inf)},
        ["scores", "inf", "finite"],
        "the message of NaN promises 'expected finite'; inf - inf is NaN, so an infinite score is dropped",
    ),
    (
        ("select_blocks",),
        "top-k-fraction",
        {"policy": "top-k", "threshold": 1.5},
        ["threshold", "1.5"],
        "a number of blocks that is not whole is rounded up in silence",
    ),
    (
        ("sweep_thresholds",),
        "projection-fp64",
        {"projection": torch.ones(6, 40, 8, dtype=torch.float64)},
        ["projection", "float64", "float32"],
        "documented as fp32, cast in silence",
    ),
    (
        ("sweep_thresholds",),
        "projection-of-rank-0",
        {"projection": torch.ones(6, 40, 0)},
        ["projection", "(6, 40, 0)"],
        "every error is 0",
    ),
    (
        ("sweep_thresholds",),
        "projection-other-device",
        {"projection": torch.ones(6, 40, 8, device="meta")},
        ["projection", "meta", "cpu"],
        "an error of torch's",
    ),
    (("estimate_blocks",), "stride-float", {"stride": 16.0}, ["stride", "16.0", "(4, 8, 16, 32, 64)"], "TypeError"),
    (("estimate_blocks",), "block_size-float", {"block_size": 64.0}, ["block_size", "64.0", "(64, 128)"], "TypeError"),
]

PARAMETERS = [
    pytest.param(function, changes, parts, id=f"{function}-{name}")
    for functions, name, changes, parts in [*BAD, *(row[:4] for row in ONCE_TAKEN)]
    for function in functions
]


@pytest.mark.parametrize("function,changes,parts", PARAMETERS)
def test_a_bad_argument_is_refused(function: str, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        getattr(kernels, function)(**{**good_arguments(function), **changes})
    message = str(caught.value)
    for part in parts:
        # a number must stand alone: the 3 of "3 dimensions", not that of "float32"
        pattern = rf"(?<![\w.,]){part}(?![\w.])" if part.isdigit() else re.escape(part)
        assert re.search(pattern, message), f"{part!r} is missing from: {message}"
    assert "\n" not in message


@pytest.mark.parametrize("function", [*BACKENDS, *GEOMETRY])
def test_the_good_arguments_are_accepted(function: str) -> None:
    """The table above changes one of these at a time."""
    arguments = good_arguments(function)
    result = getattr(kernels, function)(**arguments)
    tensors = [result.error] if isinstance(result, kernels.SweepResult) else [result]
    assert all(bool(each.isfinite().all()) for each in tensors)


@pytest.mark.parametrize("function", BACKENDS)
def test_a_backend_that_is_missing_is_an_error_and_not_a_fallback(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU: triton is refused, the reference and None give the same bits."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("XCALIB_BACKEND", raising=False)
    arguments = good_arguments(function)
    call = getattr(kernels, function)
    with pytest.raises(ValueError, match="backend is 'triton'"):
        call(**arguments, backend="triton")
    results = [call(**arguments, backend=backend) for backend in (None, "reference")]
    first, second = (each.error if isinstance(each, kernels.SweepResult) else each for each in results)
    assert torch.equal(first, second)


def test_every_public_function_is_in_the_table() -> None:
    elsewhere = {"SweepResult", "xattention_varlen"}  # the latter's own arguments: test_kernels_varlen.py
    functions = set(kernels.__all__) - elsewhere
    assert functions == {*BACKENDS, *GEOMETRY}
    covered = {parameter.values[0] for parameter in PARAMETERS}
    assert covered == functions


# --- memory ---------------------------------------------------------------------------------------------------------

FP32 = 4
WIDTH = 32


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes of the largest single tensor that a call allocates, temporaries of operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    allocations: list[int] = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    assert allocations, "the profiler is meant to see allocations"
    return max(allocations)


def random_tensor(heads: int, length: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(1, heads, length, width, generator=torch.Generator().manual_seed(heads + length))


def estimate(length: int, stride: int = 16) -> Callable[[], object]:
    tokens = random_tensor(1, length)
    return lambda: kernels.estimate_blocks(tokens, tokens, stride=stride)


def attend(length: int) -> Callable[[], object]:
    tokens = random_tensor(1, length)
    return lambda: kernels.xattention(tokens, tokens, tokens, 1.0)


def sweep(length: int) -> Callable[[], object]:
    tokens, grid = random_tensor(1, length), torch.linspace(0, 1, 24)
    projection = torch.ones(1, WIDTH, WIDTH)
    return lambda: kernels.sweep_thresholds(tokens, tokens, tokens, grid, projection)


# Bytes per token of key: the logits of one row of 128 queries are the largest thing that attention needs.
LINEAR = {"estimate": 2 * FP32 * WIDTH, "attend": 2 * FP32 * 128, "sweep": 2 * FP32 * 128}
CALLS: dict[str, Callable[[int], Callable[[], object]]] = {"estimate": estimate, "attend": attend, "sweep": sweep}


def test_the_profiler_sees_a_square_matrix() -> None:
    tokens = random_tensor(1, 1024)
    assert largest_allocation(lambda: (tokens @ tokens.mT).softmax(-1)) == FP32 * 1024**2


@pytest.mark.parametrize("name", CALLS)
def test_no_allocation_exceeds_a_constant_times_the_length(name: str) -> None:
    length = 8192
    largest = largest_allocation(CALLS[name](length))
    assert largest <= LINEAR[name] * length, f"{largest / length:.0f} bytes per token"
    assert largest < FP32 * length**2 / 16, "nowhere near a (q_len x k_len) matrix"


@pytest.mark.parametrize("name", CALLS)
def test_the_largest_allocation_grows_like_the_length(name: str) -> None:
    short, long = (largest_allocation(CALLS[name](length)) for length in (4096, 8192))
    assert long <= 2.1 * short


@pytest.mark.parametrize("stride", [4, 8, 16], ids=lambda stride: f"S{stride}")
def test_scoring_never_holds_the_matrix_of_groups(stride: int) -> None:
    """At 16,384 tokens and stride 16 that matrix is twice as large as the keys, at stride 4 it is 32 times."""
    length = 16_384
    largest = largest_allocation(estimate(length, stride))
    assert largest <= 1.5 * FP32 * WIDTH * length
    assert largest < FP32 * (length // stride) ** 2


def test_keys_and_values_are_not_repeated_for_the_query_heads() -> None:
    """16 query heads over one key head: a repeated key would be 16 times the key."""
    query, key = random_tensor(16, 64, 256), random_tensor(1, 8192, 256)
    largest = largest_allocation(lambda: kernels.xattention(query, key, key, 1.0, block_size=64))
    assert largest <= 2 * FP32 * 8192 * 256


@pytest.mark.parametrize("source", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.name)
def test_no_source_repeats_heads(source: Path) -> None:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"repeat_kv", "repeat_interleave", "repeat"}


# --- the folder's name ----------------------------------------------------------------------------------------------


def test_importing_the_folder_as_kernels_is_refused() -> None:
    """From the checkout `import kernels` would find ours instead of Hugging Face's package of that name."""
    process = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert re.match(r"ImportError: .*'xcalib\.kernels'.*'kernels'.*install xcalib", last), process.stderr


def test_the_folder_is_imported_as_xcalib_kernels() -> None:
    assert kernels.__name__ == "xcalib.kernels"
    assert Path(str(kernels.__file__)).parent == ROOT / "kernels"


def test_a_query_without_heads_is_named_before_its_threshold() -> None:
    query = torch.zeros(3)
    with pytest.raises(ValueError, match=r"query has 1 dimensions, expected \(batch, heads, seq, head_dim\)"):
        kernels.xattention(query, query, query, 0.5)
