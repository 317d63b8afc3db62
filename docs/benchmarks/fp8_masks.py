"""What fp8 scores change: masks, the probability they keep and the output's error, on the bench's structured data.

Needs a CUDA device that has fp8: ``python fp8_masks.py fp8-masks.json``.
"""

import json
import sys
from pathlib import Path

import torch

from xcalib.bench.data import structured_inputs
from xcalib.kernels import block_sparse_attention, estimate_blocks, select_blocks

LENGTHS, SEEDS, STRIDES, TAUS = (8_192, 32_768), (0, 1), (8, 16), (0.5, 0.8, 0.9, 0.95)


def compare(length: int, seed: int) -> list[dict[str, float]]:
    device = torch.device("cuda")
    heads = {"q_heads": 32, "k_heads": 8, "head_dim": 128}
    inputs = structured_inputs(length, batch=1, dtype=torch.bfloat16, device=device, seed=seed, **heads)
    query, key, value = inputs.query, inputs.key, inputs.value
    rows = []
    for stride in STRIDES:
        scores = {p: estimate_blocks(query, key, stride=stride, precision=p) for p in ("native", "fp8")}
        full = select_blocks(scores["native"], 1.0, q_len=length, k_len=length)
        dense = block_sparse_attention(query, key, value, full).float()
        for tau in TAUS:
            masks = {p: select_blocks(each, tau, q_len=length, k_len=length) for p, each in scores.items()}
            row = {"length": length, "seed": seed, "stride": stride, "tau": tau}
            row["blocks_that_differ"] = float((masks["native"] ^ masks["fp8"]).sum() / masks["native"].sum())
            for precision, mask in masks.items():
                output = block_sparse_attention(query, key, value, mask).float()
                row[f"density_{precision}"] = float(mask.sum() / full.sum())
                row[f"mass_{precision}"] = float((scores["native"] * mask).sum(-1).mean())
                row[f"output_error_{precision}"] = float((output - dense).norm() / dense.norm())
            rows.append(row)
    return rows


if __name__ == "__main__":
    found = [row for length in LENGTHS for seed in SEEDS for row in compare(length, seed)]
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": found}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")
