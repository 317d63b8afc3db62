"""What reads files from strangers, with a valid file for each, and the property that any bytes must keep.

Used by ``tests/test_fuzz.py`` (hypothesis) and ``tests/fuzz/run.py`` (atheris).
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from xcalib.cli.recipes import options_of
from xcalib.cli.search import search
from xcalib.collect import CollectSettings, Curves, load_curve_sets, load_curves, save_curves
from xcalib.collect.units import Units
from xcalib.data._documents import Drops
from xcalib.data._jsonl import jsonl_documents
from xcalib.errors import CurvesError, DataError, XcalibError
from xcalib.interop import read_config, read_table
from xcalib.profile import dump_profile, load_profile, parse_profile
from xcalib.recipe import parse_recipe, read_recipe, recipe_text

ROOT = Path(__file__).parents[2]
EXAMPLE = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "profile-format.md").read_text("utf-8"), re.DOTALL)[0]
OPTIONS = options_of(search)
IDENTITY = {"settings": {"stride": 16}, "data": "a" * 64, "model": "tiny"}


@dataclass(frozen=True)
class Reader:
    """One kind of file: its bytes replace a valid file, and ``read`` gives what they say or raises XcalibError."""

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]


@cache
def folder() -> Path:
    """Where files are written, in memory where there is such a place."""
    shared = Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="xcalib-fuzz-", dir=shared if os.access(shared, os.W_OK) else None)
    return Path(made)


def written(name: str, data: bytes) -> Path:
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_profile_file(name: str) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        profile = load_profile(written(name, data))
        assert parse_profile(dump_profile(profile)) == profile
        return profile

    return read


RECIPE = b"""# xcalib search --recipe
model: demo
data: [builtin@2, "ruler:niah_single_1@0.5", jsonl:rows.jsonl:text]
target: [chat:kl=0.01, "fast:density=0.2"]
num_samples: 4
heldout-samples: 2
lengths: 1k,2k
start_threshold: 0.9
method: knapsack
stride: 16
rounds: 1
resume: true
out: out.yaml
work: null
"""


def recipe_in_a_profile() -> bytes:
    from xcalib.profile import make_profile

    recipe = {"model": "demo", "data": ["builtin@2"], "num_samples": 4, "start_threshold": 0.9}
    return dump_profile(make_profile(**{**dict(parse_profile(EXAMPLE)), "recipe": recipe})).encode()


def read_recipe_file(data: bytes) -> object:
    values = read_recipe(written("recipe.yaml", data), OPTIONS)
    assert set(values) <= set(OPTIONS)
    if values:
        assert parse_recipe(recipe_text(values, "again"), OPTIONS) == values
    return values


ROWS = (
    b'{"text": "some text \\u00e9 of a row"}\n{"context": "long", "input": "q?", "answers": ["a", 1], "dataset": "qasper"}\n'
    b'\n{"text": "x", "answer": 1.5, "metric": "f1", "max_new_tokens": 4, "other": [null, true, {"a": NaN}]}\n',
    b'\xef\xbb\xbf{"body": "another field"}\r\n{"text": 3}\nnot json\n{"text": "t", "answers": ["x"], "metric": "recall"}\n',
)


def read_rows(data: bytes) -> object:
    path, drops = written("rows.jsonl", data), Drops()
    documents = list(jsonl_documents("jsonl:rows", str(path), drops))
    for document in documents:
        assert document.size > 0 and document.read(0, document.size)
        assert re.fullmatch(r"[0-9a-f]+", document.digest)
    if not documents:
        raise DataError(f"nothing{drops.hint('jsonl:rows')}")
    return documents


def curves() -> Curves:
    """Of two samples, two of three layers, two heads and three levels."""
    rng = np.random.default_rng(0)
    settings = CollectSettings(grid=(0.0, 0.5, 1.0), joint_densities=(0.33, 0.22), gain_samples=1, measures=("mass",))
    model = {"name": "tiny", "commit": None, "model_type": "llama", "layers": 3, "query_heads": 2, "kv_heads": 1}
    model |= {"head_dim": 32, "config_sha256": "c" * 64}
    calibration = {"sources": ["builtin"], "samples": 2, "min_length": 64, "max_length": 128, "seed": 0}
    calibration |= {"tokens_sha256": "d" * 64, "documents": ["0badcafe12345678"], "gain_samples": 1, "dropped": {}}
    sweep, kept = (2, 2, 2, 3), np.broadcast_to(np.array([1, 2, 3]), (2, 2, 2, 3))
    return Curves(
        settings, model, calibration | {"lengths": [128]}, (0, 2), rng.random(sweep), rng.random((2, 2)),
        kept.astype(np.int64), np.array([3, 3]), np.array([64, 128]), rng.random(2), rng.random((1, 2)), rng.random((1, 2)),
        rng.random((2, 2)), np.array([[0.1, 0.2], [0.3, np.nan]]), {"sliding": 1}, mass=rng.random(sweep),
    )  # fmt: skip


@cache
def curve_files() -> tuple[bytes, bytes]:
    """``curves.json`` and ``curves.safetensors``."""
    place = folder() / "curves"
    place.mkdir(exist_ok=True)
    save_curves(curves(), place)
    return (place / "curves.json").read_bytes(), (place / "curves.safetensors").read_bytes()


def read_curves(index: int) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        files = list(curve_files())
        files[index] = data
        written("curves/curves.json", files[0])
        written("curves/curves.safetensors", files[1])
        found = load_curves(folder() / "curves")
        density = found.density
        assert density.ndim == 3 and (density >= 0).all() and (density <= 1).all()
        return found

    return read


def read_index(data: bytes) -> object:
    for name, content in zip(("curves.json", "curves.safetensors"), curve_files(), strict=True):
        written(f"sets/128/{name}", content)
    written("sets/lengths.json", data)
    sets = load_curve_sets(folder() / "sets")
    assert len(sets) == 1
    return sets


@cache
def unit_file() -> bytes:
    units = Units(folder() / "units", IDENTITY, resume=True)
    units.save("sample-00000", {"error": np.ones((2, 3)), "one": np.array(1.5), "reasons": np.zeros(0, np.uint8)})
    return (folder() / "units" / "units" / "sample-00000.safetensors").read_bytes()


def read_unit(data: bytes) -> object:
    unit_file()
    written("units/units/sample-00000.safetensors", data)
    arrays = Units(folder() / "units", IDENTITY, resume=True).load("sample-00000")
    if arrays is None:
        raise CurvesError("a unit that counts as not finished")
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    return arrays


def read_plan(data: bytes) -> object:
    written("plan/collect.json", data)
    return Units(folder() / "plan", IDENTITY, resume=True)


TABLE = (
    "llama_fuse_8 = torch.tensor([[0.5, 1, -0.0],\n [0x1, 1e-3, .25]], dtype=torch.float32)\nother = [[0.1], [0.2]]\n"
)


def read_table_file(name: str) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        path = written(name, data)
        table = read_table(path, "llama_fuse_8")
        assert all(0 <= tau <= 1 for row in table.thresholds for tau in row)
        return table

    return read


CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "rope_scaling": {"a": [1, 2.5, None]}, "x": "y"}


def readers() -> tuple[Reader, ...]:
    """All of them; the order stays, for a fuzzer's corpus names a reader by its place."""
    example = EXAMPLE.encode()
    as_json = dump_profile(parse_profile(EXAMPLE), format="json").encode()
    plan = json.dumps(IDENTITY).encode()
    tables = json.dumps({"llama_fuse_8": [[0.5, 1, 0.0], [0.25, 1e-3, 1]], "note": "x"}).encode()
    record, arrays = curve_files()
    return (
        Reader("profile", (example, recipe_in_a_profile()), read_profile_file("p.yaml")),
        Reader("profile as JSON", (as_json,), read_profile_file("p.json")),
        Reader("recipe", (RECIPE, recipe_in_a_profile(), b'{"model": "demo", "seed": 3}'), read_recipe_file),
        Reader("jsonl", ROWS, read_rows),
        Reader("curves.json", (record,), read_curves(0)),
        Reader("curves.safetensors", (arrays,), read_curves(1)),
        Reader("lengths.json", (b'{"format": 1, "lengths": [128]}',), read_index),
        Reader("unit", (unit_file(),), read_unit),
        Reader("collect.json", (plan,), read_plan),
        Reader("table as JSON", (tables,), read_table_file("t.json")),
        Reader("table as Python", (TABLE.encode(),), read_table_file("t.py")),
        Reader("config.json", (json.dumps(CONFIG).encode(),), lambda data: read_config(written("config.json", data))),
    )


def holds(reader: Reader, data: bytes) -> bool:
    """True for a valid object, False for one line of XcalibError; whatever else is raised comes through."""
    try:
        reader.read(data)
    except XcalibError as error:
        message = str(error)
        assert message and message.isprintable(), f"not one printable line: {message!r}"
        assert len(message) < 2000, f"a message of {len(message)} characters"
        return False
    return True


def seeds() -> list[tuple[Reader, bytes]]:
    return [(reader, seed) for reader in readers() for seed in reader.seeds]
