"""Every head's tau, density and error at each operating point, and its curves, as compact arrays for the page.

Arrays are packed as little-endian unsigned integers in base64. A large model's are made coarser, in steps, until they fit the
page; what was done is said in it.
"""

import base64
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from xcalib.collect import Curves
from xcalib.errors import ReportError
from xcalib.profile import Profile
from xcalib.report.inputs import Inputs
from xcalib.report.words import keys_in
from xcalib.search.plan import values_at

__all__ = ["HEADS_BYTES", "Cells", "cells_of", "colour_domains", "head_rows", "layer_rows", "packed_heads"]

FloatArray = npt.NDArray[np.float64]

HEADS_BYTES = 400_000  # of the page, for all arrays once compressed and in base64
MOST_SPARSE_TAU = 0.9999
# Bits of a value and most levels of a curve, finest first; a cell's own density and error are never thinned.
COARSER = ((16, 1000), (8, 1000), (8, 14), (8, 9), (8, 5), (8, 0))


@dataclass(frozen=True, eq=False)
class Cells:
    """One operating point in one length bin.

    Attributes:
        tau: fp64 ``(layers, heads)`` of all layers of the model.
        density: of the same shape, in [0, 1], read off the curves; None without any. Layers that stay dense have 1.
        error: of the same shape, output error over the layer's output energy; layers that stay dense have 0.
    """

    tau: FloatArray
    density: FloatArray | None
    error: FloatArray | None


def cells_of(inputs: Inputs, point: int, length_bin: int) -> Cells:
    """The cells of one heatmap; between levels the curves are linear in tau."""
    tau = np.asarray(inputs.profile.points[point].thresholds[length_bin], dtype=np.float64)
    if not inputs.curves:
        return Cells(tau, None, None)
    curves = inputs.curves[length_bin]
    layers = list(curves.layers)
    density, error = np.ones_like(tau), np.zeros_like(tau)
    density[layers] = values_at(curves.grid, curves.density, tau[layers])
    error[layers] = values_at(curves.grid, curves.relative_error, tau[layers])
    return Cells(tau, density, error)


def colour_domains(inputs: Inputs) -> dict[str, tuple[float, float]]:
    """Values at the ends of each heatmap's colours, the same for all points and bins; without curves of tau alone."""
    profile = inputs.profile
    places = product(range(len(profile.points)), range(len(profile.length_bins)))
    found = [cells_of(inputs, point, length_bin) for point, length_bin in places]
    domains = {"tau": (0.0, 1.0)}
    if not inputs.curves:
        return domains
    density = np.concatenate([cells.density[cells.tau < 1] for cells in found if cells.density is not None])
    error = np.concatenate([cells.error[cells.tau < 1] for cells in found if cells.error is not None])
    error = error[error > 0]
    domains["density"] = (float(density.min()), float(density.max())) if density.size else (0.0, 1.0)
    # A few heads that lose next to nothing would leave the colours to the others' differences.
    domains["error"] = (float(np.quantile(error, 0.02)), float(error.max())) if error.size else (1e-6, 1.0)
    return {name: (low, high if high > low else low * 1.01 + 1e-9) for name, (low, high) in domains.items()}


def head_rows(inputs: Inputs, point: int, length_bin: int) -> list[dict[str, Any]]:
    """The rows of one heatmap, as the page makes them from the packed arrays."""
    cells, dense = cells_of(inputs, point, length_bin), set(inputs.profile.dense_layers)
    rows = []
    for (layer, head), tau in np.ndenumerate(cells.tau):
        row = {"layer": layer, "head": head, "tau": float(tau), "dense": layer in dense or bool(tau >= 1)}
        for name, values in (("density", cells.density), ("error", cells.error)):
            row[name] = None if values is None else float(values[layer, head])
        rows.append(row)
    return rows


def layer_rows(inputs: Inputs, point: int, length_bin: int) -> list[dict[str, Any]]:
    """Least, median and largest tau of each layer, its mean density and summed error; the table beside the heatmaps."""
    cells, dense = cells_of(inputs, point, length_bin), set(inputs.profile.dense_layers)
    return [
        {
            "layer": layer,
            "dense": layer in dense,
            "least": float(tau.min()),
            "median": float(np.median(tau)),
            "most": float(tau.max()),
            "density": None if cells.density is None else float(cells.density[layer].mean()),
            "error": None if cells.error is None else float(cells.error[layer].sum()),
        }
        for layer, tau in enumerate(cells.tau)
    ]


