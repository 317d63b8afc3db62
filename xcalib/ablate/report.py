"""Tables on a terminal or as Markdown, from the JSON that was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    from rich.table import Table
    from rich.text import Text

    console.print(Text(TITLES[result["table"]], style="bold"))
    for line in _heading(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for sheet in sheets(result):
        table = Table(title=sheet.title, title_justify="left")
        for index, name in enumerate(sheet.head):
            table.add_column(name, justify="left" if index < sheet.left else "right", overflow="fold")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for line in result["agreement"]:
        console.print(Text(line, style="bold" if "DISAGREES" in line else ""), soft_wrap=True)
    for line in result["remarks"]:
        console.print(
            Text(f"note: {line}", style="bold red" if line.isupper() or line.startswith("THESE") else ""),
            soft_wrap=True,
        )


def markdown(result: Record, heading: str | None = None) -> str:
    """The same as text for a page, under an optional heading."""
    parts = [heading] if heading else []
    parts += ["  \n".join(_heading(result))]
    parts += [f"**{sheet.title}**\n\n{_grid(sheet)}" for sheet in sheets(result)]
    first, *rest = result["agreement"]
    parts.append("\n".join([f"**{first}**", *(["", *(f"- {line}" for line in rest)] if rest else [])]))
    if result["remarks"]:
        parts.append("Notes:\n\n" + "\n".join(f"- {line}" for line in result["remarks"]))
    return "\n\n".join(parts) + "\n"


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


def sheets(result: Record) -> list[Sheet]:
    """The tables of one result."""
    if result["table"] == "breakdown":
        return [_times(result)]
    return [*(_equal(result, density) for density in _densities(result)), _fixed(result)]


def _densities(result: Record) -> list[float]:
    return sorted({row["density"] for row in result["equal_density"]})


def _equal(result: Record, density: float) -> Sheet:
    head = ["variant", "limit", "KL", "95 %", "KL / baseline", "95 %", "accuracy", "paper: score", "paper: density"]
    rows = []
    variants = {variant["name"]: variant for variant in result["variants"]}
    for row in result["equal_density"]:
        if row["density"] != density:
            continue
        variant = variants[row["variant"]]
        name = row["variant"] + (" (baseline)" if variant["baseline"] else "")
        if not row["reached"]:
            rows.append([name, *["not reached", *[NONE] * 5], *_paper(result, variant)])
            continue
        limit = "per head" if row["limit"] is None else _limit(variant, row["limit"])
        ratio = "1" if variant["baseline"] else _number(row.get("kl_ratio"))
        span = NONE if variant["baseline"] else _interval(row.get("kl_ratio_interval"))
        ours = [limit, _number(row["kl"]), _interval(row["kl_interval"]), ratio, span, _percent(row["accuracy"])]
        rows.append([name, *ours, *_paper(result, variant)])
    dense = result["dense_accuracy"]
    if dense is not None:
        rows.append(["dense", NONE, "0", NONE, "0", NONE, _percent(dense), NONE, "100.0%"])
    return Sheet(f"All at density {density:g}", head, rows)


def _fixed(result: Record) -> Sheet:
    tau = result["settings"]["tau"]
    head = ["variant", "density", "KL", "accuracy", "paper: score", "paper: density"]
    rows = []
    for variant in result["variants"]:
        one = variant["fixed_tau"]
        cells = [NONE] * 3 if one is None else [_percent(one["density"]), _number(one["kl"]), _percent(one["accuracy"])]
        rows.append([variant["name"], *cells, *_paper(result, variant)])
    return Sheet(f"As the paper compares: tau {tau:g}, each at its own density", head, rows)


def _paper(result: Record, variant: Record) -> list[str]:
    """Score and density that the paper has for this very variant: its patterns are at S = 8 only."""
    figure = result["paper"]["figures"].get(variant["figure"])
    if figure is None or (result["table"] == "pattern" and variant["stride"] != 8):
        return [NONE, NONE]
    return [f"{figure['score']:.2f}", _percent(figure["density"])]


def _times(result: Record) -> Sheet:
    milliseconds = result["comparable"]
    head = ["tokens", "S", "density"]
    head += ["selection ms", "attention ms", "dense ms"] if milliseconds else []
    head += ["selection / (sel. + att.)", "paper", "selection / dense", "attention / dense"]
    head += ["selection of prefill", "attention of prefill", "dense att. of dense prefill", "prefill / dense"]
    shares = result["paper"]["selection_shares"]
    rows = []
    for row in result["times"]:
        cells = [f"{row['length']:,}", str(row["stride"]), _percent(row["density"])]
        if milliseconds:
            cells += [_number(row[name]) for name in ("selection_ms", "attention_ms", "dense_attention_ms")]
        paper = shares.get(str(row["stride"]))
        cells += [_percent(row["selection_share"]), NONE if paper is None else f"{paper:.0%}"]
        cells += [_number(row["selection_over_dense"]), _number(row["attention_over_dense"])]
        cells += [_percent(row["selection_of_prefill"]), _percent(row["attention_of_prefill"])]
        cells += [_percent(row["dense_attention_of_dense_prefill"]), _number(row["prefill_over_dense_prefill"])]
        rows.append(cells)
    return Sheet(f"All layers added up, tau {result['tau']:g}", head, rows, left=0)


def _limit(variant: Record, value: float) -> str:
    name = {"threshold": "tau", "top-k": "k", "ratio": "ratio"}[variant["policy"]]
    return f"{name} {value:.1f}" if name == "k" else f"{name} {value:.3f}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def _interval(ends: Sequence[float] | None) -> str:
    return NONE if ends is None else f"{_number(ends[0])} to {_number(ends[1])}"
