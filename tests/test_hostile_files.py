"""Files of strangers that are too large, lie about their size, lead elsewhere, never end or would run: one line, in bounds."""

import ast
import inspect
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from xcalib._lock import LOCK_NAME
from xcalib.collect import load_curve_sets, load_curves
from xcalib.collect.units import Units
from xcalib.data._documents import Drops
from xcalib.data._jsonl import MAX_LINE, jsonl_documents
from xcalib.errors import CurvesError, DataError, ModelError, ProfileError, StudyError, XcalibError
from xcalib.interop import model_identity, read_config, read_table
from xcalib.interop.source import MAX_CHARS, python_tables
from xcalib.profile import load_profile
from xcalib.recipe import Option, read_recipe

ROOT = Path(__file__).parent.parent
GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
    import readers

    yield readers
    sys.path.remove(str(ROOT / "tests" / "fuzz"))


@pytest.fixture
def folder(fuzz: Any, tmp_path: Path) -> Path:
    """A folder with the curves of one length."""
    for name, data in zip(("curves.json", "curves.safetensors"), fuzz.curve_files(), strict=True):
        (tmp_path / name).write_bytes(data)
    assert load_curves(tmp_path).error.size
    return tmp_path


def refused(read: Callable[[], object]) -> str:
    with pytest.raises(XcalibError) as caught:
        read()
    message = str(caught.value)
    assert message.isprintable()
    assert 0 < len(message) < 1500
    return message


def rows(path: Path) -> list[Any]:
    drops = Drops()
    found = list(jsonl_documents("jsonl:x", str(path), drops))
    if not found:
        raise DataError(f"no row{drops.hint('jsonl:x')}")
    return found


READ: dict[str, Callable[[Path], object]] = {
    "p.yaml": load_profile,
    "p.json": load_profile,
    "r.yaml": lambda path: read_recipe(path, {"model": Option(str)}),
    "t.json": read_table,
    "t.py": read_table,
    "config.json": read_config,
    "rows.jsonl": rows,
    "curves.json": lambda path: load_curves(path.parent),
    "curves.safetensors": lambda path: load_curves(path.parent),
    "lengths.json": lambda path: load_curve_sets(path.parent),
}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


STARTS = {"zeros": b"", "brace": b"{", "text": b'{"a": "', "comment": b"# x\n"}
# rows have no limit together: one gigabyte of them is read, a piece at a time
GIGABYTES = [(name, start) for name in READ for start in STARTS if name != "rows.jsonl" or start == "text"]


@pytest.mark.parametrize(("name", "start"), GIGABYTES)
def test_a_gigabyte_is_not_read(name: str, start: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(STARTS[start])
    os.truncate(path, GIB)  # takes no room on the disk
    before = peak()
    message = refused(lambda: READ[name](path))
    assert peak() - before < 200 * MIB
    assert any(said in message for said in ("more than", "its header has", "not JSON", "NUL byte"))


@pytest.mark.parametrize("name", READ)
def test_what_is_no_file_is_not_waited_for(name: str, folder: Path) -> None:
    path = folder / name

    def endless(place: Path) -> None:
        place.symlink_to("/dev/zero")

    def loop(place: Path) -> None:
        place.symlink_to(place)

    for make in (os.mkfifo, os.mkdir, endless, loop):
        path.unlink(missing_ok=True)
        make(path)
        message = refused(lambda: READ[name](path) if name != "lengths.json" else load_curves(path))
        assert any(said in message for said in ("not a file", "no file", "holds no", "leads out of", "cannot be read"))
        if path.is_dir() and not path.is_symlink():
            path.rmdir()


def test_a_journal_is_a_file(tmp_path: Path) -> None:
    from xcalib.search._storage import open_storage

    os.mkfifo(tmp_path / "j")
    for name in (str(tmp_path / "j"), f"journal:{tmp_path}", "journal:/dev/zero"):
        with pytest.raises(StudyError, match="is not a file"):
            open_storage(name)


# --- rows


def test_a_long_row_is_dropped_and_the_next_is_read(tmp_path: Path) -> None:
    path, drops = tmp_path / "rows.jsonl", Drops()
    with path.open("wb") as file:
        for size in (10, MAX_LINE - 13, MAX_LINE - 12, 3 * MAX_LINE + 5, 20):
            file.write(b'{"text": "' + b"a" * size + b'"}\n')
    found = list(jsonl_documents("jsonl:x", str(path), drops))
    assert [document.size for document in found] == [10, MAX_LINE - 13, 20]
    assert [document.read(0, 3) for document in found] == ["aaa"] * 3
    assert drops.summary() == {f"jsonl:x: more than {MAX_LINE:,} bytes (line 3, line 4)": 2}


@pytest.mark.parametrize("answer", ["NaN", "[Infinity]", "1e999", "{}", "[[]]", "[null]", '[" "]'])
def test_answers_are_texts_or_numbers(answer: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "t", "answers": {answer}}}\n')
    assert "1 answers are not a string or a list of strings" in refused(lambda: rows(path))


