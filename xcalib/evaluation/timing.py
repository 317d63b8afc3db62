"""Wall time of work that may run on a GPU."""

import time
from collections.abc import Sequence
from types import TracebackType

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Each ``with`` block adds its seconds to :attr:`laps`, the devices' queues drained before and after."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = [device for device in devices if device.type == "cuda"]
        self._started = 0.0
        self.laps: list[float] = []

    def _now(self) -> float:
        for device in self._devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.laps.append(self._now() - self._started)
