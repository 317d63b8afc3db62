"""xcalib.data: RULER's 13 tasks by their own names, what each hides where, and that its answer follows from the text."""

import re
import zlib
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xcalib.data import RULER_TASKS, TASKS, Sample, load_samples, score
from xcalib.data._sources import builtin_documents
from xcalib.data._specs import SPLITS, Split
from xcalib.errors import DataError

SHINGLE = 50
NIAH = [task for task in RULER_TASKS if task.startswith("niah")]
NEW = [task for task in RULER_TASKS if task not in TASKS]
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS = r"[a-z]+(?:-[a-z]+){1,2}"
KEY, VALUE = f"{UUID}|{WORDS}", rf"{UUID}|\d{{7}}"
NEEDLES = {  # key and value of each
    "calibration": rf"The secret (?:number|code) of ({KEY}) is ({VALUE})\.",
    "heldout": rf"To ({KEY}) belongs the secret (?:number|code) ({VALUE})\.",
}


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


def make(spec: str, count: int, length: int, split: Split = "calibration", seed: int = 0) -> tuple[Sample, ...]:
    return load_samples([spec], TOKENIZER, num_samples=count, max_length=length, split=split, seed=seed).samples


def parts(sample: Sample) -> tuple[str, str, str, str]:
    """Introduction, context, question, and the answer's beginning."""
    before, _, ending = TOKENIZER.decode(sample).rpartition("\n\nQuestion: ")
    introduction, _, context = before.partition("\n\n")
    question, _, start = ending.partition("\nAnswer: ")
    return introduction, context, question, start


# --- all 13


def test_the_names_are_those_of_ruler() -> None:
    niah = ["single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery"]
    assert list(RULER_TASKS) == [*(f"niah_{name}" for name in niah), "vt", "cwe", "fwe", "qa_1", "qa_2"]
    made = make("ruler:all", 26, 600)
    assert [sample.source for sample in made] == [f"ruler:{task}" for task in RULER_TASKS] * 2
    assert len({sample.tokens.tobytes() for sample in made}) == 26
    mixed = make("ruler:qa_1, all", 14, 600)
    assert [sample.source for sample in mixed[:3]] == ["ruler:qa_1", "ruler:niah_single_1", "ruler:niah_single_2"]


def test_an_unknown_task_lists_all_names() -> None:
    with pytest.raises(
        DataError,
        match=r"unknown task 'qa_3'; did you mean 'qa_2'\? allowed: single, .*, qa_2, all$",
    ):
        make("ruler:qa_3", 1, 600)


@pytest.mark.parametrize(
    ("seed", "split", "length", "sha256"),
    [
        (0, "calibration", 512, "dafd8a6fd9d3793e9a796ffbd1c5a0550a20fa388c9589600fd6f06bad74bdcb"),
        (1, "heldout", 2_048, "3d9363a144e6dd0b712efec11b2b19266e2be6ed26a07b0644a40f65649d7424"),
        (5, "all", 512, "c798a75fbf2da3b0e54af6dc174587fb638b7215605eb2be992621ee0616b524"),
    ],
)
def test_the_seven_of_plain_ruler_stay_as_they_are(seed: int, split: Split, length: int, sha256: str) -> None:
    """Published figures were measured on them."""
    made = load_samples(["ruler"], TOKENIZER, num_samples=14, max_length=length, seed=seed, split=split)
    assert made.tokens_sha256 == sha256


@pytest.mark.parametrize("split", ["calibration", "heldout"])
@pytest.mark.parametrize("length", [300, 512, 1_024, 4_096])
@pytest.mark.parametrize("task", NEW)
def test_length_and_answers(task: str, length: int, split: Split) -> None:
    for sample in make(f"ruler:{task}", 3, length, split, seed=length):
        assert 0.9 * length <= len(sample.tokens) + sample.max_new_tokens <= length
        assert sample.source == f"ruler:{task}" and sample.documents and sample.metric == "recall"
        assert len(TOKENIZER(" " + ", ".join(sample.answers))["input_ids"]) < sample.max_new_tokens
        introduction, context, question, start = parts(sample)
        assert introduction.endswith((".", "!")) and question.endswith("?")
        assert re.fullmatch(r"The [\w ,-]+ (is|are)", start), "the answer has begun"
        assert all(answer in context and answer not in question + start for answer in sample.answers)
        assert score(sample, " and ".join(sample.answers)) == 1.0
        assert score(sample, "it does not say") == 0.0


