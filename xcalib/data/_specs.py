"""What the user may ask for: parsing of specs, and how samples are shared out among them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from xcalib._suggest import nearest
from xcalib.errors import DataError

__all__ = ["ALLOWED", "Spec", "Split", "allocate", "interleave", "parse_specs", "recorded_specs"]

Split = Literal["calibration", "heldout", "all"]
SPLITS: tuple[str, ...] = get_args(Split)

ALLOWED = (
    "builtin[:CATEGORY,...], ruler[:TASK,... or :all], text:PATH, jsonl:PATH[:FIELD], hf:NAME[:CONFIG][:SPLIT] "
    "or package.module:function, each with an optional weight such as @2"
)
KINDS = ("builtin", "ruler", "text", "jsonl", "hf")
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Spec:
    """One parsed spec. ``kind`` is builtin, ruler, text, jsonl, hf or function; ``argument`` what follows its colon."""

    name: str
    kind: str
    argument: str
    weight: float


def parse_specs(specs: Sequence[str]) -> tuple[Spec, ...]:
    """Parse and check all specs; those of weight 0 are left out.

    Raises:
        DataError: an unknown spec, a bad weight, a spec given twice, or nothing left.
    """
    parsed = [_parse(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    names = [spec.name for spec in parsed]
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"spec '{name}' is given {names.count(name)} times; give it once with a weight, e.g. {name}@2"
            )
    used = tuple(spec for spec in parsed if spec.weight > 0)
    if not used:
        raise DataError(f"no data asked for: give at least one spec with a positive weight; allowed: {ALLOWED}")
    return used


def recorded_specs(sources: Sequence[str]) -> list[str]:
    """The specs that a profile or a record of one names, to be read again.

    A file may come from a stranger, so it may not say what is run.

    Raises:
        DataError: one is a Python function, or unknown.
    """
    for spec in parse_specs(list(sources)) if sources else ():
        if spec.kind == "function":
            raise DataError(f"{spec.name!r} is a function, and a profile may not say what is run: give --data")
    return list(sources)


def _parse(text: str) -> Spec:
    name, weight = _split_weight(text)
    kind, colon, argument = name.partition(":")
    if kind in {"builtin", "ruler"} and (argument or not colon):
        return Spec(name, kind, argument, weight)
    if kind in {"text", "jsonl", "hf"} and argument:
        return Spec(name, kind, argument, weight)
    if kind not in KINDS and _FUNCTION.fullmatch(name):
        return Spec(name, "function", name, weight)
    hint = nearest(kind, KINDS)
    raise DataError(f"unknown data spec '{text}'{hint or ';'} allowed: {ALLOWED}")


def _split_weight(text: str) -> tuple[str, float]:
    name, at, suffix = text.rpartition("@")
    if not at:
        return text, 1.0
    try:
        weight = float(suffix)
    except ValueError:
        if text.startswith(("text:", "jsonl:", "hf:")):
            return text, 1.0  # an @ that belongs to the path
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise DataError(
            f"bad weight '@{suffix}' in data spec '{text}'; a weight is a finite number >= 0, e.g. @2 or @0.5"
        )
    return name, weight


def allocate(weights: Sequence[float], total: int) -> list[int]:
    """Share out ``total`` in proportion to positive weights: largest remainder, at least one each, ties to the first.

    Raises:
        DataError: there are fewer samples than specs.
    """
    if total < len(weights):
        raise DataError(
            f"{total} samples cannot cover {len(weights)} data specs; "
            f"ask for at least {len(weights)} samples or drop specs"
        )
    # Fractions: a float sum could order equal remainders by rounding noise.
    shares = [Fraction(weight) for weight in weights]
    exact = [share * total / sum(shares) for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    while 0 in counts:
        counts[max(range(len(counts)), key=lambda i: (counts[i], -i))] -= 1
        counts[counts.index(0)] += 1
    return counts


def interleave(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Order of (spec, sample of that spec) such that each spec is spread evenly over the whole."""
    slots = [(Fraction(2 * k + 1, 2 * count), i, k) for i, count in enumerate(counts) for k in range(count)]
    return [(i, k) for _, i, k in sorted(slots)]
