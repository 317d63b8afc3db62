"""One process at a time in a folder or on an output file; the second one is refused and told who is at work.

The lock is ``flock`` on a small file, which names its owner. The system lets go of it when the owner ends, however it ends, so
that a killed one blocks nobody. On NFS it holds between machines as far as the server's lock manager works (Linux passes
``flock`` on as byte-range locks); on a file system without locks there is a warning, and no protection.

Under ``torchrun`` the processes of one job share a folder: rank 0 alone takes the lock, for all of them.
"""

import errno
import json
import os
import platform
import shutil
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from xcalib.errors import BusyError, XcalibWarning

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_NAME", "RANK_VARIABLES", "Lock", "alone", "lock_file", "lock_folder", "rank", "remove_folder"]

LOCK_NAME = ".xcalib.lock"
# Set by torchrun. All have to be there: cluster managers set some of them for other purposes.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held: dict[str, tuple[int, int]] = {}  # of this process: lock file to its descriptor and how often it is held
_guard = threading.RLock()  # reentrant: the garbage collector may let go of another lock meanwhile


def lock_folder(folder: Path) -> "Lock":
    """Take a folder that is there.

    Raises:
        BusyError: another process is at work in it.
        OSError: it cannot be written.
    """
    return Lock(folder / LOCK_NAME, f"{folder}", "folder")


def lock_file(path: Path) -> "Lock":
    """Take an output file, which need not be there; as :func:`lock_folder`."""
    return Lock(path.with_name(f".{path.name}.lock"), f"{path}", "file")


def remove_folder(folder: Path) -> None:
    """Remove a folder of work, unless another process is at work in it or in a folder right below.

    Raises:
        BusyError: one is.
        OSError: it cannot be removed.
    """
    if not folder.is_dir():
        return
    with ExitStack() as held:
        below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
        for each in (folder, *below):
            held.enter_context(lock_folder(each))
        shutil.rmtree(folder)


class Lock:
    """Held until :meth:`close`, the end of a ``with`` block, or of the process, which may take it more than once."""

    def __init__(self, path: Path, what: str, kind: str) -> None:
        self._release: Callable[[], Any] = lambda: None
        if fcntl is None or rank() > 0:
            return
        key = os.path.realpath(path)
        with _guard:
            descriptor, count = _held.get(key, (None, 0))
            if descriptor is not None and not _is_at(descriptor, path):  # its folder was removed and made again
                os.close(_held.pop(key)[0])
                descriptor = None
            _held[key] = (_take(path, what, kind) if descriptor is None else descriptor, count + 1)
        self._release = weakref.finalize(self, _let_go, key, os.getpid())

    def close(self) -> None:
        """Let go; a second time does nothing."""
        self._release()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _let_go(key: str, pid: int) -> None:
    with _guard:
        if pid != os.getpid() or key not in _held:  # a forked child's copy
            return
        descriptor, count = _held.pop(key)
        if count > 1:
            _held[key] = (descriptor, count - 1)
            return
        with suppress(OSError):  # while it is still held: whoever opened it finds out in _take
            if _is_at(descriptor, Path(key)):  # not another's, in a folder that was made again
                Path(key).unlink()
        os.close(descriptor)


def _number(variable: str, default: int) -> int:
    text = os.environ[variable] if all(name in os.environ for name in RANK_VARIABLES) else ""
    return int(text) if text.isdecimal() else default


def rank() -> int:
    """Of this process in its job; 0 where it is the only one."""
    return _number("RANK", 0)


def alone() -> bool:
    """Whether this process is not one of several ranks of a job."""
    return _number("WORLD_SIZE", 1) <= 1


def _take(path: Path, what: str, kind: str) -> int:
    """A descriptor that holds the lock."""
    while True:
        descriptor = os.open(
            path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666
        )  # may be a stranger's folder
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                break
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise BusyError(
                f"{what}: {owner} is at work on it; wait for it, end it, or choose another {kind}"
            ) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                os.close(descriptor)
                raise
            warnings.warn(f"{what}: this file system has no locks; start no second process on it", XcalibWarning, 4)
            break
        os.close(descriptor)  # its owner removed it between the two calls
    with suppress(OSError):  # a full disk: held all the same, by a nameless process
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_signature()).encode(), 0)
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _signature() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": platform.node(), "started": _started()}


def _started() -> str:
    """When this process began, local time; now where the system does not tell."""
    began = time.time()
    with suppress(OSError, ValueError, LookupError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
        began = int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    return datetime.fromtimestamp(began).astimezone().isoformat(" ", "seconds")


def _owner(descriptor: int) -> str:
    for _ in range(20):  # it may just be signing
        with suppress(ValueError, LookupError, TypeError):
            found = json.loads(os.pread(descriptor, 4096, 0))
            return f"process {found['pid']} on {found['host']}, started {found['started']},"
        time.sleep(0.01)
    return "another process"


def _forget() -> None:
    """In a forked child: the lock is its parent's, and must not outlive it through the child's descriptor."""
    global _guard  # noqa: PLW0603 - another thread of the parent may have had it
    _guard = threading.RLock()
    for descriptor, _ in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)
