"""xcalib.data: the shipped corpus, the RULER-style tasks, and that calibration and held-out text never meet."""

import re
import time
import zlib
from collections import Counter
from importlib.resources import files
from itertools import product

import numpy as np
import pytest

from xcalib.data import DEFAULT_SPECS, TASKS, Sample, categories, load_samples, score
from xcalib.data._documents import Drops, choose
from xcalib.data._haystack import hide
from xcalib.data._sources import builtin_documents
from xcalib.errors import DataError

SHINGLE = 50


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


def shingles(text: str) -> set[str]:
    return {text[start : start + SHINGLE] for start in range(len(text) - SHINGLE + 1)}


# --- the corpus ---


def test_corpus_size_variety_and_encoding() -> None:
    documents = builtin_documents("")
    assert categories() == ("code", "prose", "reference", "tables")
    assert 600_000 <= sum(document.size for document in documents) <= 1_500_000
    counts = Counter(document.category for document in documents)
    assert all(count >= 10 for count in counts.values())
    assert sum(document.size >= 12_000 for document in documents) > len(documents) / 2
    assert len({document.digest for document in documents}) == len(documents)
    for document in documents:
        text = document.read(0, document.size)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\ufffd\ufeff]", text), document.name
        assert not re.search(r"[\w.]+@\w+\.\w+", text), f"{document.name}: an e-mail address"
        assert text.strip() and text.endswith("\n")


def test_every_corpus_file_is_covered_by_the_licence_file() -> None:
    corpus = files("xcalib.data.corpus")
    licence = (corpus / "LICENSE.md").read_text(encoding="utf-8")
    patterns = [pattern.replace("*", ".*") for pattern in re.findall(r"\| `([\w/*.-]+)` \|", licence)]
    for document in builtin_documents(""):
        name = document.name.removesuffix(".txt")
        assert any(re.fullmatch(pattern.removesuffix(".txt"), name) for pattern in patterns), document.name
    assert {entry.name for entry in corpus.iterdir() if entry.is_dir() and entry.name[0] not in "_."} == set(
        categories()
    )
    for word in ("public domain", "MIT", "Apache-2.0", "Jargon File", "SQLite", "tz database", "Jane Austen"):
        assert word in licence


def test_splits_of_the_corpus_share_no_text() -> None:
    seen: list[set[str]] = []
    for split in ("calibration", "heldout"):
        texts = []
        for category in categories():
            ordered = choose("builtin", builtin_documents(category), split=split, exclude=frozenset(), drops=Drops())
            assert len(ordered) >= 4
            kinds = {document.group for document in builtin_documents(category)}
            assert {document.group for document in ordered} == kinds, "both splits hold every kind of text"
            assert sum(document.size for document in ordered) > 60_000
            assert max(document.size for document in ordered) > 48_000
            texts += [document.read(0, document.size) for document in ordered]
        seen.append(set().union(*map(shingles, texts)))
    assert not seen[0] & seen[1]


def test_builtin_takes_categories_in_turns(tokenizer: FakeTokenizer) -> None:
    groups = {document.digest: document.category for document in builtin_documents("")}
    made = load_samples(["builtin"], tokenizer, num_samples=8, max_length=1_024)
    drawn = [groups[sample.documents[0]] for sample in made.samples]
    assert set(drawn[:4]) == set(drawn[4:]) == set(categories())
    only = load_samples(["builtin:code,tables"], tokenizer, num_samples=8, max_length=1_024)
    assert {groups[sample.documents[0]] for sample in only.samples} == {"code", "tables"}


def test_samples_of_both_splits_share_no_text(tokenizer: FakeTokenizer) -> None:
    seen: dict[str, set[str]] = {"calibration": set(), "heldout": set()}
    documents: dict[str, frozenset[str]] = {}
    for side, text in seen.items():
        for seed in (0, 1):
            made = load_samples(DEFAULT_SPECS, tokenizer, num_samples=42, max_length=2_000, seed=seed, split=side)  # type: ignore[arg-type]
            documents[side] = documents.get(side, frozenset()) | made.documents
            for sample in made.samples:
                text.update(shingles(tokenizer.decode(sample)))
    assert not documents["calibration"] & documents["heldout"]
    assert not seen["calibration"] & seen["heldout"]


