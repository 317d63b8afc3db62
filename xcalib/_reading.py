"""Bytes of files from strangers: regular files only, their size asked before anything is read."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from xcalib._yaml import fault

__all__ = ["check_inside", "open_regular", "read_regular"]


@contextmanager
def open_regular(path: str | os.PathLike[str], limit: int) -> Iterator[BinaryIO]:
    """A regular file of at most ``limit`` bytes, open for reading.

    Raises:
        ProfileError: it is none (a folder, pipe or device is never waited for), is larger, or cannot be opened or read.
    """
    name = os.fsdecode(path)
    try:
        with _opened(name) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise fault(name, None, "not a file")
            if found.st_size > limit:
                raise fault(name, None, f"{found.st_size:,} bytes, more than the {limit:,} that are read")
            yield file
    except OSError as error:
        raise fault(name, None, f"cannot be read: {error.strerror or error}") from None


def _opened(name: str) -> BinaryIO:
    try:
        # Asked before opening, for opening a device may do things, and again of what was opened; O_NONBLOCK does not wait
        # for the writer of a pipe that took the file's place in between.
        if not stat.S_ISREG(Path(name).stat().st_mode):
            raise fault(name, None, "not a file")
        return open(os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")  # noqa: PTH123
    except ValueError as error:  # a NUL in the name
        raise fault(name, None, f"cannot be read: {error}") from None


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """All bytes of a file; ProfileError as :func:`open_regular`, also where it grows beyond ``limit`` meanwhile."""
    with open_regular(path, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise fault(os.fsdecode(path), None, f"more than the {limit:,} bytes that are read")
    return data


def check_inside(path: Path, folder: Path) -> None:
    """Raise ProfileError if ``path``, a name inside ``folder``, is a link that leads out of it."""
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        raise fault(os.fsdecode(path), None, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not inside:
        raise fault(os.fsdecode(path), None, "is a link that leads out of its folder")
