"""The command line as a process: what it imports, where it writes, how Ctrl-C and a closed pipe end it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xcalib
from xcalib.collect import CollectSettings
from xcalib.profile import load_profile, save_profile

XCALIB = [sys.executable, "-m", "xcalib"]


def run(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*XCALIB, *arguments], capture_output=True, text=True, check=False, cwd=cwd, **options)


@pytest.fixture(scope="module")
def profile(
    tiny_model: Callable[..., Any], random_samples: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    settings = CollectSettings(block_size=64, grid=(0.0, 0.5, 1.0), gain_samples=1)
    found = xcalib.search(tiny_model(), random_samples([330]), target="a:density=0.8", settings=settings)
    path = tmp_path_factory.mktemp("profile") / "good.yaml"
    save_profile(found, path)
    return path


def test_version(tmp_path: Path) -> None:
    result = run("--version", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"xcalib {xcalib.__version__}\n", "")


def test_console_script(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("xcalib")
    if not script.is_file():
        pytest.skip("the xcalib script is not installed beside this Python")
    result = subprocess.run(
        [script, "validate", "gone.yaml"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: gone.yaml: cannot be read: No such file or directory\n"


def test_loading_a_profile_imports_no_search_and_no_terminal(profile: Path) -> None:
    code = f"import sys, xcalib; xcalib.load_profile({str(profile)!r}); print(*sys.modules)"
    command = [sys.executable, "-X", "importtime", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=profile.parent)
    timed = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    # importtime does not see importlib.import_module, and sys.modules not what was imported and dropped again
    imported = {line.rpartition("|")[2].strip() for line in timed} | set(result.stdout.split())
    assert {"xcalib", "pydantic"} <= imported
    heavy = {"optuna", "typer", "click", "rich", "torch", "transformers", "numpy"}
    assert not {name for name in imported if name.partition(".")[0] in heavy}
    ours = {name for name in imported if name.startswith("xcalib.")}
    assert ours == {
        "xcalib._reading",
        "xcalib._suggest",
        "xcalib._yaml",
        "xcalib.choices",
        "xcalib.errors",
        "xcalib.profile",
    }


def test_json_goes_to_stdout_and_the_rest_to_stderr(tiny_folder: Path, tmp_path: Path) -> None:
    result = run(
        "search", str(tiny_folder), "--out", "new.yaml", "--work", "work", "--json", "--data", "builtin:prose",
        "--max-length", "384", "--num-samples", "1", "--heldout-samples", "1", "--block-size", "64", "-t", "a:density=0.8",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed.pop("profile") == "new.yaml"
    assert printed == load_profile(tmp_path / "new.yaml").model_dump(mode="json")
    for noise in ("Warning", "warning", "it/s", "Traceback"):
        assert noise not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.yaml", "work"]


def test_show_into_a_file(profile: Path, tmp_path: Path) -> None:
    result = run("show", str(profile), cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout


# Waits for its first sample to be on disk, then in the second one, until Ctrl-C comes.
WAITING = """
import signal, sys, time
import xcalib.cli
from xcalib.collect.measure import Sweeper

measure, calls = Sweeper.measure, []

def slow(self, *arguments, **options):
    calls.append(1)
    if len(calls) == 2:
        print("reached", flush=True)
        time.sleep(600)
    return measure(self, *arguments, **options)

Sweeper.measure = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job, as these tests may be, ignores it
sys.argv[0] = "xcalib"
xcalib.cli.main()
"""


def test_ctrl_c_and_resume(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["collect", str(tiny_folder), "--out", "curves", "--data", "builtin:prose", "--max-length", "384"]
    arguments += ["--num-samples", "2", "--block-size", "64", "--gain-samples", "1"]
    command = [sys.executable, "-c", WAITING, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "reached\n"
        os.kill(child.pid, signal.SIGINT)
        assert child.wait() == 130
        said = child.stderr.read()
    assert "interrupted: finished samples are kept; run the same command with --resume" in said
    assert "Traceback" not in said
    assert [path.name for path in (tmp_path / "curves" / "units").iterdir()] == ["sample-00000.safetensors"]
    resumed = run(*arguments, "--resume", "--json", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["calibration"]["samples"] == 2
