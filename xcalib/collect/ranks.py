"""Several processes at one collection or search: each measures a share of the samples, and all know what all found.

A process learns its place from the environment that ``torchrun`` sets (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``,
``MASTER_PORT``). What is measured travels as bytes of safetensors through collectives of the gloo backend, on GPUs too: the
sums are on the host by then, a few megabytes a sample. How a death is found out: :mod:`xcalib.collect.watch`.
"""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import distributed

from xcalib._lock import RANK_VARIABLES
from xcalib.collect.watch import KEPT, Watch, own_name
from xcalib.errors import ModelError, RankError, XcalibError
from xcalib.progress import Progress

__all__ = ["ALONE", "LAUNCHED", "Place", "Ranks", "describe"]

Arrays = dict[str, np.ndarray]
Result = TypeVar("Result")

LAUNCHED = "XCALIB_LAUNCHED"  # set by --workers: the launcher holds the store, and says what a death was
START = timedelta(minutes=10)  # for all ranks to be there
WAIT_SECONDS = 7 * 24 * 3600.0  # for the slowest share; XCALIB_RANK_TIMEOUT
VERDICT_SECONDS = 60.0  # between a connection that broke and the word about who died


@dataclass(frozen=True)
class Place:
    """Which rank this process is, of how many; which one of its host, of how many there."""

    rank: int
    size: int
    local: int
    local_size: int = 1

    @classmethod
    def of_environment(cls) -> "Place | None":
        """What ``torchrun`` or ``--workers`` said; None for a process by itself.

        Without ``LOCAL_WORLD_SIZE`` all ranks count as on one host.
        """
        if any(name not in os.environ for name in RANK_VARIABLES):
            return None
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        try:
            rank, size, local = (int(os.environ[name]) for name in names)
            here = min(max(int(os.environ.get("LOCAL_WORLD_SIZE", size)), 1), size)
        except ValueError as error:
            raise RankError(f"{', '.join(names)} and LOCAL_WORLD_SIZE must be numbers: {error}") from error
        return cls(rank, size, local, here) if size > 1 else None