def packed_heads(inputs: Inputs, limit: int = HEADS_BYTES) -> dict[str, Any]:
    """All heatmaps and curves, as fine as ``limit`` bytes allow.

    Raises:
        ReportError: even the coarsest does not fit.
    """
    for bits, most in COARSER:
        packed = _packed(inputs, bits, most)
        if len(gzip.compress(json.dumps(packed).encode(), 6)) * 4 / 3 <= limit:
            return packed
    heads = inputs.profile.model.layers * inputs.profile.model.query_heads
    count = len(inputs.profile.points) * len(inputs.profile.length_bins)
    raise ReportError(
        f"{count} heatmaps of {heads:,} heads (operating points times length bins) do not fit one page: report on a profile "
        "with fewer points"
    )


def _packed(inputs: Inputs, bits: int, most: int) -> dict[str, Any]:
    profile = inputs.profile
    low, high = _all_errors(inputs)
    pack = _Packer(bits, low, high)
    bins = range(len(profile.length_bins))
    levels = _levels(inputs, most)
    return {
        "layers": profile.model.layers,
        "heads": profile.model.query_heads,
        "dense": list(profile.dense_layers),
        "bits": bits,
        "errors": [low, high],
        "bins": [keys_in(length_bin) for length_bin in profile.length_bins],
        "points": [point.name for point in profile.points],
        "shown": [next(i for i, p in enumerate(profile.points) if p.name == profile.default_point), 0],
        "cells": [
            [pack.cells(cells_of(inputs, point, length_bin)) for length_bin in bins]
            for point in range(len(profile.points))
        ],
        "levels": [float(inputs.curves[0].grid[level]) for level in levels] if inputs.curves else [],
        "measured_levels": len(inputs.curves[0].grid) if inputs.curves else 0,
        "curves": [_packed_curves(pack, profile, curves, levels) for curves in inputs.curves] if levels else [],
        "gains": [_gains(profile, curves) for curves in inputs.curves],
    }


def _levels(inputs: Inputs, most: int) -> list[int]:
    count = len(inputs.curves[0].grid) if inputs.curves else 0
    if most >= count:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, most)}) if most else []


def _packed_curves(pack: "_Packer", profile: Profile, curves: Curves, levels: list[int]) -> dict[str, Any]:
    shape = (profile.model.layers, profile.model.query_heads, len(levels))
    density, error = np.ones(shape), np.zeros(shape)
    density[list(curves.layers)] = curves.density[..., levels]
    error[list(curves.layers)] = curves.relative_error[..., levels]
    spread = dict(zip(("low", "middle", "high"), _spread(curves, levels), strict=True))
    return {"density": pack.fraction(density), "error": pack.error(error), "spread": spread}


def _spread(curves: Curves, levels: list[int]) -> Iterator[dict[str, list[float]]]:
    """What a tenth, half and nine tenths of the measured heads stay below, at each level."""
    tables = {"density": curves.density, "error": curves.relative_error}
    for share in (0.1, 0.5, 0.9):
        yield {
            name: [float(f"{value:.4g}") for value in np.quantile(table[..., levels], share, axis=(0, 1))]
            for name, table in tables.items()
        }


def _gains(profile: Profile, curves: Curves) -> list[float | None]:
    gains: list[float | None] = [None] * profile.model.layers
    for layer, gain in zip(curves.layers, curves.gain, strict=True):
        gains[layer] = float(f"{gain:.4g}")
    return gains


def _all_errors(inputs: Inputs) -> tuple[float, float]:
    """Range of the packed errors: from a ten-millionth of the largest, below which nothing is drawn."""
    largest = max((float(curves.relative_error.max()) for curves in inputs.curves), default=0.0)
    return (largest * 1e-7, largest) if largest > 0 else (1e-7, 1.0)


@dataclass(frozen=True)
class _Packer:
    bits: int
    low: float  # errors are packed by their logarithm, from low (1) to high; 0 stays 0
    high: float

    def cells(self, cells: Cells) -> dict[str, str | None]:
        # The page rounds to four digits, and takes 1 for dense: what is less stays less.
        tau = np.where(cells.tau < 1, np.minimum(cells.tau, MOST_SPARSE_TAU), cells.tau)
        return {
            "tau": _base64(tau, 16),  # an input of the runtime: never coarser
            "density": None if cells.density is None else self.fraction(cells.density),
            "error": None if cells.error is None else self.error(cells.error),
        }

    def fraction(self, values: FloatArray) -> str:
        return _base64(values, self.bits)

    def error(self, values: FloatArray) -> str:
        steps = 2**self.bits - 1
        place = np.log(np.maximum(values, self.low) / self.low) / np.log(self.high / self.low)
        return _base64(np.where(values > 0, (1 + place * (steps - 1)) / steps, 0.0), self.bits)


def _base64(values: FloatArray, bits: int) -> str:
    whole = np.rint(np.clip(values, 0, 1) * (2**bits - 1)).astype(f"<u{bits // 8}")
    return base64.b64encode(whole.tobytes()).decode()
