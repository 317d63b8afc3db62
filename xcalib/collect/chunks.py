"""Key/value heads a few at a time: statistics of heads are independent, so parts of a call give the same bytes as the whole."""

import dataclasses
import gc
import warnings
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from xcalib.errors import MemoryLimitError, XcalibWarning
from xcalib.models.attention import AttentionCall

__all__ = ["HeadChunks", "is_out_of_memory", "memory_error"]

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("allocate memory" in said or "not enough memory" in said)


def memory_error(error: BaseException) -> MemoryLimitError | None:
    """What a failed allocation means to the user, in one line; None for any other error."""
    if not is_out_of_memory(error):
        return None
    first = (str(error).strip().splitlines() or ["no more memory"])[0]
    return MemoryLimitError(
        f"memory ran out ({first[:200]}): lower --max-length or --num-samples, or choose a smaller --dtype"
    )


class HeadChunks:
    """Works through attention calls, as many key/value heads at a time as memory allows.

    Where an allocation fails, the number is halved for good and the work goes on with the heads that are not done. That is said
    once, as an :class:`~xcalib.errors.XcalibWarning`.

    Attributes:
        heads: key/value heads of one part, None for all.
    """

    def __init__(self, heads: int | None = None, *, halving: bool = True) -> None:
        self.heads = heads
        self._halving = halving
        self._said = False

    def fixed(self) -> "HeadChunks":
        """The same for work whose parts have to stay as they are: where an allocation fails in :meth:`map`, that is raised."""
        return HeadChunks(self.heads, halving=False)

    def map(self, call: AttentionCall, compute: Callable[[AttentionCall, slice], T]) -> list[T]:
        """``compute`` of each part of a call: the call with some key/value heads only, and which query heads these are.

        Raises:
            MemoryLimitError: one key/value head does not fit.
        """
        count = call.key.shape[1]
        group = call.query.shape[1] // count
        place = f"layer {call.layer} of a sample of {call.query.shape[2]:,} tokens"
        found: list[T] = []
        first, before = 0, self.heads
        while first < count:
            last = min(first + (self.heads or count), count)
            part = partial(compute, _part(call, first, last), slice(first * group, last * group))
            done = _attempt(part) if self._halving else [part()]
            if done:
                found += done
                first = last
            else:
                self._halve(last - first, place)
        self._say(before, count, place)
        return found

    def whole(self, work: Callable[[], T], count: int, place: str) -> T:
        """``work()``, from its beginning with half the heads where an allocation fails outside of :meth:`map`.

        Args:
            work: asks :meth:`map` for the parts of its calls.
            count: key/value heads of these calls.
            place: for messages: what is worked on.

        Raises:
            MemoryLimitError: one key/value head does not fit.
        """
        before = self.heads
        while not (done := _attempt(work)):
            self._halve(min(self.heads or count, count), place)
        self._say(before, count, place)
        return done[0]

    def _halve(self, heads: int, place: str) -> None:
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is none
        if heads == 1:
            raise MemoryLimitError(
                f"{place}: one key/value head at a time does not fit into memory: lower --max-length, choose a smaller --dtype, "
                "or use a device with more memory"
            )
        self.heads = heads // 2

    def _say(self, before: int | None, count: int, place: str) -> None:
        if self.heads == before or self._said:
            return
        self._said = True
        warnings.warn(
            f"memory ran out at {place}: from here on {self.heads} of {count} key/value heads at a time, which gives the same "
            "figures",
            XcalibWarning,
            stacklevel=3,
        )


def _attempt(work: Callable[[], T]) -> list[T]:
    """The result, alone in a list; empty where memory ran out.

    The exception, whose traceback holds every tensor of the attempt, is gone on return.
    """
    try:
        return [work()]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return []


def _part(call: AttentionCall, first: int, last: int) -> AttentionCall:
    """The call with key/value heads ``first`` to ``last`` and the query heads that share them; all heads: the call as it is."""
    count = call.key.shape[1]
    if last - first == count:
        return call
    group = call.query.shape[1] // count
    return dataclasses.replace(
        call,
        query=call.query[:, first * group : last * group],
        key=call.key[:, first:last],
        value=call.value[:, first:last],
    )