def test_names_of_rows_that_no_file_can_have() -> None:
    for name in ("x" * 5000, "~nobody-of-this-name/rows.jsonl", "a\0b"):
        with pytest.raises(DataError):
            rows(Path(name))


# --- arrays


def arrays_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: Any, span: Any, dtype: Any = "F64") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


HEADERS = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "no header": arrays_of(b""),
    "a header of 2^64 bytes": arrays_of({}, length=2**64 - 1),
    "a header of 100 MB": arrays_of({}, b" " * 100, length=100_000_000),
    "a header beyond the file": arrays_of({}, length=3),
    "not JSON": arrays_of(b"{'a'}"),
    "a list": arrays_of([]),
    "deep": arrays_of(b'{"a":' * 1000),
    "two of a name": arrays_of(b'{"error": 1, "error": 2}'),
    "many names": arrays_of({f"k{index}": entry([0], [0, 0]) for index in range(2000)}),
    "2^60 elements": arrays_of({"error": entry([2**30, 2**30], [0, 2**63])}),
    "2^60 elements in 8 bytes": arrays_of({"error": entry([2**30, 2**30], [0, 8])}, b"\0" * 8),
    "a product that wraps": arrays_of({"error": entry([2**32, 2**32], [0, 0])}),
    "negative": arrays_of({"error": entry([-1, -1], [0, 8])}, b"\0" * 8),
    "true": arrays_of({"error": entry([True], [0, 8])}, b"\0" * 8),
    "floats": arrays_of({"error": entry([1.0], [0, 8])}, b"\0" * 8),
    "30 digits": arrays_of({"error": entry([10**30], [0, 8])}, b"\0" * 8),
    "backwards": arrays_of({"error": entry([1], [8, 0])}, b"\0" * 8),
    "overlap": arrays_of({"error": entry([1], [0, 8]), "kept": entry([1], [0, 8], "I64")}, b"\0" * 8),
    "a gap": arrays_of({"error": entry([1], [8, 16])}, b"\0" * 16),
    "more data": arrays_of({"error": entry([1], [0, 8])}, b"\0" * 16),
    "less data": arrays_of({"error": entry([2], [0, 16])}, b"\0" * 8),
    "unknown dtype": arrays_of({"error": entry([1], [0, 8], "C64")}, b"\0" * 8),
    "a dtype numpy lacks": arrays_of({"error": entry([4], [0, 8], "BF16")}, b"\0" * 8),
    "a dtype of another type": arrays_of({"error": entry([1], [0, 8], 3)}, b"\0" * 8),
    "many dimensions": arrays_of({"error": entry([1] * 100, [0, 8])}, b"\0" * 8),
    "no offsets": arrays_of({"error": {"dtype": "F64", "shape": [1]}}, b"\0" * 8),
    "an extra key": arrays_of({"error": entry([1], [0, 8]) | {"x": 1}}, b"\0" * 8),
    "metadata that is none": arrays_of({"__metadata__": 3, "error": entry([1], [0, 8])}, b"\0" * 8),
    "an unknown array": save({"surprise": np.zeros(3)}),
    "no array": save({}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name: str, folder: Path) -> None:
    (folder / "curves.safetensors").write_bytes(HEADERS[name])
    before = peak()
    assert "damaged curves" in refused(lambda: load_curves(folder))
    assert peak() - before < 50 * MIB


@pytest.mark.parametrize("name", [name for name in HEADERS if name not in ("an unknown array", "no array")])
def test_units_that_lie_count_as_not_finished(name: str, tmp_path: Path) -> None:
    units = Units(tmp_path / "c", {"a": 1}, resume=False)
    (tmp_path / "c" / "units" / "sample.safetensors").write_bytes(HEADERS[name])
    assert units.load("sample") is None


