"""What the package yields: token sequences, where they came from, and how an answer to one is scored."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xcalib.data._metrics import Metric, check_metric, evaluate_metric
from xcalib.errors import DataError

Tokens = npt.NDArray[np.int64]

DIGEST_CHARS = 16


def text_digest(text: str) -> str:
    """First 16 hex characters of the SHA-256 of the text as UTF-8: how documents are named everywhere."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_CHARS]


def tokens_digest(tokens: Tokens) -> str:
    """The same for a document that was given as token ids."""
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()[:DIGEST_CHARS]


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence to run a model on.

    Args:
        tokens: shape (length,), int64; copied and made read-only. Begins with the tokenizer's bos token if it adds one.
        source: the spec that it came from, without weight; for RULER-style samples the task, as in ``ruler:multikey``; for
            rows of JSON lines that ask something and name their data set, that too, as in ``jsonl:FILE#hotpotqa``.
        documents: first 16 hex characters of the SHA-256 of each document that the sample takes text from.
        answers: strings that must all be produced for a full score, or one of them with any metric but ``recall``; empty
            when the sample asks nothing.
        max_new_tokens: greedy tokens to generate for the answers; 0 when there are none.
        metric: how the generated text is scored, see :func:`score`.

    Raises:
        DataError: tokens are not a non-empty list of ids >= 0, answers and max_new_tokens contradict each other, or the
            metric is unknown or needs a package that is missing.
    """

    tokens: Tokens
    source: str
    documents: tuple[str, ...]
    answers: tuple[str, ...] = ()
    max_new_tokens: int = 0
    metric: Metric = "recall"

    def __post_init__(self) -> None:
        given = np.asarray(self.tokens)
        if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu" or int(given.min()) < 0:
            raise DataError(
                f"{self.source}: tokens must be a non-empty list of ids >= 0, got shape {given.shape} of {given.dtype}"
            )
        if bool(self.answers) != (self.max_new_tokens > 0):
            raise DataError(
                f"{self.source}: max_new_tokens must be positive exactly when there are answers, "
                f"got {len(self.answers)} answers and max_new_tokens={self.max_new_tokens}"
            )
        if not all(answer.strip() for answer in self.answers):
            raise DataError(f"{self.source}: an answer is empty")
        check_metric(self.metric, self.source)
        tokens = given.astype(np.int64, copy=True)
        tokens.setflags(write=False)
        object.__setattr__(self, "tokens", tokens)


@dataclass(frozen=True)
class SampleSet:
    """Samples in their final, interleaved order, and the record of how they were made.

    Args:
        samples: in order; reproducible from specs, split, seed, lengths and the tokenizer.
        dropped: reason (with spec and a few names) -> number of documents that were looked at and not used.
        specs: as given, weights included.
        split: ``calibration``, ``heldout`` or ``all``.
        seed: as given.
        max_length: as given, in tokens; None for samples that were not drawn by length.
    """

    samples: tuple[Sample, ...]
    dropped: Mapping[str, int]
    specs: tuple[str, ...]
    split: str
    seed: int
    max_length: int | None = None

    @property
    def tokens_sha256(self) -> str:
        """SHA-256 hex over every sample's length and tokens, each as little-endian int64, in order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample.tokens).to_bytes(8, "little"))
            digest.update(sample.tokens.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def length(self) -> int:
        """What the set stands for, in tokens: the length asked for, or that of the longest sample if that is longer."""
        return max([self.max_length or 0, *(len(sample.tokens) for sample in self.samples)])

    @property
    def questions_sha256(self) -> str:
        """SHA-256 hex over what every sample asks for and how it is scored, in order: scores depend on it beside tokens."""
        asked = [[sample.answers, sample.max_new_tokens, sample.metric] for sample in self.samples]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    @property
    def documents(self) -> frozenset[str]:
        """Digests of every document that any sample takes text from; pass them on as ``exclude``."""
        return frozenset(digest for sample in self.samples for digest in sample.documents)


def score(sample: Sample, generated_text: str) -> float:
    """The sample's metric of a generated text, in [0, 1].

    ``recall``: share of the answers that occur in the text, case-insensitive, in any order, and whole words only:
    ``48213`` is found neither in ``148213`` nor in ``48213.5``. Of the other metrics the best over the answers counts.
    ``exact`` and ``f1`` compare words in lower case without punctuation and articles (SQuAD, arXiv 1606.05250), with as
    many lines of the text as the answer has; ``rouge-l`` is the F-measure of ROUGE-L over the whole text.

    Raises:
        DataError: the sample has no answers.
    """
    if not sample.answers:
        raise DataError(f"{sample.source}: the sample asks nothing, so there is nothing to score")
    return evaluate_metric(sample.metric, sample.answers, generated_text)
