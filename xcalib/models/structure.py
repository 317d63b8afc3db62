"""The shape and identity of a decoder: its heads, its attention layers and what their outputs add to the residual stream."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xcalib.errors import ModelError
from xcalib.models.placement import materialised, run_device
from xcalib.models.shards import local_tensor
from xcalib.profile import ModelIdentity

__all__ = [
    "AttentionLayer",
    "attention_layers",
    "compact_projection",
    "decoder_blocks",
    "decoder_of",
    "describe_model",
    "head_projection",
]

# Keys that say how a model was loaded or saved, not what it computes.
_VOLATILE = re.compile(
    r"^(_.*|transformers_version|torch_dtype|dtype|use_cache|architectures|output_.*|return_dict|sparse_attention_config)$"
)
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention layer of a decoder: its index, its module, its output projection and the block it lies in."""

    index: int
    attention: nn.Module
    output: nn.Module
    block: nn.Module


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items() if not _VOLATILE.match(str(k))}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def describe_model(model: Any, name: str | None = None, commit: str | None = None) -> ModelIdentity:
    """The identity that a profile stores, read from the model's text config.

    Args:
        model: a transformers causal language model.
        name: what the user calls it; default its config's name or path.
        commit: of the repository, if known; default what transformers recorded.

    Raises:
        ModelError: the config lacks the number of layers or heads.
    """
    config = model.config.get_text_config()
    try:
        layers, query_heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__}: its config has no {error.name}; only decoders with attention heads can be calibrated"
        ) from error
    canonical = json.dumps(_canonical(config.to_dict()), sort_keys=True, separators=(",", ":"))
    return ModelIdentity(
        name=name or str(getattr(config, "_name_or_path", "")) or type(model).__name__,
        commit=commit or getattr(model.config, "_commit_hash", None),
        model_type=str(config.model_type),
        layers=layers,
        query_heads=query_heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or query_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // query_heads),
        config_sha256=hashlib.sha256(canonical.encode()).hexdigest(),
    )


def decoder_of(model: Any) -> Any:
    """The part of a causal language model that ends in hidden states, or the base model."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The decoder's self-attention layers in order.

    Raises:
        ModelError: none is found, or a layer's output projection is not.
    """
    modules = dict(model.named_modules())
    found: dict[int, AttentionLayer] = {}
    for path, module in modules.items():
        index = getattr(module, "layer_idx", None)
        output = next(
            (getattr(module, n) for n in _OUTPUT_NAMES if isinstance(getattr(module, n, None), nn.Module)), None
        )
        if index is None or output is None or not hasattr(module, "head_dim"):
            continue
        if index in found:
            raise ModelError(
                f"{type(model).__name__}: two attention modules have layer_idx {index}; only plain decoders work"
            )
        found[int(index)] = AttentionLayer(int(index), module, output, modules[path.rpartition(".")[0]])
    if not found:
        raise ModelError(
            f"{type(model).__name__}: no attention module with layer_idx, head_dim and an output projection "
            f"({', '.join(_OUTPUT_NAMES)}) was found; this architecture cannot be calibrated"
        )
    return [found[index] for index in sorted(found)]


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of a decoder's blocks (``model.layers``), all of them in order, and its path in the model.

    Raises:
        ModelError: as :func:`attention_layers`, or the blocks of the attention layers are in no such list, or not in order.
    """
    layers = attention_layers(model)
    paths = {module: path for path, module in model.named_modules()}
    path = paths[layers[0].block].rpartition(".")[0]
    blocks = model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList) or any(
        layer.index >= len(blocks) or blocks[layer.index] is not layer.block for layer in layers
    ):
        raise ModelError(
            f"{type(model).__name__}: its layers are not one list in order; such a structure cannot be taken layer by layer"
        )
    return path, blocks


def head_projection(layer: AttentionLayer, query_heads: int) -> torch.Tensor:
    """W_o by head: fp32 ``(query_heads, head_dim, hidden)``, whatever the projection's class (quantised ones included) and
    wherever its weights are kept; of a tensor-parallel model those of this rank's heads."""
    output = layer.output
    with torch.no_grad():
        if isinstance(output, nn.Linear) and output.weight.is_floating_point():
            with materialised(output):
                weight = local_tensor(output.weight).float().T  # (Hq * D, hidden)
            query_heads = query_heads * len(weight) // output.weight.shape[1]
        else:
            parameter = next(output.parameters())
            width = query_heads * int(layer.attention.head_dim)  # type: ignore[arg-type]  # an int attribute of the module
            dtype = parameter.dtype if parameter.is_floating_point() else torch.get_default_dtype()
            probe = torch.cat([torch.zeros(1, width), torch.eye(width)]).to(run_device(output), dtype)
            answer = output(probe).float()
            weight = answer[1:] - answer[:1]  # what a bias adds goes out again
    return weight.unflatten(0, (query_heads, -1)).contiguous()


def compact_projection(projection: torch.Tensor) -> torch.Tensor:
    """The smallest factor with the same Gram matrix: fp32 ``(heads, head_dim, hidden)`` to ``(heads, head_dim, head_dim)``.

    A vector times either has the same norm, so the sweep works in head_dim instead of hidden dimensions.
    """
    triangle = torch.linalg.qr(projection.double().mT, mode="r").R  # (heads, D, D), W W^T = R^T R
    return triangle.mT.float().contiguous()