@settings(max_examples=20, deadline=None)
@example(task="cwe", length=400, seed=7983276, split="heldout")  # "words" was among the most common words
@given(
    task=st.sampled_from(RULER_TASKS),
    length=st.integers(400, 3_000),
    seed=st.integers(0, 2**31),
    split=st.sampled_from(SPLITS),
)
def test_any_length_is_filled_and_reproducible(task: str, length: int, seed: int, split: Split) -> None:
    (sample,) = make(f"ruler:{task}", 1, length, split, seed)
    assert 0.9 * length <= len(sample.tokens) + sample.max_new_tokens <= length
    _, context, question, start = parts(sample)
    assert all(answer in context and answer not in question + start for answer in sample.answers)
    (again,) = make(f"ruler:{task}", 1, length, split, seed)
    assert (again.tokens == sample.tokens).all() and again.answers == sample.answers


@pytest.mark.parametrize("task", RULER_TASKS)
def test_splits_share_no_wording_and_no_document(task: str) -> None:
    seen: list[set[str]] = []
    documents: list[set[str]] = []
    for split in ("calibration", "heldout"):
        made = [sample for seed in (0, 1) for sample in make(f"ruler:{task}", 5, 1_500, split, seed)]  # type: ignore[arg-type]
        texts = [TOKENIZER.decode(sample) for sample in made]
        seen.append({text[start : start + SHINGLE] for text in texts for start in range(len(text) - SHINGLE + 1)})
        documents.append({digest for sample in made for digest in sample.documents})
        assert len({sample.answers for sample in made}) == len(made)
    assert not seen[0] & seen[1]
    assert not documents[0] & documents[1]


@pytest.mark.parametrize("task", NEW)
def test_too_short_a_length_is_an_error(task: str) -> None:
    with pytest.raises(DataError, match=f"ruler:{task}: 40 tokens are too few"):
        make(f"ruler:{task}", 1, 40)


def test_long_lists_of_made_up_things_do_not_run_out() -> None:
    for task in ("niah_multikey_2", "niah_multikey_3", "qa_1", "qa_2"):
        (sample,) = make(f"ruler:{task}", 1, 65_536)
        assert len(sample.tokens) > 0.9 * 65_000
        assert parts(sample)[1].count(sample.answers[0]) == 1


# --- needles


@pytest.mark.parametrize("split", ["calibration", "heldout"])
@pytest.mark.parametrize("task", NIAH)
def test_needles_answer_the_question(task: str, split: Split) -> None:
    depths: list[float] = []
    for sample in make(f"ruler:{task}", 12, 2_500, split):
        _, context, question, start = parts(sample)
        needles = re.findall(NEEDLES[split], context)
        asked = re.findall(KEY, question)
        asked = [key for key in asked if any(key == of for of, _ in needles)]
        assert all(key in start for key in asked)
        assert sorted(sample.answers) == sorted(value for key, value in needles if key in asked)
        for answer in sample.answers:
            assert context.count(answer) == 1
            depths.append(context.index(answer) / len(context))
    assert min(depths) < 0.25 and max(depths) > 0.75


@pytest.mark.parametrize(
    ("task", "keys", "answers", "key", "value"),
    [
        ("niah_single_1", 1, 1, WORDS, r"\d{7}"),
        ("niah_single_2", 1, 1, WORDS, r"\d{7}"),
        ("niah_single_3", 1, 1, WORDS, UUID),
        ("niah_multikey_1", 4, 1, WORDS, r"\d{7}"),
        ("niah_multikey_2", None, 1, WORDS, r"\d{7}"),
        ("niah_multikey_3", None, 1, UUID, UUID),
        ("niah_multivalue", 1, 4, WORDS, r"\d{7}"),
        ("niah_multiquery", 4, 4, WORDS, r"\d{7}"),
    ],
)
def test_keys_and_values_are_as_ruler_has_them(task: str, keys: int | None, answers: int, key: str, value: str) -> None:
    for sample in make(f"ruler:{task}", 2, 2_500):
        found = re.findall(NEEDLES["calibration"], parts(sample)[1])
        assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for k, v in found)
        assert len(sample.answers) == answers
        if keys is None:
            assert len(found) > 20, "a haystack of needles"
        else:
            assert len({k for k, _ in found}) == keys and len(found) == max(keys, answers)


