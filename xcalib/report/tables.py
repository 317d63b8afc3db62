"""What the charts show, as tables of words: the alternative to each of them."""

from collections.abc import Mapping
from typing import Any

from xcalib.report.heads import layer_rows
from xcalib.report.summary import Report
from xcalib.report.words import interval, kl, percent

__all__ = ["tables"]


def tables(report: Report, place: int) -> dict[str, list[list[str]]]:
    """Rows of words for each chart's table; heads by layer are those of the point at ``place`` in the first length bin."""
    return {
        "marks_table": [
            [
                mark.name,
                mark.kind,
                mark.group,
                percent(mark.density, 2),
                kl(mark.kl),
                interval(mark.interval),
                mark.source,
            ]
            for mark in report.marks
        ],
        "lines_table": [
            [row["label"], percent(row["density"], 2), kl(row["kl"]), "" if row["tau"] is None else f"{row['tau']:.4f}"]
            for row in sorted(report.line_rows, key=lambda row: (row["series"], row["density"]))
        ],
        "held_table": [
            [row["name"], kl(row["predicted"]), kl(row["measured"]), _ends(row), _signed(row["off"])]
            for row in report.held
        ],
        "layers_table": [
            [
                f"{row['layer']}{' (dense)' if row['dense'] else ''}",
                *(f"{row[key]:.4f}" for key in ("least", "median", "most")),
                percent(row["density"]),
                kl(row["error"]),
            ]
            for row in layer_rows(report.inputs, place, 0)
        ],
        "lengths_table": [
            [
                *(row["name"], row["length"], row["kind"], percent(row["density"]), kl(row["kl"]), _ends(row)),
                *(str(row["samples"] or ""), row["source"]),
            ]
            for row in report.lengths
        ],
    }


def _ends(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else interval((row["low"], row["high"]))


def _signed(share: float) -> str:
    return ("+" if share > 0 else "") + percent(share)
