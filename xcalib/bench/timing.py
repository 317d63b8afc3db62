"""Times calls: GPU events on CUDA, the wall clock elsewhere; medians with spread."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Budget", "Timing", "measure"]

Call = Callable[[], object]

MOST_RUNS = 200
WARM_UPS = 2


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median_ms: of all runs.
        p20_ms: a fifth was faster.
        p80_ms: a fifth was slower.
        runs: that were timed.
        method: ``"cuda events"`` or ``"wall clock"``.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    runs: int
    method: str


class Budget:
    """Seconds for the whole program; None never ends."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def at_most(self, seconds: float) -> float:
        """The seconds, or what is left if that is less."""
        return seconds if self._end is None else max(0.0, min(seconds, self._end - time.monotonic()))


def measure(calls: Sequence[Call], device: torch.device, limit_seconds: float) -> Timing:
    """Times calls in turn: they do the same work on different memory, so that none finds its input in the cache.

    The first call, which may compile, is not counted. The next two say how many runs fit the limit; if not even three do, they
    are the result themselves.
    """
    timer = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    timer([calls[0]])
    times = timer([calls[index % len(calls)] for index in range(1, 1 + WARM_UPS)])
    fitting = min(MOST_RUNS, int(1e3 * limit_seconds / max(min(times), 1e-3)))
    if fitting > WARM_UPS:
        times = timer([calls[index % len(calls)] for index in range(fitting)])
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, median, p80 = quantiles.tolist()
    return Timing(median, p20, p80, len(times), "cuda events" if device.type == "cuda" else "wall clock")


def _time_on_cpu(calls: Sequence[Call]) -> list[float]:
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _time_on_gpu(calls: Sequence[Call]) -> list[float]:
    """Events around each call; all calls are queued before any is waited for."""
    torch.cuda.synchronize()
    pairs = []
    for call in calls:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in pairs]
