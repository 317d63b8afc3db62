"""How a generated text is scored against a sample's answers: recall as in RULER, the rest as in SQuAD and LongBench."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, Protocol, get_args

from xcalib.errors import DataError

__all__ = ["METRICS", "Metric", "check_metric", "evaluate_metric"]

Metric = Literal["recall", "exact", "f1", "rouge-l"]
METRICS: tuple[str, ...] = get_args(Metric)

_ARTICLES = frozenset({"a", "an", "the"})
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Chinese and Japanese: a character is a word
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_UNSPACED_CHARACTER = re.compile(f"([{_UNSPACED}])")


class _RougeScore(Protocol):
    fmeasure: float


class _RougeScorer(Protocol):
    def score(self, target: str, prediction: str) -> dict[str, _RougeScore]: ...


def check_metric(name: str, where: str) -> None:
    """See that a metric can be computed here.

    Raises:
        DataError: it is unknown, or its package is not installed; the message begins with ``where``.
    """
    if name not in METRICS:
        raise DataError(f"{where}: unknown metric {name!r}; allowed: {', '.join(METRICS)}")
    if name == "rouge-l":
        try:
            _rouge()
        except ImportError as error:
            raise DataError(
                f"{where}: the metric rouge-l needs the 'rouge-score' package; install it with: pip install 'xcalib[tasks]'"
            ) from error


def evaluate_metric(name: Metric, answers: Sequence[str], text: str) -> float:
    """The score of a generated text in [0, 1]: recall over all answers, any other metric for the best of them.

    Args:
        name: of the metric.
        answers: at least one, none of them blank.
        text: what was generated.
    """
    if name == "recall":
        return sum(_occurs(answer, text) for answer in answers) / len(answers)
    return max(_BEST_OF[name](answer, text) for answer in answers)


def _occurs(answer: str, text: str) -> bool:
    words = r"\s+".join(re.escape(word) for word in answer.split())
    before = r"(?<!\w)(?<!\d[.,])" if answer.strip()[0].isdigit() else r"(?<!\w)"
    after = r"(?!\w)(?![.,]\d)" if answer.strip()[-1].isdigit() else r"(?!\w)"
    return re.search(before + words + after, text, re.IGNORECASE) is not None


def _exact(answer: str, text: str) -> float:
    return float(_normalise(answer) == _normalise(_same_lines(answer, text)))


def _f1(answer: str, text: str) -> float:
    """Twice the words in common over the words of both."""
    expected, found = _normalise(answer), _normalise(_same_lines(answer, text))
    common = (Counter(expected) & Counter(found)).total()
    return 2 * common / (len(expected) + len(found))


def _rouge_l(answer: str, text: str) -> float:
    return float(_rouge().score(answer, text)["rougeL"].fmeasure)


_BEST_OF: dict[str, Callable[[str, str], float]] = {"exact": _exact, "f1": _f1, "rouge-l": _rouge_l}


def _same_lines(answer: str, text: str) -> str:
    """As many lines of the text as the answer has: a model that was not told to stop writes on below its answer."""
    return "\n".join(text.strip().splitlines()[: len(answer.strip().splitlines())])


def _normalise(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as SQuAD has it.

    A step that would leave nothing is left out: "A", as an answer of several to choose from, stays a word, and so does "?".
    """
    lower = _UNSPACED_CHARACTER.sub(r" \1 ", text.lower())
    words = "".join(char for char in lower if not _is_punctuation(char)).split() or lower.split()
    return [word for word in words if word not in _ARTICLES] or words


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


@cache
def _rouge() -> _RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    scorer: _RougeScorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return scorer


class _Words:
    """The tokenizer that rouge-score is given: on English text its own, and unlike that it keeps letters of other scripts."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return _WORD.findall(text.lower())
