"""What the shell is offered, in a process of its own as a shell starts it; and that nothing heavy is imported for it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from xcalib import choices, profiles
from xcalib.ablate.paper import PAPER
from xcalib.cli.completion import installed, joined_words
from xcalib.models.loading import DTYPES

DOC = (Path(__file__).parent.parent / "docs" / "profile-format.md").read_text("utf-8")
HEAVY = {"torch", "transformers", "optuna", "triton", "scipy", "safetensors", "accelerate", "altair", "matplotlib"}
MAIN = "import sys; from xcalib.cli import main; main()"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A profile with the point balanced, a model's folder, one that is none, and a .gguf file."""
    for name in ("profile.yaml", "my profile.YAML"):
        (tmp_path / name).write_text(re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)[0])
    for name in ("models/one", "nothing"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/one/config.json").write_text("{}")
    (tmp_path / "weights.gguf").touch()
    (tmp_path / "notes.txt").touch()
    return tmp_path


def offered(folder: Path, *words: str, shell: str = "bash") -> list[str]:
    """What the shell is told after these words, the last of which is being typed."""
    environment = {**os.environ, "_XCALIB_COMPLETE": f"complete_{shell}", "COMP_WORDS": "\n".join(words)}
    environment |= {"HOME": str(folder), "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": " ".join(words)}
    command = [sys.executable, "-P", "-c", MAIN]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("sh",), ["show"]),
        (("show", ""), [*profiles.names(), "my profile.YAML", "profile.yaml", "models/", "nothing/"]),
        (("show", "smol"), ["smollm2-135m"]),
        (("show", "smollm2-135m", "--point", "b"), ["balanced"]),
        (("show", "profile.yaml", "--point", ""), ["balanced"]),
        (("show", "profile.yaml", "--point", "=", "ba"), ["balanced"]),
        (("show", "notes.txt", "--point", ""), []),
        (("evaluate", "demo", "--profile", "profile.yaml", "--point", "b"), ["balanced"]),
        (("diff", "profile.yaml", "profile.yaml", "--point", ""), ["balanced"]),
        (("search", "d"), ["demo"]),
        (("search", "w"), ["weights.gguf"]),
        (("inspect", "models/"), ["models/one"]),
        (("inspect", "models/one/"), ["models/one/config.json"]),
        (("doctor", "models/one/"), ["models/one/config.json"]),
        (("plan", "models/one/"), ["models/one/config.json"]),
        (("search", "models/one/"), []),
        (("search", "--recipe", "smol"), ["smollm2-135m"]),
        (("search", "--recipe", "pro"), ["profile.yaml"]),
        (("show", "~/profile.yaml", "--point", ""), ["balanced"]),
        (("show", "my\\ profile.YAML", "--point", ""), ["balanced"]),
        (("show", "'my profile.YAML'", "--point", "b"), ["balanced"]),
        (("inspect", "noth"), []),  # the shell's own file names are better here
        (("search", "demo", "--data", "bu"), ["builtin", "builtin:"]),
        (("search", "demo", "--data", "builtin", ":", "co"), ["code"]),
        (("collect", "demo", "--data", "ruler", ":", "single,v"), ["single,vt"]),
        (("search", "demo", "--data", "text", ":", "notes"), ["notes.txt"]),
        (("search", "demo", "--target", ""), ["density=0.25", "kl=0.01", "drop=1%", "speedup=4"]),
        (("search", "demo", "--target", "density", "="), ["0.25"]),
        (("search", "demo", "--target", "fast", ":", "den"), ["density=0.25"]),
        (("search", "demo", "--target", "fast", ":", "kl", "="), ["0.01"]),
        (("search", "demo", "--objective", ""), list(get_args(choices.Objective))),
        (("search", "demo", "--target", "density=0.2", "--stride", ""), ["4", "8", "16", "32", "64"]),
        (("search", "demo", "--dtype", "b"), ["bfloat16"]),
        (("ablate", "demo", "--table", "s"), ["stride", "selection"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bash_is_offered(folder: Path, words: Sequence[str], expected: list[str]) -> None:
    assert offered(folder, "xcalib", *words) == expected


def test_zsh_gets_whole_words_with_what_they_mean(folder: Path) -> None:
    said = " ".join(offered(folder, "xcalib", "show", "profile.yaml", "--point", "", shell="zsh"))
    assert said == """_arguments '*: :(("balanced":"density=0.25"))'"""
    assert r'"builtin\\:code"' in " ".join(
        offered(folder, "xcalib", "search", "demo", "--data", "builtin:", shell="zsh")
    )


def test_bash_itself_completes(folder: Path) -> None:
    """The script that --show-completion prints, sourced into a bash."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    (folder / "xcalib").write_text(f"#!{bash}\nexec {sys.executable} -P -c '{MAIN}' \"$@\"\n")
    (folder / "xcalib").chmod(0o755)
    environment = {**os.environ, "_XCALIB_COMPLETE": "source_bash", "PATH": f"{folder}:{os.environ['PATH']}"}
    script = subprocess.run(["xcalib"], cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    name = re.findall(r"complete -o default -F (\w+) xcalib", script)[0]
    line = "COMP_WORDS=(xcalib search demo --data builtin : pr); COMP_CWORD=6"
    code = f'{script}\n{line}\n{name} xcalib; echo "${{COMPREPLY[@]}}"'
    environment.pop("_XCALIB_COMPLETE")
    done = subprocess.run(
        [bash, "--norc", "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "prose\n"


@pytest.mark.parametrize(
    ("typed", "whole", "kept"),
    [
        ("--data builtin : co", "--data builtin:co", "builtin:"),
        ("--data = ruler :", "--data ruler:", "ruler:"),
        ("--target density = 0", "--target density=0", "density="),
        ("--target fast : kl = ", "--target fast:kl=", "fast:kl="),
        ("--point = b", "--point b", ""),
        ("--data builtin : co --o", "--data builtin:co --o", ""),
    ],
)
def test_words_that_bash_breaks(typed: str, whole: str, kept: str) -> None:
    words = typed.split(" ")
    assert joined_words(words, len(words) - 1) == (whole.split(" "), kept)


def test_installed_is_told_by_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/zsh")
    assert installed() == ("zsh", False)
    (tmp_path / ".zfunc").mkdir()
    (tmp_path / ".zfunc/_xcalib").touch()
    assert installed() == ("zsh", True)
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert installed() == (None, False)


def imported_by(folder: Path, *arguments: str, **environment: str) -> set[str]:
    """Top-level modules that a command leaves imported."""
    code = "import sys; from xcalib.cli import main\ntry: main()\nfinally: sys.stderr.write(' '.join(sys.modules))\n"
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["search", "--help"],
        ["evaluate", "--help"],
        ["show", "profile.yaml"],
        ["show", "profile.yaml", "--json"],
        ["validate", "profile.yaml"],
        ["diff", "profile.yaml", "profile.yaml"],
    ],
    ids=" ".join,
)
def test_what_needs_no_model_imports_no_torch(folder: Path, arguments: list[str]) -> None:
    loaded = imported_by(folder, *arguments)
    assert "xcalib" in loaded and not loaded & HEAVY
    assert arguments != ["--help"] or not loaded & {"numpy", "pydantic"}


@pytest.mark.parametrize("line", ["xcalib search demo --data builtin:", "xcalib show profile.yaml --point "])
def test_completion_imports_no_torch(folder: Path, line: str) -> None:
    words = line.split(" ")
    environment = {"_XCALIB_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    assert not imported_by(folder, **environment) & HEAVY


def test_lists_of_choices_are_those_that_are_acted_on() -> None:
    """Where the acting module has values of its own for the names."""
    assert tuple(DTYPES) == choices.DTYPE_NAMES
    assert (*PAPER, "breakdown") == choices.ABLATIONS
