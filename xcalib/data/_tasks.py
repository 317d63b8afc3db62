"""What the makers of RULER-style tasks share: a question with its text, names and numbers, and text to hide needles in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xcalib.data._haystack import PHRASES, Haystack, Passage, Phrases, hide
from xcalib.data._specs import Split

__all__ = [
    "ADJECTIVES",
    "NOUNS",
    "Body",
    "Setting",
    "Task",
    "distinct",
    "draw_keys",
    "draw_values",
    "ending_of",
    "enumerated",
    "hidden",
]

Body = Callable[[int], tuple[str, tuple[str, ...]]]

# fmt: off
ADJECTIVES = [
    "amber", "brave", "calm", "copper", "crimson", "dusty", "eager", "early", "faint", "gentle", "golden",
    "hidden", "hollow", "icy", "ivory", "jolly", "keen", "little", "lonely", "marble", "mellow", "misty", "noble",
    "olive", "pale", "patient", "polished", "proud", "quiet", "rapid", "rusty", "scarlet", "silent", "silver",
    "sleepy", "solid", "stormy", "sunny", "velvet", "winter",
]
NOUNS = [
    "anchor", "arrow", "badger", "basin", "beacon", "bridge", "candle", "canyon", "castle", "cedar", "comet",
    "compass", "falcon", "feather", "forest", "fountain", "garden", "hammer", "harbor", "island", "jacket",
    "kettle", "ladder", "lantern", "meadow", "mirror", "mountain", "orchard", "otter", "pebble", "pepper",
    "planet", "ribbon", "river", "saddle", "sparrow", "temple", "thunder", "valley", "window",
]
# fmt: on


@dataclass(frozen=True)
class Task:
    """A question: ``body`` makes about that many characters of context and names the documents it took them from."""

    body: Body
    introduction: str
    ending: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """What a maker is given: corpus text, a stream of random numbers, the split's wording, and whether space is scarce."""

    hay: Haystack
    random: np.random.Generator
    wording: Split
    short: bool

    @property
    def phrases(self) -> Phrases:
        return PHRASES[self.wording]


def ending_of(question: str, answer: str) -> str:
    return f"Question: {question}\nAnswer: {answer}"


def enumerated(words: Sequence[str]) -> str:
    """``a, b and c``"""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def distinct(draw: Callable[[], str], count: int, taken: frozenset[str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        value = draw()
        if value not in taken:
            found[value] = None
    return list(found)


def draw_keys(random: np.random.Generator, count: int) -> list[str]:
    return distinct(lambda: f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}", count, frozenset())


def draw_values(setting: Setting, count: int) -> list[str]:
    return distinct(lambda: str(setting.random.integers(10_000, 100_000)), count, setting.hay.numbers)


def hidden(setting: Setting, needles: Sequence[str]) -> Body:
    order: list[Passage] = setting.hay.order(setting.random)
    depths = sorted(setting.random.uniform(0.0, 0.98, size=len(needles)).tolist())

    def body(chars: int) -> tuple[str, tuple[str, ...]]:
        text, digests = setting.hay.text(order, chars)
        return hide(text, needles, depths), digests

    return body
