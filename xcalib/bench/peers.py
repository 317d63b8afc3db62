"""Other people's attention, as far as this machine has it: dense, and block sparse under the same mask as ours."""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from xcalib.bench.data import Inputs
from xcalib.kernels.geometry import Geometry

__all__ = ["DENSE", "SPARSE", "Candidate", "Peer", "missing", "needs"]

Call = Callable[[], object]
FLASHINFER_WORKSPACE = 512 * 2**20


@dataclass(frozen=True)
class Peer:
    """An implementation to compare with.

    Attributes:
        name: in the results.
        reason: why it cannot run on a device, or None; asked before anything is measured.
        prepare: makes the call to be timed, from the inputs and a bool block mask (None for dense), and says what was done
            for it beforehand, such as repeating KV heads.
    """

    name: str
    reason: Callable[[torch.device], str | None]
    prepare: Callable[[Inputs, torch.Tensor | None, Geometry], tuple[Call, str]]


class Candidate(Protocol):
    """What may or may not be on this machine."""

    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> Callable[[torch.device], str | None]: ...


def missing(peers: Iterable[Candidate], device: torch.device) -> dict[str, str]:
    """The peers that this machine does not have, with the reason."""
    reasons = {peer.name: peer.reason(device) for peer in peers}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _sdpa(backend: SDPBackend, inputs: Inputs, _mask: torch.Tensor | None, geometry: Geometry) -> tuple[Call, str]:
    """Grouped heads as they are where the backend takes them; else with KV heads repeated before the clock starts."""
    repeated = _repeat_heads(inputs) if inputs.query.shape[1] != inputs.key.shape[1] else inputs

    def attend(tensors: Inputs) -> torch.Tensor:
        grouped = tensors.query.shape[1] != tensors.key.shape[1]
        with sdpa_kernel([backend]):
            return functional.scaled_dot_product_attention(
                tensors.query, tensors.key, tensors.value, is_causal=geometry.causal, enable_gqa=grouped
            )

    with suppress(RuntimeError):
        attend(_first_tokens(inputs))
        return functools.partial(attend, inputs), ""
    attend(_first_tokens(repeated))
    return functools.partial(attend, repeated), "KV heads repeated"


def _sdpa_reason(backend: SDPBackend, device: torch.device) -> str | None:
    """Tries the backend on a few tokens in the dtype that its GPU kernels take."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = torch.zeros((1, 1, 128, 64), dtype=dtype, device=device)
    with warnings.catch_warnings(record=True) as said:  # torch warns why each backend declines
        warnings.simplefilter("always")
        try:
            _sdpa(backend, Inputs(tokens, tokens, tokens), None, Geometry(128, 128, 128, True))
        except Exception as error:
            return "; ".join([_first_line(error), *dict.fromkeys(str(note.message).splitlines()[0] for note in said)])
    return None


def _first_tokens(inputs: Inputs) -> Inputs:
    return Inputs(*(tensor[:, :, :128].contiguous() for tensor in (inputs.query, inputs.key, inputs.value)))


def _repeat_heads(inputs: Inputs) -> Inputs:
    group = inputs.query.shape[1] // inputs.key.shape[1]
    return Inputs(inputs.query, *(tensor.repeat_interleave(group, 1) for tensor in (inputs.key, inputs.value)))


def _flex(inputs: Inputs, mask: torch.Tensor | None, geometry: Geometry) -> tuple[Call, str]:
    """FlexAttention, compiled, under a BlockMask with the same blocks; only the diagonal ones are masked inside."""
    assert mask is not None
    from torch.nn.attention.flex_attention import BlockMask

    own = torch.eye(geometry.q_blocks, dtype=torch.bool, device=mask.device)
    partial, full = _indexed(mask & own), _indexed(mask & ~own & geometry.visible(mask.device))
    size = geometry.block_size
    lengths = (geometry.q_len, geometry.k_len)
    block_mask = BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=(size, size), mask_mod=_causal, seq_lengths=lengths
    )
    attend = functools.partial(_compiled_flex(), block_mask=block_mask, enable_gqa=True)
    return functools.partial(attend, inputs.query, inputs.key, inputs.value), ""


def _causal(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
    return query >= key


@functools.cache
def _compiled_flex() -> Callable[..., object]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _indexed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each row has, and which: int32 ``(B, H, nq)`` and ``(B, H, nq, nk)``, those of the row first."""
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32), order.int()


def _flash_attention_4(inputs: Inputs, _mask: torch.Tensor | None, geometry: Geometry) -> tuple[Call, str]:
    from flash_attn.cute import flash_attn_func

    tensors = [tensor.transpose(1, 2).contiguous() for tensor in (inputs.query, inputs.key, inputs.value)]
    return functools.partial(flash_attn_func, *tensors, causal=geometry.causal), ""


def _flashinfer_dense(inputs: Inputs, _mask: torch.Tensor | None, geometry: Geometry) -> tuple[Call, str]:
    import flashinfer

    tensors = [tensor[0].transpose(0, 1).contiguous() for tensor in _single(inputs)]  # (L, H, D)
    return functools.partial(flashinfer.single_prefill_with_kv_cache, *tensors, causal=geometry.causal), ""


def _flashinfer_sparse(inputs: Inputs, mask: torch.Tensor | None, geometry: Geometry) -> tuple[Call, str]:
    """Its block sparse prefill has one mask per KV head and none inside blocks: heads are repeated, diagonals whole."""
    assert mask is not None
    import flashinfer

    query, key, value = (tensor[0] for tensor in _single(_repeat_heads(inputs)))  # (H, L, D)
    heads, _, head_dim = query.shape
    workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.sparse.VariableBlockSparseAttentionWrapper(workspace)
    sizes = torch.full((geometry.q_blocks,), geometry.block_size, dtype=torch.int32, device=query.device)
    sizes[-1] = geometry.q_len - geometry.block_size * (geometry.q_blocks - 1)
    rows = sizes.expand(heads, -1).contiguous()
    wrapper.plan(mask[0], rows, rows, heads, heads, head_dim, q_data_type=query.dtype)
    return functools.partial(wrapper.run, query, key, value), "KV heads repeated; diagonal blocks not masked inside"


def _single(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if inputs.query.shape[0] != 1:
        raise ValueError(f"batch is {inputs.query.shape[0]}, FlashInfer's single prefill takes 1")
    return inputs.query, inputs.key, inputs.value


def needs(module: str) -> Callable[[torch.device], str | None]:
    """A package that runs on CUDA and may not be installed, or may fail to load."""

    def reason(device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs CUDA"
        try:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
            importlib.import_module(module)
        except Exception as error:  # compiled packages fail to load in many ways
            return _first_line(error)
        return None

    return reason


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


_BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

DENSE = (
    *(
        Peer(name, functools.partial(_sdpa_reason, backend), functools.partial(_sdpa, backend))
        for name, backend in _BACKENDS.items()
    ),
    Peer("flash-attention-4", needs("flash_attn.cute"), _flash_attention_4),
    Peer("flashinfer", needs("flashinfer"), _flashinfer_dense),
)
SPARSE = (
    Peer("flex-attention", needs("torch.nn.attention.flex_attention"), _flex),
    Peer("flashinfer-sparse", needs("flashinfer"), _flashinfer_sparse),
)
