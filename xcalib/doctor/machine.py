"""What xcalib finds on this machine: versions, GPUs, optional packages."""

import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec

import torch

from xcalib.kernels.backends import LEAST_CAPABILITY
from xcalib.kernels.tuning import UNKNOWN_CROSSOVER, crossover, is_tuned

__all__ = ["EXTRAS", "Extra", "Gpu", "gpus", "missing_extras", "required_problems", "versions"]

VERSIONS = ("xcalib", "torch", "triton", "transformers", "numpy", "optuna", "safetensors")


@dataclass(frozen=True)
class Extra:
    """An extra of the package: what it is for, and the modules that it brings."""

    name: str
    purpose: str
    modules: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Modules that are not installed."""
        return tuple(name for name in self.modules if find_spec(name) is None)

    @property
    def command(self) -> str:
        """How to install it."""
        return f"pip install 'xcalib[{self.name}]'"


EXTRAS = (
    Extra("demo", "xcalib demo, .gguf files", ("accelerate", "gguf", "sentencepiece")),
    Extra("large", "--device-map, --offload", ("accelerate",)),
    Extra("report", "charts, xcalib report", ("altair", "jinja2", "vl_convert")),
    Extra("bench", "pictures of bench and ablate", ("matplotlib",)),
    Extra("hf", "--data hf:NAME", ("datasets",)),
    Extra("tasks", "rouge-l scores", ("rouge_score",)),
    Extra("postgres", "refine on many machines", ("psycopg",)),
)


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as the driver calls it.
        capability: compute capability, as ``9.0``.
        memory: in bytes.
        served: whether the Triton kernels run on it.
        tuned: whether the checked-in table has its tiles; else they are timed on first use.
        crossover: keys, in tokens, below which attention stays dense.
    """

    name: str
    capability: str
    memory: int
    served: bool
    tuned: bool
    crossover: int

    @property
    def text(self) -> str:
        """One line about it."""
        if not self.served:
            least = ".".join(map(str, LEAST_CAPABILITY))
            return f"{self._size}; too old for the kernels, which need {least}: the reference (slow) serves"
        how = "tiles from the tuned table" if self.tuned else "not in the tuned table: tiles are timed on first use"
        guess = "" if self.tuned else f" (assumed; {UNKNOWN_CROSSOVER:,} where nobody measured)"
        return f"{self._size}; {how}; dense below {self.crossover:,} tokens{guess}"

    @property
    def _size(self) -> str:
        return f"{self.name}, capability {self.capability}, {self.memory / 2**30:.0f} GiB"


def versions() -> dict[str, str | None]:
    """Of Python, the system, CUDA, its driver and the packages; None for what is not there."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    found |= {package: _version(package) for package in VERSIONS}
    return found | {"cuda": torch.version.cuda, "driver": _driver()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _driver() -> str | None:
    """Version of NVIDIA's driver, as its own tool says."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None


def gpus() -> list[Gpu]:
    """All CUDA devices in order."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device, facts = torch.device("cuda", index), torch.cuda.get_device_properties(index)
        capability = (facts.major, facts.minor)
        found.append(
            Gpu(
                name=facts.name,
                capability=".".join(map(str, capability)),
                memory=facts.total_memory,
                served=capability >= LEAST_CAPABILITY,
                tuned=is_tuned(device),
                crossover=crossover(device),
            )
        )
    return found


def missing_extras() -> list[Extra]:
    """Extras of which something is not installed."""
    return [extra for extra in EXTRAS if extra.missing]


def required_problems() -> list[str]:
    """What the installed packages do not give that xcalib's own requirements ask for, one line each."""
    from packaging.requirements import Requirement

    try:
        required = metadata.requires("xcalib") or ()
    except metadata.PackageNotFoundError:
        return ["xcalib is not installed as a package, so what it needs is not known: pip install -e . in its checkout"]
    problems = []
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            problems.append(
                f"{requirement.name} is {found or 'missing'}, needed is {requirement}: pip install '{requirement}'"
            )
    return problems
