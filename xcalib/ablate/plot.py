"""A table as a picture; needs matplotlib (the extra ``bench``)."""

from io import BytesIO
from typing import TYPE_CHECKING, Any

from xcalib.ablate.paper import SELECTION_SHARES
from xcalib.ablate.report import TITLES
from xcalib.errors import AblationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_matplotlib", "draw"]

Record = dict[str, Any]

# Okabe and Ito, and a grey: told apart with every kind of colour blindness; a marker of its own for each as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FILLS = ("full", "none", "left", "bottom")  # of the markers, by density
DOTS_PER_INCH = 150


def check_matplotlib() -> None:
    """Raise AblationError where matplotlib is missing, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise AblationError("the pictures need matplotlib: pip install 'xcalib[bench]'") from error


def draw(result: Record) -> bytes:
    """A PNG of one table.

    Raises:
        AblationError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = result["table"] == "breakdown"
    figure = Figure(figsize=(13, 5.2) if timed else (16, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if timed else 3)
    if timed:
        _parts(axes[0], result)
        _shares(axes[1], result)
    else:
        styles = _styles(result)
        _curves(axes[0], result, styles)
        _ratios(axes[1], result, styles)
        _scores(axes[2], result, styles)
    device = result["machine"].get("gpu", {}).get("name", "CPU")
    figure.suptitle(f"{TITLES[result['table']]}: {result['model']['name']} on {device}")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def _styles(result: Record) -> dict[str, dict[str, Any]]:
    names = [variant["name"] for variant in result["variants"]]
    return {
        name: {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        for index, name in enumerate(names)
    }


def _curves(axes: "Axes", result: Record, styles: dict[str, dict[str, Any]]) -> None:
    """Ours: KL against density, each variant through its measured settings."""
    for variant in result["variants"]:
        points = [(one["density"], one["kl"]) for one in variant["settings"] if one["kl"] > 0]
        if points:
            axes.plot(*zip(*points, strict=True), label=variant["name"], linewidth=1.5, **styles[variant["name"]])
    for density in sorted({row["density"] for row in result["equal_density"]}):
        axes.axvline(density, color="grey", linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set(xlabel="density (blocks kept / visible blocks)", ylabel="KL from dense (nats per token)")
    axes.set_title("ours: measured settings; compared at the dotted lines", fontsize="medium")
    axes.legend(fontsize="small", loc="lower left")


def _ratios(axes: "Axes", result: Record, styles: dict[str, dict[str, Any]]) -> None:
    """Ours: KL over the baseline's at each density, with intervals; a fill for each density."""
    densities = sorted({row["density"] for row in result["equal_density"]})
    names = list(styles)
    for row in result["equal_density"]:
        if row["kl_ratio"] is None:
            continue
        which = densities.index(row["density"])
        place = names.index(row["variant"]) + 0.2 * (which - (len(densities) - 1) / 2)
        ratio, ends = row["kl_ratio"], row["kl_ratio_interval"]
        bars = None if ends is None else [[max(0.0, ratio - ends[0])], [max(0.0, ends[1] - ratio)]]
        axes.errorbar(
            [place], [ratio], yerr=bars, capsize=3, fillstyle=FILLS[which % len(FILLS)], **styles[row["variant"]]
        )
    for which, density in enumerate(densities):
        axes.plot([], [], "ko", fillstyle=FILLS[which % len(FILLS)], label=f"at density {density:g}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    for which_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which_ticks(lambda value, _position: f"{value:.3g}")
    axes.tick_params(axis="y", which="minor", labelsize="x-small")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(ylabel="KL / KL of the baseline, at equal density")
    axes.set_title("ours: below 1 is better; bars hold 95 %", fontsize="medium")
    axes.legend(fontsize="small")


def _scores(axes: "Axes", result: Record, styles: dict[str, dict[str, Any]]) -> None:
    """The paper's score against its density as stars, our accuracy at equal density as markers."""
    shown: set[str] = set()
    for variant in result["variants"]:
        figure = result["paper"]["figures"].get(variant["figure"])
        if figure is None or variant["figure"] in shown:
            continue
        shown.add(variant["figure"])
        colour = styles[variant["name"]]["color"]
        axes.plot(
            [figure["density"]],
            [figure["score"]],
            "*",
            markersize=14,
            color=colour,
            label=f"paper: {variant['figure']}",
        )
    asked = False
    for row in result["equal_density"]:
        if row["accuracy"] is not None:
            asked = True
            axes.plot(
                [row["density"]], [100 * row["accuracy"]], fillstyle="none", linestyle="", **styles[row["variant"]]
            )
    if result["dense_accuracy"] is not None:
        axes.axhline(100 * result["dense_accuracy"], color="grey", linestyle="--", linewidth=1, label="our dense model")
    title = "stars: the paper, Llama-3.1-8B on RULER" + ("\nhollow: our task accuracy, as at the left" if asked else "")
    axes.set(xlabel="density (blocks kept / visible blocks)", ylabel="score (%)")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small")


def _labels(result: Record) -> list[str]:
    return [f"{row['length']:,}\nS={row['stride']}" for row in result["times"]]


def _parts(axes: "Axes", result: Record) -> None:
    """Selection and attention stacked, over dense attention."""
    rows = result["times"]
    places = list(range(len(rows)))
    selection = [row["selection_over_dense"] for row in rows]
    attention = [row["attention_over_dense"] for row in rows]
    axes.bar(places, selection, 0.7, label="selection (scoring and selecting)", color=COLOURS[1], hatch="//")
    axes.bar(places, attention, 0.7, bottom=selection, label="sparse attention", color=COLOURS[0])
    axes.axhline(1.0, color="black", linewidth=0.8, label="dense attention")
    axes.set_xticks(places, _labels(result), fontsize="small")
    axes.set(xlabel="tokens and stride", ylabel="time / time of dense attention")
    warning = "" if result["comparable"] else " (CPU: says nothing about a GPU)"
    axes.set_title(f"all layers, tau {result['tau']:g}{warning}", fontsize="medium")
    axes.legend(fontsize="small")


def _shares(axes: "Axes", result: Record) -> None:
    """Selection over selection + attention, by stride; the paper's shares as lines."""
    strides = sorted({row["stride"] for row in result["times"]})
    for index, stride in enumerate(strides):
        points = [(row["length"], 100 * row["selection_share"]) for row in result["times"] if row["stride"] == stride]
        style: Record = {"color": COLOURS[index], "marker": MARKERS[index]}
        axes.plot(*zip(*points, strict=True), label=f"ours, S={stride}", **style)
        if stride in SELECTION_SHARES:
            axes.axhline(
                100 * SELECTION_SHARES[stride], color=COLOURS[index], linestyle="--", label=f"paper, S={stride}"
            )
    lengths = sorted({row["length"] for row in result["times"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens", ylabel="selection / (selection + attention), %")
    axes.set_title("share of selection", fontsize="medium")
    axes.legend(fontsize="small")
