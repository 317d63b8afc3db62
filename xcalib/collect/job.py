"""The steps of a collection; each unit of work is on disk before the next begins, and ranks share the units."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from xcalib.collect.allocate import TEMPER, allocate
from xcalib.collect.chunks import HeadChunks
from xcalib.collect.curves import CollectSettings, Curves
from xcalib.collect.gains import GainMeter
from xcalib.collect.measure import SampleCurves, Sweeper
from xcalib.collect.measures import Measures
from xcalib.collect.shares import Advance, Arrays, Shares
from xcalib.collect.skipping import of_sample
from xcalib.data import SampleSet
from xcalib.errors import CurvesError, ModelError
from xcalib.models.placement import input_device

__all__ = ["Job", "as_unit", "check_lengths", "gain_levels", "joint_levels"]


class Job:
    """One collection of one model on one set of samples."""

    def __init__(
        self,
        model: Any,
        query_heads: int,
        samples: SampleSet,
        settings: CollectSettings,
        shares: Shares,
        chunks: HeadChunks,
    ) -> None:
        self._model = model
        self._heads = query_heads
        self._samples = samples
        self._settings = settings
        self._shares = shares
        self._chunks = chunks

    # Made when first used: a resumed collection may have nothing left for them.
    @cached_property
    def _sweeper(self) -> Sweeper:
        return Sweeper(self._model, self._settings, self._heads, self._chunks)

    @cached_property
    def _meter(self) -> GainMeter:
        return GainMeter(self._model, self._settings, self._heads)

    def measure_samples(self) -> Curves:
        """The sweep of every sample; gains and joint losses still empty."""
        count, depth = len(self._samples.samples), int(self._model.config.get_text_config().num_hidden_layers)
        check_lengths(self._samples, self._settings)
        done = list(self._each(f"Measuring {count} samples", "sample", self._sweep, [depth] * count, local=("hidden",)))
        layers = tuple(int(layer) for layer in done[0]["layers"])
        if any(tuple(unit["layers"]) != layers for unit in done):
            raise ModelError("samples attend sparsely in different layers: use samples of more similar length")
        reasons: dict[str, int] = {}
        for unit in done:
            reasons |= json.loads(bytes(unit["reasons"]))
        sums: dict[str, Any] = {
            key: np.stack([unit[key] for unit in done]) for key in ("error", "energy", "kept", "visible", "tokens")
        }
        empty: dict[str, Any] = {key: np.zeros(0) for key in ("gain", "gain_kl", "gain_error", "joint_sum", "joint_kl")}
        return Curves(self._settings, model={}, calibration={}, layers=layers, dense_reasons=reasons, **sums, **empty)

    def measure_gains(self, curves: Curves) -> Curves:
        """Fill the gains: KL of one switched layer over the error that its heads made, pooled over the gain samples."""
        count, depth = min(self._settings.gain_samples, len(self._samples.samples)), len(curves.layers)
        levels = self._shares.ranks.same(gain_levels(curves))
        thresholds = curves.grid[levels]  # (layers, heads): every layer at the same density

        def alone(index: int, advance: Advance) -> Arrays:
            return {"kl": self._meter.alone(self._tokens(index), curves.layers, thresholds, advance)}

        kl = [unit["kl"] for unit in self._each(f"Measuring {depth} layer gains", "gain", alone, [depth] * count)]
        error = _sample_error(curves, count, levels[None])[:, :, 0]  # (samples, layers)
        if (error.sum(axis=0) == 0).any():
            raise CurvesError("a layer's heads lose nothing at any threshold; use longer samples or smaller blocks")
        gain = np.sum(kl, axis=0) / error.sum(axis=0)
        return dataclasses.replace(curves, gain=gain, gain_kl=np.stack(kl), gain_error=error)

    def measure_joint(self, curves: Curves) -> Curves:
        """Fill the joint losses: all layers at once, at allocations like those that a search chooses.

        Each sample is measured at levels chosen on the others, so that the measured KL is that of text which had no say.
        """
        count, densities = len(self._samples.samples), self._settings.joint_densities
        numbers = [len(densities) if index < len(curves.gain_kl) else 1 for index in range(count)]

        def together(index: int, advance: Advance) -> Arrays:
            thresholds = curves.grid[joint_levels(curves, index)]
            tokens, dense = self._tokens(index), self._hidden(index)
            return {"kl": self._meter.together(tokens, curves.layers, thresholds, dense, advance)}

        kl = np.full((count, len(densities)), np.nan)
        for index, unit in enumerate(self._each("Measuring all layers together", "joint", together, numbers)):
            kl[index, : numbers[index]] = unit["kl"]
        levels = _allocations(curves, np.ones(count, dtype=bool), densities)
        losses = np.einsum("l,slj->sj", curves.gain, _sample_error(curves, count, levels))
        return dataclasses.replace(curves, joint_sum=losses, joint_kl=kl)

    def measure_others(self, curves: Curves) -> Curves:
        """Fill what the settings' ``measures`` name."""
        if not self._settings.measures:
            return curves
        tokens = [self._tokens(index) for index in range(len(self._samples.samples))]
        others = Measures(self._model, tokens, self._settings, self._each, self._chunks)
        steps = {"fisher": others.fisher, "mass": others.mass}
        found: dict[str, Any] = {name: steps[name](curves.layers) for name in self._settings.measures}
        return dataclasses.replace(curves, **found)

    def _tokens(self, index: int) -> torch.Tensor:
        return torch.tensor(self._samples.samples[index].tokens, device=input_device(self._model))

    def _each(
        self,
        what: str,
        kind: str,
        measure: Callable[[int, Advance], Arrays],
        steps: Sequence[int],
        *,
        local: tuple[str, ...] = (),
    ) -> Iterator[Arrays]:
        """Units of one kind, one for each of the first samples, on all ranks; ``steps`` of progress each.

        Errors name the sample.
        """

        def one(index: int, advance: Advance) -> Arrays:
            with of_sample(index):
                return measure(index, advance)

        names = [f"{kind}-{index:05d}" for index in range(len(steps))]
        return self._shares.each(what, names, one, steps, local=local)

    def _hidden(self, index: int) -> np.ndarray:
        """The dense model's last hidden states where gains are measured, from this rank's disk if it is there."""
        assert self._shares.units is not None  # a collection has a folder
        unit = self._shares.units.load(f"sample-{index:05d}")
        if unit is None:  # on the disk of another host
            unit = self._sweep(index, lambda _steps: None)
        return unit["hidden"]

    def _sweep(self, index: int, advance: Advance) -> Arrays:
        return as_unit(self._sweeper.measure(self._tokens(index), advance))


