"""One dense forward pass of one sample gives the curve of every layer and head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xcalib.collect.chunks import HeadChunks
from xcalib.collect.curves import CollectSettings
from xcalib.errors import ModelError, NonFiniteError
from xcalib.kernels import SweepResult, sweep_thresholds, visible_blocks
from xcalib.kernels.arguments import NonFiniteValueError
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.finite import hidden_state_error
from xcalib.models.logits import sampled_positions
from xcalib.models.placement import materialised
from xcalib.models.shards import head_shards, local_tensor
from xcalib.models.structure import AttentionLayer, attention_layers, compact_projection, decoder_of, head_projection

__all__ = [
    "SampleCurves",
    "Sweeper",
    "each_layer",
    "energy_hook",
    "gather_layers",
    "output_bias",
    "sweep_call",
    "sweep_error",
]


@dataclass(frozen=True, eq=False)
class SampleCurves:
    """The sums of one sample; layers that cannot be sparse are absent, with the reason.

    Attributes:
        layers: measured layers' indices, int64 ``(layers,)``.
        error: fp64 ``(layers, heads, levels)``.
        energy: fp64 ``(layers,)``.
        kept: int64 ``(layers, heads, levels)``.
        visible: blocks of one dense head.
        tokens: length of the sample.
        reasons: dense reason -> number of layers.
        hidden: fp32 ``(positions, hidden)``, the dense model's last hidden states where gains are measured.
    """

    layers: np.ndarray
    error: np.ndarray
    energy: np.ndarray
    kept: np.ndarray
    visible: int
    tokens: int
    reasons: dict[str, int]
    hidden: np.ndarray


class Sweeper:
    """Measures samples on one model; the projections W_o are read once."""

    def __init__(
        self, model: Any, settings: CollectSettings, query_heads: int, chunks: HeadChunks | None = None
    ) -> None:
        self._model = model
        self._settings = settings
        self._chunks = chunks or HeadChunks()
        self._layers = {layer.index: layer for layer in attention_layers(model)}
        self._projections = {
            index: compact_projection(head_projection(layer, query_heads)) for index, layer in self._layers.items()
        }
        self._shards = head_shards(model)
        self._biases = {index: output_bias(layer) for index, layer in self._layers.items()}

    @torch.inference_mode()
    def measure(self, tokens: torch.Tensor, advance: Callable[[int], None] = lambda _n: None) -> SampleCurves:
        """Run int64 ``(length,)`` tokens once, densely, and sweep every layer on the way; ``advance`` is called per layer.

        Raises:
            NonFiniteError: activations are not finite.
            ModelError: no layer can be sparse.
        """
        results: dict[int, Any] = {}
        energies: dict[int, float] = {}
        reasons: dict[str, int] = {}

        def compute(call: AttentionCall) -> None:
            advance(1)
            if call.dense_reason is not None:
                reasons[call.dense_reason] = reasons.get(call.dense_reason, 0) + 1
                return
            results[call.layer] = self._sweep(call)

        hooks = [
            layer.output.register_forward_hook(energy_hook(index, self._biases[index], energies))
            for index, layer in self._layers.items()
        ]
        try:
            with patch_attention(self._model, compute):
                hidden = decoder_of(self._model)(input_ids=tokens[None], use_cache=False)[0][0]  # (length, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        if not bool(hidden.isfinite().all()):  # after the last attention, so no sweep has seen them
            raise hidden_state_error(self._model, tokens)
        compared = hidden[sampled_positions(self._settings.gain_every)].float().cpu().numpy()
        name = type(self._model).__name__
        return gather_layers(results, energies, reasons, len(tokens), compared, self._settings, name)

    def _sweep(self, call: AttentionCall) -> SweepResult:
        try:
            projection = self._projections[call.layer].to(call.query.device)
            found = sweep_call(call, projection, self._settings, self._chunks)
        except ValueError as error:
            raise sweep_error(call, self._model, error) from error
        return SweepResult(self._shards.all(found.error), self._shards.all(found.kept), found.visible)


def sweep_error(call: AttentionCall, model: Any, error: ValueError) -> ModelError:
    """What a sweep that failed means to the user."""
    kind = NonFiniteError if isinstance(error, NonFiniteValueError) else ModelError
    return kind(f"layer {call.layer} of {type(model).__name__} cannot be measured: {error}")


def gather_layers(
    results: Mapping[int, SweepResult],
    energies: Mapping[int, float],
    reasons: dict[str, int],
    length: int,
    hidden: np.ndarray,
    settings: CollectSettings,
    name: str,
) -> SampleCurves:
    """One sample's layers, measured in any order, as :class:`SampleCurves`.

    Raises:
        ModelError: no layer of the model ``name`` can be sparse.
    """
    if not results:
        said = ", ".join(f"{reason} ({count} layers)" for reason, count in reasons.items())
        raise ModelError(f"{name}: no layer can attend sparsely: {said or 'no attention call was seen'}")
    layers = sorted(results)
    return SampleCurves(
        layers=np.array(layers, dtype=np.int64),
        error=np.stack([results[index].error.cpu().numpy() for index in layers]),
        energy=np.array([energies[index] for index in layers], dtype=np.float64),
        kept=np.stack([results[index].kept.cpu().numpy() for index in layers]),
        visible=int(visible_blocks(length, length, block_size=settings.block_size).sum()),
        tokens=length,
        reasons=reasons,
        hidden=hidden,
    )


def sweep_call(
    call: AttentionCall, projection: torch.Tensor, settings: CollectSettings, chunks: HeadChunks
) -> SweepResult:
    """The sweep of one attention call; projection and errors as in :func:`xcalib.kernels.sweep_thresholds`."""

    def sweep(part: AttentionCall, heads: slice) -> SweepResult:
        return sweep_thresholds(
            part.query,
            part.key,
            part.value,
            torch.tensor(settings.grid, dtype=torch.float64),
            projection[heads],
            stride=settings.stride,
            block_size=settings.block_size,
            scale=part.scale,
            pattern=settings.pattern,
            order=settings.order,
        )

    parts = chunks.map(call, sweep)
    return SweepResult(
        torch.cat([part.error for part in parts]), torch.cat([part.kept for part in parts]), parts[0].visible
    )


@torch.inference_mode()
def each_layer(
    model: Any,
    tokens: torch.Tensor,
    layers: Sequence[int],
    measure: Callable[[AttentionCall], torch.Tensor],
    advance: Callable[[int], None] = lambda _n: None,
) -> np.ndarray:
    """Run int64 ``(length,)`` tokens once, densely, and measure chosen layers on the way.

    Args:
        model: a transformers causal language model.
        tokens: one sample.
        layers: indices of layers that can be sparse.
        measure: gives fp64 ``(heads, levels)`` of one call.
        advance: called once a layer.

    Returns:
        fp64 ``(layers, heads, levels)``.
    """
    found: dict[int, torch.Tensor] = {}
    shards = head_shards(model)

    def compute(call: AttentionCall) -> None:
        if call.layer in layers:
            found[call.layer] = shards.all(measure(call)).cpu()
            advance(1)

    with patch_attention(model, compute):
        decoder_of(model)(input_ids=tokens[None], use_cache=False)
    return torch.stack([found[layer] for layer in layers]).numpy()


def output_bias(layer: AttentionLayer) -> torch.Tensor | None:
    """fp32 ``(hidden,)`` of a layer's output projection; read beforehand, since it may be away when a forward hook runs."""
    with materialised(layer.output), torch.no_grad():
        bias = getattr(layer.output, "bias", None)
        return None if bias is None else local_tensor(bias).float()


def energy_hook(index: int, bias: torch.Tensor | None, energies: dict[int, float]) -> Callable[..., None]:
    """A forward hook of a layer's output projection that notes the energy of what the layer adds, its bias left out."""

    def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        added = output.float() if bias is None else output.float() - bias.to(output.device)
        energies[index] = float(added.double().square().sum())

    return hook
