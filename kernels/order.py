"""In which order to start the rows of block lists: longest first, rows that read the same keys side by side.

Uneven heads would else leave the GPU idle at the end. The order has coarse classes (counts within a factor of two) and, inside a
class, goes by key head and then by row, so that the programs in flight read the same keys from the L2 cache; a finer order would
mix the heads and read all their keys at once.
"""

import torch
import triton
import triton.language as tl

__all__ = ["launch_order"]

CLASSES = 17  # counts of up to 16 bits, and 0
MOST_AT_ONCE = 8192


def launch_order(counts: torch.Tensor, k_heads: int) -> torch.Tensor:
    """Rows of the lists in the order to start them, and a counter for programs that take them one by one.

    Args:
        counts: int32 ``(batch, q_heads, rows)``, contiguous, each below 2^16.
        k_heads: key heads.

    Returns:
        int32 ``(counts.numel() + 1,)``: each index into the flattened counts once, and a 0.
    """
    _, q_heads, rows = counts.shape
    size = counts.numel()
    order = torch.empty(size + 1, dtype=torch.int32, device=counts.device)
    chunk = min(MOST_AT_ONCE, max(128, triton.next_power_of_2(size)))
    _order_kernel[(CLASSES,)](
        counts,
        order,
        size,
        rows,
        q_heads // k_heads,
        CLASSES=CLASSES,
        CHUNK=chunk,
        num_warps=min(16, max(4, chunk // 128)),
    )
    return order


@triton.jit
def _class_of(count, CLASSES: tl.constexpr):
    """0 for the longest: a float's exponent is the logarithm."""
    bits = (count.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    return CLASSES - 1 - tl.maximum(bits, 0)


@triton.jit(do_not_specialize=["size", "rows"])
def _order_kernel(counts_ptr, order_ptr, size, rows, group, CLASSES: tl.constexpr, CHUNK: tl.constexpr):
    """One program for each class: it counts the rows of longer ones, and writes its own behind them."""
    own = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    longer = tl.zeros((CHUNK,), tl.int32)
    members = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, size, CHUNK):
        exists = first + lanes < size
        classes = _class_of(tl.load(counts_ptr + first + lanes, mask=exists, other=0), CLASSES)  # (CHUNK,)
        longer += (exists & (classes < own)).to(tl.int32)
        members += (exists & (classes == own)).to(tl.int32)
    end = tl.sum(longer)
    if tl.sum(members) > 0:
        for first in range(0, size, CHUNK):
            # places by batch, key head, descending row and member of the group
            place = first + lanes
            kv_head, row, member = place // (rows * group), rows - 1 - place // group % rows, place % group
            number = (kv_head * group + member) * rows + row
            count = tl.load(counts_ptr + number, mask=place < size, other=0)  # (CHUNK,)
            mine = ((place < size) & (_class_of(count, CLASSES) == own)).to(tl.int32)
            tl.store(order_ptr + end + tl.cumsum(mine) - 1, number, mask=mine != 0)
            end += tl.sum(mine)
    if own == 0:
        tl.store(order_ptr + size, 0)
