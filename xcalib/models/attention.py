"""Puts a function of ours between a transformers decoder and its attention, and takes it out again.

transformers looks its attention function up by ``config._attn_implementation``. For every implementation that a
patched model had ("sdpa", say) one name of ours ("xcalib_sdpa") is registered, once, together with that
implementation's own mask function: models then make the masks that they always made, and the call can be handed on to
what it was meant for. Which patch a call belongs to is found by its module, so models patched in one process do not
meet. The registered names stay: a copy of a patched model still carries them in its config, and without a patch they
do what the model did before.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from xcalib.errors import ModelError
from xcalib.models.causality import NoMask, dense_reason

__all__ = ["AttentionCall", "AttentionPatch", "patch_attention"]

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key, value
Output = tuple[torch.Tensor, torch.Tensor | None]  # (batch, q_len, q_heads, head_dim), attention weights

PREFIX = "xcalib_"
_patches: "WeakKeyDictionary[nn.Module, AttentionPatch]" = WeakKeyDictionary()


@dataclass(frozen=True)
class AttentionCall:
    """One attention layer called once.

    Attributes:
        layer: the module's ``layer_idx``.
        module: the attention module.
        query: ``(batch, q_heads, q_len, head_dim)``, after rotary embedding.
        key: ``(batch, k_heads, k_len, head_dim)``, cached keys included.
        value: like ``key``.
        scale: factor of the dot product.
        dense_reason: None for plain causal prefill (query ``t`` at key position ``t + k_len - q_len``), else why it is
            not, or why the kernels cannot take it.
    """

    layer: int
    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    dense_reason: str | None


Compute = Callable[[AttentionCall], torch.Tensor | None]


def patch_attention(model: nn.Module, compute: Compute, *, gradients: bool = False) -> "AttentionPatch":
    """Let ``compute`` see, and answer, every attention call of a transformers decoder.

    Args:
        model: a transformers model whose attention goes through ``AttentionInterface``; in a multi-modal one only the
            text decoder is patched.
        compute: gets each call; returns the output, like ``call.query``, or None for the model's own attention. Inside
            ``torch.compile`` it is called at a graph break, except for single query tokens: those are compiled with the
            model's own attention and not shown to it.
        gradients: whether autograd can follow what ``compute`` does; if not, calls that want gradients have a dense reason.

    Returns:
        The patch: a context manager with ``remove()``.

    Raises:
        ModelError: the model is patched already, or its attention does not go through the interface, or it is not a
            plain decoder.
    """
    layers = _attention_modules(model)
    if any(module in _patches for module in layers.values()):
        raise ModelError(f"{type(model).__name__} is patched already: call remove() on the first patch")
    configs: dict[int, Any] = {id(module.config): module.config for module in layers.values()}
    switched = [(config, str(config._attn_implementation).removeprefix(PREFIX)) for config in configs.values()]
    own_names = {id(config): implementation for config, implementation in switched}
    for module in layers.values():
        _own_attention(module, own_names[id(module.config)])  # raises here rather than in the first dense call
    for _, implementation in switched:
        _register(implementation)
    patch = AttentionPatch(layers, compute, switched, gradients)
    for config, implementation in switched:
        _switch(config, PREFIX + implementation)
    if any(config._attn_implementation != PREFIX + implementation for config, implementation in switched):
        patch.remove()
        raise ModelError(f"{type(model).__name__} does not let its attention implementation be changed")
    return patch


class AttentionPatch:
    """A patched model: ``calls`` counts what came through, ``remove()`` gives the model its own attention back.

    Attributes:
        calls: attention calls seen so far; still 0 after a forward pass means that the model attends some other way.
        layers: layer indices that are patched, ascending.
    """

    def __init__(
        self, layers: dict[int, nn.Module], compute: Compute, switched: list[tuple[Any, str]], gradients: bool
    ) -> None:
        self.calls = 0
        self.gradients = gradients
        self.layers = tuple(sorted(layers))
        self.compute = compute
        # No strong reference to a module: the entries in _patches would keep the model alive for ever.
        self._modules = WeakSet(layers.values())
        self._switched = switched
        for module in layers.values():
            _patches[module] = self

    def remove(self) -> None:
        """Undo the patch; the second time nothing happens.

        A config that somebody set to another implementation in the meantime stays so.
        """
        for module in self._modules:
            _patches.pop(module, None)
        self._modules.clear()
        in_use = {id(config) for patch in _patches.values() for config, _ in patch._switched}
        for config, implementation in self._switched:
            if id(config) not in in_use and config._attn_implementation == PREFIX + implementation:
                _switch(config, implementation)
        self._switched = []

    def __enter__(self) -> "AttentionPatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder's attention modules by layer: those with a ``layer_idx`` whose forward asks the interface."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(f"{name} is not a transformers model: it has no config")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; only decoders can be patched")
    found = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    found = [module for module in found if hasattr(module, "config") and _interface_names(module)]
    text = config.get_text_config()
    found = [module for module in found if module.config is text] or found
    layers: dict[int, nn.Module] = {}
    for module in found:
        other = layers.setdefault(int(module.layer_idx), module)  # type: ignore[arg-type]
        if other is not module:
            both = f"{type(other).__name__} and {type(module).__name__}"
            raise ModelError(f"{name}: {both} both are layer {module.layer_idx}; only plain decoders can be patched")
    if not layers:
        raise ModelError(f"{name} does not use transformers' AttentionInterface, so its attention cannot be replaced")
    return layers


def _interface_names(module: nn.Module) -> dict[str, Any] | None:
    """The globals that the module's forward sees, or None where it does not ask the attention interface."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if not isinstance(code, CodeType) or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return None
    names: dict[str, Any] = forward.__globals__
    eager = [name for name in code.co_names if name.endswith("eager_attention_forward")]
    return {"interface": names["ALL_ATTENTION_FUNCTIONS"], "eager": names[eager[0]] if eager else None}


