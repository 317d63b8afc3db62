"""RULER's eight needle-in-a-haystack tasks (arXiv 2404.06654, section 3 and appendix B) under RULER's names.

A needle gives the value of a key; they differ in what the needles are hidden in (the same few sentences again and again,
text of the shipped corpus in place of essays, or other needles), in what keys and values are made of, and in how many there are.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from xcalib.data._haystack import hide
from xcalib.data._sample import text_digest
from xcalib.data._specs import Split
from xcalib.data._tasks import (
    ADJECTIVES,
    NOUNS,
    Body,
    Setting,
    Task,
    distinct,
    draw_keys,
    ending_of,
    enumerated,
    hidden,
)

__all__ = ["NIAH"]

_LARGEST_DEPTH = 0.98


@dataclass(frozen=True)
class _Words:
    """How a split words these tasks; ``kind`` is what a value is called."""

    introduction: str
    needle: str
    ask_one: str
    ask_many: str
    start_one: str
    start_many: str
    noise: str


_WORDS: dict[Split, _Words] = {
    "calibration": _Words(
        introduction="Some {kind}s are given in the pages below. Keep them in mind for the question at the end.",
        needle="The {kind} of {key} is {value}.",
        ask_one="What is the {kind} of {keys} in the pages above?",
        ask_many="What are all the {kind}s of {keys} in the pages above?",
        start_one="The {kind} of {keys} is",
        start_many="The {kind}s of {keys} are",
        noise="The lamp is on. The door is shut. A clock ticks in the hall. Nobody comes in. Nobody goes out.",
    ),
    "heldout": _Words(
        introduction="What follows hands out {kind}s to names; the last line wants to know about them.",
        needle="To {key} belongs the {kind} {value}.",
        ask_one="Which {kind} does this text hand out to {keys}?",
        ask_many="Which {kind}s does this text hand out to {keys}?",
        start_one="The {kind} that belongs to {keys} is",
        start_many="The {kind}s that belong to {keys} are",
        noise="It rains today. The street is wet. Two trees stand at the corner. A bus drives by. Then it is quiet.",
    ),
}


@dataclass(frozen=True)
class _Form:
    """One task; the counts of keys, of values for each key, and of keys asked for, are pairs: usual, and where space is short."""

    haystack: Literal["noise", "corpus", "needles"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: tuple[int, int] = (1, 1)
    num_values: tuple[int, int] = (1, 1)
    num_asked: tuple[int, int] = (1, 1)

    @property
    def kind(self) -> str:
        return "secret number" if self.values == "numbers" else "secret code"


_FORMS: dict[str, _Form] = {
    "niah_single_1": _Form("noise"),
    "niah_single_2": _Form("corpus"),
    "niah_single_3": _Form("corpus", values="uuids"),
    "niah_multikey_1": _Form("corpus", num_keys=(4, 3)),
    "niah_multikey_2": _Form("needles"),
    "niah_multikey_3": _Form("needles", keys="uuids", values="uuids"),
    "niah_multivalue": _Form("corpus", num_values=(4, 2)),
    "niah_multiquery": _Form("corpus", num_keys=(4, 2), num_asked=(4, 2)),
}


def _make(form: _Form, setting: Setting) -> Task:
    words = _WORDS[setting.wording]
    num_keys, num_values, num_asked = (
        counts[setting.short] for counts in (form.num_keys, form.num_values, form.num_asked)
    )
    keys = _keys(form, setting, num_keys)
    values = _values(form, setting, num_keys * num_values)
    pairs = [(key, values[i * num_values + j]) for i, key in enumerate(keys) for j in range(num_values)]
    answers = tuple(value for key, value in pairs if key in keys[:num_asked])
    shuffled = [pairs[int(i)] for i in setting.random.permutation(len(pairs))]
    needles = [words.needle.format(kind=form.kind, key=key, value=value) for key, value in shuffled]
    one = len(answers) == 1
    named = {"kind": form.kind, "keys": enumerated(keys[:num_asked])}
    ending = ending_of(
        (words.ask_one if one else words.ask_many).format(**named),
        (words.start_one if one else words.start_many).format(**named),
    )
    return Task(_body(form, setting, needles, pairs[0]), words.introduction.format(kind=form.kind), ending, answers)


def _body(form: _Form, setting: Setting, needles: Sequence[str], asked: tuple[str, str]) -> Body:
    if form.haystack == "corpus":
        return hidden(setting, needles)
    if form.haystack == "noise":
        return _among_noise(setting, needles)
    return _among_needles(form, setting, needles[0], asked)


def _among_noise(setting: Setting, needles: Sequence[str]) -> Body:
    noise = _WORDS[setting.wording].noise
    depths = sorted(setting.random.uniform(0.0, _LARGEST_DEPTH, size=len(needles)).tolist())
    return lambda chars: (hide(_noise(noise, chars), needles, depths), (text_digest(noise),))


def _noise(noise: str, chars: int) -> str:
    """The sentences of ``noise`` from the first on, again and again, as many as fit."""
    text = " ".join([noise] * (chars // (len(noise) + 1) + 1))
    return text[: text.rfind(".", 0, chars) + 1]


def _among_needles(form: _Form, setting: Setting, needle: str, asked: tuple[str, str]) -> Body:
    """The needle in a list of others, and as much noise before them as is too little for one more."""
    words = _WORDS[setting.wording]
    depth = float(setting.random.uniform())
    seed = int(setting.random.integers(2**62))

    def body(chars: int) -> tuple[str, tuple[str, ...]]:
        lines: list[str] = []
        space = chars - len(needle) - 1
        for key, value in _others(form, np.random.default_rng(seed), asked):
            line = words.needle.format(kind=form.kind, key=key, value=value)
            if len(line) >= space:
                break
            lines.append(line)
            space -= len(line) + 1
        lines.insert(int(depth * (len(lines) + 1)), needle)
        noise = _noise(words.noise, space)
        text = "\n".join([noise, *lines] if noise else lines)
        return text, (text_digest(text),)

    return body


def _others(form: _Form, random: np.random.Generator, asked: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Endless pairs that have neither the key nor the value asked for."""
    while True:
        key = _uuid(random) if form.keys == "uuids" else _long_key(random)
        value = _uuid(random) if form.values == "uuids" else _number(random)
        if key != asked[0] and value != asked[1]:
            yield key, value


def _keys(form: _Form, setting: Setting, count: int) -> list[str]:
    if form.keys == "uuids":
        return distinct(partial(_uuid, setting.random), count, frozenset())
    if form.haystack == "needles":
        return distinct(partial(_long_key, setting.random), count, frozenset())
    return draw_keys(setting.random, count)


def _values(form: _Form, setting: Setting, count: int) -> list[str]:
    draw = _uuid if form.values == "uuids" else _number
    return distinct(partial(draw, setting.random), count, setting.hay.numbers)


def _uuid(random: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=random.bytes(16), version=4))


def _number(random: np.random.Generator) -> str:
    return str(random.integers(1_000_000, 10_000_000))


def _long_key(random: np.random.Generator) -> str:
    """Two adjectives and a noun: a long list of needles needs many keys."""
    first, second, noun = random.integers([len(ADJECTIVES), len(ADJECTIVES), len(NOUNS)])
    return f"{ADJECTIVES[first]}-{ADJECTIVES[second]}-{NOUNS[noun]}"


NIAH: dict[str, Callable[[Setting], Task]] = {name: partial(_make, form) for name, form in _FORMS.items()}
