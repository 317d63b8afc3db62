"""Files that are whole or not there, whatever happens while they are written."""

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["append_lines", "remove_left_overs", "replace_file", "sync_folder"]


def replace_file(target: Path, data: bytes) -> None:
    """Write beside, flush to disk, rename: the file is either the old one or the new one. Raises OSError."""
    beside = target.with_name(f".{target.name[:32]}.{secrets.token_hex(8)}.tmp")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        with suppress(OSError):  # a folder that became read-only has a better error under way
            beside.unlink(missing_ok=True)
    sync_folder(target.parent)


def remove_left_overs(target: Path) -> None:
    """Remove what a process left that was killed while it replaced the file; nobody else may be writing it."""
    pattern = re.compile(rf"\.{re.escape(target.name[:32])}\.[0-9a-f]{{16}}\.tmp")
    with suppress(OSError):
        for path in target.parent.iterdir():
            if pattern.fullmatch(path.name):
                path.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, so that a file made or renamed there survives a power cut."""
    with suppress(OSError):  # not every system can sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_lines(path: Path, lines: bytes) -> None:
    """Add to a file of lines and flush it to disk; several processes may. Raises OSError, and then nothing was added.

    Half a line that a machine which died while writing left at the end is cut off first.
    """
    new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if fcntl is not None:
            with suppress(OSError):  # not every file system has locks; short appends do not mix all the same
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = _whole_lines(descriptor)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
    if new:
        sync_folder(path.parent)


def _whole_lines(descriptor: int) -> int:
    """Bytes of the file once what stands behind the last newline is cut off."""
    end = size = os.fstat(descriptor).st_size
    while end:
        begin = max(end - 65536, 0)
        os.lseek(descriptor, begin, os.SEEK_SET)
        newline = os.read(descriptor, end - begin).rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        os.ftruncate(descriptor, end)
    return end