def check_lengths(samples: SampleSet, settings: CollectSettings) -> None:
    """Raise CurvesError where a sample is too short to measure a KL on."""
    shortest = min(len(sample.tokens) for sample in samples.samples)
    if shortest < settings.gain_every:
        raise CurvesError(
            f"gain_every is {settings.gain_every}, but a sample has only {shortest} tokens: leave out what is so short"
        )


def gain_levels(curves: Curves) -> np.ndarray:
    """Levels ``(layers, heads)`` at which each layer alone is switched: every layer at the same density."""
    tables = zip(curves.density, curves.relative_error, strict=True)
    return np.stack([allocate(density, error, curves.settings.gain_density) for density, error in tables])


def joint_levels(curves: Curves, index: int) -> np.ndarray:
    """Levels ``(allocations, layers, heads)`` of one sample, chosen on the others; gains must be filled."""
    count, densities = len(curves.tokens), curves.settings.joint_densities
    others = np.arange(count) != index if count > 1 else np.ones(1, dtype=bool)
    return _allocations(curves, others, densities if index < len(curves.gain_kl) else densities[:1])


def as_unit(result: SampleCurves) -> Arrays:
    """A sample's sums as the arrays of its unit."""
    return {
        "layers": result.layers,
        "error": result.error,
        "energy": result.energy,
        "kept": result.kept,
        "visible": np.array(result.visible, dtype=np.int64),
        "tokens": np.array(result.tokens, dtype=np.int64),
        "hidden": result.hidden,
        "reasons": np.frombuffer(json.dumps(result.reasons, sort_keys=True).encode(), dtype=np.uint8),
    }


def _allocations(curves: Curves, samples: np.ndarray, densities: tuple[float, ...]) -> np.ndarray:
    """Levels ``(allocations, layers, heads)`` that spend each density where the chosen samples, a bool mask, ask for it."""
    error = curves.error[samples].sum(axis=0) / curves.energy[samples].sum(axis=0)[:, None, None]
    layers, heads, size = error.shape
    loss = (curves.gain[:, None, None] * error).reshape(-1, size) ** TEMPER
    density = (curves.kept[samples].sum(axis=0) / curves.visible[samples].sum()).reshape(-1, size)
    return np.stack([allocate(density, loss, target).reshape(layers, heads) for target in densities])


def _sample_error(curves: Curves, count: int, levels: np.ndarray) -> np.ndarray:
    """Relative output error of the first ``count`` samples at levels ``(allocations, layers, heads)``, summed over heads.

    Returns:
        fp64 ``(count, layers, allocations)``.
    """
    chosen = np.moveaxis(levels, 0, -1)[None]  # (1, layers, heads, allocations)
    error = np.take_along_axis(curves.error[:count], chosen, axis=-1).sum(axis=2)
    return error / curves.energy[:count, :, None]
