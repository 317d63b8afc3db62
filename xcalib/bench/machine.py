"""What a measurement was made on."""

import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from xcalib._machine import processor

__all__ = ["describe_machine", "describe_versions"]

PACKAGES = ("xcalib", "torch", "triton", "flash-attn", "flash-attn-4", "flashinfer-python", "nvidia-cudnn-frontend")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """JSON values: processor, and the GPU with what bounds it."""
    machine: dict[str, Any] = {
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": str(device),
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        machine["gpu"] = {
            "name": found.name,
            "compute_capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
        }
    return machine


def describe_versions() -> dict[str, str | None]:
    """Of the packages that matter, None for those that are not installed; of Python, CUDA and cuDNN."""
    versions = {name: _version(name) for name in PACKAGES}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return versions | {
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
