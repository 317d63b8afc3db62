"""The plan of a calibration on some devices: time, memory, disk and cost of every step, and what does not fit."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from xcalib.choices import Sharding
from xcalib.errors import PlanError
from xcalib.plan import cost
from xcalib.plan.cost import Work
from xcalib.plan.machine import Machine
from xcalib.plan.memory import Spread, device_bytes, disk_bytes
from xcalib.plan.shape import ModelShape
from xcalib.plan.steps import Batch, Job, Step, steps

__all__ = ["COLLECT", "CalibrationPlan", "Placement", "PlannedStep", "Sharding", "plan_calibration"]

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
COLLECT = ("samples", "gains", "joint losses")  # the steps of `xcalib collect`
USABLE = 0.92  # of a device's memory: its context, fragments and libraries take the rest


@dataclass(frozen=True)
class Placement:
    """How devices share the work.

    Attributes:
        gpus: devices there are.
        shards: devices that hold one copy of the model.
        spread: ``layers``: each holds some blocks, and one works at a time; ``heads``: each holds a part of every block, and
            all work at once (tensor parallel).
    """

    gpus: int
    shards: int
    spread: Spread

    @property
    def replicas(self) -> int:
        """Copies of the model, which share the samples."""
        return self.gpus // self.shards


@dataclass(frozen=True)
class PlannedStep:
    """One step on the devices; of two figures the first holds where no round moves a head, the second where all do.

    Attributes:
        name: of the step.
        passes: what runs.
        flops: on all devices.
        seconds: from beginning to end, as predicted.
        memory: bytes on the fullest device, by kind.
        fits: whether they do.
        busy: share of the replicas' time that is worked in.
        assumed: operations whose rates nobody measured on this machine.
    """

    name: str
    passes: str
    flops: tuple[float, float]
    seconds: tuple[float, float]
    memory: Mapping[str, float]
    fits: bool
    busy: float
    assumed: tuple[str, ...]

    @property
    def peak(self) -> float:
        """Bytes on the fullest device."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class CalibrationPlan:
    """What a calibration will take.

    Attributes:
        shape: of the model.
        job: what is calibrated.
        machine: whose rates these are.
        dtype: of the weights.
        placement: of the model and the samples.
        steps: in order.
        disk: bytes by kind, all lengths.
        price: of one device for an hour.
        notes: what does not fit, what stands idle, and what helps.
    """

    shape: ModelShape
    job: Job
    machine: Machine
    dtype: str
    placement: Placement
    steps: tuple[PlannedStep, ...]
    disk: Mapping[str, float]
    price: float | None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every step does."""
        return all(step.fits for step in self.steps)

    def seconds(self, names: Sequence[str] | None = None) -> tuple[float, float]:
        """From beginning to end, at least and at most: the machine's margin on both sides."""
        chosen = [step for step in self.steps if names is None or step.name in names]
        low, high = (sum(step.seconds[end] for step in chosen) for end in (0, 1))
        return low * (1 - self.machine.margin), high * (1 + self.machine.margin)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        low, high = self.seconds()
        hours = [seconds * self.placement.gpus / 3600 for seconds in (low, high)]
        return {
            "model": asdict(self.shape),
            "job": asdict(self.job),
            "dtype": self.dtype,
            "machine": {key: value for key, value in self.machine.record().items() if key != "rates"},
            "placement": asdict(self.placement) | {"replicas": self.placement.replicas},
            "steps": [asdict(step) | {"peak_bytes": step.peak} for step in self.steps],
            "disk_bytes": dict(self.disk),
            "collect_seconds": list(self.seconds(COLLECT)),
            "seconds": [low, high],
            "gpu_hours": hours,
            "cost": None if self.price is None else [self.price * value for value in hours],
            "fits": self.fits,
            "notes": list(self.notes),
        }


def plan_calibration(
    shape: ModelShape,
    job: Job,
    machine: Machine,
    *,
    gpus: int = 1,
    dtype: str | None = None,
    sharding: Sharding = "auto",
    price: float | None = None,
) -> CalibrationPlan:
    """Predict a calibration; nothing is run and no weights are needed.

    Args:
        shape: of the model.
        job: what is calibrated.
        machine: rates of one device.
        gpus: devices, or processes on a CPU.
        dtype: of the weights; default the machine's.
        sharding: how a model that one device cannot hold is spread over as few as can; ``auto``: whichever takes less time.
        price: of one device for an hour.

    Raises:
        PlanError: an argument makes no sense, or the machine lacks a rate.
    """
    dtype = dtype or machine.dtype
    if dtype not in BYTES:
        raise PlanError(f"dtype is {dtype!r}, allowed are {', '.join(BYTES)}")
    if gpus < 1 or sharding not in get_args(Sharding):
        raise PlanError(f"gpus is {gpus} and sharding {sharding!r}: expected at least 1, and {get_args(Sharding)}")
    if shape.max_positions is not None and max(job.lengths) > shape.max_positions:
        raise PlanError(
            f"samples of {max(job.lengths):,} tokens are asked for, but {shape.name} has {shape.max_positions:,} positions: "
            f"choose at most {shape.max_positions}"
        )
    found = [_placed(shape, job, machine, dtype, where, price) for where in _placements(shape, machine, gpus, sharding)]
    best = min(found, key=lambda plan: (_excess(plan), plan.placement.shards, plan.seconds()[1]))
    from xcalib.plan.advice import notes

    return replace(best, notes=tuple(notes(best)))


