"""What the measurements say together: ratios, the crossover, which goals are met."""

from collections.abc import Iterator
from typing import Any

from xcalib.bench.goals import judge

__all__ = ["summarise"]

Record = dict[str, Any]


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """Ratios of what was measured so far, and where sparse begins to win.

    Returns:
        ``dense`` (by length: the fastest peer and its milliseconds), ``ratios`` (one entry by length, stride and density or
        tau), ``sweep``, ``choose`` and ``served`` (by length), ``goals`` (those of the suite that can be judged), ``crossover``
        (by stride), ``minimum_length`` (the least of these, or None), ``statuses``.
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
        "choose": [_chosen(record, dense) for kind in ("choose", "public") for record in _ok(records, kind)],
        "served": [_served(record, dense) for record in _ok(records, "served")],
        "goals": judge(results["suite"].get("goals", ()), records),
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


def _chosen(record: Record, dense: dict[int, tuple[str, float]]) -> Record:
    names = ("length", "stride", "density", "precision", "peer", "found_density")
    facts = {name: record[name] for name in names if name in record}
    return facts | {"choose_ms": record["median_ms"], "over_dense": _over(record, dense)}


def _served(record: Record, dense: dict[int, tuple[str, float]]) -> Record:
    facts = {name: record[name] for name in ("length", "stride", "tau", "path")}
    return facts | {"served_ms": record["median_ms"], "over_dense": _over(record, dense)}


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
