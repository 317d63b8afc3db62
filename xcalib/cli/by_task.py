"""The table of accuracies by task."""

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from xcalib.evaluation import Evaluation
    from xcalib.evaluation.by_task import TaskAccuracy

__all__ = ["task_table"]


def task_table(evaluation: "Evaluation") -> Table:
    """One row for each task, with its metric if that is not recall; under each accuracy its interval, where the task has
    two samples or more."""
    table = Table(title="accuracy by task", title_justify="left", caption_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("samples", justify="right")
    for name in ("dense", *(plan.name for plan in evaluation.plans)):
        table.add_column(name, justify="right")
    for result in evaluation.tasks:
        task = result.task if result.metric == "recall" else f"{result.task} ({result.metric})"
        table.add_row(escape(task), str(result.samples), *map(_cell, result.accuracy))
    if any(result.samples > 1 for result in evaluation.tasks):
        table.caption = (
            f"below each accuracy its {evaluation.confidence:.0%} interval in %, bootstrapped over the task's samples"
        )
    else:
        table.caption = "no interval from 1 sample of a task"
    return table


def _cell(found: "TaskAccuracy") -> str:
    if found.interval is None:
        return f"{found.accuracy:.1%}"
    low, high = found.interval
    return f"{found.accuracy:.1%}\n{100 * low:.0f}-{100 * high:.0f}"
