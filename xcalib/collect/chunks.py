"""Key/value heads a few at a time: statistics of heads are independent, so parts of a call give the same bytes as the whole."""

import dataclasses
import gc
import warnings
from collections.abc import Callable
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

    def __init__(self, heads: int | None = None) -> None:
        self.heads = heads
        self._said = False

    def map(self, call: AttentionCall, compute: Callable[[AttentionCall, slice], T]) -> list[T]:
        """``compute`` of each part of a call: the call with some key/value heads only, and which query heads these are.

        Raises:
            MemoryLimitError: one key/value head does not fit.
        """
        count = call.key.shape[1]
        group = call.query.shape[1] // count
        found: list[T] = []
        first = 0
        before = self.heads
        while first < count:
            last = min(first + (self.heads or count), count)
            done = self._attempt(_part(call, first, last), slice(first * group, last * group), compute)
            if not done:
                self._halve(call, last - first)
                continue
            found += done
            first = last
        if self.heads != before and not self._said:
            self._said = True
            warnings.warn(
                f"memory ran out at layer {call.layer} of a sample of {call.query.shape[2]:,} tokens: from here on {self.heads} "
                f"of {count} key/value heads at a time, which gives the same figures",
                XcalibWarning,
                stacklevel=2,
            )
        return found

    def _attempt(self, part: AttentionCall, heads: slice, compute: Callable[[AttentionCall, slice], T]) -> list[T]:
        """The part's result, alone in a list; empty where memory ran out.

        The exception, whose traceback holds every tensor of the attempt, is gone on return.
        """
        try:
            return [compute(part, heads)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return []

    def _halve(self, call: AttentionCall, heads: int) -> None:
        gc.collect()
        if call.query.is_cuda:
            torch.cuda.empty_cache()
        if heads == 1:
            raise MemoryLimitError(
                f"layer {call.layer}, a sample of {call.query.shape[2]:,} tokens: one key/value head at a time does not fit into "
                "memory: lower --max-length, choose a smaller --dtype, or use a device with more memory"
            )
        self.heads = heads // 2


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
