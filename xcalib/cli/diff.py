"""``xcalib diff``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from xcalib.cli import options as opt
from xcalib.cli.completion import complete_point, complete_profile
from xcalib.cli.output import console, print_json

if TYPE_CHECKING:
    from xcalib.interop import PointDifference, ProfileDifference

__all__ = ["diff"]

# Differences that tell a reader little: hashes, and who made the file.
_IN_JSON = ("calibration.tokens_sha256", "calibration.documents", "calibration.gain_samples", "versions.")


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A profile, before.", autocompletion=complete_profile)],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="Another of the same model, after.", autocompletion=complete_profile)
    ],
    point: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:NAME]",
            help="One operating point, or that of A and that of B; default all in both.",
            autocompletion=complete_point,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Heads to list, those that moved most; --json has all.")] = 20,
    as_json: opt.Json = False,
) -> None:
    """Two profiles of one model: what they cost and lose, and which heads moved."""
    from xcalib.interop import compare_profiles
    from xcalib.profile import load_profile

    found = compare_profiles(load_profile(first), load_profile(second), point)
    _render(found, limit)
    if as_json:
        print_json({"a": str(first), "b": str(second), **_data(found)})


def _data(found: "ProfileDifference") -> dict[str, Any]:
    points = [
        {
            "a": part.names[0],
            "b": part.names[1],
            "measures": [{"measure": what, "a": a, "b": b} for what, a, b in part.measures],
            "heads": part.heads,
            "mean_change": part.mean_change,
            "moved": [asdict(head) for head in part.moved],
        }
        for part in found.points
    ]
    settings = [{"setting": key, "a": a, "b": b} for key, a, b in found.settings]
    return {"identical": found.identical, "settings": settings, "points": points}


def _render(found: "ProfileDifference", limit: int) -> None:
    if found.identical:
        console.print("identical: both have the same content")
        return
    shown = [setting for setting in found.settings if not setting[0].startswith(_IN_JSON)]
    if shown:
        _print("settings that differ", _settings_table(shown))
    hidden = [key for key, _, _ in found.settings if key.startswith(_IN_JSON)]
    if hidden:
        console.print(f"in --json too: {', '.join(hidden)}", markup=False)
        console.print()
    if any(key.startswith("method.") for key, _, _ in found.settings):
        console.print("note: thresholds of different methods are on different scales")
        console.print()
    _print("operating points (KL in nats per token; - not measured)", _points_table(found))
    for part in found.points:
        _print_moved(part, limit)


def _print(title: str, table: Table) -> None:
    console.print(Text(title, style="bold"))  # not as the table's title, which wraps at the table's width
    console.print(table)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def _settings_table(settings: list[tuple[str, Any, Any]]) -> Table:
    from xcalib._yaml import one_line

    table = _table()
    for column in ("setting", "A", "B"):
        table.add_column(column, overflow="fold")
    for key, *values in settings:
        table.add_row(Text(key), *(Text(one_line(_plain(value), 120)) for value in values))
    return table


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, dict) and "min_length" in value:
        return _keys(value["min_length"], value["max_length"])
    return "-" if value is None else str(value)


def _keys(min_length: int, max_length: int | None) -> str:
    return f"{min_length:,} " + ("and more" if max_length is None else f"to {max_length - 1:,}")


def _label(part: "PointDifference") -> str:
    return part.names[0] if part.names[0] == part.names[1] else f"{part.names[0]} to {part.names[1]}"


def _points_table(found: "ProfileDifference") -> Table:
    table = _table()
    table.add_column("point", overflow="fold")
    table.add_column("")
    for column in ("A", "B", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for part in found.points:
        known = [measure for measure in part.measures if measure[1:] != (None, None)]
        for index, (what, a, b) in enumerate(known or [("not measured", None, None)]):
            change = "-" if a is None or b is None else f"{b - a:+.4g}"
            cells = ["-" if value is None else f"{value:.4g}" for value in (a, b)]
            label = _label(part) if index == 0 else ""
            table.add_row(Text(label), what.replace("heldout", "held-out").replace("kl", "KL"), *cells, change)
    return table


def _print_moved(part: "PointDifference", limit: int) -> None:
    label = _label(part)
    if not part.moved:
        rest = "no head moved" if part.heads else "no key length that both serve"
        console.print(f"{label}: {rest}", markup=False)
        return
    table = _table()
    for column in ("layer", "head", "A", "B", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("keys", no_wrap=True)
    for head in part.moved[:limit]:
        moved = head.after - head.before
        change = f"{moved:+.4f}" if abs(moved) >= 5e-5 else f"{moved:+.0e}"
        keys = _keys(head.min_length, head.max_length)
        table.add_row(str(head.layer), str(head.head), f"{head.before:.4f}", f"{head.after:.4f}", change, keys)
    up = sum(head.after > head.before for head in part.moved)
    console.print(
        f"{label}: {len(part.moved):,} of {part.heads:,} heads moved: {up:,} up, {len(part.moved) - up:,} down, "
        f"mean change of all {part.mean_change:+.4f}",
        markup=False,
        soft_wrap=True,
    )
    if limit:
        more = f"the {limit} that moved most" if len(part.moved) > limit else "all of them"
        _print(f"{more}, largest change first", table)
