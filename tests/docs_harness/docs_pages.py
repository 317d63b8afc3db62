"""Fenced blocks of Markdown pages, read by a real parser, and what is checked of a block that is not run.

A page is the README or a file of docs/. Every fence names a language of ``LANGUAGES``, so that none escapes; ``bash``,
``console`` and ``python`` are run (``docs_runner``), ``yaml``, ``json`` and ``toml`` are parsed, ``text`` is output and
is left alone. What is said about a block, before it or in its info string:

- ``<!-- not run: REASON -->`` on the line before: it cannot run in a test. It is still checked here: shell syntax, ``xcalib``
  lines against the real commands and options, ``make`` targets, extras of ``pip install``, paths into the checkout; Python is
  compiled and its imports of xcalib are looked up.
- ``title="NAME"`` in the info string, or a comment ``# NAME`` as the first line: the block is a file of the page's folder by
  that name, for all blocks of the page. A Python file is compiled, and run where a later block runs it.
"""

import ast
import importlib
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from markdown_it import MarkdownIt

from xcalib.cli.app import app
from xcalib.errors import XcalibError
from xcalib.profile import parse_profile
from xcalib.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("bash", "console", "python", "yaml", "json", "toml", "text")

_NOT_RUN = re.compile(r"<!--\s*not run:(.*?)-->\s*$", re.DOTALL)
_FENCE = re.compile(r"^[ >]*(?:```|~~~)")
_OPENER = re.compile(
    r"^(?:!!!|\?\?\?\+?|===[+!]*) "
)  # admonitions and tabs of the site: what is indented below is Markdown
_TITLE = re.compile(r'\btitle="([^"]+)"')
_NAMED = re.compile(r"^# ([\w./-]+\.(?:py|yaml|yml|json|toml|sh))$")
_ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")


