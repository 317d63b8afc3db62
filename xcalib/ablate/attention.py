"""A model that attends by any pattern and selection policy, and one that attends densely while densities are read off."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from xcalib.ablate.variants import Scoring, Setting
from xcalib.errors import ModelError
from xcalib.kernels import block_sparse_attention, estimate_blocks, select_blocks
from xcalib.kernels.geometry import Geometry
from xcalib.models.attention import AttentionCall, AttentionPatch, patch_attention

__all__ = ["DensityProbe", "VariantAttention"]

SAMPLE_STEP = 1_000  # between the seeds of two samples; layers lie in between


class _Interposed:
    """Counts what ran and what stayed dense; decoding is not counted."""

    def __init__(self, block_size: int, seed: int) -> None:
        self._block_size = block_size
        self._seed = seed
        self.visible = 0  # blocks of all heads that causality allows, in the calls that went through
        self.dense_reasons: dict[str, int] = {}

    def _takes(self, call: AttentionCall) -> bool:
        length = call.query.shape[2]
        if length == 1:
            return False
        reason = call.dense_reason
        if reason is None and length < min(self._block_size, call.key.shape[2]):
            reason = "query shorter than a block"
        if reason is not None:
            self.dense_reasons[reason] = self.dense_reasons.get(reason, 0) + 1
            return False
        seen = Geometry(length, call.key.shape[2], self._block_size, causal=True).visible_count
        self.visible += seen * call.query.shape[0] * call.query.shape[1]
        return True

    def _scores(self, call: AttentionCall, scoring: Scoring) -> torch.Tensor:
        """Block scores; random patterns are drawn anew in every layer, so that no single draw decides."""
        return estimate_blocks(
            call.query,
            call.key,
            stride=scoring.stride,
            block_size=self._block_size,
            scale=call.scale,
            pattern=scoring.pattern,
            seed=self._seed + call.layer,
        )

    def _select(self, call: AttentionCall, scores: torch.Tensor, limits: Any, scoring: Scoring) -> torch.Tensor:
        lengths: dict[str, Any] = {"q_len": call.query.shape[2], "k_len": call.key.shape[2]}
        how: dict[str, Any] = {"policy": scoring.policy, "order": scoring.order}
        return select_blocks(scores, limits, block_size=self._block_size, **how, **lengths)


class VariantAttention(_Interposed):
    """The model prefills with one :class:`Setting` until ``remove()``; a context manager.

    What the kernels cannot take (sliding windows, soft caps, padding, ...) stays dense and is left out of the density.
    """

    def __init__(self, model: Any, setting: Setting, *, block_size: int, seed: int) -> None:
        super().__init__(block_size, seed)
        self._setting = setting
        self._limits = torch.tensor(setting.limits)
        self._kept: list[torch.Tensor] = []  # of each call, left on the device
        self._patch: AttentionPatch = patch_attention(model, self._compute)

    def _compute(self, call: AttentionCall) -> torch.Tensor | None:
        if not self._takes(call):
            return None
        heads = call.query.shape[1]
        if self._limits.shape[1] != heads:
            raise ModelError(f"layer {call.layer} has {heads} query heads, the limits are for {self._limits.shape[1]}")
        scoring = self._setting.scoring
        scores = self._scores(call, scoring)
        mask = self._select(call, scores, self._limits[call.layer], scoring)
        self._kept.append(mask.sum())
        return block_sparse_attention(
            call.query, call.key, call.value, mask, block_size=self._block_size, scale=call.scale
        )

    @property
    def kept(self) -> int:
        """Blocks computed in the calls that were sparse."""
        return sum(int(count) for count in self._kept)

    def __enter__(self) -> "VariantAttention":
        return self

    def __exit__(self, *_error: object) -> None:
        self._patch.remove()


class DensityProbe(_Interposed):
    """The model attends densely, and every call is asked how many blocks each limit of each scoring would keep."""

    def __init__(self, model: Any, limits: Mapping[Scoring, Sequence[float]], *, block_size: int, seed: int) -> None:
        super().__init__(block_size, seed)
        self._wanted = limits
        self.kept = {scoring: np.zeros(len(values)) for scoring, values in limits.items()}
        self._patch: AttentionPatch = patch_attention(model, self._compute)

    def _compute(self, call: AttentionCall) -> None:
        if not self._takes(call):
            return
        scores: dict[tuple[int, str], torch.Tensor] = {}
        for scoring, limits in self._wanted.items():
            kind = (scoring.stride, scoring.pattern)
            if kind not in scores:
                scores[kind] = self._scores(call, scoring)
            counts = [self._select(call, scores[kind], limit, scoring).sum() for limit in limits]
            self.kept[scoring] += torch.stack(counts).cpu().numpy()

    def __enter__(self) -> "DensityProbe":
        return self

    def __exit__(self, *_error: object) -> None:
        self._patch.remove()
