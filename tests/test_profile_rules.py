"""Every rule of the schema, with the line, the key, the rule and the value in its message."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xcalib.errors import ProfileError
from xcalib.profile import Profile, make_profile, parse_profile

DOC = (Path(__file__).parent.parent / "docs" / "profile-format.md").read_text("utf-8")
EXAMPLE = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)[0]

KeyPath = tuple[str | int, ...]
FIRST = ("points", 0)
TAUS = (*FIRST, "thresholds")


def fields() -> dict[str, Any]:
    data: dict[str, Any] = parse_profile(EXAMPLE).model_dump(mode="json")
    return data


def put(path: KeyPath, value: object) -> dict[str, Any]:
    data = fields()
    node: Any = data
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    return data


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(ProfileError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable()
    return message


WRONG_VALUES: list[tuple[KeyPath, object, str]] = [
    (("schema_version",), 2, "schema_version: must be 1, got 2"),
    (("schema_version",), True, "schema_version: must be an integer, got True"),
    (("method", "stride"), 12, "method.stride: must be 4, 8, 16, 32 or 64, got 12"),
    (("method", "stride"), 16.0, "method.stride: must be an integer, got 16.0"),
    (("method", "block_size"), "64", "method.block_size: must be an integer, got '64'"),
    (("method", "order"), "newest", "method.order: must be 'score' or 'recent', got 'newest'"),
    (("method", "order"), None, "method.order: must be 'score' or 'recent', got None"),
    (
        ("method", "pattern"),
        "diag",
        "method.pattern: must be 'antidiagonal', 'diagonal', 'random' or 'rows', got 'diag'",
    ),
    (("model",), [], "model: must be a mapping, got []"),
    (("model", "name"), "", "model.name: must have at least 1 character, got ''"),
    (("model", "name"), "a\x1b[31m", r"model.name: must be printable text, got 'a\x1b[31m'"),
    (("model", "name"), "a\nb", r"model.name: must be printable text, got 'a\nb'"),
    (("model", "name"), "a\u202eb", r"model.name: must be printable text, got 'a\u202eb'"),
    (("model", "name"), "x" * 2000, "model.name: must have at most 1000 characters, got 'xxx"),
    (("model", "commit"), 5, "model.commit: must be a valid string, got 5"),
    (("model", "layers"), 0, "model.layers: must be greater than or equal to 1, got 0"),
    (("model", "layers"), True, "model.layers: must be a valid integer, got True"),
    (("model", "layers"), 3.0, "model.layers: must be a valid integer, got 3.0"),
    (("model", "layers"), 2**63, "model.layers: must be less than or equal to 9223372036854775807"),
    (("model", "kv_heads"), 3, "model: kv_heads must divide query_heads, got 3 and 4"),
    (("model", "config_sha256"), "AB" * 32, "model.config_sha256: must match pattern '^[0-9a-f]{64}$', got 'ABAB"),
    (("dense_layers",), [3], "dense_layers[0]: layer 3, the model has 3, counted from 0"),
    (("dense_layers",), [1, 0], "dense_layers[1]: must be sorted and unique, got 0 after 1"),
    (("dense_layers",), [0, 0], "dense_layers[1]: must be sorted and unique, got 0 after 0"),
    (("dense_layers",), [-1], "dense_layers[0]: must be greater than or equal to 0, got -1"),
    (("dense_layers",), 0, "dense_layers: must be a list, got 0"),
    (("dense_layers",), [0, 1], "points[0].thresholds[0][1]: layer 1 is one of dense_layers: every"),
    (("length_bins",), [], "length_bins: must have at least 1 item after validation, not 0, got []"),
    (("length_bins", 0, "max_length"), 1024, "length_bins[0]: max_length must be above min_length, got 1024 and 1024"),
    (("length_bins", 0, "max_length"), None, "length_bins[0].max_length: only the last bin may be without an end"),
    (("length_bins", 1, "min_length"), 9000, "length_bins[1].min_length: must be 8192, where the bin before ends, got"),
    (("length_bins", 1, "min_length"), 8000, "length_bins[1].min_length: must be 8192, where the bin before ends, got"),
    (("length_bins", 0, "min_length"), -1, "length_bins[0].min_length: must be greater than or equal to 0, got -1"),
    (("points",), [], "points: must have at least 1 item after validation, not 0, got []"),
    ((*FIRST, "name"), "Fast", "points[0].name: must match pattern '^[a-z][a-z0-9_-]{0,31}$', got 'Fast'"),
    ((*FIRST, "name"), "a\n", r"points[0].name: must match pattern '^[a-z][a-z0-9_-]{0,31}$', got 'a\n'"),
    ((*FIRST, "name"), "other", "default_point: no point called 'balanced'; there is: other"),
    ((*FIRST, "method"), "dp", "points[0].method: must be 'knapsack', 'paper', 'uniform' or 'imported', got 'dp'"),
    ((*FIRST, "predicted", "density"), 1.1, "points[0].predicted.density: must be less than or equal to 1, got 1.1"),
    ((*FIRST, "predicted", "kl"), -1, "points[0].predicted.kl: must be greater than or equal to 0, got -1"),
    ((*FIRST, "predicted", "kl"), None, "points[0].predicted.kl: must be a valid number, got None"),
    ((*FIRST, "heldout", "accuracy"), 90, "points[0].heldout.accuracy: must be less than or equal to 1, got 90"),
    ((*FIRST, "heldout", "samples"), 0, "points[0].heldout.samples: must be greater than or equal to 1, got 0"),
    ((*FIRST, "bound", "gap"), -0.5, "points[0].bound.gap: must be greater than or equal to 0, got -0.5"),
    ((*TAUS, 0, 1, 2), 1.5, "points[0].thresholds[0][1][2]: must be less than or equal to 1, got 1.5"),
    ((*TAUS, 0, 1, 2), -0.1, "points[0].thresholds[0][1][2]: must be greater than or equal to 0, got -0.1"),
    ((*TAUS, 0, 1, 2), "0.5", "points[0].thresholds[0][1][2]: must be a valid number, got '0.5'"),
    ((*TAUS, 0, 1, 2), True, "points[0].thresholds[0][1][2]: must be a valid number, got True"),
    ((*TAUS, 0, 1, 2), None, "points[0].thresholds[0][1][2]: must be a valid number, got None"),
    ((*TAUS, 1, 0, 3), 0.5, "points[0].thresholds[1][0]: layer 0 is one of dense_layers: every threshold must be 1.0"),
    ((*TAUS, 1, 2), [0.5] * 3, "points[0].thresholds[1][2]: 3 heads, the model has 4"),
    ((*TAUS, 1), [[1.0] * 4] * 2, "points[0].thresholds[1]: 2 layers, the model has 3"),
    (TAUS, [[[1.0] * 4] * 3], "points[0].thresholds: 1 length bins, the profile has 2"),
    (("default_point",), "none", "default_point: no point called 'none'; there is: balanced"),
    (("calibration", "max_length"), 5, "calibration: max_length must not be below min_length, got 5 and 2048"),
    (("calibration", "seed"), "7", "calibration.seed: must be a valid integer, got '7'"),
    (("calibration", "sources"), "wiki", "calibration.sources: must be a list, got 'wiki'"),
    (("calibration", "documents"), ["xyz"], "calibration.documents[0]: must match pattern '^[0-9a-f]{8,128}$', got"),
    (("calibration", "dropped"), {"short": -1}, "calibration.dropped.short: must be greater than or equal to 0, got"),
    (("calibration", "dropped"), {"a\x07": 1}, r"calibration.dropped['a\x07']: must be printable text, got 'a\x07'"),
    (("versions",), {"torch": 2.11}, "versions.torch: must be a valid string, got 2.11"),
    (("versions",), {"": "1"}, "versions['']: must have at least 1 character, got ''"),
    (("versions",), [], "versions: must be a mapping, got []"),
    (("content_sha256",), "0" * 63, "content_sha256: must match pattern"),
    (("extra",), 1, "extra: unknown key"),
    (("x" * 900,), 1, "['xxx"),
    (("method", "stide"), 16, "method.stide: unknown key"),
    ((*FIRST, "a b\x1b"), 16, r"points[0]['a b\x1b']: unknown key"),
]


@pytest.mark.parametrize(("path", "value", "expected"), WRONG_VALUES, ids=[case[2][:50] for case in WRONG_VALUES])
def test_wrong_value(path: KeyPath, value: object, expected: str) -> None:
    text = json.dumps(put(path, value), indent=1)
    message = message_of(lambda: parse_profile(text, name="p.json"))
    assert re.fullmatch(r"p\.json: line \d+: .*", message)
    assert message.partition(": line ")[2].partition(": ")[2].startswith(expected)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "1" * 5000])
@pytest.mark.parametrize("path", [(*TAUS, 0, 1, 2), (*FIRST, "bound", "error"), ("calibration", "seed")], ids=str)
def test_number_that_is_none(path: KeyPath, number: str) -> None:
    text = json.dumps(put(path, "HERE")).replace('"HERE"', number)
    as_json = message_of(lambda: parse_profile(text, json=True))
    as_yaml = message_of(lambda: parse_profile(text, json=False))
    assert "line 1: " in as_yaml
    if number[-1] == "1":
        assert f"an integer of {len(number):,} digits" in as_json
    elif "e999" in number:
        assert "must be" in as_json
    else:
        assert f"{number} is not a number in JSON" in as_json


def test_second_point_of_the_same_name_and_wrong_default() -> None:
    data = fields()
    data["points"] = [data["points"][0]] * 2
    assert "points[1].name: a second point called balanced" in message_of(lambda: make_profile(**data))


@pytest.mark.parametrize(
    "path", [("method",), ("method", "stride"), ("model", "commit"), (*FIRST, "thresholds")], ids=str
)
def test_missing_key(path: KeyPath) -> None:
    data = fields()
    node: Any = data
    for step in path[:-1]:
        node = node[step]
    del node[path[-1]]
    if path[-1] == "commit":  # None is its default
        assert make_profile(**data).model.commit is None
    else:
        assert message_of(lambda: make_profile(**data)).endswith(f"{path[-1]}: is missing")


def test_defaults_are_filled_in_and_hashed() -> None:
    data = fields()
    for section, key in (("model", "commit"), ("method", "pattern"), ("calibration", "gain_samples")):
        del data[section][key]
    for key in ("heldout", "bound", "verified"):
        del data["points"][0][key]
    made = make_profile(**data)
    assert (made.method.pattern, made.calibration.gain_samples) == ("antidiagonal", 0)
    assert parse_profile(json.dumps(made.model_dump(mode="json"))) == made


def test_integers_stand_for_floats_but_not_the_reverse() -> None:
    data = put((*TAUS, 0, 1), [1, 0, 1, 0])
    made = make_profile(**data)
    assert made.points[0].thresholds[0][1] == (1.0, 0.0, 1.0, 0.0)
    assert {type(tau) for tau in made.points[0].thresholds[0][1]} == {float}


def test_more_errors_are_counted() -> None:
    data = put(("method", "stride"), 3)
    data["model"]["layers"] = 0
    assert message_of(lambda: make_profile(**data)).endswith("got 3 (and 1 more)")


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("head_dim: 64", "head_dim: -64", "model.head_dim: must be greater than or equal to 1, got -64"),
        ("[0.8, 0.75", "[0.8, 7.5", "points[0].thresholds[1][1][1]: must be less than or equal to 1, got 7.5"),
        ("seed: 7", "seed: seven", "calibration.seed: must be a valid integer, got 'seven'"),
        ("stride: 8", "strides: 8", "method.stride: is missing (and 1 more)"),
    ],
)
def test_line_is_that_of_the_value(right: str, wrong: str, expected: str) -> None:
    number = EXAMPLE[: EXAMPLE.index(right)].count("\n") + 1
    if "missing" in expected:
        number -= 1  # a missing key has its parent's line
    text = EXAMPLE.replace(right, wrong, 1)
    assert message_of(lambda: parse_profile(text, name="f")) == f"f: line {number}: {expected}"


def test_json_that_is_not_yaml_names_the_key_only() -> None:
    data = put(("method", "stride"), 3)
    data["versions"] = {"\U0001f600": "1"}  # a pair of surrogate escapes
    message = message_of(lambda: parse_profile(json.dumps(data), name="f"))
    assert message == "f: method.stride: must be 4, 8, 16, 32 or 64, got 3"


def test_invalid_instances_are_validated_again() -> None:
    profile = parse_profile(EXAMPLE)
    point = profile.points[0].model_copy(update={"method": "none"})
    assert "points[0].method" in message_of(lambda: make_profile(**{**dict(profile), "points": [point]}))
    assert isinstance(make_profile(**dict(profile)), Profile)


def test_numbers_no_python_can_print() -> None:
    assert "thousands of digits" in message_of(lambda: make_profile(**put(("method", "stride"), 10**5000)))
    assert "thousands of digits" in message_of(lambda: make_profile(**put((*TAUS, 0, 1, 1), 10**5000)))
