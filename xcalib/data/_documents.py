"""Documents, what was dropped and why, and the split that calibration and held-out data never share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from xcalib.data._metrics import Metric
from xcalib.data._sample import Tokens, text_digest
from xcalib.data._specs import Split
from xcalib.errors import DataError

__all__ = ["Document", "Drops", "Question", "choose", "in_memory", "one_line"]

_NAMES_SHOWN = 3
_REASONS_SHOWN = 8  # some quote the file


@dataclass(frozen=True)
class Question:
    """What a document asks for when it is a whole prompt.

    Args:
        answers: none for a document that asks nothing.
        metric: how they are scored.
        max_new_tokens: as given by the user; 0 for as many as the answers need.
        task: the data set that it belongs to, if the document names one.
    """

    answers: tuple[str, ...] = ()
    metric: Metric = "recall"
    max_new_tokens: int = 0
    task: str = ""


_NOTHING_ASKED = Question()


@dataclass(frozen=True)
class Document:
    """One text that is read when needed, so that a folder of any size fits.

    Args:
        name: for messages: file, line or row.
        digest: see :func:`xcalib.data._sample.text_digest`.
        size: bytes of UTF-8.
        read: (start, stop) in bytes -> text; characters cut by the borders are left out.
        group: ``category/kind``, for the shipped corpus: split and drawn in turns, so that samples mix the kinds alike.
        variant: tells documents apart that are made from the same text, which ``digest`` names.
        question: if it has answers, the document is a whole prompt and never cut.
        ids: given instead of text when a user's function made token ids.
        whole: digest of the file that this is a half of, and
        other: that of the other half; empty for a document of its own.
    """

    name: str
    digest: str
    size: int
    read: Callable[[int, int], str]
    group: str = ""
    variant: str = ""
    question: Question = _NOTHING_ASKED
    ids: Tokens | None = None
    whole: str = ""
    other: str = ""

    @property
    def category(self) -> str:
        """First part of the group."""
        return self.group.partition("/")[0]


class Drops:
    """Counts documents that were looked at and not used, by spec and reason, with the first few names."""

    def __init__(self) -> None:
        self._count: dict[tuple[str, str], int] = {}
        self._names: dict[tuple[str, str], list[str]] = {}

    def add(self, spec: str, reason: str, name: str = "") -> None:
        key = (spec, reason)
        self._count[key] = self._count.get(key, 0) + 1
        names = self._names.setdefault(key, [])
        if name and len(names) < _NAMES_SHOWN:
            names.append(name)

    def merge(self, other: "Drops") -> None:
        for key, count in other._count.items():
            self._count[key] = self._count.get(key, 0) + count
            names = self._names.setdefault(key, [])
            names += other._names[key][: _NAMES_SHOWN - len(names)]

    def summary(self) -> dict[str, int]:
        """Reason -> count, as in ``{"text:notes: not UTF-8 (a.txt, b.txt)": 2}``."""
        return {f"{spec}: {reason}{self._where(spec, reason)}": count for (spec, reason), count in self._count.items()}

    def _where(self, spec: str, reason: str) -> str:
        names = [name for name in self._names[spec, reason] if not spec.endswith(name)]
        more = ", ..." if self._count[spec, reason] > len(names) else ""
        return f" ({', '.join(names)}{more})" if names else ""

    def hint(self, spec: str) -> str:
        """For an error message: what was dropped from this spec, with the first few names, or nothing."""
        counts = [
            f"{count} {reason}{self._where(of, reason)}" for (of, reason), count in self._count.items() if of == spec
        ]
        more = ", ..." if len(counts) > _REASONS_SHOWN else ""
        return f"; dropped: {', '.join(counts[:_REASONS_SHOWN])}{more}" if counts else ""


def in_memory(name: str, text: str, *, group: str = "", question: Question = _NOTHING_ASKED) -> Document:
    """A document whose text is held already."""
    data = text.encode("utf-8", "replace")
    return Document(
        name,
        text_digest(text),
        len(data),
        lambda start, stop: data[start:stop].decode("utf-8", "ignore"),
        group=group,
        question=question,
    )


def choose(
    spec: str, documents: Iterable[Document], *, split: Split, exclude: frozenset[str], drops: Drops
) -> list[Document]:
    """Merge duplicates, take the split's documents, drop excluded ones; result is in order of digest.

    Documents alternate between the splits in order of their digest within each group, so the split depends on the texts
    alone: not on names, seed, lengths or tokenizer.

    Raises:
        DataError: nothing is left, or a single document was asked for held-out data.
    """
    unique: dict[tuple[str, str], Document] = {}
    for document in documents:
        if (document.digest, document.variant) in unique:
            drops.add(spec, "duplicate", document.name)
        else:
            unique[document.digest, document.variant] = document
    if not unique:
        raise DataError(f"{spec}: no usable document{drops.hint(spec)}")
    if len({digest for digest, _ in unique}) == 1 and split == "heldout":
        raise DataError(
            f"{spec}: a single document cannot serve both calibration and held-out data; "
            "give a second document, or other held-out data with --heldout-data"
        )
    kept = _unexcluded(spec, _take_split(list(unique.values()), split), exclude, drops)
    if not kept:
        raise DataError(f"{spec}: no document is left for the {split} split{drops.hint(spec)}; give more documents")
    return kept


def _take_split(documents: list[Document], split: Split) -> list[Document]:
    ordered = sorted(documents, key=lambda document: (document.digest, document.variant))
    if split == "all":
        return ordered
    ranks: dict[str, dict[str, int]] = {}
    for document in ordered:
        of_group = ranks.setdefault(document.group, {})
        of_group.setdefault(document.digest, len(of_group))
    parity = 0 if split == "calibration" else 1
    return [document for document in ordered if ranks[document.group][document.digest] % 2 == parity]


def _unexcluded(spec: str, documents: Sequence[Document], exclude: frozenset[str], drops: Drops) -> list[Document]:
    left = []
    for document in documents:
        # The whole is excluded with each of its halves; without the other half it was used as one document.
        in_whole = bool(document.whole) and document.whole in exclude and document.other not in exclude
        if document.digest in exclude or in_whole:
            drops.add(spec, "excluded", document.name)
        else:
            left.append(document)
    return left


def one_line(error: BaseException) -> str:
    """An exception's message fit for the one line of a DataError."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
