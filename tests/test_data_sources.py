"""xcalib.data: JSON lines, the hub (a stand-in for `datasets`) and users' own functions."""

import json
import re
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from xcalib.data import Sample, load_samples
from xcalib.data._sample import text_digest, tokens_digest
from xcalib.errors import DataError

WORDS = ["alder", "birch", "cedar", "elm", "fir", "ginkgo", "hazel", "juniper", "larch", "maple", "oak", "pine"]


class FakeTokenizer:
    """Pieces of up to five letters, with the white space before them."""

    bos_token_id = None

    def __init__(self) -> None:
        self.pieces: dict[int, str] = {}

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        pieces = re.findall(r"\s*\S{1,5}|\s+", text)
        ids = [zlib.crc32(piece.encode()) for piece in pieces]
        self.pieces.update(zip(ids, pieces, strict=True))
        return {"input_ids": ids}

    def decode(self, sample: Sample) -> str:
        return "".join(self.pieces[int(token)] for token in sample.tokens)


@pytest.fixture
def tokenizer() -> FakeTokenizer:
    return FakeTokenizer()


def words(count: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(f"{random.choice(WORDS)}{random.integers(100)}" for _ in range(count))


# --- JSON lines ---


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: object) -> Path:
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n\n")
        return path

    return write


def test_jsonl_rows_are_documents(write_rows: Callable[..., Path], tokenizer: FakeTokenizer) -> None:
    path = write_rows(*({"body": words(200, n), "text": "no"} for n in range(4)))
    made = load_samples([f"jsonl:{path}:body"], tokenizer, num_samples=4, max_length=100, split="all")
    assert made.documents == {text_digest(words(200, n)) for n in range(4)}


def test_jsonl_answers_make_whole_prompts(write_rows: Callable[..., Path], tokenizer: FakeTokenizer) -> None:
    rows = [
        {"text": words(40, 1), "answers": ["Paris", "Rome", "Paris"]},
        {"text": words(50, 2), "answer": 7},
        {"text": words(300, 3), "answer": "late"},
    ]
    made = load_samples([f"jsonl:{write_rows(*rows)}"], tokenizer, num_samples=2, max_length=200, split="all")
    by_text = {tokenizer.decode(sample): sample for sample in made.samples}
    assert by_text[words(40, 1)].answers == ("Paris", "Rome")
    assert by_text[words(50, 2)].answers == ("7",)
    assert all(sample.max_new_tokens >= 8 for sample in made.samples)
    made = load_samples([f"jsonl:{write_rows(*rows)}"], tokenizer, num_samples=2, max_length=120, split="all")
    with pytest.raises(DataError, match=r"found 2 of 3 .* 1 longer than 120 tokens with its answers"):
        load_samples([f"jsonl:{write_rows(*rows)}"], tokenizer, num_samples=3, max_length=120, split="all")
    with pytest.raises(DataError, match="shorter than 90 or longer"):
        load_samples(
            [f"jsonl:{write_rows(*rows)}"], tokenizer, num_samples=2, max_length=120, min_length=90, split="all"
        )


def test_jsonl_bad_rows_are_counted(write_rows: Callable[..., Path], tokenizer: FakeTokenizer) -> None:
    path = write_rows(
        {"text": words(200, 1)}, b"{nonsense", [1], {"body": "x"}, {"text": 3}, {"text": " "}, b'{"text": "\xff"}',
        {"text": words(200, 1)}, {"text": words(200, 2), "answers": [None]}, {"text": "short"},
    )  # fmt: skip
    made = load_samples([f"jsonl:{path}"], tokenizer, num_samples=1, max_length=5, min_length=1, split="all")
    spec = f"jsonl:{path}"
    assert dict(made.dropped) == {
        f"{spec}: bad JSON (line 2)": 1,
        f"{spec}: not a JSON object (line 3)": 1,
        f"{spec}: no field 'text' (line 4)": 1,
        f"{spec}: field 'text' is not a string (line 5)": 1,
        f"{spec}: empty (line 6)": 1,
        f"{spec}: not UTF-8 (line 7 byte {path.read_bytes().index(255)})": 1,
        f"{spec}: duplicate (line 8)": 1,
        f"{spec}: answers are not a string or a list of strings (line 9)": 1,
    }


# --- the hub and users' functions ---


def fake_hub(rows: list[dict[str, object]], calls: list[dict[str, object]]) -> types.ModuleType:
    def load_dataset(path: str, **options: object) -> Iterator[dict[str, object]]:
        calls.append({"path": path, **options})
        if options.get("streaming") and path == "local":
            raise NotImplementedError
        if path == "gone":
            raise RuntimeError("no such\nset")
        return iter(rows)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    return module


