"""Progress and tables on stderr; JSON for scripts on stdout."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from xcalib.errors import XcalibWarning

if TYPE_CHECKING:
    from xcalib.evaluation import Evaluation
    from xcalib.evaluation.bootstrap import Interval

__all__ = [
    "by_layer_table",
    "console",
    "evaluation_table",
    "interval_labels",
    "print_json",
    "progress",
    "quiet_libraries",
    "report_console",
    "resumable",
    "short_count",
    "status",
]


def _plain() -> dict[str, Any]:
    """NO_COLOR: no escapes at all, neither colours nor bold type; Rich takes the colours alone."""
    return {"color_system": None} if os.environ.get("NO_COLOR") else {}


console = Console(stderr=True, highlight=False, **_plain())


def report_console() -> Console:
    """Stdout, for what a command is asked to print; escapes only on a terminal, and where FORCE_COLOR is set."""
    return Console(highlight=False, **_plain())


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A Rich bar with what is being done and the time left; plain lines when stderr is not a terminal."""
    if not console.is_terminal:
        console.print(f"{description} ...", markup=False, soft_wrap=True)
        yield lambda _steps: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(escape(description), total=total)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def status(description: str) -> Iterator[None]:
    """For work of unknown length."""
    if console.is_terminal:
        with console.status(escape(description)):
            yield
    else:
        console.print(f"{description} ...", markup=False, soft_wrap=True)
        yield


@contextmanager
def resumable(hint: str, kept: str = "samples") -> Iterator[None]:
    """Ctrl-C ends the command with exit code 130 and says what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"interrupted: finished {kept} are kept; {hint}")
        raise typer.Exit(130) from None


def quiet_libraries() -> None:
    """Our own bar is the only one, and our own warnings read as one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each of its retries is a warning
    transformers_logging.disable_progress_bar()
    previous = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **options: Any) -> None:
        if issubclass(category, XcalibWarning):
            console.print(f"warning: {message}", markup=False)
        else:
            previous(message, category, *rest, **options)

    warnings.showwarning = show


def short_count(number: int) -> str:
    """``135M`` for 134,515,008."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= 0.9995 * size:  # 999.9M is 1B
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def interval_labels(confidence: float) -> tuple[str, str]:
    """What stands before the rows with the lower and the upper ends of intervals."""
    return f"  {confidence:.0%} from", f"  {confidence:.0%} to"


def evaluation_table(evaluation: "Evaluation", title: str) -> Table:
    """Dense and every plan, one row each, and below it two rows with the ends of its intervals where it has any."""
    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    table.add_column("attention")
    for column in ("density", "KL mean", "KL p99", "perplexity", "accuracy", "prefill s"):
        table.add_column(column, justify="right")
    dense = evaluation.dense
    table.add_row(
        "dense", "100.0%", "0", "0", f"{dense.perplexity:.3f}", _percent(dense.accuracy), f"{dense.seconds:.1f}"
    )
    _add_ends(table, evaluation, None, dense.accuracy_interval)
    for plan in evaluation.plans:
        table.add_row(
            plan.name,
            _percent(plan.density),
            f"{plan.kl:.4f}",
            f"{plan.kl_p99:.3f}",
            f"{plan.perplexity:.3f}",
            _percent(plan.accuracy),
            f"{plan.seconds:.1f}",
        )
        _add_ends(table, evaluation, plan.kl_interval, plan.accuracy_interval)
    asked = f", {evaluation.asking} with a question" if evaluation.asking else ""
    skipped = f" ({evaluation.skipped} skipped)" if evaluation.skipped else ""
    sure = "intervals are bootstrapped over samples" if evaluation.samples > 1 else "no interval from 1 sample"
    sources = escape(", ".join(evaluation.sources))  # as the user typed them
    table.caption = (
        f"{evaluation.samples} samples{skipped}{asked}, {evaluation.tokens:,} tokens from {sources}; "
        f"KL in nats per token; {sure}"
    )
    return table


def _add_ends(table: Table, evaluation: "Evaluation", kl: "Interval | None", accuracy: "Interval | None") -> None:
    if kl is None and accuracy is None:
        return
    for end, label in enumerate(interval_labels(evaluation.confidence)):
        kl_end = "" if kl is None else f"{kl[end]:.4f}"
        table.add_row(label, "", kl_end, "", "", "" if accuracy is None else _percent(accuracy[end]), "")


def by_layer_table(evaluation: "Evaluation", columns: int = 10) -> Table:
    """Density of every layer in percent, ten layers a line; a dash where a layer stays dense."""
    table = Table(title="density by layer, %", title_justify="left")
    table.add_column("attention")
    table.add_column("layers")
    for column in range(columns):
        table.add_column(f"+{column}", justify="right")
    for plan in evaluation.plans:
        cells = ["-" if value is None else f"{100 * value:.0f}" for value in plan.density_by_layer]
        for start in range(0, len(cells), columns):
            row = cells[start : start + columns]
            label = plan.name if start == 0 else ""
            table.add_row(label, f"{start}-{start + len(row) - 1}", *row, *[""] * (columns - len(row)))
    return table
