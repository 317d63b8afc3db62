"""Block sparse prefill in a patched model: thresholds per layer and head, dense elsewhere, and every call counted."""

from dataclasses import dataclass, fields
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from xcalib.errors import ModelError
from xcalib.kernels.api import Backend, Order, Pattern, attend
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.tuning import crossover
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.shards import head_shards
from xcalib.models.structure import describe_model

__all__ = ["SparseAttention", "SparsePlan"]


@dataclass(frozen=True, eq=False)
class SparsePlan:
    """What to keep where.

    Attributes:
        stride: tokens per scored group (S).
        block_size: tokens per block (B).
        pattern: of the scored samples.
        bins: key lengths in tokens, ``(min, max)`` with max exclusive, None for no end; each begins where the one
            before ends. Below the first, prefill is dense; beyond the last, the last is used.
        thresholds: fp32 ``(bins, layers, q_heads)`` in [0, 1].
        dense_layers: layers that are never sparse.
        order: of preference, ``"score"`` or ``"recent"`` (:func:`xcalib.kernels.select_blocks`).

    Raises:
        ValueError: thresholds or bins are not as above.
    """

    stride: int
    block_size: int
    pattern: Pattern
    bins: tuple[tuple[int, int | None], ...]
    thresholds: torch.Tensor
    dense_layers: frozenset[int] = frozenset()
    order: Order = "score"

    def __post_init__(self) -> None:
        taus = self.thresholds
        if taus.dtype != torch.float32 or taus.ndim != 3 or len(taus) != len(self.bins):
            expected = f"torch.float32 ({len(self.bins)}, layers, q_heads)"
            raise ValueError(f"thresholds is {taus.dtype} {tuple(taus.shape)}, expected {expected}")
        if not bool(((taus >= 0) & (taus <= 1)).all()):
            raise ValueError(f"thresholds go from {float(taus.min())} to {float(taus.max())}, expected [0, 1]")
        starts = [start for start, _ in self.bins]
        ends = [end for _, end in self.bins]
        if not starts or ends[:-1] != starts[1:] or any(e is not None and e <= s for s, e in self.bins):
            raise ValueError(f"bins is {self.bins}, expected ascending (min, max) that follow one another")

    def bin_index(self, k_len: int) -> int | None:
        """The bin that serves ``k_len`` keys, the last one beyond its end; None below the first."""
        reached = [index for index, (start, _) in enumerate(self.bins) if k_len >= start]
        return reached[-1] if reached else None

    def record(self) -> dict[str, Any]:
        """All that decides which blocks are kept, ready for JSON."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "thresholds": self.thresholds.tolist(),
            "dense_layers": sorted(self.dense_layers),
        }

    def is_beyond(self, k_len: int) -> bool:
        """Whether ``k_len`` keys are more than the last bin was made for."""
        end = self.bins[-1][1]
        return end is not None and k_len >= end


@dataclass
class _LayerCounts:
    sparse_calls: int = 0
    dense_calls: int = 0
    visible: int = 0  # blocks per head that causality allows, over all prefill calls
    kept_dense: int = 0  # of those, in calls that ran dense
    kept_sparse: torch.Tensor | None = None  # (q_heads,) int64, left on the device: reading it would make the host wait

    def density(self, heads: int) -> npt.NDArray[np.float64]:
        """fp64 ``(heads,)``, NaN before any prefill."""
        if not self.visible:
            return np.full(heads, np.nan)
        kept = np.zeros(heads) if self.kept_sparse is None else self.kept_sparse.cpu().numpy().astype(np.float64)
        return (kept + self.kept_dense) / self.visible


class SparseAttention:
    """A model that prefills by a plan until ``remove()``; a context manager.

    What cannot or need not be sparse goes to the model's own attention, with the reason counted. A row of thresholds
    that are all 1 means dense attention, so that is what runs.

    Attributes:
        plan: the plan in use; setting it is :meth:`use`.
    """

    _all_ones_is_dense = True  # tests switch it off to send threshold 1 through the sparse kernels

    def __init__(
        self, model: nn.Module, plan: SparsePlan, *, backend: Backend | None = None, min_length: int | None = 0
    ) -> None:
        """Patch ``model``.

        Args:
            model: a transformers decoder.
            plan: for its layers and query heads.
            backend: of the kernels, None for the fastest that exists for the tensors' device.
            min_length: keys below which prefill stays dense; None: where dense attention is faster on the GPU at hand.

        Raises:
            ModelError: the plan is for other layers or heads, or the model cannot be patched.
        """
        identity = describe_model(model)
        self._shape = (identity.layers, identity.query_heads)
        self._shards = head_shards(model)
        self._backend = backend
        self._min_length = min_length
        self.reset_stats()
        self._patch = patch_attention(model, self._compute)
        try:
            self.use(plan)
        except ModelError:
            self._patch.remove()
            raise

    @property
    def plan(self) -> SparsePlan:
        """The plan in use."""
        return self._plan

    @plan.setter
    def plan(self, plan: SparsePlan) -> None:
        self.use(plan)

    def use(self, plan: SparsePlan) -> None:
        """Go on with another plan; the counts go on too. ModelError where it is for other layers or heads."""
        _, rows, heads = plan.thresholds.shape
        # In hybrid models the last layers may have no attention, and then need no thresholds.
        if heads != self._shape[1] or not self._patch.layers[-1] < rows <= self._shape[0]:
            raise ModelError(
                f"the plan has thresholds for {rows} layers of {heads} query heads, "
                f"the model has {self._shape[0]} layers of {self._shape[1]}"
            )
        self._plan = plan
        self._all_ones = (plan.thresholds >= 1).all(-1).tolist()  # [bin][layer]
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def remove(self) -> None:
        """Give the model its own attention back; the counts stay readable."""
        self._patch.remove()

    def __enter__(self) -> "SparseAttention":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def reset_stats(self) -> None:
        """Forget all counts."""
        self._layers = [_LayerCounts() for _ in range(self._shape[0])]
        self._reasons: dict[str, int] = {}
        self._extrapolated = 0

    def density(self) -> npt.NDArray[np.float64]:
        """Blocks computed over blocks that causality allows, in all prefill calls so far, dense ones counted in full.

        Returns:
            fp64 ``(layers, q_heads)`` in [0, 1]; NaN for layers that have not prefilled. Decoding is not counted.
        """
        return np.stack([layer.density(self._shape[1]) for layer in self._layers])

    def stats(self) -> dict[str, Any]:
        """What ran so far, ready for JSON.

        Returns:
            ``sparse_calls`` and ``dense_calls`` (attention calls, one per layer), ``dense_reasons`` (reason to count),
            ``extrapolated_calls`` (sparse, with more keys than the last bin was made for), ``density`` (over all layers
            and heads; None before any prefill) and ``by_layer`` (index, calls and density of each).
        """
        densities = self.density()
        visible = np.array([layer.visible for layer in self._layers], dtype=np.float64)
        by_layer = [
            {
                "layer": index,
                "sparse_calls": layer.sparse_calls,
                "dense_calls": layer.dense_calls,
                "density": float(densities[index].mean()) if layer.visible else None,
            }
            for index, layer in enumerate(self._layers)
        ]
        return {
            "sparse_calls": sum(layer.sparse_calls for layer in self._layers),
            "dense_calls": sum(layer.dense_calls for layer in self._layers),
            "dense_reasons": dict(self._reasons),
            "extrapolated_calls": self._extrapolated,
            "density": float(np.nansum(densities.mean(1) * visible) / visible.sum()) if visible.any() else None,
            "by_layer": by_layer,
        }

    def _compute(self, call: AttentionCall) -> torch.Tensor | None:
        counts = self._layers[call.layer]
        batch, _, q_len, _ = call.query.shape
        k_len = call.key.shape[2]
        visible = batch * _visible_blocks(q_len, k_len, self._plan.block_size) if 1 < q_len <= k_len else 0
        counts.visible += visible
        bin_index = self._plan.bin_index(k_len)
        reason = self._dense_reason(call, bin_index)
        if reason is not None or bin_index is None:
            counts.dense_calls += 1
            counts.kept_dense += visible
            self._reasons[str(reason)] = self._reasons.get(str(reason), 0) + 1
            return None
        thresholds = self._thresholds(call.query.device)[bin_index, call.layer]  # (Hq,)
        output, kept_blocks = self._attend(call, self._shards.own(thresholds, call.query.shape[1]))
        kept = self._shards.all(kept_blocks.sum((0, 2)))  # int64 (Hq,)
        counts.kept_sparse = kept if counts.kept_sparse is None else counts.kept_sparse.to(kept.device) + kept
        counts.sparse_calls += 1
        self._extrapolated += self._plan.is_beyond(k_len)
        return output

    def _dense_reason(self, call: AttentionCall, bin_index: int | None) -> str | None:
        plan = self._plan
        if call.dense_reason is not None:
            return call.dense_reason
        if bin_index is None:
            return f"shorter than {plan.bins[0][0]} tokens"
        least = crossover(call.query.device) if self._min_length is None else self._min_length
        if call.key.shape[2] < least:
            return f"shorter than {least} tokens, where dense attention is faster"
        reasons = {
            "layer kept dense by the profile": call.layer in plan.dense_layers,
            # A short chunk after a long past: its own blocks and the sink are most of what could be saved.
            "query shorter than a block": call.query.shape[2] < min(plan.block_size, call.key.shape[2]),
            "layer with another number of heads": not self._shards.fits(call.query.shape[1]),
            "thresholds all 1": self._all_ones_is_dense and self._all_ones[bin_index][call.layer],
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def _thresholds(self, device: torch.device) -> torch.Tensor:
        if device not in self._on_device:
            self._on_device[device] = self._plan.thresholds.to(device)
        return self._on_device[device]

    def _attend(self, call: AttentionCall, thresholds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output ``(batch, q_heads, q_len, head_dim)`` and the blocks kept for it, ``(batch, q_heads, q_blocks)``."""
        plan = self._plan
        return attend(
            call.query,
            call.key,
            call.value,
            thresholds,
            stride=plan.stride,
            block_size=plan.block_size,
            scale=call.scale,
            pattern=plan.pattern,
            order=plan.order,
            backend=self._backend,
        )


@lru_cache(maxsize=4096)
def _visible_blocks(q_len: int, k_len: int, block_size: int) -> int:
    return Geometry(q_len, k_len, block_size, causal=True).visible_count
