"""Finished units of work on disk, so that a killed collection goes on where it stopped."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors.numpy import save

from xcalib._arrays import arrays_of, read_checked
from xcalib._files import sync_folder
from xcalib._lock import LOCK_NAME, Lock, alone, lock_folder, rank
from xcalib._reading import check_inside
from xcalib.collect.curves import write_atomically
from xcalib.collect.journal import Journal
from xcalib.collect.reading import read_record
from xcalib.errors import CurvesError, ProfileError

__all__ = ["Units"]


class Units:
    """A folder with ``collect.json`` (what is being measured), ``units/*.safetensors`` (what is done) and ``journal.jsonl``.

    One process works in it at a time (:mod:`xcalib._lock`): it is locked until :meth:`close`, the end of a ``with`` block, or
    until nobody has this object any more. Ranks of one job share it: under ``torchrun`` rank 0 holds the lock, the others take
    none and go on with what rank 0 begins, and all may load and save units.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], *, resume: bool) -> None:
        """Open or make the folder.

        Raises:
            BusyError: another process is at work in it.
            CurvesError: it cannot be written, holds another collection, or an unfinished one without ``resume``.
        """
        self.folder = Path(folder)
        self._units = self.folder / "units"
        self._journal = Journal(self.folder / "journal.jsonl")
        self._began: dict[str, float] = {}
        wanted = json.loads(json.dumps(dict(identity)))
        self._stamp = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        plan = self.folder / "collect.json"
        if not plan.is_file() and self.folder.is_dir() and any(not _left_over(path) for path in self.folder.iterdir()):
            raise CurvesError(f"{self.folder}: is not empty and holds no collection; choose another folder")
        self._lock = self._locked()
        try:
            if plan.is_file():
                self._check_same(plan, wanted, resume or rank() > 0)
            self._make()
            if not plan.is_file():
                write_atomically(plan, json.dumps(wanted, indent=1, sort_keys=True).encode() + b"\n")
        except BaseException:
            self.close()
            raise

    def _locked(self) -> Lock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return lock_folder(self.folder)
        except OSError as error:
            raise CurvesError(f"{self.folder}: cannot be made: {error.strerror or error}") from error

    def _make(self) -> None:
        try:
            self._units.mkdir(exist_ok=True)
            for path in (self._units, self.folder / "journal.jsonl"):
                check_inside(path, self.folder)
            for folder in (self.folder, self._units) if alone() else (self.folder,):
                for path in folder.glob(".*.tmp"):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise CurvesError(f"{self.folder}: cannot be made: {error.strerror or error}") from error
        except ProfileError as error:
            raise CurvesError(str(error)) from None
        for folder in (self.folder, self.folder.parent):
            sync_folder(folder)

    def close(self) -> None:
        """Let another process work in the folder."""
        self._lock.close()

    def __enter__(self) -> "Units":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
        """A finished unit's arrays, or None when it is not finished (damaged, say, or of other options)."""
        path = self._units / f"{name}.safetensors"
        try:
            check_inside(path, self.folder)
            data = read_checked(path)
            arrays = arrays_of(data, path)
        except ProfileError:
            arrays = {}
        if arrays.pop("stamp", np.zeros(0, np.uint8)).tobytes().hex() == self._stamp:
            written = self._journal.digest(name)
            if written is None:  # killed between the two files
                self._journal.add(name, data, None)
            if written in (None, hashlib.sha256(data).hexdigest()):
                return arrays
        self.begin(name)
        return None

    def begin(self, name: str) -> None:
        """Count the seconds of a unit that is not finished from now on, not from when it was found missing."""
        self._began[name] = time.monotonic()

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a unit whole or not at all, and say so in the journal.

        Raises:
            CurvesError: it cannot be written, on a full disk say; what was saved before is as it was.
        """
        stamp = np.frombuffer(bytes.fromhex(self._stamp), dtype=np.uint8)
        # not ascontiguousarray: that would give a single number a dimension
        data = save({**{k: np.asarray(v, order="C") for k, v in arrays.items()}, "stamp": stamp})
        write_atomically(self._units / f"{name}.safetensors", data)
        began = self._began.pop(name, None)
        self._journal.add(name, data, None if began is None else time.monotonic() - began)

    def discard(self) -> None:
        """Remove the units once the curves that they make are saved."""
        shutil.rmtree(self._units, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder once what it led to is saved, and the one above if nothing else is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()
        with suppress(OSError):
            self.folder.parent.rmdir()


def _left_over(path: Path) -> bool:
    """What a collection killed at its start, or while writing, leaves behind."""
    if path.name == "units":
        return path.is_dir() and not any(path.iterdir())
    if path.name == LOCK_NAME:
        return True
    return path.suffix == ".tmp" and path.name.startswith((".collect.json.", ".curves."))
