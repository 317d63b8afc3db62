"""With all layers sparse at once: the KL, and how it would change, to first order, with any head's threshold."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from xcalib.collect.backward import differentiable, gradient_by_chunks, masked_attention
from xcalib.collect.chunks import HeadChunks
from xcalib.collect.curves import CollectSettings
from xcalib.errors import NonFiniteError
from xcalib.kernels import estimate_blocks
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.reference import block_levels
from xcalib.kernels.slopes import sweep_slopes
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.logits import LogitHead, sampled_positions
from xcalib.models.shards import head_shards
from xcalib.models.structure import decoder_of

__all__ = ["SlopeMeter", "Slopes"]


@dataclass(frozen=True, eq=False)
class Slopes:
    """One sample under one choice of levels.

    Attributes:
        kl: mean KL(dense || sparse) in nats per compared position.
        slope: fp64 ``(layers, heads, levels)``, nats per position: ``slope[l, h, j] - slope[l, h, chosen]`` is the first-order
            change of ``kl`` when head h of layer l goes from its level to level j, all other heads as they are.
    """

    kl: float
    slope: np.ndarray


class SlopeMeter:
    """Measures slopes on one model: one sparse forward pass, one backward pass, and in it a pass over each layer's blocks."""

    def __init__(
        self, model: Any, settings: CollectSettings, layers: tuple[int, ...], chunks: HeadChunks | None = None
    ) -> None:
        self._model = model
        self._settings = settings
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._head = LogitHead(model)
        self._shards = head_shards(model)
        chunks = chunks or HeadChunks()
        # ranks that share a model have to go on together: one alone may not begin a sample anew
        self._chunks = chunks.fixed() if self._shards.size > 1 else chunks

    def measure(self, tokens: torch.Tensor, levels: np.ndarray, dense: torch.Tensor) -> Slopes:
        """Run a sample with every head at its level.

        Args:
            tokens: int64 ``(length,)``.
            levels: int ``(layers, heads)``, of the settings' grid, for the measured layers.
            dense: the dense model's last hidden states at the compared positions, ``(positions, hidden)``.

        Raises:
            NonFiniteError: logits or gradients are not finite.
            MemoryLimitError: one key/value head at a time does not fit into memory.
        """
        config = self._model.config.get_text_config()
        heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        work = partial(self._measure, tokens, levels, dense)
        return self._chunks.whole(work, heads, f"the backward pass of a sample of {len(tokens):,} tokens")

    def _measure(self, tokens: torch.Tensor, levels: np.ndarray, dense: torch.Tensor) -> Slopes:
        found: dict[int, np.ndarray] = {}
        fixed = self._chunks.fixed()  # what is computed again has to be what was computed

        def compute(call: AttentionCall) -> torch.Tensor | None:
            row = self._rows.get(call.layer)
            if call.dense_reason is not None or row is None:
                return None
            own = self._shards.own(torch.as_tensor(levels[row]), call.query.shape[1]).to(call.query.device)
            return self._attend(call, own, fixed, found)

        with patch_attention(self._model, compute, gradients=True), differentiable(self._model):
            hidden = decoder_of(self._model)(input_ids=tokens[None], use_cache=False)[0][0]
            compared = hidden[sampled_positions(self._settings.gain_every)]  # (positions, hidden)
            kl, gradient = self._kl_gradient(dense, compared.detach())
            compared.backward(gradient)
        return Slopes(kl, np.stack([found[layer] for layer in self._rows]))

    def _attend(
        self, call: AttentionCall, levels: torch.Tensor, fixed: HeadChunks, found: dict[int, np.ndarray]
    ) -> torch.Tensor:
        """Sparse attention that gradients pass through; the one that arrives at its output is turned into slopes."""
        size = self._settings.block_size
        detached = replace(call, query=call.query.detach(), key=call.key.detach(), value=call.value.detach())
        level = torch.cat(fixed.map(detached, self._levels), 1)  # (B, Hq, nq, nk)
        mask = level <= levels[:, None, None]

        def attend(part: AttentionCall, heads: slice) -> torch.Tensor:
            tensors = (part.query, part.key, part.value, mask[:, heads])
            return masked_attention(*tensors, block_size=size, scale=part.scale)

        output = torch.cat(fixed.map(call, attend), 1)  # (B, Hq, length, D)
        if not output.requires_grad:  # the first layer: nothing before it asks for gradients
            output.requires_grad_(True)

        def hook(gradient: torch.Tensor) -> None:
            found[call.layer] = self._slopes(detached, level, gradient)

        output.register_hook(hook)  # of what is computed again in the backward pass, none is called
        return output

    def _slopes(self, call: AttentionCall, level: torch.Tensor, gradient: torch.Tensor) -> np.ndarray:
        """fp64 ``(heads, levels)`` of one layer, from the gradient at its attention's output."""
        if not bool(gradient.isfinite().all()):
            name = type(self._model).__name__
            raise NonFiniteError(
                f"layer {call.layer} of {name}: the gradient at its attention holds NaN or infinite numbers"
            )

        def sweep(part: AttentionCall, heads: slice) -> torch.Tensor:
            tensors = (part.query, part.key, part.value, gradient[:, heads], level[:, heads])
            settings = self._settings
            return sweep_slopes(*tensors, len(settings.grid), block_size=settings.block_size, scale=part.scale)

        return self._shards.all(torch.cat(self._chunks.map(call, sweep))).cpu().numpy()

    def _levels(self, call: AttentionCall, _heads: slice) -> torch.Tensor:
        """The first threshold that keeps each block, ``(batch, q_heads, q_blocks, k_blocks)``; bytes where they can count it."""
        settings = self._settings
        scores = estimate_blocks(
            call.query,
            call.key,
            stride=settings.stride,
            block_size=settings.block_size,
            scale=call.scale,
            pattern=settings.pattern,
        )
        grid = torch.tensor(settings.grid, dtype=torch.float64, device=call.query.device)
        geometry = Geometry(call.query.shape[2], call.key.shape[2], settings.block_size, True)
        level = block_levels(scores, grid, geometry, settings.order)
        return level.to(torch.uint8) if len(grid) < 256 else level  # kept for every layer until the backward pass

    def _kl_gradient(self, dense: torch.Tensor, hidden: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Mean KL over positions, and its gradient with respect to ``hidden`` ``(positions, hidden)``."""

        def part(chunk: torch.Tensor, rows: slice) -> torch.Tensor:
            with torch.no_grad():
                reference = functional.log_softmax(self._head.logits(dense[rows].to(chunk)), dim=-1)
            other = functional.log_softmax(self._head.logits(chunk), dim=-1)
            return (reference.exp() * (reference - other)).sum() / len(hidden)

        kl, gradient = gradient_by_chunks(hidden, part)
        if not math.isfinite(kl):
            raise NonFiniteError(
                f"{type(self._model).__name__}: with all layers sparse its logits hold NaN or infinite numbers"
            )
        return kl, gradient
