"""Samples from the Hugging Face hub and from a user's own function."""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from xcalib.data._documents import Document, Drops, choose, in_memory, one_line
from xcalib.data._encode import Encoder, Tokenizer
from xcalib.data._sample import DIGEST_CHARS, Sample, tokens_digest
from xcalib.data._specs import Spec
from xcalib.data._windows import Cutter, Request, draw
from xcalib.errors import DataError

__all__ = ["function_samples", "hub_samples"]

_MAX_ROWS = 200_000
_FIRST_ROWS = 64
_MAX_REJECTED = 10_000


def hub_samples(spec: Spec, encoder: Encoder, request: Request, drops: Drops) -> list[Sample]:
    """Windows of a hub data set, read as a stream until there are enough documents of the split.

    A stream has no last document to rank against, so here the split is the parity of a document's digest.

    Raises:
        DataError: ``datasets`` is missing, the set cannot be opened, or no text column is found.
    """
    rows = _hub_texts(spec.name, _open_hub(spec), drops)
    documents: dict[str, Document] = {}
    target = max(_FIRST_ROWS, 4 * request.count)
    while True:
        exhausted = not _collect(rows, documents, target, request, partial(drops.add, spec.name))
        found = (
            choose(spec.name, documents.values(), split="all", exclude=frozenset(), drops=drops) if documents else []
        )
        attempt = Drops()
        samples = draw(spec.name, found, encoder, request, attempt)
        if len(samples) == request.count or exhausted:
            drops.merge(attempt)
            return samples
        target *= 2


def _collect(
    rows: Iterator[tuple[str, str]],
    documents: dict[str, Document],
    target: int,
    request: Request,
    dropped: Callable[..., None],
) -> bool:
    """Add documents of the split until there are ``target``; False when the rows have ended."""
    for name, text in rows:
        document = in_memory(name, text)
        side = "heldout" if int(document.digest[-1], 16) % 2 else "calibration"
        if request.split not in ("all", side):
            continue
        if document.digest in documents:
            dropped("duplicate", name)
        elif document.digest in request.exclude:
            dropped("excluded", name)
        else:
            documents[document.digest] = document
            if len(documents) >= target:
                return True
    return False


def _open_hub(spec: Spec) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{spec.name}: needs the 'datasets' package; install it with: pip install 'xcalib[hf]'"
        ) from error
    name, config, split, *more = [*spec.argument.split(":"), "", ""]
    if any(more):
        raise DataError(f"{spec.name}: too many parts; allowed: hf:NAME[:CONFIG][:SPLIT]")
    wanted = {"name": config or None, "split": split or "train"}
    try:
        try:
            rows: Iterable[Any] = datasets.load_dataset(name, streaming=True, **wanted)
        except (NotImplementedError, ValueError):
            rows = datasets.load_dataset(name, **wanted)
    except Exception as error:
        raise DataError(f"{spec.name}: cannot open the data set ({one_line(error)})") from error
    return rows


def _hub_texts(spec: str, rows: Iterable[Any], drops: Drops) -> Iterator[tuple[str, str]]:
    column = ""
    try:
        for number, row in enumerate(islice(rows, _MAX_ROWS)):
            column = column or _text_column(spec, row)
            text = row.get(column)
            if not isinstance(text, str):
                drops.add(spec, f"column '{column}' is not a string", f"row {number}")
            elif not text.strip():
                drops.add(spec, "empty", f"row {number}")
            else:
                yield f"row {number}", text
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{spec}: reading the data set failed ({one_line(error)})") from error


def _text_column(spec: str, row: Mapping[str, Any]) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if not strings:
        raise DataError(f"{spec}: no text column; columns: {', '.join(row)}")
    return "text" if "text" in strings else strings[0]


