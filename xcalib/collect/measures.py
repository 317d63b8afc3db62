"""What only some objectives need, measured when ``CollectSettings.measures`` asks for it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from xcalib.collect.chunks import HeadChunks
from xcalib.collect.curves import CollectSettings
from xcalib.collect.fisher import FisherMeter, square_roots
from xcalib.collect.measure import each_layer
from xcalib.collect.shares import Advance, Arrays
from xcalib.kernels.mass import dropped_mass
from xcalib.models.attention import AttentionCall

__all__ = ["Measures"]

# what is measured, the units' kind, what measures one, and its steps of progress
Each = Callable[[str, str, Callable[[int, Advance], Arrays], Sequence[int]], Iterator[Arrays]]


class Measures:
    """Measures one collection's samples; every sample of every pass is a unit of its own.

    Args:
        model: a transformers causal language model.
        samples: tokens of each, int64 ``(length,)``.
        settings: of the collection.
        each: gives the units of all samples: from disk, or measured and kept, errors naming the sample.
        chunks: heads that are measured at a time.
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[torch.Tensor],
        settings: CollectSettings,
        each: Each,
        chunks: HeadChunks | None = None,
    ) -> None:
        self._chunks = chunks or HeadChunks()
        self._model = model
        self._samples = samples
        self._settings = settings
        self._shared = each

    def fisher(self, layers: Sequence[int]) -> np.ndarray:
        """The curves' ``fisher``: gradients of all samples first, then the errors that their covariance weighs.

        The unit of a sample's gradients takes 8 bytes x layers x heads x head_dim^2: 134 MB with 32 layers of 32 heads of 128.

        Raises:
            NonFiniteError: gradients are not finite.
        """
        meter = FisherMeter(self._model, self._settings, self._chunks)

        def gradients(index: int, advance: Advance) -> Arrays:
            # seeds of their own: samples may begin with the same tokens
            return {"gram": meter.gram(self._samples[index], layers, seed=index, advance=advance)}

        pooled = np.zeros(())
        for gram in self._each("fisher-gram", "gradients", gradients, len(layers)):
            pooled = pooled + gram["gram"]
        covariance = pooled / sum(len(tokens) for tokens in self._samples)  # (layers, heads, D, D)
        roots = {layer: square_roots(matrix) for layer, matrix in zip(layers, covariance, strict=True)}

        def errors(index: int, advance: Advance) -> Arrays:
            return {"error": meter.errors(self._samples[index], roots, advance)}

        return np.stack([unit["error"] for unit in self._each("fisher", "weighted errors", errors, len(layers))])

    def mass(self, layers: Sequence[int]) -> np.ndarray:
        """The curves' ``mass``."""
        settings = self._settings
        grid = torch.tensor(settings.grid, dtype=torch.float64)

        def dropped(part: AttentionCall, _heads: slice) -> torch.Tensor:
            return dropped_mass(
                part.query,
                part.key,
                grid,
                stride=settings.stride,
                block_size=settings.block_size,
                scale=part.scale,
                pattern=settings.pattern,
                order=settings.order,
            )

        def of_call(call: AttentionCall) -> torch.Tensor:
            return torch.cat(self._chunks.map(call, dropped))

        def mass(index: int, advance: Advance) -> Arrays:
            return {"mass": each_layer(self._model, self._samples[index], layers, of_call, advance)}

        return np.stack([unit["mass"] for unit in self._each("mass", "attention mass", mass, len(layers))])

    def _each(self, name: str, what: str, measure: Callable[[int, Advance], Arrays], steps: int) -> Iterator[Arrays]:
        count = len(self._samples)
        return self._shared(f"Measuring {what} of {count} samples", name, measure, [steps] * count)
