"""xcalib.data: specs, sources, splits, and what is dropped. See also test_data_sources.py and test_data_ruler.py."""

import json
import logging
import re
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xcalib.data import Sample, SampleSet, load_samples, score
from xcalib.data._documents import Drops
from xcalib.data._sample import text_digest
from xcalib.data._sources import text_documents
from xcalib.data._specs import allocate, interleave
from xcalib.errors import DataError

WORDS = ["alder", "birch", "cedar", "elm", "fir", "ginkgo", "hazel", "juniper", "larch", "maple", "oak", "pine"]


class FakeTokenizer:
    """Pieces of up to five letters, with the white space before them; ids are hashes, so any order of calls agrees."""

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = 1 if bos else None
        self.calls: list[int] = []
        self.pieces: dict[int, str] = {1: ""}

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.calls.append(len(text))
        pieces = re.findall(r"\s*\S{1,5}|\s+", text)
        ids = [zlib.crc32(piece.encode()) + 2 for piece in pieces]
        self.pieces.update(zip(ids, pieces, strict=True))
        if len(ids) > 100:
            message = (
                "Token indices sequence length is longer than the specified maximum sequence length for this model"
            )
            logging.getLogger("transformers.tokenization_utils_base").warning(message)
        return {"input_ids": ([1] if self.bos_token_id and add_special_tokens else []) + ids}

    def decode(self, sample: Sample) -> str:
        return "".join(self.pieces[int(token)] for token in sample.tokens)


@pytest.fixture
def tokenizer() -> FakeTokenizer:
    return FakeTokenizer()


