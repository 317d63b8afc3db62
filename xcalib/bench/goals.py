"""What measurements should reach: bounds on ratios of two of them, computed from whatever was measured."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from xcalib.bench.tasks import Task

__all__ = ["Goal", "judge"]

Record = dict[str, Any]
Sense = Literal["at most", "at least", "above"]


@dataclass(frozen=True)
class Goal:
    """A bound on the time of ``over`` divided by that of ``under``.

    Attributes:
        what: in words.
        over: what the measurement must agree with; what is not set agrees with all, and the fastest that agrees is taken.
        under: likewise.
        sense: on which side of the bound the ratio should be.
        bound: of the ratio.
        noise: share of the bound by which timing noise may miss it.
        per_density: divide by the density found in ``over``'s mask as well.
    """

    what: str
    over: Task
    under: Task
    sense: Sense
    bound: float
    noise: float = 0.0
    per_density: bool = False

    def settings(self) -> Record:
        """JSON values, as :func:`judge` takes them."""
        return vars(self) | {"over": self.over.settings(), "under": self.under.settings()}


def judge(goals: Iterable[Record], records: list[Record]) -> list[Record]:
    """One row for each goal whose measurements were made.

    Args:
        goals: :meth:`Goal.settings` of each.
        records: measurements.

    Returns:
        ``what``, ``length``, ``goal`` (in words), ``measured`` (the ratio), ``met``.
    """
    rows = []
    for goal in goals:
        over, under = (_fastest(records, goal[side]) for side in ("over", "under"))
        if over is None or under is None:
            continue
        ratio = over["median_ms"] / under["median_ms"]
        if goal["per_density"]:
            ratio /= over["found_density"]
        allowed = f", {goal['noise']:.0%} timing noise allowed" if goal["noise"] else ""
        rows.append(
            {
                "what": goal["what"],
                "length": goal["over"]["length"],
                "goal": f"{goal['sense']} {goal['bound']:g}{allowed}",
                "measured": ratio,
                "met": _met(ratio, goal["sense"], goal["bound"], goal["noise"]),
            }
        )
    return rows


def _fastest(records: list[Record], wanted: Record) -> Record | None:
    found = [r for r in records if r["status"] == "ok" and all(r.get(key) == wanted[key] for key in wanted)]
    return min(found, key=lambda record: float(record["median_ms"]), default=None)


def _met(ratio: float, sense: Sense, bound: float, noise: float) -> bool:
    if sense == "at most":
        return ratio <= bound * (1 + noise)
    return ratio > bound * (1 - noise) if sense == "above" else ratio >= bound * (1 - noise)
