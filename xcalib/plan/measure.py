"""Times the parts of a calibration on this machine, small ones, and fits its rates to them.

On one CPU thread it is the process's own time that counts, so that other programs on the machine matter little; on a GPU, and
with several threads, the time that passes.
"""

from dataclasses import dataclass

import torch

from xcalib._machine import host_memory, processor
from xcalib._yaml import one_line
from xcalib.errors import PlanError
from xcalib.plan.machine import REFERENCE_ONLY, Machine, Timing, fit
from xcalib.plan.timings import Clock, Heads, attention_timings, model_timings, own_time
from xcalib.progress import Progress, silent

__all__ = ["CPU_SIZES", "GPU_SIZES", "Heads", "Sizes", "measure", "measure_machine"]

MARGIN = 0.25  # how far real runs were from what was predicted at most (docs/scale.md)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """What is timed: attention layers; models as (layers, hidden, heads, MLP, vocabulary) with lengths; how often at least."""

    heads: tuple[Heads, ...]
    models: tuple[tuple[int, int, int, int, int], ...]
    lengths: tuple[int, ...]
    positions: int
    least_seconds: float


CPU_SIZES = Sizes(
    heads=tuple(
        Heads(query, key, dimensions, length, block_size)
        for query, key, dimensions in ((8, 2, 32), (9, 3, 64), (2, 1, 128), (6, 2, 128))
        for length, block_size in ((512, 64), (1024, 128), (1536, 64), (2048, 128))
    ),
    models=((2, 128, 4, 512, 2048), (2, 256, 8, 704, 2048), (2, 576, 9, 1536, 16384)),
    lengths=(512, 1024, 2048),
    positions=128,
    least_seconds=0.2,
)
GPU_SIZES = Sizes(
    heads=tuple(
        Heads(query, key, dimensions, length, 128)
        for query, key, dimensions in ((32, 8, 128), (16, 4, 128), (16, 4, 64))
        for length in (4096, 8192, 16384)
    ),
    models=((2, 1024, 8, 3584, 32768), (2, 4096, 32, 14336, 131072)),
    lengths=(2048, 8192, 16384),
    positions=2048,
    least_seconds=0.1,
)


def measure(
    device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None, progress: Progress = silent
) -> list[Timing]:
    """Time small layers of every kind on one device.

    Args:
        device: where.
        dtype: of weights and activations.
        sizes: what is timed; default some that take about a minute.
        progress: draws the work.
    """
    sizes = sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES)
    clock = Clock(device, sizes.least_seconds)
    timings: list[Timing] = []
    with progress("Timing small layers", 1 + len(sizes.heads) + len(sizes.models)) as advance:
        list(attention_timings(sizes.heads[-1], clock, dtype))  # the first of a process takes longer
        advance(1)
        for heads in sizes.heads:
            timings += attention_timings(heads, clock, dtype)
            advance(1)
        for numbers in sizes.models:
            timings += model_timings(numbers, sizes.lengths, sizes.positions, clock, dtype)
            advance(1)
    return timings


def measure_machine(
    name: str,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress = silent,
    sizes: Sizes | None = None,
) -> Machine:
    """This machine's rates.

    Args:
        name: what to call it.
        device: torch device, default ``cuda`` when there is one, else ``cpu``.
        dtype: of weights; default ``bfloat16`` on a GPU, ``float32`` on a CPU.
        progress: draws the work.
        sizes: as for :func:`measure`.

    Raises:
        PlanError: the device or the dtype cannot be used.
    """
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise PlanError(f"device {device!r} cannot be used: {one_line(str(error), 120)}") from error
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise PlanError(f"dtype is {dtype!r}, allowed are {', '.join(DTYPES)}")
    timings = measure(where, DTYPES[dtype], sizes, progress)
    rates, spread = fit(timings, REFERENCE_ONLY if where.type == "cuda" else ())
    clock = "process time, one thread" if own_time(where) else "wall time"
    memory = torch.cuda.get_device_properties(where).total_memory if where.type == "cuda" else host_memory()
    if memory is None:
        raise PlanError("this machine does not say how much memory it has, which a plan needs")
    label = torch.cuda.get_device_name(where) if where.type == "cuda" else processor()
    return Machine(
        name=name,
        device=where.type,
        dtype=dtype,
        memory_bytes=memory,
        rates=rates,
        spread=spread,
        margin=MARGIN,
        assumed=(),
        link_bytes_per_second=None,
        sources=(
            f"{len(timings)} timings of small layers on this {label}, {dtype}, {clock}, by xcalib plan --measure",
        ),
        measured={"processor": label, "threads": torch.get_num_threads(), "clock": clock},
    )
