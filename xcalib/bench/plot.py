"""The results as a picture; needs matplotlib (the extra ``bench``)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xcalib.errors import BenchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

PARTS = ("scoring", "selection", "attention")
WIDTH = 0.8


def draw(results: dict[str, Any], out: Path) -> None:
    """Two panels: speed-up over dense by length, and the parts of each run as shares of dense.

    Args:
        results: of :func:`xcalib.bench.run_bench`.
        out: the PNG to write.

    Raises:
        BenchError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError("drawing needs matplotlib: pip install 'xcalib[bench]'") from error
    ratios = [row for row in results["summary"]["ratios"] if row["speed_up"] is not None]
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _speed_ups(left, ratios)
    _breakdown(right, [row for row in ratios if all(row[f"{part}_ms"] is not None for part in PARTS)])
    suite, gpu = results["suite"], results["machine"].get("gpu", {}).get("name", "CPU")
    figure.suptitle(
        f"xattention on {gpu}: {suite['q_heads']}/{suite['k_heads']} heads of {suite['head_dim']}, {suite['dtype']}"
    )
    figure.savefig(out, dpi=150)


def _speed_ups(axes: "Axes", ratios: list[dict[str, Any]]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in ratios:
        lines.setdefault(f"S={row['stride']}, {_asked(row)}", []).append((row["length"], row["speed_up"]))
    for label, points in lines.items():
        axes.plot(
            *zip(*sorted(points), strict=True), marker="o", label=label, linestyle="--" if "tau" in label else "-"
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens", ylabel="speed-up over the fastest dense attention")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}x")
    lengths = sorted({row["length"] for row in ratios})
    axes.set_xticks(lengths, [_tokens(length) for length in lengths], rotation=45)
    axes.minorticks_off()
    if lines:
        axes.legend(fontsize="small")


def _breakdown(axes: "Axes", ratios: list[dict[str, Any]]) -> None:
    """One bar for each run: scoring, selection and attention over dense, the whole as a mark."""
    base = [0.0] * len(ratios)
    for part in PARTS:
        shares = [row[f"{part}_ms"] / row["dense_ms"] for row in ratios]
        axes.bar(range(len(ratios)), shares, WIDTH, bottom=base, label=part)
        base = [low + share for low, share in zip(base, shares, strict=True)]
    axes.plot([row["whole_ms"] / row["dense_ms"] for row in ratios], "k_", label="whole, as one call")
    axes.axhline(1.0, color="black", linewidth=0.8)
    labels = [f"{_tokens(row['length'])} S={row['stride']} {_asked(row)}" for row in ratios]
    axes.set_xticks(range(len(ratios)), labels, rotation=90, fontsize="x-small")
    axes.set(ylabel="time over dense attention")
    if ratios:
        axes.legend(fontsize="small")


def _asked(row: dict[str, Any]) -> str:
    return f"tau {row['tau']:g}" if "tau" in row else f"{100 * row['density']:.3g}%"


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
