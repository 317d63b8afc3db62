"""Block sparse attention for Hopper, in Gluon: one producer warp and two consumer warp groups per program.

The producer walks the programs' tiles (128 queries of one head), longest first, and streams queries, keys and values into rings
of shared memory by TMA, one tile ahead of the consumers. Each consumer has 64 of the queries; while the tensor cores add one
block's weighted values, it computes the next block's weights. Programs stay on their multiprocessor and take tiles from a
counter, so that a tile's first copies pass behind the tile before; its first product and its last one have nothing beside them.

Gluon has no interpreter: ``tests/test_gpu.py`` holds this kernel against fp32 and against :mod:`xcalib.kernels.attention`, which
computes the same on any GPU.
"""

import functools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from xcalib.kernels.geometry import Geometry
from xcalib.kernels.tma import descriptor_strides, fits_tma
from xcalib.kernels.tuning import family, interpreted, multiprocessors

__all__ = ["launch", "serves"]

BLOCK = 128  # queries of a tile, and keys of a block
STAGES = {64: (3, 2), 128: (2, 2)}  # of keys and values, and of queries, by head dimension
ROWS = 64  # queries of a consumer: what one instruction of the tensor cores takes


@gluon.jit
def _ring(count, STAGES: gl.constexpr):
    """Slot of a ring, and the parity of its barrier, at the count-th use."""
    return count % STAGES, count // STAGES & 1


@gluon.jit
def _split(row_number, rows, heads):
    """Sequence, query head and row of a row of the lists, numbered in this order."""
    head = row_number // rows
    return head // heads, head % heads, row_number % rows


@gluon.jit
def _hand_over(ring, turn, note):
    """The producer's note on a tile: number of its row, blocks, and the last two of them."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    for place in gl.static_range(4):
        ring.index(turn * 4 + place).store(gl.full([1], note[place], gl.int32, layout))


@gluon.jit
def _read(ring, place):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(ring.index(place).load(layout), 0)


@gluon.jit
def _take(lists, tiles):
    """The next tile that no program has: each has begun with one of its own."""
    return gl.num_programs(0) + gl.atomic_add(lists[2] + tiles, 1, sem="relaxed")


@gluon.jit
def _number(lists, tile, tiles):
    """Of the row that is the tile-th to start; that of the last one beyond the end."""
    return gl.load(lists[2] + gl.minimum(tile, tiles - 1))


@gluon.jit
def _last_blocks(lists, number, count, k_blocks):
    """The last block of a row and the one before; block 0, or whatever stands at the row's beginning, where there is none."""
    entries = lists[0] + number.to(gl.int64) * k_blocks
    last = gl.load(entries + gl.maximum(count - 1, 0)).to(gl.int32)
    second = gl.load(entries + gl.maximum(count - 2, 0)).to(gl.int32)
    return last, second


@gluon.jit
def _look_ahead(step, following, lists, tiles, k_blocks):
    """Four reads, each of which needs the one before, tell where the next tile begins: the step-th of them, not waited for."""
    tile, number, count, block, second = following
    if step == 0:
        tile = _take(lists, tiles)
    if step == 1:
        number = _number(lists, tile, tiles)
    if step == 2:
        count = gl.load(lists[1] + number)
    if step == 3:
        block, second = _last_blocks(lists, number, count, k_blocks)
    return tile, number, count, block, second


@gluon.jit
def _copy(source, batch, head, token, ring, barrier, stage):
    """Starts the copy of a tile of tokens into a slot of a ring; the barrier tells its end."""
    mbarrier.expect(barrier, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [batch, head, token, 0], barrier, ring.index(stage))


