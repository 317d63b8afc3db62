"""The method's public implementation, mit-han-lab/x-attention: its scoring and selection, where it can be imported.

It is no package of an index: put a checkout of https://github.com/mit-han-lab/x-attention on PYTHONPATH. Its module imports
``block_sparse_attn`` (for attention, which is not measured here): without that package, an empty function of that name in a
module of that name will do. Nothing of it is copied or changed.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from xcalib.bench.data import Inputs
from xcalib.bench.peers import needs
from xcalib.kernels.geometry import Geometry

__all__ = ["PUBLIC", "Public"]

MODULE = "xattn.src.Xattention"
WHERE = "put a checkout of github.com/mit-han-lab/x-attention on PYTHONPATH"
DEFAULT_CHUNK = 16_384  # of its xattn_estimate
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Public:
    """One form of the public implementation.

    Attributes:
        name: in the results.
        chunk: queries that it scores at a time, from the length.
    """

    name: str
    chunk: Callable[[int], int]

    def reason(self, device: torch.device) -> str | None:
        """Why it cannot run, or None."""
        found = needs(MODULE)(device)
        return f"{found}; {WHERE}" if found and device.type == "cuda" else found

    def prepare(self, inputs: Inputs, thresholds: torch.Tensor, stride: int, geometry: Geometry) -> tuple[Call, str]:
        """The call to be timed, and what was done beforehand.

        Args:
            inputs: as ours; its keys need as many heads as its queries.
            thresholds: fp32 ``(q_heads,)``, cumulative probabilities to keep, sink and diagonal counted in, as ours.
            stride: S.
            geometry: of the inputs.

        Returns:
            (a call that gives the bool mask ``(batch, q_heads, q_blocks, k_blocks)``, a note).
        """
        estimate = importlib.import_module(MODULE).xattn_estimate
        group = inputs.query.shape[1] // inputs.key.shape[1]
        key = inputs.key.repeat_interleave(group, 1)
        chunk = self.chunk(geometry.k_len)
        settings: dict[str, Any] = {"chunk_size": chunk, "use_triton": True, "causal": geometry.causal}

        def choose() -> torch.Tensor:
            with _on_a_name_with_100():
                _, mask = estimate(inputs.query, key, geometry.block_size, stride, threshold=thresholds, **settings)
            return mask[:, :, : geometry.q_blocks, : geometry.k_blocks]

        return choose, f"chunks of {chunk}" + (", KV heads repeated" if group > 1 else "")


def own_chunk(length: int) -> int:
    """What its Xattention_prefill chooses: less the longer the sequence is."""
    power = 1 << (length - 1).bit_length()
    return max(min(max(2_048, power), 128 * 1_024 * 2_048 // power), 2_048)


class _Named:
    """Device properties under a name that the public implementation takes for an A100's or an H100's."""

    def __init__(self, properties: Any) -> None:
        self._properties = properties
        self.name = f"{properties.name} 100"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._properties, name)


def _on_a_name_with_100() -> Any:
    """It runs its Triton kernels only where the device's name holds "100": an H200 would get its much slower fallback."""
    properties = torch.cuda.get_device_properties
    return mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: _Named(properties(device)))


PUBLIC = (
    Public("x-attention", own_chunk),
    Public("x-attention, chunks of 16k", lambda _length: DEFAULT_CHUNK),
)
