"""Finished units of work on disk, so that a killed collection goes on where it stopped."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from xcalib._arrays import read_arrays
from xcalib._reading import check_inside
from xcalib.collect.curves import write_atomically
from xcalib.collect.reading import read_record
from xcalib.errors import CurvesError, ProfileError

__all__ = ["Units"]


class Units:
    """A folder with ``collect.json`` (what is being measured) and ``units/*.safetensors`` (what is done)."""

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], *, resume: bool) -> None:
        """Open or make the folder.

        Raises:
            CurvesError: it cannot be written, holds another collection, or an unfinished one without ``resume``.
        """
        self.folder = Path(folder)
        self._units = self.folder / "units"
        plan = self.folder / "collect.json"
        wanted = json.loads(json.dumps(dict(identity)))
        if plan.is_file():
            self._check_same(plan, wanted, resume)
        elif self.folder.is_dir() and any(not _left_over(path) for path in self.folder.iterdir()):
            raise CurvesError(f"{self.folder}: is not empty and holds no collection; choose another folder")
        try:
            self._units.mkdir(parents=True, exist_ok=True)
            check_inside(self._units, self.folder)
            for path in filter(_left_over, self.folder.glob(".*.tmp")):
                path.unlink()
        except OSError as error:
            raise CurvesError(f"{self.folder}: cannot be made: {error.strerror or error}") from error
        except ProfileError as error:
            raise CurvesError(str(error)) from None
        if not plan.is_file():
            write_atomically(plan, json.dumps(wanted, indent=1, sort_keys=True).encode() + b"\n")
        self._stamp = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()

    def _check_same(self, plan: Path, wanted: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise CurvesError(
                f"{self.folder}: already holds a collection; go on with --resume, or choose another folder"
            )
        try:
            found = read_record(plan)
        except ProfileError as error:
            raise CurvesError(f"{error}; remove the folder and collect again") from error
        different = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
        if different:
            raise CurvesError(
                f"{self.folder}: was started with another {', '.join(different)}; use the same options, or another folder"
            )

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """A finished unit's arrays, or None when it is not finished (a damaged file counts as not finished)."""
        path = self._units / f"{name}.safetensors"
        try:
            check_inside(path, self.folder)
            arrays = read_arrays(path)
        except ProfileError:
            return None
        return arrays if arrays.pop("stamp", np.zeros(0, np.uint8)).tobytes().hex() == self._stamp else None

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a unit whole or not at all."""
        stamp = np.frombuffer(bytes.fromhex(self._stamp), dtype=np.uint8)
        write_atomically(
            self._units / f"{name}.safetensors",
            # not ascontiguousarray: that would give a single number a dimension
            save({**{k: np.asarray(v, order="C") for k, v in arrays.items()}, "stamp": stamp}),
        )

    def discard(self) -> None:
        """Remove the units once the curves that they make are saved."""
        shutil.rmtree(self._units, ignore_errors=True)


def _left_over(path: Path) -> bool:
    """What a collection killed at its start, or while writing, leaves behind."""
    if path.name == "units":
        return path.is_dir() and not any(path.iterdir())
    return path.suffix == ".tmp" and path.name.startswith((".collect.json.", ".curves."))
