"""Held-out samples under many settings: one dense pass a sample, then one pass a setting, each kept once it is done."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xcalib.ablate.attention import SAMPLE_STEP, DensityProbe, VariantAttention
from xcalib.ablate.variants import Scoring, Setting
from xcalib.collect.units import Units
from xcalib.data import Sample, SampleSet
from xcalib.errors import AblationError, ModelError
from xcalib.evaluation import answer_score
from xcalib.models.logits import LogitHead, Prefill, sampled_positions
from xcalib.models.placement import input_device
from xcalib.progress import Progress

__all__ = ["Measured", "Measurement", "Meter", "measure_settings", "probe_densities"]

FloatArray = npt.NDArray[np.float64]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Measured:
    """One setting on every sample, fp64 ``(samples,)`` each.

    Attributes:
        kl: sum over the sample's compared positions of KL(dense || sparse), nats.
        positions: how many those are.
        kept: blocks computed, over all heads of all sparse layers.
        visible: blocks that causality allows there.
        accuracy: score of the answer in [0, 1], NaN where the sample asks nothing.
    """

    kl: FloatArray
    positions: FloatArray
    kept: FloatArray
    visible: FloatArray
    accuracy: FloatArray

    @property
    def density(self) -> float:
        """Over all samples."""
        return float(self.kept.sum() / self.visible.sum())

    @property
    def mean_kl(self) -> float:
        """Nats per token over all samples."""
        return float(self.kl.sum() / self.positions.sum())

    @property
    def mean_accuracy(self) -> float | None:
        """Over the samples that ask something, None without any."""
        asked = self.accuracy[~np.isnan(self.accuracy)]
        return float(asked.mean()) if len(asked) else None


@dataclass
class Measurement:
    """All settings by key, the dense model's accuracy ``(samples,)``, and which layers stayed dense why."""

    settings: dict[str, Measured]
    dense_accuracy: FloatArray
    dense_reasons: dict[str, int] = field(default_factory=dict)


class Meter:
    """Measures one sample at a time."""

    def __init__(self, model: Any, tokenizer: Any, *, block_size: int, every: int, seed: int, units: Units) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._compared = sampled_positions(every)
        self._seed = seed
        self._units = units
        self._head = LogitHead(model)

    def sample(
        self, index: int, sample: Sample, settings: Sequence[Setting], advance: Callable[[int], None]
    ) -> list[Arrays]:
        """Units of the dense model and of every setting; what is on disk is not measured again."""
        prefix = f"sample-{index:05d}"
        names = [f"{prefix}-dense", *(f"{prefix}-{setting.key}" for setting in settings)]
        done = {name: unit for name in names if (unit := self._units.load(name)) is not None}
        advance(len(done))
        if len(done) == len(names):
            return [done[name] for name in names]
        tokens = torch.tensor(sample.tokens, device=input_device(self._model))
        asks = bool(sample.answers) and self._tokenizer is not None
        dense = self._head.prefill(tokens, use_cache=asks)
        reference = dense.hidden[self._compared].clone()
        for name, setting in zip(names, (None, *settings), strict=True):
            if name in done:
                continue
            if setting is None:
                done[name] = {"accuracy": self._score(dense, sample, asks)}
                del dense  # its cache
            else:
                done[name] = self._measure(index, sample, tokens, setting, reference, asks)
            self._units.save(name, done[name])
            advance(1)
        return [done[name] for name in names]

    def _measure(
        self, index: int, sample: Sample, tokens: torch.Tensor, setting: Setting, reference: torch.Tensor, asks: bool
    ) -> Arrays:
        seed = self._seed + SAMPLE_STEP * index
        with VariantAttention(self._model, setting, block_size=self._block_size, seed=seed) as sparse:
            prefill = self._head.prefill(tokens, use_cache=asks)
            accuracy = self._score(prefill, sample, asks)
        if not sparse.visible:
            reasons = "; ".join(sparse.dense_reasons) or "its attention was not called"
            raise ModelError(f"sample {index}: no layer of this model can be sparse ({reasons})")
        kl = self._head.kl(reference, [prefill.hidden[self._compared]])[0]
        return {
            "kl": np.array(float(kl.double().sum())),
            "positions": np.array(float(len(kl))),
            "kept": np.array(float(sparse.kept)),
            "visible": np.array(float(sparse.visible)),
            "accuracy": accuracy,
            "reasons": np.frombuffer(json.dumps(sparse.dense_reasons, sort_keys=True).encode(), dtype=np.uint8),
        }

    def _score(self, prefill: Prefill, sample: Sample, asks: bool) -> npt.NDArray[np.float64]:
        return np.array(answer_score(self._model, self._head, prefill, sample, self._tokenizer) if asks else np.nan)


def measure_settings(
    meter: Meter, heldout: SampleSet, settings: Mapping[str, Setting], progress: Progress
) -> Measurement:
    """Every setting on every sample.

    Raises:
        ModelError: no layer can be sparse, or hidden states are not finite; the message names the sample.
    """
    count = len(heldout.samples)
    rows: list[list[Arrays]] = []
    title = f"Measuring {count} held-out samples under {len(settings)} settings"
    with progress(title, count * (1 + len(settings))) as advance:
        for index, sample in enumerate(heldout.samples):
            rows.append(meter.sample(index, sample, list(settings.values()), advance))
    fields = ("kl", "positions", "kept", "visible", "accuracy")
    measured = {
        key: Measured(*(np.array([float(row[number][name]) for row in rows]) for name in fields))
        for number, key in enumerate(settings, start=1)
    }
    reasons: dict[str, int] = {}
    for row in rows:
        reasons |= json.loads(bytes(row[-1]["reasons"])) if settings else {}
    return Measurement(measured, np.array([float(row[0]["accuracy"]) for row in rows]), reasons)


def probe_densities(
    model: Any,
    samples: SampleSet,
    limits: Mapping[Scoring, Sequence[float]],
    *,
    block_size: int,
    seed: int,
    units: Units,
    progress: Progress,
) -> dict[Scoring, FloatArray]:
    """The density that each limit keeps on calibration samples, the model attending densely.

    Raises:
        AblationError: no layer of the model can be sparse.
    """
    head = LogitHead(model)
    kept = {scoring: np.zeros(len(values)) for scoring, values in limits.items()}
    visible = 0.0
    with progress(f"Reading densities off {len(samples.samples)} calibration samples", len(samples.samples)) as advance:
        for index, sample in enumerate(samples.samples):
            unit = units.load(f"density-{index:05d}")
            if unit is None:
                tokens = torch.tensor(sample.tokens, device=input_device(model))
                with DensityProbe(model, limits, block_size=block_size, seed=seed + SAMPLE_STEP * index) as probe:
                    head.prefill(tokens)
                unit = {scoring.key: values for scoring, values in probe.kept.items()}
                unit["visible"] = np.array(float(probe.visible))
                units.save(f"density-{index:05d}", unit)
            for scoring in limits:
                kept[scoring] += unit[scoring.key]
            visible += float(unit["visible"])
            advance(1)
    if not visible:
        raise AblationError("no layer of this model can be sparse: there is nothing to compare")
    return {scoring: values / visible for scoring, values in kept.items()}
