"""Runs the blocks of a page, in order, in one folder.

bash blocks are run by a real bash, so that pipes, redirections, globs and variables do what a reader's shell does. Its PATH
holds ``PROGRAMS`` and nothing else: any other program fails the block, which then has to say why it is not run. ``xcalib`` and
``python FILE.py`` there are stubs that hand their arguments over a socket to the test's process, where they run for real
without the seconds that importing torch takes. The script ends at the first command that fails (``set -euo pipefail``).

What differs from a reader's machine, all of it here:

- MODEL ``demo`` is the tiny random model of tests/conftest.py, with more positions (``docs_folder``).
- Options that a block leaves out have the defaults of ``SMALL``, and samples ``LENGTH`` tokens, in place of the real ones.
- A block that makes ``profile.yaml`` or ``curves`` (``--out``) finds none: the folder's own go first, once.
- Thresholds of a random model may miss their target on held-out text (exit code 3). ``xcalib search`` is then run again with
  ``--resume --force``, as its message says; ``xcalib.search`` has ``force=True``, and Python blocks may warn
  of such points, and of those that samples so short leave out.

A failing page: ``pytest tests/test_docs.py -k 'quickstart'``; the message has page, line and all that the command printed.
"""

import contextlib
import io
import itertools
import json
import os
import runpy
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docs_pages
import pytest
from docs_pages import Block

from xcalib.errors import XcalibWarning

PROGRAMS = ("cat", "cp", "diff", "env", "grep", "head", "ls", "mkdir", "mv", "rm", "sed", "sort", "tail", "tee", "wc")
LENGTH = 512
_SAMPLES = {"num_samples": 2, "block_size": 64, "gain_samples": 1}
SMALL: dict[str, dict[str, Any]] = {
    "collect": _SAMPLES,
    "search": {**_SAMPLES, "heldout_samples": 2, "rounds": 0},
    "evaluate": {"num_samples": 2},
    "ablate": {"num_samples": 2, "heldout_samples": 2, "max_length": 768, "every": 9},
    "refine": {"trials": 3, "samples": 2, "validation_samples": 2, "heldout_samples": 2},
}
STUB = """#!{python} -IS
import json, os, socket, sys
name, arguments = {name!r}, sys.argv[1:]
if name == "python" and arguments[:2] == ["-m", "xcalib"]:
    name, arguments = "xcalib", arguments[2:]
if name == "python" and not (arguments and arguments[0].endswith(".py")):
    os.execv({python!r}, [{python!r}, *arguments])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = {{"name": name, "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}}
    server.sendall(json.dumps(request).encode() + b"\\n")
    reply = json.loads(server.makefile("rb").read())
sys.stdout.write(reply["out"])
sys.stdout.flush()
sys.stderr.write(reply["err"])
sys.exit(reply["code"])
"""
PRELUDE = "set -Eeuo pipefail; trap 'echo $LINENO >&3' ERR; "  # one line: it shares the block's first


def shrink(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """``demo`` is ``model`` from here on, and the sizes that a block leaves out are small."""
    from xcalib.cli import app, demo, options
    from xcalib.collect import CollectSettings
    from xcalib.models import loading
    from xcalib.search import profiles

    source = loading._source
    monkeypatch.setattr(loading, "_source", lambda name: source(str(model) if name == "demo" else name))
    monkeypatch.setattr(app.app.info, "context_settings", {"default_map": SMALL})
    monkeypatch.setattr(options, "DEFAULT_LENGTH", LENGTH)
    amount = profiles.CalibrationData(num_samples=2, heldout_samples=2, max_length=2 * LENGTH)
    settings = CollectSettings(block_size=64, gain_samples=1)
    for key, value in {"amount": amount, "settings": settings, "rounds": 0, "force": True}.items():
        monkeypatch.setitem(profiles.search.__kwdefaults__, key, value)
    for name, value in {"DEMO_SAMPLES": 3, "DEMO_HELDOUT": 2, "DEMO_LENGTH": LENGTH}.items():
        monkeypatch.setattr(demo, name, value)


class Page:
    """Runs blocks in ``folder``; Python blocks share ``names``."""

    def __init__(self, folder: Path, names: dict[str, Any]) -> None:
        self.folder, self.names = folder, {"__name__": "__page__", **names}
        self._provided = {folder / name for name in ("profile.yaml", "curves")}

    def run(self, blocks: list[Block]) -> None:
        """All blocks, in order.

        Raises:
            BlockError: one of them fails; the message names page and line.
        """
        for block in reversed(blocks):  # of one name the first stays
            if block.file is not None and block.not_run is None:
                path = self.folder / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.code, "utf-8")
        for block in blocks:
            with contextlib.chdir(self.folder):
                self._one(block)

    def _one(self, block: Block) -> None:
        if block.not_run is not None:
            docs_pages.check_not_run(block)
            return
        if block.language in ("yaml", "json", "toml"):
            docs_pages.check_data(block)
        if block.file is not None:
            if block.language == "python":
                docs_pages.check_python(block)
            (self.folder / block.file).write_text(block.code, "utf-8")
        elif block.language in ("bash", "console"):
            self._bash(block)
        elif block.language == "python":
            self._python(block)

    def _python(self, block: Block) -> None:
        # empty lines before it: tracebacks have the page's line numbers, and its text
        source = "\n" * (block.line - 1) + block.code
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", ".*(missed on held-out data|is not verified|out of reach)", XcalibWarning
                )
                exec(compile(source, str(docs_pages.ROOT / block.page), "exec"), self.names)
        except Exception as error:
            trace = traceback.extract_tb(error.__traceback__)
            inside = [frame.lineno for frame in trace if frame.filename.endswith(block.page)]
            line = (inside[-1] or block.line) - block.line if inside else 0
            raise block.error(f"{type(error).__name__}: {error}\n{traceback.format_exc()}", line) from error

    def _bash(self, block: Block) -> None:
        with (
            tempfile.TemporaryDirectory(prefix="xcalib-docs-") as place,
            _Server(Path(place), self._provided) as server,
        ):
            code, printed, line = server.run(docs_pages.shell_text(block), self.folder)
        if code:
            words = printed.strip() or "nothing was printed"
            raise block.error(f"exit code {code}; the block printed:\n{words}", max(line - 1, 0))


