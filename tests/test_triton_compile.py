"""All Triton kernels compile for GPUs that are not there, through their own wrappers, without spilling registers.

The compiler runs in a process of its own, because this one may hold Triton's interpreter. To try another Triton, unpack it into a
folder and name that in ``XCALIB_TEST_TRITON``.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Bytes that a thread may keep in local memory, by the first part of an entry's name.
MOST_SPILLS = {"scoring": 0, "selection": 0, "attention": 16, "sweep": 96}
MOST_REGISTERS = 255
HEAD_DIMS = (64, 128, 256)
LENGTH = 512


def entries() -> dict[str, Callable[[], Any]]:
    """What is compiled: the main configurations, bf16."""
    import torch

    from xcalib.kernels import attention, attention_hopper, scoring, selection, sweep

    assert attention_hopper.launch  # loaded now: the compiler's driver replaces what modules imported from another
    from xcalib.kernels.geometry import Geometry

    def tokens(heads: int, dim: int) -> torch.Tensor:
        return torch.zeros(1, heads, LENGTH, dim, dtype=torch.bfloat16)

    def score(dim: int, stride: int, precision: str = "native", pattern: str = "antidiagonal") -> Callable[[], Any]:
        method: dict[str, Any] = {"stride": stride, "block_size": 128, "causal": True, "scale": 0.1}
        return lambda: scoring.block_lse(tokens(8, dim), tokens(2, dim), **method, precision=precision, pattern=pattern)

    def attend(dim: int, with_lse: bool = False) -> Callable[[], Any]:
        lists = selection.BlockLists(torch.zeros(1, 8, 4, 4, dtype=torch.int16), torch.ones(1, 8, 4, dtype=torch.int32))
        shape = (tokens(8, dim), tokens(2, dim), tokens(2, dim), lists, Geometry(LENGTH, LENGTH, 128, True), 0.1)
        function = attention.block_sparse_attention_with_lse if with_lse else attention.block_sparse_attention
        return lambda: function(*shape)

    def measure(dim: int) -> Callable[[], Any]:
        scores = torch.full((1, 8, 4, 4), 0.25)
        grid, projection = torch.linspace(0, 1, 32), torch.eye(dim).expand(8, dim, dim).contiguous()
        shape = (tokens(8, dim), tokens(2, dim), tokens(2, dim), scores, grid, projection)
        return lambda: sweep.sweep_thresholds(*shape, Geometry(LENGTH, LENGTH, 128, True), 0.1)

    def select(blocks: int, source: str) -> Callable[[], Any]:
        geometry, limits = Geometry(128, 128 * blocks, 128, True), torch.ones(1)
        if source == "mask":
            return lambda: selection.lists_from_mask(torch.ones(1, 1, 1, blocks, dtype=torch.bool), geometry)
        if source == "scores":
            return lambda: selection.select_blocks(torch.zeros(1, 1, 1, blocks), limits, geometry)
        order = "recent" if source == "recent" else "score"
        return lambda: selection.select_from_lse(torch.zeros(1, 1, 8, blocks), limits, geometry, 16, order=order)

    table = {f"scoring d{dim} s{stride}": score(dim, stride) for dim in HEAD_DIMS for stride in (8, 16)}
    table |= {f"scoring rows d{dim} s16": score(dim, 16, pattern="rows") for dim in HEAD_DIMS}
    table |= {f"attention d{dim}": attend(dim) for dim in HEAD_DIMS}
    table |= {f"attention lse d{dim}": attend(dim, with_lse=True) for dim in (64, 128)}
    table |= {f"sweep d{dim}": measure(dim) for dim in HEAD_DIMS}
    table |= {f"selection {source} n1024": select(1024, source) for source in ("lse", "recent", "scores", "mask")}
    return table | {"scoring fp8 d128 s16": score(128, 16, "fp8"), "selection lse n8192": select(8192, "lse")}


def compile_all(capability: int, names: list[str]) -> list[dict[str, Any]]:
    import aot

    from xcalib.kernels.tuning import Config

    # such GPUs are not in the table and time the candidates; this one fits all of them
    unmeasured = {"attention": Config(8, 2, {"BLOCK_M": 128, "BLOCK_N": 64})}
    rows = []
    for name, entry in entries().items():
        if names and name not in names:
            continue
        with aot.compiling(capability, None if capability == 90 else unmeasured) as compiled:
            entry()
        for kernel in compiled:
            row = dataclasses.asdict(aot.resources(kernel))
            ptx = kernel.asm["ptx"]
            row |= {"entry": name, "kernel": kernel.metadata.name, "warps": kernel.metadata.num_warps}
            row["shared_limit"] = aot.SHARED_LIMITS[capability]
            row["overlapped"] = aot.exponentials_between_waits(kernel)
            rows.append(row | {"wgmma": "wgmma.mma_async" in ptx, "tma": "cp.async.bulk.tensor" in ptx})
    return rows


def in_a_process(capability: int, names: tuple[str, ...], cache: Path) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "XCALIB_BACKEND")}
    environment["TRITON_CACHE_DIR"] = str(cache)  # so that it compiles now
    paths = [os.environ.get("XCALIB_TEST_TRITON", ""), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-P", __file__, str(capability), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def report(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{row['entry']:24} {row['kernel']:24} {row['warps']:2} warps {row['registers']:3} registers "
        f"{row['spill_bytes']:4} B spilled {row['shared_bytes'] / 1024:6.1f} KiB shared"
        for row in rows
    ]
    return "\n".join(lines)


SOME = ("scoring d128 s16", "attention d128", "sweep d128", "selection lse n1024")


@pytest.mark.parametrize(("capability", "names"), [(90, ()), (80, SOME), (100, SOME)], ids=["sm90", "sm80", "sm100"])
def test_everything_compiles_without_spills(capability: int, names: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    rows = in_a_process(capability, names, tmp_path)
    print("\n" + report(rows))
    assert {row["entry"] for row in rows} >= set(names)
    if capability == 90:
        assert len({row["entry"] for row in rows}) == 23
    for row in rows:
        said = report([row])
        assert row["spill_bytes"] <= MOST_SPILLS[row["entry"].split()[0]], said
        assert row["registers"] <= MOST_REGISTERS, said
        assert row["shared_bytes"] <= row["shared_limit"], said
    if capability == 90:
        names = ("_score_kernel", "_attention_kernel", "_hopper_attention_kernel")
        multiplying = [row for row in rows if row["kernel"] in names]
        assert len(multiplying) == 12
        assert all(row["wgmma"] and row["tma"] for row in multiplying), report(multiplying)
        # within 128 registers ptxas makes the products wait; another program on the same multiprocessor fills the gaps
        assert {row["entry"] for row in multiplying if row["serialized"]} <= {"attention lse d128"}, report(multiplying)
        hopper = [row for row in multiplying if row["kernel"] == "_hopper_attention_kernel"]
        assert {row["entry"] for row in hopper} == {"attention d64", "attention d128"}
        # one of 64 logits a thread: the weights of a block are computed while the tensor cores add the block before
        assert all(row["overlapped"] >= 64 for row in hopper), report(hopper)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), sys.argv[2:])))