def _own_attention(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function that the module would call under this implementation, as its modelling file sees it."""
    names = _interface_names(module)
    own = None if names is None else names["interface"].get_interface(implementation, names["eager"])
    if own is None:
        raise ModelError(f"{type(module).__name__}: its {implementation!r} attention function was not found")
    return own


def _no_mask_means(own: Callable[..., Any]) -> NoMask:
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask

    own = getattr(own, "func", own)  # kernels of the hub are registered as partial functions
    if own is sdpa_attention_forward:
        return "upper-left"
    if own is flash_attention_forward and not flash_attn_supports_top_left_mask():
        return "lower-right"
    return "full"


def _switch(config: Any, implementation: str) -> None:
    config._attn_implementation = {"": implementation}  # a plain string would go to every sub-config as well


def _register(implementation: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    name = PREFIX + implementation
    if name in AttentionInterface():
        return
    masks = AttentionMaskInterface()
    if implementation in masks:  # without it every mask is None, and padding is attended to
        AttentionMaskInterface.register(name, masks[implementation])
    attend: Any = torch.compiler.disable(_attend)  # counts calls and reads masks

    def interposed(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Output:
        function = _call_own if torch.compiler.is_compiling() and query.shape[2] == 1 else attend
        return function(implementation, module, (query, key, value), attention_mask, kwargs)

    AttentionInterface.register(name, interposed)


def _attend(implementation: str, module: nn.Module, tensors: Tensors, mask: Any, kwargs: dict[str, Any]) -> Output:
    """Ask the module's patch, and the model's own attention where it gives no answer or there is none."""
    patch = _patches.get(module)
    if patch is not None:
        patch.calls += 1
        no_mask = _no_mask_means(_own_attention(module, implementation))
        reason = dense_reason(module, *tensors, mask=mask, kwargs=kwargs, no_mask=no_mask, gradients=patch.gradients)
        scale = kwargs.get("scaling")
        if isinstance(scale, torch.Tensor):
            reason, scale = reason or "scale that is a tensor", None
        scale = tensors[0].shape[-1] ** -0.5 if scale is None else float(scale)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        output = patch.compute(AttentionCall(layer, module, *tensors, scale, reason))  # (B, Hq, Q, D)
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
    return _call_own(implementation, module, tensors, mask, kwargs)


def _call_own(implementation: str, module: nn.Module, tensors: Tensors, mask: Any, kwargs: dict[str, Any]) -> Output:
    own = _own_attention(module, implementation)
    if implementation in ("sdpa", "eager"):
        return own(module, *tensors, mask, **kwargs)
    # Flash attention reads its kernel's name from the config.
    config: Any = module.config
    ours = config._attn_implementation
    _switch(config, implementation)
    try:
        return own(module, *tensors, mask, **kwargs)
    finally:
        _switch(config, ours)
