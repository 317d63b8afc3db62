"""Units of work of a tensor-parallel model: all ranks do the same work together, the first one keeps it."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from xcalib.collect.units import Units
from xcalib.errors import CurvesError, XcalibError
from xcalib.models.shards import HeadShards

__all__ = ["SharedUnits"]


class SharedUnits:
    """What :class:`Units` does, the same on every rank; ranks but the first touch no file, so they may be on other hosts.

    Every rank has to make the same calls in the same order.
    """

    def __init__(
        self, folder: str | os.PathLike[str], identity: Mapping[str, Any], shards: HeadShards, *, resume: bool
    ) -> None:
        self.folder = Path(folder)
        self._shards = shards
        self._units: Units | None = None
        failure = b""
        if shards.rank == 0:
            try:
                self._units = Units(folder, identity, resume=resume)
            except XcalibError as error:
                failure = str(error).encode()
        failure = self._told(failure)
        if failure:
            raise CurvesError(failure.decode())

    def close(self) -> None:
        """As :meth:`Units.close`."""
        if self._units is not None:
            self._units.close()

    def __enter__(self) -> "SharedUnits":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, name: str) -> None:
        """As :meth:`Units.begin`."""
        if self._units is not None:
            self._units.begin(name)

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """As :meth:`Units.load`."""
        arrays = None if self._units is None else self._units.load(name)
        # not ascontiguousarray: that would give a single number a dimension
        data = b"" if arrays is None else save({key: np.asarray(value, order="C") for key, value in arrays.items()})
        data = self._told(data)
        return load(data) if data else None

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """As :meth:`Units.save`; what every rank has measured is the same, and the first one's is kept."""
        if self._units is not None:
            self._units.save(name, arrays)

    def read(self, name: str) -> bytes | None:
        """A file of the first rank's folder, None where there is none."""
        path = self.folder / name
        data = b""
        if self._units is not None and path.is_file():
            data = path.read_bytes()
        return self._told(data) or None

    def discard(self) -> None:
        """As :meth:`Units.discard`."""
        if self._units is not None:
            self._units.discard()

    def _told(self, data: bytes) -> bytes:
        """What the first rank gives, on every rank."""
        group = self._shards.group
        device = torch.device("cuda") if torch.distributed.get_backend(group) == "nccl" else torch.device("cpu")
        size = torch.tensor([len(data)], device=device)
        torch.distributed.broadcast(size, group_src=0, group=group)
        content = torch.zeros(int(size), dtype=torch.uint8)
        if self._shards.rank == 0:
            content = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
        content = content.to(device)
        torch.distributed.broadcast(content, group_src=0, group=group)
        return content.cpu().numpy().tobytes()
