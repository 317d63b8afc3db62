"""Accuracy of each task on its own: tasks differ in difficulty, and a mean over all of them hides which one suffers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xcalib.data import Metric, Sample
from xcalib.evaluation.bootstrap import Interval, ratio_interval

__all__ = ["TaskAccuracy", "TaskResult", "accuracy_by_task"]


@dataclass(frozen=True)
class TaskAccuracy:
    """Mean score in [0, 1] of one way of attending: ``dense`` or a plan's name.

    The interval is bootstrapped over the task's samples; None with fewer than two.
    """

    attention: str
    accuracy: float
    interval: Interval | None


@dataclass(frozen=True)
class TaskResult:
    """What one task's samples scored.

    Attributes:
        task: the samples' source, such as ``ruler:vt``.
        metric: how they were scored; samples of one source and different metrics are different tasks.
        samples: how many.
        accuracy: the dense model first, then the plans in their order.
    """

    task: str
    metric: Metric
    samples: int
    accuracy: tuple[TaskAccuracy, ...]


def accuracy_by_task(names: Sequence[str], scores: np.ndarray, samples: Sequence[Sample]) -> tuple[TaskResult, ...]:
    """Group scores by task, sources in the order in which they come up; samples without a score are left out.

    Args:
        names: of the plans.
        scores: ``(samples, 1 + plans)``, NaN in rows of samples that ask nothing.
        samples: in the order of the scores.
    """
    rows: dict[str, dict[Metric, list[int]]] = {}
    for row, sample in enumerate(samples):
        if not np.isnan(scores[row, 0]):
            rows.setdefault(sample.source, {}).setdefault(sample.metric, []).append(row)
    return tuple(
        TaskResult(task, metric, len(found), _accuracy(names, scores[found]))
        for task, by_metric in rows.items()
        for metric, found in by_metric.items()
    )


def _accuracy(names: Sequence[str], scores: np.ndarray) -> tuple[TaskAccuracy, ...]:
    return tuple(
        TaskAccuracy(name, float(column.mean()), ratio_interval(column, np.ones_like(column)))
        for name, column in zip(("dense", *names), scores.T, strict=True)
    )
