"""The record around a table: command, machine, versions, model, data."""

import dataclasses
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from xcalib.ablate.settings import AblateSettings
from xcalib.bench.machine import describe_machine
from xcalib.data import SampleSet
from xcalib.models.placement import input_device
from xcalib.profile import ModelIdentity

__all__ = ["FORMAT", "Context", "make_record"]

FORMAT = 1
_PACKAGES = ("xcalib", "torch", "triton", "transformers", "numpy")


@dataclass(frozen=True, eq=False)
class Context:
    """What a table was measured with; ``curves`` is the calibration record of the collection, where one was used."""

    table: str
    command: str
    model: Any
    identity: ModelIdentity
    settings: AblateSettings
    samples: SampleSet
    heldout: SampleSet
    curves: dict[str, Any] | None


def make_record(context: Context, result: dict[str, Any], began: float) -> dict[str, Any]:
    """JSON values; ``began`` is of ``time.monotonic``."""
    parameter = next(context.model.parameters())
    return {
        "format": FORMAT,
        "table": context.table,
        "command": context.command,
        "machine": describe_machine(input_device(context.model)) | {"torch_threads": torch.get_num_threads()},
        "versions": {package: _version(package) for package in _PACKAGES} | {"python": sys.version.split()[0]},
        "model": {**context.identity.model_dump(), "dtype": str(parameter.dtype).removeprefix("torch.")},
        "settings": dataclasses.asdict(context.settings),
        "data": {"calibration": _data(context.samples), "heldout": _data(context.heldout)},
        "curves": context.curves,
        "seconds": time.monotonic() - began,
        **result,
    }


def _data(samples: SampleSet) -> dict[str, Any]:
    lengths = [len(sample.tokens) for sample in samples.samples]
    return {
        "specs": list(samples.specs),
        "split": samples.split,
        "seed": samples.seed,
        "samples": len(lengths),
        "tokens": sum(lengths),
        "min_length": min(lengths),
        "max_length": max(lengths),
        "tokens_sha256": samples.tokens_sha256,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
