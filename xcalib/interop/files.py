"""Text files of other tools: read whole within a limit, JSON without repeated keys, and JSON with one row a line."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xcalib import _yaml
from xcalib._reading import read_regular

__all__ = ["MAX_BYTES", "json_text", "parse_json", "read_file"]

MAX_DEPTH = 32
MAX_BYTES = 4 * 2**20  # a table of 128 layers and 128 heads has 0.4 MiB


def read_file(path: Path) -> tuple[bytes, str]:
    """The bytes of a file, MAX_BYTES at most, and their UTF-8 text; ProfileError, one line, where they cannot be had."""
    name = str(path)
    data = read_regular(name, MAX_BYTES)
    return data, _yaml.decode(data, name)


def parse_json(text: str, name: str) -> Any:
    """JSON as Python reads it, NaN and infinities included; ProfileError for anything else and for a repeated key."""

    try:
        value = _yaml.load_json(text, name, object_pairs_hook=lambda pairs: _yaml.unrepeated(pairs, name))
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        raise _yaml.fault(name, None, f"not JSON: {error}") from None
    level, depth = [value], 0
    while level := [child for item in level for child in _children(item)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _yaml.fault(name, None, f"nested more than {MAX_DEPTH} deep")
    return value


def _children(item: Any) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def json_text(value: Any, *, indent: int = 0) -> str:
    """JSON text, two spaces a level, keys in their order, and a list of plain values on one line.

    Floats are written as Python's repr writes them, so that they come back exactly.
    """
    deeper, here = " " * (indent + 2), " " * indent
    if isinstance(value, dict) and value:
        keys = (json.dumps(key) for key in value)
        items = (json_text(item, indent=indent + 2) for item in value.values())
        lines = ",\n".join(f"{deeper}{key}: {item}" for key, item in zip(keys, items, strict=True))
        return f"{{\n{lines}\n{here}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value):
        lines = ",\n".join(deeper + json_text(item, indent=indent + 2) for item in value)
        return f"[\n{lines}\n{here}]"
    return json.dumps(value)
