"""Configurations: the table of a known family, else measured once and remembered; the crossover length."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xcalib.kernels import tuning
from xcalib.kernels.tuning import Config, choose, crossover, family

GPU = torch.device("cuda", 0)
CANDIDATES = (Config(4, 2, {"BLOCK_M": 64}), Config(8, 3, {"BLOCK_M": 128}), Config(8, 4, {"BLOCK_M": 256}))
KEY = {"head_dim": 128, "stride": 16}


def forget() -> None:
    tuning._gpu_family.cache_clear()
    tuning._from_table.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A GPU that nobody has measured; the folder of its cache."""
    forget()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # where there is a GPU, nothing is interpreted
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_IN_MEMORY", {})
    yield tmp_path / "xcalib"
    forget()


def test_every_rule_of_the_table_is_a_configuration() -> None:
    table = tuning._table()
    assert set(table["sm90"]) == {
        "crossover",
        "attention",
        "scoring",
        "scoring_rows",
        "selection",
        "sweep_attention",
    }
    for where, kernels in table.items():
        assert where.startswith("sm")
        for kernel, rules in kernels.items():
            if kernel == "crossover":
                assert rules > 0
                continue
            assert "when" not in rules[-1], f"{where} {kernel}: the last rule takes what the others leave"
            for rule in rules:
                assert set(rule) <= {"when", "num_warps", "num_stages", "tiles"}
                config = tuning._config(rule)
                assert config.num_warps in (1, 2, 4, 8, 16)
                assert 1 <= config.num_stages <= 5


def test_the_first_rule_that_agrees_serves(monkeypatch: pytest.MonkeyPatch, gpu: Path) -> None:
    rules = [
        {"when": {"head_dim": 64}, "num_warps": 1, "num_stages": 1, "tiles": {}},
        {"when": {"head_dim": 128, "stride": 16}, "num_warps": 2, "num_stages": 1, "tiles": {"BLOCK_M": 32}},
        {"num_warps": 16, "num_stages": 1, "tiles": {}},
    ]
    monkeypatch.setattr(tuning, "_table", lambda: {"sm120": {"scoring": rules, "crossover": 777}})
    assert choose("scoring", KEY, CANDIDATES, GPU) == Config(2, 1, {"BLOCK_M": 32})
    assert choose("scoring", {"head_dim": 96}, CANDIDATES, GPU).num_warps == 16
    assert choose("other", KEY, CANDIDATES, GPU) == CANDIDATES[0]
    assert crossover(GPU) == 777


def test_an_unknown_gpu_measures_once_and_remembers(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []

    def measure(config: Config) -> float:
        asked.append(config)
        if config is CANDIDATES[2]:
            raise RuntimeError("out of resource: shared memory")
        return {64: 2.0, 128: 1.0}[config.tiles["BLOCK_M"]]

    assert family(GPU) == "sm120"
    assert choose("scoring", KEY, CANDIDATES, GPU, measure) == CANDIDATES[1]
    assert asked == list(CANDIDATES)
    assert choose("scoring", KEY, CANDIDATES, GPU, measure) == CANDIDATES[1]
    monkeypatch.setattr(tuning, "_IN_MEMORY", {})  # another process
    assert choose("scoring", KEY, CANDIDATES, GPU, measure) == CANDIDATES[1]
    assert len(asked) == 3
    (file,) = gpu.iterdir()
    assert file.name == "tuned-sm121.json"
    assert json.loads(file.read_text())["scoring"][json.dumps(KEY)]["tiles"] == {"BLOCK_M": 128}
    choose("scoring", {**KEY, "stride": 8}, CANDIDATES, GPU, measure)
    assert len(asked) == 6
    assert crossover(GPU) == tuning.UNKNOWN_CROSSOVER


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"scoring": {"x": 1}}'], ids=["empty", "list", "cut", "other"])
def test_a_damaged_cache_is_measured_anew(gpu: Path, content: str) -> None:
    gpu.mkdir()
    (gpu / "tuned-sm121.json").write_text(content)
    assert choose("scoring", KEY, CANDIDATES, GPU, lambda config: -config.num_stages) == CANDIDATES[2]


def test_other_errors_of_a_candidate_are_not_swallowed(gpu: Path) -> None:
    def measure(config: Config) -> float:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        choose("scoring", KEY, CANDIDATES, GPU, measure)


def test_off_the_gpu_the_first_candidate_serves() -> None:
    def refuse(config: Config) -> float:
        raise AssertionError("nothing is measured in the interpreter")

    cpu: Any = torch.device("cpu")
    assert choose("scoring", KEY, CANDIDATES, cpu, refuse) == CANDIDATES[0]
    assert crossover(cpu) == 0
