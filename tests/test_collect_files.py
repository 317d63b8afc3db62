"""Curves on disk: damage is one line, a killed collection goes on where it stopped, and comes out the same."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xcalib.collect import CollectSettings, Curves, collect, load_curves
from xcalib.collect.curves import ARRAYS, save_curves
from xcalib.collect.gains import GainMeter
from xcalib.collect.measure import Sweeper
from xcalib.data import load_samples
from xcalib.errors import CurvesError
from xcalib.models.loading import load_model

Build = Callable[..., Any]

SETTINGS = CollectSettings(block_size=64, grid=(0.0, 0.4, 0.6, 0.8, 1.0), gain_samples=2, gain_every=15)


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Any:
    return load_model(str(tiny_folder))


@pytest.fixture(scope="module")
def samples(loaded: Any) -> Any:
    return load_samples(["builtin:prose"], loaded.tokenizer, num_samples=3, max_length=384)


@pytest.fixture(scope="module")
def whole(loaded: Any, samples: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Curves, Path]:
    """An uninterrupted collection."""
    folder = tmp_path_factory.mktemp("whole")
    return collect(loaded.model, samples, folder, settings=SETTINGS, name="tiny"), folder


@pytest.fixture
def folder(whole: tuple[Curves, Path], tmp_path: Path) -> Path:
    """A copy of its folder, to damage."""
    save_curves(whole[0], tmp_path)
    return tmp_path


def assert_same(left: Curves, right: Curves) -> None:
    for name in ARRAYS:
        assert getattr(left, name).tobytes() == getattr(right, name).tobytes(), name
    for field in ("settings", "model", "calibration", "layers", "dense_reasons"):
        assert getattr(left, field) == getattr(right, field)


def refused(folder: Path) -> str:
    """The message, which must be one line that begins with the folder."""
    with pytest.raises(CurvesError) as caught:
        load_curves(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(folder))
    return message


def change_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "curves.json"
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps(change(record) or record))


def change_arrays(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "curves.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)


def test_undamaged(folder: Path, whole: tuple[Curves, Path]) -> None:
    assert_same(load_curves(folder), whole[0])
    assert_same(load_curves(str(whole[1])), whole[0])


def test_missing_folder(tmp_path: Path) -> None:
    assert "holds no curves.json; run 'xcalib collect' first" in refused(tmp_path / "nowhere")


def test_unfinished(folder: Path) -> None:
    (folder / "curves.json").unlink()
    assert "run 'xcalib collect' first" in refused(folder)
    (folder / "collect.json").write_text("{}")
    assert "its collection is unfinished: go on with --resume" in refused(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", '"a"', "{}", "[" * 100_000, "\x00\x01", "{'a': 1}"],
    ids=["empty", "cut", "list", "null", "number", "text", "object", "deep", "binary", "python"],
)
def test_json_is_not_a_record(folder: Path, text: str) -> None:
    (folder / "curves.json").write_text(text)
    assert "damaged curves" in refused(folder)


WRONG_VALUES = [
    (key, value)
    for key in ("settings", "model", "calibration", "layers", "dense_reasons", "format")
    for value in (None, 3, "a", [], [1, 2], {"a": 1})
    if key != "dense_reasons" or value not in ([], {"a": 1})
]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=[f"{key}={value!r}" for key, value in WRONG_VALUES])
def test_values_of_the_record(folder: Path, key: str, value: Any) -> None:
    change_record(folder, lambda record: record.update({key: value}))
    refused(folder)


@pytest.mark.parametrize("key", ["settings", "model", "calibration", "layers", "dense_reasons", "format"])
def test_keys_of_the_record(folder: Path, key: str) -> None:
    change_record(folder, lambda record: record.pop(key) and None)
    assert f"damaged curves (KeyError: '{key}')" in refused(folder)


def test_another_format(folder: Path) -> None:
    change_record(folder, lambda record: record.update(format=2))
    assert "curves format 2, this version reads 1: collect again" in refused(folder)


def test_unknown_setting(folder: Path) -> None:
    change_record(folder, lambda record: record["settings"].update(colour=1))
    assert "damaged curves" in refused(folder)


def test_curves_from_before_there_were_two_orders_have_the_published_one(
    folder: Path, whole: tuple[Curves, Path]
) -> None:
    change_record(folder, lambda record: record["settings"].pop("order") and None)
    loaded = load_curves(folder)
    assert loaded.settings == dataclasses.replace(whole[0].settings, order="score")
    assert whole[0].settings.order == "recent"


def test_bad_setting(folder: Path) -> None:
    change_record(folder, lambda record: record["settings"].update(grid=[0.0, 0.5, 0.4, 0.6, 1.0]))
    with pytest.raises(CurvesError, match="expected ascending thresholds from 0 to 1"):
        load_curves(folder)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_truncated_arrays(folder: Path, part: float) -> None:
    path = folder / "curves.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    assert "curves.safetensors: no safetensors file: its header has" in refused(folder) or part > 0.1


def test_missing_arrays(folder: Path) -> None:
    (folder / "curves.safetensors").unlink()
    assert "curves.safetensors: cannot be read: No such file or directory); collect again" in refused(folder)


@pytest.mark.parametrize("name", ARRAYS)
def test_one_array_is_missing(folder: Path, name: str) -> None:
    change_arrays(folder, lambda arrays: arrays.pop(name))
    assert f"damaged curves (KeyError: '{name}')" in refused(folder)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    "change",
    [lambda array: array[..., :-1], lambda array: array[None], lambda array: array.reshape(-1)[0].reshape(())],
    ids=["shorter", "deeper", "scalar"],
)
def test_wrong_shapes(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    change_arrays(folder, lambda arrays: arrays.update({name: change(arrays[name])}))
    assert "damaged curves" in refused(folder)


@pytest.mark.parametrize("name", ["error", "energy", "gain", "gain_kl", "gain_error", "joint_sum", "joint_kl"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_bad_numbers(folder: Path, name: str, value: float) -> None:
    change_arrays(folder, lambda arrays: arrays[name].reshape(-1).__setitem__(0, value))
    assert f"damaged curves ({name} must be finite, not negative" in refused(folder)


def test_no_sample_at_all(folder: Path) -> None:
    per_sample = ("error", "energy", "kept", "visible", "tokens", "joint_sum", "joint_kl")
    change_arrays(folder, lambda arrays: arrays.update({name: arrays[name][:0] for name in per_sample}))
    assert "damaged curves" in refused(folder)


def test_a_folder_with_other_things(loaded: Any, samples: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(CurvesError, match="is not empty and holds no collection; choose another folder"):
            collect(loaded.model, samples, tmp_path, settings=SETTINGS, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_where_the_folder_should_be(loaded: Any, samples: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CurvesError, match=r"file: cannot be made"):
        collect(loaded.model, samples, tmp_path / "file", settings=SETTINGS)
    with pytest.raises(CurvesError, match=r"sub: cannot be made"):
        collect(loaded.model, samples, tmp_path / "file" / "sub", settings=SETTINGS)


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the sample after ``count`` ones."""
    measure, calls = Sweeper.measure, iter(range(count))

    def interrupted(self: Sweeper, *arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return measure(self, *arguments, **options)

    monkeypatch.setattr(Sweeper, "measure", interrupted)


@pytest.fixture
def started(loaded: Any, samples: Any, tmp_path: Path) -> Iterator[Path]:
    """A collection interrupted after two samples."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        collect(loaded.model, samples, tmp_path, settings=SETTINGS, name="tiny")
    yield tmp_path


class Counter:
    """Counts calls of a method that still does its work."""

    def __init__(self, owner: type, name: str, patch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        method = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return method(*arguments, **options)

        patch.setattr(owner, name, counted)


def test_without_resume_it_is_refused(started: Path, loaded: Any, samples: Any) -> None:
    with pytest.raises(CurvesError, match="already holds a collection; go on with --resume, or choose another folder"):
        collect(loaded.model, samples, started, settings=SETTINGS, name="tiny")


def test_resume_repeats_nothing(
    started: Path, loaded: Any, samples: Any, whole: tuple[Curves, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {path: path.stat().st_mtime_ns for path in (started / "units").iterdir()}
    assert sorted(path.name for path in written) == ["sample-00000.safetensors", "sample-00001.safetensors"]
    sweeps = Counter(Sweeper, "measure", monkeypatch)
    again = collect(loaded.model, samples, started, settings=SETTINGS, name="tiny", resume=True)
    assert sweeps.calls == 1
    assert_same(again, whole[0])
    assert not (started / "units").exists()


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0{}      "], ids=["empty", "no arrays"])
def test_a_damaged_unit_is_measured_again(
    started: Path,
    loaded: Any,
    samples: Any,
    whole: tuple[Curves, Path],
    monkeypatch: pytest.MonkeyPatch,
    damage: bytes,
) -> None:
    (started / "units" / "sample-00001.safetensors").write_bytes(damage)
    sweeps = Counter(Sweeper, "measure", monkeypatch)
    assert_same(collect(loaded.model, samples, started, settings=SETTINGS, name="tiny", resume=True), whole[0])
    assert sweeps.calls == 2


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("settings", {"settings": dataclasses.replace(SETTINGS, stride=8)}),
        ("settings", {"settings": dataclasses.replace(SETTINGS, grid=(0.0, 0.5, 1.0))}),
        ("settings", {"settings": dataclasses.replace(SETTINGS, order="score")}),
        ("data", {"data": {"seed": 1}}),
        ("data", {"data": {"max_length": 320}}),
        ("model", {"model": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}}),
        ("dtype", {"dtype": "bfloat16"}),
        ("settings, data", {"settings": dataclasses.replace(SETTINGS, gain_samples=1), "data": {"seed": 1}}),
    ],
    ids=["stride", "grid", "order", "seed", "length", "rope", "bf16", "two"],
)
def test_resume_with_other_options_names_them(
    started: Path, loaded: Any, samples: Any, tiny_model: Build, tiny_folder: Path, what: str, change: dict[str, Any]
) -> None:
    model, data = loaded.model, samples
    if "model" in change:
        shape = {"num_hidden_layers": 3, "vocab_size": 512, "max_position_embeddings": 2048}
        model = tiny_model("llama", **shape, **change["model"])
    if "dtype" in change:
        model = load_model(str(tiny_folder), dtype=change["dtype"]).model
    if "data" in change:
        arguments = {"num_samples": 3, "max_length": 384, **change["data"]}
        data = load_samples(["builtin:prose"], loaded.tokenizer, **arguments)
    before = {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}
    with pytest.raises(CurvesError, match=f"was started with another {what}; use the same options, or another folder"):
        collect(model, data, started, settings=change.get("settings", SETTINGS), name="tiny", resume=True)
    assert {path: path.read_bytes() for path in started.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "\x00"])
def test_resume_with_a_damaged_plan(started: Path, loaded: Any, samples: Any, text: str) -> None:
    (started / "collect.json").write_text(text)
    with pytest.raises(CurvesError) as caught:
        collect(loaded.model, samples, started, settings=SETTINGS, name="tiny", resume=True)
    assert str(started) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_units_of_another_collection_do_not_count(
    started: Path, loaded: Any, samples: Any, whole: tuple[Curves, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Files copied in from a collection with other settings are measured again."""
    other = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(1, patch)
        collect(loaded.model, samples, other, settings=dataclasses.replace(SETTINGS, stride=8), name="tiny")
    unit = "units/sample-00000.safetensors"
    (started / unit).write_bytes((other / unit).read_bytes())
    assert_same(collect(loaded.model, samples, started, settings=SETTINGS, name="tiny", resume=True), whole[0])


# The child stops for good before or after a file takes its name, says so, and is killed there.
CHILD = """
import pathlib, sys, time
from xcalib.collect import CollectSettings, collect
from xcalib.data import load_samples
from xcalib.models.loading import load_model

model, folder, file, when = sys.argv[1:]
replace = pathlib.Path.replace

def stopping(self, target):
    hit = pathlib.Path(target).name == file
    if not (hit and when == "before"):
        replace(self, target)
    if hit:
        print("reached", flush=True)
        time.sleep(600)

pathlib.Path.replace = stopping
loaded = load_model(model)
samples = load_samples(["builtin:prose"], loaded.tokenizer, num_samples=3, max_length=384)
settings = CollectSettings(block_size=64, grid=(0.0, 0.4, 0.6, 0.8, 1.0), gain_samples=2, gain_every=15)
collect(loaded.model, samples, folder, settings=settings, name="tiny")
"""


@pytest.mark.parametrize(
    ("file", "when", "sweeps", "gains"),
    [
        ("collect.json", "before", 3, 2),
        ("sample-00001.safetensors", "after", 1, 2),
        ("gain-00001.safetensors", "before", 0, 1),
        ("curves.json", "before", 0, 0),
    ],
    ids=lambda value: str(value).removesuffix(".safetensors"),
)
def test_kill_9_and_resume(
    whole: tuple[Curves, Path],
    loaded: Any,
    samples: Any,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    when: str,
    sweeps: int,
    gains: int,
) -> None:
    folder = tmp_path / "curves"
    command = [sys.executable, "-c", CHILD, str(tiny_folder), str(folder), file, when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as child:
        assert child.stdout is not None and child.stderr is not None
        line = child.stdout.readline()
        assert line == "reached\n", child.stderr.read()
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    with pytest.raises(CurvesError, match=r"holds no curves\.json"):
        load_curves(folder)
    swept, gained = Counter(Sweeper, "measure", monkeypatch), Counter(GainMeter, "alone", monkeypatch)
    resumed = collect(loaded.model, samples, folder, settings=SETTINGS, name="tiny", resume=True)
    assert_same(resumed, whole[0])
    assert_same(load_curves(folder), whole[0])
    assert (swept.calls, gained.calls) == (sweeps, gains)
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]
