"""Profiles as data and as files: exact round trips, whole writes, light imports, and docs that tell the truth."""

import json
import os
import pickle
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from xcalib import _yaml
from xcalib.errors import ProfileError
from xcalib.profile import (
    Profile,
    content_sha256,
    dump_profile,
    json_schema,
    load_profile,
    make_profile,
    parse_profile,
    save_profile,
)

ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs" / "profile-format.md").read_text("utf-8")
EXAMPLE = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)[0]

Format = Literal["yaml", "json"]
both_formats = pytest.mark.parametrize("format", ["yaml", "json"])
# Text that readers like to take for something else, and numbers whose shortest form has no point.
AWKWARD_TEXT = [
    "1e10",
    "0777",
    "yes",
    "null",
    "~",
    "2024-01-01",
    "12:30",
    "*a",
    "&a",
    "!x",
    "- a",
    "a: b",
    "#",
    "'",
    '"',
]
AWKWARD_TAUS = [1e-05, 5e-324, 1e-300, 0.1 + 0.2, 1 - 2**-53, 1 / 3, 0.0, 1.0]


@pytest.fixture
def profile() -> Profile:
    return parse_profile(EXAMPLE)


def with_thresholds(profile: Profile, taus: list[list[float]], **fields: Any) -> Profile:
    """``profile`` with one length bin, no dense layer, and these thresholds[layer][head]."""
    model = {**profile.model.model_dump(), "layers": len(taus), "query_heads": len(taus[0]), "kv_heads": 1}
    points = ({**profile.points[0].model_dump(), "thresholds": [taus]},)
    shape = {"model": model, "points": points, "dense_layers": (), "length_bins": profile.length_bins[:1]}
    return make_profile(**{**dict(profile), **shape, **fields})


@both_formats
def test_round_trip_of_the_example(profile: Profile, format: Format) -> None:
    assert parse_profile(dump_profile(profile, format=format)) == profile


@both_formats
@settings(max_examples=60, deadline=None)
@given(
    taus=st.integers(1, 5).flatmap(
        lambda heads: st.lists(
            st.lists(st.floats(0, 1) | st.sampled_from(AWKWARD_TAUS), min_size=heads, max_size=heads),
            min_size=1,
            max_size=4,
        )
    ),
    text=st.sampled_from(AWKWARD_TEXT) | st.text(min_size=1, max_size=40).filter(str.isprintable),
    error=st.floats(0, allow_infinity=False, allow_nan=False),
)
def test_round_trip_is_exact(format: Format, taus: list[list[float]], text: str, error: float) -> None:
    base = parse_profile(EXAMPLE)
    bound = {"cost": 0.5, "error": error, "lower_bound": 1e22, "gap": None}
    made = with_thresholds(base, taus, versions={text: text})
    point = {**made.points[0].model_dump(), "bound": bound, "target": text}
    made = make_profile(**{**dict(made), "points": [point]})

    dumped = dump_profile(made, format=format)
    read = parse_profile(dumped)

    assert read == made
    assert [list(map(repr, row)) for row in read.points[0].thresholds[0]] == [list(map(repr, row)) for row in taus]
    assert yaml.safe_load(dumped) == made.model_dump(mode="json") or format == "json"
    assert format == "yaml" or json.loads(dumped) == made.model_dump(mode="json")


def test_one_layer_per_line(profile: Profile) -> None:
    assert "        - [0.95, 0.7, 1.0, 1.0e-05]\n" in dump_profile(profile)


def test_content_hash_can_be_checked_without_xcalib_and_covers_everything(profile: Profile) -> None:
    data = yaml.safe_load(dump_profile(profile))
    assert content_sha256(data) == data["content_sha256"] == profile.content_sha256
    changed = make_profile(**{**dict(profile), "versions": {"xcalib": "9"}})
    assert changed.content_sha256 != profile.content_sha256
    assert make_profile(**{**dict(changed), "versions": profile.versions}) == profile


def test_edited_file_is_refused(profile: Profile) -> None:
    with pytest.raises(ProfileError, match=r"^p\.yaml: line \d+: content_sha256: .*edited by hand.*re-save with"):
        parse_profile(EXAMPLE.replace("0.85", "0.84"), name="p.yaml")
    with pytest.raises(ProfileError, match="does not match its content_sha256"):
        dump_profile(profile.model_copy(update={"default_point": "other"}))


def test_profile_is_immutable_hashable_and_picklable(profile: Profile) -> None:
    with pytest.raises(ValueError, match="frozen"):
        profile.default_point = "other"
    with pytest.raises(TypeError, match="immutable"):
        profile.versions["torch"] = "3"
    with pytest.raises(TypeError, match="immutable"):
        profile.calibration.dropped.clear()
    assert pickle.loads(pickle.dumps(profile)) == profile
    assert hash(pickle.loads(pickle.dumps(profile))) == hash(profile)


def test_point_by_name_default_and_unknown(profile: Profile) -> None:
    assert profile.point() is profile.point("balanced") is profile.points[0]
    with pytest.raises(ProfileError, match=r"^no operating point 'fast'; this profile has: balanced$"):
        profile.point("fast")


