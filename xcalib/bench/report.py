"""The results as tables, on a terminal or as Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["markdown", "render"]

Record = dict[str, Any]


@dataclass(frozen=True)
class _Sheet:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def render(results: dict[str, Any], console: Console) -> None:
    """Prints the tables, what was not measured and the crossover."""
    console.print(_heading(results), highlight=False)
    for sheet in _sheets(results):
        table = Table(*sheet.head, title=sheet.title)
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for line in _remarks(results):
        console.print(line, highlight=False, markup=False)


def markdown(results: dict[str, Any]) -> str:
    """The same as text for a page."""
    parts = [_heading(results), *(_markdown_table(sheet) for sheet in _sheets(results))]
    parts.append("\n".join(f"- {line}" for line in _remarks(results)))
    return "\n\n".join(parts) + "\n"


def _markdown_table(sheet: _Sheet) -> str:
    lines = [sheet.head, ["---"] * len(sheet.head), *sheet.rows]
    return f"## {sheet.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _heading(results: dict[str, Any]) -> str:
    machine, suite = results["machine"], results["suite"]
    device = machine.get("gpu", {}).get("name") or f"{machine['processor']} (CPU)"
    return (
        f"{suite['name']} on {device}: {suite['q_heads']} query / {suite['k_heads']} KV heads, head_dim "
        f"{suite['head_dim']}, {suite['dtype']}, batch {suite['batch']}, blocks of {suite['block_size']}; medians in ms"
    )


def _sheets(results: dict[str, Any]) -> Iterator[_Sheet]:
    """Those that have rows; the first two always."""
    summary = results["summary"]
    yield _dense(results)
    yield _ratios(summary)
    for sheet in (_chosen(summary), _served(summary), _sweep(summary, results["suite"]["levels"]), _goals(summary)):
        if sheet.rows:
            yield sheet


def _dense(results: dict[str, Any]) -> _Sheet:
    rows = []
    for record in results["measurements"]:
        if record["kind"] == "dense" and record["status"] == "ok":
            times = (_number(record[name]) for name in ("median_ms", "p20_ms", "p80_ms"))
            rows.append([f"{record['length']:,}", record["peer"], *times, str(record["runs"]), record["note"]])
    return _Sheet("Dense attention", ["length", "dense peer", "median", "p20", "p80", "runs", "note"], rows)


def _ratios(summary: dict[str, Any]) -> _Sheet:
    peers = sorted({name for row in summary["ratios"] for name in row["peers_ms"]})
    head = ["length", "S", "asked", "density", "scoring", "selection", "attention", "whole", "dense", "speed-up"]
    rows = []
    for row in summary["ratios"]:
        asked = f"tau {row['tau']:g}" if "tau" in row else f"{100 * row['density']:.3g}%"
        times = (_number(row[f"{name}_ms"]) for name in ("scoring", "selection", "attention", "whole", "dense"))
        ratios = (_number(row[name]) for name in ("speed_up", "attention_over_its_share_of_dense"))
        others = (_number(row["peers_ms"].get(name)) for name in peers)
        density = f"{row['found_density']:.1%}"
        rows.append([f"{row['length']:,}", str(row["stride"]), asked, density, *times, *ratios, *others])
    return _Sheet("xattention", [*head, "attention / (density x dense)", *peers], rows)


def _chosen(summary: dict[str, Any]) -> _Sheet:
    head = ["length", "S", "density", "whose", "scores", "density found", "ms", "over dense"]
    rows = [
        [
            *(f"{row['length']:,}", str(row["stride"]), f"{row['density']:.0%}"),
            *(row.get("peer", "ours"), row.get("precision", "-"), f"{row['found_density']:.1%}"),
            *(_number(row["choose_ms"]), _percent(row["over_dense"])),
        ]
        for row in summary.get("choose", ())
    ]
    return _Sheet("Scoring and selection in one call", head, rows)


def _served(summary: dict[str, Any]) -> _Sheet:
    rows = [
        [f"{row['length']:,}", row["path"], _number(row["served_ms"]), _number(row["over_dense"])]
        for row in summary.get("served", ())
    ]
    return _Sheet("What a served model runs", ["length", "path", "ms", "over dense"], rows)


def _sweep(summary: dict[str, Any], levels: int) -> _Sheet:
    rows = [[f"{row['length']:,}", _number(row["sweep_ms"]), _number(row["over_dense"])] for row in summary["sweep"]]
    return _Sheet(f"Sweep of {levels} levels, scoring included", ["length", "ms", "over dense"], rows)


def _goals(summary: dict[str, Any]) -> _Sheet:
    rows = [
        [row["what"], f"{row['length']:,}", row["goal"], f"{row['measured']:.3g}", "yes" if row["met"] else "no"]
        for row in summary.get("goals", ())
    ]
    return _Sheet("Goals", ["what", "length", "goal", "measured", "met"], rows)


def _remarks(results: dict[str, Any]) -> Iterator[str]:
    for name, reason in results["unavailable"].items():
        yield f"not on this machine: {name}: {reason}"
    for record in results["measurements"]:
        if record["status"] == "error":
            names = ("peer", "stride", "density", "tau", "precision")
            where = " ".join(f"{key}={record[key]}" for key in names if key in record)
            yield f"failed: {record['kind']} at {record['length']:,} {where}: {record['reason']}"
    skipped = results["summary"]["statuses"]["skipped"]
    if skipped:
        yield f"not measured: {skipped} of {len(results['measurements'])}, the budget of seconds was spent"
    asked, judged = len(results["suite"].get("goals", ())), results["summary"].get("goals", ())
    if asked:
        met = sum(row["met"] for row in judged)
        yield f"goals: {met} met, {len(judged) - met} not met, {asked - len(judged)} not measured"
    tau = results["suite"]["tau"]
    for stride, length in results["summary"]["crossover"].items():
        where = "at no measured length" if length is None else f"from {length:,} tokens on"
        yield f"S={stride}: xattention at tau {tau:g} is faster than dense {where}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
