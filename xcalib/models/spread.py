"""Arguments of transformers' ``from_pretrained`` for models that one device does not hold."""

import json
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from xcalib.errors import ModelError
from xcalib.models.structure import decoder_blocks

__all__ = ["DEVICE_MAPS", "offload_folder", "offload_map", "spread_arguments", "tensor_parallel_arguments"]

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
GPU_SHARE = 0.8  # of a GPU's free memory for weights: sweeps and hidden states want the rest


def spread_arguments(device_map: str) -> dict[str, Any]:
    """``device_map`` and, where accelerate chooses, how much memory it may fill.

    Raises:
        ModelError: it is malformed, or accelerate is missing.
    """
    _need_accelerate("--device-map")
    if device_map not in DEVICE_MAPS:
        return {"device_map": _explicit(device_map)}
    from accelerate.utils import get_max_memory

    memory = {device: int(size * GPU_SHARE) if device != "cpu" else size for device, size in get_max_memory().items()}
    return {"device_map": device_map, "max_memory": memory}


def tensor_parallel_arguments(tp_plan: str) -> dict[str, Any]:
    """What shards a model over the ranks of the process group.

    Raises:
        ModelError: there is no process group of several ranks, or the plan is unknown.
    """
    if tp_plan != "auto":
        raise ModelError(f"tensor-parallel plan is {tp_plan!r}, allowed is auto")
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        raise ModelError("a tensor-parallel model needs several ranks: start this with torchrun --nproc-per-node N")
    from transformers.distributed import DistributedConfig

    if "tp_plan" in getattr(DistributedConfig, "__dataclass_fields__", ()):
        return {"distributed_config": DistributedConfig(tp_plan=tp_plan)}
    return {"tp_plan": tp_plan}  # transformers 5.17


def _explicit(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict) or not given or not all(isinstance(device, int | str) for device in given.values()):
        raise ModelError(
            f"device map is {text!r}, allowed are {', '.join(DEVICE_MAPS)} or a JSON object such as "
            '{"model.layers.0": 0, ...}'
        )
    return given


def offload_map(
    name: str, device: torch.device, source: Mapping[str, str], trust_remote_code: bool
) -> dict[str, int | str]:
    """A device map that leaves every decoder layer in the checkpoint, and puts all else (embeddings, head) on the device.

    Args:
        name: what the user calls the model.
        device: where it runs.
        source: arguments of ``from_pretrained`` that say where it is.
        trust_remote_code: allow code from the model's repository to run.

    Raises:
        ModelError: the model is a GGUF file, accelerate is missing, or the decoder has no list of layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if "gguf_file" in source:
        raise ModelError(
            f"model {name!r} is a GGUF file, which is not read layer by layer: use safetensors for --offload"
        )
    _need_accelerate("--offload")
    config = AutoConfig.from_pretrained(**source, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    path, blocks = decoder_blocks(skeleton)
    place = (device.index or 0) if device.type == "cuda" else str(device)  # as safetensors wants it
    return dict.fromkeys(_around(skeleton, "", path), place) | {
        f"{path}.{index}": "disk" for index in range(len(blocks))
    }


def _around(module: nn.Module, prefix: str, path: str) -> Iterator[str]:
    """Everything of a model that is not below ``path``, in pieces as large as can be."""
    yield from (f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        own = f"{prefix}{name}"
        if own == path:
            continue
        if path.startswith(f"{own}."):
            yield from _around(child, f"{own}.", path)
        else:
            yield own


@contextmanager
def offload_folder(*, needed: bool) -> Iterator[tuple[dict[str, str], Callable[[Any], None]]]:
    """A temporary folder for weights that transformers has to convert before it can leave them on disk.

    Yields:
        (arguments of ``from_pretrained``, what keeps the folder until the given model is gone).
    """
    if not needed:
        yield {}, lambda _model: None
        return
    folder = tempfile.TemporaryDirectory(prefix="xcalib-offload-", ignore_cleanup_errors=True)
    kept = False

    def keep(model: Any) -> None:
        nonlocal kept
        kept = True
        weakref.finalize(model, folder.cleanup)

    try:
        yield {"offload_folder": folder.name}, keep
    finally:
        if not kept:
            folder.cleanup()


def _need_accelerate(option: str) -> None:
    if find_spec("accelerate") is None:
        raise ModelError(f"{option} needs accelerate: pip install 'xcalib[large]'")
