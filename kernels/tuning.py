"""Tile sizes, warps and stages: from the checked-in table of a GPU family, else measured once and remembered.

``tuned.json`` maps a family (``sm90``, ...) to kernels, and a kernel to rules: the first rule whose ``when`` agrees with the
call gives the configuration. A GPU of no known family times the candidates on the first call of each kind and keeps the best in
the user's cache folder. Triton's interpreter takes the first candidate.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch

__all__ = ["Config", "choose", "crossover", "family", "interpreted", "is_tuned", "milliseconds", "multiprocessors"]

UNKNOWN_CROSSOVER = 4096  # of a GPU that nobody has measured


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    Attributes:
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        tiles: constexpr arguments by name, such as ``{"BLOCK_M": 128, "BLOCK_N": 64}``.
    """

    num_warps: int
    num_stages: int
    tiles: Mapping[str, int] = field(default_factory=dict)

    def launch_arguments(self) -> dict[str, Any]:
        """Keyword arguments for the kernel's launch."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter (on the CPU), as ``TRITON_INTERPRET=1`` asks."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def family(device: torch.device) -> str:
    """``sm90`` for compute capability 9.x and so on; ``interpreter`` for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    return _gpu_family(device)


def is_tuned(device: torch.device) -> bool:
    """Whether the table has configurations for this kind of GPU; for others they are measured on first use."""
    return family(device) in _table()


@functools.cache
def _gpu_family(device: torch.device) -> str:
    return f"sm{torch.cuda.get_device_capability(device)[0] * 10}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """2 off the GPU: the interpreter runs one program after the other, and the second finds nothing left."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


def crossover(device: torch.device) -> int:
    """Keys, in tokens, below which dense attention was measured to be faster on this kind of GPU; 0 off the GPU."""
    where = family(device)
    return 0 if where == "interpreter" else int(_table().get(where, {}).get("crossover", UNKNOWN_CROSSOVER))


def choose(
    kernel: str,
    key: Mapping[str, Any],
    candidates: Sequence[Config],
    device: torch.device,
    measure: Callable[[Config], float] | None = None,
) -> Config:
    """The configuration for one kind of call.

    Args:
        kernel: name in the table.
        key: what the choice may depend on, JSON values, such as ``{"head_dim": 128, "stride": 16}``.
        candidates: what to try on a GPU that the table does not know; the first serves the interpreter.
        device: where the kernel will run.
        measure: runs the kernel with a configuration and returns its milliseconds; None takes the first candidate, as the
            interpreter does, whose time says nothing.
    """
    where = family(device)
    if where == "interpreter":
        return candidates[0]
    known = _from_table(where, kernel, tuple(key.items()))
    if known is not None:
        return known
    if measure is None or interpreted():
        return candidates[0]
    return _measured(_cache_name(device), kernel, json.dumps(key, sort_keys=True), tuple(candidates), measure)


def milliseconds(launch: Callable[[], object]) -> float:
    """Median time of a launch on the GPU."""
    from triton import testing

    return float(testing.do_bench(launch, return_mode="median"))


@functools.lru_cache(maxsize=1024)
def _from_table(where: str, kernel: str, key: tuple[tuple[str, Any], ...]) -> Config | None:
    traits = dict(key)
    for rule in _table().get(where, {}).get(kernel, []):
        if all(traits.get(name) == value for name, value in rule.get("when", {}).items()):
            return _config(rule)
    return None


@functools.cache
def _table() -> dict[str, Any]:
    text = resources.files("xcalib.kernels").joinpath("tuned.json").read_text()
    return dict(json.loads(text))


def _config(rule: Mapping[str, Any]) -> Config:
    return Config(int(rule["num_warps"]), int(rule["num_stages"]), {k: int(v) for k, v in rule["tiles"].items()})


def _cache_name(device: torch.device) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    major, minor = torch.cuda.get_device_capability(device)
    return root / "xcalib" / f"tuned-sm{major}{minor}.json"


_IN_MEMORY: dict[tuple[Path, str, str], Config] = {}


def _measured(
    file: Path, kernel: str, key: str, candidates: tuple[Config, ...], measure: Callable[[Config], float]
) -> Config:
    place = (file, kernel, key)
    if place not in _IN_MEMORY:
        stored = _read(file)
        entry = stored.get(kernel, {}).get(key)
        best = next((c for c in candidates if entry is not None and _entry(c) == entry), None)
        if best is None:
            best = min(candidates, key=functools.partial(_time, measure))
            stored.setdefault(kernel, {})[key] = _entry(best)
            _write(file, stored)
        _IN_MEMORY[place] = best
    return _IN_MEMORY[place]


def _time(measure: Callable[[Config], float], config: Config) -> float:
    try:
        return measure(config)
    except Exception as error:  # a candidate that needs more shared memory or registers than this GPU has
        if "out of resource" not in str(error).lower():
            raise
        return float("inf")


def _entry(config: Config) -> dict[str, Any]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "tiles": dict(config.tiles)}


def _read(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _write(file: Path, stored: dict[str, Any]) -> None:
    """Best effort: a read-only home means that the next process measures again."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
