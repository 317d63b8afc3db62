"""Strict YAML and JSON text to plain data and back; every fault is one :class:`ProfileError` line.

The readers build only dict, list, str, int, float, bool and None. Anchors, aliases, tags, directives, duplicate keys,
several documents, deep nesting and oversized input are refused before anything is built from them. A plain scalar is a
number, true, false or null exactly where JSON would say so (an empty one and ``~`` are null too); everything else,
``yes``, ``0777`` and ``2024-01-01`` included, is text.
"""

import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from xcalib.errors import ProfileError

__all__ = [
    "MAX_BYTES",
    "Document",
    "decode",
    "fault",
    "load_json",
    "one_line",
    "quote",
    "read_json",
    "read_yaml",
    "unrepeated",
    "write_yaml",
]

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 32
MAX_VALUES = 2_000_000
MAX_KEYS = 1_000  # per mapping: each unknown key becomes an error object
MAX_DIGITS = 20

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?P<real>(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
# A whole JSON string (possessive, so an unclosed one costs one pass) or one bracket.
_JSON_TOKEN = re.compile(r'"(?:[^"\\]+|\\.)*+"?|[\[\]{}]', re.DOTALL)
# Unquoted only where YAML 1.1, YAML 1.2 and this reader all see text; values with digits are quoted to look alike.
_PLAIN_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z_-]*")
_NOT_PLAIN = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def one_line(text: str, limit: int = 300) -> str:
    """``text`` without line breaks and other unprintable characters, cut to ``limit`` characters."""
    flat = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    flat = " ".join(flat.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def quote(value: object) -> str:
    """A short printable form of a value that came from outside."""
    try:
        return one_line(_REPR.repr(value), 80)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "an integer of thousands of digits"


def fault(name: str, line: int | None, text: str) -> ProfileError:
    """The error ``NAME: line N: TEXT``; ``line`` counts from 1, None where it is not known."""
    where = "" if line is None else f"line {line}: "
    return ProfileError(f"{one_line(name)}: {where}{one_line(text, 600)}")


@dataclass(frozen=True)
class Document:
    """A parsed file: its top mapping and, by ``id`` of each dict or list, the line of every child."""

    value: dict[str, Any]
    lines: dict[int, list[int]]

    def line_of(self, path: Sequence[str | int]) -> int | None:
        """Line (from 1) of the deepest node on ``path`` that exists; None where lines were not recorded."""
        node: Any = self.value
        line = 1 if self.lines else None
        for step in path:
            if isinstance(node, dict) and step in node:
                index = list(node).index(step)
            elif isinstance(node, list) and isinstance(step, int) and step < len(node):
                index = step
            else:
                break
            if id(node) not in self.lines:
                return None
            line = self.lines[id(node)][index]
            node = node[step]
        return line


def decode(data: str | bytes, name: str) -> str:
    """UTF-8 text of at most MAX_BYTES without NUL; a byte order mark is dropped."""
    try:
        raw = data.encode() if isinstance(data, str) else data
        if len(raw) > MAX_BYTES:
            raise fault(name, None, f"{len(raw):,} bytes, more than the {MAX_BYTES:,} that are read")
        text = raw.decode("utf-8-sig")
    except UnicodeError as error:
        raise fault(name, None, f"not UTF-8 text: {error.reason if hasattr(error, 'reason') else error}") from None
    if "\0" in text:
        raise fault(name, text.count("\n", 0, text.index("\0")) + 1, "NUL byte: not a text file")
    return text


def unrepeated(pairs: Iterable[tuple[str, Any]], name: str) -> dict[str, Any]:
    """A JSON object of keys that differ."""
    built: dict[str, Any] = {}
    for key, item in pairs:
        if key in built:
            raise fault(name, None, f"duplicate key {quote(key)}")
        built[key] = item
    return built


def load_json(text: str, name: str, **hooks: Any) -> Any:
    """``json.loads`` with one line for what is no JSON, or nested too deep for Python."""
    try:
        return json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        raise fault(name, error.lineno, f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise fault(name, None, "nested too deep") from None


def read_json(text: str, name: str) -> Document:
    """JSON text to data, without lines: :func:`read_yaml` finds those where the text is YAML too."""
    depth = 0
    for token in _JSON_TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        if depth > MAX_DEPTH:
            line = text.count("\n", 0, token.start()) + 1
            raise fault(name, line, f"nested more than {MAX_DEPTH} deep")
    if text.count(",") > MAX_VALUES:
        raise fault(name, None, f"more than {MAX_VALUES:,} values")

    def refuse(word: str) -> NoReturn:
        raise fault(name, None, f"{word} is not a number in JSON")

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > MAX_KEYS:
            raise fault(name, None, f"a mapping of {len(pairs):,} keys, more than {MAX_KEYS:,}")
        return unrepeated(pairs, name)

    def whole(digits: str) -> int:
        return _integer(digits, name, None)

    value = load_json(text, name, object_pairs_hook=mapping, parse_int=whole, parse_constant=refuse)
    return Document(_top(value, name), {})


def read_yaml(text: str, name: str) -> Document:
    """One YAML document to data and lines, built from parser events so that nothing is resolved or constructed."""
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    builder = _Builder(name)
    try:
        for event in yaml.parse(text, Loader=loader):
            builder.feed(event)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
        raise fault(name, None if mark is None else mark.line + 1, f"not YAML: {problem}") from None
    except RecursionError:
        raise fault(name, None, "nested too deep") from None
    if not builder.root:
        raise fault(name, None, "the file is empty")
    return Document(_top(builder.root[0], name), builder.lines)


def _top(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise fault(name, 1, f"the top level must be a mapping, got {quote(value)}")
    return value


def _integer(digits: str, name: str, line: int | None) -> int:
    if len(digits) > MAX_DIGITS:
        raise fault(name, line, f"an integer of {len(digits):,} digits, more than {MAX_DIGITS}")
    return int(digits)


class _Builder:
    """Builds data from YAML events on its own stack, so that the depth of the input never becomes depth of calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root: list[Any] = []
        self.lines: dict[int, list[int]] = {id(self.root): []}
        self.open: list[dict[str, Any] | list[Any]] = [self.root]
        self.keys: list[str | None] = [None]  # per open mapping: the key that waits for its value
        self.values = 0

    def feed(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            self.check(event, line)
            plain = event.implicit[0]
            self.add(self.resolve(event.value, line) if plain else event.value, line)
        elif isinstance(event, yaml.CollectionStartEvent):
            self.check(event, line)
            if len(self.open) > MAX_DEPTH:
                raise fault(self.name, line, f"nested more than {MAX_DEPTH} deep")
            item: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
            self.add(item, line)
            self.lines[id(item)] = []
            self.open.append(item)
            self.keys.append(None)
        elif isinstance(event, yaml.CollectionEndEvent):
            self.open.pop()
            self.keys.pop()
        elif isinstance(event, yaml.AliasEvent):
            raise fault(self.name, line, f"aliases are not allowed, got {quote('*' + str(event.anchor))}")
        elif isinstance(event, yaml.DocumentStartEvent):
            if self.root:
                raise fault(self.name, line, "a second document, expected one")
            if event.version or event.tags:
                raise fault(self.name, line, "YAML directives are not allowed")

    def check(self, event: Any, line: int) -> None:
        if event.tag is not None:
            raise fault(self.name, line, f"tags are not allowed, got {quote(event.tag)}")
        if event.anchor is not None:
            raise fault(self.name, line, f"anchors are not allowed, got {quote('&' + event.anchor)}")
        self.values += 1
        if self.values > MAX_VALUES:
            raise fault(self.name, line, f"more than {MAX_VALUES:,} values")

    def resolve(self, word: str, line: int) -> str | int | float | bool | None:
        match = _NUMBER.fullmatch(word)
        if match is None:
            return _WORDS.get(word, word)
        return float(word) if match["real"] else _integer(word, self.name, line)

    def add(self, item: Any, line: int) -> None:
        container = self.open[-1]
        if isinstance(container, list):
            container.append(item)
            self.lines[id(container)].append(line)
            return
        key = self.keys[-1]
        if key is not None:
            container[key] = item
            self.keys[-1] = None
            return
        if not isinstance(item, str):
            raise fault(self.name, line, f"a key must be text, got {quote(item)}")
        if item in container:
            raise fault(self.name, line, f"duplicate key {quote(item)}")
        if len(container) >= MAX_KEYS:
            raise fault(self.name, line, f"a mapping of more than {MAX_KEYS:,} keys")
        self.keys[-1] = item
        self.lines[id(container)].append(line)


def write_yaml(value: dict[str, Any]) -> str:
    """Block style YAML with every row of numbers on one line.

    Text is quoted wherever some reader could take it for something else, and floats always have a point, so that
    ``yaml.safe_load`` and :func:`read_yaml` read the same, exact values back.
    """
    return "\n".join(_block(value)) + "\n"


def _block(value: dict[str, Any] | Sequence[Any]) -> Iterator[str]:
    children: Iterable[tuple[str, Any]]
    if isinstance(value, dict):
        children = ((f"{_text(key, _PLAIN_KEY)}:", item) for key, item in value.items())
    else:
        children = (("-", item) for item in value)
    for lead, item in children:
        if _is_inline(item):
            yield f"{lead} {_inline(item)}"
        elif lead == "-":  # a container in a list starts on the dash's own line
            for index, line in enumerate(_block(item)):
                yield f"  {line}" if index else f"- {line}"
        else:
            yield lead
            yield from (f"  {line}" for line in _block(item))


def _is_inline(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | float) for item in value)
    return not isinstance(value, dict) or not value


def _inline(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    return "{}" if isinstance(value, dict) else _scalar(value)


def _text(value: str, plain: re.Pattern[str]) -> str:
    if plain.fullmatch(value) and value.lower() not in _NOT_PLAIN:
        return value
    return json.dumps(value, ensure_ascii=False)


def _scalar(value: object) -> str:
    if isinstance(value, str):
        return _text(value, _PLAIN)
    text = json.dumps(value, allow_nan=False)
    if isinstance(value, float) and "." not in text:
        text = text.replace("e", ".0e")  # PyYAML reads 1e-05 as text
    return text
