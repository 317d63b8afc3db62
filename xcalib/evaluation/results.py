"""What an evaluation found: per sample, and over all samples."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xcalib.data import SampleSet
from xcalib.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Interval, ratio_interval
from xcalib.evaluation.by_task import TaskResult, accuracy_by_task

if TYPE_CHECKING:
    from xcalib.evaluation.by_length import LengthResult

__all__ = ["DenseResult", "Evaluation", "PlanResult", "SampleResult", "summarise"]


@dataclass(frozen=True, eq=False)
class SampleResult:
    """One sample, the dense model (first where it has a row) and each plan.

    Attributes:
        kl: fp32 ``(plans, positions)``, KL(dense || plan) in nats.
        loss: fp64 ``(1 + plans,)``, sum of next-token losses in nats.
        targets: how many tokens the losses are of.
        density: fp64 ``(plans, layers, heads)``, NaN for layers that the plan keeps dense.
        blocks: fp64 ``(plans,)``, visible blocks of one head.
        accuracy: fp64 ``(1 + plans,)``, NaN when the sample asks nothing.
        seconds: fp64 ``(1 + plans,)``, wall time of the prefill.
    """

    kl: np.ndarray
    loss: np.ndarray
    targets: np.ndarray
    density: np.ndarray
    blocks: np.ndarray
    accuracy: np.ndarray
    seconds: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields by name, to be kept on disk."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class DenseResult:
    """The dense model: perplexity, mean score of samples with answers and its interval (None without any), prefill seconds."""

    perplexity: float
    accuracy: float | None
    seconds: float
    accuracy_interval: Interval | None = None


@dataclass(frozen=True)
class PlanResult:
    """One set of thresholds, over all samples. Intervals are bootstrapped over samples: None with fewer than two.

    Attributes:
        name: operating point, or ``tau=...``.
        density: blocks computed over blocks that causality allows, in layers that may be sparse.
        density_by_layer: the same for each layer, None where the layer stays dense.
        kl: mean KL(dense || sparse) per token in nats.
        kl_p99: its 99th percentile over tokens.
        kl_by_sample: mean of each sample.
        perplexity: of the sparse model.
        accuracy: mean score of samples with answers, None without any.
        seconds: prefill wall time over all samples.
        kl_interval: lower and upper end for ``kl``.
        accuracy_interval: the same for ``accuracy``, over samples with answers.
        drop_interval: the same for the share of the dense model's accuracy that is lost, ``1 - accuracy / dense accuracy``.
    """

    name: str
    density: float
    density_by_layer: tuple[float | None, ...]
    kl: float
    kl_p99: float
    kl_by_sample: tuple[float, ...]
    perplexity: float
    accuracy: float | None
    seconds: float
    kl_interval: Interval | None = None
    accuracy_interval: Interval | None = None
    drop_interval: Interval | None = None


@dataclass(frozen=True)
class Evaluation:
    """Dense and sparse side by side on the same samples; ``to_dict()`` is JSON.

    ``confidence`` is what every interval holds, by ``resamples`` draws of the bootstrap. ``by_length`` has the same by length,
    where samples differ in it or plans have several length bins; ``tasks`` has the accuracy of each task that asks something.
    ``skipped`` samples gave numbers that are not finite and are in no figure.
    """

    dense: DenseResult
    plans: tuple[PlanResult, ...]
    sources: tuple[str, ...]
    samples: int
    tokens: int
    asking: int
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES
    by_length: "tuple[LengthResult, ...]" = ()
    tasks: tuple[TaskResult, ...] = ()
    skipped: int = 0

    def plan(self, name: str) -> PlanResult:
        """The result of one plan by name; KeyError when there is none."""
        return {plan.name: plan for plan in self.plans}[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for ``json.dumps``."""
        return dataclasses.asdict(self)


def summarise(names: Sequence[str], results: Sequence[SampleResult], data: SampleSet) -> Evaluation:
    """Pool samples: KL and loss over tokens, density over blocks, accuracy over samples."""
    targets = sum(int(result.targets) for result in results)
    loss = np.sum([result.loss for result in results], axis=0) / max(targets, 1)
    seconds = np.sum([result.seconds for result in results], axis=0)
    scores = np.array([result.accuracy for result in results])  # (samples, 1 + plans)
    asking = int((~np.isnan(scores[:, 0])).sum())
    asked = scores[~np.isnan(scores[:, 0])].T  # (1 + plans, asking)
    accuracy = [float(row.mean()) if asking else None for row in asked]
    plans = []
    for row, name in enumerate(names):
        kl = np.concatenate([result.kl[row] for result in results]).astype(np.float64)
        sums = [float(result.kl[row].astype(np.float64).sum()) for result in results]
        by_layer = [result.density[row].mean(axis=-1) for result in results]  # (layers,) each
        density = np.average(by_layer, axis=0, weights=[result.blocks[row] for result in results])
        plans.append(
            PlanResult(
                name=name,
                density=float(np.nanmean(density)),
                density_by_layer=tuple(None if math.isnan(value) else float(value) for value in density),
                kl=float(kl.mean()),
                kl_p99=float(np.quantile(kl, 0.99)),
                kl_by_sample=tuple(float(result.kl[row].astype(np.float64).mean()) for result in results),
                perplexity=float(np.exp(loss[1 + row])),
                accuracy=accuracy[1 + row],
                seconds=float(seconds[1 + row]),
                kl_interval=ratio_interval(sums, [result.kl.shape[1] for result in results]),
                accuracy_interval=_mean_interval(asked[1 + row]),
                drop_interval=ratio_interval(asked[0] - asked[1 + row], asked[0]),
            )
        )
    dense = DenseResult(float(np.exp(loss[0])), accuracy[0], float(seconds[0]), _mean_interval(asked[0]))
    tokens = sum(len(sample.tokens) for sample in data.samples)
    tasks = accuracy_by_task(names, scores, data.samples)
    return Evaluation(dense, tuple(plans), tuple(data.specs), len(results), tokens, asking, tasks=tasks)


def _mean_interval(scores: np.ndarray) -> Interval | None:
    return ratio_interval(scores, np.ones_like(scores))
