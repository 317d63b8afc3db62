"""Where numbers stopped being finite: looked for only once they did."""

from typing import Any

import torch

from xcalib.errors import ModelError, NonFiniteError
from xcalib.models.structure import attention_layers, decoder_of

__all__ = ["hidden_state_error"]


@torch.inference_mode()
def hidden_state_error(model: Any, tokens: torch.Tensor) -> NonFiniteError:
    """The error for last hidden states that are not finite; the decoder runs once more, to find the first layer to blame.

    Args:
        model: a transformers causal language model, patched as it was when it happened.
        tokens: the sample, int64 ``(length,)``.
    """
    name = type(model).__name__
    places: dict[str, Any] = {f"{name}: its token embeddings hold": model.get_input_embeddings()}
    try:
        layers = attention_layers(model)
    except ModelError:
        layers = []
    places |= {f"layer {layer.index} of {name}: its output holds": layer.block for layer in layers}
    found: list[str] = []

    def look(place: str, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        if not found and not bool(state.isfinite().all()):
            found.append(place)

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, place=place: look(place, output))
        for place, module in places.items()
    ]
    try:
        decoder_of(model)(input_ids=tokens[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    place = found[0] if found else f"{name}: the last hidden states hold"
    return NonFiniteError(f"{place} NaN or infinite numbers")