@pytest.mark.parametrize("name", ["p.yaml", "p.yml", "p.json", "P.JSON"])
def test_save_and_load(profile: Profile, tmp_path: Path, name: str) -> None:
    save_profile(profile, tmp_path / name)
    assert load_profile(tmp_path / name) == load_profile(str(tmp_path / name)) == profile
    assert [file.name for file in tmp_path.iterdir()] == [name]
    is_json = (tmp_path / name).read_text("utf-8").startswith("{")
    assert is_json == name.lower().endswith("json")


def test_save_respects_umask_and_follows_links(profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "link.yaml").symlink_to(tmp_path / "real.yaml")
    old = os.umask(0o027)
    try:
        save_profile(profile, tmp_path / "link.yaml")
    finally:
        os.umask(old)
    assert (tmp_path / "link.yaml").is_symlink()
    assert stat.S_IMODE((tmp_path / "real.yaml").stat().st_mode) == 0o640


def test_failed_save_leaves_the_old_file_and_nothing_else(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProfileError, match="cannot be written: No space left on device"):
        save_profile(profile, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["p.yaml"]


def test_save_refuses_other_suffixes_folders_and_profiles_that_would_not_load(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"must end in \.yaml, \.yml or \.json, got '\.txt'"):
        save_profile(profile, tmp_path / "p.txt")
    with pytest.raises(ProfileError, match="cannot be written: No such file"):
        save_profile(profile, tmp_path / "no" / "p.yaml")
    (tmp_path / "d.yaml").mkdir()
    with pytest.raises(ProfileError, match="cannot be written: Is a directory"):
        save_profile(profile, tmp_path / "d.yaml")
    broken = profile.model_copy(update={"default_point": "other"})
    broken = broken.model_copy(update={"content_sha256": content_sha256(broken.model_dump())})
    with pytest.raises(ProfileError, match="no point called 'other'"):
        save_profile(broken, tmp_path / "p.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.yaml: cannot be read: No such file or directory"):
        load_profile(tmp_path / "none.yaml")
    with pytest.raises(ProfileError, match="not a file"):
        load_profile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ProfileError, match="not a file"):
        load_profile(tmp_path / "pipe")
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile("a\0b")
    with pytest.raises(ProfileError, match="cannot be read: File name too long"):
        load_profile("a" * 5000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(EXAMPLE)
    (tmp_path / "p.yaml").chmod(0)
    with pytest.raises(ProfileError, match="cannot be read: Permission denied"):
        load_profile(tmp_path / "p.yaml")


def test_too_large_a_file_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "p.yaml").open("wb") as file:
        file.truncate(2**40)  # sparse: reading it whole would take a terabyte
    with pytest.raises(ProfileError, match=r"more than the 16,777,216"):
        load_profile(tmp_path / "p.yaml")


@both_formats
def test_80_layers_of_800_heads_and_3_points_load_quickly(profile: Profile, format: Format) -> None:
    row = [index / 7919 for index in range(800)]
    large = with_thresholds(profile, [row] * 80)
    points = [large.points[0].model_copy(update={"name": name}) for name in ("balanced", "b", "c")]
    text = dump_profile(make_profile(**{**dict(large), "points": points}), format=format)
    start = time.perf_counter()
    parse_profile(text)
    # 0.6 s on an idle core; the limit leaves room for a busy machine.
    assert time.perf_counter() - start < (5 if yaml.__with_libyaml__ else 60)


def test_reader_without_libyaml_reads_the_same(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert parse_profile(dump_profile(profile)) == profile
    with pytest.raises(ProfileError, match="nested more than 32 deep"):
        parse_profile("[" * 100_000)
    with pytest.raises(ProfileError, match=r"line 2: not YAML"):
        parse_profile("a: 1\n\tb: 2")


def test_yaml_scalars_are_read_as_in_json() -> None:
    words = {"1": 1, "-1": -1, "1.5e3": 1500.0, "1e-05": 1e-05, "true": True, "null": None, "~": None, "": None}
    texts = ["yes", "no", "0777", "0x1f", "1_000", "2024-01-01", "12:30:00", ".nan", ".inf", "+1", "NaN", "True", "="]
    for word, value in {**words, **{text: text for text in texts}}.items():
        read = _yaml.read_yaml(f"key: {word}", "f").value["key"]
        assert (type(read), read) == (type(value), value)


def test_import_is_light() -> None:
    code = "import sys, xcalib.profile; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "pydantic" in loaded
    assert not loaded & {"torch", "transformers", "optuna", "typer", "rich", "numpy", "triton"}


def test_published_schema_is_current() -> None:
    published = json.loads((ROOT / "docs" / "profile.schema.json").read_text("utf-8"))
    assert published == json_schema()  # else write json.dumps(json_schema(), indent=2) and a line break there


def test_documented_example_is_what_is_written(profile: Profile) -> None:
    assert dump_profile(profile) == EXAMPLE


def test_documented_message_is_the_one_given() -> None:
    message = re.findall(r"`(profile\.yaml: line .*?)`", DOC)[0]
    with pytest.raises(ProfileError) as caught:
        parse_profile(EXAMPLE.replace("[0.9, 0.85", "[1.5, 0.85"), name="profile.yaml")
    assert str(caught.value) == message


def test_documented_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profile.yaml").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL):
        exec(block, scope)
    assert load_profile("profile.json") == load_profile("profile.yaml") == parse_profile(EXAMPLE)