def test_what_the_needles_are_hidden_in() -> None:
    corpus = "\n".join(document.read(0, document.size) for document in builtin_documents(""))
    for task in NIAH:
        for sample in make(f"ruler:{task}", 2, 2_000):
            context = parts(sample)[1]
            rest = re.sub(NEEDLES["calibration"], "", context).strip()
            if task == "niah_single_1":
                assert len(set(re.split(r"(?<=\.)\s+", rest))) == 5, "a few sentences again and again"
            elif task in ("niah_multikey_2", "niah_multikey_3"):
                assert len(rest) < 150, "nothing but needles, and less than one more needle would take"
            else:
                whole = [paragraph in corpus for paragraph in context.split("\n\n")[:-1]]
                needles = len(re.findall(NEEDLES["calibration"], context))
                assert whole.count(False) <= needles, "all but the paragraphs with a needle"


def test_short_samples_have_fewer_needles() -> None:
    for task, keys, answers in (("multikey_1", 3, 1), ("multivalue", 1, 2), ("multiquery", 2, 2)):
        (sample,) = make(f"ruler:niah_{task}", 1, 512)
        found = re.findall(NEEDLES["calibration"], parts(sample)[1])
        assert (len({key for key, _ in found}), len(sample.answers)) == (keys, answers)


# --- questions

NAME, COMPANY = r"[A-Z]\w+ [A-Z]\w+", r"[A-Z]\w+ Limited"
FACTS: dict[str, dict[str, str]] = {
    "calibration": {
        "birth": rf"({NAME}) was born in (\w+) in \d{{4}}\.",
        "employer": rf"({NAME}) was born [^\n]* works for ({COMPANY})\.",
        "seat": rf"({COMPANY}) has its seat in (\w+)\.",
        "founder": rf"({COMPANY}) has its seat [^\n]* founded by ({NAME}) in",
    },
    "heldout": {
        "birth": rf"The birthplace of ({NAME}) is (\w+), the date",
        "employer": rf"The birthplace of ({NAME}) [^\n]* a living at ({COMPANY})\.",
        "seat": rf"All offices of ({COMPANY}) are in (\w+)\.",
        "founder": rf"All offices of ({COMPANY}) [^\n]* set up by ({NAME}), in",
    },
}


def one_hop(facts: Callable[[str], dict[str, str]], question: str) -> str:
    company = re.search(COMPANY, question)
    if company:
        return facts("seat")[company[0]]
    (name,) = re.findall(NAME, re.sub(r"^\w+ ", "", question))
    return facts("birth" if re.search("born|birthplace", question) else "employer")[name]


def two_hops(facts: Callable[[str], dict[str, str]], question: str) -> str:
    (name,) = [name for name in facts("employer") if name in question]
    assert not re.search(COMPANY, question), "the company has to be found first"
    wanted = "seat" if re.search("town|offices", question) else "founder"
    return facts(wanted)[facts("employer")[name]]


@pytest.mark.parametrize("split", ["calibration", "heldout"])
@pytest.mark.parametrize(("task", "follow"), [("qa_1", one_hop), ("qa_2", two_hops)])
def test_answers_follow_from_the_paragraphs(task: str, follow: Callable[..., str], split: Split) -> None:
    places, kinds = [], set()
    for sample in make(f"ruler:{task}", 16, 1_500, split):
        _, context, question, start = parts(sample)

        def facts(kind: str, context: str = context) -> dict[str, str]:
            return dict(re.findall(FACTS[split][kind], context))

        assert sample.answers == (follow(facts, question),)
        assert context.count(sample.answers[0]) == 1
        paragraphs = context.split("\n\n")
        assert len(paragraphs) > 15
        assert len(set(paragraphs)) == len(paragraphs)
        places.append(context.index(sample.answers[0]) / len(context))
        kinds.add(start.split()[1])
    assert min(places) < 0.25 and max(places) > 0.75
    assert len(kinds) > 1, "more than one kind of question"


def test_two_hops_need_both_paragraphs() -> None:
    for sample in make("ruler:qa_2", 8, 1_500):
        _, context, question, _ = parts(sample)
        (person,) = [
            text for text in context.split("\n\n") if re.match(NAME, text) and re.match(NAME, text)[0] in question
        ]  # type: ignore[index]
        assert sample.answers[0] not in person
        company = re.search(COMPANY, person)
        (gold,) = [text for text in context.split("\n\n") if sample.answers[0] in text]
        assert company and company[0] in gold


def test_one_hop_needs_one_paragraph() -> None:
    for sample in make("ruler:qa_1", 8, 1_500):
        _, context, question, _ = parts(sample)
        (gold,) = [text for text in context.split("\n\n") if sample.answers[0] in text]
        assert [name for name in re.findall(f"{COMPANY}|{NAME}", gold) if name in question]
