"""Whether our figures have the order that the paper claims, in plain sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xcalib.ablate.equal import AtDensity, interval_of
from xcalib.ablate.paper import PAPER
from xcalib.ablate.variants import Variant
from xcalib.evaluation.bootstrap import CONFIDENCE

__all__ = ["FEW_SAMPLES", "LEAST_SAMPLES", "Counts", "judge_orders", "sentences"]

LEAST_SAMPLES = 5  # the bootstrap of fewer is far too sure of itself (docs/search.md)
FEW_SAMPLES = 20  # below, intervals are too narrow still

# What the paper has no line for, and a reader of the table asks: whether the first loses less than the second.
_OURS = {"threshold": (("ours", "published DP"), ("ours", "single tau"))}

Record = dict[str, Any]


@dataclass(frozen=True)
class Counts:
    """Held-out samples, and how many of them ask something."""

    samples: int
    asking: int


def judge_orders(
    table: str, variants: Sequence[Variant], found: Mapping[str, AtDensity], density: float, counts: Counts
) -> list[Record]:
    """One record for each pair that the paper orders (a gap of a point or more) and that was measured at this density; after
    them pairs with ``paper_points`` None: what the paper could not compare.

    ``verdict`` (of the KL) and ``accuracy_verdict`` are ``agrees`` or ``disagrees`` where the interval leaves the other side out,
    ``open`` where it does not, and None where there are fewer than ``LEAST_SAMPLES`` to judge by.
    """
    records = []
    groups = dict.fromkeys(variant.group for variant in variants)
    for group in groups:
        named = {v.figure: v.name for v in variants if v.group == group and v.figure and v.name in found}
        for better, worse, gap in PAPER[table].claims():
            if better in named and worse in named:
                pair = (named[better], named[worse])
                records.append({"density": density, "group": group, "paper_points": gap} | _pair(pair, found, counts))
    for pair in _OURS.get(table, ()):
        if pair[0] in found and pair[1] in found:
            records.append({"density": density, "group": "", "paper_points": None} | _pair(pair, found, counts))
    return records


def _pair(pair: tuple[str, str], found: Mapping[str, AtDensity], counts: Counts) -> Record:
    first, second = found[pair[0]], found[pair[1]]
    ratio = interval_of(np.exp(first.log_kl_draws - second.log_kl_draws))
    gained = interval_of(first.accuracy_draws - second.accuracy_draws)
    judged = ratio is not None and counts.samples >= LEAST_SAMPLES
    scored = gained is not None and counts.asking >= LEAST_SAMPLES
    difference = None
    if first.accuracy is not None and second.accuracy is not None:
        difference = first.accuracy - second.accuracy
    return {
        "better": pair[0],
        "worse": pair[1],
        "kl_ratio": first.kl / second.kl,
        "kl_ratio_interval": ratio,
        "verdict": _side(ratio[0] > 1, ratio[1] < 1) if ratio and judged else None,
        "accuracy_difference": difference,
        "accuracy_difference_interval": gained,
        "accuracy_verdict": _side(gained[1] < 0, gained[0] > 0) if gained and scored else None,
    }


def _side(against: bool, agrees: bool) -> str:
    return "disagrees" if against else "agrees" if agrees else "open"


def sentences(orders: Sequence[Record], counts: Counts, dense_accuracy: float | None) -> list[str]:
    """A headline, one line for every order, and one on accuracy."""
    if not orders:
        return ["Nothing is said about the paper: no two of its variants could be compared at equal density."]
    if counts.samples < LEAST_SAMPLES:
        return [
            f"Nothing is said about the paper: that takes {LEAST_SAMPLES} held-out samples, here are {counts.samples}."
        ]
    claimed = [order for order in orders if order["paper_points"] is not None]
    lines = [_headline([order["verdict"] for order in claimed]), *(_line(order) for order in orders)]
    return [*lines, _accuracy([order["accuracy_verdict"] for order in claimed], counts.asking, dense_accuracy)]


def _headline(verdicts: list[str]) -> str:
    if not verdicts:
        return "Nothing is said about the paper: no two of its variants could be compared at equal density."
    agreed, against, unsure = (verdicts.count(word) for word in ("agrees", "disagrees", "open"))
    counts = (
        f"{agreed} of {len(verdicts)} orders confirmed, {against} contradicted, {unsure} not decided by these samples"
    )
    if against:
        return f"DISAGREES with the paper, by KL at equal density: {counts}."
    if agreed == len(verdicts):
        return f"Agrees with the paper, by KL at equal density: {counts}."
    if agreed:
        return f"Agrees with the paper in part, by KL at equal density: {counts}."
    return f"Neither confirms nor contradicts the paper, by KL at equal density: {counts}."


def _line(order: Record) -> str:
    low, high = order["kl_ratio_interval"]
    better, worse = order["better"], order["worse"]
    ratio = f"{better} has {order['kl_ratio']:.2f} times the KL of {worse} ({CONFIDENCE:.0%}: {low:.2f} to {high:.2f})"
    where = f"At density {order['density']:g} {ratio}"
    if order["paper_points"] is None:
        verdict = {"agrees": f"{better} is better", "disagrees": f"{better} is WORSE", "open": "not decided"}
        return f"{where}; the paper has no such line: {verdict[order['verdict']]}."
    verdict = {"agrees": "agrees", "disagrees": "DISAGREES", "open": "not decided"}
    claim = f"the paper puts {_kind(better)} {order['paper_points']:.2f} points ahead of {_kind(worse)}"
    return f"{where}; {claim}: {verdict[order['verdict']]}."


def _kind(name: str) -> str:
    """What the paper's table has: the pattern without the stride."""
    pattern = name.partition(" S=")[0]
    return pattern if pattern in PAPER["pattern"].figures else name


def _accuracy(verdicts: list[str | None], asking: int, dense: float | None) -> str:
    if not asking:
        return "Task accuracy was not measured: no held-out sample asks anything (--data ruler does)."
    asks = f"{asking} held-out samples ask something" if asking > 1 else "1 held-out sample asks something"
    if not dense:
        return f"Task accuracy says nothing here: {asks}, and the dense model answers none."
    if asking < LEAST_SAMPLES:
        return f"Task accuracy gives no verdict: {asks} (dense {dense:.1%}), and that takes {LEAST_SAMPLES}."
    counts = [verdicts.count(word) for word in ("agrees", "disagrees", "open")]
    text = f"{counts[0]} orders confirmed, {counts[1]} contradicted, {counts[2]} not decided"
    return f"By task accuracy at equal density ({asks}; dense {dense:.1%}): {text}."