@gluon.jit
def _produce(
    sources,  # descriptors of queries, keys and values
    buffers,  # their rings in shared memory, and that of notes on the tiles
    full,  # barriers of queries, keys and values: filled
    empty,  # likewise: read by all
    lists,  # pointers: indices, counts, order
    sizes,  # rows, k_blocks, q_heads, group, tiles
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
):
    query_source, key_source, value_source = sources
    query_ring, key_ring, value_ring, note_ring = buffers
    query_full, key_full, value_full = full
    query_empty, key_empty, value_empty = empty
    rows, k_blocks, heads, group, tiles = sizes
    ROWS: gl.constexpr = query_source.block_type.shape[2]
    BLOCK: gl.constexpr = key_source.block_type.shape[2]
    steps = 0  # blocks so far
    turns = 0  # tiles so far
    tile = gl.program_id(0)
    number = _number(lists, tile, tiles)
    count = gl.load(lists[1] + number)
    block, second = _last_blocks(lists, number, count, k_blocks)
    while tile < tiles:
        batch, head, row = _split(number, rows, heads)
        turn, parity = _ring(turns, Q_STAGES)
        mbarrier.wait(query_empty.index(turn), parity ^ 1)
        _hand_over(note_ring, turn, (number, count, block, second))
        for half in gl.static_range(2):
            token = row * (2 * ROWS) + half * ROWS
            _copy(query_source, batch, head, token, query_ring, query_full.index(turn), turn * 2 + half)
        entries = lists[0] + number.to(gl.int64) * k_blocks
        following = (tile, number, count, block, second)
        for step in range(count):
            first = block * BLOCK
            block = gl.load(entries + gl.maximum(count - step - 2, 0)).to(gl.int32)
            stage, parity = _ring(steps, STAGES)
            mbarrier.wait(key_empty.index(stage), parity ^ 1)
            _copy(key_source, batch, head // group, first, key_ring, key_full.index(stage), stage)
            mbarrier.wait(value_empty.index(stage), parity ^ 1)
            _copy(value_source, batch, head // group, first, value_ring, value_full.index(stage), stage)
            steps += 1
            following = _look_ahead(step, following, lists, tiles, k_blocks)
        for step in range(count, 4):
            following = _look_ahead(step, following, lists, tiles, k_blocks)
        tile, number, count, block, second = following
        turns += 1
    turn, parity = _ring(turns, Q_STAGES)
    mbarrier.wait(query_empty.index(turn), parity ^ 1)
    _hand_over(note_ring, turn, (-1, 0, 0, 0))
    mbarrier.arrive(query_full.index(turn), count=2)


@gluon.jit
def _weigh(logits, peak, scale):
    """Softmax weights of a block, the new row maxima (scaled, base 2), and the factor of what was summed before."""
    new_peak = gl.maximum(peak, gl.max(logits, 1) * scale)  # (ROWS,)
    # a query that has seen no key yet: minus infinity minus itself is not a number
    pivot = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    decay = gl.exp2(peak - pivot)
    weights = gl.exp2(logits * scale - gl.expand_dims(pivot, 1))  # (ROWS, BLOCK)
    return weights, new_peak, decay


@gluon.jit
def _mask(logits, first, limit, layout: gl.constexpr):
    """Minus infinity from each query's limit on; ``first`` is the block's first key."""
    columns = gl.arange(0, logits.shape[1], gl.SliceLayout(0, layout))
    seen = gl.expand_dims(columns, 0) < gl.expand_dims(limit - first, 1)
    return gl.where(seen, logits, float("-inf"))


@gluon.jit
def _matrix(ring, place):
    """A slot of a ring of TMA's tiles (1, 1, tokens, HEAD_DIM) as the matrix (tokens, HEAD_DIM)."""
    shape: gl.constexpr = [ring.shape[3], ring.shape[4]]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, ring.dtype)
    return ring.index(place)._reinterpret(ring.dtype, shape, layout)


@gluon.jit
def _start_logits(query, ring, filled, place, blank):
    """(ROWS, HEAD_DIM) x (HEAD_DIM, BLOCK), once the keys are there."""
    stage, parity = place
    mbarrier.wait(filled.index(stage), parity)
    return warpgroup_mma(query, _matrix(ring, stage).permute([1, 0]), blank, use_acc=False, is_async=True)


@gluon.jit
def _start_adding(weights, ring, filled, place, total):
    """(ROWS, BLOCK) x (BLOCK, HEAD_DIM) on top of the total, once the values are there."""
    stage, parity = place
    mbarrier.wait(filled.index(stage), parity)
    return warpgroup_mma(weights, _matrix(ring, stage), total, is_async=True)


@gluon.jit
def _release(query_empty, turns, Q_STAGES: gl.constexpr):
    """Once the output of the tile before has left shared memory, its place is free."""
    tma.store_wait(0)
    mbarrier.arrive(query_empty.index((turns + Q_STAGES - 1) % Q_STAGES), pred=turns > 0)


@gluon.jit
def _attend(
    query,  # (ROWS, HEAD_DIM) in shared memory
    rings,  # of keys and values
    full,
    empty,
    note,  # blocks, and the first keys of the last two
    edges,  # (ROWS,) keys each query sees, and how many all of them see
    steps,  # blocks so far
    turns,
    scale,
    nowhere,  # never written
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    LOGITS: gl.constexpr,  # layouts of (ROWS, BLOCK) and (ROWS, HEAD_DIM)
    TOTALS: gl.constexpr,
):
    """Weighted sum (ROWS, HEAD_DIM) of the values of a row's blocks, from the last to the first, and the weights' sum (ROWS,).

    Lists ascend: of a row's blocks at most the last two hold keys that not all queries see.
    """
    key_ring, value_ring = rings
    key_full, value_full = full
    query_empty, key_empty, value_empty = empty
    count, last, second = note
    limit, common = edges
    ROWS: gl.constexpr = query.shape[0]
    BLOCK: gl.constexpr = key_ring.shape[3]
    HEAD_DIM: gl.constexpr = key_ring.shape[4]
    packing: gl.constexpr = gl.DotOperandLayout(0, TOTALS, 2)
    blank = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
    total = gl.zeros([ROWS, HEAD_DIM], gl.float32, TOTALS)
    place = _ring(steps, STAGES)
    pending = _start_logits(query, key_ring, key_full, place, blank)
    _release(query_empty, turns, Q_STAGES)
    logits = warpgroup_mma_wait(0, [pending])
    mbarrier.arrive(key_empty.index(place[0]))
    if last + BLOCK > common:
        logits = _mask(logits, last, limit, LOGITS)
    weights, peak, decay = _weigh(logits, gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS)), scale)
    mass = gl.sum(weights, 1)
    packed = gl.convert_layout(weights.to(key_ring.dtype), packing)
    for step in range(1, count):
        following = _ring(steps + step, STAGES)
        pending = _start_logits(query, key_ring, key_full, following, blank)
        adding = _start_adding(packed, value_ring, value_full, place, total)
        logits = warpgroup_mma_wait(1, [pending])
        mbarrier.arrive(key_empty.index(following[0]))
        if step == 1 and second + BLOCK > common:
            logits = _mask(logits, second, limit, LOGITS)
        weights, peak, decay = _weigh(logits, peak, scale)
        mass = mass * decay + gl.sum(weights, 1)
        # Never taken: ptxas does not move a wait across a branch. Without one it would wait for the tensor cores first, and
        # compute the weights while they idle.
        if scale < 0:
            gl.store(nowhere + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS)), mass.to(gl.int32))
        total = warpgroup_mma_wait(0, [adding])
        mbarrier.arrive(value_empty.index(place[0]))
        total = total * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, TOTALS)), 1)
        packed = gl.convert_layout(weights.to(key_ring.dtype), packing)
        place = following
    adding = _start_adding(packed, value_ring, value_full, place, total)
    total = warpgroup_mma_wait(0, [adding])
    mbarrier.arrive(value_empty.index(place[0]))
    return total, mass


