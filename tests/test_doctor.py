"""``xcalib doctor``: its truth is independent and its checks can fail, on each backend that a CPU has."""

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from xcalib.doctor import (
    EXTRAS,
    Target,
    check_kernels,
    gpus,
    machine,
    missing_extras,
    required_problems,
    selftest,
    targets,
)
from xcalib.doctor.truth import scores_truth, selection_truth
from xcalib.kernels import api, reference

Run = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).parent.parent
REFERENCE = Target("reference", "cpu", torch.float32)
NAMES = list(selftest.CHECKS)


def problems(target: Target = REFERENCE) -> dict[str, str | None]:
    return {check.name: check.problem for check in check_kernels(target)}


def test_the_reference_passes_far_from_its_bounds() -> None:
    checks = list(check_kernels(REFERENCE))
    assert [check.name for check in checks] == NAMES
    assert all(check.problem is None and check.error <= check.bound / 2 for check in checks)
    assert sum(check.error > 0 for check in checks) == len(checks) - 1  # all but the selection, which is exact


def test_no_choice_of_a_block_hangs_on_rounding() -> None:
    """Scores of any precision choose the same blocks, so that a check of all together means what it says."""
    for case in (*selftest.SMALL, *selftest.LARGE, *selftest.TINY):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            query, key, _ = selftest._inputs(Target("reference", "cpu", dtype), case)
            for pattern in ("rows", "antidiagonal"):
                scores = scores_truth(case, pattern, query, key)
                for tau in selftest.GRID[1:-1]:
                    kept = selection_truth(case, scores, tau, "recent")
                    for move in (-1e-5, 1e-5):
                        assert torch.equal(selection_truth(case, scores, tau + move, "recent"), kept), (case, dtype)


def broken(name: str, change: Callable[[Any], Any]) -> Callable[..., Any]:
    own = getattr(reference, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        return change(own(*arguments, **options))

    return wrong


@pytest.mark.parametrize(
    ("name", "change", "failing"),
    [
        ("estimate_blocks", lambda scores: scores * 1.001, {"scores, rows", "scores, antidiagonal"}),
        ("select_blocks", lambda mask: mask.roll(1, -1) | mask, {"selection"}),
        ("block_sparse_attention", lambda output: output + 1e-4, {"sparse attention", "tau 1 is dense attention"}),
        ("block_sparse_attention", lambda output: output * float("nan"), {"sparse attention", "all together, rows"}),
        ("sweep_thresholds", lambda result: replace(result, error=result.error * 1.01), {"sweep"}),
        ("sweep_thresholds", lambda result: replace(result, kept=result.kept + 1), {"sweep"}),
    ],
    ids=["scores", "selection", "attention", "NaN", "errors", "counts"],
)
def test_every_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any], failing: set[str]
) -> None:
    monkeypatch.setattr(api.reference, name, broken(name, change))
    found = problems()
    assert failing <= {check for check, problem in found.items() if problem is not None}
    assert all(problem is None or "the error is" in problem or "inf" in problem for problem in found.values())


def test_a_kernel_that_raises_fails_its_check_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(api.reference, "sweep_thresholds", raises)
    found = problems()
    assert (
        found.pop("sweep")
        == f"{selftest.SMALL[0]}: RuntimeError: no kernel image is available for execution on the device"
    )
    assert set(found.values()) == {None}


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")
def test_triton_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    assert targets()[1:] == [Target("triton", "cpu", torch.float32), Target("triton", "cpu", torch.float16)]
    assert problems(targets()[2]) == dict.fromkeys(NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_triton_on_a_gpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert problems(Target("triton", "cuda", dtype)) == dict.fromkeys(NAMES)


# --- the machine


def test_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {extra.name for extra in EXTRAS} == set(extras) - {"docs", "test", "lint"}


def test_a_missing_extra_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "gguf" else object())
    (extra,) = missing_extras()
    assert (extra.missing, extra.command) == (("gguf",), "pip install 'xcalib[demo]'")


