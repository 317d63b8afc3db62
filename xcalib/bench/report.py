"""What the measurements say together: ratios, the crossover, tables."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["render", "summarise"]

Record = dict[str, Any]


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """Ratios of what was measured so far, and where sparse begins to win.

    Returns:
        ``dense`` (by length: the fastest peer and its milliseconds), ``ratios`` (one entry by length, stride and density or
        tau), ``sweep`` (by length), ``crossover`` (by stride), ``minimum_length`` (the least of these, or None), ``statuses``.
    """
    records = results["measurements"]
    dense = _fastest_dense(records)
    ratios = [_ratios(record, records, dense) for record in _ok(records, "whole")]
    crossover = {str(stride): _crossover(records, dense, stride) for stride in results["suite"]["strides"]}
    found = [length for length in crossover.values() if length is not None]
    statuses = [record["status"] for record in records]
    sweeps = [
        {"length": record["length"], "sweep_ms": record["median_ms"], "over_dense": _over(record, dense)}
        for record in _ok(records, "sweep")
    ]
    return {
        "dense": {str(length): {"peer": peer, "median_ms": time} for length, (peer, time) in dense.items()},
        "ratios": ratios,
        "sweep": sweeps,
        "crossover": crossover,
        "minimum_length": min(found, default=None),
        "statuses": {status: statuses.count(status) for status in ("ok", "error", "skipped")},
    }


def _ok(records: list[Record], kind: str) -> Iterator[Record]:
    return (record for record in records if record["kind"] == kind and record["status"] == "ok")


def _fastest_dense(records: list[Record]) -> dict[int, tuple[str, float]]:
    fastest: dict[int, tuple[str, float]] = {}
    for record in _ok(records, "dense"):
        length, time = record["length"], record["median_ms"]
        if length not in fastest or time < fastest[length][1]:
            fastest[length] = (record["peer"], time)
    return fastest


def _over(record: Record, dense: dict[int, tuple[str, float]]) -> float | None:
    return record["median_ms"] / dense[record["length"]][1] if record["length"] in dense else None


def _ratios(whole: Record, records: list[Record], dense: dict[int, tuple[str, float]]) -> Record:
    """One whole run with its parts; a ratio whose numbers were not all measured is None."""

    def median(kind: str, peer: str | None = None) -> float | None:
        names = ("length", "stride") if kind == "scoring" else ("length", "stride", "density", "tau")
        for record in _ok(records, kind):
            if record.get("peer") == peer and all(record.get(name) == whole.get(name) for name in names):
                return float(record["median_ms"])
        return None

    scoring, selection, attention = (median(kind) for kind in ("scoring", "selection", "attention"))
    overhead = None if scoring is None or selection is None else scoring + selection
    bar = dense[whole["length"]][1] if whole["length"] in dense else None
    peers = {record["peer"]: median("sparse", record["peer"]) for record in _ok(records, "sparse")}
    return {name: whole[name] for name in ("length", "stride", "density", "tau", "found_density") if name in whole} | {
        "whole_ms": whole["median_ms"],
        "scoring_ms": scoring,
        "selection_ms": selection,
        "attention_ms": attention,
        "dense_ms": bar,
        "speed_up": _divide(bar, whole["median_ms"]),
        "attention_over_its_share_of_dense": _divide(attention, bar and bar * whole["found_density"]),
        "selection_over_dense": _divide(overhead, bar),
        "peers_ms": {name: time for name, time in peers.items() if time is not None},
    }


def _divide(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def _crossover(records: list[Record], dense: dict[int, tuple[str, float]], stride: int) -> int | None:
    """The least measured length from which all of xattention beats dense at every measured length."""
    wins = {
        record["length"]: record["median_ms"] < dense[record["length"]][1]
        for record in _ok(records, "whole")
        if record["stride"] == stride and "tau" in record and record["length"] in dense
    }
    least = None
    for length in sorted(wins, reverse=True):
        if not wins[length]:
            break
        least = length
    return least


def render(results: dict[str, Any], console: Console) -> None:
    """Tables of the results: dense peers, xattention and its parts, what was not measured, the crossover."""
    machine, suite, summary = results["machine"], results["suite"], results["summary"]
    device = machine.get("gpu", {}).get("name") or f"{machine['processor']} (CPU)"
    console.print(
        f"{suite['name']} on {device}: {suite['q_heads']} query / {suite['k_heads']} KV heads, head_dim "
        f"{suite['head_dim']}, {suite['dtype']}, batch {suite['batch']}, blocks of {suite['block_size']}; medians in ms",
        highlight=False,
    )
    console.print(_dense_table(results))
    console.print(_ratio_table(summary))
    if summary["sweep"]:
        console.print(_sweep_table(summary, suite["levels"]))
    for line in _remarks(results):
        console.print(line, highlight=False, markup=False)


def _dense_table(results: dict[str, Any]) -> Table:
    table = Table("length", "dense peer", "median", "p20", "p80", "runs", "note", title="Dense attention")
    for record in _ok(results["measurements"], "dense"):
        times = (_number(record[name]) for name in ("median_ms", "p20_ms", "p80_ms"))
        table.add_row(f"{record['length']:,}", record["peer"], *times, str(record["runs"]), record["note"])
    return table


def _ratio_table(summary: dict[str, Any]) -> Table:
    peers = sorted({name for row in summary["ratios"] for name in row["peers_ms"]})
    head = ["length", "S", "asked", "density", "scoring", "selection", "attention", "whole", "dense", "speed-up"]
    table = Table(*head, "attention / (density x dense)", *peers, title="xattention")
    for row in summary["ratios"]:
        asked = f"tau {row['tau']:g}" if "tau" in row else f"{row['density']:.0%}"
        times = (_number(row[f"{name}_ms"]) for name in ("scoring", "selection", "attention", "whole", "dense"))
        ratios = (_number(row[name]) for name in ("speed_up", "attention_over_its_share_of_dense"))
        others = (_number(row["peers_ms"].get(name)) for name in peers)
        density = f"{row['found_density']:.1%}"
        table.add_row(f"{row['length']:,}", str(row["stride"]), asked, density, *times, *ratios, *others)
    return table


def _sweep_table(summary: dict[str, Any], levels: int) -> Table:
    table = Table("length", "ms", "over dense", title=f"Sweep of {levels} levels, scoring included")
    for row in summary["sweep"]:
        table.add_row(f"{row['length']:,}", _number(row["sweep_ms"]), _number(row["over_dense"]))
    return table


def _remarks(results: dict[str, Any]) -> Iterator[str]:
    for name, reason in results["unavailable"].items():
        yield f"not on this machine: {name}: {reason}"
    for record in results["measurements"]:
        if record["status"] == "error":
            where = " ".join(f"{key}={record[key]}" for key in ("peer", "stride", "density", "tau") if key in record)
            yield f"failed: {record['kind']} at {record['length']:,} {where}: {record['reason']}"
    skipped = results["summary"]["statuses"]["skipped"]
    if skipped:
        yield f"not measured: {skipped} of {len(results['measurements'])}, the budget of seconds was spent"
    tau = results["suite"]["tau"]
    for stride, length in results["summary"]["crossover"].items():
        where = "at no measured length" if length is None else f"from {length:,} tokens on"
        yield f"S={stride}: xattention at tau {tau:g} is faster than dense {where}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