def test_hub_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tokenizer: FakeTokenizer) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"xcalib\[hf\]"):
        load_samples(["hf:some/set"], tokenizer, num_samples=1, max_length=100)


def test_hub_streams_and_splits(monkeypatch: pytest.MonkeyPatch, tokenizer: FakeTokenizer) -> None:
    calls: list[dict[str, object]] = []
    rows: list[dict[str, object]] = [{"id": n, "title": "t", "text": words(200, n)} for n in range(300)]
    rows[3:3] = [{"text": None}, {"text": " "}, rows[0]]
    monkeypatch.setitem(sys.modules, "datasets", fake_hub(rows, calls))
    sides = [
        load_samples(["hf:some/set:small:test"], tokenizer, num_samples=n, max_length=100, split=side)  # type: ignore[arg-type]
        for side, n in (("calibration", 40), ("heldout", 20))
    ]
    assert calls[0] == {"path": "some/set", "name": "small", "split": "test", "streaming": True}
    assert len(sides[0].documents) == 40 and not sides[0].documents & sides[1].documents
    spec = "hf:some/set:small:test"
    assert sides[0].dropped[f"{spec}: column 'text' is not a string (row 3)"] == 1
    assert sides[0].dropped[f"{spec}: empty (row 4)"] == 1


def test_hub_errors(monkeypatch: pytest.MonkeyPatch, tokenizer: FakeTokenizer) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setitem(sys.modules, "datasets", fake_hub([{"n": 1}], calls))
    with pytest.raises(DataError, match="no text column; columns: n"):
        load_samples(["hf:local"], tokenizer, num_samples=1, max_length=100)
    assert calls[-1] == {"path": "local", "name": None, "split": "train"}
    with pytest.raises(DataError, match=r"cannot open the data set .RuntimeError: no such set"):
        load_samples(["hf:gone"], tokenizer, num_samples=1, max_length=100)
    with pytest.raises(DataError, match="too many parts"):
        load_samples(["hf:a:b:c:d"], tokenizer, num_samples=1, max_length=100)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    def write(body: str) -> str:
        name = f"userdata_{zlib.crc32(str(tmp_path).encode() + body.encode())}"
        (tmp_path / f"{name}.py").write_text(f"import numpy as np\nfrom xcalib.data import Sample\n{body}")
        return name

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return write


def test_function_receives_everything_and_may_mix_kinds(module: Callable[[str], str], tokenizer: FakeTokenizer) -> None:
    name = module(
        "def make(**options):\n"
        "    assert sorted(options) == ['max_length', 'num_samples', 'seed', 'split', 'tokenizer']\n"
        "    assert (options['num_samples'], options['max_length'], options['seed']) == (3, 50, 9)\n"
        "    assert options['split'] == 'heldout'\n"
        "    yield 'some words ' * 100\n"
        "    yield 'short'\n"
        "    yield list(range(60))\n"
        "    yield Sample(np.arange(20), 'mine', ('d' * 16,), ('x',), 5)\n"
        "    raise RuntimeError('must not be asked for more')\n"
    )
    for spec in (f"{name}:make", f"{name}.make"):
        made = load_samples([spec], tokenizer, num_samples=3, max_length=50, seed=9, split="heldout")
        assert [len(sample.tokens) for sample in made.samples] == [50, 50, 20]
        assert made.samples[1].documents == (tokens_digest(np.arange(60)),)
        assert made.samples[2].source == "mine" and made.samples[2].answers == ("x",)
        assert dict(made.dropped) == {f"{spec}: shorter than 50 tokens (item 1)": 1}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 'one text'", "it returned one str"),
        ("return None", "the function failed"),
        ("raise KeyError('oops')", "KeyError: 'oops'"),
        ("return [3]", "item 0 is a int; allowed: str, a sequence of token ids, or Sample"),
        ("return [[0.5]]", "item 0 is not a sequence of token ids"),
        ("return [Sample(np.arange(200), 'mine', ())]", "1 longer than 100 tokens"),
        ("return ['word ' * 200] * 3", "found 2 of 3"),
    ],
)
def test_function_errors(body: str, message: str, module: Callable[[str], str], tokenizer: FakeTokenizer) -> None:
    with pytest.raises(DataError, match=message):
        load_samples([f"{module(f'def make(**options): {body}')}:make"], tokenizer, num_samples=3, max_length=100)


def test_function_is_subject_to_exclude(module: Callable[[str], str], tokenizer: FakeTokenizer) -> None:
    name = module("def make(**options): return (f'word{n} ' * 100 for n in range(6))")
    first = load_samples([f"{name}:make"], tokenizer, num_samples=2, max_length=50)
    second = load_samples([f"{name}:make"], tokenizer, num_samples=2, max_length=50, exclude=first.documents)
    assert not first.documents & second.documents