# --- the tasks ---


@pytest.mark.parametrize("length", [256, 400, 1_023, 1_024, 4_096])
@pytest.mark.parametrize("task", TASKS)
def test_length_and_answers(task: str, length: int, tokenizer: FakeTokenizer) -> None:
    made = load_samples([f"ruler:{task}"], tokenizer, num_samples=4, max_length=length, seed=length)
    for sample in made.samples:
        assert 0.9 * length <= len(sample.tokens) + sample.max_new_tokens <= length
        assert sample.source == f"ruler:{task}" and sample.documents and sample.answers
        assert len(tokenizer(" " + ", ".join(sample.answers))["input_ids"]) < sample.max_new_tokens
        text = tokenizer.decode(sample)
        context, _, ending = text.rpartition("\n\nQuestion: ")
        assert re.search(r"\nAnswer: The [\w ,-]+ (is|are)$", ending), "the answer has begun"
        assert all(answer in context and answer not in ending for answer in sample.answers)
        assert score(sample, " and ".join(sample.answers)) == 1.0


def test_all_tasks_take_turns_and_differ(tokenizer: FakeTokenizer) -> None:
    made = load_samples(["ruler"], tokenizer, num_samples=14, max_length=600)
    assert [sample.source for sample in made.samples] == [f"ruler:{task}" for task in TASKS] * 2
    assert len({sample.answers for sample in made.samples}) == 14
    some = load_samples(["ruler:vt,cwe"], tokenizer, num_samples=4, max_length=600)
    assert [sample.source for sample in some.samples] == ["ruler:vt", "ruler:cwe"] * 2


@pytest.mark.parametrize("task", ["single", "multikey", "multivalue", "multiquery"])
def test_needles_answer_the_question(task: str, tokenizer: FakeTokenizer) -> None:
    depths = []
    for sample in load_samples([f"ruler:{task}"], tokenizer, num_samples=12, max_length=3_000).samples:
        context, _, ending = tokenizer.decode(sample).rpartition("\n\nQuestion: ")
        needles = re.findall(r"The special number for (\w+-\w+) is (\d{5})\.", context)
        asked = re.findall(r"\b[a-z]+-[a-z]+\b", ending.partition("\nAnswer: ")[2])
        assert sorted(sample.answers) == sorted(value for key, value in needles if key in asked)
        assert len({value for _, value in needles}) == len(needles)
        for answer in sample.answers:
            assert len(re.findall(rf"(?<!\d){answer}(?!\d)", context)) == 1
            depths.append(context.index(answer) / len(context))
        distractors = [key for key, _ in needles if key not in asked]
        assert (len(distractors) > 0) == (task != "single")
    assert min(depths) < 0.25 and max(depths) > 0.75


def test_tracked_variables_follow_from_the_text(tokenizer: FakeTokenizer) -> None:
    for sample in load_samples(["ruler:vt"], tokenizer, num_samples=8, max_length=3_000).samples:
        context, _, ending = tokenizer.decode(sample).rpartition("\n\nQuestion: ")
        values: dict[str, str] = {}
        for name, source in re.findall(r"Set ([A-Z]{5}) = (\w+)\.", context):
            values[name] = values.get(source, source)
        asked = re.findall(r"\d{5}", ending)[0]
        assert sample.answers == tuple(name for name, value in values.items() if value == asked)
        assert len(sample.answers) == 5 and len(values) == 8


