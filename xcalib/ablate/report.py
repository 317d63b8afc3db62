"""Tables on a terminal or as Markdown, from the JSON that was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xcalib.ablate.breakdown import CPU_WARNING
from xcalib.ablate.record import FORMAT
from xcalib.ablate.variants import TABLES
from xcalib.errors import AblationError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Sheet", "check_result", "markdown", "render", "sheets"]

Record = dict[str, Any]

TITLES = {
    "pattern": "Which query of a group meets which key",
    "stride": "Tokens per scored group (S)",
    "selection": "How blocks are selected from the scores",
    "threshold": "One tau, the published recurrence, and the knapsack",
    "breakdown": "Selection time against attention time",
}
NONE = "-"


@dataclass(frozen=True)
class Sheet:
    """A table of cells; ``left`` is how many columns, from the first, hold text."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


def check_result(result: Any, where: str) -> Record:
    """Raise AblationError unless this is a table's results, of this version's format."""
    table = result.get("table") if isinstance(result, dict) else None
    if table not in TABLES:
        raise AblationError(f"{where}: holds no results of 'xcalib ablate'")
    if result.get("format") != FORMAT:
        raise AblationError(f"{where}: format {result.get('format')!r}, this version reads {FORMAT}; measure again")
    return dict(result)


def render(result: Record, console: "Console") -> None:
    """Print a table, what it says about the paper, and remarks."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(TITLES[result["table"]], style="bold"))
    for line in _heading(result):
        console.print(Text(line), soft_wrap=True)
    if _warns(result):
        console.print(Text(CPU_WARNING, style="bold red"), soft_wrap=True)
    for sheet in sheets(result):
        console.print(Text(f"\n{sheet.title}", style="bold"), soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
        for index, name in enumerate(sheet.head):
            table.add_column(name, justify="left" if index < sheet.left else "right", no_wrap=True)
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for line in result["agreement"]:
        console.print(Text(line, style="bold" if "DISAGREES" in line else ""), soft_wrap=True)
    for line in result["remarks"]:
        console.print(Text(f"note: {line}"), soft_wrap=True)
    console.print()


def markdown(result: Record, heading: str | None = None) -> str:
    """The same as text for a page, under an optional heading."""
    parts = [heading] if heading else []
    parts += ["  \n".join(_heading(result))]
    parts += [f"**{CPU_WARNING}**"] if _warns(result) else []
    parts += [f"**{sheet.title}**\n\n{_grid(sheet)}" for sheet in sheets(result, wide=True)]
    first, *rest = result["agreement"]
    parts.append("\n".join([f"**{first}**", *(["", *(f"- {line}" for line in rest)] if rest else [])]))
    if result["remarks"]:
        parts.append("Notes:\n\n" + "\n".join(f"- {line}" for line in result["remarks"]))
    return "\n\n".join(parts) + "\n"


def _warns(result: Record) -> bool:
    return result["table"] == "breakdown" and not result["comparable"]


def _grid(sheet: Sheet) -> str:
    rule = ["---" if index < sheet.left else "---:" for index in range(len(sheet.head))]
    lines = [sheet.head, rule, *sheet.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _heading(result: Record) -> list[str]:
    model, machine, settings = result["model"], result["machine"], result["settings"]
    heldout, calibration = (result["data"][split] for split in ("heldout", "calibration"))
    device = machine.get("gpu", {}).get("name") or f"{machine['processor']} (CPU)"
    lines = [
        f"{model['name']}: {model['layers']} layers, {model['query_heads']} query / {model['kv_heads']} KV heads of "
        f"{model['head_dim']}, {model['dtype']}, blocks of {settings['block_size']}, on {device}"
    ]
    if result["table"] != "breakdown":
        lines.append(
            f"{heldout['samples']} held-out samples of {_range(heldout)} tokens, seed {heldout['seed']}, from "
            f"{', '.join(heldout['specs'])}; limits from {calibration['samples']} calibration samples; KL in nats per token"
        )
    return lines


def _range(data: Record) -> str:
    low, high = data["min_length"], data["max_length"]
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def sheets(result: Record, *, wide: bool = False) -> list[Sheet]:
    """The tables of one result; ``wide`` ones have more columns than a terminal of 80 characters holds."""
    if result["table"] == "breakdown":
        return [_attention_times(result), _prefill_times(result)]
    densities = sorted({row["density"] for row in result["equal_density"]})
    return [*(_equal(result, density, wide) for density in densities), _fixed(result)]


def _equal(result: Record, density: float, wide: bool) -> Sheet:
    head = ["variant", "limit", "KL", *(["95 %"] if wide else []), "ratio", "95 %", "acc.", "paper"]
    variants = {variant["name"]: variant for variant in result["variants"]}
    rows = []
    for row in (row for row in result["equal_density"] if row["density"] == density):
        variant = variants[row["variant"]]
        if not row["reached"]:
            cells = ["not reached", *[NONE] * (len(head) - 3)]
        else:
            limit = "per head" if row["limit"] is None else _limit(variant, row["limit"])
            interval = [_interval(row["kl_interval"])] if wide else []
            ratio = ["base", NONE] if variant["baseline"] else _ratio(row)
            cells = [limit, _number(row["kl"]), *interval, *ratio, _percent(row["accuracy"])]
        rows.append([row["variant"], *cells, _paper(result, variant)])
    if result["dense_accuracy"] is not None:
        rows.append(["dense", *[NONE] * (len(head) - 3), _percent(result["dense_accuracy"]), NONE])
    title = f"All at density {density:g} (ratio: KL over that of base; paper: RULER score and its own density)"
    return Sheet(title, head, rows)


def _fixed(result: Record) -> Sheet:
    tau = result["settings"]["tau"]
    rows = []
    for variant in result["variants"]:
        one = variant["fixed_tau"]
        cells = [NONE] * 3 if one is None else [_percent(one["density"]), _number(one["kl"]), _percent(one["accuracy"])]
        rows.append([variant["name"], *cells, _paper(result, variant)])
    title = f"As the paper compares: each at its own density, ours with tau {tau:g} in all heads"
    return Sheet(title, ["variant", "density", "KL", "accuracy", "paper"], rows)


def _paper(result: Record, variant: Record) -> str:
    """Score and density that the paper has for this very variant: its patterns are at S = 8 only."""
    figure = result["paper"]["figures"].get(variant["figure"])
    if figure is None or (result["table"] == "pattern" and variant["stride"] != 8):
        return NONE
    return f"{figure['score']:.2f} at {_percent(figure['density'])}"


def _attention_times(result: Record) -> Sheet:
    milliseconds = ["selection_ms", "attention_ms", "dense_attention_ms"] if result["comparable"] else []
    head = ["tokens", "S", "density", *(["sel. ms", "att. ms", "dense ms"] if milliseconds else [])]
    head += ["sel./dense", "att./dense", "sel./(sel.+att.)", "paper"]
    shares = result["paper"]["selection_shares"]
    rows = []
    for row in result["times"]:
        cells = [f"{row['length']:,}", str(row["stride"]), _percent(row["density"])]
        cells += [_number(row[name]) for name in (*milliseconds, "selection_over_dense", "attention_over_dense")]
        paper = shares.get(str(row["stride"]))
        rows.append([*cells, _percent(row["selection_share"]), NONE if paper is None else f"{paper:.0%}"])
    title = f"Selection (scoring and selecting) and sparse attention, all layers, tau {result['tau']:g}"
    return Sheet(title, head, rows, left=0)


def _prefill_times(result: Record) -> Sheet:
    milliseconds = ["prefill_ms", "dense_prefill_ms"] if result["comparable"] else []
    head = ["tokens", "S", *(["sparse ms", "dense ms"] if milliseconds else [])]
    head += ["selection", "attention", "rest", "dense: attention", "sparse/dense"]
    rows = []
    for row in result["times"]:
        selection, attention = row["selection_of_prefill"], row["attention_of_prefill"]
        cells = [f"{row['length']:,}", str(row["stride"]), *(_number(row[name]) for name in milliseconds)]
        cells += [_percent(selection), _percent(attention), _percent(1 - selection - attention)]
        cells += [_percent(row["dense_attention_of_dense_prefill"]), _number(row["prefill_over_dense_prefill"])]
        rows.append(cells)
    return Sheet("Shares of the whole prefill", head, rows, left=0)


def _limit(variant: Record, value: float) -> str:
    """A tau, a share of blocks, or blocks a row, which lie between whole numbers where two were measured."""
    return f"{value:.1f}" if variant["policy"] == "top-k" else f"{value:.3f}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def _ratio(row: Record) -> list[str]:
    if row["kl_ratio"] is None:  # the baseline is out of reach
        return [NONE, NONE]
    ends = row["kl_ratio_interval"]
    return [f"{row['kl_ratio']:.2f}", NONE if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"]


def _interval(ends: Sequence[float] | None) -> str:
    return NONE if ends is None else f"{_number(ends[0])} to {_number(ends[1])}"
