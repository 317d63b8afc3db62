"""Wall time of work that may run on a GPU."""

import time
from types import TracebackType

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Each ``with`` block adds its seconds to :attr:`laps`, the device's queue drained before and after."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = 0.0
        self.laps: list[float] = []

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.laps.append(self._now() - self._started)
