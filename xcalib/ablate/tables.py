"""From measured settings to a table: what each variant gives at equal density, and at the tau that the paper fixes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xcalib.ablate.equal import AtDensity, at_density, draw_weights, interval_of
from xcalib.ablate.measure import FloatArray, Measured, Measurement
from xcalib.ablate.paper import PAPER
from xcalib.ablate.variants import Setting, Variant
from xcalib.ablate.verdicts import FEW_SAMPLES, Counts, judge_orders, sentences

__all__ = ["Line", "make_table"]

Record = dict[str, Any]

ROW_FIGURES = (
    *("kl", "kl_interval", "kl_ratio", "kl_ratio_interval", "limit", "measured_densities"),
    *("accuracy", "accuracy_interval", "accuracy_difference", "accuracy_difference_interval"),
)


@dataclass(frozen=True, eq=False)
class Line:
    """A variant with what was measured of it: settings in any order, and the one at the fixed tau, if it has that."""

    variant: Variant
    settings: tuple[Setting, ...]
    fixed: Setting | None = None


def make_table(table: str, lines: Sequence[Line], measurement: Measurement, densities: Sequence[float]) -> Record:
    """The results of a measured table, as JSON values; ``docs/reproduction.md`` names the keys."""
    counts = Counts(len(measurement.dense_accuracy), int((~np.isnan(measurement.dense_accuracy)).sum()))
    weights = draw_weights(counts.samples)
    remarks, rows, orders = [], [], []
    for density in densities:
        found = {line.variant.name: _read(line, measurement, density, weights) for line in lines}
        reached = {name: one for name, one in found.items() if one is not None}
        rows += [_row(line.variant, lines, found, density) for line in lines]
        remarks += [_out_of_reach(line, measurement, density) for line in lines if found[line.variant.name] is None]
        orders += judge_orders(table, [line.variant for line in lines], reached, density, counts)
    dense = float(np.nanmean(measurement.dense_accuracy)) if counts.asking else None
    if counts.samples < FEW_SAMPLES:
        remarks.append(
            f"intervals of {counts.samples} samples are too narrow (docs/search.md): {FEW_SAMPLES} are better"
        )
    return {
        "paper": _paper(table),
        "variants": [_variant(line, measurement) for line in lines],
        "equal_density": rows,
        "orders": orders,
        "agreement": sentences(orders, counts, dense),
        "dense_accuracy": dense,
        "asking": counts.asking,
        "remarks": [
            *remarks,
            *(f"{count} layers stay dense: {why}" for why, count in measurement.dense_reasons.items()),
        ],
    }


def _read(line: Line, measurement: Measurement, density: float, weights: FloatArray) -> AtDensity | None:
    if not line.settings:
        return None
    measured = [measurement.settings[setting.key] for setting in line.settings]
    return at_density(measured, [setting.limit for setting in line.settings], density, weights)


def _out_of_reach(line: Line, measurement: Measurement, density: float) -> str:
    got = sorted(measurement.settings[setting.key].density for setting in line.settings)
    measured = f"measured densities run from {got[0]:.3f} to {got[-1]:.3f}" if got else "nothing could be measured"
    return f"{line.variant.name} is not compared at density {density:g}: {measured}"


def _row(variant: Variant, lines: Sequence[Line], found: Mapping[str, AtDensity | None], density: float) -> Record:
    """Always the same keys; None where a figure does not exist."""
    baseline = next(line.variant for line in lines if line.variant.baseline and line.variant.group == variant.group)
    one, other = found[variant.name], found[baseline.name]
    row: Record = {"density": density, "variant": variant.name, "baseline": baseline.name, "reached": one is not None}
    row |= dict.fromkeys(ROW_FIGURES)
    if one is None:
        return row
    row |= {
        "kl": one.kl,
        "kl_interval": interval_of(np.exp(one.log_kl_draws)),
        "limit": one.limit,
        "measured_densities": one.around,
        "accuracy": one.accuracy,
        "accuracy_interval": interval_of(one.accuracy_draws),
    }
    if other is not None:
        row["kl_ratio"] = one.kl / other.kl
        row["kl_ratio_interval"] = interval_of(np.exp(one.log_kl_draws - other.log_kl_draws))
        if one.accuracy is not None and other.accuracy is not None:
            row["accuracy_difference"] = one.accuracy - other.accuracy
            row["accuracy_difference_interval"] = interval_of(one.accuracy_draws - other.accuracy_draws)
    return row


def _variant(line: Line, measurement: Measurement) -> Record:
    variant = line.variant
    settings = sorted(line.settings, key=lambda setting: measurement.settings[setting.key].density)
    return {
        "name": variant.name,
        "group": variant.group,
        "baseline": variant.baseline,
        "stride": variant.scoring.stride,
        "pattern": variant.scoring.pattern,
        "policy": variant.scoring.policy,
        "order": variant.scoring.order,
        "thresholds": variant.thresholds,
        "figure": variant.figure,
        "settings": [_setting(setting, measurement.settings[setting.key]) for setting in settings],
        "fixed_tau": None if line.fixed is None else _setting(line.fixed, measurement.settings[line.fixed.key]),
    }


def _setting(setting: Setting, one: Measured) -> Record:
    return {
        "limit": setting.limit,
        "mean_limit": float(setting.limits.mean()),
        "density": one.density,
        "kl": one.mean_kl,
        "accuracy": one.mean_accuracy,
        "density_by_sample": (one.kept / one.visible).tolist(),
        "kl_by_sample": (one.kl / one.positions).tolist(),
        "accuracy_by_sample": [None if np.isnan(score) else float(score) for score in one.accuracy],
    }


def _paper(table: str) -> Record:
    source = PAPER[table]
    figures = {name: {"score": one.score, "density": one.density} for name, one in source.figures.items()}
    return {"title": source.title, "setting": source.setting, "source": "arXiv 2503.16428", "figures": figures}
