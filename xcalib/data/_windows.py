"""Cuts documents into windows of tokens, drawing them so that samples cover many documents first."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise, zip_longest

import numpy as np

from xcalib.data._documents import Document, Drops
from xcalib.data._encode import Encoder
from xcalib.data._sample import Sample, Tokens
from xcalib.data._specs import Split

__all__ = ["Cutter", "Request", "draw", "generator"]

_WHOLE_BYTES = 2_000_000  # documents up to this size are tokenised whole
_PIECE_BYTES = 1 << 20
_PIECE_BYTES_PER_TOKEN = 16
_KEPT_BYTES = 64_000_000


@dataclass(frozen=True)
class Request:
    """What the samples of one spec must be like; lengths in tokens, bos included, ``exclude`` in digests.

    With ``limit`` no task gives more samples than that, and ``count`` is what there may be, not what there must be.
    """

    count: int
    min_length: int
    max_length: int
    seed: int
    split: Split
    exclude: frozenset[str] = frozenset()
    min_length_given: bool = False
    limit: int | None = None


def generator(request: Request, *salt: object) -> np.random.Generator:
    """A stream that differs for every seed, split and salt."""
    text = "\0".join(str(part) for part in (request.seed, request.split, *salt))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))


class Cutter:
    """Yields the windows of one document; they never overlap and their order is random."""

    def __init__(self, document: Document, encoder: Encoder, request: Request, spec: str) -> None:
        self.document = document
        self._encoder = encoder
        self._request = request
        task = document.question.task
        self.source = f"{spec}#{task}" if task else spec
        self._live: Iterator[Sample] | None = None
        self.taken = 0

    def next(self) -> Sample | None:
        """The next window, or None when there is no further one."""
        if self._live is None:
            self._live = islice(self._samples(), self.taken, None)
        sample = next(self._live, None)
        self.taken += sample is not None
        return sample

    def rest(self) -> None:
        """Let go of the document's tokens; it is tokenised again when a further window is asked for."""
        self._live = None

    def too_short(self) -> str:
        """The reason to record when there is no first window."""
        if self.document.question.answers:
            least = f"shorter than {self._request.min_length} or " if self._request.min_length_given else ""
            return f"{least}longer than {self._request.max_length} tokens with its answers"
        return f"shorter than {self._request.min_length} tokens"

    def _samples(self) -> Iterator[Sample]:
        document = self.document
        if document.question.answers:
            sample = self._whole()
            yield from [] if sample is None else [sample]
            return
        # The generator depends on the text, not on the path, so that a moved folder gives the same samples.
        random = generator(self._request, document.digest)
        taken = len(self._encoder.prefix)
        size, least = self._request.max_length - taken, max(1, self._request.min_length - taken)
        pieces = self._pieces()
        for index in random.permutation(len(pieces)):
            ids = document.ids if document.ids is not None else self._encoder.ids(document.read(*pieces[index]))
            for start, stop in _spans(len(ids), size, least, random):
                yield self._sample(ids[start:stop])

    def _pieces(self) -> list[tuple[int, int]]:
        size = self.document.size
        if size <= _WHOLE_BYTES or self.document.ids is not None:
            return [(0, size)]
        count = max(1, size // max(_PIECE_BYTES, _PIECE_BYTES_PER_TOKEN * self._request.max_length))
        borders = [size * i // count for i in range(count + 1)]
        return list(pairwise(borders))

    def _whole(self) -> Sample | None:
        document, request, asked = self.document, self._request, self.document.question
        sample = self._sample(self._encoder.ids(document.read(0, document.size)))
        new = asked.max_new_tokens or new_tokens(asked.answers, self._encoder, alternatives=asked.metric != "recall")
        sample = replace(sample, answers=asked.answers, max_new_tokens=new, metric=asked.metric)
        too_short = request.min_length_given and len(sample.tokens) < request.min_length
        too_long = len(sample.tokens) + sample.max_new_tokens > request.max_length
        return None if too_short or too_long else sample

    def _sample(self, ids: Tokens) -> Sample:
        document = self.document
        # What was calibrated on a half keeps later evaluations from the whole file; held out, the half stands for itself.
        used = (document.whole,) if document.whole and self._request.split != "heldout" else ()
        return Sample(self._encoder.with_prefix(ids), self.source, (document.digest, *used))


def new_tokens(answers: Sequence[str], encoder: Encoder, *, alternatives: bool = False) -> int:
    """Tokens to allow for an answer: the answers in a list, or the longest if one will do, a quarter more, and a little
    to start with."""
    texts = answers if alternatives else [", ".join(answers)]
    listed = max(len(encoder.ids(f" {text}.")) for text in texts)
    return listed + listed // 4 + 8


def _spans(length: int, size: int, least: int, random: np.random.Generator) -> list[tuple[int, int]]:
    whole, rest = divmod(length, size)
    if whole == 0:
        return [(0, length)] if length >= least else []
    # A remainder of use becomes a last, shorter window; any other is spent as a random offset.
    offset = 0 if rest >= least else int(random.integers(rest + 1))
    spans = [(offset + int(i) * size, offset + (int(i) + 1) * size) for i in random.permutation(whole)]
    return [*spans, (whole * size, length)] if rest >= least else spans


def draw(spec: str, documents: Sequence[Document], encoder: Encoder, request: Request, drops: Drops) -> list[Sample]:
    """Up to ``request.count`` samples: one window of each document, in random order, before a second one.

    What asks something counts towards the limit of its task, everything else towards that of the spec.
    """
    waiting = [Cutter(document, encoder, request, spec) for document in _shuffled(documents, request)]
    # Each keeps the tokens of one piece: of a huge document that is little, and making them again for every window is much.
    most = max(_WHOLE_BYTES, _PIECE_BYTES_PER_TOKEN * request.max_length)
    keep = sum(min(document.size, most) for document in documents) <= _KEPT_BYTES
    samples: list[Sample] = []
    taken: Counter[str] = Counter()
    while waiting and len(samples) < request.count:
        going = []
        for cutter in waiting:
            if len(samples) == request.count:
                break
            if taken[cutter.source] == request.limit:
                continue
            sample = cutter.next()
            if sample is not None:
                samples.append(sample)
                taken[sample.source] += 1
                going.append(cutter)
            elif cutter.taken == 0:
                drops.add(spec, cutter.too_short(), cutter.document.name)
            if not keep:
                cutter.rest()
        waiting = going
    return samples


def _shuffled(documents: Sequence[Document], request: Request) -> list[Document]:
    """Random order within a group; categories, and the kinds in each, take turns in an order that both splits share."""

    def key(*names: str) -> bytes:
        return hashlib.sha256("\0".join((str(request.seed), *names)).encode()).digest()

    groups: dict[str, dict[str, list[Document]]] = {}
    for document in sorted(documents, key=lambda document: key(request.split, document.digest)):
        groups.setdefault(document.category, {}).setdefault(document.group, []).append(document)
    categories = [groups[category] for category in sorted(groups, key=key)]
    return _in_turns([_in_turns([kinds[kind] for kind in sorted(kinds, key=key)]) for kinds in categories])


def _in_turns(lists: Sequence[Sequence[Document]]) -> list[Document]:
    return [document for turn in zip_longest(*lists) for document in turn if document is not None]
