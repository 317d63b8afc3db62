"""What only some objectives need: measured when asked for, kept with the curves, resumed, and searched by."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import xcalib
from xcalib.collect import CollectSettings, Curves, collect, load_curve_sets, load_curves
from xcalib.collect.curves import ARRAYS, save_curves
from xcalib.collect.fisher import FisherMeter, square_roots
from xcalib.data import load_samples
from xcalib.errors import CurvesError, ModelError, TargetError
from xcalib.kernels.mass import dropped_mass
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.loading import load_model
from xcalib.profile import load_profile
from xcalib.search import Tables, Target, build_profile, parse_targets, plan_point

Build = Callable[..., Any]
Run = Callable[..., tuple[int, str, str]]

PLAIN = CollectSettings(block_size=64, grid=(0.0, 0.4, 0.6, 0.8, 1.0), gain_samples=1, gain_every=15)
SETTINGS = dataclasses.replace(PLAIN, measures=("fisher", "mass"))


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Any:
    return load_model(str(tiny_folder))


@pytest.fixture(scope="module")
def samples(loaded: Any) -> Any:
    return load_samples(["builtin:prose"], loaded.tokenizer, num_samples=3, max_length=384, min_length=300)


@pytest.fixture(scope="module")
def whole(loaded: Any, samples: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Curves, Path]:
    """An uninterrupted collection with both measures."""
    folder = tmp_path_factory.mktemp("whole")
    return collect(loaded.model, samples, folder, settings=SETTINGS, name="tiny"), folder


@pytest.fixture(scope="module")
def without(loaded: Any, samples: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Curves, Path]:
    folder = tmp_path_factory.mktemp("without")
    return collect(loaded.model, samples, folder, settings=PLAIN, name="tiny"), folder


def arrays_of(curves: Curves) -> tuple[np.ndarray, np.ndarray]:
    assert curves.fisher is not None and curves.mass is not None
    return curves.fisher, curves.mass


# --- what is measured


def test_fisher_is_pooled_over_samples(whole: tuple[Curves, Path], loaded: Any, samples: Any) -> None:
    """Errors of each sample, weighted with the gradients of all."""
    fisher, _ = arrays_of(whole[0])
    meter, layers = FisherMeter(loaded.model, SETTINGS), whole[0].layers
    tokens = [torch.tensor(sample.tokens) for sample in samples.samples]
    grams = [meter.gram(sample, layers, seed) for seed, sample in enumerate(tokens)]
    covariance = np.sum(grams, axis=0) / sum(map(len, tokens))
    roots = {layer: square_roots(covariance[row]) for row, layer in enumerate(layers)}
    assert fisher.shape == whole[0].error.shape
    for index, sample in enumerate(tokens):
        np.testing.assert_allclose(fisher[index], meter.errors(sample, roots), rtol=1e-6)
    positions = sum(len(range(14, len(sample), 15)) for sample in tokens)
    kl = whole[0].fisher_kl
    assert kl is not None
    np.testing.assert_allclose(kl, fisher.sum(axis=0) / positions)


def test_mass_is_summed_over_tokens(whole: tuple[Curves, Path], loaded: Any, samples: Any) -> None:
    _, mass = arrays_of(whole[0])
    grid = torch.tensor(SETTINGS.grid, dtype=torch.float64)
    found: dict[int, np.ndarray] = {}

    def compute(call: AttentionCall) -> None:
        how = {"block_size": 64, "scale": call.scale, "order": SETTINGS.order, "pattern": SETTINGS.pattern}
        found[call.layer] = dropped_mass(call.query, call.key, grid, **how).numpy()

    for index, sample in enumerate(samples.samples):
        with torch.no_grad(), patch_attention(loaded.model, compute):
            loaded.model(torch.tensor(sample.tokens)[None])
        np.testing.assert_allclose(mass[index], np.stack([found[layer] for layer in whole[0].layers]), rtol=1e-6)
    share = whole[0].dropped_mass
    assert share is not None
    np.testing.assert_allclose(share, mass.sum(axis=0) / whole[0].tokens.sum())
    assert (share >= 0).all() and (share < 1).all()
    assert share[..., 0].min() > 0.01


@pytest.mark.parametrize("measure", ["fisher", "mass"])
def test_nothing_is_lost_at_one(whole: tuple[Curves, Path], measure: str) -> None:
    values = getattr(whole[0], measure)
    assert (values[..., -1] == 0).all()
    assert (values[..., 0] > 0).all()
    assert (np.diff(values.sum(axis=(0, 1, 2))) < 0).all()
    if measure == "mass":
        assert (np.diff(values, axis=-1) <= 0).all()


def test_other_figures_are_the_same(whole: tuple[Curves, Path], without: tuple[Curves, Path]) -> None:
    for name in ARRAYS:
        assert getattr(whole[0], name).tobytes() == getattr(without[0], name).tobytes(), name
    assert (without[0].fisher, without[0].mass, without[0].fisher_kl, without[0].dropped_mass) == (None,) * 4


@pytest.mark.parametrize("family", ["gemma3_text", "phi3"])
def test_only_sparse_layers_are_measured(tiny_model: Build, random_samples: Build, tmp_path: Path, family: str) -> None:
    found = collect(tiny_model(family), random_samples([330, 350]), tmp_path, settings=SETTINGS)
    fisher, mass = arrays_of(found)
    assert fisher.shape == mass.shape == found.error.shape
    assert found.layers == ((1, 2) if family == "gemma3_text" else (0, 1))


def test_bad_gradients_name_layer_and_sample(
    tiny_model: Build, random_samples: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_gradient, calls = FisherMeter._score_gradient, iter(range(1))

    def poisoned(*arguments: Any) -> torch.Tensor:
        gradient = score_gradient(*arguments)
        return gradient if next(calls, None) is not None else gradient * torch.nan

    monkeypatch.setattr(FisherMeter, "_score_gradient", poisoned)
    with pytest.raises(ModelError, match=r"^sample 1: layer \d of LlamaForCausalLM: its gradients hold NaN"):
        collect(tiny_model(), random_samples([330, 350]), tmp_path, settings=SETTINGS)
    assert not (tmp_path / "curves.json").exists()


# --- files


def test_round_trip(whole: tuple[Curves, Path], without: tuple[Curves, Path]) -> None:
    for curves, folder in (whole, without):
        again = load_curves(folder)
        assert again.settings == curves.settings
        for name in (*ARRAYS, *curves.settings.measures):
            assert getattr(again, name).tobytes() == getattr(curves, name).tobytes(), name
    assert load_curves(without[1]).fisher is None
    assert set(load_file(whole[1] / "curves.safetensors")) == {*ARRAYS, "fisher", "mass"}
    assert set(load_file(without[1] / "curves.safetensors")) == set(ARRAYS)


def test_older_files_are_read(without: tuple[Curves, Path], tmp_path: Path) -> None:
    save_curves(without[0], tmp_path)
    record = json.loads((tmp_path / "curves.json").read_bytes())
    del record["settings"]["measures"]
    (tmp_path / "curves.json").write_text(json.dumps(record))
    again = load_curves(tmp_path)
    assert (again.settings, again.fisher, again.mass) == (PLAIN, None, None)


def test_what_was_started_before_there_were_measures_is_resumed(
    without: tuple[Curves, Path], loaded: Any, samples: Any
) -> None:
    assert "measures" not in json.loads((without[1] / "collect.json").read_bytes())["settings"]
    again = collect(loaded.model, samples, without[1], settings=PLAIN, name="tiny", resume=True)
    assert again.error.tobytes() == without[0].error.tobytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays: arrays.pop("fisher"), r"damaged curves \(KeyError: 'fisher'\)"),
        (lambda arrays: arrays.update(mass=arrays["mass"][..., :-1]), r"\(mass must be finite, not negative"),
        (lambda arrays: arrays.update(mass=-arrays["mass"]), r"\(mass must be finite, not negative"),
        (lambda arrays: arrays.update(fisher=arrays["fisher"] * np.nan), r"\(fisher must be finite, not negative"),
    ],
    ids=["missing", "shorter", "negative", "nan"],
)
def test_damaged_measures(whole: tuple[Curves, Path], tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    save_curves(whole[0], tmp_path)
    arrays = load_file(tmp_path / "curves.safetensors")
    change(arrays)
    save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, tmp_path / "curves.safetensors")
    with pytest.raises(CurvesError, match=said):
        load_curves(tmp_path)


@pytest.mark.parametrize("measures", [("fisher", "fisher"), ("gain",), "fisher"], ids=str)
def test_measures_are_checked(measures: Any) -> None:
    with pytest.raises(CurvesError, match=r"measures is .*, expected some of \('fisher', 'mass'\), each once"):
        CollectSettings(measures=measures)


def test_resume_with_other_measures_is_refused(whole: tuple[Curves, Path], loaded: Any, samples: Any) -> None:
    with pytest.raises(CurvesError, match="was started with another settings"):
        collect(loaded.model, samples, whole[1], settings=PLAIN, name="tiny", resume=True)


# The child stops for good before a file takes its name, says so, and is killed there.
CHILD = """
import pathlib, sys, time
from xcalib.collect import CollectSettings, collect
from xcalib.data import load_samples
from xcalib.models.loading import load_model

