"""What a model and its samples need, and how many heads at a time fit into what the user allows (``--max-memory``)."""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from xcalib._machine import host_memory
from xcalib.collect.chunks import HeadChunks
from xcalib.collect.curves import CollectSettings
from xcalib.collect.memory import most_heads
from xcalib.collect.ranks import ALONE, Ranks
from xcalib.collect.workload import Phase, Workload
from xcalib.data import SampleSet
from xcalib.errors import MemoryLimitError
from xcalib.models.structure import describe_model

__all__ = ["chunks_for_search", "chunks_within", "collect_phases", "parse_memory", "workload_of"]

_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?)(?:i?B)?\Z", re.ASCII | re.IGNORECASE)
CANDIDATES = 8  # that a target `drop` compares in one evaluation (xcalib.search.plan)
FIRST_USE = 128 * 2**20  # what libraries still load and set aside when the first sample runs (docs/memory.md)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(text: str) -> int:
    """Read ``8G``, ``1.5 GiB`` or ``600M`` as bytes; units are powers of 1,024.

    Raises:
        MemoryLimitError: it is none of these, or less than a byte.
    """
    match = _SIZE.match(text.strip())
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise MemoryLimitError(f"max-memory is {text!r}, expected a size such as 8G or 600M")
    return size


def workload_of(
    model: Any, sets: Sequence[SampleSet], settings: CollectSettings, *, plans: int = 3, ranks: int = 1
) -> Workload:
    """The numbers of a transformers decoder and of its samples, of which the longest counts.

    Args:
        model: a transformers causal language model.
        sets: that it is measured on, one after the other.
        settings: of the measurement.
        plans: thresholds that are compared on held-out data.
        ranks: that share the samples.
    """
    config, identity = model.config.get_text_config(), describe_model(model)
    parameter = next(model.parameters())
    samples = [sample for one in sets for sample in one.samples]
    return Workload(
        layers=identity.layers,
        query_heads=identity.query_heads,
        kv_heads=identity.kv_heads,
        head_dim=identity.head_dim,
        hidden=int(config.hidden_size),
        intermediate=_intermediate(config),
        vocabulary=int(config.vocab_size),
        weight_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        length=max(len(sample.tokens) for sample in samples),
        element=parameter.element_size() if parameter.is_floating_point() else 2,
        samples=max(-(-len(one.samples) // ranks) for one in sets),
        block_size=settings.block_size,
        levels=len(settings.grid),
        every=settings.gain_every,
        allocations=len(settings.joint_densities),
        plans=plans,
        asking=any(sample.answers for sample in samples),
        triton=parameter.device.type == "cuda",
        host=parameter.device.type != "cuda",
        stride=settings.stride,
        pattern=settings.pattern,
    )


def _is_spread(model: Any) -> bool:
    """Whether the parameters are on several devices, or are brought there from elsewhere."""
    kinds = {parameter.device for parameter in model.parameters()}
    return len(kinds) > 1 or any(device.type == "meta" for device in kinds)


def _intermediate(config: Any) -> int:
    """Width of the MLP, or of all experts that one token visits."""
    visited = getattr(config, "num_experts_per_tok", None)
    if visited:
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        return int(visited) * int(width)
    return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)


def collect_phases(settings: CollectSettings) -> tuple[Phase, ...]:
    """What a collection runs."""
    others: dict[str, tuple[Phase, ...]] = {"fisher": ("gradients",), "mass": ("mass",)}
    return ("sweep", "gains", "joint", *(phase for name in settings.measures for phase in others[name]))


def chunks_within(
    model: Any,
    sets: Sequence[SampleSet],
    settings: CollectSettings,
    phases: Iterable[Phase],
    max_memory: int | None,
    ranks: Ranks = ALONE,
    *,
    plans: int = 1,
) -> HeadChunks:
    """Heads at a time with which every phase is predicted to stay within ``max_memory`` bytes.

    On a CPU the limit is on the whole process: what it holds already, beside the weights, counts; None is the memory that this
    machine, or a control group, has for it, shared evenly with the other ranks there. On a GPU it is on tensors; None is no
    limit, as memory that runs out is found out there.

    Raises:
        MemoryLimitError: one head at a time is too much already.
    """
    if _is_spread(model):
        if max_memory is None:
            return HeadChunks()
        raise MemoryLimitError("--max-memory (max_memory) is for a model on one device: leave it out with a device map")
    load = workload_of(model, sets, settings, plans=plans, ranks=ranks.size)
    limit, allowed = max_memory, "are allowed"
    if limit is None and load.host:
        limit, allowed = _for_process(ranks.local_size)
    if limit is None:
        return HeadChunks()
    beyond = max(0, _resident() - load.weight_bytes) if load.host else 0
    return HeadChunks(most_heads(load, phases, limit, beyond, allowed))


def chunks_for_search(
    model: Any,
    sets: Sequence[SampleSet],
    heldout: SampleSet | None,
    settings: CollectSettings,
    max_memory: int | None,
    ranks: Ranks = ALONE,
    *,
    collecting: bool,
    rounds: bool,
    plans: int,
    asking: bool,
) -> HeadChunks:
    """As :func:`chunks_within`, for all that a search runs: a collection, rounds after it, and the held-out evidence.

    ``plans`` are its operating points; ``asking`` is for a target that the calibration's questions decide.
    """
    if heldout is not None:
        chunks_within(model, (heldout,), settings, ("evaluate",), max_memory, ranks, plans=plans)
    if asking:  # of several candidates at once (xcalib.search.drop)
        chunks_within(model, sets, settings, ("evaluate",), max_memory, ranks, plans=max(plans, CANDIDATES))
    phases: list[Phase] = [*collect_phases(settings)] if collecting else []
    phases += ["slopes"] if rounds else []
    return chunks_within(model, sets, settings, phases, max_memory, ranks) if phases else HeadChunks()


def _for_process(local_ranks: int) -> tuple[int | None, str]:
    """Bytes that each of some processes on this machine may take, None where that cannot be read, and what to say of them."""
    installed, grouped = host_memory(), _cgroup_limit()
    known = [size for size in (installed, grouped) if size is not None]
    if not known:
        return None, ""
    whose = "this machine has" if min(known) == installed else "the control group (cgroup) of this process allows"
    share = f" for each of {local_ranks} ranks" if local_ranks > 1 else ""
    return min(known) // local_ranks, f"are all that {whose}{share}"


def _cgroup_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the Linux control groups which this process is in allow, None where they set no limit.

    Of version 2 (``memory.max``) or 1 (``memory.limit_in_bytes``); every group up to the topmost one counts. In a container the
    file system may show the process's own group as the topmost, whatever its path is said to be.
    """
    limits = []
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return None
    for line in lines:
        _number, controllers, path = [*line.split(":", 2), "", ""][:3]
        top, name = root / "sys/fs/cgroup", "memory.max"
        if controllers:
            top, name = top / "memory", "memory.limit_in_bytes"
            if "memory" not in controllers.split(","):
                continue
        parts = [part for part in path.split("/") if part]
        names = [] if ".." in parts else parts
        limits += [_number_in(top.joinpath(*names[:depth], name)) for depth in range(len(names) + 1)]
    return min((limit for limit in limits if limit is not None), default=None)


def _number_in(path: Path) -> int | None:
    """What a file holds, None where it holds no number, as ``max``, or is not there."""
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None


def _resident() -> int:
    """Bytes of memory that this process holds, or where only its peak can be read that, and will hold in libraries."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") + FIRST_USE
    except (OSError, ValueError, IndexError):
        import resource  # where there is no /proc

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return FIRST_USE + (peak if sys.platform == "darwin" else peak * 1024)