class BlockError(Exception):
    """What is wrong with a block: ``page:line: what``."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the page, from the checkout's root.
        line: of the first line inside the fence, from 1.
        language: first word of the info string.
        code: the text inside.
        not_run: the reason, None for a block that is run.
        file: the name of the file that it is, None for none.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str | None = None
    file: str | None = None

    def error(self, message: object, line: int = 0) -> BlockError:
        """An error at ``line`` of the block, from 0."""
        return BlockError(f"{self.page}:{self.line + line}: {message}")


def pages(root: Path = ROOT) -> list[str]:
    """The README and every page of docs/."""
    return ["README.md", *sorted(str(path.relative_to(root)) for path in (root / "docs").rglob("*.md"))]


def blocks_of(text: str, page: str) -> list[Block]:
    """All fenced blocks of a page, nested ones too.

    Raises:
        BlockError: a fence without a known language, indented code, a reason without a block or a block without a reason.
    """
    lines = _unfolded(text.splitlines())
    found, waiting, covered = [], None, set()
    for token in MarkdownIt("commonmark").enable("table").parse("\n".join(lines)):
        start = token.map[0] if token.map else 0
        if token.type == "code_block":
            raise BlockError(f"{page}:{start + 1}: indented code: put it in a fence with a language")
        if token.type == "html_block" and "not run" in token.content:
            match = _NOT_RUN.search(token.content.strip())
            if match is None or not match[1].strip():
                raise BlockError(f"{page}:{start + 1}: must read <!-- not run: REASON -->")
            waiting = (start, match[1].strip())
        elif token.type == "fence":
            covered.update(range(start, token.map[1]))
            found.append(_block(page, start + 2, token.info, token.content, waiting[1] if waiting else None))
            waiting = None
        elif waiting and token.map:
            break
    if waiting:
        raise BlockError(f"{page}:{waiting[0] + 1}: 'not run' stands before no block")
    for number, line in enumerate(lines):
        if _FENCE.match(line) and number not in covered:
            raise BlockError(f"{page}:{number + 1}: a fence that Markdown does not read as one")
    return found


def _block(page: str, line: int, info: str, code: str, not_run: str | None) -> Block:
    language = info.split(maxsplit=1)[0] if info.split() else ""
    if language not in LANGUAGES:
        said = f"language {language!r} is unknown" if language else "a block without a language"
        raise BlockError(f"{page}:{line - 1}: {said}: one of {', '.join(LANGUAGES)}")
    named = _TITLE.search(info) or _NAMED.match(code.partition("\n")[0])
    return Block(page, line, language, code, not_run, named[1] if named and language != "text" else None)


def _unfolded(lines: list[str]) -> list[str]:
    """The lines with what stands in admonitions and tabs brought to their own indentation; none is added or removed."""
    lines = list(lines)
    while True:
        for token in MarkdownIt("commonmark").parse("\n".join(lines)):
            first = token.map[0] if token.map else 0
            if token.type == "paragraph_open" and _OPENER.match(lines[first].lstrip()):
                break
        else:
            return lines
        indent = len(lines[first]) - len(lines[first].lstrip()) + 4
        lines[first] = ""
        for number in range(first + 1, len(lines)):
            if lines[number].strip() and not lines[number].startswith(" " * indent):
                break
            lines[number] = " " * (indent - 4) + lines[number][indent:]


def check_data(block: Block) -> None:
    """Parse a yaml, json or toml block: profiles and recipes by their own readers, JSON whole or by lines.

    Raises:
        BlockError: it cannot be read.
    """
    try:
        if block.language == "toml":
            tomllib.loads(block.code)
        elif block.language == "yaml":
            _check_yaml(block.code)
        else:
            _check_json(block.code)
    except (XcalibError, ValueError) as error:
        raise block.error(error) from None


def _check_yaml(code: str) -> None:
    import yaml

    from xcalib.cli.recipes import options_of

    data = yaml.safe_load(code)
    if isinstance(data, dict) and "schema_version" in data:
        parse_profile(code)
    elif isinstance(data, dict) and {"target", "model", "data"} & data.keys():
        command = next(item.callback for item in app.registered_commands if item.callback.__name__ == "search")
        parse_recipe(code, options_of(command))


def _check_json(code: str) -> None:
    try:
        json.loads(code)
    except ValueError:
        rows = [line for line in code.splitlines() if line.strip()]
        if len(rows) < 2:
            raise
        for row in rows:
            json.loads(row)


def check_not_run(block: Block, root: Path = ROOT) -> None:
    """What can be said of a block without running it.

    Raises:
        BlockError: it could not run anywhere.
    """
    if block.language == "python":
        check_python(block)
    elif block.language in ("bash", "console"):
        done = subprocess.run(["bash", "-n"], input=shell_text(block), capture_output=True, text=True, check=False)
        if done.returncode:
            raise block.error(done.stderr.strip())
        for line, words in commands_of(shell_text(block)):
            try:
                _check_command(words, root)
            except (ValueError, LookupError) as error:
                raise block.error(error.args[0], line) from None
    elif block.language != "text":
        check_data(block)


def check_python(block: Block) -> None:
    """Compile a Python block and look up what it imports from xcalib.

    Raises:
        BlockError: it does not compile, or there is no such name.
    """
    try:
        tree = ast.parse(block.code)
    except SyntaxError as error:
        raise block.error(error.msg, (error.lineno or 1) - 1) from None
    for node in ast.walk(tree):
        for module, name in _imported(node):
            try:
                found = importlib.import_module(module)
                if name and not hasattr(found, name):
                    importlib.import_module(f"{module}.{name}")
            except ImportError as error:
                raise block.error(error, node.lineno - 1) from None  # type: ignore[attr-defined]


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "xcalib":
        yield from ((node.module or "", alias.name) for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "xcalib")


def shell_text(block: Block) -> str:
    """The commands of a bash or console block, as many lines as it has; of a console block those behind ``$``."""
    if block.language == "bash":
        return block.code
    lines, going_on = [], False
    for line in block.code.splitlines():
        is_command = going_on or line.startswith("$ ")
        lines.append(line.removeprefix("$ ") if is_command else "")
        going_on = is_command and line.endswith("\\")
    return "\n".join(lines) + "\n"


def commands_of(text: str) -> Iterator[tuple[int, list[str]]]:
    """The simple commands of shell text: line from 0, and words, without assignments and redirections."""
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        first, line = number, lines[number]
        while line.endswith("\\") and number + 1 < len(lines):
            number += 1
            line = line[:-1] + lines[number]
        number += 1
        words: list[str] = []
        for word in [*_words(line), ";"]:
            if set(word) <= set(";|&()") and word:
                while words and _ASSIGNMENT.match(words[0]):
                    words.pop(0)
                if words:
                    yield first, words
                words = []
            else:
                words.append(word)


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&()<>")
    lexer.whitespace_split = True
    words = list(lexer)
    for at in [at for at, word in enumerate(words) if set(word) <= set("<>&") and word not in ("&", "&&")][::-1]:
        del words[at : at + 2]
    return words


def _check_command(words: list[str], root: Path) -> None:
    program, arguments = Path(words[0]).name, words[1:]
    if "-m" in arguments and arguments[arguments.index("-m") + 1 :][:1] == ["xcalib"]:  # python, torchrun
        program, arguments = "xcalib", arguments[arguments.index("-m") + 2 :]
    if program == "xcalib":
        parse_command([re.sub(r"^\$\{?\w+\}?$", "1", argument) for argument in arguments])
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text("utf-8"), re.MULTILINE))
        for name in arguments:
            if not name.startswith("-") and "=" not in name and name not in targets:
                raise LookupError(f"make {name}: the Makefile has no such target")
    elif program in ("pip", "pip3", "uv") or arguments[:2] == ["-m", "pip"]:
        known = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        for extra in re.findall(r"(?:xcalib|\.)\[([\w,-]+)\]", " ".join(arguments)):
            if unknown := set(extra.split(",")) - known.keys():
                raise LookupError(f"pip install: xcalib has no extra {', '.join(sorted(unknown))}")
    for word in words:
        if re.match(r"^(?:docs|tests|profiles|kernels)/[\w./-]+\.\w+$", word) and not (root / word).exists():
            raise LookupError(f"{word}: no such file in the checkout")


AT_ONCE = ("--install-completion", "--show-completion")


def parse_command(arguments: list[str]) -> None:
    """Read ``xcalib ARGUMENTS`` as the program does, and run nothing.

    Raises:
        ValueError: no such command or option, or a value that does not do.
    """
    group: Any = typer.main.get_command(app)
    if arguments and arguments[0] in AT_ONCE:  # these act while they are read: the shell's files would change
        if not any(arguments[0] in option.opts for option in group.params):
            raise ValueError(f"xcalib {arguments[0]}: no such option")
        return
    usage_error: Any = typer.BadParameter.__bases__[0]
    try:
        context = group.make_context("xcalib", list(arguments))
        name, command, rest = group.resolve_command(context, list(arguments))
        command.make_context(name, rest, parent=context)
    except typer.Exit:  # --help, --version
        return
    except (usage_error, XcalibError) as error:
        said = error.format_message() if isinstance(error, usage_error) else str(error)
        raise ValueError(f"xcalib {shlex.join(arguments)}: {said}") from None