model, folder, file = sys.argv[1:]
replace = pathlib.Path.replace

def stopping(self, target):
    if pathlib.Path(target).name == file:
        print("reached", flush=True)
        time.sleep(600)
    replace(self, target)

pathlib.Path.replace = stopping
loaded = load_model(model)
samples = load_samples(["builtin:prose"], loaded.tokenizer, num_samples=3, max_length=384, min_length=300)
grid = (0.0, 0.4, 0.6, 0.8, 1.0)
settings = CollectSettings(block_size=64, grid=grid, gain_samples=1, gain_every=15, measures=("fisher", "mass"))
collect(loaded.model, samples, folder, settings=settings, name="tiny")
"""


def calls_of(owner: type, name: str, patch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call from here on."""
    calls, method = [], getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return method(*arguments, **options)

    patch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize(
    ("file", "gradients", "sweeps"),
    [("fisher-gram-00001.safetensors", 2, 3), ("fisher-00002.safetensors", 0, 1), ("mass-00001.safetensors", 0, 0)],
    ids=["gradients", "errors", "mass"],
)
def test_kill_9_and_resume(
    whole: tuple[Curves, Path],
    loaded: Any,
    samples: Any,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    gradients: int,
    sweeps: int,
) -> None:
    folder = tmp_path / "curves"
    command = [sys.executable, "-c", CHILD, str(tiny_folder), str(folder), file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as child:
        assert child.stdout is not None and child.stderr is not None
        line = child.stdout.readline()
        assert line == "reached\n", child.stderr.read()
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    made, swept = calls_of(FisherMeter, "gram", monkeypatch), calls_of(FisherMeter, "errors", monkeypatch)
    collect(loaded.model, samples, folder, settings=SETTINGS, name="tiny", resume=True)
    assert (len(made), len(swept)) == (gradients, sweeps)
    for name in ("curves.safetensors", "curves.json"):
        assert (folder / name).read_bytes() == (whole[1] / name).read_bytes()
    assert not (folder / "units").exists()


# --- search


def test_losses(whole: tuple[Curves, Path]) -> None:
    curves = whole[0]
    for objective, expected in (("fisher", curves.fisher_kl), ("mass", curves.dropped_mass)):
        tables = Tables.of(curves, objective)  # type: ignore[arg-type]
        assert expected is not None
        np.testing.assert_array_equal(tables.loss, expected.reshape(12, -1))
        np.testing.assert_array_equal(tables.kl, Tables.of(curves).kl)


def test_each_objective_wins_by_its_own_measure(whole: tuple[Curves, Path]) -> None:
    objectives: Any = ("fisher", "mass", "plain", "gain")
    target = Target("p", "density", 0.7)
    tables = {objective: Tables.of(whole[0], objective) for objective in objectives}
    planned = {objective: plan_point(tables[objective], target) for objective in objectives}
    for objective in objectives:
        table = tables[objective]
        own = table.at(table.loss, planned[objective].thresholds)
        for other in objectives:
            assert own <= table.at(table.loss, planned[other].thresholds) * (1 + 1e-3)
        assert planned[objective].kl == tables["gain"].predicted_kl(planned[objective].thresholds)
    assert len({plan.thresholds.tobytes() for plan in planned.values()}) > 2


@pytest.mark.parametrize("objective", ["fisher", "mass"])
def test_missing_measures_are_said(without: tuple[Curves, Path], objective: Any) -> None:
    said = f"^--objective {objective} needs curves measured with it: collect again with --measure {objective}$"
    with pytest.raises(TargetError, match=said):
        build_profile(without[0], parse_targets(["density=0.7"]), objective=objective)


@pytest.mark.parametrize("objective", ["fisher", "mass", "plain"])
def test_search_measures_what_it_needs(loaded: Any, samples: Any, tmp_path: Path, objective: Any) -> None:
    profile = xcalib.search(
        loaded.model, samples, target="a:density=0.7", settings=PLAIN, objective=objective, folder=tmp_path
    )
    measures = load_curves(tmp_path / "curves").settings.measures
    assert measures == (() if objective == "plain" else (objective,))
    name = {"fisher": "Fisher-weighted output error", "mass": "attention mass left out", "plain": "output error"}
    assert profile.points[0].objective == name[objective]


# --- the command line

DATA = [
    "--data",
    "builtin:prose",
    "--num-samples",
    "1",
    "--max-length",
    "512",
    "--block-size",
    "64",
    "--gain-samples",
    "1",
]


@pytest.fixture(scope="module")
def workplace(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measures-cli")
    (folder / "tiny").symlink_to(tiny_folder)
    return folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def test_collect_then_search(here: Path, run: Run) -> None:
    measure = ["--measure", "mass", "--measure", "fisher", "--measure", "mass"]
    code, out, err = run("collect", "tiny", *DATA, *measure, "--out", "both", "--json")
    assert code == 0, err
    assert "Measuring gradients of 1 samples" in err and "Measuring attention mass of 1 samples" in err
    assert "measured as well: fisher, mass" in err
    found = json.loads(out)
    for name in ("fisher", "mass"):
        assert found[name] == sorted(found[name], reverse=True) and found[name][-1] == 0 < found[name][0] < 1e3
    (curves,) = load_curve_sets("both")
    assert curves.settings.measures == ("fisher", "mass")
    profiles = {}
    for objective in ("tempered", "gain", "plain", "fisher", "mass"):
        file = f"{objective}.yaml"
        code, _, err = run("search", "--curves", "both", "-t", "a:density=0.76", "--objective", objective, "-o", file)
        assert code == 0, err
        profiles[objective] = load_profile(file).point("a")
    assert profiles["fisher"].objective == "Fisher-weighted output error"
    assert len({point.thresholds for point in profiles.values()}) >= 4
    code, out, _ = run("show", "mass.yaml")
    assert code == 0 and "least attention mass left out" in out


def test_the_same_command_resumes_in_another_order(here: Path, run: Run) -> None:
    for extra in ([], ["--resume"]):
        order = ["fisher", "mass"][:: -1 if extra else 1]
        measure = [word for name in order for word in ("--measure", name)]
        code, _, err = run("collect", "tiny", *DATA, *measure, "--out", "again", *extra)
        assert code == 0, err


def test_curves_without_the_measure(here: Path, run: Run) -> None:
    assert run("collect", "tiny", *DATA, "--out", "bare")[0] == 0
    line = "error: --objective fisher needs curves measured with it: collect again with --measure fisher\n"
    for model in ([], ["tiny"]):
        code, out, err = run("search", *model, "--curves", "bare", "--objective", "fisher", "--out", "no.yaml")
        assert (code, out, err) == (2, "", line)
    assert not Path("no.yaml").exists()


def test_search_with_a_model(here: Path, run: Run) -> None:
    options = ["--objective", "fisher", "-t", "a:density=0.8", "--heldout-samples", "1", "--work", "work"]
    code, out, err = run("search", "tiny", *DATA, *options, "--out", "searched.yaml", "--json")
    assert code == 0, err
    (point,) = json.loads(out)["points"]
    assert (point["objective"], point["heldout"]["samples"]) == ("Fisher-weighted output error", 1)
    assert load_curves("work/curves").mass is None


def test_an_unknown_measure(here: Path, run: Run) -> None:
    code, out, err = run("collect", "tiny", *DATA, "--measure", "gain", "--out", "unknown")
    assert (code, out) == (2, "")
    assert "'gain' is not one of" in err
    assert not Path("unknown").exists()