class _Server:
    """Runs bash, and in this process what its ``xcalib`` and ``python FILE.py`` ask for."""

    def __init__(self, place: Path, provided: set[Path]) -> None:
        self.place, self._provided = place, provided
        self._socket = socket.socket(socket.AF_UNIX)
        address = str(place / "socket")
        self._socket.bind(address)
        self._socket.listen()
        programs = place / "bin"
        programs.mkdir()
        for name in PROGRAMS:
            (programs / name).symlink_to(shutil.which(name) or f"/bin/{name}")
        for name in ("xcalib", "python"):
            stub = programs / name
            stub.write_text(STUB.format(python=sys.executable, name=name, address=address), "utf-8")
            stub.chmod(0o755)
        (programs / "python3").symlink_to("python")

    def __enter__(self) -> "_Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def run(self, text: str, folder: Path) -> tuple[int, str, int]:
        """Exit code, all that was printed, and the line of ``text``, from 1, of the command that failed."""
        script, printed, lines = self.place / "block.sh", self.place / "printed", self.place / "lines"
        script.write_text(f"{PRELUDE}{text}\nwait\n", "utf-8")
        environment = {**os.environ, "PATH": str(self.place / "bin")}
        with printed.open("wb") as out, lines.open("wb") as failed:
            bash = subprocess.Popen(
                [shutil.which("bash") or "/bin/bash", "-c", f'exec 3>&{failed.fileno()}; source "$0"', script],
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                pass_fds=[failed.fileno()],
            )  # fmt: skip
            try:
                while bash.poll() is None:
                    if select.select([self._socket], [], [], 0.05)[0]:
                        self._answer()
            finally:
                bash.kill()
                bash.wait()
        said = lines.read_text("utf-8").split()
        return bash.returncode, printed.read_text("utf-8", "replace"), int(said[0]) if said else 0

    def _make_way(self, arguments: list[str], folder: Path) -> None:
        for option, value in itertools.pairwise(arguments):
            path = folder / value
            if option in ("--out", "-o") and path in self._provided:
                self._provided.remove(path)
                path.unlink() if path.is_file() else shutil.rmtree(path)

    def _answer(self) -> None:
        connection, _ = self._socket.accept()
        with connection, connection.makefile("rb") as stream:
            request = json.loads(stream.readline())
            self._make_way(request["arguments"], Path(request["folder"]))
            reply = in_process(**request)
            if reply["code"] == 3 and request["arguments"][:1] == ["search"]:
                again = in_process(**{**request, "arguments": [*request["arguments"], "--resume", "--force"]})
                reply = {**again, "err": reply["err"] + again["err"]}
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(json.dumps(reply).encode())


def in_process(name: str, arguments: list[str], folder: str, environment: dict[str, str]) -> dict[str, Any]:
    """``xcalib ARGUMENTS``, or the Python file ``arguments[0]``, as a process of its own would run it."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with _as_program(arguments, folder, environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = _call(name, arguments)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                err.write(f"{stop.code}\n")
        except BaseException:
            code = 1
            err.write(traceback.format_exc())
    texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)]  # type: ignore[attr-defined]
    return {"out": texts[0], "err": texts[1], "code": code}


def _call(name: str, arguments: list[str]) -> int:
    if name == "xcalib":
        from xcalib.cli import main

        sys.argv = ["xcalib", *arguments]
        main()
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


@contextlib.contextmanager
def _as_program(arguments: list[str], folder: str, environment: dict[str, str]) -> Iterator[None]:
    """The process's folder, environment, arguments, modules and warnings are the program's for a while."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), contextlib.chdir(folder):
        warnings.simplefilter("default")
        for key in set(os.environ) - set(environment):
            patch.delenv(key)
        for key, value in environment.items():
            if os.environ.get(key) != value:
                patch.setenv(key, value)
        patch.setenv("PATH", os.defpath)
        patch.setattr(sys, "argv", list(arguments))
        patch.setattr(sys, "path", list(sys.path))
        before = set(sys.modules)
        yield
        for name in set(sys.modules) - before:  # a data function of one page is not another's
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(folder):
                del sys.modules[name]