@gluon.jit
def _consume(
    part: gl.constexpr,  # which half of the queries
    output_target,
    buffers,
    full,
    empty,
    lists,
    sizes,
    lengths,  # q_len, k_len
    scale,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    query_ring, key_ring, value_ring, note_ring = buffers
    query_full, query_empty = full[0], empty[0]
    q_len, k_len = lengths
    ROWS: gl.constexpr = query_ring.shape[3]
    BLOCK: gl.constexpr = key_ring.shape[3]
    HEAD_DIM: gl.constexpr = key_ring.shape[4]
    logit_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    total_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, logit_layout)
    steps = 0
    turns = 0
    mbarrier.wait(query_full.index(0), 0)
    number = _read(note_ring, 0)
    while number >= 0:
        turn, parity = _ring(turns, Q_STAGES)
        batch, head, row = _split(number, sizes[0], sizes[2])
        first_query = row * (2 * ROWS) + part * ROWS
        count = _read(note_ring, turn * 4 + 1)
        note = (count, _read(note_ring, turn * 4 + 2) * BLOCK, _read(note_ring, turn * 4 + 3) * BLOCK)
        limit = gl.full([ROWS], 0, gl.int32, row_layout) + k_len
        common = k_len
        if CAUSAL:
            limit = gl.minimum(limit, k_len - q_len + first_query + 1 + gl.arange(0, ROWS, row_layout))
            common = gl.minimum(k_len - q_len + first_query + 1, k_len)
        query = _matrix(query_ring, turn * 2 + part)
        mass = gl.zeros([ROWS], gl.float32, row_layout)
        total = gl.zeros([ROWS, HEAD_DIM], gl.float32, total_layout)
        if count > 0:
            total, mass = _attend(
                query, (key_ring, value_ring), full[1:], empty, note, (limit, common), steps, turns, scale, lists[2],
                STAGES, Q_STAGES, logit_layout, total_layout,
            )  # fmt: skip
            steps += count
        else:
            _release(query_empty, turns, Q_STAGES)
        share = 1.0 / gl.where(mass == 0.0, 1.0, mass)
        total = total * gl.expand_dims(gl.convert_layout(share, gl.SliceLayout(1, total_layout)), 1)
        # the queries have been read: their place serves the output
        query.store(total.to(query.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(output_target, [batch, head, first_query, 0], query_ring.index(turn * 2 + part))
        turns += 1
        turn, parity = _ring(turns, Q_STAGES)
        mbarrier.wait(query_full.index(turn), parity)
        number = _read(note_ring, turn * 4)
    tma.store_wait(0)


@gluon.constexpr_function
def _ring_shape(slots, source):
    return [slots, *source.block_type.shape]


@gluon.jit(do_not_specialize=["q_len", "k_len", "rows", "k_blocks", "tiles"])
def _hopper_attention_kernel(
    query_source,  # (batch, q_heads, q_len, head_dim), in tiles of 64 tokens
    key_source,  # (batch, k_heads, k_len, head_dim), in tiles of 128
    value_source,
    output_target,
    indices_ptr,
    counts_ptr,
    order_ptr,  # (tiles + 1,): row numbers, and how many were taken beyond each program's first
    q_len,
    k_len,
    rows,
    k_blocks,
    heads,
    group,
    tiles,
    scale,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
):
    # the consumers release a tile's place only when they have begun the next
    gl.static_assert(Q_STAGES >= 2)
    dtype: gl.constexpr = key_source.dtype
    query_ring = gl.allocate_shared_memory(dtype, _ring_shape(2 * Q_STAGES, query_source), query_source.layout)
    key_ring = gl.allocate_shared_memory(dtype, _ring_shape(STAGES, key_source), key_source.layout)
    value_ring = gl.allocate_shared_memory(dtype, _ring_shape(STAGES, value_source), value_source.layout)
    note_ring = gl.allocate_shared_memory(gl.int32, [4 * Q_STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    query_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], barriers)
    query_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], barriers)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for stage in gl.static_range(Q_STAGES):
        mbarrier.init(query_full.index(stage), count=2)
        mbarrier.init(query_empty.index(stage), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=2)
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(value_empty.index(stage), count=2)
    fence_async_shared()

    buffers = (query_ring, key_ring, value_ring, note_ring)
    full = (query_full, key_full, value_full)
    empty = (query_empty, key_empty, value_empty)
    lists = (indices_ptr, counts_ptr, order_ptr)
    sizes = (rows, k_blocks, heads, group, tiles)
    lengths = (q_len, k_len)
    gl.warp_specialize(
        [
            (
                _consume,
                (0, output_target, buffers, full, empty, lists, sizes, lengths, scale, STAGES, Q_STAGES, CAUSAL),
            ),
            (
                _consume,
                (1, output_target, buffers, full, empty, lists, sizes, lengths, scale, STAGES, Q_STAGES, CAUSAL),
            ),
            (
                _produce,
                ((query_source, key_source, value_source), buffers, full, empty, lists, sizes, STAGES, Q_STAGES),
            ),
        ],
        [4, 1],
        [240, 32],
    )


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, geometry: Geometry) -> bool:
    """Whether this kernel computes such a call: Hopper, head dimension 64 or 128, blocks of 128, 16 bits, TMA's alignment."""
    return (
        not interpreted()
        and family(query.device) == "sm90"
        and query.shape[-1] in (64, 128)
        and geometry.block_size == BLOCK
        and query.dtype in (torch.bfloat16, torch.float16)
        and fits_tma(query, key, value)
    )


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    order: torch.Tensor,
    geometry: Geometry,
    factor: float,
) -> None:
    """Writes ``output``.

    Args:
        query: fp16 or bf16 ``(batch, q_heads, q_len, head_dim)``, for which :func:`serves` holds.
        key: ``(batch, k_heads, k_len, head_dim)``.
        value: like ``key``.
        output: like ``query``, strides of 16 bytes or multiples.
        indices: int16 ``(batch, q_heads, rows, k_blocks)``.
        counts: int32 ``(batch, q_heads, rows)``.
        order: from :func:`xcalib.kernels.order.launch_order`; its counter is used up.
        geometry: lengths, block size and causality.
        factor: of the dot products, times log2(e).
    """
    head_dim, tiles = query.shape[-1], counts.numel()
    stages, q_stages = STAGES[head_dim]
    grid = (min(tiles, multiprocessors(query.device)),)
    _hopper_attention_kernel[grid](
        _descriptor(query, ROWS),
        _descriptor(key, BLOCK),
        _descriptor(value, BLOCK),
        _descriptor(output, ROWS),
        indices,
        counts,
        order,
        geometry.q_len,
        geometry.k_len,
        counts.shape[2],
        geometry.k_blocks,
        query.shape[1],
        query.shape[1] // key.shape[1],
        tiles,
        factor,
        CAUSAL=geometry.causal,
        STAGES=stages,
        Q_STAGES=q_stages,
        num_warps=4,
    )


@functools.cache
def _layout(tokens: int, head_dim: int, dtype: torch.dtype) -> Any:
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, 1, tokens, head_dim], element)


def _descriptor(tensor: torch.Tensor, tokens: int) -> TensorDescriptor:
    head_dim = tensor.shape[-1]
    strides = [*descriptor_strides(tensor), 1]
    return TensorDescriptor(
        tensor, list(tensor.shape), strides, [1, 1, tokens, head_dim], _layout(tokens, head_dim, tensor.dtype)
    )
