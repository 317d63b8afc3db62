"""Data that somebody will give: empty, blank, too short, broken, one token long, a million tokens long."""

import codecs
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xcalib.collect import CollectSettings, collect
from xcalib.data import Sample, SampleSet, load_samples
from xcalib.data._utf8 import NotTextError, TextChecker
from xcalib.errors import CurvesError, DataError, MemoryLimitError
from xcalib.evaluation import evaluate_plans

Build = Callable[..., Any]
Run = Callable[..., tuple[int, str, str]]

WORDS = " ".join(f"word{number}" for number in range(300))
OTHER = " ".join(f"term{number}" for number in range(300))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(tiny_folder)


def load(path: Path, tokenizer: Any, **options: Any) -> SampleSet:
    kind = "jsonl" if path.suffix == ".jsonl" else "text"
    return load_samples([f"{kind}:{path}"], tokenizer, **{"num_samples": 1, "max_length": 64, "split": "all"} | options)


def row(text: str, **more: Any) -> bytes:
    return json.dumps({"text": text, **more}).encode() + b"\n"


def at(before: bytes) -> str:
    return f"line {before.count(bytes([10])) + 1} byte {len(before)}"


LINES = WORDS.encode() + b"\r\n\n" + "caf\u00e9".encode()

REFUSED = {
    "empty.txt": (b"", "no usable document; dropped: 1 empty"),
    "blank.txt": (b" \r\n\t\n", "no usable document; dropped: 1 empty"),
    "bom-only.txt": (codecs.BOM_UTF8, "no usable document; dropped: 1 empty"),
    "empty.jsonl": (b"", "no usable document; dropped: 1 empty"),
    "blank.jsonl": (b"\n \r\n\n", "no usable document; dropped: 1 empty"),
    "empty-sample.jsonl": (row("") + row(" \n"), "no usable document; dropped: 2 empty (line 1, line 2)"),
    "short.txt": (b"hi", "about 64 tokens of text are missing; dropped: 1 shorter than 64 tokens; add text"),
    "short.jsonl": (row("hi"), "about 64 tokens of text are missing; dropped: 1 shorter than 64 tokens (line 1)"),
    "latin.txt": (LINES + b"\xe9tude", f"dropped: 1 not UTF-8 (latin.txt {at(LINES)})"),
    "cut.txt": (LINES + "\u00e9".encode()[:1], f"dropped: 1 not UTF-8 (cut.txt {at(LINES)})"),
    "utf16.txt": (WORDS.encode("utf-16"), "dropped: 1 not UTF-8 (utf16.txt line 1 byte 0)"),
    "nul.txt": (LINES + b"\0" + LINES, f"dropped: 1 not text: a NUL byte (nul.txt {at(LINES)})"),
    "latin.jsonl": (row("ok") + b'{"text": "\xe9"}\n', f"1 not UTF-8 (line 2 byte {len(row('ok')) + 10})"),
    "nul.jsonl": (b'{"text": "a\0b"}\n', "dropped: 1 bad JSON (line 1)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_one_line_that_says_where(tokenizer: Any, tmp_path: Path, name: str) -> None:
    data, said = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name, tokenizer)
    message = str(caught.value)
    assert str(tmp_path / name) in message
    assert said in message
    assert "\n" not in message


TAKEN = {
    "crlf.txt": WORDS.replace(" word1", "\r\nword1").encode(),
    "bom.txt": codecs.BOM_UTF8 + WORDS.encode(),
    "crlf.jsonl": row(WORDS).replace(b"\n", b"\r\n"),
    "bom.jsonl": codecs.BOM_UTF8 + row(WORDS),
    "no-end-of-line.jsonl": row(WORDS).rstrip(),
    "nul.jsonl": row(WORDS + "\0" + WORDS),
    "surrogate.jsonl": row(WORDS + " \ud800 " + WORDS),
    "astral.jsonl": row(WORDS + " \U0001f600 " + WORDS),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_can_be_used(tokenizer: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TAKEN[name])
    made = load(tmp_path / name, tokenizer)
    assert [len(sample.tokens) for sample in made.samples] == [64]
    assert made.dropped == {}


def test_a_byte_order_mark_is_no_text(tokenizer: Any, tmp_path: Path) -> None:
    for name, plain in (("a.txt", WORDS.encode()), ("a.jsonl", row(WORDS))):
        (tmp_path / name).write_bytes(plain)
        (tmp_path / f"bom-{name}").write_bytes(codecs.BOM_UTF8 + plain)
        first, second = load(tmp_path / name, tokenizer), load(tmp_path / f"bom-{name}", tokenizer)
        assert first.tokens_sha256 == second.tokens_sha256
        assert first.documents == second.documents


def test_lone_surrogates_in_an_answer(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(row(WORDS, answers=["Par\ud800is"]))
    (sample,) = load(tmp_path / "a.jsonl", tokenizer, max_length=2000).samples
    assert sample.max_new_tokens >= 8
    assert len(load(tmp_path / "a.jsonl", tokenizer, max_length=2000).questions_sha256) == 64


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=4), st.integers(0, 5))
def test_pieces_find_what_the_whole_finds(data: bytes, cuts: list[int], skipped: int) -> None:
    """However a file is read, the same text, or the same line and byte."""
    borders = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    checker = TextChecker(position=skipped)
    try:
        pieces = [checker.text(data[a:b]) for a, b in pairwise(borders)]
        text = "".join([*pieces, checker.text(b"", final=True)])
    except NotTextError as error:
        byte = int(error.place.rpartition(" ")[2]) - skipped
        line = data[:byte].count(10) + 1
        assert error.place == f"line {line} byte {byte + skipped}"
        if error.reason == "not UTF-8":
            with pytest.raises(UnicodeDecodeError) as caught:
                data.decode("utf-8")
            assert caught.value.start == byte
        else:
            assert data[byte] == 0
    else:
        assert text == data.decode("utf-8")
        assert "\0" not in text


def test_one_token(tokenizer: Any, tiny_model: Build, tmp_path: Path) -> None:
    """It is a sample, but there is nothing to measure or to evaluate on it: the errors say so."""
    (tmp_path / "one.txt").write_bytes(b"a")
    made = load(tmp_path / "one.txt", tokenizer, min_length=1)
    assert [len(sample.tokens) for sample in made.samples] == [2]  # with the tokenizer's bos
    with pytest.raises(
        CurvesError, match="gain_every is 7, but a sample has only 2 tokens: leave out what is so short"
    ):
        collect(tiny_model(), made, tmp_path / "curves")
    single = SampleSet((Sample(np.array([5]), "mine", ("0" * 16,)),), {}, ("mine",), "all", 0)
    with pytest.raises(
        DataError, match=r"^sample 0 \(mine\) has one token: nothing follows it to be predicted; leave it out$"
    ):
        evaluate_plans(tiny_model(), single, {})


class Counting:
    """A tokenizer of one token for every five characters that counts what it is given."""

    bos_token_id = None

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, Any]:
        self.characters += len(text)
        return {"input_ids": np.arange(len(text) // 5)}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_million_tokens_are_read_about_once(tmp_path: Path, suffix: str) -> None:
    """Windows of one huge document: however many are drawn, no part is tokenised again."""
    text = "word " * 1_000_000
    path = tmp_path / f"huge{suffix}"
    path.write_bytes(row(text) if suffix == ".jsonl" else text.encode())
    for length, count in ((64, 500), (2048, 100), (1_000_000, 1)):
        tokenizer = Counting()
        made = load(path, tokenizer, max_length=length, num_samples=count)
        assert [len(sample.tokens) for sample in made.samples] == [length] * count
        assert tokenizer.characters <= len(text)


def test_a_huge_document_is_not_tokenised_for_every_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the size to which all documents' tokens are kept: a piece's tokens are."""
    monkeypatch.setattr("xcalib.data._windows._KEPT_BYTES", 2_000_000)
    text = "word " * 1_000_000
    (tmp_path / "huge.txt").write_text(text)
    tokenizer = Counting()
    load(tmp_path / "huge.txt", tokenizer, num_samples=500)
    assert tokenizer.characters < len(text)


def test_a_million_tokens_on_the_command_line(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a length windows of the default one are drawn; a length that the model has no positions for is refused."""
    (tmp_path / "huge.txt").write_text("a word or two " * 300_000)
    how = (
        "collect",
        tiny_folder,
        "--data",
        f"text:{tmp_path / 'huge.txt'}",
        "--out",
        tmp_path / "curves",
        "--num-samples",
        "1",
    )
    lengths: list[int] = []

    def stop(_model: Any, sets: Any, *_arguments: Any, **_options: Any) -> Any:
        lengths.extend(len(sample.tokens) for one in sets for sample in one.samples)
        raise DataError("enough")

    monkeypatch.setattr("xcalib.collect.collect_lengths", stop)
    code, _, said = run(*how)
    assert (code, lengths) == (2, [2048])
    assert said.endswith("error: enough\n")
    code, _, said = run(*how, "--max-length", "1000000")
    assert code == 2
    assert said.splitlines()[-1].startswith("error: samples of 1,000,000 tokens are asked for, but ")


def test_a_million_token_sample_says_what_it_would_take(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the library nothing shortens a sample: what the machine cannot hold is refused at once, with the figure."""
    tokens = np.ones(1_000_000, dtype=np.int64)
    samples = SampleSet((Sample(tokens, "mine", ("0" * 16,)),), {}, ("mine",), "all", 0)
    model = tiny_model(num_attention_heads=8, num_key_value_heads=2, hidden_size=256, intermediate_size=512)
    monkeypatch.setattr(type(model), "forward", None)
    monkeypatch.setattr(type(model.model), "forward", None)  # it is not tried
    with pytest.raises(MemoryLimitError) as caught:
        collect(model, samples, tmp_path / "curves", max_memory=2**32)
    assert "4.0 GiB are allowed, but samples of 1,000,000 tokens need " in str(caught.value)
    assert not (tmp_path / "curves").exists()


def test_what_the_machine_has_is_the_limit_on_a_cpu(
    tiny_model: Build, random_samples: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xcalib.collect.budget.host_memory", lambda: 2**20)
    with pytest.raises(
        MemoryLimitError, match=r"^1\.0 MiB are all that this machine has, but samples of 330 tokens need "
    ):
        collect(tiny_model(), random_samples([330]), tmp_path / "curves")
    found = collect(
        tiny_model(),
        random_samples([330, 340]),
        tmp_path / "curves",
        settings=CollectSettings(block_size=64),
        max_memory=2**40,
    )
    assert len(found.tokens) == 2
