"""Damaged and hostile files: each is a valid profile or one line of ProfileError, and nothing in it ever runs."""

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xcalib.errors import ProfileError
from xcalib.profile import Profile, dump_profile, load_profile, make_profile, parse_profile

DOC = (Path(__file__).parent.parent / "docs" / "profile-format.md").read_text("utf-8")
EXAMPLE = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)[0]
AS_JSON = dump_profile(parse_profile(EXAMPLE), format="json")

NUMBERS = [
    "nan",
    ".nan",
    "NaN",
    ".inf",
    "-.inf",
    "Infinity",
    "1e999",
    "-1",
    "-0.0",
    "1.5",
    "0x10",
    "010",
    "1_0",
    "1e-05",
]
NUMBERS += ["9" * 19, "9" * 30, "9" * 5000, "1e5", "0", "1.", "+1", "1:30", "true"]
VALUES = [
    "null",
    "true",
    "yes",
    "[]",
    "{}",
    "[1]",
    "{a: 1}",
    "text",
    '"text"',
    '"\\e[31m"',
    "2024-01-01",
    "''",
    "|\n  x",
]
ATTACKS = [
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/apply:subprocess.check_output [['touch', '{canary}']]",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/name:os.system ''",
    "!!python/module:os ''",
    "!!binary aGVsbG8=",
    "!!set {{a, b}}",
    "!!timestamp 2024-01-01",
    "!custom x",
    "! x",
    "&a [*a]",
    "*a",
    "&a 1",
    "<<: {{}}",
    "? [a]\n: b",
    "%YAML 1.1",
    "\x1b[31m",
    "\ufeff",
    "\x85",
    "[" * 200,
]

Mutation = Callable[[random.Random, str, str], str | bytes]


def flip_bytes(rng: random.Random, text: str, canary: str) -> bytes:
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut_or_insert_bytes(rng: random.Random, text: str, canary: str) -> bytes:
    data = bytearray(text.encode())
    at = rng.randrange(len(data))
    if rng.random() < 0.5:
        del data[at : at + rng.choice([1, 1, 2, 10, 200])]
    else:
        data[at:at] = rng.randbytes(rng.choice([1, 2, 8]))
    return bytes(data)


def truncate(rng: random.Random, text: str, canary: str) -> str:
    return text[: rng.randrange(len(text))]


def change_lines(rng: random.Random, text: str, canary: str) -> str:
    lines = text.splitlines()
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.choice(["drop", "double", "move", "swap", "indent"])
    if kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "move":
        lines.insert(other, lines.pop(at))
    elif kind == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at] = rng.choice([" ", "  ", "\t"]) + lines[at]
    return "\n".join(lines)


def change_key(rng: random.Random, text: str, canary: str) -> str:
    keys = list(re.finditer(r'"?\b[a-z_0-9]+"?:', text))
    key = rng.choice(keys)
    new = rng.choice(["renamed:", "1:", "null:", "[]:", '"a\\nb":', "", "<<:", rng.choice(keys)[0]])
    return text[: key.start()] + new + text[key.end() :]


def change_number(rng: random.Random, text: str, canary: str) -> str:
    number = rng.choice(list(re.finditer(r"(?<![\w.])-?\d+(\.\d+)?(e-?\d+)?(?![\w.])", text)))
    return text[: number.start()] + rng.choice(NUMBERS) + text[number.end() :]


def change_value(rng: random.Random, text: str, canary: str) -> str:
    value = rng.choice(list(re.finditer(r"(?<=: )[^\n,]+|(?<=- )[^\n,]+", text)))
    new = rng.choice([*VALUES, *(attack.format(canary=canary) for attack in ATTACKS)])
    return text[: value.start()] + new + text[value.end() :]


def insert_attack(rng: random.Random, text: str, canary: str) -> str:
    attack = rng.choice(ATTACKS).format(canary=canary)
    starts = [0, *(match.end() for match in re.finditer(r"\n|: |- |\[", text))]
    at = rng.choice(starts)
    return text[:at] + attack + rng.choice(["", " ", "\n", ", "]) + text[at:]


def change_data(rng: random.Random, text: str, canary: str) -> str:
    """Well-formed and of the right hash as far as one can be made: only the schema stands in the way."""
    data: Any = parse_profile(text).model_dump(mode="json")
    node, key = data, rng.choice(list(data))
    while rng.random() < 0.7 and isinstance(node[key], dict | list) and node[key]:
        node = node[key]
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    new: list[Any] = [None, True, -1, 0, 1, 0.5, 2**70, 1e300, "", "x", "1", [], {}, [[]], [0.5], {"a": 1}]
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice(new)
    try:
        return dump_profile(make_profile(**data))
    except ProfileError:
        return json.dumps(data)


MUTATIONS: list[Mutation] = [
    flip_bytes,
    cut_or_insert_bytes,
    truncate,
    change_lines,
    change_key,
    change_number,
    change_value,
    insert_attack,
    change_data,
]