def test_a_requirement_that_is_not_met_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert required_problems() == []
    old = {"torch": "1.0", "optuna": None}
    own = machine._version
    monkeypatch.setattr(machine, "_version", lambda package: old[package] if package in old else own(package))
    assert [problem.partition(",")[0] for problem in required_problems()] == ["optuna is missing", "torch is 1.0"]


def test_without_being_installed_as_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", raises)
    (problem,) = required_problems()
    assert problem.startswith("xcalib is not installed as a package")


def test_gpus_as_torch_describes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [SimpleNamespace(name=f"GPU {n}", major=n, minor=0, total_memory=80 << 30) for n in (7, 9, 12)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (facts[device.index].major, 0))
    old, known, new = (gpu.text for gpu in gpus())
    assert old == "GPU 7, capability 7.0, 80 GiB; too old for the kernels, which need 8.0: the reference (slow) serves"
    assert known.endswith("tiles from the tuned table; dense below 8,192 tokens")
    assert "not in the tuned table: tiles are timed on first use; dense below 4,096 tokens (assumed" in new


# --- the command


def words(text: str) -> str:
    return " ".join(text.split())


def test_all_is_well(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, err = run("doctor", tiny_folder)
    assert code == 0, err
    assert f"torch {torch.__version__}" in words(out) and f"transformers {transformers.__version__}" in words(out)
    assert f"reference on cpu, float32: {len(NAMES)} checks" in words(out)
    assert "supported: 3 of 3 layers can attend sparsely" in out
    assert "its attention goes through transformers' interface (sdpa, 3 calls seen)" in words(out)
    assert out.rstrip().endswith("all is well")
    assert "\x1b" not in out
    assert max(len(line) for line in out.splitlines() if str(tiny_folder) not in line) <= 80


def test_json_has_everything(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["model"]) == (0, True, None)
    assert found["versions"]["torch"] == torch.__version__
    (kernels,) = found["kernels"][:1]
    assert [check["name"] for check in kernels["checks"]] == NAMES
    assert all(check["passed"] and check["error"] <= check["bound"] for check in kernels["checks"])
    assert {finding["state"] for finding in found["findings"]} <= {"ok", "warning"}


def test_a_failed_check_ends_with_1_and_says_which(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        api.reference, "block_sparse_attention", broken("block_sparse_attention", lambda o: o * float("nan"))
    )
    code, out, _ = run("doctor")
    assert code == 1
    assert "FAILED kernels reference on cpu, float32: sparse attention: 333 x 333 tokens" in words(out)
    assert "(and 3 more); give the output of `xcalib doctor --json` with your report" in words(out)
    assert out.rstrip().endswith("1 FAILED: kernels")
    code, out, _ = run("doctor", "--json")
    assert code == 1 and json.loads(out)["ok"] is False


def test_a_model_that_cannot_be_served_fails(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "config.json"
    transformers.AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2).to_json_file(path, use_diff=False)
    code, out, _ = run("doctor", path)
    assert code == 1
    assert "not supported: MambaForCausalLM: its config has no num_attention_heads" in out
    assert out.rstrip().endswith("1 FAILED: model")


def test_no_model_is_bad_input(run: Run) -> None:
    code, out, err = run("doctor", "./nowhere")
    assert (code, out) == (2, "") and err.endswith("error: model folder or file './nowhere' does not exist\n")


def test_another_backend_by_environment_is_a_warning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("XCALIB_BACKEND", "reference")
    code, out, _ = run("doctor")
    assert code == 0 and "XCALIB_BACKEND=reference decides which kernels serve" in words(out)


def test_the_truth_shares_no_code_with_the_kernels() -> None:
    source = (ROOT / "xcalib" / "doctor" / "truth.py").read_text("utf-8")
    imported = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imported and not [line for line in imported if "xcalib" in line]
