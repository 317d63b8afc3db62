"""Questions over paragraphs, in place of RULER's ``qa_1`` (from SQuAD) and ``qa_2`` (from HotpotQA).

RULER hides the paragraphs that hold an answer among others from the same data sets. Here all are made up: people and the
companies that they work for, none of which exist, so that nothing can be answered from memory. ``qa_1`` needs one
paragraph, ``qa_2`` two: who a person works for, and what is said of that company. The other paragraphs say the like of others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from xcalib.data._sample import text_digest
from xcalib.data._specs import Split
from xcalib.data._tasks import Body, Setting, Task, ending_of

__all__ = ["ONE_HOP", "TWO_HOPS"]

# fmt: off
_GIVEN = {
    "she": ["Alma", "Bella", "Clara", "Dora", "Edith", "Flora", "Greta", "Hanna", "Irene", "Judith", "Klara", "Lydia"],
    "he": ["Adam", "Boris", "Conrad", "Daniel", "Emil", "Felix", "Gustav", "Hugo", "Ivan", "Jonas", "Leon", "Martin"],
}
_TRADES = [
    "baker", "carpenter", "chemist", "clerk", "cook", "driver", "gardener", "glazier", "joiner", "lawyer", "locksmith",
    "mason", "nurse", "painter", "plumber", "printer", "roofer", "saddler", "tailor", "teacher", "turner", "welder",
]
_HOBBIES = [
    "bake bread", "carve wood", "collect stamps", "draw birds", "grow roses", "keep bees", "knit scarves", "paint boats",
    "play chess", "play the flute", "read maps", "repair clocks", "sing ballads", "study beetles", "watch the stars",
]
_PRODUCTS = [
    "bicycles", "bricks", "brushes", "buttons", "candles", "carpets", "clocks", "gloves", "kettles", "lamps", "ladders",
    "mirrors", "paper", "pencils", "pianos", "ropes", "scales", "soap", "spoons", "tents", "toys", "umbrellas",
]
_BEGINNINGS = [
    "Bar", "Bel", "Cor", "Dal", "Dun", "Far", "Fen", "Gal", "Har", "Hel", "Jor", "Kel", "Lan", "Mar", "Mel", "Nor",
    "Pel", "Quin", "Ros", "Sel", "Tam", "Tor", "Ver", "Wes", "Yar", "Zel",
]
_MIDDLES = ["a", "ba", "de", "e", "i", "ko", "li", "mi", "ne", "o", "ra", "ro", "si", "ta", "ve", "wi"]
_TOWN_ENDS = ["bridge", "dale", "field", "ford", "gate", "haven", "holm", "minster", "mouth", "port", "stead", "wick"]
_FAMILY_ENDS = ["bek", "dahl", "gren", "kov", "lund", "mann", "nik", "rell", "sen", "strom", "tini", "vic"]
_COMPANY_ENDS = ["ax", "co", "dex", "fil", "gor", "lex", "mat", "nor", "plan", "tec", "tron", "vor"]
# fmt: on


@dataclass(frozen=True)
class _Words:
    """How a split words paragraphs (sentence by sentence) and questions (with the beginning of the answer)."""

    introduction: str
    person: tuple[str, ...]
    company: tuple[str, ...]
    birth: tuple[str, str]
    employer: tuple[str, str]
    seat: tuple[str, str]
    seat_of_employer: tuple[str, str]
    founder_of_employer: tuple[str, str]


_WORDS: dict[Split, _Words] = {
    "calibration": _Words(
        introduction="Read these paragraphs about people and companies. A question about them comes at the end.",
        person=(
            "{name} was born in {town} in {year}.",
            "{She} learned to be a {trade} and works for {company}.",
            "In the evenings {she} likes to {hobby}.",
        ),
        company=(
            "{company} has its seat in {town}.",
            "It was founded by {founder} in {year} and makes {product}.",
            "About {staff} people are employed there.",
        ),
        birth=("In which town was {name} born?", "The town where {name} was born is"),
        employer=("Which company does {name} work for?", "The company that {name} works for is"),
        seat=("In which town does {company} have its seat?", "The town where {company} has its seat is"),
        seat_of_employer=(
            "In which town is the seat of the company that {name} works for?",
            "The town where that company has its seat is",
        ),
        founder_of_employer=(
            "Who founded the company that {name} works for?",
            "The founder of that company is",
        ),
    ),
    "heldout": _Words(
        introduction="From the following notes on men, women and firms, answer what is asked in the last line.",
        person=(
            "The birthplace of {name} is {town}, the date {year}.",
            "As a {trade}, {she} earns a living at {company}.",
            "Neighbours often see how {she} finds time to {hobby}.",
        ),
        company=(
            "All offices of {company} are in {town}.",
            "The firm was set up by {founder}, in {year}, to sell {product}.",
            "Its staff counts {staff}.",
        ),
        birth=("What is the birthplace of {name}?", "The birthplace of {name} is"),
        employer=("At which firm does {name} earn a living?", "The firm that pays {name} is"),
        seat=("Where are the offices of {company}?", "The place with the offices of {company} is"),
        seat_of_employer=(
            "{name} earns a living at a firm. Where are its offices?",
            "The place with the offices of this firm is",
        ),
        founder_of_employer=(
            "{name} earns a living at a firm. Who set it up?",
            "The person who set up this firm is",
        ),
    ),
}


@dataclass(frozen=True)
class _Pair:
    """A person and the company that employs them: what their two paragraphs are made from."""

    facts: dict[str, str]
    person: dict[str, str]
    company: dict[str, str]


class _World:
    """Makes up pairs without end, from a seed; no invented name comes twice."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self._taken: set[str] = set()

    def pair(self) -> _Pair:
        she = self._of(["she", "he"])
        name = f"{self._of(_GIVEN[she])} {self._invent(_FAMILY_ENDS)}"
        company = f"{self._invent(_COMPANY_ENDS)} Limited"
        founder = f"{self._of(_GIVEN[self._of(['she', 'he'])])} {self._invent(_FAMILY_ENDS)}"
        both = {"name": name, "company": company}
        person = {"she": she, "She": she.capitalize(), "trade": self._of(_TRADES), "hobby": self._of(_HOBBIES)}
        person |= {"town": self._invent(_TOWN_ENDS), "year": self._number(1940, 2000)}
        about = {"founder": founder, "town": self._invent(_TOWN_ENDS), "year": self._number(1850, 1940)}
        about |= {"product": self._of(_PRODUCTS), "staff": self._number(20, 900)}
        return _Pair(both, both | person, both | about)

    def place(self) -> float:
        """Where a paragraph stands among the others: they are sorted by it."""
        return float(self.random.uniform())

    def _of(self, words: list[str]) -> str:
        return words[int(self.random.integers(len(words)))]

    def _number(self, low: int, high: int) -> str:
        return str(self.random.integers(low, high))

    def _invent(self, ends: list[str]) -> str:
        name = self._of(_BEGINNINGS) + self._of(_MIDDLES) + self._of(ends)
        while name in self._taken:
            name = self._of(_BEGINNINGS) + self._of(_MIDDLES) + name.lower()
        self._taken.add(name)
        return name


