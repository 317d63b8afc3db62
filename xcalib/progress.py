"""How long work reports itself: library code calls this protocol, the command line draws it (nothing here imports Rich)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Opens one task and yields the function that advances it.

    ``with progress("measuring sample", total=8) as advance: advance(1)``
    """

    def __call__(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]: ...


@contextmanager
def silent(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """The default: draws nothing."""
    yield lambda _steps: None