def words(count: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(f"{random.choice(WORDS)}{random.integers(100)}" for _ in range(count))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight documents of 400 words each."""
    for number in range(8):
        (tmp_path / f"doc{number}.txt").write_text(words(400, number), encoding="utf-8")
    return tmp_path


def windows(made: SampleSet) -> list[list[int]]:
    return [sample.tokens.tolist() for sample in made.samples]


# --- samples and scores ---


def test_sample_is_read_only_int64_and_a_copy() -> None:
    given = np.arange(5, dtype=np.int32)
    sample = Sample(given, "x", ())  # type: ignore[arg-type]
    given[0] = 99
    assert sample.tokens.dtype == np.int64 and sample.tokens[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        sample.tokens[0] = 1


@pytest.mark.parametrize(
    ("tokens", "answers", "new"),
    [([], (), 0), ([[1]], (), 0), ([-1], (), 0), ([0.5], (), 0), ([1], ("a",), 0), ([1], (), 3)],
)
def test_sample_rejects(tokens: list[object], answers: tuple[str, ...], new: int) -> None:
    with pytest.raises(DataError):
        Sample(np.asarray(tokens), "x", (), answers, new)


@pytest.mark.parametrize(
    ("answers", "text", "expected"),
    [
        (("48213",), " 48213.", 1.0),
        (("48213",), "148213 482130 48213.5 1,48213", 0.0),
        (("48213",), "it is 48213, I think", 1.0),
        (("Paris",), "PARIS!", 1.0),
        (("Paris",), "parishes", 0.0),
        (("New York",), "new\nyork", 1.0),
        (("a", "b", "c", "d"), "d c x", 0.5),
        (("C++",), "I like c++ best", 1.0),
        ((".5",), "", 0.0),
    ],
)
def test_score(answers: tuple[str, ...], text: str, expected: float) -> None:
    assert score(Sample(np.asarray([1]), "x", (), answers, 4), text) == expected


def test_score_without_answers_is_an_error() -> None:
    with pytest.raises(DataError, match="asks nothing"):
        score(Sample(np.asarray([1]), "x", ()), "text")


def test_tokens_sha256_sees_lengths_and_order() -> None:
    def digest(*lists: list[int]) -> str:
        return SampleSet(tuple(Sample(np.asarray(x), "x", ()) for x in lists), {}, (), "all", 0).tokens_sha256

    assert digest([1, 2], [3]) == digest([1, 2], [3])
    assert len({digest([1, 2], [3]), digest([1], [2, 3]), digest([3], [1, 2]), digest([1, 2, 3])}) == 4


# --- specs and weights ---


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [([1, 1], 4, [2, 2]), ([1, 1], 5, [3, 2]), ([2, 1], 9, [6, 3]), ([0.5, 1], 4, [1, 3]), ([100, 1, 1], 4, [2, 1, 1])],
)
def test_allocation(weights: list[float], total: int, expected: list[int]) -> None:
    assert allocate(weights, total) == expected


def test_interleaving_spreads_each_spec() -> None:
    assert [spec for spec, _ in interleave([4, 2])] == [0, 1, 0, 0, 1, 0]
    assert sorted(interleave([3, 1])) == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_weights_share_out_samples(folder: Path, tokenizer: FakeTokenizer) -> None:
    made = load_samples([f"text:{folder}@2", "ruler:single@1"], tokenizer, num_samples=6, max_length=300)
    sources = [sample.source for sample in made.samples]
    assert sources.count(f"text:{folder}") == 4 and sources.count("ruler:single") == 2
    assert sources[:3].count("ruler:single") == 1
    assert made.specs == (f"text:{folder}@2", "ruler:single@1")


def test_a_spec_of_weight_zero_is_not_read(folder: Path, tokenizer: FakeTokenizer) -> None:
    made = load_samples([f"text:{folder}", "text:/nowhere@0"], tokenizer, num_samples=2, max_length=100)
    assert {sample.source for sample in made.samples} == {f"text:{folder}"}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["bultin"], r"unknown data spec 'bultin'; did you mean 'builtin'\? allowed: builtin.*ruler.*text:PATH"),
        (["text:"], "unknown data spec 'text:'"),
        (["rulr:single"], "cannot import 'single' from 'rulr'"),
        (["ruler:niah"], "unknown task 'niah'; allowed: single, multikey, multivalue, multiquery, vt, cwe, fwe"),
        (["builtin:poems"], "unknown category 'poems'; allowed: code, prose, reference, tables"),
        (["builtin@two"], "bad weight '@two'"),
        (["builtin@-1"], "bad weight '@-1'"),
        (["text:a@nan"], "bad weight '@nan'"),
        (["text:/no/such/file.txt"], "no file or folder '/no/such/file.txt'"),
        (["text:/no/such/*.txt"], "no file matches"),
        (["jsonl:/no/such.jsonl:body"], "no file '/no/such.jsonl'"),
        (["builtin", "builtin@2"], "given 2 times"),
        (["builtin@0"], "no data asked for"),
        ([], "no data asked for"),
        (["builtin", "ruler", "builtin:code", "ruler:vt", "ruler:cwe"], "4 samples cannot cover 5 data specs"),
        (["json.dumps"], "json.dumps: the function failed"),
        (["json:nothing"], "cannot import 'nothing' from 'json'"),
        (["json:__name__"], "is a str, not a function"),
    ],
)
def test_bad_specs(specs: list[str], message: str, tokenizer: FakeTokenizer) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_samples(specs, tokenizer, num_samples=4, max_length=512)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"min_length": 600}, "min_length <= max_length, got 600 and 512"),
        ({"min_length": 0}, "min_length"),
        ({"split": "test"}, "unknown split 'test'; allowed: calibration, heldout, all"),
    ],
)
def test_bad_options(options: dict[str, object], message: str, tokenizer: FakeTokenizer) -> None:
    with pytest.raises(DataError, match=message):
        load_samples(["builtin"], tokenizer, **{"num_samples": 2, "max_length": 512, **options})  # type: ignore[arg-type]


# --- windows of text ---


def test_windows_are_contiguous_text_of_one_document(folder: Path, tokenizer: FakeTokenizer) -> None:
    texts = {text_digest(text): text for text in (path.read_text() for path in folder.glob("*.txt"))}
    made = load_samples([f"text:{folder}"], tokenizer, num_samples=12, max_length=100, split="all")
    for sample in made.samples:
        assert len(sample.tokens) == 100 and sample.answers == () and sample.max_new_tokens == 0
        (digest,) = sample.documents
        assert tokenizer.decode(sample) in texts[digest]


def test_every_document_gives_one_window_before_a_second(folder: Path, tokenizer: FakeTokenizer) -> None:
    made = load_samples([f"text:{folder}"], tokenizer, num_samples=24, max_length=100, split="all")
    for start in (0, 8, 16):
        assert len({sample.documents for sample in made.samples[start : start + 8]}) == 8


def test_windows_of_a_document_do_not_overlap(tmp_path: Path, tokenizer: FakeTokenizer) -> None:
    text = " ".join(f"w{number}" for number in range(1000))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    made = load_samples([f"jsonl:{tmp_path / 'a.jsonl'}"], tokenizer, num_samples=9, max_length=110)
    tokens = [token for window in windows(made) for token in window]
    assert len(set(tokens)) == 9 * 110
    with pytest.raises(DataError, match=r"found 9 of 10 samples of 110 tokens .*about 110 tokens of text are missing"):
        load_samples([f"jsonl:{tmp_path / 'a.jsonl'}"], tokenizer, num_samples=10, max_length=110)


def test_min_length_allows_shorter_windows(tmp_path: Path, tokenizer: FakeTokenizer) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"w{number}" for number in range(250)))
    made = load_samples([f"text:{tmp_path}"], tokenizer, num_samples=3, max_length=100, min_length=40)
    assert [len(sample.tokens) for sample in made.samples] == [100, 100, 50]


def test_bos_is_added_and_counted(folder: Path) -> None:
    tokenizer = FakeTokenizer(bos=True)
    made = load_samples([f"text:{folder}", "ruler:single"], tokenizer, num_samples=6, max_length=200)
    assert all(sample.tokens[0] == 1 and (sample.tokens == 1).sum() == 1 for sample in made.samples)
    assert {len(sample.tokens) for sample in made.samples if sample.source.startswith("text")} == {200}


def test_too_long_warning_is_silenced(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tokenizer: FakeTokenizer
) -> None:
    library = logging.getLogger("transformers")  # a command that ran before may have quieted it
    monkeypatch.setattr(library, "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    load_samples([f"text:{folder}"], tokenizer, num_samples=2, max_length=200)
    assert not caplog.records
    tokenizer(words(200, 0))
    assert caplog.records, "the filter must not stay"


def test_same_arguments_same_samples_other_seed_others(folder: Path) -> None:
    def make(seed: int) -> SampleSet:
        return load_samples(
            [f"text:{folder}", "builtin", "ruler"], FakeTokenizer(), num_samples=9, max_length=300, seed=seed
        )

    assert make(3).tokens_sha256 == make(3).tokens_sha256 != make(4).tokens_sha256


def test_a_moved_folder_gives_the_same_samples(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("moved") / "x"
    other.mkdir()
    for number, path in enumerate(sorted(folder.glob("*.txt"), reverse=True)):
        (other / f"{number}.md").write_bytes(path.read_bytes())
    digests = {
        load_samples([f"text:{where}"], FakeTokenizer(), num_samples=5, max_length=100).tokens_sha256
        for where in (folder, other)
    }
    assert len(digests) == 1


def test_folder_file_and_glob(folder: Path, tokenizer: FakeTokenizer) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.md").write_text(words(300, 99))
    digest = text_digest(words(300, 99))
    for spec in (f"text:{folder}/sub/deep.md", f"text:{folder}/**/*.md", f"text:{folder}/s*/d??p.md"):
        assert load_samples([spec], tokenizer, num_samples=1, max_length=100).documents == {digest}
    everything = load_samples([f"text:{folder}"], tokenizer, num_samples=9, max_length=100, split="all")
    assert len(everything.documents) == 9 and digest in everything.documents


def test_an_at_sign_may_belong_to_a_path(tmp_path: Path, tokenizer: FakeTokenizer) -> None:
    (tmp_path / "me@home.txt").write_text(words(300, 1))
    assert load_samples([f"text:{tmp_path}/me@home.txt"], tokenizer, num_samples=1, max_length=100).samples
    assert load_samples([f"text:{tmp_path}/me@home.txt@2"], tokenizer, num_samples=1, max_length=100).samples


def test_dropped_files_are_counted_and_named(folder: Path, tokenizer: FakeTokenizer) -> None:
    (folder / "short.txt").write_text("a few words")
    (folder / "latin.txt").write_bytes("Übergröße".encode("latin-1"))
    (folder / "cut.txt").write_bytes("ü".encode()[:1])
    (folder / "binary.bin").write_bytes(b"a\0b")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "blank.txt").write_text(" \n\n ")
    (folder / "copy.txt").write_bytes((folder / "doc0.txt").read_bytes())
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text(words(400, 50))
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    made = load_samples([f"text:{folder}"], tokenizer, num_samples=12, max_length=100, split="all")
    spec = f"text:{folder}"
    assert dict(made.dropped) == {
        f"{spec}: not text: a NUL byte (binary.bin line 1 byte 1)": 1,
        f"{spec}: not UTF-8 (cut.txt line 1 byte 0, latin.txt line 1 byte 0)": 2,
        f"{spec}: empty (blank.txt, empty.txt)": 2,
        f"{spec}: duplicate (doc0.txt)": 1,
        f"{spec}: hidden file or folder (.hidden)": 1,
        f"{spec}: link to a folder, broken link or special file (loop)": 1,
        f"{spec}: shorter than 100 tokens (short.txt)": 1,
    }


def test_a_byte_order_mark_is_not_text(tmp_path: Path, tokenizer: FakeTokenizer) -> None:
    (tmp_path / "a.txt").write_text(words(200, 1), encoding="utf-8-sig")
    made = load_samples([f"text:{tmp_path}"], tokenizer, num_samples=1, max_length=100, split="all")
    assert made.documents == {text_digest(words(200, 1))}
    assert "\ufeff" not in tokenizer.decode(made.samples[0])


def test_nothing_usable_says_what_was_dropped(tmp_path: Path, tokenizer: FakeTokenizer) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="no usable document; dropped: 1 not UTF-8"):
        load_samples([f"text:{tmp_path}"], tokenizer, num_samples=1, max_length=100)


def test_huge_file_is_read_and_tokenised_in_pieces(tmp_path: Path, tokenizer: FakeTokenizer) -> None:
    path = tmp_path / "huge.txt"
    block = words(20_000, 5).replace("oak", "öak")
    with path.open("w", encoding="utf-8") as file:
        for number in range(200):
            file.write(f"\n{number} {block}")
    size = path.stat().st_size
    assert size > 25_000_000
    tracemalloc.start()
    made = load_samples([f"text:{path}"], tokenizer, num_samples=2, max_length=1_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(tokenizer.calls) < 2_500_000, "only the pieces that windows come from are tokenised"
    # Python objects of the fake tokenizer for one piece take most of this.
    assert peak < 0.5 * 25_000_000 * 8
    again = load_samples([f"text:{path}"], FakeTokenizer(), num_samples=2, max_length=1_000)
    assert made.tokens_sha256 == again.tokens_sha256
    text = path.read_text(encoding="utf-8")
    assert all(tokenizer.decode(sample) in text for sample in made.samples)
    assert text_digest(text) in made.documents and len(made.documents) == 2  # the file, and the half that was read


# --- the split ---


@pytest.mark.parametrize("text", [words(3_000, 1), "\ufeff" + words(3_000, 2).replace(" ", "\n"), "ö" * 9_001], ids=len)
@pytest.mark.parametrize("by", ["file", "folder", "glob"])
def test_a_single_file_is_cut_in_two(tmp_path: Path, tokenizer: FakeTokenizer, text: str, by: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text, encoding="utf-8")
    places = {"file": path, "folder": tmp_path, "glob": tmp_path / "*.txt"}
    spec = [f"text:{places[by]}"]
    found = list(text_documents("s", spec[0].removeprefix("text:"), Drops()))
    plain = text.removeprefix("\ufeff")
    assert [document.name for document in found] == ["notes.txt (first half)", "notes.txt (second half)"]
    assert "".join(document.read(0, document.size) for document in found) == plain
    assert [document.digest for document in found] == [
        text_digest(document.read(0, document.size)) for document in found
    ]
    assert abs(found[0].size - found[1].size) < 0.1 * len(plain.encode())
    how: dict[str, Any] = {"num_samples": 1, "max_length": 8 if text[0] == "ö" else 200, "min_length": 1}
    made = load_samples(spec, tokenizer, **how)
    held = load_samples(spec, tokenizer, **how, split="heldout", exclude=made.documents)
    assert not made.documents & held.documents
    (half,) = held.documents
    assert made.documents == {document.digest for document in found} - {half} | {text_digest(plain)}


def test_a_file_and_its_halves_are_told_apart(tmp_path: Path, tokenizer: FakeTokenizer) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(words(3_000, 1))
    half = load_samples([f"text:{path}"], tokenizer, num_samples=1, max_length=200)
    (tmp_path / "more.txt").write_text(words(3_000, 2))
    both = load_samples([f"text:{tmp_path}"], tokenizer, num_samples=2, max_length=200, split="all")
    assert len(both.documents) == 2  # each a document of its own
    # calibrated on a half: neither it nor the whole file again, but the other half
    again = load_samples(
        [f"text:{tmp_path}"], tokenizer, num_samples=1, max_length=200, split="all", exclude=half.documents
    )
    assert again.documents == {text_digest((tmp_path / "more.txt").read_text())}
    # calibrated on the whole file among others: none of its halves
    with pytest.raises(DataError, match="no document is left"):
        load_samples(
            [f"text:{path}"], tokenizer, num_samples=1, max_length=200, split="heldout", exclude=both.documents
        )


def test_a_small_file_is_not_cut(tmp_path: Path, tokenizer: FakeTokenizer) -> None:
    (tmp_path / "a.txt").write_text("a few words " * 300)
    with pytest.raises(DataError, match="a single document cannot serve both"):
        load_samples([f"text:{tmp_path / 'a.txt'}"], tokenizer, num_samples=1, max_length=20, split="heldout")


def test_splits_share_no_document_whatever_the_seed(folder: Path, tokenizer: FakeTokenizer) -> None:
    spec = [f"text:{folder}"]
    sides: dict[str, set[str]] = {"calibration": set(), "heldout": set()}
    for seed in range(5):
        for side, seen in sides.items():
            made = load_samples(spec, tokenizer, num_samples=4, max_length=100, seed=seed, split=side)  # type: ignore[arg-type]
            seen.update(made.documents)
    assert len(sides["calibration"]) == len(sides["heldout"]) == 4
    assert not sides["calibration"] & sides["heldout"]


def test_the_split_depends_on_neither_names_nor_lengths(folder: Path, tokenizer: FakeTokenizer) -> None:
    made = load_samples([f"text:{folder}"], tokenizer, num_samples=4, max_length=100)
    for number, path in enumerate(sorted(folder.glob("*.txt"))):
        path.rename(folder / f"{7 - number}.md")
    other = load_samples([f"text:{folder}"], FakeTokenizer(bos=True), num_samples=4, max_length=300)
    assert made.documents == other.documents


def test_a_single_document_cannot_be_held_out(tmp_path: Path, tokenizer: FakeTokenizer) -> None:
    (tmp_path / "a.txt").write_text(words(400, 1))
    (tmp_path / "b.txt").write_text(words(400, 1))
    assert load_samples([f"text:{tmp_path}"], tokenizer, num_samples=2, max_length=100).samples
    with pytest.raises(DataError, match=r"single document .* give a second document, .* --heldout-data"):
        load_samples([f"text:{tmp_path}"], tokenizer, num_samples=1, max_length=100, split="heldout")


def test_exclude_is_dropped_and_counted(folder: Path, tokenizer: FakeTokenizer) -> None:
    spec = f"text:{folder}"
    first = load_samples([spec], tokenizer, num_samples=2, max_length=100, split="all")
    second = load_samples(
        [spec], tokenizer, num_samples=6, max_length=100, split="all", exclude=[d + "0" * 48 for d in first.documents]
    )
    assert not first.documents & second.documents
    assert [count for reason, count in second.dropped.items() if "excluded" in reason] == [2]
    with pytest.raises(DataError, match="no document is left for the calibration split; dropped: 4 excluded"):
        everything = load_samples([spec], tokenizer, num_samples=8, max_length=100, split="all").documents
        load_samples([spec], tokenizer, num_samples=1, max_length=100, exclude=everything)
