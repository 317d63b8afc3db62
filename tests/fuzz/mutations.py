"""Changes to valid files, by a ``random.Random`` or what behaves as one, so that hypothesis and atheris share them."""

import json
import re
from typing import Any

WORDS = [
    b"null", b"true", b"false", b"~", b"NaN", b"-Infinity", b"1e999", b"-1", b"-0.0", b"1e-400", b"0x10", b"1_0",
    b"010", b".inf", b"9" * 19, b"9" * 30, b"9" * 4301, b"18446744073709551616", b"[]", b"{}", b"[[]]", b'""', b"''",
    b'"\\ud800"', b'"\\u0000"', b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[31m", b"\xe2\x80\xae",
    b"\x85", b"\r", b"\n", b"\t", b": ", b"- ", b"? ", b"<<: ", b"&a ", b"*a", b"&a [*a, *a]",
    b"!!python/object/apply:os.system ['x']", b"!!binary x", b"%YAML 1.1\n---\n", b"---\n", b"...\n", b"|\n  x",
    b">-", b"[" * 40, b"{" * 40, b"[" * 3000, b'{"a":' * 3000, b"(" * 300, b"-" * 3000, b"+a" * 3000, b"../",
    b"/etc/passwd", b"lambda: ", b"0xf" + b"f" * 5000, b"1j", b"(yield)", b"f'{a}'", b"__import__('os')",
    b"# coding: x\n", b"schema_version", b"content_sha256", b"recipe:", b"trust_remote_code: true", b"os:system",
    b"data_offsets", b"__metadata__",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 64, 0.5, -0.0, 1e300, 1e-320, float("nan"), float("inf"), 2**31, 2**63, 2**64,
    2**70, 10**25, "", "x", "1", "nan", "\x1b[31m", "\ud800", "../../x", "a" * 5000, [], {}, [[]], [None], [0.5],
    [1, "a"], {"a": 1}, [[0.5], [0.1]], [True], "F64", "I64", "BF16", [2**30, 2**30], [0], [0, 0], [8, 0], [0, 2**60],
    "antidiagonal", "jsonl:/etc/passwd", [-1], {"": ""},
]  # fmt: skip


def mutated(rng: Any, data: bytes) -> bytes:
    """One to four changes, of bytes or of what they say."""
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(10)
        if kind < 4:
            data = changed_values(rng, data)
        elif kind < 5:
            data = changed_header(rng, data)
        elif kind < 7:
            data = changed_token(rng, data)
        else:
            data = changed_bytes(rng, data)
    return data


def changed_bytes(rng: Any, data: bytes) -> bytes:
    """Bits flipped, bytes removed, doubled, cut off, or a word of the formats put in."""
    if not data:
        return rng.choice(WORDS)
    at, kind = rng.randrange(len(data)), rng.randrange(6)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[at + rng.choice([1, 1, 2, 10, 200]) :]
    if kind == 2:
        return data[: at + 1] + data[max(0, at - rng.choice([1, 8, 80])) :]
    if kind == 3:
        return data[:at]
    return data[:at] + rng.choice(WORDS) + data[at + (kind == 4) :]


def changed_token(rng: Any, data: bytes) -> bytes:
    """A number, a quoted text or a word replaced."""
    tokens = list(re.finditer(rb'"[^"\n]*"|-?\d[\d.e+-]*|[A-Za-z_]+', data[:20_000]))
    if not tokens:
        return changed_bytes(rng, data)
    token = rng.choice(tokens)
    new = rng.choice([*WORDS, rng.choice(tokens)[0], str(rng.randint(-5, 300)).encode(), b""])
    return data[: token.start()] + new + data[token.end() :]


def changed_values(rng: Any, data: bytes) -> bytes:
    """JSON of which a value, a key or a row is another; YAML and source have their tokens changed instead."""
    try:
        lines = data.split(b"\n") if data.count(b"\n{") else [data]
        index = rng.randrange(len(lines))
        value = json.loads(lines[index])
    except (ValueError, RecursionError):
        return changed_token(rng, data)
    lines[index] = json.dumps(changed(rng, value)).encode()
    return b"\n".join(lines)


def changed(rng: Any, value: Any) -> Any:
    """A copy in which one node is replaced, removed, renamed or doubled."""
    if not isinstance(value, dict | list) or not value or rng.randrange(5) == 0:
        return rng.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[rng.randrange(len(keys))]
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    kind = rng.randrange(8)
    if kind == 0:
        del copy[key]
    elif kind == 1 and isinstance(copy, dict):
        copy[rng.choice(["", "x", "name", str(key) + "_", "__class__"])] = copy.pop(key)
    elif kind == 1:
        copy.insert(key, copy[key])
    else:
        copy[key] = changed(rng, value[key])
    return copy


def changed_header(rng: Any, data: bytes) -> bytes:
    """A safetensors header that says something else, its length right or not."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        return changed_token(rng, data)
    head, rest = data[8 : 8 + length], data[8 + length :]
    head = changed_values(rng, head) if rng.randrange(3) else changed_token(rng, head)
    kind = rng.randrange(8)
    stated = len(head) if kind else rng.choice([0, 1, 2**20, 10**8, 2**63, 2**64 - 1, len(data), len(head) + 1])
    if kind == 1:
        rest = rest[: rng.randrange(len(rest) + 1)]
    elif kind == 2:
        rest += b"\0" * rng.choice([1, 8, 64])
    elif kind == 3 and len(rest) >= 8:
        at = 8 * rng.randrange(len(rest) // 8)
        rest = (
            rest[:at]
            + rng.choice([b"\xff" * 8, b"\0" * 8, b"\0\0\0\0\0\0\xf0\x7f", b"\xff" * 7 + b"\x7f"])
            + rest[at + 8 :]
        )
    return stated.to_bytes(8, "little") + head + rest
