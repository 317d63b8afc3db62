"""What a benchmark's figures were measured on."""

import os
import platform
from importlib import metadata

from xcalib._machine import processor

__all__ = ["environment"]


def environment() -> dict[str, str | int]:
    """Processor, threads, GPU and versions, as plain JSON values."""
    import torch

    found: dict[str, str | int] = {
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in ("xcalib", "torch", "transformers", "numpy"):
        found[package] = metadata.version(package)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
