"""Layer gains: how far the final distribution moves when one layer alone attends sparsely."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from xcalib.collect.curves import CollectSettings
from xcalib.models.logits import LogitHead, sampled_positions
from xcalib.models.sparse import SparseAttention, SparsePlan
from xcalib.models.structure import attention_layers

__all__ = ["GainMeter"]


class GainMeter:
    """Switches layers of one sample to sparse attention and measures KL(dense || switched)."""

    def __init__(self, model: Any, settings: CollectSettings, query_heads: int) -> None:
        self._model = model
        self._settings = settings
        self._heads = query_heads
        self._head = LogitHead(model)
        self._blocks = {layer.index: layer.block for layer in attention_layers(model)}
        self._depth = max(self._blocks) + 1

    @torch.inference_mode()
    def alone(
        self,
        tokens: torch.Tensor,
        layers: tuple[int, ...],
        thresholds: np.ndarray,
        advance: Callable[[int], None] = lambda _n: None,
    ) -> np.ndarray:
        """Mean KL in nats per position with each layer alone switched, fp64 ``(layers,)``.

        Args:
            tokens: one sample, int64 ``(length,)``.
            layers: indices of the measured layers.
            thresholds: ``(layers, heads)`` of the measured layers.
            advance: called once a layer.
        """
        outputs: dict[int, Any] = {}
        hooks = [
            block.register_forward_hook(lambda _m, _a, output, index=index: outputs.__setitem__(index, output))
            for index, block in self._blocks.items()
        ]
        try:
            dense = self._compared(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        hidden = []
        with SparseAttention(self._model, self.plan({})) as switch:
            for row, layer in enumerate(layers):
                switch.use(self.plan({layer: thresholds[row]}))
                with self._start_at(layer, outputs):
                    hidden.append(self._compared(tokens))
                advance(1)
        return self.mean_kl(dense, hidden)

    @torch.inference_mode()
    def together(
        self,
        tokens: torch.Tensor,
        layers: tuple[int, ...],
        thresholds: np.ndarray,
        dense: np.ndarray,
        advance: Callable[[int], None] = lambda _n: None,
    ) -> np.ndarray:
        """Mean KL in nats per position with all layers switched, fp64 ``(allocations,)``.

        Args:
            tokens: one sample, int64 ``(length,)``.
            layers: indices of the measured layers.
            thresholds: ``(allocations, layers, heads)``.
            dense: the dense model's last hidden states at the compared positions, ``(positions, hidden)``.
            advance: called once an allocation.
        """
        hidden = []
        with SparseAttention(self._model, self.plan({})) as switch:
            for allocation in thresholds:
                switch.use(self.plan(dict(zip(layers, allocation, strict=True))))
                hidden.append(self._compared(tokens))
                advance(1)
        return self.mean_kl(torch.from_numpy(dense).to(hidden[0]), hidden)

    def _compared(self, tokens: torch.Tensor) -> torch.Tensor:
        """Last hidden states at the positions that are compared, ``(positions, hidden)``."""
        return self._head.prefill(tokens).hidden[sampled_positions(self._settings.gain_every)].clone()

    def check_head(self, tokens: torch.Tensor) -> None:
        """Raise ModelError where the model's logits are not its output embedding's; runs it on int64 ``(length,)`` tokens."""
        self._head.prefill(tokens)

    def mean_kl(self, dense: torch.Tensor, hidden: list[torch.Tensor]) -> np.ndarray:
        """Mean KL(dense || variant) in nats, fp64 ``(variants,)``, from last hidden states ``(positions, hidden)``."""
        return self._head.kl(dense, hidden).double().mean(dim=1).cpu().numpy()

    def plan(self, chosen: dict[int, np.ndarray]) -> SparsePlan:
        """Thresholds ``(heads,)`` of some layers; all others are dense."""
        thresholds = torch.ones((1, self._depth, self._heads))
        for layer, values in chosen.items():
            thresholds[0, layer] = torch.as_tensor(values)
        settings = self._settings
        return SparsePlan(
            settings.stride, settings.block_size, settings.pattern, ((0, None),), thresholds, order=settings.order
        )

    @contextmanager
    def _start_at(self, layer: int, outputs: dict[int, Any]) -> Iterator[None]:
        """Skip the blocks before ``layer``: they answer what they answered in the dense pass."""
        skipped = {index: block for index, block in self._blocks.items() if index < layer}
        own = {index: vars(block).get("forward") for index, block in skipped.items()}  # of a block that a library hooks
        for index, block in skipped.items():
            block.forward = lambda *_a, _answer=outputs[index], **_k: _answer
        try:
            yield
        finally:
            for index, block in skipped.items():
                del block.forward
                if (forward := own[index]) is not None:
                    block.forward = forward
