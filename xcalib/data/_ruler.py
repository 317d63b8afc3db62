"""Synthetic long-context tasks in the style of RULER (arXiv 2404.06654), hidden in text of the shipped corpus.

Each sample ends with the beginning of its answer, as base models and small instruct models then answer best.
"""

import re
import string
from collections.abc import Callable, Sequence

import numpy as np

from xcalib._suggest import nearest
from xcalib.data._documents import Document
from xcalib.data._encode import Encoder
from xcalib.data._haystack import Haystack
from xcalib.data._niah import NIAH
from xcalib.data._questions import ONE_HOP, TWO_HOPS
from xcalib.data._sample import Sample, Tokens, text_digest
from xcalib.data._specs import Spec, Split
from xcalib.data._tasks import Setting, Task, distinct, draw_keys, draw_values, ending_of, enumerated, hidden
from xcalib.data._windows import Request, generator, new_tokens
from xcalib.errors import DataError

__all__ = ["RULER_TASKS", "TASKS", "check_tasks", "ruler_samples"]

_SHORT = 1_024  # tokens; below this, fewer needles leave some room for a haystack
_COMMON, _FREQUENT = 5, 3
_ATTEMPTS = 14


def ruler_samples(spec: Spec, documents: Sequence[Document], encoder: Encoder, request: Request) -> list[Sample]:
    """``request.count`` samples, the tasks in turns.

    A sample and its answer together take 90 to 100 % of ``request.max_length`` tokens.

    Raises:
        DataError: an unknown task, or ``max_length`` is too small to hold one.
    """
    tasks = check_tasks(spec)
    hay = Haystack(documents)
    samples = []
    for i in range(request.count):
        task, index = tasks[i % len(tasks)], i // len(tasks)
        wording: Split = request.split
        if wording == "all":
            wording = "heldout" if index % 2 else "calibration"
        random = generator(request, spec.name, task, index)
        made = _MAKERS[task](Setting(hay, random, wording, request.max_length < _SHORT))
        answer_tokens = new_tokens(made.answers, encoder)
        tokens, digests = _fit(f"ruler:{task}", made, encoder, request.max_length, answer_tokens)
        samples.append(Sample(tokens, f"ruler:{task}", digests, made.answers, answer_tokens))
    return samples


def check_tasks(spec: Spec) -> tuple[str, ...]:
    """Names of the tasks that the spec asks for; ``all`` stands for RULER's 13, nothing for :data:`TASKS`.

    Raises:
        DataError: one of them is unknown.
    """
    tasks: list[str] = []
    for name in [name.strip() for name in spec.argument.split(",")] if spec.argument else TASKS:
        if name != "all" and name not in _MAKERS:
            hint = nearest(name, (*_MAKERS, "all")) or ";"
            raise DataError(f"{spec.name}: unknown task '{name}'{hint} allowed: {', '.join(_MAKERS)}, all")
        tasks += RULER_TASKS if name == "all" else [name]
    return tuple(tasks)


def _fit(
    name: str, task: Task, encoder: Encoder, max_length: int, answer_tokens: int
) -> tuple[Tokens, tuple[str, ...]]:
    """Find the amount of context that fills the budget: tokens grow with characters, but not quite in proportion."""
    budget = max_length - answer_tokens
    enough = budget - max_length // 33
    low, high, chars = 0, 0, max(1, 4 * budget)
    best: tuple[Tokens, tuple[str, ...]] | None = None
    for _ in range(_ATTEMPTS):
        body, digests = task.body(chars)
        tokens = encoder.with_prefix(encoder.ids(f"{task.introduction}\n\n{body}\n\n{task.ending}"))
        if len(tokens) <= budget:
            low, best = chars, (tokens, digests)
            if len(tokens) >= enough:
                break
        else:
            high = chars
        guess = int(chars * (budget + enough) / 2 / max(1, len(tokens)))
        chars = max(low + 1, min(guess, high - 1)) if high else max(low + 1, guess)
        if high and not low + (high - low) // 20 <= chars <= high - (high - low) // 20:
            chars = (low + high) // 2
    if best is None or len(best[0]) + answer_tokens < 0.9 * max_length:
        raise DataError(f"{name}: {max_length} tokens are too few for the task with this tokenizer; use at least 512")
    return best


def _needles(setting: Setting, values_per_key: Sequence[int], asked: int) -> Task:
    """Needles for one key per entry; the question is about the first ``asked`` keys."""
    keys = draw_keys(setting.random, len(values_per_key))
    values = draw_values(setting, sum(values_per_key))
    pairs = [(key, values.pop()) for key, count in zip(keys, values_per_key, strict=True) for _ in range(count)]
    wanted = keys[:asked]
    answers = tuple(value for key in wanted for of, value in pairs if of == key)
    shuffled = [pairs[int(i)] for i in setting.random.permutation(len(pairs))]
    needles = [f"The special number for {key} is {value}." for key, value in shuffled]
    named = enumerated(wanted)
    one = len(answers) == 1
    question = (setting.phrases.ask_one if one else setting.phrases.ask_many).format(keys=named)
    start = f"The special {'number' if one else 'numbers'} for {named} {'is' if one else 'are'}"
    return Task(hidden(setting, needles), setting.phrases.needles, ending_of(question, start), answers)


