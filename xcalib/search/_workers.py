"""Who works on a trial, and whether they still do: a killed worker must be found out, a slow one must not."""

import os
import platform
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial

__all__ = ["Heartbeat", "StaleWatch", "Worker", "is_alive", "is_signed"]

WORKER, BEAT = "worker", "beat"  # user attributes of a trial
BEAT_SECONDS = 30.0
SILENCE_SECONDS = 5 * BEAT_SECONDS  # of a worker on another machine, before it counts as dead
UNSIGNED_SECONDS = 10.0  # of a trial that was never signed: its worker died, or is about to sign

_active: set[str] = set()  # workers of this process


class Worker:
    """This process, as others see it; used as a context manager while it works."""

    def __init__(self) -> None:
        self.name = os.urandom(8).hex()

    def __enter__(self) -> "Worker":
        _active.add(self.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.discard(self.name)

    def sign(self, trial: Trial) -> None:
        """Write into the trial who works on it."""
        pid = os.getpid()
        signature = {"host": platform.node(), "machine": _machine(), "pid": pid, "started": _started(pid)}
        trial.set_user_attr(WORKER, {**signature, "run": self.name})


def _machine() -> str:
    """Where process numbers mean the same: one boot of one machine, and one container in it."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _started(pid: int) -> int | None:
    """When the process began, in clock ticks since boot: a number used again is another process. None where not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def is_alive(signature: dict[str, Any]) -> bool | None:
    """Whether a trial's worker still runs; None where this machine cannot tell."""
    if (
        signature.get("machine") != _machine() or os.name == "nt"
    ):  # to ask about a process on Windows is to interrupt it
        return None
    pid = int(signature["pid"])
    if pid == os.getpid():
        return signature.get("run") in _active
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return _started(pid) == signature.get("started") and not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Killed, and its parent has not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def is_signed(trial: FrozenTrial) -> bool:
    """Whether the trial says who works on it."""
    return WORKER in trial.user_attrs


class StaleWatch:
    """Tells running trials that nobody works on.

    On this machine the process tells. Elsewhere silence does: a trial whose heartbeat has not changed for long, by this
    process's own clock, so that clocks need not agree.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, float]] = {}

    def is_stale(self, trial: FrozenTrial) -> bool:
        """Whether a RUNNING trial was left by its worker; for some that takes several calls."""
        signature = trial.user_attrs.get(WORKER)
        alive = None if signature is None else is_alive(signature)
        if alive is not None:
            return not alive
        sign_of_life = (trial.user_attrs.get(BEAT), len(trial.intermediate_values), len(trial.params), signature)
        before, since = self._seen.get(trial.number, (None, 0.0))
        if before != sign_of_life:
            self._seen[trial.number] = (sign_of_life, time.monotonic())
            return False
        return time.monotonic() - since > (UNSIGNED_SECONDS if signature is None else SILENCE_SECONDS)


class Heartbeat:
    """Counts in the trial's ``beat`` while a ``with`` block runs, for workers of other machines to see."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        beat = 0
        while not self._done.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._trial.set_user_attr(BEAT, beat)
            except UpdateFinishedTrialError:
                return  # taken over by another worker; telling the trial will say so
            except Exception:  # a storage that cannot be reached: the worker itself will meet that, and say so
                continue

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
