"""What the terminal shows by length: curves, a profile's points and an evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from xcalib.cli.output import console, interval_labels, print_json

if TYPE_CHECKING:
    from xcalib.collect import Curves
    from xcalib.evaluation import Evaluation, LengthResult
    from xcalib.profile import LengthBin, LengthEvidence, OperatingPoint, Profile

__all__ = ["bin_name", "evaluation_by_length", "point_by_length", "report_curves"]


def bin_name(length_bin: "LengthBin") -> str:
    """``512 to 1,448 keys`` or ``512 keys and more``."""
    return f"{_span(length_bin.min_length, length_bin.max_length)} keys" + (
        " and more" if length_bin.max_length is None else ""
    )


def _span(start: int, end: int | None) -> str:
    return f"{start:,}" if end is None else f"{start:,} to {end - 1:,}"


def point_by_length(profile: "Profile") -> Table:
    """Every operating point in every length bin: what the search expects there, and what held-out samples gave."""
    table = Table(
        title="by length",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )
    table.add_column("point", no_wrap=True)
    table.add_column("keys", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in ("density", "KL", "interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in profile.points:
        for index, length_bin in enumerate(profile.length_bins):
            expected, measured = _cells(point, length_bin)
            span = _span(length_bin.min_length, length_bin.max_length)
            table.add_row(Text(point.name if index == 0 else ""), span, "predicted", *expected)
            table.add_row("", "", *measured)
    return table


def _cells(point: "OperatingPoint", length_bin: "LengthBin") -> tuple[list[str], list[str]]:
    ends = (length_bin.min_length, length_bin.max_length)
    predicted = (point.predicted and point.predicted.by_length) or ()
    measured = (point.heldout and point.heldout.by_length) or ()
    expected = [
        [f"{part.density:.3f}", f"{part.kl:.3g}", ""]
        for part in predicted
        if (part.min_length, part.max_length) == ends
    ]
    found = [_measured(part) for part in measured if (part.min_length, part.max_length) == ends]
    return [*expected, ["-", "-", ""]][0], [*found, ["held-out", "-", "-", ""]][0]


def _measured(part: "LengthEvidence") -> list[str]:
    kl = None if part.intervals is None else part.intervals.kl
    interval = "-" if kl is None else f"{kl[0]:.3g} to {kl[1]:.3g}"
    return [f"held-out ({part.samples})", f"{part.density:.3f}", f"{part.kl:.3g}", interval]


def evaluation_by_length(evaluation: "Evaluation") -> Table:
    """Dense and every plan at each length, with the bin whose thresholds served it."""
    table = Table(title="by length", title_justify="left", caption_justify="left")
    table.add_column("tokens", no_wrap=True)
    table.add_column("attention")
    for column in ("density", "KL mean", "accuracy", "prefill s"):
        table.add_column(column, justify="right")
    for part in evaluation.by_length:
        rows, labels = _rows(part, evaluation), _labels(part)
        rows += [[""] * 5] * (len(labels) - len(rows))
        for index, row in enumerate(rows):
            label = labels[index] if index < len(labels) else ""
            table.add_row(label, *row, end_section=index == len(rows) - 1)
    table.caption = "bin: key lengths that the thresholds were made for; + longer than the last one (extrapolated)"
    return table


def _rows(part: "LengthResult", evaluation: "Evaluation") -> list[list[str]]:
    rows = [["dense", "100.0%", "0", _percent(part.dense.accuracy), f"{part.dense.seconds:.1f}"]]
    for plan in part.plans:
        figures = [f"{plan.density:.1%}", f"{plan.kl:.4f}", _percent(plan.accuracy), f"{plan.seconds:.1f}"]
        rows.append([plan.name, *figures])
        if plan.kl_interval is None:
            continue
        for end, label in enumerate(interval_labels(evaluation.confidence)):
            accuracy = "" if plan.accuracy_interval is None else _percent(plan.accuracy_interval[end])
            rows.append([label, "", f"{plan.kl_interval[end]:.4f}", accuracy, ""])
    return rows


def _labels(part: "LengthResult") -> list[str]:
    tokens = (
        f"{part.min_tokens:,}" if part.min_tokens == part.max_tokens else _span(part.min_tokens, part.max_tokens + 1)
    )
    labels = [tokens, f"{part.samples} sample{'s' if part.samples != 1 else ''}"]
    if part.length_bin is None:
        return [*labels, "no bin (dense)"]
    if part.length_bin == (0, None):  # single taus without a profile
        return labels
    return [*labels, f"bin {_span(*part.length_bin)}{' +' if part.extrapolated else ''}"]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def report_curves(sets: "Sequence[Curves]", out: Path, as_json: bool) -> None:
    """What ``xcalib collect`` measured; as JSON the figures of one length, or ``by_length`` with those of several."""
    from xcalib.collect import measured_length

    for curves in sets:
        at = f" at {measured_length(curves):,} tokens" if len(sets) > 1 else ""
        size = f"{len(curves.layers)} layers x {curves.error.shape[2]} heads, {len(curves.grid)} levels"
        console.print(f"wrote {out}: {size}{at}", markup=False, soft_wrap=True)
        if curves.settings.measures:
            console.print(f"measured as well: {', '.join(curves.settings.measures)}", markup=False, soft_wrap=True)
        for reason, layers in curves.dense_reasons.items():
            console.print(f"{layers} layers stay dense: {reason}", markup=False, soft_wrap=True)
    if as_json:
        figures = [_figures(curves) for curves in sets]
        several = {"by_length": [{"length": measured_length(c), **f} for c, f in zip(sets, figures, strict=True)]}
        print_json({"curves": str(out), **(several if len(sets) > 1 else figures[0])})


def _figures(curves: "Curves") -> dict[str, Any]:
    fisher, mass = curves.fisher_kl, curves.dropped_mass
    return {
        "grid": curves.grid.tolist(),
        "density": curves.density.mean(axis=(0, 1)).tolist(),
        "error": curves.relative_error.sum(axis=1).mean(axis=0).tolist(),
        "gain": curves.gain.tolist(),
        "calibration": curves.calibration,
        "dense_reasons": curves.dense_reasons,
        **({} if fisher is None else {"fisher": fisher.sum(axis=(0, 1)).tolist()}),
        **({} if mass is None else {"mass": mass.mean(axis=(0, 1)).tolist()}),
    }