def _single(setting: Setting) -> Task:
    return _needles(setting, [1], 1)


def _multikey(setting: Setting) -> Task:
    return _needles(setting, [1] * (3 if setting.short else 6), 1)


def _multivalue(setting: Setting) -> Task:
    return _needles(setting, [2] if setting.short else [4, 1], 1)


def _multiquery(setting: Setting) -> Task:
    return _needles(setting, [1, 1] if setting.short else [1] * 5, 2 if setting.short else 3)


def _tracking(setting: Setting) -> Task:
    length, others = (3, 0) if setting.short else (5, 3)
    letters = list(string.ascii_uppercase)
    names = distinct(lambda: "".join(setting.random.choice(letters, size=5)), length + others, setting.hay.capitals)
    value, *rest = draw_values(setting, 2)
    chain, distractors = names[:length], names[length:]
    lines = [*_assignments(chain, value), *(_assignments(distractors, rest[0]) if distractors else [])]
    # Both chains keep their own order: a variable is set before it is copied.
    first = set(setting.random.choice(len(lines), size=length, replace=False).tolist())
    own, other = iter(lines[:length]), iter(lines[length:])
    needles = [next(own) if i in first else next(other) for i in range(len(lines))]
    question = setting.phrases.ask_tracking.format(count=length, value=value)
    ending = ending_of(question, f"The {length} variables equal to {value} are")
    return Task(hidden(setting, needles), setting.phrases.tracking, ending, tuple(chain))


def _assignments(names: Sequence[str], value: str) -> list[str]:
    sources = [value, *names[:-1]]
    return [f"Set {name} = {source}." for name, source in zip(names, sources, strict=True)]


def _common_words(setting: Setting) -> Task:
    """Five words come three times as often as any other, or more."""
    order = setting.hay.order(setting.random)
    text, digests = setting.hay.text(order, 60_000)
    vocabulary = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
    question = setting.phrases.ask_common.format(count=_COMMON)
    ending = ending_of(question, f"The {_COMMON} most common words are")
    vocabulary = [vocabulary[int(i)] for i in setting.random.permutation(len(vocabulary))]
    common = [word for word in vocabulary if word not in ending][:_COMMON]  # else the question would give the answer
    rest = [word for word in vocabulary if word not in common]
    shuffle_seed = int(setting.random.integers(2**62))

    def body(chars: int) -> tuple[str, tuple[str, ...]]:
        total = max(20, chars // 7)
        often = max(3, int(0.4 * total / _COMMON))
        seldom = max(1, min(3, often // 3), -(-6 * total // (10 * len(rest))))
        others = rest[: max(1, (total - often * _COMMON) // seldom)]
        words = [word for word in common for _ in range(often)] + [word for word in others for _ in range(seldom)]
        return _shuffle(words, shuffle_seed), digests

    return Task(body, setting.phrases.words, ending, tuple(common))


def _frequent_words(setting: Setting) -> Task:
    """Made-up words whose counts fall as rank to the power -1.5; the first three are asked for."""
    vocabulary = distinct(lambda: _invented(setting.random), 400, frozenset())
    shuffle_seed = int(setting.random.integers(2**62))
    digest = (text_digest(" ".join(vocabulary)),)

    def body(chars: int) -> tuple[str, tuple[str, ...]]:
        total = max(40, chars // 7)
        ranks = np.arange(1, min(len(vocabulary), total // 4) + 1, dtype=np.float64)
        shares = ranks**-1.5 / (ranks**-1.5).sum()
        counts = np.maximum(1, np.floor(total * shares)).astype(np.int64)
        words = [word for word, count in zip(vocabulary, counts, strict=False) for _ in range(int(count))]
        return _shuffle(words, shuffle_seed), digest

    question = setting.phrases.ask_frequent.format(count=_FREQUENT)
    ending = ending_of(question, f"The {_FREQUENT} most frequent words are")
    return Task(body, setting.phrases.words, ending, tuple(vocabulary[:_FREQUENT]))


def _invented(random: np.random.Generator) -> str:
    pattern = ("bdfgklmnprstvz", "aeiou") * 3
    return "".join(str(random.choice(list(letters))) for letters in pattern)


def _shuffle(words: Sequence[str], seed: int) -> str:
    return " ".join(words[int(i)] for i in np.random.default_rng(seed).permutation(len(words)))


_OWN: dict[str, Callable[[Setting], Task]] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "vt": _tracking,
    "cwe": _common_words,
    "fwe": _frequent_words,
}
_MAKERS = {**_OWN, **NIAH, "qa_1": ONE_HOP, "qa_2": TWO_HOPS}
TASKS: tuple[str, ...] = tuple(_OWN)
RULER_TASKS: tuple[str, ...] = (*NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2")
