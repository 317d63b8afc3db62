"""``xcalib inspect``: a model's layers, and which of them can attend sparsely."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xcalib.cli import options as opt
from xcalib.cli.completion import complete_config
from xcalib.cli.output import print_json, quiet_libraries, report_console, short_count, status

if TYPE_CHECKING:
    from xcalib.models.inspection import Inspection, LayerFacts

__all__ = ["how_many", "inspect", "inspected", "print_layers", "record"]

LENGTHS = (4096, 32_768, 131_072)  # tokens at which blocks are counted
STRIDE, BLOCK_SIZE = 16, 128  # what `xcalib search` takes unless told otherwise


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=opt.MODEL_HELP + " Or a config.json alone; no weights are loaded.",
            autocompletion=complete_config,
        ),
    ],
    as_json: opt.Json = False,
) -> None:
    """The layers of MODEL: kind, heads, and whether prefill can be sparse there or why not; from its configuration alone."""
    found = inspected(model)
    if as_json:
        print_json(record(found))
        return
    console = report_console()
    print_layers(console, found)
    for line in _plans(found):
        console.print(line, markup=False, soft_wrap=True)


def inspected(model: str) -> "Inspection":
    """Inspect MODEL, saying so while it lasts; ModelError where it has no configuration."""
    quiet_libraries()
    from xcalib.models.empty import read_config
    from xcalib.models.inspection import inspect_config

    with status(f"Reading the configuration of {model}"):
        return inspect_config(read_config(model), model)


def record(found: "Inspection") -> dict[str, Any]:
    """The inspection, ready for JSON, with the numbers that a search would measure and the blocks at some lengths."""
    return {
        **asdict(found),
        "sparse_layers": list(found.sparse_layers),
        "unknown_layers": list(found.unknown_layers),
        "measured": {"heads": _heads(found), "levels": _levels(), "stride": STRIDE, "block_size": BLOCK_SIZE},
        "blocks": {str(length): _blocks(length) for length in _lengths(found)},
    }


def print_layers(console: Console, found: "Inspection") -> None:
    """Print what the model is, its layers (equal ones in one row) and the verdict on it."""
    console.print(_heading(found), markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("layers", overflow="fold", max_width=17)
    table.add_column("attention")
    for name in ("heads", "KV", "group", "dim"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("prefill", overflow="fold")
    for facts, indices in _folded(found.layers):
        same = found.problem is not None and facts.reason == found.problem
        verdict = "sparse" if facts.reason is None else "dense" if same else f"dense: {facts.reason}"
        verdict = verdict if facts.known else "not known"
        table.add_row(spans(indices), Text(_kind(facts)), *_numbers(facts), Text(verdict))
    console.print(table)
    if found.problem is not None:
        console.print(f"not supported: {found.problem}", markup=False, soft_wrap=True)
    else:
        verdict = "supported" if found.sparse_layers else "not known"
        console.print(f"{verdict}: {how_many(found)} layers can attend sparsely", markup=False)
    unseen = sum(layer.query_heads > 0 for layer in found.layers) - found.seen
    if found.problem is None and unseen > 0:
        console.print(
            f"note: {unseen} layers are judged by their attributes: the pass without weights did not come to their attention",
            markup=False,
            soft_wrap=True,
        )
    if found.note:
        console.print(f"note: {found.note}", markup=False, soft_wrap=True)


def how_many(found: "Inspection") -> str:
    """``12 of 26``, or ``at most 12 of 26`` where some layers are not known."""
    sparse, unknown = len(found.sparse_layers), len(found.unknown_layers)
    return f"{'at most ' if unknown else ''}{sparse + unknown} of {len(found.layers)}"


def _heading(found: "Inspection") -> str:
    positions = "no limit of positions" if found.max_positions is None else f"{found.max_positions:,} positions"
    how = f", attention {found.implementation}" if found.implementation else ""
    return (
        f"{found.name}: {found.model} ({found.model_type}), {short_count(found.parameters)} parameters, "
        f"{found.dtype or 'dtype not named'}, {positions}{how}"
    )


def _folded(layers: "Sequence[LayerFacts]") -> "list[tuple[LayerFacts, list[int]]]":
    """Different layers in order of their first, each with the indices of all that are equal to it."""
    rows: dict[LayerFacts, list[int]] = {}
    for index, facts in enumerate(layers):
        rows.setdefault(facts, []).append(index)
    return list(rows.items())


def spans(indices: Sequence[int]) -> str:
    """``0-4, 6, 8-9`` for ascending numbers."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _kind(facts: "LayerFacts") -> str:
    return facts.kind if facts.window is None else f"{facts.kind} ({facts.window:,})"


def _numbers(facts: "LayerFacts") -> list[str]:
    if not facts.query_heads:
        return ["-"] * 4
    group = facts.query_heads / facts.kv_heads
    return [str(facts.query_heads), str(facts.kv_heads), f"{group:g}", str(facts.head_dim)]


def _heads(found: "Inspection") -> int:
    """Heads that a search measures, at most."""
    return sum(found.layers[index].query_heads for index in (*found.sparse_layers, *found.unknown_layers))


def _levels() -> int:
    from xcalib.collect.curves import DEFAULT_GRID

    return len(DEFAULT_GRID)


def _lengths(found: "Inspection") -> list[int]:
    """Those that the model allows, and its own limit."""
    limit = found.max_positions or LENGTHS[-1]
    return sorted({*(length for length in LENGTHS if length <= limit), min(limit, LENGTHS[-1])})


def _blocks(tokens: int) -> int:
    from xcalib.kernels.geometry import Geometry

    return Geometry(tokens, tokens, BLOCK_SIZE, causal=True).visible_count


def _plans(found: "Inspection") -> list[str]:
    """What a search would measure, and the next step."""
    if found.problem is not None:
        return []
    blocks = ", ".join(f"{_blocks(length):,} at {length:,} tokens" for length in _lengths(found))
    most = "at most " if found.unknown_layers else ""
    lines = [
        f"a search measures {most}{_heads(found):,} heads at {_levels()} levels of tau each (S {STRIDE}, B {BLOCK_SIZE})",
        f"blocks of a head that causality allows: {blocks}",
    ]
    return lines if found.note else [*lines, f"time, memory and cost: xcalib plan {found.name}"]