def _excess(plan: CalibrationPlan) -> int:
    """Steps that do not fit."""
    return sum(not step.fits for step in plan.steps)


def _placements(shape: ModelShape, machine: Machine, gpus: int, sharding: Sharding) -> Iterator[Placement]:
    yield Placement(gpus, 1, "layers")
    for shards in (2**power for power in range(1, gpus.bit_length())):
        if sharding != "heads" and shards <= shape.layers:
            yield Placement(gpus, shards, "layers")
        if sharding != "layers" and shape.kv_heads % shards == 0 and machine.link_bytes_per_second:
            yield Placement(gpus, shards, "heads")


def _placed(
    shape: ModelShape, job: Job, machine: Machine, dtype: str, where: Placement, price: float | None
) -> CalibrationPlan:
    planned = tuple(_step(shape, job, machine, dtype, where, step) for step in steps(shape, job))
    disk: dict[str, float] = {}
    for length in job.lengths:
        for kind, size in _disk(shape, job, length).items():
            disk[kind] = disk.get(kind, 0.0) + size
    return CalibrationPlan(shape, job, machine, dtype, where, planned, disk, price)


def _step(shape: ModelShape, job: Job, machine: Machine, dtype: str, where: Placement, step: Step) -> PlannedStep:
    once = machine.seconds(cost.projections(shape)) / where.shards if step.name == "samples" else 0.0

    def seconds(batches: Sequence[Batch]) -> tuple[float, float]:
        each = [_unit_seconds(batch.unit, machine, dtype, where) for batch in batches]
        turns = [math.ceil(batch.count / where.replicas) for batch in batches]
        whole = once + sum(turn * unit for turn, unit in zip(turns, each, strict=True))
        worked = sum(batch.count * unit for batch, unit in zip(batches, each, strict=True)) / where.replicas
        return whole, worked

    (low, _), (high, worked) = seconds(step.least), seconds(step.most)
    memory = _memory(shape, job, machine, dtype, where, step)
    used = {name.partition(".")[0] for batch in step.most for name, amount in batch.unit.amounts.items() if amount}
    return PlannedStep(
        name=step.name,
        passes=step.passes,
        flops=step.flops,
        seconds=(low, high),
        memory=memory,
        fits=sum(memory.values()) <= USABLE * machine.memory_each(where.gpus),
        busy=min(1.0, (worked + once) / high) if high else 1.0,
        assumed=tuple(sorted(used & set(machine.assumed))),
    )


def _unit_seconds(unit: Work, machine: Machine, dtype: str, where: Placement) -> float:
    seconds = machine.seconds(unit)
    if where.spread != "heads" or where.shards == 1:
        return seconds
    calls = machine.seconds(Work({name: amount for name, amount in unit.amounts.items() if name.endswith(".calls")}))
    moved = 2 * (where.shards - 1) / where.shards * BYTES[dtype] * unit.amounts.get("link.values", 0.0)
    return calls + (seconds - calls) / where.shards + moved / (machine.link_bytes_per_second or math.inf)


def _memory(
    shape: ModelShape, job: Job, machine: Machine, dtype: str, where: Placement, step: Step
) -> dict[str, float]:
    length = max(job.lengths)
    return device_bytes(
        step.phase,
        layers=shape.layers,
        q_heads=shape.q_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        vocabulary=shape.vocabulary,
        parameters=shape.parameters,
        weight_size=BYTES[dtype],
        activation_size=BYTES[dtype],
        length=length,
        block_size=job.block_size,
        levels=job.levels,
        positions=length // job.gain_every,
        points=len(job.densities),
        shards=where.shards,
        spread=where.spread,
        kernels=machine.device == "cuda",
    )


def _disk(shape: ModelShape, job: Job, length: int) -> dict[str, float]:
    return disk_bytes(
        layers=shape.sparse_layers,
        q_heads=shape.q_heads,
        hidden=shape.hidden,
        levels=job.levels,
        length=length,
        positions=length // job.gain_every,
        samples=job.samples,
        rounds=job.rounds,
        points=len(job.densities),
        heldout=job.heldout,
    )
