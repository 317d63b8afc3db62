"""The table of accuracies by task."""

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from xcalib.evaluation import Evaluation
    from xcalib.evaluation.by_task import TaskAccuracy, TaskResult

__all__ = ["task_table"]

_COLUMNS = 6  # of accuracies that fit on a terminal


def task_table(evaluation: "Evaluation") -> Table:
    """One row for each task, with its metric if that is not recall, or, of many plans, one for each plan; under each accuracy its
    interval, where the task has two samples or more."""
    names = ("dense", *(plan.name for plan in evaluation.plans))
    tasks = [escape(_task(result)) for result in evaluation.tasks]
    by_plan = len(names) > max(_COLUMNS, len(tasks))
    table = Table(title="accuracy by task", title_justify="left", caption_justify="left")
    if by_plan:
        table.add_column("attention", overflow="fold")
        for result, task in zip(evaluation.tasks, tasks, strict=True):
            table.add_column(f"{task}, {result.samples}", justify="right")
        for index, name in enumerate(names):
            table.add_row(name, *(_cell(result.accuracy[index]) for result in evaluation.tasks))
    else:
        table.add_column("task", overflow="fold")
        table.add_column("samples", justify="right")
        for name in names:
            table.add_column(name, justify="right")
        for result, task in zip(evaluation.tasks, tasks, strict=True):
            table.add_row(task, str(result.samples), *map(_cell, result.accuracy))
    counted = "beside each task its samples; " if by_plan else ""
    if any(result.samples > 1 for result in evaluation.tasks):
        table.caption = (
            f"{counted}below each accuracy its {evaluation.confidence:.0%} interval in %, "
            "bootstrapped over the task's samples"
        )
    else:
        table.caption = f"{counted}no interval from 1 sample of a task"
    return table


def _task(result: "TaskResult") -> str:
    return result.task if result.metric == "recall" else f"{result.task} ({result.metric})"


def _cell(found: "TaskAccuracy") -> str:
    if found.interval is None:
        return f"{found.accuracy:.1%}"
    low, high = found.interval
    return f"{found.accuracy:.1%}\n{100 * low:.0f}-{100 * high:.0f}"
