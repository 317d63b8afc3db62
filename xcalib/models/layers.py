"""A decoder taken apart, so that one block at a time is in memory while many samples go through it.

What a family does around its blocks (embeddings and their scale, rotary embeddings, masks of each kind of layer, the last
norm) is not repeated here: the model's own forward runs, with blocks that only note what they were called with, or answer
what they are told.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from xcalib.errors import ModelError
from xcalib.models.placement import fetches_weights
from xcalib.models.structure import decoder_blocks, decoder_of

__all__ = ["Entry", "LayerStack", "resident"]

Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One sample before the first block: hidden states ``(1, length, hidden)``, and each block's other arguments."""

    hidden: torch.Tensor
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


class LayerStack:
    """The blocks of one decoder; its parameters may be kept elsewhere, on disk for instance, between uses.

    Attributes:
        depth: number of blocks.

    Raises:
        ModelError: the blocks are not one list in order.
    """

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._decoder = decoder_of(model)
        self._blocks = tuple(decoder_blocks(model)[1])
        self.depth = len(self._blocks)

    def enter(self, tokens: torch.Tensor) -> Entry:
        """What int64 ``(length,)`` tokens are before the first block.

        Raises:
            ModelError: the model does more between its blocks than to hand hidden states from one to the next.
        """
        with self.passing() as passed:
            self._decoder(input_ids=tokens[None], use_cache=False)
        return Entry(passed[0][0], tuple((args, kwargs) for _, args, kwargs in passed))

    @contextmanager
    def passing(self) -> Iterator[list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]]]:
        """Let every block hand on what it gets; yields a list of hidden states and other arguments, one a call."""
        passed: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []
        last: list[torch.Tensor] = []

        def forward(index: int, *args: Any, **kwargs: Any) -> torch.Tensor:
            hidden, args, kwargs = _split(args, kwargs)
            if index != len(passed) or (last and hidden is not last[0]) or not _are_plain((*args, *kwargs.values())):
                raise ModelError(
                    f"{self._name} does more between its layers than to hand hidden states on: it cannot be taken layer by layer"
                )
            passed.append((hidden, args, kwargs))
            last[:] = [hidden.detach()]  # another object of the same numbers: the next block must get this very one
            return last[0]

        with _answering(self._blocks, [partial(forward, index) for index in range(self.depth)]):
            yield passed
        if len(passed) != self.depth:
            raise ModelError(
                f"{self._name} runs {len(passed)} of its {self.depth} layers: it cannot be taken layer by layer"
            )

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """Keep one block's parameters on its device, read once, for as long as this lasts."""
        with resident(self._blocks[index]):
            yield

    def forward(self, index: int, entry: Entry, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states ``(1, length, hidden)`` of the sample of ``entry`` through one block.

        Raises:
            ModelError: the block answers something else than hidden states, or they are not finite.
        """
        args, kwargs = entry.arguments[index]
        output = self._blocks[index](hidden, *args, **kwargs)
        if not isinstance(output, torch.Tensor) or output.shape != hidden.shape:
            raise ModelError(
                f"{self._name}: layer {index} answers more than hidden states: it cannot be taken layer by layer"
            )
        if not bool(output.isfinite().all()):
            raise ModelError(f"{self._name}: the hidden states after layer {index} hold NaN or infinite numbers")
        return output

    def leave(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of hidden states after its last block: its last hidden states ``(length, hidden)``."""

        def forward(index: int, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden if index + 1 == self.depth else _split(args, kwargs)[0]

        with _answering(self._blocks, [partial(forward, index) for index in range(self.depth)]):
            return self._decoder(input_ids=tokens[None], use_cache=False)[0][0]


@contextmanager
def resident(block: nn.Module) -> Iterator[None]:
    """Fetch all parameters of a block that are kept elsewhere, once, and let them go at the end."""
    fetched = [(module, vars(module)["forward"]) for module in block.modules() if fetches_weights(module)]
    ready: list[tuple[Any, Any]] = []
    try:
        for module, hooked in fetched:
            ready.append((module, hooked))
            hooks: Any = module  # accelerate's attributes
            hooks._hf_hook.pre_forward(module)
            hooks.forward = hooks._old_forward  # its hook would fetch them again at every call
        yield
    finally:
        for module, hooked in ready:
            module.forward = hooked
            module._hf_hook.post_forward(module, None)


@contextmanager
def _answering(blocks: Sequence[nn.Module], answers: Sequence[Forward]) -> Iterator[None]:
    own = [vars(block).get("forward") for block in blocks]  # set on the instance where a library hooks the module
    try:
        for block, answer in zip(blocks, answers, strict=True):
            block.forward = answer
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block's hidden states, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), (), kwargs


def _are_plain(values: Sequence[Any]) -> bool:
    """Whether arguments carry nothing from one block to another: tensors, numbers, strings, None, and tuples of them."""
    return all(
        value is None
        or isinstance(value, torch.Tensor | bool | int | float | str)
        or (isinstance(value, tuple) and _are_plain(value))
        for value in values
    )
