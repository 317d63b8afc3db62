"""The text that questions are hidden in: passages of the shipped corpus, and tables of phrases per split."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from xcalib.data._documents import Document
from xcalib.data._specs import Split

__all__ = ["PHRASES", "Haystack", "Passage", "Phrases", "hide"]

_PASSAGE_CHARS = 2_500
_READ = ("prose", "reference")  # in this order; code and tables only when these do not suffice
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]?\s+|\n+")


@dataclass(frozen=True)
class Phrases:
    """The wording of the tasks. Each split has its own, so that not even the questions are shared."""

    needles: str
    tracking: str
    words: str
    ask_one: str
    ask_many: str
    ask_tracking: str
    ask_common: str
    ask_frequent: str


PHRASES: dict[Split, Phrases] = {
    "calibration": Phrases(
        needles="The pages below mention some special numbers. Remember them for the end.",
        tracking="In the pages below some variables are set. Keep track of their values.",
        words="Here is a long list of words in mixed order. Watch how often each one comes.",
        ask_one="What is the special number for {keys} according to the pages above?",
        ask_many="List every special number that the pages above give for {keys}.",
        ask_tracking="Name the {count} variables that end up with the value {value}.",
        ask_common="Which {count} words come most often in the list above?",
        ask_frequent="Which {count} made-up words come most often in the list above?",
    ),
    "heldout": Phrases(
        needles="Special numbers are hidden in what follows; you will be asked about them.",
        tracking="What follows contains assignments to variables; note who equals whom.",
        words="What follows is a shuffled collection of words; some are repeated a lot.",
        ask_one="Going by the text, which special number belongs to {keys}?",
        ask_many="Going by the text, which special numbers belong to {keys}?",
        ask_tracking="Going by the text, {count} variables equal {value}. Which ones?",
        ask_common="Give the {count} words that this collection repeats most.",
        ask_frequent="Give the {count} invented words that this collection repeats most.",
    ),
}


@dataclass(frozen=True)
class Passage:
    text: str
    digest: str


class Haystack:
    """Passages of the given documents; ``order`` shuffles them, ``text`` takes as many as are needed."""

    def __init__(self, documents: Sequence[Document]) -> None:
        parts = [[d for d in documents if d.category == category] for category in _READ]
        parts.append([d for d in documents if d.category not in _READ])
        self._parts = [[passage for document in part for passage in _passages(document)] for part in parts]
        everything = "\n".join(passage.text for part in self._parts for passage in part)
        self.numbers = frozenset(re.findall(r"\d+", everything))
        self.capitals = frozenset(re.findall(r"[A-Z]{3,}", everything))

    def order(self, random: np.random.Generator) -> list[Passage]:
        """All passages in random order, prose before other text before code and tables."""
        return [part[int(i)] for part in self._parts for i in random.permutation(len(part))]

    @staticmethod
    def text(order: Sequence[Passage], chars: int) -> tuple[str, tuple[str, ...]]:
        """The first ``chars`` characters up to a white space, and the digests of the documents used.

        Passages are only repeated when the corpus is exhausted.
        """
        digests: dict[str, None] = {}
        taken, length = [], 0
        for passage in cycle(order):
            if length >= chars:
                break
            taken.append(passage.text)
            length += len(passage.text) + 2
            digests[passage.digest] = None
        text = "\n\n".join(taken)[:chars]
        return text[: max(text.rfind(" "), text.rfind("\n"), 0)].rstrip(), tuple(digests)


def hide(text: str, needles: Sequence[str], depths: Sequence[float]) -> str:
    """Put each needle behind the first sentence that ends at or after its depth in [0, 1]; needles keep their order."""
    places = []
    for needle, depth in zip(needles, sorted(depths), strict=True):
        found = _SENTENCE_END.search(text, int(depth * len(text)))
        places.append((found.end() if found else len(text), needle))
    parts, last = [], 0
    for place, needle in places:
        before = text[last:place]
        parts += [before, "" if not before or before[-1].isspace() else " ", needle + " "]
        last = place
    return "".join([*parts, text[last:]]).rstrip()


def _passages(document: Document) -> list[Passage]:
    passages: list[str] = []
    for paragraph in document.read(0, document.size).split("\n\n"):
        if passages and len(passages[-1]) + len(paragraph) < _PASSAGE_CHARS:
            passages[-1] += "\n\n" + paragraph
        else:
            passages.append(paragraph)
    return [Passage(text, document.digest) for text in passages]
