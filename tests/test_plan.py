"""The cost model: its FLOPs are torch's, its times are those of recorded runs, and what a plan says follows from both."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from xcalib.collect import CollectSettings, collect
from xcalib.collect.backward import masked_attention
from xcalib.collect.curves import DEFAULT_GRID
from xcalib.errors import ModelError, PlanError
from xcalib.kernels import block_sparse_attention, estimate_blocks, select_blocks, sweep_thresholds, visible_blocks
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.reference import block_levels
from xcalib.kernels.slopes import sweep_slopes
from xcalib.models.logits import LogitHead
from xcalib.models.structure import decoder_of
from xcalib.plan import (
    Job,
    Machine,
    Timing,
    Work,
    check_run,
    cost,
    fit,
    load_machine,
    measure,
    plan_calibration,
    read_shape,
    shape_of,
    steps,
)
from xcalib.plan.calibration import COLLECT
from xcalib.plan.memory import device_bytes

BENCHMARKS = Path(__file__).parent.parent / "docs" / "benchmarks"
RUNS = sorted((BENCHMARKS / "plan").glob("cpu-*.json"))
LEVELS = len(DEFAULT_GRID)
HEADS, KV_HEADS, DIMENSIONS, BLOCK = 4, 2, 32, 64
LENGTHS = pytest.mark.parametrize("length", [256, 640, 650])


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def tensors(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, gradient = torch.randn(2, 1, HEADS, length, DIMENSIONS, generator=generator)
    key, value = torch.randn(2, 1, KV_HEADS, length, DIMENSIONS, generator=generator)
    return query, key, value, gradient


@pytest.fixture(scope="module")
def h200() -> Any:
    """The script that makes and checks the H200's rates."""
    spec = importlib.util.spec_from_file_location("plan_h200", BENCHMARKS / "plan" / "h200.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- FLOPs


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "mistral"])
def test_a_dense_pass_has_the_flops_that_torch_counts(tiny_model: Callable[..., Any], family: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    shape, length = shape_of(model), 200
    with torch.inference_mode():
        found = counted(
            lambda: decoder_of(model)(input_ids=torch.ones((1, length), dtype=torch.int64), use_cache=False)
        )
    pairs = 4 * shape.q_heads * shape.head_dim  # eager attention computes what causality hides as well
    assert found == cost.linear(shape, length).flops + shape.layers * pairs * length**2
    hidden = shape.sparse_layers * pairs * (length**2 - length * (length + 1) / 2)
    assert cost.dense_pass(shape, length).flops == found - hidden
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.sparse_layers == (1 if family == "gemma2" else 2)


@LENGTHS
def test_scoring_and_sweep_have_the_flops_that_torch_counts(length: int) -> None:
    query, key, value, _ = tensors(length)
    rule: dict[str, Any] = {"stride": 16, "block_size": BLOCK}
    scored = cost.scoring(HEADS, DIMENSIONS, length, **rule)
    found = counted(lambda: estimate_blocks(query, key, **rule))
    assert found == pytest.approx(scored.flops, rel=0 if length % BLOCK == 0 else 0.05)
    grid = torch.tensor(DEFAULT_GRID, dtype=torch.float64)
    projection = torch.randn(HEADS, DIMENSIONS, DIMENSIONS)
    swept = cost.sweep(HEADS, DIMENSIONS, length, 128, block_size=BLOCK, levels=LEVELS)
    found = counted(lambda: sweep_thresholds(query, key, value, grid, projection, **rule)) - found
    assert found == pytest.approx(swept.flops + swept.amounts["sweep.members"], rel=1e-3)


@LENGTHS
def test_sparse_attention_has_the_flops_that_torch_counts(length: int) -> None:
    query, key, value, _ = tensors(length)
    scores = estimate_blocks(query, key, stride=16, block_size=BLOCK)
    mask = select_blocks(scores, 0.4, q_len=length, k_len=length, block_size=BLOCK)
    density = float(mask.sum()) / (HEADS * int(visible_blocks(length, length, block_size=BLOCK).sum()))
    found = counted(lambda: block_sparse_attention(query, key, value, mask, block_size=BLOCK))
    work = cost.sparse(HEADS, DIMENSIONS, length, density, block_size=BLOCK)
    assert found == pytest.approx(work.flops, rel=1e-9 if length % BLOCK == 0 else 0.1)


@LENGTHS
def test_a_backward_pass_has_the_flops_that_torch_counts(length: int) -> None:
    query, key, value, gradient = tensors(length)
    wanted = [tensor.clone().requires_grad_(True) for tensor in (query, key, value)]

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return masked_attention(*tensors, None, block_size=BLOCK, scale=DIMENSIONS**-0.5).square()

    def both() -> None:  # as within a decoder block, which is computed again and goes on with the output
        with sdpa_kernel(SDPBackend.MATH):
            checkpoint(attend, *wanted, use_reentrant=False).backward(gradient)

    # this backend keeps what fused ones compute again: four products of matrices instead of five, and the last forward
    # pass ends once the operands of its second product are there
    share = (cost.FORWARDS - 0.5 + 2) / (cost.FORWARDS + cost.BACKWARD)
    assert counted(both) == pytest.approx(share * cost.masked(HEADS, DIMENSIONS, length).flops, rel=1e-9)
    level = block_levels(
        estimate_blocks(query, key, stride=16, block_size=BLOCK),
        torch.tensor(DEFAULT_GRID, dtype=torch.float64),
        Geometry(length, length, BLOCK, True),
    )
    options: dict[str, Any] = {"block_size": BLOCK, "scale": 1.0}
    found = counted(lambda: sweep_slopes(query, key, value, gradient, level, LEVELS, **options))
    assert found == cost.slopes(HEADS, DIMENSIONS, length, block_size=BLOCK, levels=LEVELS).flops


def test_logits_have_the_flops_that_torch_counts(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    shape, head = shape_of(model), LogitHead(model)
    dense, *variants = torch.randn(4, 300, shape.hidden)
    assert counted(lambda: head.kl(dense, variants)) == cost.logits(shape, 300, 4).flops


def test_gains_run_the_blocks_from_the_switched_one_on(
    tiny_model: Callable[..., Any], random_samples: Callable[..., Any], tmp_path: Path
) -> None:
    """Calls of blocks and sparse layers, and bytes of curves, of a real collection."""
    model = tiny_model("llama", num_hidden_layers=3)
    shape, length, calls = shape_of(model), 300, []
    for layer in decoder_of(model).layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    settings = CollectSettings(block_size=64, gain_samples=1)
    job = Job((length,), 2, block_size=64, gain_samples=1, rounds=0, heldout=0, levels=len(settings.grid))
    collect(model, random_samples([length, length]), tmp_path / "curves", settings=settings)
    planned = [batch.count * batch.unit.amounts["linear.calls"] for step in steps(shape, job) for batch in step.least]
    assert len(calls) == sum(planned)
    assert planned == [6, 3 + 6, 3 * 3, 3]
    disk = plan_calibration(shape, job, load_machine("cpu")).disk
    written = (tmp_path / "curves" / "curves.safetensors").stat().st_size
    assert disk["curves"] == pytest.approx(written, abs=2000)  # header and gains


# --- recorded runs


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_recorded_runs_took_what_the_shipped_cpu_predicts(path: Path) -> None:
    machine = load_machine("cpu")
    rows = {row.step: row for row in check_run(json.loads(path.read_text()), machine)}
    assert rows["all"].ratio == pytest.approx(1, abs=machine.margin)
    assert rows["all"].measured > 1  # seconds: not the noise of a clock


def test_there_are_recorded_runs_of_real_and_random_models() -> None:
    names = [json.loads(path.read_text())["shape"]["name"] for path in RUNS]
    assert len(names) >= 5 and {"model", "demo"} <= set(names) and any(name.startswith("random") for name in names)


def test_the_h200_predicts_what_its_rates_were_not_fitted_to(h200: Any) -> None:
    machine = load_machine("h200")
    assert machine.record() == json.loads(json.dumps(h200.make().record()))  # the shipped file is what the script makes
    rows = {row.step: row for row in check_run(h200.calibration(), machine)}
    for step in ("gains", "held-out evaluation", "all"):
        assert rows[step].ratio == pytest.approx(1, abs=0.1)
    unused = [timing for length, timing in h200.kernels() if length not in h200.FITTED]
    assert len(unused) >= 10
    for timing in unused:
        assert machine.seconds(timing.work) == pytest.approx(timing.seconds, rel=machine.margin), timing.what


def test_memory_is_that_of_the_recorded_calibration(h200: Any) -> None:
    record = h200.calibration()
    shape = record["shape"]
    names = ("layers", "q_heads", "kv_heads", "head_dim", "hidden", "intermediate", "vocabulary", "parameters")
    chosen: dict[str, Any] = {name: shape[name] for name in names}
    chosen |= {"weight_size": 2, "activation_size": 2, "length": 32768, "block_size": 128, "levels": 27}
    chosen |= {"positions": 32768 // 7, "points": 3}
    for phase, measured in zip(("sweep", "gains", "joint", "evaluate"), record["phases"], strict=True):
        found = device_bytes(phase, **chosen)  # type: ignore[arg-type]
        assert sum(found.values()) == pytest.approx(measured["peak_memory_bytes"], rel=0.1)
        beside = measured["peak_memory_bytes"] - found["weights"]
        assert sum(found.values()) - found["weights"] == pytest.approx(beside, rel=0.25)


# --- rates


def test_fit_finds_the_rates_that_made_the_timings() -> None:
    rates = {"linear.flops": 2e-11, "linear.calls": 3e-4, "sweep.pairs": 5e-9}
    works = [
        Work({"linear.flops": 1e9 * size, "linear.calls": 7.0, "sweep.pairs": 1e6 * size**2, "link.values": 1.0})
        for size in (1, 2, 5, 9)
    ]
    timings = [Timing("made", work, sum(work.amounts[name] * rate for name, rate in rates.items())) for work in works]
    found, spread = fit(timings)
    assert found == pytest.approx(rates)
    assert max(spread.values()) == pytest.approx(0, abs=1e-9)
    assert fit(timings, ["linear.calls"])[0]["linear.calls"] == 0
    with pytest.raises(PlanError, match="longer than 0 seconds"):
        fit([Timing("nothing", works[0], 0.0)])


def test_measuring_gives_a_rate_for_all_that_a_calibration_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    heads = tuple(measure.Heads(2, 1, 32, length, 64) for length in (128, 256))
    sizes = measure.Sizes(heads, ((1, 64, 2, 128, 256),), (128, 256), 16, 1e-3)
    monkeypatch.setattr(measure, "CPU_SIZES", sizes)
    file = tmp_path / "mine.json"
    code, out, err = run("plan", "--measure", "--device", "cpu", "--out", file, "--json")
    assert code == 0 and str(file) in err
    machine = load_machine(str(file))
    assert json.loads(out)["rates"] == machine.rates
    assert machine.assumed == () and machine.name == "mine"
    shape = read_shape(str(BENCHMARKS / "retrieval" / "model"))
    for step in steps(shape, Job((512,), 2, block_size=64)):
        assert all(machine.seconds(batch.unit) > 0 for batch in step.most)
    with pytest.raises(PlanError, match=r"has no rate for linear\.flops"):
        dataclasses.replace(machine, rates={}).seconds(Work({"linear.flops": 1.0}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rates": {"linear.flops": -1.0}}, "finite number"),
        ({"memory_bytes": float("nan")}, "finite number"),
        ({"margin": True}, "finite number"),
        ({"format": 9}, "another format"),
        ({"colour": 1}, "not a machine's file"),
        ({"sources": [1]}, "must be texts"),
    ],
)
def test_a_machine_file_that_is_wrong_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(load_machine("cpu").record() | change))
    with pytest.raises(PlanError, match=said):
        load_machine(str(file))
    file.write_text("[" * 100_000)
    with pytest.raises(PlanError, match="not a machine's file"):
        load_machine(str(file))
    with pytest.raises(PlanError, match="neither cpu nor h200"):
        load_machine(str(tmp_path / "absent.json"))


# --- plans


@pytest.fixture(scope="module")
def small() -> Any:
    return read_shape(str(BENCHMARKS / "retrieval" / "model"))


@pytest.fixture(scope="module")
def large() -> Any:
    return read_shape(str(BENCHMARKS / "plan" / "llama-405b.json"))


def test_samples_are_shared_out(small: Any) -> None:
    machine, job = load_machine("h200"), Job((2048, 4096), 8, gain_samples=2)
    one, four = (plan_calibration(small, job, machine, gpus=gpus) for gpus in (1, 4))
    alone, shared = ({step.name: step for step in plan.steps} for plan in (one, four))
    assert shared["joint losses"].seconds[1] < alone["joint losses"].seconds[1] / 2
    assert shared["gains"].seconds[1] == pytest.approx(alone["gains"].seconds[1] / 2)  # two samples, four GPUs
    assert shared["gains"].busy == pytest.approx(0.5) and alone["gains"].busy == 1
    assert any(note.startswith("gains: 50%") for note in four.notes)
    assert one.seconds(COLLECT)[1] < one.seconds()[1]
    low, high = one.steps[3].seconds
    assert low < high  # rounds may end early
    assert one.seconds(("gains",)) == pytest.approx([alone["gains"].seconds[0] * share for share in (0.75, 1.25)])


def test_what_one_device_cannot_hold_is_spread(large: Any) -> None:
    machine, job = load_machine("h200"), Job((32768,), 16, rounds=0)
    auto = plan_calibration(large, job, machine, gpus=64, price=3.0)
    assert auto.placement.shards > 1
    one = plan_calibration(large, job, machine, gpus=1)
    assert not one.fits and any("samples does not fit" in note and "--offload" in note for note in one.notes)
    layers, heads = (plan_calibration(large, job, machine, gpus=64, sharding=how) for how in ("layers", "heads"))
    assert (layers.placement.spread, heads.placement.spread) == ("layers", "heads")
    assert auto.seconds()[1] <= max(layers.seconds()[1], heads.seconds()[1])
    assert heads.placement.shards <= large.kv_heads
    step = heads.steps[0]
    assert step.memory["weights"] == pytest.approx(large.parameters * 2 / heads.placement.shards)
    data = auto.to_dict()
    assert data["cost"] == pytest.approx([3.0 * hours for hours in data["gpu_hours"]])
    assert data["gpu_hours"][1] == pytest.approx(auto.seconds()[1] * 64 / 3600)
    halves = plan_calibration(
        large, job, dataclasses.replace(machine, link_bytes_per_second=1e9), gpus=64, sharding="heads"
    )
    assert halves.seconds()[0] > heads.seconds()[0]  # a slower link


def test_a_405b_configuration_has_its_parameters(large: Any) -> None:
    assert large.parameters == pytest.approx(405.85e9, rel=1e-4)
    assert (large.layers, large.sparse_layers, large.kv_heads) == (126, 126, 8)


def test_arguments_that_make_no_sense_are_refused(small: Any) -> None:
    machine = load_machine("cpu")
    with pytest.raises(PlanError, match="4,096 positions: choose at most 4096"):
        plan_calibration(small, Job((8192,), 2), machine)
    with pytest.raises(PlanError, match="dtype is 'int8'"):
        plan_calibration(small, Job((2048,), 2), machine, dtype="int8")
    for wrong in ({"samples": 0}, {"lengths": ()}, {"densities": (1.5,)}, {"rounds": -1}):
        with pytest.raises(PlanError):
            Job(**{"lengths": (2048,), "samples": 2} | wrong)  # type: ignore[arg-type]


def test_rates_that_are_not_measured_are_said(small: Any) -> None:
    plan = plan_calibration(small, Job((2048,), 2), load_machine("h200"), dtype="float32")
    assert any("assumed" in note and "slopes" in note for note in plan.notes)
    assert any("rates are those of bfloat16" in note for note in plan.notes)
    assert isinstance(plan.machine, Machine)
    without = plan_calibration(small, Job((2048,), 2, rounds=0), load_machine("h200"))
    assert not any("assumed" in note for note in without.notes)


def test_command(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    config = BENCHMARKS / "plan" / "llama-405b.json"
    options = ("--gpus", 64, "--samples", 128, "--max-length", "131072", "--price", "4", "--json")
    code, out, err = run("plan", config, *map(str, options))
    found = json.loads(out)
    assert code == 0 and found["placement"]["gpus"] == 64 and len(found["steps"]) == 5
    assert "gains does not fit" in err and "USD" in err and "calibration-8b.json" in err
    code, out, err = run(
        "plan", config, "--lengths", "4k,8k", "--machine", "cpu", "--rounds", "0", "--heldout-samples", "0"
    )
    assert code == 0 and out == "" and "4,096, 8,192 tokens" in err
    code, out, err = run("plan", config, "--max-length", "200000")
    assert (code, out) == (2, "") and err.count("error: ") == 1 and "Traceback" not in err
    assert "choose at most 131072" in err
    for name, text in (("list.json", "[1]"), ("odd.json", '{"model_type": "nonsense"}'), ("none.json", None)):
        if text is not None:
            (tmp_path / name).write_text(text)
        code, out, err = run("plan", tmp_path / name)
        assert (code, out) == (2, "") and "error: " in err and "Traceback" not in err
    assert run("plan")[0] == 2


def test_processes_on_a_cpu_share_the_hosts_memory(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    config = json.loads((BENCHMARKS / "plan" / "llama-405b.json").read_text())
    size = {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | size))
    options = ("--machine", "cpu", "--dtype", "bfloat16", "--samples", "32", "--max-length", "1024", "--rounds", "0")
    fits = {}
    for count in (1, 32):
        code, out, err = run("plan", tmp_path / "config.json", *options, "--gpus", str(count), "--json")
        assert code == 0, err
        fits[count] = [step["fits"] for step in json.loads(out)["steps"]]
    assert all(fits[1]) and not any(fits[32])
    assert "samples does not fit" in err and "--offload" in err and "more GPUs" not in err


def test_a_configuration_that_cannot_be_calibrated_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bert.json").write_text(
        '{"model_type": "bert", "hidden_size": 64, "num_attention_heads": 2, "is_decoder": true}'
    )
    with pytest.raises(ModelError):
        read_shape(str(tmp_path / "bert.json"))
    (tmp_path / "big.json").write_text(" " * (5 << 20))
    with pytest.raises(ModelError, match="larger than 4 MiB"):
        read_shape(str(tmp_path / "big.json"))
