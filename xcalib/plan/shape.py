"""The numbers of a model that its cost depends on, read from its configuration; no weights are loaded."""

from dataclasses import dataclass
from typing import Any

import torch

from xcalib.models.empty import empty_model, read_config
from xcalib.models.structure import attention_layers, describe_model

__all__ = ["ModelShape", "read_shape", "shape_of"]

_CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k")


@dataclass(frozen=True)
class ModelShape:
    """A decoder in numbers.

    Attributes:
        name: what the user calls it.
        layers: decoder blocks.
        sparse_layers: of these, with attention that can be sparse; the others' windows slide.
        hidden: width of the residual stream.
        q_heads: query heads of a layer.
        kv_heads: key and value heads of a layer.
        head_dim: dimensions of a head.
        intermediate: width of the gated part of an MLP.
        vocabulary: logits of a position.
        linear_weights: weights that a token is multiplied with in all blocks; of experts, those that it is sent to.
        parameters: of the whole model.
        max_positions: longest sequence that the model was made for, None if it says none.
        dtype: of the weights as the configuration names it, ``float32`` where it does not.
    """

    name: str
    layers: int
    sparse_layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    linear_weights: int
    parameters: int
    max_positions: int | None
    dtype: str


def read_shape(name: str) -> ModelShape:
    """The shape of MODEL, or of a ``config.json`` alone.

    Args:
        name: a Hugging Face id, a folder, a .gguf file, ``demo``, or a .json file.

    Raises:
        ModelError: there is no such configuration, or xcalib cannot calibrate its models.
    """
    return shape_of(empty_model(read_config(name), name), name)


def shape_of(model: Any, name: str | None = None) -> ModelShape:
    """The shape of a transformers causal language model; its weights may be on the meta device.

    Raises:
        ModelError: the model cannot be calibrated.
    """
    config = model.config.get_text_config()
    identity = describe_model(model, name)
    layers = attention_layers(model)
    sliding = sum(bool(getattr(layer.attention, "is_sliding", False) or _window(layer, config)) for layer in layers)
    weights = sum(_active(parameter, config) for layer in layers for parameter in layer.block.parameters())
    dtype = getattr(config, "dtype", None) or torch.float32
    return ModelShape(
        name=identity.name,
        layers=len(layers),
        sparse_layers=len(layers) - sliding,
        hidden=int(config.hidden_size),
        q_heads=identity.query_heads,
        kv_heads=identity.kv_heads,
        head_dim=identity.head_dim,
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        vocabulary=int(config.vocab_size),
        linear_weights=round(weights),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_positions=getattr(config, "max_position_embeddings", None),
        dtype=str(dtype).removeprefix("torch."),
    )


def _window(layer: Any, config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return bool(kinds[layer.index] == "sliding_attention")
    return getattr(layer.attention, "sliding_window", None) is not None


def _active(parameter: torch.nn.Parameter, config: Any) -> float:
    """Weights of a block's parameter that one token meets: all of a matrix, and of stacked experts those chosen."""
    if parameter.ndim < 2:
        return 0.0
    if parameter.ndim == 2:
        return float(parameter.numel())
    chosen = next(
        (getattr(config, name) for name in _CHOSEN_EXPERTS if getattr(config, name, None)), parameter.shape[0]
    )
    return parameter.numel() * min(chosen, parameter.shape[0]) / parameter.shape[0]
