"""Token sequences for calibration and evaluation of long-context models, and the split that keeps the two apart.

Data are named by specs: ``builtin`` (a shipped corpus of prose, reference text, code and tables), ``ruler``
(synthetic tasks in the style of RULER, arXiv 2404.06654; ``ruler:all`` for its 13), ``text:PATH``, ``jsonl:PATH[:FIELD]``,
``hf:NAME[:CONFIG][:SPLIT]`` and ``package.module:function``; each may end with a weight such as ``@2``.
"""

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from xcalib.data._documents import Drops, choose
from xcalib.data._encode import Encoder, Tokenizer
from xcalib.data._jsonl import jsonl_documents
from xcalib.data._lengths import SHORTEST, boundary, check_lengths, check_sets, length_sets, parse_lengths, pooled
from xcalib.data._metrics import METRICS, Metric
from xcalib.data._plugins import function_samples, hub_samples
from xcalib.data._ruler import RULER_TASKS, TASKS, check_tasks, ruler_samples
from xcalib.data._sample import DIGEST_CHARS, Sample, SampleSet, score
from xcalib.data._sources import builtin_documents, categories, text_documents
from xcalib.data._specs import SPLITS, Spec, Split, allocate, interleave, parse_specs, recorded_specs
from xcalib.data._windows import Request, draw
from xcalib.errors import DataError

__all__ = [
    "DEFAULT_SPECS",
    "METRICS",
    "RULER_TASKS",
    "SHORTEST",
    "TASKS",
    "Metric",
    "Sample",
    "SampleSet",
    "Split",
    "Tokenizer",
    "boundary",
    "categories",
    "check_lengths",
    "check_sets",
    "length_sets",
    "load_samples",
    "parse_lengths",
    "parse_specs",
    "pooled",
    "recorded_specs",
    "score",
]

DEFAULT_SPECS: tuple[str, ...] = ("builtin", "ruler")


def load_samples(
    specs: Sequence[str],
    tokenizer: Tokenizer,
    *,
    num_samples: int | None = None,
    max_length: int,
    min_length: int | None = None,
    seed: int = 0,
    split: Split = "calibration",
    exclude: Collection[str] = (),
    limit: int | None = None,
) -> SampleSet:
    """Make ``num_samples`` samples from the specs, shared out by weight and interleaved.

    Args:
        specs: see the module's description; every one gets at least one sample.
        tokenizer: a transformers tokenizer, or anything that answers the same call.
        num_samples: how many, at least one per spec; may be left out with ``limit``, for as many as that allows.
        max_length: tokens of a sample, bos and the answer to be generated included.
        min_length: least tokens of a sample cut from text; default ``max_length``. Rows that bring answers are whole
            prompts: they may be shorter unless this is given. RULER-style samples fill 90 % or more of ``max_length``.
        seed: picks documents, windows and tasks; the split does not depend on it.
        split: ``calibration`` and ``heldout`` share no document within a spec; ``all`` ignores the split.
        exclude: document digests never to use, e.g. ``calibration_set.documents``: it also keeps apart documents that
            two different specs share.
        limit: at most this many samples of each task, that is, of one ``source`` (a RULER-style task, a data set that the rows
            of a JSON lines file name, any other spec). Fewer where there are not as many, in place of an error.

    Raises:
        DataError: a spec is malformed or names something missing, or there is not enough text.
    """
    parsed = parse_specs(specs)
    banned = frozenset(digest[:DIGEST_CHARS].lower() for digest in exclude)
    least = max_length if min_length is None else min_length
    amount = sys.maxsize if num_samples is None and limit is not None else num_samples
    request = _checked(Request(amount or 0, least, max_length, seed, split, banned, min_length is not None, limit))
    encoder, drops = Encoder(tokenizer), Drops()
    if request.max_length <= len(encoder.prefix) + 1:
        raise DataError(f"max_length must be more than {len(encoder.prefix) + 1} with this tokenizer, got {max_length}")
    counts = [sys.maxsize] * len(parsed)
    if num_samples is not None:
        counts = allocate([spec.weight for spec in parsed], num_samples)
    made = [
        _enough(spec, encoder, replace(request, count=_within_limit(spec, count, limit)), drops)
        for spec, count in zip(parsed, counts, strict=True)
    ]
    ordered = tuple(_limited((made[i][k] for i, k in interleave([len(samples) for samples in made])), limit))
    names = (specs,) if isinstance(specs, str) else tuple(specs)
    return SampleSet(ordered, drops.summary(), names, split, seed, request.max_length)


def _checked(request: Request) -> Request:
    if request.count < 1:
        raise DataError(f"num_samples must be at least 1, got {request.count}; it may be left out only with a limit")
    if request.limit is not None and request.limit < 1:
        raise DataError(f"limit must be at least 1, got {request.limit}")
    if not 1 <= request.min_length <= request.max_length:
        raise DataError(
            f"lengths must satisfy 1 <= min_length <= max_length, got {request.min_length} and {request.max_length}"
        )
    if request.split not in SPLITS:
        raise DataError(f"unknown split '{request.split}'; allowed: {', '.join(SPLITS)}")
    return request


def _within_limit(spec: Spec, count: int, limit: int | None) -> int:
    """How many samples a spec can give; the tasks of JSON lines are not known before they are read."""
    if limit is None or spec.kind == "jsonl":
        return count
    return min(count, limit * (len(set(check_tasks(spec))) if spec.kind == "ruler" else 1))


def _limited(samples: Iterable[Sample], limit: int | None) -> list[Sample]:
    """The first of each source: two specs may name the same task."""
    seen: Counter[str] = Counter()
    kept = []
    for sample in samples:
        if seen[sample.source] != limit:
            seen[sample.source] += 1
            kept.append(sample)
    return kept


def _enough(spec: Spec, encoder: Encoder, request: Request, drops: Drops) -> list[Sample]:
    """The samples of one spec: as many as asked for, or any at all under a limit."""
    samples = _load(spec, encoder, request, drops)
    wanted = request.count if request.limit is None else 1
    if len(samples) < wanted:
        raise _too_few(spec, len(samples), replace(request, count=wanted), drops)
    return samples


def _load(spec: Spec, encoder: Encoder, request: Request, drops: Drops) -> list[Sample]:
    if spec.kind == "function":
        return function_samples(spec, encoder, request, drops)
    if spec.kind == "hf":
        return hub_samples(spec, encoder, request, drops)
    if spec.kind == "ruler":
        check_tasks(spec)
        documents = choose(spec.name, builtin_documents(""), split=request.split, exclude=request.exclude, drops=drops)
        return ruler_samples(spec, documents, encoder, request)
    if spec.kind == "builtin":
        found = iter(builtin_documents(spec.argument))
    elif spec.kind == "text":
        found = text_documents(spec.name, spec.argument, drops, halve=request.split != "all")
    else:
        found = jsonl_documents(spec.name, spec.argument, drops)
    documents = choose(spec.name, found, split=request.split, exclude=request.exclude, drops=drops)
    return draw(spec.name, documents, encoder, request, drops)


def _too_few(spec: Spec, found: int, request: Request, drops: Drops) -> DataError:
    missing = (request.count - found) * request.min_length
    wanted = f"{request.min_length:,}"
    if request.min_length < request.max_length:
        wanted += f" to {request.max_length:,}"
    return DataError(
        f"{spec.name}: found {found} of {request.count} samples of {wanted} tokens in the {request.split} split, about "
        f"{missing:,} tokens of text are missing{drops.hint(spec.name)}; add text, or ask for fewer samples, a smaller "
        "max_length or a smaller min_length"
    )
