"""Token sequences for calibration and evaluation of long-context models, and the split that keeps the two apart.

Data are named by specs: ``builtin`` (a shipped corpus of prose, reference text, code and tables), ``ruler``
(synthetic tasks in the style of RULER, arXiv 2404.06654), ``text:PATH``, ``jsonl:PATH[:FIELD]``,
``hf:NAME[:CONFIG][:SPLIT]`` and ``package.module:function``; each may end with a weight such as ``@2``.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from xcalib.data._documents import Drops, choose
from xcalib.data._encode import Encoder, Tokenizer
from xcalib.data._lengths import SHORTEST, boundary, check_lengths, check_sets, length_sets, parse_lengths, pooled
from xcalib.data._plugins import function_samples, hub_samples
from xcalib.data._ruler import TASKS, check_tasks, ruler_samples
from xcalib.data._sample import DIGEST_CHARS, Sample, SampleSet, score
from xcalib.data._sources import builtin_documents, categories, jsonl_documents, text_documents
from xcalib.data._specs import SPLITS, Spec, Split, allocate, interleave, parse_specs
from xcalib.data._windows import Request, draw
from xcalib.errors import DataError

__all__ = [
    "DEFAULT_SPECS",
    "SHORTEST",
    "TASKS",
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
    "pooled",
    "score",
]

DEFAULT_SPECS: tuple[str, ...] = ("builtin", "ruler")


def load_samples(
    specs: Sequence[str],
    tokenizer: Tokenizer,
    *,
    num_samples: int,
    max_length: int,
    min_length: int | None = None,
    seed: int = 0,
    split: Split = "calibration",
    exclude: Collection[str] = (),
) -> SampleSet:
    """Make ``num_samples`` samples from the specs, shared out by weight and interleaved.

    Args:
        specs: see the module's description; every one gets at least one sample.
        tokenizer: a transformers tokenizer, or anything that answers the same call.
        num_samples: how many, at least one per spec.
        max_length: tokens of a sample, bos and the answer to be generated included.
        min_length: least tokens of a sample cut from text; default ``max_length``. Rows that bring answers are whole
            prompts: they may be shorter unless this is given. RULER-style samples fill 90 % or more of ``max_length``.
        seed: picks documents, windows and tasks; the split does not depend on it.
        split: ``calibration`` and ``heldout`` share no document within a spec; ``all`` ignores the split.
        exclude: document digests never to use, e.g. ``calibration_set.documents``: it also keeps apart documents that
            two different specs share.

    Raises:
        DataError: a spec is malformed or names something missing, or there is not enough text.
    """
    parsed = parse_specs(specs)
    banned = frozenset(digest[:DIGEST_CHARS].lower() for digest in exclude)
    least = max_length if min_length is None else min_length
    request = _checked(Request(num_samples, least, max_length, seed, split, banned, min_length is not None))
    encoder, drops = Encoder(tokenizer), Drops()
    if request.max_length <= len(encoder.prefix) + 1:
        raise DataError(f"max_length must be more than {len(encoder.prefix) + 1} with this tokenizer, got {max_length}")
    counts = allocate([spec.weight for spec in parsed], num_samples)
    made = []
    for spec, count in zip(parsed, counts, strict=True):
        part = replace(request, count=count)
        samples = _load(spec, encoder, part, drops)
        if len(samples) < count:
            raise _too_few(spec, len(samples), part, drops)
        made.append(samples)
    ordered = tuple(made[i][k] for i, k in interleave(counts))
    names = (specs,) if isinstance(specs, str) else tuple(specs)
    return SampleSet(ordered, drops.summary(), names, split, seed, request.max_length)


def _checked(request: Request) -> Request:
    if request.count < 1:
        raise DataError(f"num_samples must be at least 1, got {request.count}")
    if not 1 <= request.min_length <= request.max_length:
        raise DataError(
            f"lengths must satisfy 1 <= min_length <= max_length, got {request.min_length} and {request.max_length}"
        )
    if request.split not in SPLITS:
        raise DataError(f"unknown split '{request.split}'; allowed: {', '.join(SPLITS)}")
    return request


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
        found = text_documents(spec.name, spec.argument, drops)
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
