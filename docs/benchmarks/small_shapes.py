"""Every kernel once at small, uneven shapes, for compute-sanitizer; prints what ran.

export PYTORCH_NO_CUDA_MEMORY_CACHING=1
compute-sanitizer --tool memcheck python docs/benchmarks/small_shapes.py
"""

import torch

from xcalib.kernels import block_sparse_attention, estimate_blocks, select_blocks, sweep_thresholds, xattention

SHAPES = [
    # (batch, q_heads, k_heads, q_len, k_len, head_dim, block_size)
    (1, 4, 2, 513, 513, 128, 128),
    (2, 3, 1, 200, 391, 64, 128),
    (1, 2, 2, 130, 260, 80, 64),
    (1, 2, 1, 129, 129, 256, 128),
]


def main() -> None:
    torch.manual_seed(0)
    grid = torch.tensor([0.0, 0.5, 0.9, 1.0])
    for batch, q_heads, k_heads, q_len, k_len, head_dim, block_size in SHAPES:
        query = torch.randn(batch, q_len, q_heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        key, value = torch.randn(2, batch, k_heads, k_len, head_dim, device="cuda", dtype=torch.bfloat16)
        sizes = {"q_len": q_len, "k_len": k_len, "block_size": block_size}
        ran = []
        for causal in (True, False):
            settings = {"block_size": block_size, "causal": causal}
            for precision in ("native", "fp8"):
                xattention(query, key, value, 0.8, precision=precision, **settings)
                ran.append(f"xattention {precision}")
            scores = estimate_blocks(query, key, **settings)
            mask = select_blocks(scores, 0.5, causal=causal, **sizes)
            mask[:, :, 0] = False  # a row without blocks
            block_sparse_attention(query, key, value, mask, **settings)
            projection = torch.randn(q_heads, head_dim, head_dim, device="cuda")
            sweep_thresholds(query, key, value, grid, projection, **settings)
            ran.append("scores, selection, attention, sweep")
        torch.cuda.synchronize()
        print((batch, q_heads, k_heads, q_len, k_len, head_dim, block_size), "; ".join(ran), flush=True)


if __name__ == "__main__":
    main()