def outcome(read: Callable[[], Profile]) -> bool:
    """True for a profile, False for one line of ProfileError; any other exception comes through."""
    try:
        profile = read()
    except ProfileError as error:
        message = str(error)
        assert message.isprintable()
        assert 0 < len(message) < 1200
        return False
    assert isinstance(profile, Profile)
    assert parse_profile(dump_profile(profile)) == profile
    return True


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("base", [EXAMPLE, AS_JSON], ids=["yaml", "json"])
def test_mutated_file_is_a_profile_or_one_line(mutate: Mutation, base: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "ran", tmp_path / "p.yaml"
    rng = random.Random(f"{mutate.__name__} {len(base)}")
    valid = 0
    for number in range(120):  # times 18: 2,160 files
        text = mutate(rng, base, str(canary))
        if number % 3 == 0:
            text = mutate(rng, text, str(canary)) if isinstance(text, str) and mutate in COMPOSABLE else text
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if number % 10 == 0:
            path.write_bytes(data)
            valid += outcome(lambda: load_profile(path))
        else:
            valid += outcome(lambda data=data: parse_profile(data))  # type: ignore[misc]
        outcome(lambda data=data: parse_profile(data, json=base is AS_JSON))  # type: ignore[misc]
        assert not canary.exists()
    assert valid < 60  # comments, spaces and what the hash cannot see; the rest is noticed


COMPOSABLE = (change_lines, insert_attack)

HOSTILE: dict[str, str | bytes] = {
    "empty": "",
    "only a comment": "# x",
    "only a document start": "---",
    "scalar": "x",
    "list": "[1]",
    "NUL": "a: \0",
    "UTF-16": EXAMPLE.encode("utf-16"),
    "latin-1": "a: \xe9".encode("latin-1"),
    "lone surrogate": "a: \ud800",
    "escaped surrogate": '{"a": "\\ud800"}',
    "escaped surrogate as a key": '{"\\ud800": 1}',
    "control characters": "a: \x1b[31m",
    "two documents": EXAMPLE + "---\n" + EXAMPLE,
    "empty second document": EXAMPLE + "---\n",
    "directive": "%YAML 1.1\n---\n" + EXAMPLE,
    "unknown directive and key": "%FOO\n---\na: 1",
    "duplicate key": "a: 1\na: 2",
    "duplicate key in JSON": '{"a": {"b": 1, "b": 2}}',
    "key that is a list": "? [a]\n: 1",
    "key that is a number": "1: 2",
    "merge key": "<<: {a: 1}",
    "laughs": "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in ("ab", "bc", "cd", "de")),
    "alias to itself": "a: &a {b: *a}",
    "many keys": "\n".join(f"k{index}: 1" for index in range(5000)),
    "many keys in JSON": json.dumps({f"k{index}": 1 for index in range(5000)}),
    "integer of 5,000 digits": "schema_version: " + "1" * 5000,
    "integer of 5,000 digits in JSON": '{"schema_version": ' + "1" * 5000 + "}",
    "NaN in JSON": '{"schema_version": NaN}',
    "lists 100,000 deep": "[" * 100_000,
    "lists 100,000 deep and closed": "a: " + "[" * 100_000 + "]" * 100_000,
    "mappings 100,000 deep": "{a: " * 100_000,
    "JSON mappings 100,000 deep": '{"a":' * 100_000,
    "JSON lists 100,000 deep": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "dashes 100,000 deep": "- " * 100_000,
    "complex keys 100,000 deep": "? " * 100_000,
    "indented 3,000 deep": "\n".join(" " * depth + "a:" for depth in range(3000)),
    "unclosed string": '{"' + "\\" * 2_000_000,
    "escapes": '{"' + '\\"' * 2_000_000,
    "quotes": "'" * 2_000_000,
    "wrong values": '{"points": [' + "{}," * 100_000 + "{}]}",
    "wrong rows": '{"points": [{"thresholds": [' + "[2]," * 100_000 + "[2]]}]}",
    "17 MiB": "#" * (17 * 2**20),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("as_json", [None, True, False], ids=["guess", "json", "yaml"])
def test_hostile_text_is_one_line_and_quick(name: str, as_json: bool | None) -> None:
    start = time.perf_counter()
    assert outcome(lambda: parse_profile(HOSTILE[name], json=as_json)) is False
    assert time.perf_counter() - start < 20  # none takes more than about 1 s with libyaml; nothing here is quadratic


def message_of(text: str | bytes) -> str:
    with pytest.raises(ProfileError) as caught:
        parse_profile(text, name="f")
    return str(caught.value)


def test_messages_name_what_is_refused() -> None:
    assert message_of("a: 1\nb: 2\na: 3") == "f: line 3: duplicate key 'a'"
    assert message_of('{"a": 1,\n "a": 2}') == "f: duplicate key 'a'"
    assert message_of("a: 1\nb: &x 2") == "f: line 2: anchors are not allowed, got '&x'"
    assert message_of("a: 1\nb: *x") == "f: line 2: aliases are not allowed, got '*x'"
    assert message_of("a: !!int 2") == "f: line 1: tags are not allowed, got 'tag:yaml.org,2002:int'"
    assert message_of("---\n---\n") == "f: line 2: a second document, expected one"
    assert message_of("- 1") == "f: line 1: the top level must be a mapping, got [1]"
    assert message_of("1: 1") == "f: line 1: a key must be text, got 1"
    assert message_of("a: 1\nb: \0") == "f: line 2: NUL byte: not a text file"
    assert message_of(b"\xff") == "f: not UTF-8 text: invalid start byte"
    assert message_of("a: [1\n") == "f: line 2: not YAML: did not find expected ',' or ']'"
    assert message_of('{"a": 1') == "f: line 1: not JSON: Expecting ',' delimiter (column 8)"
    assert message_of("") == message_of("# nothing\n") == "f: the file is empty"


def test_file_names_cannot_write_on_the_terminal() -> None:
    with pytest.raises(ProfileError) as caught:
        parse_profile("a: 1", name="x\x1b[31m\ny" + "z" * 5000)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
