"""Whether one attention call of a transformers model is plain causal prefill, which is all that the kernels compute.

What a missing mask means depends on the implementation that asked for it (read in transformers 5.23):

* sdpa: causal, aligned to the *upper left* when there are more keys than queries. ``create_causal_mask`` leaves the
  mask out for as many keys as queries, for one query, and for the first prefill into a static cache.
* flash attention: causal, aligned to the lower right, but packed sequences are found in ``position_ids``. A 2D mask is
  padding.
* eager and anything else: every query sees every key; eager masks are never left out.
"""

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from xcalib.kernels.api import DTYPES, HEAD_DIMS

__all__ = ["NoMask", "dense_reason", "is_lower_right_causal"]

NoMask = Literal["upper-left", "lower-right", "full"]

# Tensor arguments that no attention function reads; any other tensor may change the result.
_HARMLESS_TENSORS = frozenset({"position_ids", "cache_position", "num_items_in_batch"})
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_verdicts = WeakTensorKeyDictionary()  # tensor -> (version, verdict): every layer of a forward pass gets the same mask


def dense_reason(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: Any,
    kwargs: dict[str, Any],
    no_mask: NoMask,
    gradients: bool = False,
) -> str | None:
    """Why this call must stay with the model's own attention, or None for plain causal prefill.

    Args:
        module: the attention module, with ``layer_idx`` and ``config``.
        query: ``(batch, q_heads, q_len, head_dim)``.
        key: ``(batch, k_heads, k_len, head_dim)``.
        value: like ``key``.
        mask: what the model made for its implementation: None, a tensor or a flex attention block mask.
        kwargs: the other arguments of the attention function.
        no_mask: what the implementation does when the mask is None.
        gradients: whether the caller computes in a way that autograd can follow, which the kernels do not.
    """
    if query.shape[2] == 1:
        return "decode (one query token)"
    return (
        _shape_reason(query, key, value, gradients)
        or _argument_reason(module, kwargs)
        or _locality_reason(module, key.shape[2], kwargs)
        or _mask_reason(mask, query, key, kwargs, no_mask)
    )


def _shape_reason(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradients: bool) -> str | None:
    batch, q_heads, q_len, head_dim = query.shape
    tensors = (query, key, value)
    return _first(
        {
            "keys and values of different shapes": value.shape != key.shape or key.shape[3] != head_dim,
            "batch or heads that do not fit": key.shape[0] != batch or q_heads % key.shape[1] != 0,
            f"unsupported head_dim {head_dim}": not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1],
            "unsupported or mixed dtypes": any(t.dtype not in DTYPES or t.dtype != query.dtype for t in tensors),
            "more queries than keys": q_len > key.shape[2],
            # The kernels have no backward pass; their gradients would be missing without a word.
            "gradients wanted": not gradients and torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        }
    )


def _first(reasons: dict[str, bool]) -> str | None:
    return next((reason for reason, applies in reasons.items() if applies), None)


def _argument_reason(module: nn.Module, kwargs: dict[str, Any]) -> str | None:
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True) and getattr(module.config, "is_causal", True)
    sinks = (kwargs.get("s_aux"), kwargs.get("sinks"), getattr(module, "sinks", None))
    softcaps = (kwargs.get("softcap"), getattr(module, "attn_logit_softcapping", None))
    tensors = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    unknown = sorted(tensors - _HARMLESS_TENSORS)
    return _first(
        {
            "not causal": not causal,
            "paged cache": kwargs.get("cache") is not None,
            "packed sequences": any(kwargs.get(name) is not None for name in _PACKING),
            "attention sinks": any(sink is not None for sink in sinks),
            "logit softcapping": any(softcap is not None for softcap in softcaps),
            "position bias": kwargs.get("position_bias") is not None,
            "dropout": bool(kwargs.get("dropout")),
            "attention weights wanted": bool(kwargs.get("output_attentions")),
            f"attention argument {', '.join(unknown)}": bool(unknown),
        }
    )


def _locality_reason(module: nn.Module, k_len: int, kwargs: dict[str, Any]) -> str | None:
    config: Any = module.config
    kinds, layer = getattr(config, "layer_types", None), int(getattr(module, "layer_idx", 0))
    kind = kinds[layer] if kinds is not None and layer < len(kinds) else "full_attention"
    if kind == "chunked_attention":
        return "chunked attention"
    window = kwargs.get("sliding_window")
    if window is None:
        window = getattr(module, "sliding_window", None)
    if window is None and (kind == "sliding_attention" or getattr(module, "is_sliding", False)):
        window = getattr(config, "sliding_window", None) or 0
    # The last query sees `window` keys, itself among them; a window of k_len or more hides nothing. A sliding cache has
    # dropped no key either: it keeps window - 1 of them, and here at least two are new.
    if window is not None and (not isinstance(window, int) or window < k_len):
        return "sliding window"
    return None


def _mask_reason(
    mask: Any, query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any], no_mask: NoMask
) -> str | None:
    q_len, k_len = query.shape[2], key.shape[2]
    if mask is None and no_mask == "upper-left":
        return None if q_len == k_len else "static cache"
    if mask is None and no_mask == "lower-right":
        return "packed sequences" if _is_packed(kwargs.get("position_ids"), query.shape[0]) else None
    if mask is None:
        return "not causal"
    if not isinstance(mask, torch.Tensor):
        return f"mask of type {type(mask).__name__}"
    if mask.ndim == 4 and mask.shape[2:] == (q_len, k_len) and _remembered(mask):
        return None
    return "mask that is not plain causal (padding, packing or a static cache)"


def _is_packed(position_ids: torch.Tensor | None, batch: int) -> bool:
    """Whether flash attention would, or might, take these positions for several sequences in one row."""
    if position_ids is None or batch != 1:
        return False
    return position_ids.ndim != 2 or not _remembered(position_ids)


def _remembered(tensor: torch.Tensor) -> bool:
    """The verdict on a mask (4D) or on positions (2D), worked out once per tensor: it makes a CUDA device wait."""
    version = 0 if tensor.is_inference() else tensor._version
    known: tuple[int, bool] | None = _verdicts.get(tensor)
    if known is None or known[0] != version:
        plain = is_lower_right_causal(tensor) if tensor.ndim == 4 else bool((tensor.diff(dim=-1) == 1).all())
        known = (version, plain)
        _verdicts[tensor] = known
    return known[1]


def is_lower_right_causal(mask: torch.Tensor) -> bool:
    """Whether a mask lets query ``t`` see exactly the keys up to ``t + k_len - q_len``, in every batch row and head.

    Args:
        mask: ``(batch, heads, q_len, k_len)``, bool (True: seen) or additive floats (0: seen, -inf or the dtype's
            smallest number: hidden).
    """
    q_len, k_len = mask.shape[-2:]
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False
    for dim in (0, 1):  # a mask that was expanded holds each row once
        mask = mask.narrow(dim, 0, 1) if mask.stride(dim) == 0 else mask
    columns = torch.arange(k_len, device=mask.device)
    step = -(-q_len // 16)  # so that what is compared stays smaller than the mask
    right = torch.ones((), dtype=torch.bool, device=mask.device)
    for start in range(0, q_len, step):
        rows = mask[:, :, start : start + step]  # (batch, heads, rows, k_len)
        own = torch.arange(start, start + rows.shape[2], device=mask.device) + k_len - q_len
        seen = columns <= own[:, None]  # (rows, k_len)
        if mask.dtype == torch.bool:
            right &= (rows == seen).all()
        else:
            right &= torch.where(seen, rows == 0, rows <= torch.finfo(mask.dtype).min).all()
    return bool(right)
