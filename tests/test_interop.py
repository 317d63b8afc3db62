"""Tables of the public implementation and config.json blocks: exact round trips, and one line for everything wrong."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xcalib.errors import ModelError, ProfileError, XcalibWarning
from xcalib.interop import (
    bin_for_length,
    config_with_block,
    model_identity,
    profile_from_table,
    read_config,
    read_table,
    sparse_attention_block,
    table_name,
    table_text,
)
from xcalib.models.structure import describe_model
from xcalib.profile import ModelIdentity, Profile, load_profile, make_profile, parse_profile, save_profile
from xcalib.runtime import apply_profile

ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs" / "profile-format.md").read_text("utf-8")
EXAMPLE = parse_profile(re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)[0])

ROWS = [[1.0, 1, 1.0, 1.0], [0.9, 0.1 + 0.2, 1e-05, 0], [0.125, 2 / 3, 0.0, 1.0]]
EXACT = tuple(tuple(float(tau) for tau in row) for row in ROWS)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only the config.json of a Llama of three layers and 4 query / 2 KV heads."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", num_hidden_layers=3).config.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def identity(folder: Path) -> ModelIdentity:
    return model_identity(str(folder))


@pytest.fixture(scope="module")
def profile(identity: ModelIdentity) -> Profile:
    """The documented example, for that model."""
    return make_profile(**{**dict(EXAMPLE), "model": identity})


def written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


# --- reading tables


@pytest.mark.parametrize(
    "text",
    [
        f"toy_fuse_8 = {ROWS}\n",
        f"toy_fuse_8: list = {tuple(map(tuple, ROWS))}",
        f"import torch\ntoy_fuse_8 = torch.tensor({ROWS}, dtype=torch.float16, device='cuda')\nuse = torch.tensor(toy_fuse_8)",
        f"import numpy as np\ntoy_fuse_8 = np.array({ROWS})",
        "import torch\ntoy_fuse_8 = [" + ", ".join(f"torch.tensor({row})" for row in ROWS) + "]",
        f"'''Words.'''\nlimit = 3\nnames = ['a']\ntoy_fuse_8 = {ROWS}\ndef f(x):\n    return x",
    ],
    ids=["list", "tuples", "torch", "numpy", "rows of tensors", "among others"],
)
def test_python_tables(text: str, tmp_path: Path) -> None:
    table = read_table(written(tmp_path / "t.py", text))
    assert (table.name, table.stride, table.thresholds) == ("toy_fuse_8", 8, EXACT)
    assert table.origin.startswith("toy_fuse_8 of t.py (sha256 ")


def test_json_tables(tmp_path: Path) -> None:
    bare = read_table(written(tmp_path / "t.json", json.dumps(ROWS)))
    assert (bare.name, bare.stride, bare.thresholds) == (None, None, EXACT)
    printed = read_table(written(tmp_path / "printed.txt", str(ROWS)))
    assert printed.thresholds == EXACT
    many = written(tmp_path / "many.json", json.dumps({"a_fuse_16": ROWS, "b": ROWS, "note": "text"}))
    assert read_table(many, "a_fuse_16").stride == 16
    with pytest.raises(ProfileError, match="holds 2 tables: give --name with one of a_fuse_16, b"):
        read_table(many)


def test_nothing_in_a_python_file_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = f"open({str(mark)!r}, 'w')\n__import__('os').abort()\ntoy_fuse_4 = [[0.5]]\n"
    assert read_table(written(tmp_path / "t.py", text)).thresholds == ((0.5,),)
    assert not mark.exists()


HOSTILE = {
    "not a number": ("t_fuse_8 = [[0.5, float('nan')]]", r"line 1: t_fuse_8\[0\]\[1\]: must be a number, got .*nan"),
    "a name": ("t_fuse_8 = [[x]]", "must be a number, got 'x'"),
    "text": ("t_fuse_8 = [['0.5']]", "must be a number"),
    "a bool": ("t_fuse_8 = [[True]]", "must be a number, got 'True'"),
    "above": ("t_fuse_8 = [[0.5],\n [1.5]]", r"line 2: t_fuse_8\[1\]\[0\]: must be between 0 and 1, got 1\.5"),
    "below": ("t_fuse_8 = [[-0.5]]", r"must be between 0 and 1, got -0\.5"),
    "infinite": ("t_fuse_8 = [[1e999]]", "must be between 0 and 1, got inf"),
    "huge": (f"t_fuse_8 = [[{'9' * 400}]]", "must be between 0 and 1, got 9"),
    "too many digits": (f"t_fuse_8 = [[{'9' * 5000}]]", "not Python source"),
    "ragged": ("t_fuse_8 = [[0.5, 0.5], [0.5]]", r"t_fuse_8\[1\]: 1 heads, layer 0 has 2"),
    "an empty row": ("t_fuse_8 = [[0.5], []]", r"t_fuse_8\[1\]: must be a list of thresholds by head"),
    "a bare row": ("t_fuse_8 = [[0.5], 0.5]", r"t_fuse_8\[1\]: must be a list of thresholds by head, got 0\.5"),
    "three deep": ("t_fuse_8 = [[[0.5]]]", "must be a number, got '\\[0.5\\]'"),
    "computed": ("t_fuse_8 = [[0.5] * 4] * 3", "holds no table"),
    "a flat list": ("t_fuse_8 = [0.5]", "holds no table"),
    "no table": ("x = 1", "holds no table"),
    "empty": ("", "holds no table"),
    "not Python": ("t_fuse_8 = [[0.5]", "line 1: not Python source"),
    "a NUL": ("t_fuse_8 = [[\0]]", "NUL byte"),
    "deep": ("t_fuse_8 = " + "[" * 3000 + "]" * 3000, "not Python source"),
    "a long sum": ("t_fuse_8 = [[" + "1+" * 20000 + "1]]", "not Python source|must be a number"),
    "assigned twice": ("t_fuse_8 = [[0.5]]\nt_fuse_8 = [[0.6]]", "line 2: t_fuse_8 is assigned a second time"),
    "changed": ("t_fuse_8 = [[0.5]]\nt_fuse_8[0][0] = 0.9", "line 2: t_fuse_8 is changed in place"),
    "augmented": ("t_fuse_8 = [[0.5]]\nt_fuse_8 += [[0.9]]", "line 2: t_fuse_8 is assigned a second time"),
    "JSON NaN": ("[[0.5, NaN]]", r"table\[0\]\[1\]: must be between 0 and 1, got nan"),
    "JSON null": ("[[0.5, null]]", "must be a number, got None"),
    "JSON true": ("[[true]]", "must be a number, got True"),
    "JSON empty": ("[]", "must be a list of layers"),
    "JSON deep": ("[" * 100_000, "nested too deep|not JSON"),
    "JSON deep and closed": ("[" * 100 + "]" * 100, "nested more than 32 deep"),
    "JSON twice": ('{"a": [[0.5]], "a": [[0.6]]}', "duplicate key 'a'"),
    "JSON cut": ('{"a": [[0.5', "line 1: not JSON"),
    "JSON no table": ('{"a": 1}', "holds no table"),
    "a profile": ('{"schema_version": 1}', "is a profile already: give --to table or --to config"),
    "escapes": ('{"\\u001b[31m": [[2]]}', "must be between 0 and 1"),
}


@pytest.mark.parametrize(("text", "said"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_tables(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=said) as caught:
        read_table(written(tmp_path / "table", text))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read: No such file"):
        read_table(tmp_path / "gone.py")
    with pytest.raises(ProfileError, match="not a file"):
        read_table(tmp_path)
    with pytest.raises(ProfileError, match="4,194,305 bytes, more than the 4,194,304"):
        read_table(written(tmp_path / "long.py", "#" * (4 * 2**20 + 1)))
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match="not UTF-8"):
        read_table(tmp_path / "binary.py")


def test_names_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no table 'b'; there is: toy_fuse_8"):
        read_table(written(tmp_path / "t.py", f"toy_fuse_8 = {ROWS}"), "b")
    with pytest.raises(ProfileError, match="no table 'b'; it is a bare list"):
        read_table(written(tmp_path / "t.json", json.dumps(ROWS)), "b")


# --- into a profile


def test_an_imported_profile_says_what_it_is_not(identity: ModelIdentity, tmp_path: Path) -> None:
    table = read_table(written(tmp_path / "t.py", f"toy_fuse_8 = {ROWS}"))
    imported = profile_from_table(table, identity, point="theirs", min_length=512)
    assert (imported.method.stride, imported.method.block_size, imported.method.pattern) == (8, 128, "antidiagonal")
    assert imported.method.order == "score"
    assert imported.dense_layers == (0,)
    assert [(item.min_length, item.max_length) for item in imported.length_bins] == [(512, None)]
    point = imported.point()
    assert (point.name, point.method, point.predicted, point.heldout) == ("theirs", "imported", None, None)
    assert point.target == table.origin
    assert (imported.calibration.samples, imported.calibration.documents) == (0, ())
    save_profile(imported, tmp_path / "p.yaml")
    assert load_profile(tmp_path / "p.yaml") == imported


def test_stride_of_a_table(identity: ModelIdentity, tmp_path: Path) -> None:
    plain = read_table(written(tmp_path / "t.json", json.dumps(ROWS)))
    named = read_table(written(tmp_path / "t.py", f"toy_fuse_8 = {ROWS}"))
    odd = read_table(written(tmp_path / "o.py", f"toy_fuse_12 = {ROWS}"))
    assert profile_from_table(plain, identity, stride=16).method.stride == 16
    assert profile_from_table(named, identity, stride=8).method.stride == 8
    for table in (plain, odd):
        with pytest.raises(ProfileError, match="does not tell its stride: give --stride, one of 4, 8, 16, 32, 64"):
            profile_from_table(table, identity)
    with pytest.raises(ProfileError, match="toy_fuse_8 is a table for stride 8, --stride is 16"):
        profile_from_table(named, identity, stride=16)


@pytest.mark.parametrize("rows", [ROWS[:2], [row[:2] for row in ROWS]], ids=["layers", "heads"])
def test_a_table_of_another_shape(rows: list[list[float]], identity: ModelIdentity, tmp_path: Path) -> None:
    table = read_table(written(tmp_path / "t.py", f"toy_fuse_8 = {rows}"))
    with pytest.raises(ProfileError, match=r"the table has \d layers and \d query heads, .* has 3 and 4"):
        profile_from_table(table, identity)


def test_identity_is_that_of_the_loaded_model(tiny_model: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama", num_hidden_layers=3)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = describe_model(loaded, str(tmp_path / "model"))
    assert model_identity(str(tmp_path / "model")) == expected
    assert model_identity(str(tmp_path / "model" / "config.json")) == expected
    table = read_table(written(tmp_path / "t.py", f"toy_fuse_8 = {ROWS}"))
    save_profile(profile_from_table(table, expected), tmp_path / "p.yaml")
    assert model_identity(str(tmp_path / "p.yaml")) == expected
    with (
        pytest.warns(XcalibWarning, match="not verified: it has no held-out figures"),
        apply_profile(loaded, load_profile(tmp_path / "p.yaml")),
    ):
        pass


def test_models_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="holds no config"):
        model_identity(str(tmp_path))
    for gone in (tmp_path / "gone", "./gone", "gone.json"):
        with pytest.raises(ModelError, match="does not exist"):
            model_identity(str(gone))
    with pytest.raises(ModelError, match="'gone/away' cannot be loaded"):
        model_identity("gone/away")
    with pytest.raises(ModelError, match="give a profile of that model"):
        model_identity("demo")
    for text in ("[]", "{}", '{"model_type": 3}'):
        with pytest.raises(ModelError, match="it has no model_type"):
            model_identity(str(written(tmp_path / "config.json", text)))
    with pytest.raises(ModelError, match="cannot be loaded"):
        model_identity(str(written(tmp_path / "config.json", '{"model_type": "no-such-model"}')))


# --- out of a profile


@pytest.mark.parametrize("python", [True, False], ids=["py", "json"])
@pytest.mark.parametrize("length", [1024, 8192, 100_000])
def test_round_trip_of_a_table(profile: Profile, python: bool, length: int, tmp_path: Path) -> None:
    rows = profile.point("balanced").thresholds[bin_for_length(profile, length)]
    path = written(tmp_path / ("t.py" if python else "t.json"), table_text(rows, table_name(profile), python=python))
    table = read_table(path)
    assert (table.name, table.stride, table.thresholds) == ("llama_fuse_8", 8, rows)
    again = profile_from_table(table, profile.model)
    assert again.points[0].thresholds == (rows,)
    assert again.dense_layers == profile.dense_layers
    if python:
        assert ast.literal_eval(path.read_text().partition(" = ")[2]) == [list(row) for row in rows]


def test_which_bin_becomes_the_table(profile: Profile) -> None:
    with pytest.raises(ProfileError, match="the profile has 2: give --length, of 1024-8191, 8192-"):
        bin_for_length(profile)
    with pytest.raises(ProfileError, match="no length bin serves 100 keys"):
        bin_for_length(profile, 100)


@pytest.mark.parametrize("name", ["", "a b", "x = 1\nimport os", "8", "a" * 101])
def test_names_that_cannot_be_written(name: str) -> None:
    with pytest.raises(ProfileError, match="--name must be letters"):
        table_text(ROWS, name, python=True)


def test_a_config_copy_keeps_its_keys(profile: Profile, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    before = read_config(folder)
    text = config_with_block(profile, folder)
    after = json.loads(text)
    assert list(after) == [*before, "sparse_attention_config"]
    assert {key: after[key] for key in before} == before
    assert after["sparse_attention_config"] == json.loads(json.dumps(sparse_attention_block(profile)))
    written(tmp_path / "config.json", text)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.sparse_attention_config["profile_sha256"] == profile.content_sha256
    assert describe_model(SimpleNamespace(config=loaded)).config_sha256 == profile.model.config_sha256
    assert model_identity(str(tmp_path)).config_sha256 == profile.model.config_sha256


def test_the_block_holds_what_a_runtime_needs(profile: Profile) -> None:
    block = sparse_attention_block(profile)
    assert (block["method"], block["stride"], block["block_size"]) == ("xattention", 8, 64)
    assert (block["pattern"], block["dense_layers"], block["point"]) == ("antidiagonal", [0], "balanced")
    assert block["profile_sha256"] == profile.content_sha256
    assert block["model"] == profile.model.model_dump()
    bins = [(item["min_length"], item["max_length"]) for item in block["length_bins"]]
    assert bins == [(1024, 8192), (8192, None)]
    thresholds = tuple(tuple(map(tuple, item["thresholds"])) for item in block["length_bins"])
    assert thresholds == profile.point("balanced").thresholds
    documented = re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "interop.md").read_text("utf-8"), re.MULTILINE)
    assert documented == list(block)


def test_a_block_that_is_there(profile: Profile, folder: Path, tmp_path: Path) -> None:
    config = {"sparse_attention_config": {"theirs": 1}, **read_config(folder)}
    path = written(tmp_path / "config.json", json.dumps(config))
    with pytest.raises(ModelError, match="has a sparse_attention_config already; --force replaces it in the copy"):
        config_with_block(profile, path)
    after = json.loads(config_with_block(profile, path, replace=True))
    assert list(after) == list(config)
    assert after["sparse_attention_config"] == json.loads(json.dumps(sparse_attention_block(profile)))


def test_a_config_of_another_model(profile: Profile, folder: Path, tmp_path: Path) -> None:
    config = read_config(folder)
    shape = written(tmp_path / "shape.json", json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ModelError, match="for another model: layers is 3 in the profile"):
        config_with_block(profile, shape, other_config=True)
    other = written(tmp_path / "other.json", json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ModelError, match=r"made with another config than .*other-config"):
        config_with_block(profile, other)
    assert "sparse_attention_config" in json.loads(config_with_block(profile, other, other_config=True))


# --- the command


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(folder: Path, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: ``model``, ``t.py`` with two tables, ``bad.py``, ``good.yaml`` and ``there.yaml``."""
    (tmp_path / "model").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    written(Path("t.py"), f"toy_fuse_8 = {ROWS}\ntoy_fuse_16 = {ROWS}\n")
    written(Path("bad.py"), "toy_fuse_8 = [[0.5, 2]]\n")
    written(Path("there.yaml"), "mine")
    save_profile(profile, "good.yaml")
    return tmp_path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


