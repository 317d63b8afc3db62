"""The profiles that ship with xcalib: found by name, each with evidence that the committed measurements repeat."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xcalib
from xcalib import profiles
from xcalib.errors import ProfileError
from xcalib.profile import load_profile, make_profile, save_profile
from xcalib.recipe import read_recipe
from xcalib.search import DEFAULT_TARGETS, build_profile

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "docs" / "benchmarks" / "profiles"
Run = Callable[..., tuple[int, str, str]]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("ship", EVIDENCE / "ship.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_are_those_of_the_folder() -> None:
    found = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
    assert list(profiles.names()) == found
    assert "smollm2-135m" in found


@pytest.mark.parametrize("name", profiles.names())
def test_every_point_has_evidence_that_is_committed(name: str) -> None:
    profile = xcalib.load_profile(name)
    measured = json.loads((EVIDENCE / name / "evaluation.json").read_text())
    plans = {plan["name"]: plan for plan in measured["plans"]}
    assert {"published tau=0.97", "tau=0.8"} <= set(plans)  # what the points are held against, from the same run
    for point in profile.points:
        heldout = point.heldout
        assert point.verified is True and heldout is not None and heldout.intervals is not None
        assert heldout.kl == pytest.approx(plans[point.name]["kl"], rel=1e-6)
        assert heldout.density == pytest.approx(plans[point.name]["density"], rel=1e-6)
        assert heldout.samples == measured["samples"] >= 30
    assert profile.recipe is not None and len(profile.recipe["target"]) == len(profile.points)


@pytest.mark.parametrize("name", profiles.names())
def test_the_file_is_what_the_script_makes_of_the_search(name: str) -> None:
    shipped = load_profile(name)
    assert script().shipped(load_profile(EVIDENCE / name / "searched.yaml"), shipped.model.name) == shipped


def test_points_that_held_out_data_refute_are_not_shipped() -> None:
    searched = load_profile(EVIDENCE / "smollm2-135m" / "searched.yaml")
    refuted = [point for point in searched.points if not point.verified]
    assert [point.name for point in refuted] == ["fast"]
    with pytest.raises(SystemExit, match="confirm no point"):
        script().shipped(
            make_profile(**{**dict(searched), "points": tuple(refuted), "default_point": "fast"}), searched.model.name
        )


@pytest.mark.parametrize("name", profiles.names())
def test_the_committed_curves_give_thresholds_for_other_targets(name: str) -> None:
    """Without a GPU, and without the model: what the page says they are there for."""
    from xcalib.collect import load_curve_sets

    found = build_profile(load_curve_sets(EVIDENCE / name / "curves"), DEFAULT_TARGETS[:2])
    shipped = load_profile(name)
    assert found.model.config_sha256 == shipped.model.config_sha256
    assert found.calibration.tokens_sha256 == shipped.calibration.tokens_sha256
    assert found.length_bins == shipped.length_bins


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = load_profile("retrieval-4m")
    save_profile(other, "other.yaml")
    (tmp_path / "other.yaml").rename(tmp_path / "smollm2-135m")
    assert load_profile("smollm2-135m") == other
    assert load_profile("smollm2-135m").model.layers == 6


def test_a_folder_is_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m", "other"):
        (tmp_path / name).mkdir()
    assert load_profile("smollm2-135m").model.layers == 30
    with pytest.raises(ProfileError, match="other: not a file"):
        load_profile("other")


@pytest.mark.parametrize("name", ["smollm3", "gone-7b", "qwen2.5"])
def test_unknown_names_are_told_the_known_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ProfileError,
        match=rf"^{name}: no such file, .* shipped .* there is: retrieval-4m, smollm2-135m(; did you mean .*)?$",
    ):
        load_profile(name)


@pytest.mark.parametrize("name", ["smollm2-135m.yaml", "../smollm2-135m", "./smollm2-135m", "a/../b", ""])
def test_paths_are_never_taken_for_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProfileError, match=r"cannot be read|not a file"):
        load_profile(name)
    with pytest.raises(KeyError):
        profiles.read(name)


def test_profiles_command(run: Run) -> None:
    code, out, _ = run("profiles", "--json")
    assert code == 0
    listed = {one["name"]: one for one in json.loads(out)}
    assert list(listed) == list(profiles.names())
    point = listed["smollm2-135m"]["points"][0]
    assert "thresholds" not in point and point["heldout"]["intervals"]["kl"][0] < point["heldout"]["kl"]
    code, out, err = run("profiles")
    assert code == 0 and not err
    assert "SmolLM2-135M-Instruct" in out and "xcalib search --recipe NAME" in out
    assert f"{point['heldout']['density']:.1%}" in out


def test_commands_take_names(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("validate", "smollm2-135m")[0] == 0
    assert "30 layers" in run("show", "smollm2-135m")[1]
    assert run("search", "--recipe", "smollm2-135m", "--write-recipe", "again.yaml")[0] == 0
    from xcalib.cli.recipes import options_of
    from xcalib.cli.search import search

    recipe = read_recipe(tmp_path / "again.yaml", options_of(search))
    assert recipe["lengths"] == "2048,4096,8192" and recipe["block_size"] == 64
    code, _, err = run("show", "smollm3")
    assert code == 2 and err.count("\n") == 1 and "smollm2-135m" in err


def test_a_function_in_a_shipped_recipe_has_to_be_named_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs" / "benchmarks" / "retrieval")
    command = ["search", "--recipe", "retrieval-4m", "--write-recipe"]
    code, _, err = run(*command, "no.yaml")
    assert code == 2 and "is a function" in err and "give --data" in err and not Path("no.yaml").exists()
    for number, flag in enumerate((["--data", "retrieval_data:samples"], ["-dretrieval_data:samples"])):
        assert run(*command, f"{number}.yaml", *flag)[0] == 0
        assert "retrieval_data:samples" in Path(f"{number}.yaml").read_text()
    code, _, err = run(*command, "no.yaml", "--heldout-data", "builtin")  # another's name does not open this one
    assert code == 2 and "data: 'retrieval_data:samples' is a function" in err


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "tiny", "--profile", "p.yaml"],
        ["report", "p.yaml", "--model", "tiny"],
        ["refine", "p.yaml", "--curves", "c", "--model", "tiny", "--out", "q.yaml"],
    ],
    ids=["evaluate", "report", "refine"],
)
def test_a_profile_never_says_what_is_run(
    command: list[str], run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_folder)
    (tmp_path / "planted.py").write_text("open('ran', 'w').close()\n\ndef samples(*_):\n    return []\n")
    search = ["--max-length", "256", "--num-samples", "1", "--gain-samples", "1", "--block-size", "64", "--work", "c"]
    target = ["--target", "a:density=0.8", "--rounds", "0", "--heldout-samples", "0", "--data", "builtin:prose"]
    assert run("search", "tiny", *search, *target, "--out", "made.yaml")[0] == 0
    (tmp_path / "c").rename(tmp_path / "work")
    (tmp_path / "work" / "curves").rename(tmp_path / "c")
    made = load_profile("made.yaml")
    record = made.calibration.model_copy(update={"sources": ("planted:samples",)})
    save_profile(make_profile(**{**dict(made), "calibration": record}), "p.yaml")
    code, _, err = run(*command)
    assert (code, Path("ran").exists()) == (2, False)
    assert "'planted:samples' is a function, and a profile may not say what is run: give --data" in err


@pytest.mark.model
def test_the_smollm2_profile_serves_the_demo_model() -> None:
    import torch

    from xcalib.models.loading import load_model

    loaded = load_model("demo")
    ids = torch.arange(300, 300 + 512)[None] % 40000
    with torch.no_grad():
        dense = loaded.model(ids).logits
        with xcalib.apply_profile(loaded.model, xcalib.load_profile("smollm2-135m"), "fidelity") as handle:
            sparse = loaded.model(ids).logits
            stats = handle.stats()
    assert stats["sparse_calls"] == 30 and 0 < stats["density"] < 1
    assert bool(torch.isfinite(sparse).all()) and not torch.equal(dense, sparse)
