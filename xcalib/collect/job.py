"""The steps of a collection; each unit of work is on disk before the next begins."""

import dataclasses
import json
from collections.abc import Callable
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
from xcalib.collect.skipping import UnitStore, of_sample
from xcalib.data import SampleSet
from xcalib.errors import CurvesError, ModelError
from xcalib.progress import Progress

__all__ = ["Job"]

Arrays = dict[str, np.ndarray]


class Job:
    """One collection of one model on one set of samples."""

    def __init__(
        self,
        model: Any,
        query_heads: int,
        samples: SampleSet,
        settings: CollectSettings,
        units: UnitStore,
        progress: Progress,
        chunks: HeadChunks,
    ) -> None:
        self._model = model
        self._heads = query_heads
        self._samples = samples
        self._settings = settings
        self._units = units
        self._progress = progress
        self._chunks = chunks
        self._hidden: list[np.ndarray] = []  # of each sample, where gains are measured

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
        shortest = min(len(sample.tokens) for sample in self._samples.samples)
        every = self._settings.gain_every
        if shortest < every:
            raise CurvesError(
                f"gain_every is {every}, but a sample has only {shortest} tokens: leave out what is so short"
            )
        done: list[Arrays] = []
        with self._progress(f"Measuring {count} samples", count * depth) as advance:
            for index in range(count):

                def sweep(index: int = index) -> Arrays:
                    return self._sweep(index, advance)

                done.append(self._unit(f"sample-{index:05d}", sweep, advance, depth))
        layers = tuple(int(layer) for layer in done[0]["layers"])
        if any(tuple(unit["layers"]) != layers for unit in done):
            raise ModelError("samples attend sparsely in different layers: use samples of more similar length")
        reasons: dict[str, int] = {}
        for unit in done:
            self._hidden.append(unit["hidden"])
            reasons |= json.loads(bytes(unit["reasons"]))
        sums: dict[str, Any] = {
            key: np.stack([unit[key] for unit in done]) for key in ("error", "energy", "kept", "visible", "tokens")
        }
        empty: dict[str, Any] = {key: np.zeros(0) for key in ("gain", "gain_kl", "gain_error", "joint_sum", "joint_kl")}
        return Curves(self._settings, model={}, calibration={}, layers=layers, dense_reasons=reasons, **sums, **empty)

    def measure_gains(self, curves: Curves) -> Curves:
        """Fill the gains: KL of one switched layer over the error that its heads made, pooled over the gain samples."""
        count, depth = min(self._settings.gain_samples, len(self._samples.samples)), len(curves.layers)
        tables = zip(curves.density, curves.relative_error, strict=True)
        levels = np.stack([allocate(density, error, self._settings.gain_density) for density, error in tables])
        thresholds = curves.grid[levels]  # (layers, heads): every layer at the same density
        kl = []
        with self._progress(f"Measuring {depth} layer gains", count * depth) as advance:
            for index in range(count):

                def alone(index: int = index) -> Arrays:
                    return {"kl": self._meter.alone(self._tokens(index), curves.layers, thresholds, advance)}

                kl.append(self._unit(f"gain-{index:05d}", alone, advance, depth)["kl"])
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
        kl = np.full((count, len(densities)), np.nan)
        with self._progress("Measuring all layers together", sum(numbers)) as advance:
            for index, number in enumerate(numbers):
                others = np.arange(count) != index if count > 1 else np.ones(1, dtype=bool)
                thresholds = curves.grid[_allocations(curves, others, densities[:number])]

                def together(index: int = index, thresholds: np.ndarray = thresholds) -> Arrays:
                    dense = self._hidden[index]
                    kl = self._meter.together(self._tokens(index), curves.layers, thresholds, dense, advance)
                    return {"kl": kl}

                kl[index, :number] = self._unit(f"joint-{index:05d}", together, advance, number)["kl"]
        levels = _allocations(curves, np.ones(count, dtype=bool), densities)
        losses = np.einsum("l,slj->sj", curves.gain, _sample_error(curves, count, levels))
        return dataclasses.replace(curves, joint_sum=losses, joint_kl=kl)

    def measure_others(self, curves: Curves) -> Curves:
        """Fill what the settings' ``measures`` name."""
        if not self._settings.measures:
            return curves
        tokens = [self._tokens(index) for index in range(len(self._samples.samples))]
        others = Measures(self._model, tokens, self._settings, self._unit, self._progress, self._chunks)
        steps = {"fisher": others.fisher, "mass": others.mass}
        found: dict[str, Any] = {name: steps[name](curves.layers) for name in self._settings.measures}
        return dataclasses.replace(curves, **found)

    def _tokens(self, index: int) -> torch.Tensor:
        return torch.tensor(self._samples.samples[index].tokens, device=next(self._model.parameters()).device)

    def _unit(self, name: str, measure: Callable[[], Arrays], advance: Callable[[int], None], steps: int) -> Arrays:
        """A finished unit from disk, or measure it and keep it; its name ends in the sample's index."""
        unit = self._units.load(name)
        if unit is None:
            with of_sample(int(name[-5:])):
                unit = measure()
            self._units.save(name, unit)
        else:
            advance(steps)
        return unit

    def _sweep(self, index: int, advance: Callable[[int], None]) -> Arrays:
        return _as_unit(self._sweeper.measure(self._tokens(index), advance))


def _as_unit(result: SampleCurves) -> Arrays:
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
