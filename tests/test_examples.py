"""docs/examples: each runs as a process of its own on the tiny model, and prints what it promises; the notebook too."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import xcalib

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def run_example(name: str, folder: Path, *arguments: str | Path, fails: bool = False) -> str:
    """What it printed; on stderr where it has to fail."""
    command = [sys.executable, "-W", "error::xcalib.errors.XcalibWarning", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def place(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile ``small.yaml`` of the tiny model, made by the example."""
    folder = tmp_path_factory.mktemp("examples")
    size = ["--num-samples", "2", "--max-length", "512"]
    out = run_example(
        "quick_profile.py", folder, "--model", tiny_folder, "--work", "work", "--out", "small.yaml", *size
    )
    assert "measuring 2 samples of 512 tokens" in out
    profile = xcalib.load_profile(folder / "small.yaml")
    assert [point.name for point in profile.points] == ["fidelity", "balanced"]
    assert all(point.heldout is not None and point.heldout.samples == 2 for point in profile.points)
    assert (folder / "work" / "curves" / "curves.json").is_file()
    return folder


def percent(text: str) -> float:
    return float(text) / 100


def test_calibrate_your_data(tiny_folder: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(8):
        (notes / f"{number}.txt").write_text(f"Note {number}. " + f"The {number} th of many lines of text. " * 200)
    size = ["--max-length", "768", "--num-samples", "2", "--target", "density=0.7"]
    arguments = ["--model", tiny_folder, "--text", notes / "*.txt", *size]
    out = run_example("calibrate_your_data.py", tmp_path, *arguments)
    assert "calibration: 2 samples of" in out and "held out: 2 samples of" in out and "1 with a question" in out
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all(row["answers"][0] in row["text"] for row in rows)
    profile = xcalib.load_profile(tmp_path / "mine.yaml")
    for point in profile.points:
        (line,) = [line for line in out.splitlines() if line.startswith(point.name)]
        found = point.heldout
        assert found is not None and found.accuracy_dense is not None
        assert f"{found.density:.1%}" in line and f"{found.kl:.4f}" in line
    assert profile.calibration.sources == (f"text:{notes / '*.txt'}", "jsonl:questions.jsonl")


def test_generate_with_profile(place: Path, tiny_folder: Path) -> None:
    arguments = [
        "--model",
        tiny_folder,
        "--profile",
        "small.yaml",
        "--tokens",
        "640",
        "--new-tokens",
        "6",
        "--chunk",
        "128",
    ]
    out = run_example("generate_with_profile.py", place, *arguments)
    whole, chunks = [(int(calls), percent(share)) for calls, share in re.findall(r"(\d+) sparse calls, ([\d.]+)%", out)]
    assert (
        whole[0] == 3 and 3 < chunks[0] <= 15
    )  # three layers; five chunks, the first of them below the profile's lengths
    assert 0 < whole[1] < 0.8 and 0 < chunks[1] < 0.8
    assert "dense calls: decode (one query token)" in out
    assert re.search(r"KL \d\.\d{4} nats from dense", out)
    assert "its own again, bit for bit: True" in out


def test_kernels_in_your_model(place: Path, tiny_folder: Path) -> None:
    out = run_example(
        "kernels_in_your_model.py", place, "--model", tiny_folder, "--profile", "small.yaml", "--tokens", "600"
    )
    errors = [float(error) for error in re.findall(r"largest difference (\S+) of", out)]
    assert len(errors) == 3 and max(errors) < 1e-4
    densities = [percent(share) for share in re.findall(r"layer +\d+ +([\d.]+)%", out)]
    (whole,) = [percent(share) for share in re.findall(r"([\d.]+)% in all", out)]
    assert len(densities) == 3 and min(densities) < 1
    assert whole == pytest.approx(sum(densities) / 3, abs=0.002)


def test_kernels_refuse_another_architecture(place: Path, tiny_model: Any, tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    tiny_model("qwen3").save_pretrained(tmp_path)
    said = run_example("kernels_in_your_model.py", place, "--model", tmp_path, "--profile", "small.yaml", fails=True)
    assert "is a plain Llama, this is another architecture" in said


def test_compare_profiles(place: Path, tiny_folder: Path) -> None:
    arguments = ["--model", tiny_folder, "--work", "work", "--max-length", "512", "--num-samples", "3", "--limit", "4"]
    out = run_example("compare_profiles.py", place, *arguments)
    assert "setting balanced.objective: output error -> (gain x output error)^0.75" in out
    moved = re.findall(r"layer +\d+ head +\d+: ([\d.]+) -> ([\d.]+)", out)
    assert 0 < len(moved) <= 4
    changes = [abs(float(after) - float(before)) for before, after in moved]
    assert changes == sorted(changes, reverse=True) and changes[-1] > 0
    kls = [float(kl) for kl in re.findall(r"^(?:first|second) +[\d.]+% +([\d.]+)", out, re.MULTILINE)]
    ratio, low, high = map(float, re.findall(r"over the first: ([\d.]+), 95% interval ([\d.]+) to ([\d.]+)", out)[0])
    assert ratio == pytest.approx(kls[1] / kls[0], rel=0.01)
    assert low <= ratio <= high


def test_compare_one_profile_with_itself(place: Path, tiny_folder: Path) -> None:
    out = run_example(
        "compare_profiles.py", place, "small.yaml", "small.yaml", "--model", tiny_folder, "--max-length", "512"
    )
    assert "balanced: 0 of 12 thresholds moved, 0 up, 0 down" in out
    assert "KL of the second over the first: 1.000, 95% interval 1.000 to 1.000" in out
    assert "not told apart" in out
