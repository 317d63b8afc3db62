"""e4m3 copies of tokens for the scoring kernel, one scale for each group of S tokens, in one pass over memory."""

import torch
import triton
import triton.language as tl

from xcalib.kernels.tuning import family

__all__ = ["FP8", "quantise_groups"]

FP8 = torch.float8_e4m3fn
ELEMENTS_PER_PROGRAM = 8192  # 64 a thread: eight loads of 16 bytes on their way at once
ELEMENTS_PER_WARP = 2048


def quantise_groups(tokens: torch.Tensor, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 copies of ``(batch, heads, length, head_dim)`` tokens, the largest of each group at the end of the range.

    Args:
        tokens: fp32, fp16 or bf16, any strides but the last, which is 1.
        stride: tokens per group, a power of two; the last group of a head may have fewer.

    Returns:
        (e4m3 of the same shape, rows at multiples of 16 bytes as TMA needs; fp32 ``(batch, heads, ceil(length / stride))``
        factor to undo it, 1 for groups of nothing but zeros).
    """
    where = family(tokens.device)
    if where.startswith("sm") and int(where[2:]) < 90:
        raise ValueError(
            f"precision is 'fp8', which needs a GPU of compute capability 9.0 or more, this one is {where}"
        )
    batch, heads, length, head_dim = tokens.shape
    copy = torch.empty((batch, heads, length, -(-head_dim // 16) * 16), dtype=FP8, device=tokens.device)
    copy = copy[..., :head_dim]
    scales = torch.empty((batch, heads, triton.cdiv(length, stride)), dtype=torch.float32, device=tokens.device)
    block_d = triton.next_power_of_2(head_dim)
    groups = max(1, ELEMENTS_PER_PROGRAM // (stride * block_d))
    _quantise_kernel[(triton.cdiv(length, groups * stride), heads, batch)](
        tokens,
        *tokens.stride()[:3],
        copy,
        *copy.stride()[:3],
        scales,
        length,
        HEAD_DIM=head_dim,
        STRIDE=stride,
        GROUPS=groups,
        BLOCK_D=block_d,
        num_warps=max(4, groups * stride * block_d // ELEMENTS_PER_WARP),
    )
    return copy, scales


@triton.jit(do_not_specialize=["length"])
def _quantise_kernel(
    tokens_ptr,
    stride_batch,
    stride_head,
    stride_token,
    copy_ptr,
    copy_stride_batch,
    copy_stride_head,
    copy_stride_token,
    scales_ptr,  # fp32 (batch, heads, groups)
    length,
    HEAD_DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    ROWS: tl.constexpr = GROUPS * STRIDE
    head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    features = tl.arange(0, BLOCK_D)[None, :]
    exists = (rows < length) & (features < HEAD_DIM)
    tokens_ptr += sequence * stride_batch + head * stride_head
    tokens = tl.load(tokens_ptr + rows * stride_token + features, mask=exists, other=0.0)  # (ROWS, BLOCK_D)

    peaks = tl.max(tl.max(tl.abs(tokens), 1).to(tl.float32).reshape(GROUPS, STRIDE), 1)  # (GROUPS,)
    # below 1e-30 a scale, or what undoes it, would leave the normal numbers: such groups count as zeros
    scales = tl.where(peaks > 1e-30, tl.div_rn(peaks, 448.0), 1.0)
    factors = tl.div_rn(1.0, scales)[:, None].broadcast_to(GROUPS, STRIDE).reshape(ROWS)
    scaled = tl.clamp(tokens.to(tl.float32) * factors[:, None], -448.0, 448.0, tl.PropagateNan.ALL)
    copy_ptr += sequence * copy_stride_batch + head * copy_stride_head
    tl.store(copy_ptr + rows * copy_stride_token + features, scaled.to(tl.float8e4nv), mask=exists)

    all_groups = (length + STRIDE - 1) // STRIDE
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    scales_ptr += (sequence * tl.num_programs(1) + head) * all_groups
    tl.store(scales_ptr + groups, scales, mask=groups < all_groups)
