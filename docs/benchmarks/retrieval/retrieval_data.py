"""Documents in which the next token often lies far back: facts and questions about them, quotations, a document's own phrases.

``xcalib collect FOLDER --data retrieval_data:samples`` reads them (from this folder); ``train.py`` trains on them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from xcalib.data import Sample

__all__ = ["build_tokenizer", "document", "samples"]

FILLER, NAMES, VALUES = 1024, 256, 256
MARKS = ("<pad>", "<s>", "</s>", "<unk>", ".", "fact", "is", "ask", "answer", "quote")
BOS, STOP, FACT, IS, ASK, ANSWER, QUOTE = 1, 4, 5, 6, 7, 8, 9
FIRST_FILLER = len(MARKS)
FIRST_NAME = FIRST_FILLER + FILLER
FIRST_VALUE = FIRST_NAME + NAMES
VOCABULARY = FIRST_VALUE + VALUES
TOPIC, SUCCESSORS = 96, 2  # words that a document is made of, and what may follow each in it
SPLITS = {"calibration": 1, "heldout": 2, "all": 3}


def words() -> list[str]:
    """All tokens, in order of their ids."""
    kinds = (("w", FILLER), ("k", NAMES), ("v", VALUES))
    return [*MARKS, *(f"{letter}{number}" for letter, count in kinds for number in range(count))]


def build_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are words between white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words())}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


class _Writer:
    """One document, piece by piece."""

    def __init__(self, random: np.random.Generator, length: int) -> None:
        self.random, self.length = random, length
        self.tokens = [BOS]
        self.facts: list[tuple[int, int, int, int]] = []
        topic = FIRST_FILLER + random.choice(FILLER, TOPIC, replace=False)
        self.topic = topic.tolist()
        follow = random.choice(topic, (TOPIC, SUCCESSORS)).tolist()
        self.following = dict(zip(self.topic, follow, strict=True))

    def prose(self, count: int) -> None:
        """Words of the document's topic; two of three times one that has followed the last word before."""
        word = self.topic[int(self.random.integers(TOPIC))]
        free = self.random.random(count) < 1 / 3
        jumps, turns = self.random.integers(TOPIC, size=count), self.random.integers(SUCCESSORS, size=count)
        for step in range(count):
            word = self.topic[jumps[step]] if free[step] else self.following[word][turns[step]]
            self.tokens.append(word)
        self.tokens.append(STOP)

    def fact(self) -> None:
        names = FIRST_NAME + self.random.integers(NAMES, size=2)
        values = FIRST_VALUE + self.random.integers(VALUES, size=2)
        fact = (int(names[0]), int(names[1]), int(values[0]), int(values[1]))
        if all(fact[:2] != other[:2] for other in self.facts):
            self.facts.append(fact)
            self.tokens += [FACT, *fact[:2], IS, *fact[2:], STOP]

    def question(self) -> tuple[int, int]:
        """Ask for one of the facts so far, without the answer."""
        *names, first, second = self.facts[int(self.random.integers(len(self.facts)))]
        self.tokens += [ASK, *names, ANSWER]
        return first, second

    def quote(self) -> None:
        count = int(self.random.integers(12, 33))
        start = int(self.random.integers(max(1, len(self.tokens) - count)))
        self.tokens += [QUOTE, *self.tokens[start : start + count], STOP]


def document(random: np.random.Generator, length: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Token ids ``(length,)`` that end with a question, and its answer; how much of what it holds differs between documents."""
    writer = _Writer(random, length)
    share = random.dirichlet((2.0, 2.0, 2.0, 1.0))  # of prose, facts, questions, quotations
    sizes = np.array([24.0, 7.0, 7.0, 24.0])
    odds = share / sizes / (share / sizes).sum()
    writer.fact()
    kinds = random.choice(4, size=length, p=odds)
    for kind in kinds:
        if len(writer.tokens) >= length:
            break
        if kind == 0:
            writer.prose(int(random.integers(8, 41)))
        elif kind == 1:
            writer.fact()
        elif kind == 2:
            writer.tokens += [*writer.question(), STOP]
        else:
            writer.quote()
    del writer.tokens[length - 4 :]
    writer.facts = [fact for fact in writer.facts if fact in _facts_in(writer.tokens)]
    answer = writer.question()
    return np.array(writer.tokens, dtype=np.int64), answer


def _facts_in(tokens: list[int]) -> set[tuple[int, ...]]:
    """Facts that are whole in the tokens."""
    places = [place for place, token in enumerate(tokens[:-6]) if token == FACT and tokens[place + 3] == IS]
    return {(*tokens[place + 1 : place + 3], *tokens[place + 4 : place + 6]) for place in places}


def samples(tokenizer: Any, num_samples: int, max_length: int, seed: int, split: str) -> list[Sample]:
    """Documents of ``max_length`` tokens, answer included, each ending with a question; splits share none."""
    del tokenizer
    vocabulary = words()
    found = []
    for index in range(num_samples):
        tokens, answer = document(np.random.default_rng((SPLITS[split], seed, index)), max_length - 2)
        name = f"{SPLITS[split]:04x}{seed:06x}{index:06x}"
        text = f"{vocabulary[answer[0]]} {vocabulary[answer[1]]}"
        found.append(Sample(tokens, "retrieval", (name,), (text,), 2))
    return found