class Ranks:
    """This process among those of one job; :data:`ALONE` is one by itself, and asks nothing of torch.distributed.

    All ranks must make the same calls in the same order. As a context manager it ends the connection when all are done.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_size: how many of them are on this host, and share its memory.
    """

    def __init__(self, place: Place | None = None, group: Any = None, watch: Watch | None = None) -> None:
        self.rank, self.size = (place.rank, place.size) if place else (0, 1)
        self._local, self.local_size = (place.local, place.local_size) if place else (0, 1)
        self._group = group
        self._watch = watch

    @classmethod
    def open(cls, *, says: Callable[[str], None] | None = None) -> "Ranks":
        """Connect with the other ranks, or be alone where the environment names none.

        From then on a rank that dies, or that leaves with an error, ends this process within moments (``os._exit``): the main
        thread may be in a kernel or a collective, and would not listen. What was finished is on disk.

        Args:
            says: prints the one line about it, on one rank; default to stderr.

        Raises:
            RankError: the others cannot be reached.
        """
        place = Place.of_environment()
        if place is None:
            return cls()
        launched = LAUNCHED in os.environ
        try:
            _connect(place, launched)
            group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=_wait_seconds()))
            watch = _watch(cls(place, group), silent=launched, says=says)
        except (RuntimeError, OSError) as error:
            said = str(error).strip().splitlines()
            raise RankError(
                f"rank {place.rank} cannot reach the others: {said[0] if said else type(error).__name__}"
            ) from error
        return cls(place, group, watch)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    @property
    def leader(self) -> bool:
        """Whether this is rank 0, which alone prints, draws and writes results."""
        return self.rank == 0

    def close(self) -> None:
        """Wait until all are done, and part; a death after this concerns nobody."""
        if self._watch is not None:
            self.arrive()
            self._watch.part()
            self._watch = None

    def leave(self, code: int, message: str | None = None) -> None:
        """End the job with an exit code: rank 0 prints the message of another rank, then all of them end.

        On rank 0 it returns, for it has a message of its own to print; the others end when it has ended.
        """
        if self._watch is not None:
            self._watch.leave(code, message)

    def device(self, asked: str | None) -> str | None:
        """The torch device of this rank: ``cuda`` or no device asked for become the GPU with its number on this host.

        Raises:
            ModelError: the host has fewer GPUs than ranks.
        """
        if self.size == 1 or asked not in (None, "cuda") or not torch.cuda.is_available():
            return asked
        count = torch.cuda.device_count()
        if self._local >= count:
            raise ModelError(
                f"rank {self.rank} is number {self._local} on its host (from 0), which has {count} GPUs: start one rank a GPU, "
                "or give --device cpu"
            )
        torch.cuda.set_device(self._local)  # Triton launches on the current device
        return f"cuda:{self._local}"

    def progress(self, progress: Progress) -> Progress:
        """Rank 0 draws the steps of all ranks; the others only report theirs."""
        return progress if self._watch is None else self._watch.progress(progress)

    def lowest(self, values: np.ndarray) -> np.ndarray:
        """The least of all ranks' values, element by element; int64 of one shape everywhere."""
        if self.size == 1:
            return values
        tensor = torch.from_numpy(np.array(values, dtype=np.int64))
        self._collective(lambda: distributed.all_reduce(tensor, distributed.ReduceOp.MIN, group=self._group))
        return tensor.numpy()

    def broadcast(self, arrays: Mapping[str, np.ndarray] | None, source: int = 0) -> Arrays:
        """What the source has, on every rank; the others may pass None."""
        if self.size == 1:
            return dict(arrays or {})
        mine = self.rank == source
        # not ascontiguousarray: that would give a single number a dimension
        data = save({key: np.asarray(value, order="C") for key, value in (arrays or {}).items()}) if mine else b""
        size = torch.tensor([len(data)])
        self._collective(lambda: distributed.broadcast(size, source, group=self._group))
        tensor = torch.empty(int(size), dtype=torch.uint8)
        if mine:
            tensor.copy_(torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)))
        self._collective(lambda: distributed.broadcast(tensor, source, group=self._group))
        return dict(arrays or {}) if mine else load(tensor.numpy().tobytes())

    def same(self, array: np.ndarray) -> np.ndarray:
        """Rank 0's array: what all computed from the same figures may differ in the last bit between processors."""
        return self.broadcast({"array": array})["array"]

    def arrive(self) -> None:
        """Wait for all ranks.

        Raises:
            RankError: one did not come in time; rank 0 names it.
        """
        if self.size > 1:
            wait = timedelta(seconds=_wait_seconds())
            self._collective(lambda: distributed.monitored_barrier(self._group, timeout=wait, wait_all_ranks=True))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank fails on all of them, in one line: its own where it failed, that of the lowest elsewhere."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        if self.size == 1:
            if failed is not None:
                raise failed
            return
        first = int(self.lowest(np.array([self.size if failed is None else self.rank]))[0])
        if first == self.size:
            return
        said = describe(failed) if failed is not None else ""
        text = self.broadcast({"text": _bytes(f"rank {self.rank} on {own_name()}: {said}")}, first)["text"]
        if self.rank == first and failed is not None:
            raise failed
        raise RankError(bytes(text).decode()) from None

    def in_turn(self, make: Callable[[], Result]) -> Result:
        """What ``make`` gives, one rank after the other; a failure of one is everybody's, and the next ones make nothing."""
        made: list[Result] = []
        for turn in range(self.size):
            with self.together():
                if turn == self.rank:
                    made.append(make())
        return made[0]

    def _collective(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:
            self._give_up(error)

    def _give_up(self, error: RuntimeError) -> NoReturn:
        """A collective failed: mostly since a rank died, and then the watch ends this process first."""
        said = " ".join(str(error).split())
        if self._watch is not None and "onnection" in said:
            time.sleep(VERDICT_SECONDS)
        late = re.search(r"Ranks? ([\d, ]+) failed to pass", said)
        if late is not None:
            raise RankError(
                f"rank {late[1]} did not finish its share within {_wait_seconds():,.0f} s of the others' "
                f"(XCALIB_RANK_TIMEOUT); {KEPT}"
            ) from error
        raise RankError(f"rank {self.rank} lost the others: {said[:300]}; {KEPT}") from error


ALONE = Ranks()


def describe(error: Exception) -> str:
    """An error in one line, as the command line prints it."""
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    usage = getattr(error, "format_message", None)  # a usage error of the command line
    text = str(error if usage is None else usage())
    return " ".join((text if isinstance(error, XcalibError) or usage else f"{type(error).__name__}: {text}").split())


def _connect(place: Place, launched: bool) -> None:
    """The default process group, unless the program has one."""
    if distributed.is_initialized():
        return
    store = None
    if launched:  # the launcher holds it, so that no port is lost between choosing and opening it
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(*address, place.size, is_master=False, timeout=START)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=START)


def _watch(ranks: Ranks, *, silent: bool, says: Callable[[str], None] | None) -> Watch:
    host = os.environ["MASTER_ADDR"]
    if ranks.leader:
        token = secrets.token_hex(16)
        listener = Watch.listen(host)
        port = listener.getsockname()[1]
        ranks.broadcast({"port": np.array(port), "token": _bytes(token)})
        return Watch.accept(listener, token, ranks.size, START.total_seconds(), silent=silent, says=says)
    found = ranks.broadcast(None)
    where = (host, int(found["port"]))
    token = bytes(found["token"]).decode()
    return Watch.connect(where, token, ranks.rank, START.total_seconds(), silent=silent, says=says)


def _wait_seconds() -> float:
    text = os.environ.get("XCALIB_RANK_TIMEOUT")
    try:
        seconds = WAIT_SECONDS if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e9:
        raise RankError(f"XCALIB_RANK_TIMEOUT is {text!r}, expected seconds above 0")
    return seconds


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(bytearray(text.encode()), dtype=np.uint8)
