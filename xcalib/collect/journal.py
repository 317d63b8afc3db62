"""``journal.jsonl``: what was finished, when, how long it took, and the digest that tells whether it is still whole."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from xcalib._files import append_lines
from xcalib._reading import open_regular
from xcalib.errors import CurvesError, ProfileError

__all__ = ["Journal"]

MAX_BYTES = 64 << 20  # of 300,000 units


class Journal:
    """One line for each finished unit, on disk after the unit itself.

    A line has ``unit``, ``sha256`` and ``bytes`` of its file, ``seconds`` of wall clock from when it was found missing (None
    where the worker was killed between the two files), ``finished`` (UTC) and ``pid``. Several processes may append.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests: dict[str, str] = {}
        self._read = 0  # bytes

    def digest(self, unit: str) -> str | None:
        """SHA-256 of a unit's file as it was written last; None for a unit that is not in the journal.

        Raises:
            CurvesError: the journal is no regular file, or larger than any that is written.
        """
        self._read_on()
        return self._digests.get(unit)

    def add(self, unit: str, data: bytes, seconds: float | None) -> None:
        """Append a line.

        Raises:
            CurvesError: it cannot be written.
        """
        line = {
            "unit": unit,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "seconds": None if seconds is None else round(seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "pid": os.getpid(),
        }
        try:
            append_lines(self._path, json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise CurvesError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def _read_on(self) -> None:
        """What was appended since, here and by other processes; lines that are no record say nothing."""
        if not os.path.lexists(self._path):
            return
        try:
            with open_regular(self._path, MAX_BYTES) as file:
                file.seek(self._read)
                for text in file:
                    if not text.endswith(b"\n"):  # half written, or its writer died
                        break
                    self._read += len(text)
                    self._take(text)
        except ProfileError as error:
            raise CurvesError(f"{error}; remove it, and finished units are taken as they are") from None

    def _take(self, text: bytes) -> None:
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            line: Any = json.loads(text)
            self._digests[str(line["unit"])] = str(line["sha256"])