def test_shapes_are_compared_before_the_data_are_read(fuzz: Any, folder: Path) -> None:
    """A header that is true of a sparse file of a gigabyte, in which one array has a gigabyte that the record has not."""
    data = fuzz.curve_files()[1]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = max(item["data_offsets"][1] for item in header.values())
    header["fisher"] = entry([GIB // 8], [end, end + GIB])
    start = arrays_of(header, data[8 + length :])
    with (folder / "curves.safetensors").open("wb") as file:
        file.write(start)
        file.truncate(len(start) + GIB)
    before = peak()
    assert "unknown array 'fisher'" in refused(lambda: load_curves(folder))
    assert peak() - before < 50 * MIB


RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "layers beyond the model": lambda record: record.update(layers=[0, 3]),
    "layers twice": lambda record: record.update(layers=[0, 0]),
    "layers that are texts": lambda record: record.update(layers=["0", "2"]),
    "layers that are true": lambda record: record.update(layers=[True, 2]),
    "no layers": lambda record: record.update(layers=[]),
    "reasons of texts": lambda record: record.update(dense_reasons={"a": "b"}),
    "a stride of text": lambda record: record["settings"].update(stride="16"),
    "a stride of 7": lambda record: record["settings"].update(stride=7),
    "a pattern with escapes": lambda record: record["settings"].update(pattern="\x1b[31m"),
    "half a gain sample": lambda record: record["settings"].update(gain_samples=1.5),
    "a grid of texts": lambda record: record["settings"].update(grid=["0", "x", "1"]),
    "a name with escapes": lambda record: record["model"].update(name="\x1b[31m"),
    "more samples": lambda record: record["calibration"].update(samples=10**12),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_lie(name: str, folder: Path) -> None:
    record = json.loads((folder / "curves.json").read_bytes())
    RECORDS[name](record)
    (folder / "curves.json").write_text(json.dumps(record))
    assert "damaged curves" in refused(lambda: load_curves(folder))


def test_blocks_kept_are_never_more_than_are_visible(fuzz: Any, folder: Path) -> None:
    from safetensors.numpy import load_file

    path = folder / "curves.safetensors"
    for name, value, said in (
        ("kept", 10**6, "kept must not be above visible"),
        ("tokens", 0, "tokens must be at least 1"),
    ):
        arrays = load_file(path)
        arrays[name] = np.full_like(arrays[name], value)
        path.write_bytes(save(arrays))
        assert said in refused(lambda: load_curves(folder))
        path.write_bytes(fuzz.curve_files()[1])


# --- links


def test_a_long_value_among_settings_is_cut(folder: Path) -> None:
    record = json.loads((folder / "curves.json").read_bytes())
    record["settings"]["measures"] = ["a+" * 3000]
    (folder / "curves.json").write_text(json.dumps(record))
    message = refused(lambda: load_curves(folder))
    assert str(folder) in message and "damaged curves (measures is ('a+a+" in message and len(message) < 600


@pytest.mark.parametrize("name", ["curves.json", "curves.safetensors"])
def test_links_do_not_lead_out_of_a_curves_folder(
    name: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / name
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    assert "leads out of its folder" in refused(lambda: load_curves(folder))
    (folder / name).unlink()
    elsewhere.rename(folder / f"kept-{name}")
    (folder / name).symlink_to(f"kept-{name}")
    assert load_curves(folder).error.size  # within it a link is no harm
    link = folder.with_name(f"link-{folder.name}")
    link.symlink_to(folder)
    assert load_curves(link).error.size  # nor is one to the folder, which whoever calls has chosen


def test_a_set_of_one_length_lies_in_the_folder(
    fuzz: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("sets")
    (root / "lengths.json").write_text('{"format": 1, "lengths": [128]}')
    (root / "128").symlink_to(folder)
    assert "leads out of its folder" in refused(lambda: load_curve_sets(root))
    (root / "lengths.json").unlink()
    (root / "lengths.json").symlink_to("/etc/hostname")
    assert "leads out of its folder" in refused(lambda: load_curve_sets(root))


@pytest.mark.parametrize("length", ['"../128"', '"/etc"', '"128/.."', "128.0", "-128", "true", "1e2", '"128"'])
def test_lengths_are_numbers_and_no_paths(length: str, tmp_path: Path) -> None:
    (tmp_path / "lengths.json").write_text(f'{{"format": 1, "lengths": [{length}]}}')
    assert "lengths.json: damaged (lengths: expected whole numbers" in refused(lambda: load_curve_sets(tmp_path))


def test_units_are_neither_read_nor_written_elsewhere(tmp_path: Path) -> None:
    identity = {"a": 1}
    units = Units(tmp_path / "c", identity, resume=False)
    units.save("sample", {"x": np.ones(2)})
    inside = tmp_path / "c" / "units"
    (inside / "sample.safetensors").rename(tmp_path / "outside.safetensors")
    (inside / "sample.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert Units(tmp_path / "c", identity, resume=True).load("sample") is None
    inside.rename(tmp_path / "moved")
    inside.symlink_to(tmp_path / "moved")
    with pytest.raises(CurvesError, match="units: is a link that leads out of its folder"):
        Units(tmp_path / "c", identity, resume=True)
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["sample.safetensors"]
    inside.unlink()
    (tmp_path / "c" / "collect.json").rename(tmp_path / "plan.json")
    (tmp_path / "c" / "collect.json").symlink_to(tmp_path / "plan.json")
    with pytest.raises(CurvesError, match=r"collect\.json: is a link that leads out of its folder; remove the folder"):
        Units(tmp_path / "c", identity, resume=True)


@pytest.mark.parametrize("name", ["../escape", "/tmp/escape", "a/../../b"])
def test_a_plan_names_no_files(name: str, tmp_path: Path) -> None:
    """Names come from the code: whatever collect.json says is only compared."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "collect.json").write_text(json.dumps({"a": 1, "units": [name], name: name}))
    Units(tmp_path / "c", {"a": 1}, resume=True).save("sample", {"x": np.ones(1)})
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        *("c", "c/collect.json", "c/journal.jsonl", "c/units", "c/units/sample.safetensors")
    ]


def test_a_journal_and_a_lock_are_neither_read_nor_written_elsewhere(tmp_path: Path) -> None:
    Units(tmp_path / "c", {"a": 1}, resume=False).save("sample", {"x": np.ones(1)})
    outside, journal, lock = tmp_path / "outside", tmp_path / "c" / "journal.jsonl", tmp_path / "c" / LOCK_NAME
    journal.rename(outside)
    before = outside.read_bytes()
    journal.symlink_to(outside)
    with pytest.raises(CurvesError, match=r"journal\.jsonl: is a link that leads out of its folder"):
        Units(tmp_path / "c", {"a": 1}, resume=True)
    journal.unlink()
    lock.symlink_to(outside)
    with pytest.raises(CurvesError, match="c: cannot be made: "):
        Units(tmp_path / "c", {"a": 1}, resume=True)
    assert outside.read_bytes() == before


def test_a_journal_is_a_file_of_no_more_than_it_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Units(tmp_path, {"a": 1}, resume=False) as units:
        units.save("sample", {"x": np.ones(1)})
    journal = tmp_path / "journal.jsonl"
    monkeypatch.setattr("xcalib.collect.journal.MAX_BYTES", journal.stat().st_size - 1)
    with pytest.raises(CurvesError, match=r"journal\.jsonl: .* more than the .* that are read; remove it"):
        Units(tmp_path, {"a": 1}, resume=True).load("sample")
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(CurvesError, match=r"journal\.jsonl: not a file; remove it"):
        Units(tmp_path, {"a": 1}, resume=True).load("sample")
    journal.unlink()
    assert Units(tmp_path, {"a": 1}, resume=True).load("sample") is not None


# --- tables and configs


SOURCES = {
    "too long": "#" * (MAX_CHARS + 1),
    "too many numbers": "x = [[" + "0," * 300_000 + "]]",
    "parentheses": "x = " + "(" * 100_000,
    "minus signs": "x = [[" + "-" * 100_000 + "1]]",
    "a sum": "x = [[a" + "+a" * 100_000 + "]]",
    "attributes": "x = [[1]]\nx" + ".b" * 100_000 + " = 1",
    "calls": "x = a" + "()" * 100_000,
    "lambdas": "x = " + "lambda:" * 100_000 + "1",
    "indents": "".join(" " * depth + "if 1:\n" for depth in range(1000)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ProfileError) as caught:
        python_tables(SOURCES[name], "t.py")
    assert str(caught.value).isprintable()


def test_an_integer_that_cannot_be_printed_is_an_expression(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(f"x = [[0x1{'0' * 5000} + 1]]")
    assert "x[0][0]: must be a number, got 'an expression'" in refused(lambda: read_table(tmp_path / "t.py"))


def test_source_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    (tmp_path / "t.py").write_text(f"import os\nos.system('touch {canary}')\nx = [[0.5]]\n")
    assert read_table(tmp_path / "t.py").thresholds == ((0.5,),)
    assert not canary.exists()


@pytest.mark.parametrize("key", ["num_hidden_layers", "layers", "n_layer"])
def test_a_config_of_endless_layers(key: str, tmp_path: Path) -> None:
    config = {"model_type": "qwen3", "num_hidden_layers": 2, "text_config": {key: 2**40}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"has 1099511627776 for '{key}', more than 100,000"):
        model_identity(str(tmp_path))


# --- nothing is unpickled or run

PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pandas"}
RUNNERS = {"eval", "exec", "compile", "__import__", "execfile", "runpy.run_path"}
LOADERS = {
    "torch.load",
    "np.load",
    "numpy.load",
    "torch.hub.load",
    "torch.jit.load",
    "np.fromregex",
    "os.system",
    "os.popen",
}
YAML = {
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.unsafe_load_all",
    "yaml.full_load_all",
}
SOURCE_FILES = sorted(path for folder in ("xcalib", "kernels", "profiles") for path in (ROOT / folder).rglob("*.py"))


def dangers(source: str) -> list[str]:
    """What in a source could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [module] if module.partition(".")[0] in PICKLERS else []
            found += [f"{module}.{alias.name}" for alias in node.names if f"{module}.{alias.name}" in LOADERS | YAML]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += (
                [called]
                if called in RUNNERS | LOADERS | YAML or called.endswith((".UnsafeLoader", ".to_pickle"))
                else []
            )
            for word in node.keywords:
                if word.arg in ("allow_pickle", "weights_only") or (
                    word.arg == "shell" and ast.unparse(word.value) != "False"
                ):
                    found.append(f"{word.arg}=")
        elif isinstance(node, ast.Attribute) and node.attr in ("UnsafeLoader", "FullLoader", "unsafe_load"):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_or_runs(path: Path) -> None:
    assert dangers(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from joblib import load", "import dill as d", "def f():\n import marshal", "import shelve"),
        *(
            "torch.load(f)",
            "torch.load(f, weights_only=True)",
            "np.load(f)",
            "np.load(f, allow_pickle=True)",
            "from numpy import load",
        ),
        *("yaml.load(f)", "yaml.load(f, Loader=yaml.Loader)", "yaml.unsafe_load(f)", "x = yaml.UnsafeLoader"),
        *(
            "eval('1')",
            "exec(x)",
            "compile(x, '', 'exec')",
            "__import__(x)",
            "subprocess.run(x, shell=True)",
            "os.system(x)",
        ),
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert dangers(source)


def test_optuna_unpickles_nothing_of_ours() -> None:
    """Its only pickles are snapshots of backends that make them; files and databases hold JSON."""
    from optuna.storages._rdb import models
    from optuna.storages.journal import JournalFileBackend, _file, _storage
    from optuna.storages.journal._base import BaseJournalSnapshot

    assert not issubclass(JournalFileBackend, BaseJournalSnapshot)
    assert dangers(inspect.getsource(_file)) == dangers(inspect.getsource(models)) == []
    assert "PickleType" not in inspect.getsource(models)
    assert "pickle" in dangers(inspect.getsource(_storage))
    assert "isinstance(self._backend, BaseJournalSnapshot)" in inspect.getsource(_storage.JournalStorage.__init__)


def test_weights_are_safetensors_only(tmp_path: Path) -> None:
    """A pickle in the place of weights is not opened: this one would leave a file behind."""
    from xcalib.models.loading import load_model

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    canary = tmp_path / "ran"
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path))
    assert "safetensors" in str(caught.value)
    assert not canary.exists()


def test_the_whole_command_says_one_line(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """As a user meets it: a bomb, exit code 2, one line, no traceback."""
    bomb = tmp_path / "bomb.yaml"
    laughs = [f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in pairwise("abcdefghi")]
    bomb.write_text("a: &a [x, x]\n" + "".join(laughs))
    for command in (["validate", bomb], ["show", bomb], ["search", "--recipe", bomb], ["refine", bomb]):
        code, out, err = run(*command)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "anchors are not allowed, got '&a'" in err