def function_samples(spec: Spec, encoder: Encoder, request: Request, drops: Drops) -> list[Sample]:
    """Samples from ``package.module:function``, called with tokenizer, num_samples, max_length, seed and split.

    The function answers for the split itself: whatever it returns is used, in its order, less what ``exclude`` names.
    Text and token ids are cut into windows like any document; a :class:`Sample` is used as it is.

    Raises:
        DataError: the function cannot be imported, raises, or returns something else.
    """
    samples: list[Sample] = []
    cutters: list[Cutter] = []
    seen: set[str] = set()
    rejected = 0
    for number, item in enumerate(_call(spec, encoder.tokenizer, request)):
        given = _document(spec, number, item, encoder)
        digests = given.documents if isinstance(given, Sample) else (given.digest,)
        sample: Sample | None = None
        if request.exclude.intersection(digest[:DIGEST_CHARS] for digest in digests):
            drops.add(spec.name, "excluded", f"item {number}")
        elif isinstance(given, Sample):
            sample = _fitting(spec.name, f"item {number}", given, request, drops)
        elif given.digest in seen:
            drops.add(spec.name, "duplicate", given.name)
        else:
            seen.add(given.digest)
            cutter = Cutter(given, encoder, request, spec.name)
            sample = cutter.next()
            if sample is None:
                drops.add(spec.name, cutter.too_short(), given.name)
            else:
                cutters.append(cutter)
        samples += [] if sample is None else [sample]
        rejected += sample is None
        if len(samples) == request.count or rejected >= _MAX_REJECTED:
            return samples
    while cutters and len(samples) < request.count:  # second windows, once every item has given its first
        further = [(cutter, cutter.next()) for cutter in cutters]
        samples += [sample for _, sample in further if sample is not None]
        cutters = [cutter for cutter, sample in further if sample is not None]
    return samples[: request.count]


def _call(spec: Spec, tokenizer: Tokenizer, request: Request) -> Iterator[Any]:
    function = _import(spec)
    try:
        items = function(
            tokenizer=tokenizer,
            num_samples=request.count,
            max_length=request.max_length,
            seed=request.seed,
            split=request.split,
        )
        if isinstance(items, str | bytes | Mapping):
            raise TypeError(f"it returned one {type(items).__name__}, not several items")
        yield from items
    except Exception as error:
        raise DataError(f"{spec.name}: the function failed ({one_line(error)})") from error


def _import(spec: Spec) -> Any:
    module, colon, attribute = spec.argument.partition(":")
    if not colon:
        module, _, attribute = spec.argument.rpartition(".")
    # A console script does not have the working directory on its path; at the end, it shadows nothing.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise DataError(f"{spec.name}: cannot import '{attribute}' from '{module}' ({one_line(error)})") from error
    if not callable(function):
        raise DataError(f"{spec.name}: '{attribute}' is a {type(function).__name__}, not a function")
    return function


def _document(spec: Spec, number: int, item: Any, encoder: Encoder) -> Document | Sample:
    if isinstance(item, Sample):
        return item if item.documents else replace(item, documents=(tokens_digest(item.tokens),))
    if isinstance(item, str):
        return in_memory(f"item {number}", item)
    if not isinstance(item, Iterable) or isinstance(item, bytes | Mapping):
        raise DataError(
            f"{spec.name}: item {number} is a {type(item).__name__}; allowed: str, a sequence of token ids, or Sample"
        )
    ids = np.asarray(item if isinstance(item, np.ndarray) else list(item))
    ids = ids if ids.size else ids.astype(np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids < 0).any():
        raise DataError(f"{spec.name}: item {number} is not a sequence of token ids >= 0")
    ids = ids.astype(np.int64)
    start = len(encoder.prefix)
    if start and ids[:start].tolist() == encoder.prefix.tolist():
        ids = ids[start:]
    return Document(f"item {number}", tokens_digest(ids), ids.nbytes, lambda _start, _stop: "", ids=ids)


def _fitting(spec: str, name: str, sample: Sample, request: Request, drops: Drops) -> Sample | None:
    if len(sample.tokens) + sample.max_new_tokens > request.max_length:
        drops.add(spec, f"longer than {request.max_length} tokens with its answers", name)
        return None
    if len(sample.tokens) < request.min_length and (request.min_length_given or not sample.answers):
        drops.add(spec, f"shorter than {request.min_length} tokens", name)
        return None
    return sample