IMPORT = ["convert", "t.py", "--name", "toy_fuse_8", "--model", "model"]


def test_convert_to_a_profile_and_back(here: Path, run: Run) -> None:
    code, out, err = run(*IMPORT, "--out", "p.yaml")
    assert (code, out) == (0, ""), err
    assert "wrote p.yaml: toy_fuse_8, 3 layers x 4 heads, stride 8" in err
    assert "imported and unverified: there is no calibration and no evidence" in err
    assert load_profile("p.yaml").point("imported").thresholds == (EXACT,)
    code, out, err = run("convert", "p.yaml", "--to", "table", "--out", "back.py", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["table"], summary["layers"], summary["threshold"]["max"]) == ("llama_fuse_8", 3, 1.0)
    assert read_table("back.py").thresholds == EXACT
    assert run("show", "p.yaml")[0] == 0
    assert run("validate", "p.yaml")[0] == 0


def test_convert_to_a_config(here: Path, run: Run) -> None:
    before = contents(here / "model")
    code, out, err = run("convert", "good.yaml", "--to", "config", "--config", "model", "--out", "copy.json", "--json")
    assert code == 0, err
    assert json.loads(out)["profile_sha256"] == load_profile("good.yaml").content_sha256
    assert "sparse_attention_config" in json.loads(Path("copy.json").read_text())
    assert contents(here / "model") == before


