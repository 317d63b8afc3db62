"""Compiles the Triton kernels for a GPU that is not there, through their own wrappers and on small CPU tensors.

    with aot.compiling(90) as compiled:
        wrapper(query, key, value)
    aot.resources(compiled[0])

Nothing runs: each launch compiles its kernel and stops, so what the wrapper returns is uninitialised memory. Needs a process
without ``TRITON_INTERPRET``.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from xcalib.kernels import tuning

# Bytes of shared memory that one program may have (CUDA programming guide, compute capabilities).
SHARED_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}


class _Driver:
    """What Triton asks of a GPU driver before it compiles. The device number keeps the architectures' caches apart."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiling(capability: int, configs: Mapping[str, tuning.Config] | None = None) -> Iterator[list[Any]]:
    """Makes launches compile for a compute capability (80, 90, 100) instead of running.

    Args:
        capability: ten times the major plus the minor version.
        configs: configuration by the kernel's name in the tuning table; others come from the table of the family, else
            the first candidate.

    Yields:
        The compiled kernels, one for each different launch, in order.
    """
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not other for other in compiled):
            compiled.append(kernel)
        return kernel

    def choose(kernel: str, key: Any, candidates: Any, device: torch.device, measure: Any = None) -> tuning.Config:
        if configs and kernel in configs:
            return configs[kernel]
        return tuning._from_table(_family(capability), kernel, tuple(key.items())) or candidates[0]

    replacements = {"choose": choose, "family": lambda device: _family(capability), "interpreted": lambda: False}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver(capability)))
        for name, replacement in replacements.items():
            _replace_everywhere(stack, name, replacement)
        yield compiled


def _family(capability: int) -> str:
    return f"sm{capability // 10 * 10}"


def _replace_everywhere(stack: ExitStack, name: str, replacement: Any) -> None:
    """Patches a function of ``tuning`` in every module of the package that imported it by name."""
    original = getattr(tuning, name)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("xcalib.kernels") and getattr(module, name, None) is original:
            stack.enter_context(mock.patch.object(module, name, replacement))


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs, of a thread or (shared memory) of a program.

    Attributes:
        registers: per thread.
        spill_bytes: that the code stores to local memory, each store instruction counted once.
        stack_bytes: local memory per thread.
        shared_bytes: per program.
        serialized: whether ptxas made each instruction of Hopper's tensor cores wait for the one before (it warns and goes on).
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    serialized: bool


def resources(kernel: Any) -> Resources:
    """Reads the resources of a compiled kernel from its machine code."""
    usage = _inspect("cuobjdump", "--dump-resource-usage", kernel)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump names no registers:\n{usage}")
    stores = re.findall(r"\bSTL((?:\.\w+)*)\s", machine_code(kernel))
    spilled = sum(_store_bytes(modifiers) for modifiers in stores)
    return Resources(int(found[1]), spilled, int(found[2]), int(kernel.metadata.shared), _serialized(kernel))


def machine_code(kernel: Any) -> str:
    """The kernel's SASS."""
    return _inspect("nvdisasm", "--print-code", kernel)


def exponentials_between_waits(kernel: Any) -> int:
    """Exponentials between a wait that leaves one group of products running and the wait for that group; the fewest of them.

    0 where the code has no such place: ptxas moves arithmetic across waits, and what it moves behind the second one the tensor
    cores sit out.
    """
    parts = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[01])", machine_code(kernel))
    found = [
        len(re.findall(r"\bMUFU\.EX2\b", code))
        for wait, code, following in zip(parts[1::2], parts[2::2], parts[3::2], strict=False)
        if (wait, following) == ("0x1", "0x0")
    ]
    return min(found, default=0)


def _store_bytes(modifiers: str) -> int:
    widths = {"8": 1, "16": 2, "64": 8, "128": 16}
    return next((width for bits, width in widths.items() if re.search(rf"\.[US]?{bits}$", modifiers)), 4)


def _serialized(kernel: Any) -> bool:
    if kernel.metadata.target.arch // 10 != 9:
        return False
    with tempfile.NamedTemporaryFile(mode="w", suffix=".ptx") as source, tempfile.NamedTemporaryFile() as binary:
        source.write(kernel.asm["ptx"])
        source.flush()
        command = [_tool("ptxas"), "--verbose", "--gpu-name=sm_90a", source.name, "--output-file", binary.name]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return "wgmma.mma_async instructions are serialized" in log


def _inspect(tool: str, option: str, kernel: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([_tool(tool), option, file.name], check=True, capture_output=True, text=True).stdout


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
