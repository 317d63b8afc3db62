"""xcalib.data: how answers are scored, rows of JSON lines that say so, LongBench's own rows, and `limit`."""

import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xcalib.data import METRICS, RULER_TASKS, Metric, Sample, SampleSet, load_samples, score
from xcalib.data._longbench import prompt
from xcalib.data._metrics import evaluate_metric
from xcalib.data._sample import text_digest
from xcalib.errors import DataError


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


TOKENIZER = FakeTokenizer()


def asking(metric: str, *answers: str) -> Sample:
    return Sample(np.asarray([1]), "x", (), answers, 4, metric)  # type: ignore[arg-type]


# --- metrics


@pytest.mark.parametrize(
    ("metric", "answers", "text", "expected"),
    [
        ("recall", ("a1", "b2"), "b2", 0.5),
        ("exact", ("The Cat",), " cat!\nQuestion: and then?", 1.0),
        ("exact", ("cat",), "the cat sat", 0.0),
        ("exact", ("cat", "dog"), "Dog.", 1.0),
        ("exact", ("A",), "a)", 1.0),
        ("exact", ("A",), "", 0.0),
        ("exact", ("?",), "...", 0.0),
        ("exact", ("one\ntwo",), "one two", 1.0),
        ("exact", ("one\ntwo",), "One,\nTwo\nthree", 1.0),
        ("exact", ("«Paris»",), "Paris", 1.0),
        ("f1", ("red green blue",), "green red", 0.8),
        ("f1", ("red red",), "red", 2 / 3),
        ("f1", ("red", "green blue"), "the green sea", 0.5),
        ("f1", ("red",), "", 0.0),
        ("f1", ("red",), "blue\nred", 0.0),
        ("f1", ("北京",), "在北京。", 0.8),
        ("rouge-l", ("the cat sat on the mat",), "the cat on mat", 0.8),
        ("rouge-l", ("a b c d",), "d c b a", 0.25),
        ("rouge-l", ("x y", "one two"), "One, two!", 1.0),
        ("rouge-l", ("one two",), "one\ntwo", 1.0),
        ("rouge-l", ("Straße nach Köln",), "straße Köln", 0.8),
        ("rouge-l", ("red",), "", 0.0),
        ("rouge-l", ("!",), "!", 0.0),
    ],
)
def test_metrics(metric: str, answers: tuple[str, ...], text: str, expected: float) -> None:
    assert score(asking(metric, *answers), text) == pytest.approx(expected)


def test_rouge_l_is_the_librarys_own_on_english() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    library = RougeScorer(["rougeL"])
    for answer, text in [
        ("It's 3.5 miles, isn't it?", "3.5 miles it is"),
        ("a_b c-d", "b d"),
        ("ONE two", "one TWO 3"),
    ]:
        assert evaluate_metric("rouge-l", [answer], text) == library.score(answer, text)["rougeL"].fmeasure


line = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=30)


@given(st.sampled_from(METRICS), st.lists(line.filter(str.strip), min_size=1, max_size=3), line)
def test_scores_are_in_0_to_1_and_do_not_depend_on_order(metric: Metric, answers: list[str], text: str) -> None:
    value = evaluate_metric(metric, answers, text)
    assert 0.0 <= value <= 1.0
    assert evaluate_metric(metric, answers[::-1], text) == pytest.approx(value)
    if metric != "recall":
        assert evaluate_metric(metric, [*answers, "another"], text) >= value


@given(st.sampled_from(["exact", "f1"]), st.lists(line.filter(str.strip), min_size=1, max_size=3))
def test_an_answer_scores_in_full_and_nothing_scores_nothing(metric: Metric, answers: list[str]) -> None:
    assert evaluate_metric(metric, answers, answers[-1]) == 1.0
    assert evaluate_metric(metric, answers, f"\n {answers[-1]} \nand more") == 1.0
    assert evaluate_metric(metric, answers, "") == 0.0


