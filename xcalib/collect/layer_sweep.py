"""The sweep of one layer at a time: what :class:`xcalib.collect.measure.Sweeper` does in one forward pass, in pieces."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from xcalib.collect.chunks import HeadChunks
from xcalib.collect.curves import CollectSettings
from xcalib.collect.measure import SampleCurves, energy_hook, gather_layers, output_bias, sweep_call, sweep_error
from xcalib.kernels import SweepResult
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.structure import attention_layers, compact_projection, head_projection

__all__ = ["LayerSweep"]

Arrays = dict[str, np.ndarray]


class LayerSweep:
    """Sweeps attention calls; the projections W_o of one layer are held at a time."""

    def __init__(self, model: Any, settings: CollectSettings, query_heads: int) -> None:
        self._model = model
        self._settings = settings
        self._heads = query_heads
        self._layers = {layer.index: layer for layer in attention_layers(model)}
        self._projected: tuple[int, torch.Tensor, torch.Tensor | None] | None = None
        self._chunks = HeadChunks()
        self._found: Arrays = {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Let attention calls be seen; the model attends as it always does."""
        with patch_attention(self._model, self._see):
            yield
        self._projected = None

    def measure(self, layer: int, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Arrays]:
        """Run a sample through one block, whose parameters are in memory.

        Returns:
            (what ``run`` returns; ``error`` ``(heads, levels)``, ``kept`` and ``energy``, or the ``reason`` why the layer stays
            dense, or nothing where the block has no attention).
        """
        self._found = {}
        if layer not in self._layers:
            return run(), {}
        energies: dict[int, float] = {}
        _, bias = self._project(layer)
        hook = self._layers[layer].output.register_forward_hook(energy_hook(layer, bias, energies))
        try:
            output = run()
        finally:
            hook.remove()
        if "error" in self._found:
            self._found["energy"] = np.array(energies[layer])
        return output, self._found

    def gather(self, found: Mapping[int, Arrays], length: int, hidden: np.ndarray) -> SampleCurves:
        """What :meth:`measure` found of each block, and the sample's last hidden states at the compared positions."""
        results, energies, reasons = {}, {}, dict[str, int]()
        for layer, arrays in found.items():
            if "error" in arrays:
                results[layer] = SweepResult(torch.from_numpy(arrays["error"]), torch.from_numpy(arrays["kept"]), 0)
                energies[layer] = float(arrays["energy"])
            elif "reason" in arrays:
                reason = bytes(arrays["reason"]).decode()
                reasons[reason] = reasons.get(reason, 0) + 1
        name = type(self._model).__name__
        return gather_layers(results, energies, reasons, length, hidden, self._settings, name)

    def _see(self, call: AttentionCall) -> None:
        if call.dense_reason is not None:
            self._found = {"reason": np.frombuffer(call.dense_reason.encode(), dtype=np.uint8)}
            return
        projection, _ = self._project(call.layer)
        try:
            result = sweep_call(call, projection.to(call.query.device), self._settings, self._chunks)
        except ValueError as error:
            raise sweep_error(call, self._model, error) from error
        self._found = {"error": result.error.cpu().numpy(), "kept": result.kept.cpu().numpy()}

    def _project(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W_o of a layer, compact, and its bias."""
        if self._projected is None or self._projected[0] != layer:
            self._projected = None  # not two at once
            projection = compact_projection(head_projection(self._layers[layer], self._heads))
            self._projected = (layer, projection, output_bias(self._layers[layer]))
        return self._projected[1:]
