"""``xcalib show``: a profile in the terminal, what it is, what it costs, and its thresholds."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xcalib._words import how_found
from xcalib.cli import options as opt
from xcalib.cli.by_length import bin_name, point_by_length
from xcalib.cli.completion import complete_point, complete_profile
from xcalib.cli.output import interval_labels, print_json, report_console
from xcalib.cli.taus import print_heatmap, print_histogram, print_layers

if TYPE_CHECKING:
    from xcalib.profile import LengthBin, OperatingPoint, Profile

__all__ = ["render_profile", "show", "unverified_points"]

_VERIFIED = {None: "", True: "; verified", False: "; NOT verified"}


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A profile.", autocompletion=complete_profile)],
    point: Annotated[
        str | None,
        typer.Option(help="Operating point of the heatmap; default the profile's.", autocompletion=complete_point),
    ] = None,
    by_layer: Annotated[
        bool,
        typer.Option("--by-layer", help="A row for each layer instead: least, median and largest tau, dense heads."),
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Summary of a profile, a heatmap of its thresholds, layers x heads, and their histogram."""
    from xcalib.profile import load_profile

    profile = load_profile(file)
    if as_json:
        profile.point(point)
        print_json(json.loads(profile.model_dump_json()))
        return
    render_profile(profile, report_console(), point, by_layer=by_layer)


def render_profile(profile: "Profile", console: Console, point: str | None = None, *, by_layer: bool = False) -> None:
    """Print a summary of ``profile`` and the thresholds of one operating point (None: the default one).

    They are drawn, or with ``by_layer`` listed in a table with a row for each layer.

    Raises ProfileError when there is no such point.
    """
    shown = profile.point(point)
    console.print(_summary(profile))
    console.print()
    console.print(_points_table(profile))
    for listed in profile.points:
        how = ", ".join(how_found(listed))
        console.print(Text(f"{listed.name}: {listed.target} {how}{_VERIFIED[listed.verified]}"))
    if len(profile.length_bins) > 1:
        console.print()
        console.print(point_by_length(profile))
    for length_bin, rows in zip(profile.length_bins, shown.thresholds, strict=True):
        console.print()
        console.print(Text(f"{shown.name}: thresholds for {bin_name(length_bin)}", style="bold"))
        if by_layer:
            print_layers(console, rows, profile.dense_layers)
            console.print(_density(shown, length_bin, several=len(profile.length_bins) > 1))
        else:
            print_heatmap(console, rows)
            console.print()
            print_histogram(console, rows, profile.dense_layers)


def _summary(profile: "Profile") -> Table:
    model, method, calibration = profile.model, profile.method, profile.calibration
    commit = f" @ {model.commit[:12]}" if model.commit else ""
    lengths = f"{calibration.min_length:,} to {calibration.max_length:,} tokens"
    if calibration.lengths is not None and len(calibration.lengths) > 1:
        lengths = f"{', '.join(f'{length:,}' for length in calibration.lengths)} tokens"
    dense = ", ".join(str(layer) for layer in profile.dense_layers) or "none"
    lines = {
        "model": f"{model.name}{commit}",
        "shape": f"{model.model_type}, {model.layers} layers, {model.query_heads} query / {model.kv_heads} KV heads, "
        f"head_dim {model.head_dim}",
        "method": f"{method.pattern}, stride {method.stride}, block {method.block_size}, order {method.order}",
        "lengths": _lengths(profile),
        "dense layers": dense,
        "calibration": f"{calibration.samples} samples of {lengths}, seed {calibration.seed}",
        "sources": ", ".join(calibration.sources) or "none",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(profile.versions.items())),
        "content": f"sha256 {profile.content_sha256[:16]}...",
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, line in lines.items():
        grid.add_row(Text(label), Text(line))  # Text: names from the file are never read as markup
    return grid


def _lengths(profile: "Profile") -> str:
    last = profile.length_bins[-1].max_length
    beyond = "" if last is None else f"; beyond {last - 1:,} as in the last, counted as extrapolated"
    return "; ".join(bin_name(length_bin) for length_bin in profile.length_bins) + beyond


def _points_table(profile: "Profile") -> Table:
    caption = "* default; - not measured; KL in nats per token; gap: at most this far from the best"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left", padding=(0, 1))
    table.add_column("point", overflow="fold")
    table.add_column("", no_wrap=True)
    for name in ("density", "KL", "KL p99", "acc.", "dense", "gap"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in profile.points:
        for row in _point_rows(point, is_default=point.name == profile.default_point):
            table.add_row(*(Text(cell) for cell in row))
    return table


def _point_rows(point: "OperatingPoint", *, is_default: bool) -> list[list[str]]:
    predicted, heldout = point.predicted, point.heldout
    name = f"{point.name}*" if is_default else point.name
    gap = "-" if point.bound is None or point.bound.gap is None else f"{point.bound.gap:.2%}"
    expected = ["-", "-", "", "-", "", gap]
    if predicted is not None:
        expected[:4] = [f"{predicted.density:.3f}", f"{predicted.kl:.4g}", "", _percent(predicted.accuracy)]
    measured = ["-"] * 5 + [""]
    if heldout is not None:
        p99 = "-" if heldout.kl_p99 is None else f"{heldout.kl_p99:.4g}"
        accuracies = [_percent(heldout.accuracy), _percent(heldout.accuracy_dense)]
        measured = [f"{heldout.density:.3f}", f"{heldout.kl:.4g}", p99, *accuracies, ""]
    rows = [[name, "predicted", *expected], ["", "held-out", *measured]]
    if heldout is not None and heldout.intervals is not None:
        intervals = heldout.intervals
        for end, label in enumerate(interval_labels(intervals.confidence)):
            accuracy = "" if intervals.accuracy is None else _percent(intervals.accuracy[end])
            rows.append(["", label.strip(), "", f"{intervals.kl[end]:.4g}", "", accuracy, "", ""])
    return rows


def _density(point: "OperatingPoint", length_bin: "LengthBin", *, several: bool) -> Text:
    """What is known of the density of one length bin; no profile holds it by layer."""
    known = {"predicted": point.predicted, "held-out": point.heldout}
    figures: dict[str, float] = {}
    for name, figure in known.items():
        parts = [figure] if figure is not None and not several else (figure and figure.by_length) or ()
        ends = (length_bin.min_length, length_bin.max_length)
        for part in parts:
            if not several or (part.min_length, part.max_length) == ends:  # type: ignore[union-attr]
                figures[name] = part.density
    text = ", ".join(f"{name} {density:.3f}" for name, density in figures.items())
    return Text(f"density of all layers together: {text or 'not known'}")


def unverified_points(profile: "Profile") -> str:
    """What ``validate`` adds for points that held-out data do not back: empty when there are none."""
    names = [f"{point.name} ({point.target})" for point in profile.points if point.verified is False]
    return f"; NOT verified: {', '.join(names)}" if names else ""


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