@given(
    st.lists(st.sampled_from(["red", "green", "blue", "one"]), min_size=1),
    st.lists(st.sampled_from(["red", "green", "x"])),
)
def test_f1_is_that_of_precision_and_recall(answer: list[str], found: list[str]) -> None:
    common = sum((Counter(answer) & Counter(found)).values())
    expected = 0.0
    if common:
        precision, recall = common / len(found), common / len(answer)
        expected = 2 * precision * recall / (precision + recall)
    assert evaluate_metric("f1", [" ".join(answer)], " ".join(found)) == pytest.approx(expected)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(DataError, match="x: unknown metric 'bleu'; allowed: recall, exact, f1, rouge-l"):
        asking("bleu", "a")


def test_questions_sha256_sees_what_scores_depend_on() -> None:
    def digest(*samples: Sample) -> str:
        return SampleSet(samples, {}, (), "all", 0).questions_sha256

    one = asking("f1", "a", "b")
    others = [asking("exact", "a", "b"), asking("f1", "b", "a"), Sample(np.asarray([1]), "x", (), ("a", "b"), 5, "f1")]
    assert digest(one) == digest(asking("f1", "a", "b"))
    assert len({digest(sample) for sample in (one, *others)} | {digest(one, one)}) == 5


# --- rows


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def load(path: Path, count: int | None = None, field: str = "", **options: Any) -> SampleSet:
    options = {"max_length": 200, "split": "all", **options}
    return load_samples([f"jsonl:{path}{field}"], TOKENIZER, num_samples=count, **options)


def test_rows_name_their_metric_and_their_room(write_rows: Callable[..., Path]) -> None:
    long = "a rather long answer " * 5
    path = write_rows(
        {"text": "plain one", "answers": ["yes", long]},
        {"text": "number two", "answers": ["yes", long], "metric": "F1"},
        {"text": "number three", "answers": ["yes"], "metric": "rouge-l", "max_new_tokens": 77},
        {"text": "number four", "answer": 4, "metric": "exact"},
    )
    made = {TOKENIZER.decode(sample): sample for sample in load(path, 4).samples}
    assert [made[text].metric for text in ("plain one", "number two", "number three", "number four")] == [
        "recall",
        "f1",
        "rouge-l",
        "exact",
    ]
    assert made["number three"].max_new_tokens == 77
    alone = len(TOKENIZER(f" {long.strip()}.")["input_ids"])
    assert made["number two"].max_new_tokens == alone + alone // 4 + 8, "one of the answers will do: the longest"
    assert made["plain one"].max_new_tokens > made["number two"].max_new_tokens, "all have to be produced"
    assert load(path, 4).samples[0].source == f"jsonl:{path}"


def test_bad_rows_are_counted(write_rows: Callable[..., Path]) -> None:
    asked = {"text": "words", "answers": ["x"]}
    path = write_rows(
        {"text": "good", "answers": ["x"]},
        {**asked, "metric": "bleu"},
        {**asked, "metric": ["f1"]},
        {"text": "more", "metric": "f1"},
        {"text": "more", "metric": "f1", "answers": []},
        {**asked, "max_new_tokens": 0},
        {**asked, "max_new_tokens": True},
        {**asked, "max_new_tokens": "8"},
        {"context": 3, "answers": ["x"]},
        {"context": "words", "input": ["?"], "answers": ["x"]},
        {"context": " ", "input": "What?", "answers": ["x"]},
    )
    spec = f"jsonl:{path}"
    assert dict(load(path, 1).dropped) == {
        f"{spec}: unknown metric 'bleu'; allowed: recall, exact, f1, rouge-l (line 2)": 1,
        f"{spec}: unknown metric \"['f1']\"; allowed: recall, exact, f1, rouge-l (line 3)": 1,
        f"{spec}: a metric but no answers (line 4, line 5)": 2,
        f"{spec}: max_new_tokens is not a whole number of at least 1 (line 6, line 7, line 8)": 3,
        f"{spec}: field 'context' is not a string (line 9)": 1,
        f"{spec}: field 'input' is not a string (line 10)": 1,
        f"{spec}: empty (line 11)": 1,
    }


