"""A profile in the terminal: what it is, what it costs, and its thresholds as a heatmap and a histogram."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from xcalib.cli import options as opt
from xcalib.cli.by_length import bin_name, point_by_length
from xcalib.cli.completion import complete_point, complete_profile
from xcalib.cli.output import interval_labels, print_json

if TYPE_CHECKING:
    from xcalib.profile import OperatingPoint, Profile

__all__ = ["render_profile", "show", "unverified_points"]

# Cividis, which reads the same with every kind of colour blindness, at tau = 0, .25, .5, .75 and 1.
_CIVIDIS = ((0, 34, 78), (67, 78, 108), (125, 124, 120), (188, 175, 111), (254, 232, 56))
_CELL = 3  # columns of one heatmap cell: two digits and a space
_HISTOGRAM_BINS = 10

_VERIFIED = {None: "", True: "; verified", False: "; NOT verified"}

Rows = Sequence[Sequence[float]]


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A profile.", autocompletion=complete_profile)],
    point: Annotated[
        str | None,
        typer.Option(help="Operating point of the heatmap; default the profile's.", autocompletion=complete_point),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Summary of a profile and a heatmap of its thresholds, layers x heads."""
    from xcalib.profile import load_profile

    profile = load_profile(file)
    if as_json:
        profile.point(point)
        print_json(json.loads(profile.model_dump_json()))
        return
    render_profile(profile, Console(highlight=False), point)


def render_profile(profile: "Profile", console: Console, point: str | None = None) -> None:
    """Print a summary of ``profile`` and the thresholds of one operating point (None: the default one).

    Raises ProfileError when there is no such point.
    """
    shown = profile.point(point)
    console.print(_summary(profile))
    console.print()
    console.print(_points_table(profile))
    for listed in profile.points:
        trials = [one.trials for one in listed.refined or () if one]
        refined = f", refined by {' + '.join(map(str, trials))} trials" if trials else ""
        tried = [one for length_bin in listed.rounds or () for one in length_bin]
        again = f", {sum(one.taken for one in tried)} of {len(tried)} rounds taken" if tried else ""
        searched = f"by {listed.method}, least {listed.objective}{again}{refined}"
        how = "imported" if listed.method == "imported" else searched
        console.print(Text(f"{listed.name}: {listed.target} {how}{_VERIFIED[listed.verified]}"))
    if len(profile.length_bins) > 1:
        console.print()
        console.print(point_by_length(profile))
    for length_bin, rows in zip(profile.length_bins, shown.thresholds, strict=True):
        console.print()
        console.print(Text(f"{shown.name}: thresholds for {bin_name(length_bin)}", style="bold"))
        _print_heatmap(console, rows)
        console.print()
        _print_histogram(console, rows, profile.dense_layers)


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


def unverified_points(profile: "Profile") -> str:
    """What ``validate`` adds for points that held-out data do not back: empty when there are none."""
    names = [f"{point.name} ({point.target})" for point in profile.points if point.verified is False]
    return f"; NOT verified: {', '.join(names)}" if names else ""


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _print_heatmap(console: Console, rows: Rows) -> None:
    heads = len(rows[0])
    label = max(len(str(len(rows) - 1)), 3) + 1
    group = -(-heads // max(1, (console.width - label) // _CELL))
    cells = -(-heads // group)
    note = f"; a cell is the mean of {group} neighbouring heads" if group > 1 else ""
    console.print(Text(f"rows: layers, columns: heads, cells: 100 x tau, ## is 1 (dense){note}", style="dim"))
    # Every fourth column is numbered, with room for the digits of four cells.
    header = "".join(f"{cell * group:<{4 * _CELL}}" for cell in range(0, cells, 4))
    lines = [Text(" " * label + header.rstrip())]
    for layer, row in enumerate(rows):
        line = Text(f"{layer:>{label - 1}} ")
        for start in range(0, heads, group):
            part = row[start : start + group]
            tau = sum(part) / len(part)
            line.append(_cell(tau), style=_style(tau))
        lines.append(line)
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop")


def _cell(tau: float) -> str:
    return "## " if tau == 1 else f"{min(round(100 * tau), 99):02d} "


def _style(tau: float) -> Style:
    position = tau * (len(_CIVIDIS) - 1)
    index = min(int(position), len(_CIVIDIS) - 2)
    low, high, part = _CIVIDIS[index], _CIVIDIS[index + 1], position - index
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    ink = "white" if tau < 0.5 else "black"
    return Style(color=ink, bgcolor=f"rgb({red},{green},{blue})")


def _print_histogram(console: Console, rows: Rows, dense_layers: Sequence[int]) -> None:
    dense = set(dense_layers)
    taus = [tau for layer, row in enumerate(rows) if layer not in dense for tau in row]
    left_out = f" (dense layers left out: {len(dense)})" if dense else ""
    console.print(Text(f"tau of {len(taus):,} heads{left_out}", style="bold"))
    # tau = 1 stands alone: those heads are exactly dense.
    counts = [0] * (_HISTOGRAM_BINS + 1)
    for tau in taus:
        counts[int(tau * _HISTOGRAM_BINS)] += 1
    digits = len(f"{max(counts):,}")
    room = max(1, min(60, console.width - digits - 14))
    bar = "#" if console.options.ascii_only else "█"
    for index, count in enumerate(counts):
        low = index / _HISTOGRAM_BINS
        span = "    1   " if index == _HISTOGRAM_BINS else f"{low:.1f}-{low + 1 / _HISTOGRAM_BINS:.1f} "
        length = -(-count * room // max(1, *counts))
        console.print(Text(f"  {span:>9} {count:>{digits},} {bar * length}"), no_wrap=True, overflow="crop")