def _make(hops: int, setting: Setting) -> Task:
    words = _WORDS[setting.wording]
    seed = int(setting.random.integers(2**62))
    asked = _World(seed).pair()
    person, company = asked.person, asked.company
    choices = [
        (words.birth, person["town"], (True, False)),
        (words.employer, person["company"], (True, False)),
        (words.seat, company["town"], (False, True)),
    ]
    if hops == 2:
        choices = [
            (words.seat_of_employer, company["town"], (True, True)),
            (words.founder_of_employer, company["founder"], (True, True)),
        ]
    (question, start), answer, needed = choices[int(setting.random.integers(len(choices)))]
    ending = ending_of(question.format(**asked.facts), start.format(**asked.facts))
    return Task(_body(words, seed, needed), words.introduction, ending, (answer,))


def _body(words: _Words, seed: int, needed: tuple[bool, bool]) -> Body:
    """The paragraphs that are needed, and of the others as many as fit, the last one cut after a sentence."""

    def body(chars: int) -> tuple[str, tuple[str, ...]]:
        paragraphs = _paragraphs(words, _World(seed))
        first = [next(paragraphs), next(paragraphs)]
        kept = [(place, " ".join(sentences)) for (place, sentences), gold in zip(first, needed, strict=True) if gold]
        space = chars - sum(len(text) + 2 for _, text in kept)
        while space > 0:
            place, sentences = next(paragraphs)
            text = " ".join(sentences)
            while len(text) > space:
                text = " ".join(sentences := sentences[:-1])
            if not text:
                break
            kept.append((place, text))
            space -= len(text) + 2
        whole = "\n\n".join(text for _, text in sorted(kept))
        return whole, (text_digest(whole),)

    return body


def _paragraphs(words: _Words, world: _World) -> Iterator[tuple[float, list[str]]]:
    """Without end: place and sentences of a person's paragraph and of their company's, in turns."""
    while True:
        pair = world.pair()
        yield world.place(), [sentence.format(**pair.person) for sentence in words.person]
        yield world.place(), [sentence.format(**pair.company) for sentence in words.company]


ONE_HOP: Callable[[Setting], Task] = partial(_make, 1)
TWO_HOPS: Callable[[Setting], Task] = partial(_make, 2)
