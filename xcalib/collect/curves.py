"""Curves: for every layer and head, density and output error as functions of tau; the data and its files."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors.numpy import save

from xcalib._files import replace_file
from xcalib.choices import Measure
from xcalib.errors import CurvesError
from xcalib.kernels.api import Order, Pattern

__all__ = ["DEFAULT_GRID", "CollectSettings", "Curves", "Measure", "save_curves", "write_atomically"]


# Finer towards 1, where heads with spread-out attention need it.
DEFAULT_GRID = (
    *(0.0, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.74, 0.78, 0.82, 0.85, 0.875, 0.9),
    *(0.915, 0.93, 0.945, 0.96, 0.97, 0.98, 0.9875, 0.994, 0.998, 1.0),
)
FORMAT = 1
ARRAYS = ("error", "energy", "kept", "visible", "tokens", "gain", "gain_kl", "gain_error", "joint_sum", "joint_kl")


@dataclass(frozen=True)
class CollectSettings:
    """What is measured, and how.

    Attributes:
        stride: tokens per group (S) of the scoring.
        block_size: tokens per block (B).
        pattern: of the scoring; with ``"rows"`` one query in ``stride`` is scored exactly, which is our own departure from the
            paper; ``"antidiagonal"`` is the paper's (:func:`xcalib.kernels.estimate_blocks`).
        order: of preference: with ``"recent"`` every tau above 0 keeps the block before a row's own, which is ours as well;
            ``"score"`` is the paper's (:func:`xcalib.kernels.select_blocks`).
        grid: ascending taus, the first 0 and the last 1.
        gain_samples: how many samples measure the layer gains.
        gain_density: density at which a layer is switched to measure its gain.
        joint_densities: densities at which all layers are switched together, to measure how their losses combine; at the first
            on all samples, at the others on the gain samples.
        gain_every: KLs are taken at every such position; odd, so that every place within a block has its turn: the first queries
            of a block, whose neighbours lie in another block, lose several times more than the last.
        measures: what else is measured, for the objectives of these names.
    """

    stride: int = 16
    block_size: int = 128
    pattern: Pattern = "rows"
    order: Order = "recent"
    grid: tuple[float, ...] = DEFAULT_GRID
    gain_samples: int = 2
    gain_density: float = 0.25
    joint_densities: tuple[float, ...] = (0.33, 0.45, 0.22)
    gain_every: int = 7
    measures: tuple[Measure, ...] = ()

    def __post_init__(self) -> None:
        grid = np.asarray(self.grid, dtype=np.float64)
        if len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or not (np.diff(grid) > 0).all():
            raise CurvesError(f"grid is {self.grid}, expected ascending thresholds from 0 to 1")
        if self.gain_samples < 1:
            raise CurvesError(f"gain_samples is {self.gain_samples}, expected at least 1")
        if self.gain_every < 1 or self.gain_every % 2 == 0:
            raise CurvesError(f"gain_every is {self.gain_every}, expected an odd number, at least 1")
        if not self.joint_densities or not all(
            0 < density < 1 for density in (self.gain_density, *self.joint_densities)
        ):
            raise CurvesError(
                f"gain_density is {self.gain_density} and joint_densities {self.joint_densities}, "
                "expected numbers between 0 and 1"
            )
        if len(set(self.measures)) < len(self.measures) or not set(self.measures) <= set(get_args(Measure)):
            raise CurvesError(f"measures is {self.measures}, expected some of {get_args(Measure)}, each once")


@dataclass(frozen=True, eq=False)
class Curves:
    """Sums per sample over its tokens; the properties give what search uses.

    Attributes:
        settings: of the measurement.
        model: the model's identity, as a profile stores it.
        calibration: sources, samples, lengths, seed, SHA-256 of the tokens, documents, dropped.
        layers: indices of the measured layers, ``(layers,)``; all others stay dense, with reasons in ``dense_reasons``.
        error: fp64 ``(samples, layers, heads, levels)``, sum over tokens of ``||(O_tau - O_dense) W_o,h||^2``.
        energy: fp64 ``(samples, layers)``, sum over tokens of ``||sum_h O_dense W_o,h||^2``.
        kept: int64 ``(samples, layers, heads, levels)``, blocks computed.
        visible: int64 ``(samples,)``, blocks of one dense head.
        tokens: int64 ``(samples,)``.
        gain: fp64 ``(layers,)``, KL in nats per token per unit of the layer's relative output error.
        gain_kl: fp64 ``(gain samples, layers)``, mean KL with that layer alone switched.
        gain_error: fp64 ``(gain samples, layers)``, the relative output error that caused it.
        joint_sum: fp64 ``(samples, allocations)``, sum over layers of gain x error of allocations used in all layers at once.
        joint_kl: fp64 ``(samples, allocations)``, mean KL measured with them, each sample's levels chosen on the other samples;
            NaN beyond the gain samples but for the first allocation.
        fisher: fp64 ``(samples, layers, heads, levels)``, sum over tokens of the KL in nats that the output error causes, to
            second order (:mod:`xcalib.collect.fisher`); None unless the settings' ``measures`` name it.
        mass: fp64 ``(samples, layers, heads, levels)``, sum over tokens of the attention probability outside the kept blocks;
            None unless the settings' ``measures`` name it.
        skipped: indices, in the set that was given, of samples that were left out for numbers that are not finite.
    """

    settings: CollectSettings
    model: dict[str, Any]
    calibration: dict[str, Any]
    layers: tuple[int, ...]
    error: np.ndarray
    energy: np.ndarray
    kept: np.ndarray
    visible: np.ndarray
    tokens: np.ndarray
    gain: np.ndarray
    gain_kl: np.ndarray
    gain_error: np.ndarray
    joint_sum: np.ndarray
    joint_kl: np.ndarray
    dense_reasons: dict[str, int] = field(default_factory=dict)
    fisher: np.ndarray | None = None
    mass: np.ndarray | None = None
    skipped: tuple[int, ...] = ()

    @property
    def grid(self) -> np.ndarray:
        """Taus, fp64 ``(levels,)``."""
        return np.asarray(self.settings.grid, dtype=np.float64)

    @property
    def density(self) -> np.ndarray:
        """Blocks kept over blocks visible, fp64 ``(layers, heads, levels)``."""
        return self.kept.sum(axis=0) / self.visible.sum()

    @property
    def relative_error(self) -> np.ndarray:
        """Output error over the layer's output energy, fp64 ``(layers, heads, levels)``."""
        return self.error.sum(axis=0) / self.energy.sum(axis=0)[:, None, None]

    @property
    def fisher_kl(self) -> np.ndarray | None:
        """KL in nats per compared position, to second order, fp64 ``(layers, heads, levels)``; None if not measured."""
        positions = (self.tokens // self.settings.gain_every).sum()
        return None if self.fisher is None else self.fisher.sum(axis=0) / positions

    @property
    def dropped_mass(self) -> np.ndarray | None:
        """Share of a token's attention outside the kept blocks, fp64 ``(layers, heads, levels)``; None if not measured."""
        return None if self.mass is None else self.mass.sum(axis=0) / self.tokens.sum()

    def joint(self, losses: float) -> float:
        """What the sum of the layers' own KLs becomes when they are sparse together on new text, in nats per token.

        Layers that are sparse together lose more than the sum of what each loses alone, the more the larger the sum; and
        thresholds do worse on text that did not choose them. Both are in the measured ratios (cross-validated: see
        ``joint_kl``), which are interpolated in the logarithm of the sum and held constant outside.
        """
        if losses <= 0:
            return losses
        count = len(self.gain_kl)
        shape = self.joint_kl[:count].mean(axis=0) / self.joint_sum[:count].mean(axis=0)  # (allocations,)
        alone = self.joint_sum.mean(axis=0)
        level = self.joint_kl[:, 0].mean() / alone[0]  # what all samples say about the first allocation
        order = alone.argsort()
        ratio = (level * shape / shape[0])[order]
        return float(losses * np.interp(np.log(losses), np.log(alone[order]), ratio))

    def alone(self, kl: float) -> float:
        """The inverse of :meth:`joint`: the sum of the layers' own KLs that becomes ``kl``."""
        low, high = 0.0, max(kl, 1e-12)
        while self.joint(high) < kl:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.joint(middle) < kl else (low, middle)
        return low


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, flush to disk, rename: the file is either the old one or the new one.

    Raises:
        CurvesError: the folder cannot be written.
    """
    try:
        replace_file(path, data)
    except OSError as error:
        raise CurvesError(f"{path}: cannot be written: {error.strerror or error}") from error


def save_curves(curves: Curves, folder: Path) -> None:
    """Write ``curves.safetensors`` and, last, ``curves.json``; a folder without the latter is unfinished."""
    names = (*ARRAYS, *curves.settings.measures)
    arrays = {name: np.asarray(getattr(curves, name), order="C") for name in names}
    record = {
        "format": FORMAT,
        "settings": dataclasses.asdict(curves.settings),
        "model": curves.model,
        "calibration": curves.calibration,
        "layers": list(curves.layers),
        "dense_reasons": curves.dense_reasons,
        **({"skipped": list(curves.skipped)} if curves.skipped else {}),
    }
    write_atomically(folder / "curves.safetensors", save(arrays))
    write_atomically(folder / "curves.json", json.dumps(record, indent=1, sort_keys=True).encode() + b"\n")
