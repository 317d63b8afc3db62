"""What a benchmark's figures were measured on."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["environment"]


def environment() -> dict[str, str | int]:
    """Processor, threads, GPU and versions, as plain JSON values."""
    found: dict[str, str | int] = {
        "processor": _processor(),
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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