def test_a_note_for_what_a_table_cannot_say(here: Path, run: Run) -> None:
    code, _, err = run("convert", "good.yaml", "--to", "table", "--length", "2048", "--out", "t.json")
    assert code == 0, err
    assert "note: these hold for block 64 and antidiagonal" in err


def test_a_note_for_an_order_that_upstream_lacks(here: Path, run: Run) -> None:
    profile = load_profile("good.yaml")
    recent = make_profile(**{**dict(profile), "method": {**profile.method.model_dump(), "order": "recent"}})
    save_profile(recent, "recent.yaml")
    table = ["--to", "table", "--length", "2048", "--out", "t.json"]
    config = ["--to", "config", "--config", "model", "--out", "c.json"]
    for file, said in (("good.yaml", 0), ("recent.yaml", 1)):
        for arguments in (table, config):
            code, out, err = run("convert", file, *arguments, "--force", "--json")
            assert code == 0, err
            assert err.count("note: these hold for the order of preference 'recent'") == said
            assert json.loads(out)["order"] == ("recent" if said else "score")
        block = json.loads(Path("c.json").read_text())["sparse_attention_config"]
        assert block["order"] == ("recent" if said else "score")
    assert "the public implementation has 'score' alone" in err


def test_convert_force(here: Path, run: Run) -> None:
    assert run(*IMPORT, "--out", "there.yaml", "--force")[0] == 0
    assert load_profile("there.yaml").point().method == "imported"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["t.py", "--out", "p.yaml"], "--model: needed to know whose thresholds"),
        (["t.py", "--model", "model", "--out", "p.yaml"], "holds 2 tables: give --name with one of toy_fuse_8, toy"),
        (["t.py", "--name", "x", "--model", "model", "--out", "p.yaml"], "no table 'x'"),
        (["bad.py", "--model", "model", "--out", "p.yaml"], r"bad\.py: line 1: .*must be between 0 and 1, got 2"),
        (["gone.py", "--model", "model", "--out", "p.yaml"], r"gone\.py: cannot be read"),
        ([*IMPORT[1:], "--out", "there.yaml"], "exists already; choose another file, or give --force"),
        ([*IMPORT[1:], "--out", "p.txt"], "a profile ends in"),
        ([*IMPORT[1:], "--out", "gone/p.yaml"], "the folder gone does not exist"),
        ([*IMPORT[1:], "--out", "model.yaml", "--block-size", "0"], "method.block_size: must be 64 or 128, got 0"),
        ([*IMPORT[1:], "--out", "p.yaml", "--stride", "16"], "is a table for stride 8"),
        ([*IMPORT[1:], "--out", "p.yaml", "--point", "Not good"], r"points\[0\].name"),
        ([*IMPORT[1:], "--out", "p.yaml", "--length", "5"], "--length: goes with --to table, not with --to profile"),
        (
            ["good.yaml", "--model", "model", "--out", "p.yaml"],
            "is a profile by its name: give --to table or --to config",
        ),
        (["t.py", "--to", "table", "--out", "p.json"], "is a Python file; --to table takes a profile"),
        (["good.yaml", "--to", "table", "--out", "p.json"], "give --length"),
        (["good.yaml", "--to", "table", "--length", "1", "--out", "p.json"], "no length bin serves 1 keys"),
        (["good.yaml", "--to", "table", "--point", "no", "--out", "p.json"], "no operating point 'no'"),
        (["good.yaml", "--to", "table", "--length", "9000", "--name", "a b", "--out", "p.json"], "--name must be"),
        (["good.yaml", "--to", "config", "--out", "p.json"], "--config: needed"),
        (["good.yaml", "--to", "config", "--config", "gone", "--out", "p.json"], "gone: cannot be read"),
        (
            ["good.yaml", "--to", "config", "--config", "model", "--force", "--out", "model/config.json"],
            "is what is read",
        ),
        (["good.yaml", "--to", "paper", "--out", "p.json"], "'paper' is not one of"),
    ],
)
def test_bad_conversions(here: Path, run: Run, arguments: list[str], said: str) -> None:
    before = contents(here)
    code, out, err = run("convert", *arguments)
    assert (code, out) == (2, "")
    assert err.count("error:") == 1
    assert re.search(said, err.rstrip("\n").splitlines()[-1]), err
    assert contents(here) == before


def test_a_failed_write_leaves_the_old_file(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: Any) -> Any:
        raise OSError(28, "No space left on device", "t.json")

    written(Path("t.json"), "mine")
    monkeypatch.setattr("os.fsync", broken)
    code, _, err = run("convert", "good.yaml", "--to", "table", "--length", "9000", "--out", "t.json", "--force")
    assert (code, "No space left on device" in err) == (2, True)
    assert Path("t.json").read_text() == "mine"
    assert not list(here.glob(".*.tmp"))


def test_light_imports() -> None:
    """Reading and writing tables and comparing load no model, search or terminal library, and no search code."""
    heavy = ("torch", "transformers", "optuna", "typer", "rich", "numpy", "xcalib.search", "xcalib.collect")
    code = f"import sys, xcalib.interop; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "[]"
    for path in (ROOT / "xcalib" / "interop").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            module = getattr(node, "module", None) or ""
            assert not re.match(r"xcalib\.(search|collect|evaluation|cli)\b", module), path
