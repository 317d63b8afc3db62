"""Draws the pictures of docs/how-it-works.md from a real run: the kernels, SmolLM2-135M, its curves and its profile.

    xcalib demo --out DEMO/profile.yaml
    python docs/pictures.py DEMO              # writes docs/images/*.svg; --png writes PNG, --only NAME draws one

Needs the extras `demo` and `bench`. Two minutes on a CPU.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap, LogNorm

from xcalib.collect import Curves, load_curves
from xcalib.data import load_samples
from xcalib.kernels import block_density, estimate_blocks, select_blocks
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.loading import load_model
from xcalib.profile import load_profile
from xcalib.search.plan import Tables, plan_point
from xcalib.search.targets import Target

HERE = Path(__file__).resolve().parent
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#9AA3AB"
HIDDEN, DROPPED = "#FFFFFF", "#E4E8EB"
STRIDE, BLOCK = 8, 64  # of the first picture
HEADS = ((12, 4), (8, 2))  # of the second: layer, head


def probe(pattern: Any) -> np.ndarray:
    """Which products of a query block and an earlier key block the kernel looks at: bool ``(64 queries, 64 keys)``.

    For every pair a query and a key are made that are zero but for one component of one token each; the pair counts if the
    block's score moves.
    """
    rows = []
    for row in range(BLOCK):
        query = torch.zeros(BLOCK, 1, BLOCK, 32)
        key = torch.zeros(BLOCK, 1, 2 * BLOCK, 32)
        query[:, 0, row, 0] = 50.0
        key[torch.arange(BLOCK), 0, torch.arange(BLOCK), 0] = (
            50.0  # one key of the block before, another in each of the batch
        )
        scores = estimate_blocks(query, key, stride=STRIDE, block_size=BLOCK, pattern=pattern)
        nothing = estimate_blocks(query * 0, key * 0, stride=STRIDE, block_size=BLOCK, pattern=pattern)
        rows.append(((scores - nothing)[:, 0, 0, 0].abs() > 1e-4).numpy())
    return np.stack(rows)


def draw_patterns(demo: Path) -> Any:
    """Which products of a block are looked at."""
    del demo
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 5.6), layout="constrained")
    texts = {
        "antidiagonal": "antidiagonal (the paper's)\nof each 8 x 8 group one sum of eight products",
        "rows": "rows (xcalib's default)\none query in eight meets every key, exactly",
    }
    for axis, (pattern, title) in zip(axes, texts.items(), strict=True):
        seen = probe(pattern)
        axis.imshow(seen, cmap=ListedColormap([DROPPED, BLUE]), interpolation="nearest")
        for edge in range(STRIDE, BLOCK, STRIDE):
            axis.axhline(edge - 0.5, color="white", linewidth=1.2)
            axis.axvline(edge - 0.5, color="white", linewidth=1.2)
        axis.set_title(title, fontsize=10.5)
        axis.set_xlabel(f"64 keys\n{int(seen.sum())} of {seen.size:,} products computed")
        axis.set_ylabel("64 queries")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    figure.suptitle("What the score of one block of 64 queries and 64 keys is made of, S = 8", fontsize=12)
    return figure


def heads(wanted: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys of heads of the demo's model on 2,048 tokens of held-out text, ``(1, 1, tokens, head_dim)`` each."""
    loaded = load_model("demo")
    data = load_samples(["builtin:prose"], loaded.tokenizer, num_samples=1, max_length=2048, split="heldout")
    found: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def look(call: AttentionCall) -> None:
        share = call.query.shape[1] // call.key.shape[1]
        for layer, head in wanted:
            if layer == call.layer:
                found[layer, head] = call.query[:, [head]], call.key[:, [head // share]]

    with torch.no_grad(), patch_attention(loaded.model, look):
        loaded.model(torch.tensor(data.samples[0].tokens)[None])
    return found


def kept(scores: torch.Tensor, tau: float, tokens: int) -> np.ndarray:
    """What one threshold keeps, as classes: 0 hidden, 1 dropped, 2 always kept, 3 the block before, 4 kept by its score."""

    def chosen(threshold: float) -> np.ndarray:
        mask = select_blocks(scores, threshold, q_len=tokens, k_len=tokens, block_size=BLOCK, order="recent")
        return mask[0, 0].numpy()

    classes = chosen(1.0).astype(int)
    classes[chosen(tau)] = 4
    classes[chosen(1e-9)] = 3  # every tau above 0 keeps the block before
    classes[chosen(0.0)] = 2
    return classes


def draw_blocks(demo: Path) -> Any:
    """Scores of two real heads, and what three thresholds keep of them."""
    del demo
    figure, rows = plt.subplots(len(HEADS), 4, figsize=(11, 6.4), layout="constrained")
    colours = ListedColormap([HIDDEN, DROPPED, BLUE, GREEN, ORANGE])
    for axes, ((layer, head), (query, key)) in zip(rows, heads(HEADS).items(), strict=True):
        tokens = query.shape[2]
        scores = estimate_blocks(query, key, stride=16, block_size=BLOCK, pattern="rows")
        values = scores[0, 0].numpy()
        image = axes[0].imshow(np.where(values > 0, values, np.nan), norm=LogNorm(1e-4, 1), cmap="cividis")
        axes[0].set_title("scores", fontsize=10.5)
        axes[0].set_ylabel(f"layer {layer}, head {head}\nquery blocks")
        for axis, tau in zip(axes[1:], (0.5, 0.8, 0.95), strict=True):
            mask = select_blocks(scores, tau, q_len=tokens, k_len=tokens, block_size=BLOCK, order="recent")
            density = float(block_density(mask, q_len=tokens, k_len=tokens, block_size=BLOCK))
            axis.imshow(kept(scores, tau, tokens), cmap=colours, vmin=0, vmax=4, interpolation="nearest")
            axis.set_title(f"tau = {tau}: {density:.0%} of the blocks", fontsize=10.5)
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_color(GREY)
    for axis in rows[-1]:
        axis.set_xlabel("key blocks")
    figure.colorbar(image, ax=rows, location="right", shrink=0.6, aspect=30, label="share of the row's attention")
    names = ("dropped", "always kept: sink and own", "the block before", "kept by score")
    marks = [plt.Rectangle((0, 0), 1, 1, color=colours(code)) for code in range(1, 5)]
    figure.legend(marks, names, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Two heads of SmolLM2-135M, {tokens:,} tokens of prose in blocks of {BLOCK}", fontsize=12)
    return figure


def picked(curves: Curves) -> list[tuple[int, int]]:
    """Five heads across the range of densities at tau = 0.9, (layer, head)."""
    level = int(np.abs(curves.grid - 0.9).argmin())
    order = np.argsort(curves.density[:, :, level], axis=None)
    places = (np.array([0.02, 0.25, 0.5, 0.75, 0.98]) * (len(order) - 1)).astype(int)
    return [
        (int(layer), int(which))
        for layer, which in zip(*np.unravel_index(order[places], curves.density.shape[:2]), strict=True)
    ]


def draw_curves(demo: Path) -> Any:
    """Density and error of every head against tau."""
    curves = load_curves(demo / "seed-0" / "curves")
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.3), layout="constrained")
    grid = curves.grid
    error = np.maximum(curves.gain[:, None, None] * curves.relative_error, 1e-9)
    for table, axis in zip((curves.density, error), axes, strict=True):
        # tau = 0 is a point apart: every tau above it keeps the block before as well
        axis.plot(
            grid[1:],
            table[:, :, 1:].reshape(-1, len(grid) - 1).T,
            color=GREY,
            linewidth=0.5,
            alpha=0.25,
            rasterized=True,
        )
        for (layer, which), colour in zip(picked(curves), (BLUE, GREEN, ORANGE, RED, "black"), strict=True):
            axis.plot(
                grid[1:], table[layer, which, 1:], color=colour, linewidth=2, label=f"layer {layer}, head {which}"
            )
            axis.plot(0, table[layer, which, 0], "o", color=colour, markersize=5, clip_on=False)
        axis.axvline(0.9, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel("tau")
        axis.set_xlim(-0.01, 1)
        axis.spines[["top", "right"]].set_visible(False)
    level = int(np.abs(grid - 0.9).argmin())
    low, high = curves.density[:, :, level].min(), curves.density[:, :, level].max()
    axes[0].set_title(f"blocks that a head keeps\nat tau = 0.9: {low:.0%} to {high:.0%}", fontsize=10.5)
    axes[0].set_ylabel("density")
    axes[0].set_ylim(0, 1)
    some = np.sort(error[:, :, level], axis=None)
    low, high = some[len(some) // 20], some[-len(some) // 20]
    ratio = high / low
    axes[1].set_title(
        f"what that costs the model\nat tau = 0.9 nine heads in ten lie within a factor of {ratio:,.0f}", fontsize=10.5
    )
    axes[1].set_ylabel("KL of that head alone, nats per token")
    axes[1].set_yscale("log")
    axes[1].set_ylim(1e-7, 1e-1)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"All {curves.density[:, :, 0].size} heads of SmolLM2-135M, measured by the demo", fontsize=12)
    return figure


def draw_front(demo: Path) -> Any:
    """KL against density: one tau for all heads, and one for each."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.4), layout="constrained", sharey=False)
    _predicted(axes[0], load_curves(demo / "seed-0" / "curves"), demo / "profile.yaml")
    _measured(axes[1])
    for axis in axes:
        axis.set_yscale("log")
        axis.set_xlabel("density: share of the blocks kept")
        axis.set_ylabel("KL from the dense model, nats per token")
        axis.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
    return figure


def _predicted(axis: Any, curves: Curves, file: Path) -> None:
    tables = Tables.of(curves)
    single = [tables.predicted_kl(np.full(tables.shape, tau)) for tau in curves.grid]
    shown = [(float(tables.cost[:, level].sum()), kl) for level, kl in enumerate(single) if kl > 0]
    wanted = [Target("a", "density", float(density)) for density in np.linspace(0.2, 0.75, 23)]
    front = [plan_point(tables, target) for target in wanted]
    axis.plot(*zip(*shown, strict=True), color=GREY, marker="o", markersize=3, label="one tau for all heads, predicted")
    axis.plot([p.density for p in front], [p.kl for p in front], color=BLUE, label="one tau a head, predicted")
    for point in load_profile(file).points:
        if point.heldout is not None:
            label = "the profile's points, held out" if point.name == "balanced" else None
            axis.plot(point.heldout.density, point.heldout.kl, "D", color=RED, markersize=7, label=label, zorder=3)
            axis.annotate(
                point.name, (point.heldout.density, point.heldout.kl), (-9, -13), textcoords="offset points", ha="right"
            )
    axis.set_xlim(0.14, 0.76)
    axis.set_ylim(2e-4, 1)
    axis.set_title("the demo: what the search finds on its curves,\nand what held-out text says", fontsize=10.5)


def _measured(axis: Any) -> None:
    for seed, marker in zip(range(3), "o^s", strict=True):
        record = json.loads((HERE / f"benchmarks/objectives/h200-rows-smollm2-seed{seed}.json").read_text("utf-8"))
        plans = {plan["name"]: (plan["density"], plan["kl"]) for plan in record["evaluation"]["plans"]}
        taus = sorted(found for name, found in plans.items() if name.startswith("score, tau="))
        first = seed == 0
        axis.plot(
            *zip(*taus, strict=True), color=GREY, marker=marker, markersize=3.5, linewidth=1,
            label="one tau for all heads, the paper's rule" if first else None,
        )  # fmt: skip
        axis.plot(*plans["rows, tempered, rounds"], "D", color=RED, label="profile" if first else None, zorder=3)
    density, kl = plans["rows, tempered, rounds"]
    x, y = np.array(taus).T
    same = float(np.exp(np.interp(density, x, np.log(y))))
    more = float(np.interp(-np.log(kl), -np.log(y), x))
    arrow = {"arrowstyle": "<-", "color": "black", "shrinkA": 3, "shrinkB": 3}
    axis.annotate("", (density, same), (density, kl), arrowprops=arrow)
    axis.annotate("", (more, kl), (density, kl), arrowprops=arrow)
    axis.annotate(f"{kl / same:.2f} of the KL", (density, (kl * same) ** 0.5), (-88, -4), textcoords="offset points")
    axis.annotate(
        f"{density / more:.2f} of the blocks", ((density + more) / 2, kl), (-52, -16), textcoords="offset points"
    )
    axis.set_title(
        "measured on held-out text: 2,048 tokens, three seeds\n(the figures at the arrows are seed 2's)", fontsize=10.5
    )


def draw_thresholds(demo: Path) -> Any:
    """The thresholds of the balanced point."""
    point = load_profile(demo / "profile.yaml").point("balanced")
    taus = np.array(point.thresholds[0])
    figure, axis = plt.subplots(figsize=(9.6, 3.5), layout="constrained")
    image = axis.imshow(taus.T, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for layer, which in np.argwhere(taus == 0):
        axis.text(layer, which, "0", ha="center", va="center", color="white", fontsize=7)
    axis.set_xlabel("layer")
    axis.set_ylabel("query head")
    axis.set_xticks(range(0, len(taus), 3))
    axis.set_yticks(range(taus.shape[1]))
    axis.spines[:].set_visible(False)
    figure.colorbar(image, label="tau", pad=0.01)
    span = f"{taus.size} thresholds from {taus.min():.2f} to {taus.max():.2f}, median {np.median(taus):.2f}"
    axis.set_title(f"The demo's profile, point balanced: {span} (0: sink and own blocks only)", fontsize=11)
    return figure


PICTURES: dict[str, Callable[[Path], Any]] = {
    "patterns": draw_patterns,
    "blocks": draw_blocks,
    "curves": draw_curves,
    "front": draw_front,
    "thresholds": draw_thresholds,
}


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of the profile that `xcalib demo` wrote, seed-0/ beside it")
    parser.add_argument("--only", choices=PICTURES)
    parser.add_argument("--png", action="store_true", help="PNG in place of SVG")
    parser.add_argument("--out", type=Path, default=HERE / "images")
    arguments = parser.parse_args()
    # Letters as outlines, so that pictures look alike everywhere; no date and fixed ids: the same data give the same file.
    mpl.rcParams.update({"svg.hashsalt": "xcalib", "font.size": 10, "figure.facecolor": "white"})
    for name in [arguments.only] if arguments.only else list(PICTURES):
        figure = PICTURES[name](arguments.demo)
        file = arguments.out / f"{name}.{'png' if arguments.png else 'svg'}"
        if arguments.png:
            figure.savefig(file, dpi=130)
        else:  # dpi: of the crowds of lines, which are pixels
            figure.savefig(file, dpi=66, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(figure)
        print(f"{file} {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
