"""Which backend serves a call; whatever is not as expected is said once, with its reason."""

import functools
import importlib.util
import os
import warnings
from typing import get_args

import torch

from xcalib.errors import XcalibWarning
from xcalib.kernels.arguments import Backend
from xcalib.kernels.tuning import interpreted

__all__ = ["resolve"]

LEAST_CAPABILITY = (8, 0)
ENVIRONMENT = "XCALIB_BACKEND"


def resolve(backend: str | None, *tensors: torch.Tensor) -> Backend:
    """The backend for tensors that lie on one device.

    None means ``triton`` on CUDA, and on the CPU when Triton's interpreter is on (``TRITON_INTERPRET=1``); else
    ``reference``. The environment variable ``XCALIB_BACKEND`` changes what None means. Where Triton was to be expected and
    cannot serve, the reference does, with one :class:`~xcalib.errors.XcalibWarning` per reason.

    Raises:
        ValueError: an unknown backend, or ``triton`` was asked for by name and cannot serve.
    """
    allowed = get_args(Backend)
    asked = backend
    if backend is None:
        backend = os.environ.get(ENVIRONMENT) or None
        if backend not in (None, *allowed):
            raise ValueError(f"{ENVIRONMENT} is {backend!r}, allowed are 'reference' and 'triton'")
    if backend not in (None, *allowed):
        raise ValueError(f"backend is {backend!r}, allowed are None, 'reference' and 'triton'")
    on_gpu = tensors[0].device.type == "cuda"
    if backend == "reference" or (backend is None and not on_gpu and not interpreted()):
        return "reference"
    reason = _obstacle(tensors)
    if reason is None:
        return "triton"
    if asked == "triton":
        raise ValueError(f"backend is 'triton', but {reason}: use None or 'reference'")
    _warn_once(f"the reference kernels (slow) serve instead of Triton: {reason}")
    return "reference"


def _obstacle(tensors: tuple[torch.Tensor, ...]) -> str | None:
    """Why Triton cannot serve these tensors; None when it can."""
    device = tensors[0].device
    if not _has_triton():
        return "the package 'triton' is not installed"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are wanted, and the kernels have no backward pass (use torch.no_grad())"
    if device.type == "cuda":
        return _too_old(device)
    if not interpreted():
        return f"the tensors are on {device.type}: Triton needs a CUDA device, or its interpreter (TRITON_INTERPRET=1)"
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return "Triton's interpreter computes wrongly in torch.bfloat16"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    return f"this GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or higher"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, XcalibWarning, stacklevel=4)
