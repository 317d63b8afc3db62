"""All that a report says, gathered once for the page, the pictures and the card."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from xcalib.report.attention import AttentionPicture
from xcalib.report.evidence import PointRow, headline, length_rows, point_rows
from xcalib.report.front import LINE_NAMES, Group, Mark, Rival, front_lines, groups_of, marks, rivals
from xcalib.report.inputs import Inputs, tau_of

__all__ = ["Report", "summarise"]

MISSING = {
    "heads": "Density and error of each head are read off curves: pass --curves FOLDER, where the search measured them.",
    "front": "Nothing is predicted or measured for these points: pass --curves FOLDER or --evaluation FILE.json.",
    "curves": "The curves of a head need --curves FOLDER, the folder that the search measured into.",
    "lengths": "These figures are of one length: calibrate with --lengths 1k,2k,4k, or pass an --evaluation of several lengths.",
    "held": "No point has both a prediction and held-out figures: run xcalib search with MODEL, which measures every point.",
    "attention": "Pass --model MODEL to see what a few heads keep of one sample's attention.",
}


@dataclass(frozen=True, eq=False)
class Report:
    """Figures of every section; ``missing`` says for those without data what to pass."""

    inputs: Inputs
    points: list[PointRow]
    verdict: tuple[str, str]
    lines: list[dict[str, Any]]
    marks: list[Mark]
    rivals: list[Rival]
    lengths: list[dict[str, Any]]
    attention: tuple[AttentionPicture, ...]

    @cached_property
    def held(self) -> list[dict[str, Any]]:
        """Predicted and held-out KL of each point that has both."""
        rows = []
        for point in self.inputs.profile.points:
            if point.predicted is None or point.heldout is None:
                continue
            if point.predicted.kl <= 0 or point.heldout.kl <= 0:
                continue  # dense: no place on a log axis
            low, high = (point.heldout.intervals and point.heldout.intervals.kl) or (None, None)
            rows.append(
                {
                    "name": point.name,
                    "predicted": point.predicted.kl,
                    "measured": point.heldout.kl,
                    "low": low,
                    "high": high,
                    "off": point.predicted.kl / point.heldout.kl - 1,
                }
            )
        return rows

    @property
    def groups(self) -> list[Group]:
        """What the front's marks are of, the operating points first."""
        return groups_of(self.inputs, self.marks)

    @property
    def mark_rows(self) -> list[dict[str, Any]]:
        """For the chart; one mark of each name has it as its ``label``: the first that was measured, else the prediction."""
        labelled: dict[str, int] = {}
        for place, mark in enumerate(self.marks):
            if mark.name not in labelled or (mark.kind == "measured" != self.marks[labelled[mark.name]].kind):
                labelled[mark.name] = place
        return [
            mark.row() | {"label": tau_of(mark.name) if labelled[mark.name] == place else ""}
            for place, mark in enumerate(self.marks)
        ]

    @property
    def line_rows(self) -> list[dict[str, Any]]:
        """For the chart, with each line's name."""
        return [row | {"label": LINE_NAMES[row["series"]]} for row in self.lines]

    @property
    def line_names(self) -> list[str]:
        """Of the lines that are there."""
        return list(dict.fromkeys(row["label"] for row in self.line_rows))

    @cached_property
    def length_marks(self) -> list[dict[str, Any]]:
        """Figures by length of the profile's points, for the charts: many single taus would hide them."""
        names = {point.name for point in self.inputs.profile.points}
        return [row for row in self.lengths if row["name"] in names]

    @property
    def length_names(self) -> list[str]:
        """Points that have figures by length, in order."""
        return list(dict.fromkeys(row["name"] for row in self.length_marks))

    @cached_property
    def missing(self) -> dict[str, str]:
        """Section to what it lacks, for sections that cannot be shown whole."""
        has = {
            "heads": bool(self.inputs.curves),
            "front": bool(self.lines or self.marks),
            "curves": bool(self.inputs.curves),
            "lengths": bool(self.length_marks),
            "held": bool(self.held),
            "attention": bool(self.attention),
        }
        return {section: MISSING[section] for section, there in has.items() if not there}


def summarise(inputs: Inputs, attention: Sequence[AttentionPicture] = ()) -> Report:
    """Gather the figures; the published recurrence takes a few seconds on a model of thousands of heads."""
    points = point_rows(inputs.profile)
    return Report(
        inputs=inputs,
        points=points,
        verdict=headline(points),
        lines=front_lines(inputs),
        marks=marks(inputs),
        rivals=rivals(inputs),
        lengths=length_rows(inputs),
        attention=tuple(attention),
    )
