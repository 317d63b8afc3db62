"""What the shell offers after a tab. Nothing here imports torch: an answer has to come at once.

Where a function offers nothing, the shell completes file names by itself.
"""

import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from xcalib.choices import PROFILE_SUFFIXES
from xcalib.errors import XcalibError

__all__ = [
    "COMPLETING",
    "complete_config",
    "complete_data",
    "complete_model",
    "complete_point",
    "complete_profile",
    "complete_target",
    "installed",
    "offering",
    "whole_words",
]

Offers = list[tuple[str, str]]  # what is offered, and a word about it

COMPLETING = "_XCALIB_COMPLETE"  # set by the shell's function: this process answers it
_SCRIPTS = {
    "bash": ".bash_completions/xcalib.sh",
    "zsh": ".zfunc/_xcalib",
    "fish": ".config/fish/completions/xcalib.fish",
}


def offering(*values: object) -> Callable[[str], Offers]:
    """A completion of fixed values."""

    def complete(incomplete: str) -> Offers:
        return [(str(value), "") for value in values if str(value).startswith(incomplete)]

    return complete


def complete_model(incomplete: str) -> Offers:
    """``demo``, folders with a config.json, and .gguf files."""
    return _demo(incomplete) + _paths(incomplete, _is_model)


def complete_config(incomplete: str) -> Offers:
    """As :func:`complete_model`, and a config.json alone, for what reads no weights."""
    return _demo(incomplete) + _paths(incomplete, lambda path: _is_model(path) or path.name == "config.json")


def _demo(incomplete: str) -> Offers:
    return [("demo", "SmolLM2-135M, of the extra `demo`")] if "demo".startswith(incomplete) else []


def _is_model(path: Path) -> bool:
    return path.suffix == ".gguf" or (path / "config.json").is_file()


def complete_profile(incomplete: str) -> Offers:
    """Files that a profile may be, and the names of shipped profiles."""
    return _shipped(incomplete) + _paths(
        incomplete, lambda path: path.suffix.lower() in PROFILE_SUFFIXES and path.is_file()
    )


def _shipped(incomplete: str) -> Offers:
    from xcalib import profiles

    return [(name, "shipped with xcalib") for name in profiles.names() if name.startswith(incomplete)]


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> Offers:
    """Files and folders that are ``wanted``, and the folders between; nothing where only these would be left."""
    typed, _, start = incomplete.rpartition("/")
    folder = Path(typed + "/" if typed or incomplete.startswith("/") else ".").expanduser()
    try:
        entries = sorted(path for path in folder.iterdir() if path.name.startswith(start))
        hidden = not start.startswith(".")
        entries = [path for path in entries if not (hidden and path.name.startswith("."))]
        found = [path for path in entries if wanted(path)]
        folders = [path for path in entries if path.is_dir() and path not in found]
    except OSError:
        return []
    prefix = incomplete[: len(incomplete) - len(start)]
    if not found:
        return []
    return [(prefix + path.name, "") for path in found] + [(f"{prefix}{path.name}/", "") for path in folders]


def complete_point(incomplete: str) -> Offers:
    """Operating points of the first profile that the line names."""
    from xcalib.profile import load_profile

    shipped = {name for name, _ in _shipped("")}
    for word in _typed_words():
        file = Path(word).expanduser()
        if word not in shipped and not (file.suffix.lower() in PROFILE_SUFFIXES and file.is_file()):
            continue
        try:
            points = load_profile(file if file.is_file() else word).points
        except (XcalibError, OSError):
            continue
        return [(point.name, point.target) for point in points if point.name.startswith(incomplete)]
    return []


def _typed_words() -> list[str]:
    """The words of the line as the command will get them, but for ``~``; an option's value stands alone."""
    # Not from the parsed parameters: a line that ends in an option without its value has lost its arguments.
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    try:
        words = shlex.split(line)
    except ValueError:  # a quote that is still open
        words = line.split()
    return [word.partition("=")[2] if word.startswith("--") and "=" in word else word for word in words]


def complete_data(incomplete: str) -> Offers:
    """Kinds of data, and after ``builtin:`` and ``ruler:`` their categories and tasks, also behind a comma."""
    from xcalib.data import RULER_TASKS, TASKS, categories

    kind, colon, rest = incomplete.partition(":")
    if not colon:
        kinds = {
            "builtin": "the shipped corpus", "builtin:": "a category of it", "ruler": "tasks in the style of RULER",
            "ruler:": "a task of it", "text:": "a file, a folder or a glob", "jsonl:": "a file of documents or questions",
            "hf:": "a dataset of the Hub",
        }  # fmt: skip
        return [(name, about) for name, about in kinds.items() if name.startswith(incomplete)]
    if kind in ("text", "jsonl"):
        return [(f"{kind}:{path}", "") for path, _ in _paths(rest, Path.exists)]
    names: dict[str, Sequence[str]] = {
        "builtin": categories(),
        "ruler": ("all", *dict.fromkeys((*TASKS, *RULER_TASKS))),
    }
    before, comma, last = rest.rpartition(",")
    given = {*before.split(",")} if comma else set()
    return [
        (f"{kind}:{before}{comma}{name}", "")
        for name in names.get(kind, ())
        if name.startswith(last) and name not in given
    ]


def complete_target(incomplete: str) -> Offers:
    """One example of each kind of target, also behind the name of a point."""
    name, colon, typed = incomplete.rpartition(":")
    kinds = {
        "density=0.25": "share of blocks computed",
        "kl=0.01": "nats per token from the dense model",
        "drop=1%": "share of the dense model's accuracy",
        "speedup=4": "of attention, by blocks",
    }
    return [(name + colon + example, about) for example, about in kinds.items() if example.startswith(typed)]


@contextmanager
def whole_words() -> Iterator[None]:
    """Within bash's completion: words that it breaks at ``:`` and ``=`` are one word, and answers lack what it keeps."""
    words, index = os.environ.get("COMP_WORDS", "").split("\n"), os.environ.get("COMP_CWORD", "")
    words = words[0].split(" ") if len(words) == 1 else words
    if not index.isdigit() or int(index) > len(words):
        yield
        return
    words, cut = joined_words(words, int(index))
    os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    answer = io.StringIO()
    try:
        with redirect_stdout(answer):
            yield
    finally:
        lines = answer.getvalue().splitlines()
        sys.stdout.write("".join(f"{line.removeprefix(cut)}\n" for line in lines))


def joined_words(words: Sequence[str], index: int) -> tuple[list[str], str]:
    """Bash's words up to the one at ``index``, put together again, and the part of the last that bash leaves as it is.

    ``--data builtin : co`` is ``--data builtin:co``; the ``=`` between an option and its value goes.
    """
    given = [*words[: index + 1], *[""] * (index + 1 - len(words))]
    found: list[str] = []
    glue, cut = "", ""
    for word in given:
        after_option = bool(found) and found[-1].startswith("--")
        if word in (":", "=") and found and not (word == "=" and after_option):
            found[-1] += word
            glue, cut = word, found[-1]
        elif word == "=" and after_option:
            glue, cut = "--", ""
        elif glue in (":", "="):
            found[-1] += word
            glue = ""
        else:
            found.append(word)
            glue, cut = "", ""
    if glue == "--":
        found.append("")
    return found, cut


def installed() -> tuple[str | None, bool]:
    """The user's shell by its name, None where it is unknown, and whether xcalib's completion is installed for it."""
    shell = Path(os.environ.get("SHELL", "")).name
    if shell not in _SCRIPTS:
        return None, False
    return shell, (Path.home() / _SCRIPTS[shell]).is_file()
