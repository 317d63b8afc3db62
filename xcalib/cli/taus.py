"""Thresholds in the terminal: a heatmap, a histogram, and a table by layer."""

from collections.abc import Sequence
from statistics import median

from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from xcalib._colours import cividis

__all__ = ["print_heatmap", "print_histogram", "print_layers"]

_CELL = 3  # columns of one heatmap cell: two digits and a space
_HISTOGRAM_BINS = 10

Rows = Sequence[Sequence[float]]  # [layer][query head]


def print_heatmap(console: Console, rows: Rows) -> None:
    """A cell for each head, or for some neighbours where they do not fit; a line is never broken."""
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
    red, green, blue = cividis(tau)
    ink = "white" if tau < 0.5 else "black"
    return Style(color=ink, bgcolor=f"rgb({red},{green},{blue})")


def print_histogram(console: Console, rows: Rows, dense_layers: Sequence[int]) -> None:
    """How many heads have which tau; layers that stay dense are left out."""
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


def print_layers(console: Console, rows: Rows, dense_layers: Sequence[int]) -> None:
    """A row for each layer: its taus, and how many heads keep only what is always kept, or everything."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in ("layer", "least tau", "median", "largest", "heads at 0", "heads dense"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    dense = set(dense_layers)
    for layer, row in enumerate(rows):
        taus = [_tau(value) for value in (min(row), median(row), max(row))]
        zero, ones = (str(sum(tau == end for tau in row) or "-") for end in (0, 1))
        table.add_row(str(layer), *taus, zero, ones, "dense layer" if layer in dense else "")
    console.print(table)


def _tau(value: float) -> str:
    """Three digits that are 1.000 and 0.000 for these alone."""
    if 0 < value < 0.0005:
        return f"{value:.0e}"
    return "1" if value == 1 else "0" if value == 0 else f"{min(value, 0.999):.3f}"