@pytest.mark.parametrize(("task", "length"), list(product(["cwe", "fwe"], [256, 1_000, 16_384])))
def test_asked_words_are_the_most_frequent(task: str, length: int, tokenizer: FakeTokenizer) -> None:
    for sample in load_samples([f"ruler:{task}"], tokenizer, num_samples=2, max_length=length).samples:
        counts = Counter(tokenizer.decode(sample).split("\n\n")[1].split()).most_common()
        number = len(sample.answers)
        assert {word for word, _ in counts[:number]} == set(sample.answers)
        assert counts[number - 1][1] > counts[number][1], "no tie at the border"
        assert number == (5 if task == "cwe" else 3)


def test_haystacks_are_corpus_text_and_differ(tokenizer: FakeTokenizer) -> None:
    corpus = {document.digest: document.read(0, document.size) for document in builtin_documents("")}
    contexts = []
    for sample in load_samples(["ruler:single"], tokenizer, num_samples=4, max_length=2_000).samples:
        context = tokenizer.decode(sample).rpartition("\n\nQuestion: ")[0].partition("\n\n")[2]
        context = re.sub(r"The special number for \S+ is \d+\.", "", context)
        sources = "".join(corpus[digest] for digest in sample.documents)
        paragraphs = [part.strip() for part in context.split("\n\n")[:-1]]
        found = [part in sources for part in paragraphs]
        assert sum(found) >= len(found) - 1, "all but the paragraph with the needle"
        contexts.append(context)
    assert not set.intersection(*map(shingles, contexts))


def test_passages_repeat_only_when_the_corpus_is_exhausted(tokenizer: FakeTokenizer) -> None:
    text = tokenizer.decode(load_samples(["ruler:single"], tokenizer, num_samples=1, max_length=60_000).samples[0])
    paragraphs = Counter(part for part in text.split("\n\n") if len(part) > 400)
    assert paragraphs.most_common(1)[0][1] == 1


def test_32k_samples_are_fast(tokenizer: FakeTokenizer) -> None:
    load_samples(["ruler"], tokenizer, num_samples=1, max_length=512)
    start = time.process_time()
    made = load_samples(["ruler"], tokenizer, num_samples=len(TASKS), max_length=32_768)
    assert (time.process_time() - start) / len(TASKS) < 2
    assert all(len(sample.tokens) > 0.9 * 32_000 for sample in made.samples)


def test_streams_depend_on_seed_split_and_spec(tokenizer: FakeTokenizer) -> None:
    def first(spec: str, **options: object) -> tuple[str, ...]:
        return load_samples([spec], tokenizer, num_samples=1, max_length=600, **options).samples[0].answers  # type: ignore[arg-type]

    answers = [first("ruler"), first("ruler", seed=1), first("ruler", split="heldout"), first("ruler:single")]
    assert len(set(answers)) == 4 and first("ruler") == answers[0]
    more = load_samples(["ruler"], tokenizer, num_samples=9, max_length=600).samples[0]
    assert more.answers == answers[0], "asking for more samples keeps the first ones"


def test_ruler_obeys_exclude(tokenizer: FakeTokenizer) -> None:
    banned = {document.digest for document in builtin_documents("prose")}
    made = load_samples(["ruler:single"], tokenizer, num_samples=2, max_length=20_000, exclude=banned)
    assert not made.documents & banned
    assert sum(count for reason, count in made.dropped.items() if "excluded" in reason) >= 5


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_is_an_error(task: str, tokenizer: FakeTokenizer) -> None:
    with pytest.raises(DataError, match=f"ruler:{task}: 40 tokens are too few"):
        load_samples([f"ruler:{task}"], tokenizer, num_samples=1, max_length=40)


def test_hide_keeps_order_and_every_needle() -> None:
    text = "One. Two. Three.\nFour"
    assert hide(text, ["A.", "B.", "C."], [0.0, 0.3, 0.95]) == "One. A. Two. B. Three.\nFour C."
    assert hide("", ["A."], [0.5]) == "A."
    for depth in np.linspace(0, 1, 23):
        assert hide(text, ["X."], [float(depth)]).replace("X.", "").split() == text.split()
