"""Scoring and selection by rows against the antidiagonal: ``python scoring_rows.py scoring-rows.json`` on a GPU.

Both take the same products; by rows, each is a logit of its own. Times are medians of the device's events, and shares of dense
attention (torch's, in the same process) say what a profile pays for either before it saves anything.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional
from triton.testing import do_bench

from xcalib.bench.machine import describe_machine
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.pipeline import choose_blocks

HEADS = (32, 8)  # of queries and of keys
SHAPES = [(length, dim) for length in (8192, 32768, 131072) for dim in (64, 128)]
BLOCK_SIZE = 128


def measure(length: int, head_dim: int) -> list[dict[str, float | int | str]]:
    """One row for each pattern and stride."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (*HEADS, HEADS[1])
    )
    geometry = Geometry(length, length, BLOCK_SIZE, True)
    limits = torch.full((HEADS[0],), 0.9, device="cuda")
    dense = do_bench(
        lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        return_mode="median",
    )
    rows: list[dict[str, float | int | str]] = []
    for pattern in ("antidiagonal", "rows"):
        for stride in (8, 16, 32):

            def choose(pattern: str = pattern, stride: int = stride) -> object:
                how = {"scale": head_dim**-0.5, "pattern": pattern, "precision": "native", "order": "recent"}
                return choose_blocks(query, key, limits, geometry, stride=stride, **how)

            chosen = do_bench(choose, return_mode="median")
            rows.append(
                {"length": length, "head_dim": head_dim, "pattern": pattern, "stride": stride, "dense_ms": dense,
                 "choose_ms": chosen, "share": chosen / dense}
            )  # fmt: skip
    return rows


def main() -> None:
    out = Path(sys.argv[1])
    rows = [row for shape in SHAPES for row in measure(*shape)]
    record = {"command": f"python scoring_rows.py {out.name}", "machine": describe_machine(torch.device("cuda"))}
    out.write_text(json.dumps(record | {"heads": HEADS, "block_size": BLOCK_SIZE, "rows": rows}, indent=1) + "\n")
    for row in rows:
        sys.stdout.write(
            f"{row['length']:7} d{row['head_dim']:3} {row['pattern']:12} S={row['stride']:2} {row['choose_ms']:8.3f} ms "
            f"{row['share']:6.1%} of dense {row['dense_ms']:.2f} ms\n"
        )


if __name__ == "__main__":
    main()
