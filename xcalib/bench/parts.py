"""Our kernels, as calls to be timed: the parts and the whole, on the backend that serves the tensors."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from xcalib import kernels
from xcalib.bench.data import Inputs
from xcalib.kernels.api import attend
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.tuning import crossover

__all__ = ["Parts", "Selected"]

Call = Callable[[], object]


@dataclass(frozen=True)
class Selected:
    """What selection hands to attention: a bool mask, and on Triton the lists that its kernels walk."""

    mask: torch.Tensor
    lists: Any = None

    def density(self, geometry: Geometry) -> float:
        options: dict[str, Any] = {"block_size": geometry.block_size, "causal": geometry.causal}
        found = kernels.block_density(self.mask, q_len=geometry.q_len, k_len=geometry.k_len, **options)
        return float(found.double().mean())


@dataclass(frozen=True)
class Parts:
    """Scoring, selection, attention, the whole of xattention, and the sweep.

    Attributes:
        backend: ``"triton"`` or ``"reference"``.
        geometry: of the inputs.
        head_dim: of the inputs.
    """

    backend: str
    geometry: Geometry
    head_dim: int

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def _options(self) -> dict[str, Any]:
        return {"block_size": self.geometry.block_size, "causal": self.geometry.causal, "backend": self.backend}

    def scores(self, inputs: Inputs, stride: int) -> torch.Tensor:
        """Block scores, for finding thresholds."""
        return kernels.estimate_blocks(inputs.query, inputs.key, stride=stride, **self._options)

    def scoring(self, inputs: Inputs, stride: int) -> Callable[[], torch.Tensor]:
        """On Triton the log-sum-exps that its selection reads, else the scores."""
        if self.backend != "triton":
            return functools.partial(self.scores, inputs, stride)
        from xcalib.kernels.scoring import block_lse

        size, causal = self.geometry.block_size, self.geometry.causal
        return functools.partial(
            block_lse, inputs.query, inputs.key, stride=stride, block_size=size, causal=causal, scale=self.scale
        )

    def selection(self, scored: torch.Tensor, thresholds: torch.Tensor, stride: int) -> Call:
        if self.backend != "triton":
            lengths: dict[str, Any] = {"q_len": self.geometry.q_len, "k_len": self.geometry.k_len}
            return functools.partial(kernels.select_blocks, scored, thresholds, **lengths, **self._options)
        from xcalib.kernels.selection import select_from_lse

        return functools.partial(select_from_lse, scored, thresholds.to(scored.device), self.geometry, stride)

    def choose(self, inputs: Inputs, thresholds: torch.Tensor, stride: int, precision: str) -> Call:
        """Scoring and selection in one call, as the whole makes them."""
        if self.backend != "triton":
            if precision == "fp8":
                raise ValueError("fp8 scores need Triton on a GPU that has fp8")
            scoring = self.scoring(inputs, stride)

            def choose() -> object:
                return self.selection(scoring(), thresholds, stride)()

            return choose
        from xcalib.kernels.pipeline import choose_blocks

        settings: dict[str, Any] = {"stride": stride, "scale": self.scale, "precision": precision}
        limits = thresholds.to(inputs.query.device)
        return functools.partial(
            choose_blocks, inputs.query, inputs.key, limits, self.geometry, pattern="antidiagonal", **settings
        )

    def selected(self, found: Any) -> Selected:
        """What a call of :meth:`selection` or :meth:`choose` returned."""
        if self.backend != "triton":
            return Selected(found)
        from xcalib.kernels.selection import mask_from_lists

        return Selected(mask_from_lists(found, self.geometry), found)

    def attention(self, inputs: Inputs, selected: Selected) -> Call:
        tensors = (inputs.query, inputs.key, inputs.value)
        if self.backend != "triton":
            return functools.partial(kernels.block_sparse_attention, *tensors, selected.mask, **self._options)
        from xcalib.kernels.attention import block_sparse_attention

        return functools.partial(block_sparse_attention, *tensors, selected.lists, self.geometry, self.scale)

    def whole(self, inputs: Inputs, thresholds: torch.Tensor, stride: int) -> Call:
        limits = thresholds.to(inputs.query.device)
        tensors = (inputs.query, inputs.key, inputs.value)
        return functools.partial(attend, *tensors, limits, stride=stride, **self._options)

    def served(self, inputs: Inputs, thresholds: torch.Tensor, stride: int) -> tuple[Call, str]:
        """What a model under a profile runs, and which path that is: below the crossover dense attention, by torch's choice."""
        if self.geometry.k_len >= crossover(inputs.query.device):
            return self.whole(inputs, thresholds, stride), "sparse"
        tensors = (inputs.query, inputs.key, inputs.value)
        grouped = inputs.query.shape[1] != inputs.key.shape[1]
        attention = functional.scaled_dot_product_attention
        return functools.partial(attention, *tensors, is_causal=self.geometry.causal, enable_gqa=grouped), "dense"

    def sweep(self, inputs: Inputs, levels: int, stride: int) -> Call:
        """Scoring and the sweep of a grid, dense near 1 as curves need it, through random output projections.

        These are square: collecting compacts a model's to that, once.
        """
        device, heads = inputs.query.device, inputs.query.shape[1]
        grid = 1 - torch.linspace(1, 0, levels, dtype=torch.float64, device=device) ** 2
        generator = torch.Generator(device=device).manual_seed(0)
        projection = torch.randn((heads, self.head_dim, self.head_dim), generator=generator, device=device)
        tensors = (inputs.query, inputs.key, inputs.value)
        return functools.partial(kernels.sweep_thresholds, *tensors, grid, projection, stride=stride, **self._options)
