"""What ``xcalib diff`` finds between two profiles, and what it refuses to compare."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xcalib.cli import main
from xcalib.errors import ProfileError
from xcalib.interop import compare_profiles
from xcalib.profile import Profile, make_profile, parse_profile, save_profile

DOC = (Path(__file__).parent.parent / "docs" / "profile-format.md").read_text("utf-8")
A = parse_profile(re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)[0])


def changed(**fields: Any) -> Profile:
    return make_profile(**{**dict(A), **fields})


def with_taus(taus: dict[tuple[int, int, int], float], **point: Any) -> Profile:
    """The example with other thresholds at ``(bin, layer, head)``, and other fields of its point."""
    rows = [[list(row) for row in layers] for layers in A.points[0].thresholds]
    for (index, layer, head), tau in taus.items():
        rows[index][layer][head] = tau
    return changed(points=({**dict(A.points[0]), "thresholds": rows, **point},))


def test_identical() -> None:
    found = compare_profiles(A, A)
    assert (found.identical, found.settings, found.points[0].moved) == (True, (), ())
    assert found.points[0].heads == 24


def test_moved_heads_largest_first() -> None:
    taus = {(0, 1, 0): 0.95, (1, 2, 3): 0.9, (0, 2, 1): 0.1}
    (part,) = compare_profiles(A, with_taus(taus)).points
    assert [(head.layer, head.head, head.min_length, head.max_length) for head in part.moved] == [
        (2, 3, 8192, None),
        (2, 1, 1024, 8192),
        (1, 0, 1024, 8192),
    ]
    assert [(head.before, head.after) for head in part.moved] == [(0.1, 0.9), (0.7, 0.1), (0.9, 0.95)]
    assert part.mean_change == pytest.approx((0.8 - 0.6 + 0.05) / 24)


def test_measures_and_settings() -> None:
    other = with_taus({}, predicted={"density": 0.3, "kl": 0.01}, heldout=None, verified=False, target="kl=0.01")
    found = compare_profiles(A, other)
    assert {what: (a, b) for what, a, b in found.points[0].measures} == {
        "predicted density": (0.251, 0.3),
        "predicted kl": (0.0123, 0.01),
        "heldout density": (0.262, None),
        "heldout kl": (0.0141, None),
    }
    settings = {key: (a, b) for key, a, b in found.settings}
    assert settings == {"balanced.target": ("density=0.25", "kl=0.01"), "balanced.verified": (True, False)}
    method = {**A.method.model_dump(), "stride": 16}
    named = {**A.model.model_dump(), "name": "tuned"}
    settings = {key: (a, b) for key, a, b in compare_profiles(A, changed(method=method, model=named)).settings}
    assert settings == {"method.stride": (8, 16), "model.name": ("tiny/llama", "tuned")}
    recent = changed(method={**A.method.model_dump(), "order": "recent"})
    assert compare_profiles(A, recent).settings == (("method.order", "score", "recent"),)


def test_other_bins_are_compared_where_both_serve() -> None:
    point = {**dict(A.points[0]), "thresholds": A.points[0].thresholds[:1]}
    one = changed(length_bins=({"min_length": 4096, "max_length": None},), points=(point,))
    (part,) = compare_profiles(A, one).points
    assert part.heads == 24
    assert {(head.min_length, head.max_length) for head in part.moved} == {(8192, None)}
    apart = changed(length_bins=({"min_length": 16, "max_length": 1024},), points=(point,))
    assert compare_profiles(A, apart).points[0].heads == 0


def test_points_without_a_namesake() -> None:
    points = with_taus({(0, 1, 0): 0.5}).points
    other = changed(points=({**dict(points[0]), "name": "fast"},), default_point="fast")
    assert compare_profiles(A, other).points[0].names == ("balanced", "fast")
    assert compare_profiles(A, other, "balanced:fast").points[0].names == ("balanced", "fast")
    with pytest.raises(ProfileError, match="B: no operating point 'balanced'; this profile has: fast"):
        compare_profiles(A, other, "balanced")


MODELS = {
    "layers": {"layers": 4},
    "query_heads": {"query_heads": 8},
    "kv_heads": {"kv_heads": 1},
    "head_dim": {"head_dim": 32},
    "model_type": {"model_type": "qwen3"},
    "config_sha256": {"config_sha256": "0" * 64},
}


def of_another_model(field: str) -> Profile:
    model = {**A.model.model_dump(), **MODELS[field]}
    rows = [[[1.0] * model["query_heads"]] * model["layers"]] * 2
    return changed(model=model, points=({**dict(A.points[0]), "thresholds": rows},))


@pytest.mark.parametrize("field", MODELS)
def test_other_models_are_refused(field: str) -> None:
    with pytest.raises(ProfileError, match=f"different models cannot be compared: {field} is "):
        compare_profiles(A, of_another_model(field))


# --- the command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    save_profile(A, "a.yaml")
    save_profile(with_taus({(0, 1, 0): 0.95, (1, 2, 3): 0.9}), "b.yaml")
    save_profile(of_another_model("layers"), "other.yaml")
    return lambda *arguments: run("diff", *arguments)


def test_what_is_printed(run: Run) -> None:
    code, out, err = run("a.yaml", "b.yaml")
    assert (code, out) == (0, "")
    assert "balanced: 2 of 24 heads moved: 2 up, 0 down, mean change of all +0.0354" in err
    assert re.search(r"2 +3 +0\.1000 +0\.9000 +\+0\.8000 +8,192 and more", err)
    assert re.search(r"1 +0 +0\.9000 +0\.9500 +\+0\.0500 +1,024 to 8,191", err)
    assert re.search(r"balanced +predicted density +0\.251 +0\.251 +\+0", err)
    assert re.search(r"held-out KL +0\.0141", err)
    assert max(len(line) for line in err.splitlines()) <= 80


def test_limit_and_json(run: Run) -> None:
    code, out, err = run("a.yaml", "b.yaml", "--limit", "1", "--json")
    assert code == 0
    assert "the 1 that moved most" in err
    assert "0.9500" not in err
    found = json.loads(out)
    assert (found["a"], found["b"], found["identical"]) == ("a.yaml", "b.yaml", False)
    assert [head["after"] for head in found["points"][0]["moved"]] == [0.9, 0.95]
    assert "largest change" not in run("a.yaml", "b.yaml", "--limit", "0")[2]


def test_hashes_and_versions_are_named_only(run: Run) -> None:
    calibration = {**A.calibration.model_dump(), "tokens_sha256": "a" * 64, "seed": 8}
    save_profile(changed(calibration=calibration, versions={"xcalib": "9"}), "c.yaml")
    _, out, err = run("a.yaml", "c.yaml", "--json")
    assert "in --json too: calibration.tokens_sha256, versions.xcalib, versions.torch" in err
    assert "a" * 12 not in err
    assert re.search(r"calibration\.seed +7 +8", err)
    assert {"setting": "versions.xcalib", "a": "0.1.0", "b": "9"} in json.loads(out)["settings"]


def test_identical_files(run: Run) -> None:
    assert run("a.yaml", "a.yaml") == (0, "", "identical: both have the same content\n")


def test_markup_in_names_is_printed_as_it_is(run: Run) -> None:
    save_profile(changed(model={**A.model.model_dump(), "name": "[red]x[/red]"}), "odd.yaml")
    assert "[red]x[/red]" in run("a.yaml", "odd.yaml")[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.yaml", "other.yaml"], "different models cannot be compared: layers is 3 in A"),
        (["a.yaml", "gone.yaml"], r"gone\.yaml: cannot be read"),
        (["a.yaml", "b.yaml", "--point", "no"], "A: no operating point 'no'; this profile has: balanced"),
        (["a.yaml", "b.yaml", "--point", "balanced:no"], "B: no operating point 'no'"),
        (["a.yaml", "b.yaml", "--limit", "-1"], "limit"),
        (["a.yaml"], "'B'"),
    ],
)
def test_refusals(run: Run, arguments: list[str], said: str) -> None:
    code, out, err = run(*arguments, "--json")
    assert (code, out) == (2, "")
    assert err.count("error:") == 1
    assert re.search(said, err), err


@pytest.mark.parametrize("command", ["diff", "convert"])
def test_help_has_an_example(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["xcalib", command, "--help"])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert re.search(rf"Example: .*xcalib {command}", out)
    assert "--json" in out
