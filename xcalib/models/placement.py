"""Where a model's parts are: on one device, on several, or kept elsewhere and fetched for each call.

accelerate hooks the modules of a model that it spreads: a hook moves a module's inputs to where the module runs, and fetches
weights that wait in host memory or on disk. Outside of the forward pass such weights are on the device "meta", without numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["fetches_weights", "input_device", "materialised", "run_device", "run_devices"]


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens."""
    find: Any = getattr(model, "get_input_embeddings", None)
    embedding = None if find is None else find()
    return run_device(model if embedding is None else embedding)


def run_device(module: nn.Module) -> torch.device:
    """Where a module computes: its hook's device, else that of its first parameter (CPU where it has none)."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    first = next((parameter for parameter in module.parameters() if not parameter.is_meta), None)
    return torch.device("cpu") if first is None else first.device


def run_devices(model: nn.Module) -> tuple[torch.device, ...]:
    """Every device that a model computes on, in the order of its modules."""
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    return tuple(dict.fromkeys(run_device(module) for module in owners))


def fetches_weights(module: nn.Module) -> bool:
    """Whether a module's own weights are kept elsewhere and fetched for each call."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


@contextmanager
def materialised(module: nn.Module) -> Iterator[None]:
    """A module's own parameters with their numbers, wherever they are kept otherwise. Do not call the module meanwhile."""
    if not (fetches_weights(module) and any(parameter.is_meta for parameter in module.parameters(recurse=False))):
        yield
        return
    hook: Any = module._hf_hook
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module: one, or several in a row."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
