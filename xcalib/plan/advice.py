"""What a plan's figures mean for whoever reads them: what does not fit, what stands idle, what would help."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xcalib.plan.calibration import CalibrationPlan, PlannedStep

__all__ = ["gigabytes", "notes"]

IDLE = 0.7  # of the replicas' time


def gigabytes(size: float) -> str:
    """``size`` bytes as people say it."""
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= step:
            return f"{size / step:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def notes(plan: "CalibrationPlan") -> Iterator[str]:
    """One sentence each."""
    where = plan.placement
    if where.shards > 1:
        how = "one of them working at a time" if where.spread == "layers" else "all working at once"
        by = "layers" if where.spread == "layers" else "heads (tensor parallel)"
        yield (
            f"{where.shards} GPUs hold one copy of the model, spread by {by}, {how}; {where.replicas} copies share the samples"
        )
    elif where.gpus > 1:
        yield f"each of the {where.gpus} devices holds the whole model; they share the samples"
    for step in plan.steps:
        if not step.fits:
            yield _misfit(plan, step)
    for step in plan.steps:
        if where.replicas > 1 and step.busy < IDLE:
            helps = f"; up to {where.replicas} gain samples take no longer" if step.name == "gains" else ""
            yield f"{step.name}: {1 - step.busy:.0%} of the time is spent waiting for the last samples{helps}"
    if plan.dtype != plan.machine.dtype:
        yield f"the rates are those of {plan.machine.dtype}, not of {plan.dtype}: times are a guess, memory is not"
    assumed = sorted({name for step in plan.steps for name in step.assumed})
    if assumed:
        yield f"rates of {', '.join(assumed)} are assumed, not measured on this machine: replace them with --measure"


def _misfit(plan: "CalibrationPlan", step: "PlannedStep") -> str:
    largest = max(step.memory, key=lambda kind: step.memory[kind])
    memory = plan.machine.memory_each(plan.placement.gpus)
    helps = {
        "weights": ("" if plan.machine.device == "cpu" else "more GPUs to spread the model over, or ")
        + "--offload, which holds one layer at a time",
        "kept for later": "more GPUs to spread the layers over (--shard layers), or a shorter --max-length",
        "logits": "a shorter --max-length does not help: more memory does",
    }.get(largest, "a shorter --max-length, or the model spread by heads (--shard heads)")
    if step.name == "rounds":
        helps += ", or --rounds 0"
    return (
        f"{step.name} does not fit: {gigabytes(step.peak)} on a device of {gigabytes(memory)}, most of it {largest} "
        f"({gigabytes(step.memory[largest])}): {helps}"
    )
