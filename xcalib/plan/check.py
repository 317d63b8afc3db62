"""Predictions against measured runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xcalib.plan import cost
from xcalib.plan.cost import Work, total
from xcalib.plan.machine import Machine
from xcalib.plan.shape import ModelShape
from xcalib.plan.steps import Job, evaluation, gains, joint, kls, round_slopes, samples

__all__ = ["Row", "check_run"]


@dataclass(frozen=True)
class Row:
    """One step of a run: seconds predicted and measured."""

    step: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def check_run(record: Mapping[str, Any], machine: Machine) -> list[Row]:
    """A run that ``docs/benchmarks/plan/runs.py`` recorded, step by step and as a whole, with the rounds that it came to.

    Args:
        record: the run's JSON.
        machine: with rates that were not fitted to it.
    """
    shape, settings = ModelShape(**record["shape"]), record["settings"]
    lengths, heldout = record["lengths"], record["heldout_lengths"]
    chosen = {key: settings[key] for key in ("stride", "block_size", "gain_samples", "gain_every", "levels")}
    chosen |= {key: tuple(settings[key]) for key in ("joint_densities", "densities")}
    job = Job(lengths=tuple(lengths), samples=1, **chosen)
    few = min(job.gain_samples, len(lengths))

    def allocations(index: int) -> tuple[float, ...]:
        return job.joint_densities if index < few else job.joint_densities[:1]

    works = {
        "samples": cost.projections(shape) + total(samples(shape, job, length) for length in lengths),
        "gains": total(gains(shape, job, length) for length in lengths[:few]),
        "joint losses": total(joint(shape, job, length, allocations(i)) for i, length in enumerate(lengths)),
        "rounds: KL": total(kls(shape, job, length, job.densities) for length in lengths),
        "rounds: slopes": total(round_slopes(shape, job, length) for length in lengths),
        "held-out evaluation": total(evaluation(shape, job, length) for length in heldout),
    }
    dense = total(cost.dense_pass(shape, length) for length in lengths)
    rows: dict[str, Row] = {}
    for phase in record["phases"]:
        step = _step(phase["phase"])
        work = works[step] + (dense if "as found" in phase["phase"] else Work())
        before = rows.get(step, Row(step, 0.0, 0.0))
        rows[step] = Row(step, before.predicted + machine.seconds(work), before.measured + phase["seconds"])
    whole = Row("all", sum(row.predicted for row in rows.values()), sum(row.measured for row in rows.values()))
    return [*rows.values(), whole]


def _step(phase: str) -> str:
    marks = {
        "layer gains": "gains",
        "all layers together": "joint losses",
        "measuring the KL": "rounds: KL",
        "what heads do": "rounds: slopes",
        "Evaluating": "held-out evaluation",
        "samples": "samples",
    }
    return next(step for mark, step in marks.items() if mark in phase)