def test_room_asked_for_counts_towards_the_length(write_rows: Callable[..., Path]) -> None:
    path = write_rows({"text": "few words", "answers": ["x"], "max_new_tokens": 300})
    with pytest.raises(DataError, match="1 longer than 200 tokens with its answers"):
        load(path, 1)


def test_rouge_l_without_its_package_is_said_when_data_are_read(
    write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xcalib.data import _metrics

    path = write_rows({"text": "words", "answers": ["x"], "metric": "rouge-l"}, {"text": "more", "answers": ["x"]})
    for name in ("rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    _metrics._rouge.cache_clear()
    with pytest.raises(
        DataError, match=r"jsonl:.*rouge-l needs the 'rouge-score' package; .*pip install 'xcalib\[tasks\]'"
    ):
        load(path, 2)
    with pytest.raises(DataError, match="rouge-score"):
        asking("rouge-l", "a")
    assert score(asking("f1", "a b"), "a b") == 1.0, "nothing else needs it"


# --- LongBench's rows


def longbench(number: int, dataset: str = "hotpotqa", **fields: Any) -> dict[str, Any]:
    return {
        "input": f"Who is number {number}?",
        "context": f"Text {number} says that number {number} is Ann{number}.",
        "answers": [f"Ann{number}", f"Miss Ann{number}"],
        "length": 9,
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": f"{number:032x}",
        **fields,
    }


def test_longbench_rows_become_prompts(write_rows: Callable[..., Path]) -> None:
    path = write_rows(*(longbench(number) for number in range(4)))
    made = load(path, 4)
    assert not made.dropped
    sample = next(sample for sample in made.samples if "Ann2" in sample.answers)
    assert TOKENIZER.decode(sample) == "Text 2 says that number 2 is Ann2.\n\nQuestion: Who is number 2?\nAnswer:"
    assert (sample.answers, sample.metric, sample.source) == (("Ann2", "Miss Ann2"), "f1", f"jsonl:{path}#hotpotqa")
    assert sample.documents == (text_digest("Text 2 says that number 2 is Ann2."),)
    field = load(path, 4, ":context")
    assert {TOKENIZER.decode(sample)[-1] for sample in field.samples} == {"."}, (
        "a field that is named is taken as it is"
    )
    assert {sample.metric for sample in field.samples} == {"recall"}


@pytest.mark.parametrize(
    ("dataset", "question", "ending", "metric"),
    [
        ("narrativeqa", "Why?", "\n\nQuestion: Why?\nAnswer:", "f1"),
        ("qasper_e", "Why?", "\n\nQuestion: Why?\nAnswer:", "f1"),
        ("gov_report", "", "\n\nSummary:", "rouge-l"),
        ("qmsum", "What of {x}?", "\n\nQuestion: What of {x}?\nSummary:", "rouge-l"),
        ("samsum_e", "Dialogue: A: hi\nSummary: ", "\n\nDialogue: A: hi\nSummary:", "rouge-l"),
        ("trec", "Question: Why?\nType:", "\n\nQuestion: Why?\nType:", "recall"),
        ("lcc", "", "", "exact"),
        ("repobench-p", "x = 1\n", "x = 1\n", "exact"),
        ("my own", "Why?", "\n\nQuestion: Why?\nAnswer:", "recall"),
        ("my own", "", "", "recall"),
        (None, "Why?", "\n\nQuestion: Why?\nAnswer:", "recall"),
    ],
)
def test_prompts_of_the_data_sets(
    dataset: str | None, question: str, ending: str, metric: str, write_rows: Callable[..., Path]
) -> None:
    row: dict[str, Any] = {"context": "Long {text}.", "input": question, "answers": ["x"], "dataset": dataset}
    assert prompt(row) == f"Long {{text}}.{ending}"
    (sample,) = load(write_rows(row), 1).samples
    assert TOKENIZER.decode(sample) == f"Long {{text}}.{ending}" and sample.metric == metric
    (own,) = load(write_rows({**row, "metric": "exact"}), 1).samples
    assert own.metric == "exact", "a metric that the row names comes first"


def test_text_comes_before_context(write_rows: Callable[..., Path]) -> None:
    (sample,) = load(write_rows(longbench(1, text="the text")), 1).samples
    assert (TOKENIZER.decode(sample), sample.metric) == ("the text", "recall")


def test_questions_about_one_context_stay_on_one_side(write_rows: Callable[..., Path]) -> None:
    rows = [longbench(n // 3, input=f"Question {n}?") for n in range(30)]
    path = write_rows(*rows, rows[0])
    whole = load(path, 30)
    assert dict(whole.dropped) == {f"jsonl:{path}: duplicate (line 31)": 1}
    assert len(whole.documents) == 10 and len({sample.tokens.tobytes() for sample in whole.samples}) == 30
    sides = [load(path, 15, split=split) for split in ("calibration", "heldout")]
    assert len(sides[0].documents) == len(sides[1].documents) == 5
    assert not sides[0].documents & sides[1].documents
    same = write_rows(*(longbench(1, input=f"Question {n}?") for n in range(4)), name="same.jsonl")
    with pytest.raises(DataError, match="a single document cannot serve both"):
        load(same, 1, split="heldout")


# --- limit


def test_limit_counts_by_task(write_rows: Callable[..., Path]) -> None:
    names = ["hotpotqa"] * 5 + ["trec"] * 3 + ["lcc"]
    path = write_rows(*(longbench(n, dataset) for n, dataset in enumerate(names)), {"text": "no question " * 90})
    made = load(path, limit=2, max_length=60)
    assert Counter(sample.source.partition("#")[2] for sample in made.samples) == {
        "hotpotqa": 2,
        "trec": 2,
        "lcc": 1,
        "": 2,
    }
    assert len({sample.tokens.tobytes() for sample in made.samples}) == 7
    assert load(path, limit=50, max_length=60).tokens_sha256 == load(path, 13, limit=50, max_length=60).tokens_sha256
    assert len(load(path, 3, limit=2, max_length=60).samples) == 3


def test_limit_of_ruler_and_windows() -> None:
    made = load_samples(["ruler:all", "builtin", "ruler:vt@2"], TOKENIZER, max_length=400, limit=2)
    counted = Counter(sample.source for sample in made.samples)
    assert counted == {**{f"ruler:{task}": 2 for task in RULER_TASKS}, "builtin": 2}, (
        "also of a task that two specs name"
    )
    some = load_samples(["ruler:vt,qa_1"], TOKENIZER, num_samples=3, max_length=400, limit=9)
    assert len(some.samples) == 3
    whole = load_samples(["ruler:vt,qa_1"], TOKENIZER, num_samples=40, max_length=400, limit=2)
    assert [sample.source for sample in whole.samples] == ["ruler:vt", "ruler:qa_1"] * 2
    plain = load_samples(["ruler:vt,qa_1"], TOKENIZER, num_samples=4, max_length=400)
    assert whole.tokens_sha256 == plain.tokens_sha256, "the first ones stay the same"


def test_limit_needs_something_to_limit(write_rows: Callable[..., Path]) -> None:
    path = write_rows(longbench(1), longbench(2))
    with pytest.raises(DataError, match="limit must be at least 1, got 0"):
        load(path, 1, limit=0)
    with pytest.raises(DataError, match="num_samples must be at least 1, got 0; it may be left out only with a limit"):
        load(path)
    with pytest.raises(DataError, match=r"found 0 of 1 samples .* 2 longer than 10 tokens"):
        load(path, limit=3, max_length=10)
