"""What every threshold of a grid does to each head, from one pass over the blocks (the Triton form of the reference's sweep).

A query block's key blocks fall into levels: level ``l`` holds those that the grid's threshold ``l`` keeps and the one before
drops. The first kernel attends to each level by itself and writes the level's mean value and log-mass, as split-key
decoding does. The second merges the levels of each query: what threshold ``l`` keeps has a mean, so has what it drops, and

    O_l - O_dense = dropped mass * (kept mean - dropped mean),

so nothing nearly equal is subtracted however little is dropped, and no mass underflows however small it is. Values are
projected first, by a square factor of W_o,h W_o,h^T, so that the squared norm of that difference is the error.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from xcalib.kernels.geometry import Geometry
from xcalib.kernels.reference import SweepResult, block_levels
from xcalib.kernels.tma import descriptor_strides, fits_tma
from xcalib.kernels.tuning import Config, choose, interpreted, milliseconds

__all__ = ["ATTENTION_CANDIDATES", "ERROR_CANDIDATES", "sweep_thresholds"]

ATTENTION_CANDIDATES = (
    Config(8, 2, {"BLOCK_M": 128, "BLOCK_N": 128}),
    Config(8, 3, {"BLOCK_M": 128, "BLOCK_N": 64}),
    Config(8, 2, {"BLOCK_M": 128, "BLOCK_N": 64}),
    Config(4, 3, {"BLOCK_M": 64, "BLOCK_N": 64}),
    Config(4, 2, {"BLOCK_M": 64, "BLOCK_N": 64}),
)
# IEEE arithmetic uses no tensor cores, and each thread holds whole rows of its operands: tiles are small.
FP32_CANDIDATES = (Config(8, 1, {"BLOCK_M": 64, "BLOCK_N": 64}), Config(8, 1, {"BLOCK_M": 32, "BLOCK_N": 32}))
# ROWS queries at a time, one per warp, which holds (LEVEL_BLOCK, COLUMNS) in registers.
ERROR_CANDIDATES = (
    Config(4, 2, {"ROWS": 4, "COLUMNS": 64}),
    Config(4, 3, {"ROWS": 4, "COLUMNS": 32}),
    Config(2, 2, {"ROWS": 2, "COLUMNS": 64}),
    Config(8, 1, {"ROWS": 4, "COLUMNS": 32}),
)

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))
# fp16 keeps 11 bits of what is at least 2^-14: weights, at most 1, are shifted up, and values scaled to its upper end.
FP16_SHIFT = 14
VALUE_EXPONENT = 15
# The squares of small dropped masses would be subnormal.
MASS_EXPONENT = 30
# Bounds of what is in flight at once: the levels' means, the projected values in fp32, the block scores of some heads.
SCRATCH_BYTES = 2**30
PROJECTED_ELEMENTS = 2**27
SCORE_ELEMENTS = 2**24


# Not worth a kernel of their own for each kind of number.
RUNTIME = ["first_program", "first_head", "heads", "group", "q_len", "k_len", "q_blocks", "k_blocks", "levels"]


@triton.jit
def _load_tokens(
    source,
    batch,
    head,
    first,
    length,
    token_stride,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Tokens of one head, zeros past the end; ``source`` is a descriptor, or a pointer to the head's first token."""
    if USE_TMA:
        tile = source.load([batch, head, first, 0]).reshape(TOKENS, BLOCK_D)
    else:
        tokens = first + tl.arange(0, TOKENS)
        columns = tl.arange(0, BLOCK_D)
        inside = (tokens < length)[:, None] & (columns < HEAD_DIM)[None, :]
        tile = tl.load(source + tokens.to(tl.int64)[:, None] * token_stride + columns[None, :], mask=inside, other=0.0)
    return tile  # (TOKENS, BLOCK_D)


@triton.jit
def _attend_level(
    query,
    key,
    value,
    entry_ptr,
    start,
    stop,
    first_entry,
    batch,
    head,
    kv_head,
    position,
    k_len,
    key_stride,
    value_stride,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Attention to the blocks ``entry_ptr[start:stop] - first_entry``: their mean value and log-mass."""
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # of the logits before scaling
    mass = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for step in range(start * TILES, stop * TILES):
        block = tl.load(entry_ptr + step // TILES) - first_entry
        column = block * BLOCK_SIZE + (step % TILES) * BLOCK_N
        keys = _load_tokens(key, batch, kv_head, column, k_len, key_stride, BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA)
        # (BLOCK_M, BLOCK_D) x (BLOCK_D, BLOCK_N)
        logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            columns = column + tl.arange(0, BLOCK_N)
            visible = (columns < k_len)[None, :]
            if CAUSAL:
                visible = visible & (columns[None, :] <= position[:, None])
            logits = tl.where(visible, logits, float("-inf"))
        # A level's first tile holds a key that every query sees: the peak is finite from the first step on.
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        rescale = tl.exp2((peak - new_peak) * scale_log2)
        weights = tl.exp2(logits * scale_log2 - (new_peak * scale_log2 - SHIFT)[:, None])
        mass = mass * rescale + tl.sum(weights, 1)
        values = _load_tokens(value, batch, head, column, k_len, value_stride, BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA)
        # (BLOCK_M, BLOCK_N) x (BLOCK_N, BLOCK_D)
        total = tl.dot(weights.to(values.dtype), values, total * rescale[:, None], input_precision=PRECISION)
        peak = new_peak
    return total / mass[:, None], (peak * scale_log2 - SHIFT + tl.log2(mass)) * LN_2


@triton.jit
def _store_level(
    mean_ptr, mass_ptr, mean, mass, level, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows = level * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside = tl.broadcast_to((columns < HEAD_DIM)[None, :], (BLOCK_M, BLOCK_D))
    tl.store(mean_ptr + rows[:, None] * HEAD_DIM + columns[None, :], mean.to(mean_ptr.dtype.element_ty), mask=inside)
    tl.store(mass_ptr + rows, mass)


@triton.jit(do_not_specialize=RUNTIME)
def _level_attention_kernel(
    query_ptr,
    key,  # descriptor of, or pointer to, (batch, k_heads, k_len, head_dim)
    value,  # likewise (batch, heads, k_len, head_dim), projected
    entry_ptr,  # (batch, heads, q_blocks, k_blocks): level * k_blocks + block, ascending
    bound_ptr,  # (batch, heads, q_blocks, levels + 1): where each level begins among a row's entries
    mean_ptr,  # (programs, levels, BLOCK_M, head_dim)
    mass_ptr,  # (programs, levels, BLOCK_M): natural logarithms, -inf where a level holds no block
    query_stride_batch,
    query_stride_head,
    query_stride,
    key_stride_batch,
    key_stride_head,
    key_stride,
    value_stride_batch,
    value_stride_head,
    value_stride,
    first_program,
    first_head,
    heads,
    group,
    q_len,
    k_len,
    q_blocks,
    k_blocks,
    levels,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,
    SIGN: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Each level of one query tile by itself: its mean projected value and its log-mass, per query."""
    slot = tl.program_id(0)
    tiles = tl.cdiv(q_len, BLOCK_M)
    pair = (first_program + slot) // tiles
    tile = tiles - 1 - (first_program + slot) % tiles  # the longest rows first
    batch = pair // heads
    head = pair % heads
    kv_head = (first_head + head) // group
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    query_ptr += batch.to(tl.int64) * query_stride_batch + (first_head + head).to(tl.int64) * query_stride_head
    inside = (rows < q_len)[:, None] & (columns < HEAD_DIM)[None, :]
    query_offsets = rows.to(tl.int64)[:, None] * query_stride + columns[None, :]
    query = tl.load(query_ptr + query_offsets, mask=inside, other=0.0)  # (BLOCK_M, BLOCK_D)
    if SIGN != 1:
        query = query * SIGN
    if not USE_TMA:
        key += batch.to(tl.int64) * key_stride_batch + kv_head.to(tl.int64) * key_stride_head
        value += batch.to(tl.int64) * value_stride_batch + head.to(tl.int64) * value_stride_head
    position = k_len - q_len + rows
    row = pair.to(tl.int64) * q_blocks + tile * BLOCK_M // BLOCK_SIZE
    entry_ptr += row * k_blocks
    bound_ptr += row * (levels + 1)
    mean_ptr += slot.to(tl.int64) * levels * BLOCK_M * HEAD_DIM
    mass_ptr += slot.to(tl.int64) * levels * BLOCK_M

    # Only blocks that are always kept, level 0, hold keys ahead of a query; any block may be the last one.
    start = tl.load(bound_ptr + 1)
    mean, mass = _attend_level(
        query, key, value, entry_ptr, 0, start, 0, batch, head, kv_head, position, k_len, key_stride, value_stride,
        scale_log2, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_M, BLOCK_N, CAUSAL, CAUSAL or RAGGED, SHIFT, PRECISION, USE_TMA,
    )  # fmt: skip
    _store_level(mean_ptr, mass_ptr, mean, mass, 0, BLOCK_M, HEAD_DIM, BLOCK_D)
    for level in range(1, levels):
        stop = tl.load(bound_ptr + level + 1)
        if stop > start:
            mean, mass = _attend_level(
                query, key, value, entry_ptr, start, stop, level * k_blocks, batch, head, kv_head, position, k_len,
                key_stride, value_stride, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_M, BLOCK_N, False,
                RAGGED and not CAUSAL, SHIFT, PRECISION, USE_TMA,
            )  # fmt: skip
            _store_level(mean_ptr, mass_ptr, mean, mass, level, BLOCK_M, HEAD_DIM, BLOCK_D)
        else:
            tl.store(mass_ptr + level * BLOCK_M + tl.arange(0, BLOCK_M), tl.full((BLOCK_M,), float("-inf"), tl.float32))
        start = stop


@triton.jit(do_not_specialize=["first_program", "q_len", "levels"])
def _level_error_kernel(
    mean_ptr,  # (programs, levels, BLOCK_M, head_dim)
    mass_ptr,  # (programs, levels, BLOCK_M): log-masses, -inf where a level holds no block
    kept_ptr,  # likewise, of each level and all before it
    dropped_ptr,  # likewise, of all levels after it
    error_ptr,  # (batch, heads, tiles, column blocks, levels)
    first_program,
    q_len,
    levels,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEVEL_BLOCK: tl.constexpr,
    LEVEL_BLOCKS: tl.constexpr,
    UPSCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Squared difference from the dense output after each level, summed over a query tile and some columns."""
    slot = tl.program_id(0)
    target = tl.program_id(1) * LEVEL_BLOCK + tl.arange(0, LEVEL_BLOCK)  # levels whose error this program sums
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    tiles = tl.cdiv(q_len, BLOCK_M)
    pair = (first_program + slot) // tiles
    tile = tiles - 1 - (first_program + slot) % tiles
    masses_begin = slot.to(tl.int64) * levels * BLOCK_M
    mean_ptr += masses_begin * HEAD_DIM
    mass_ptr += masses_begin
    kept_ptr += masses_begin
    dropped_ptr += masses_begin
    error = tl.zeros((ROWS, LEVEL_BLOCK), tl.float32)
    for first_row in range(0, BLOCK_M, ROWS):
        rows = first_row + tl.arange(0, ROWS)
        target_offsets = tl.minimum(target, levels - 1)[None, :] * BLOCK_M + rows[:, None]
        kept_mass = tl.load(kept_ptr + target_offsets)  # (ROWS, LEVEL_BLOCK)
        dropped_mass = tl.load(dropped_ptr + target_offsets)  # (ROWS, LEVEL_BLOCK)
        some = tl.where(dropped_mass == float("-inf"), 0.0, dropped_mass)
        difference = tl.zeros((ROWS, LEVEL_BLOCK, COLUMNS), tl.float32)  # kept mean - dropped mean
        for part in tl.static_range(LEVEL_BLOCKS):
            source = part * LEVEL_BLOCK + tl.arange(0, LEVEL_BLOCK)
            source_offsets = source[None, :] * BLOCK_M + rows[:, None]
            real = tl.broadcast_to((source < levels)[None, :], (ROWS, LEVEL_BLOCK))
            masses = tl.load(mass_ptr + source_offsets, mask=real, other=float("-inf"))  # (ROWS, LEVEL_BLOCK)
            inside = (masses != float("-inf"))[:, :, None] & (columns < HEAD_DIM)[None, None, :]
            mean_offsets = source_offsets[:, :, None] * HEAD_DIM + columns[None, None, :]
            means = tl.load(mean_ptr + mean_offsets, mask=inside, other=0.0)  # (ROWS, LEVEL_BLOCK, COLUMNS)
            kept = source[None, None, :] <= target[None, :, None]
            shares = tl.exp(masses[:, None, :] - tl.where(kept, kept_mass[:, :, None], some[:, :, None]))
            shares = tl.where(kept, shares, -shares).to(means.dtype)
            # per query (LEVEL_BLOCK, LEVEL_BLOCK) x (LEVEL_BLOCK, COLUMNS)
            difference = tl.dot(shares, means, difference, input_precision=PRECISION)
        dropped_share = UPSCALE / (1 + tl.exp(kept_mass - dropped_mass))
        squares = tl.sum(difference * difference, 2) * dropped_share * dropped_share  # (ROWS, LEVEL_BLOCK)
        exists = tile * BLOCK_M + rows < q_len
        error += tl.where(exists[:, None], squares, 0.0)
    place = ((pair.to(tl.int64) * tiles + tile) * tl.num_programs(2) + tl.program_id(2)) * levels
    tl.store(error_ptr + place + target, tl.sum(error, 0), mask=target < levels)


def sweep_thresholds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    grid: torch.Tensor,
    projection: torch.Tensor,
    geometry: Geometry,
    scale: float,
) -> SweepResult:
    """Every threshold's error and block count, as :func:`xcalib.kernels.reference.sweep_thresholds`.

    The weights are those of XAttention's selection (arXiv 2503.16428); the merge of levels is that of split-key decoding.

    Args:
        query: fp32, fp16 or bf16 ``(batch, q_heads, q_len, head_dim)``, last dimension contiguous.
        key: same dtype ``(batch, k_heads, k_len, head_dim)``.
        value: like ``key``.
        scores: fp32 ``(batch, q_heads, q_blocks, k_blocks)`` of ``estimate_blocks``.
        grid: ``(levels,)`` ascending, the first 0 and the last 1.
        projection: fp32 ``(q_heads, head_dim, R)``.
        geometry: lengths, block size and causality.
        scale: factor of the dot product.

    Returns:
        Errors and counts per head and level; errors are not finite where the arithmetic overflowed. Unlike in the reference,
        logits of one row may lie any distance apart.
    """
    batch, q_heads, _, head_dim = query.shape
    levels = len(grid)
    factors = _square_factors(projection)
    block_scores = batch * geometry.q_blocks * geometry.k_blocks
    at_once = min(SCORE_ELEMENTS // block_scores, PROJECTED_ELEMENTS // (batch * geometry.k_len * head_dim))
    errors, kept = [], []
    for heads in torch.arange(q_heads).split(max(1, at_once)):
        span = slice(int(heads[0]), int(heads[-1]) + 1)
        entries, bounds = _entries_by_level(scores[:, span], grid, geometry)
        projected, exponent = _project(value, heads * key.shape[1] // q_heads, factors[span])
        work = _Work(query, key, projected, entries, bounds, int(heads[0]), levels, geometry, scale)
        squares = _summed_errors(work)  # (batch, heads, levels)
        errors.append((squares * _power_of_two(-2 * (exponent + MASS_EXPONENT))[..., None]).sum(0))
        kept.append(bounds[..., 1:].sum(dim=(0, 2)))
    return SweepResult(torch.cat(errors), torch.cat(kept), batch * geometry.visible_count)


@dataclass(frozen=True)
class _Work:
    """Some heads of every sequence, prepared for the kernels; ``value`` is projected and holds these heads only."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    entries: torch.Tensor
    bounds: torch.Tensor
    first_head: int
    levels: int
    geometry: Geometry
    scale: float

    @property
    def pairs(self) -> int:
        """Sequences times heads."""
        return self.value.shape[0] * self.value.shape[1]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def precision(self) -> str:
        return "ieee" if self.value.dtype == torch.float32 else "tf32"


@dataclass(frozen=True)
class _Levels:
    """What the first kernel hands to the second for consecutive query tiles, ``first`` to ``first + programs``."""

    first: int
    programs: int
    means: torch.Tensor
    masses: torch.Tensor


def _square_factors(projection: torch.Tensor) -> torch.Tensor:
    """fp32 ``(q_heads, D, D)`` with the Gram matrix of each head's ``(D, R)`` projection.

    The ridge, far below fp32's precision, lets a projection of low rank be factored.
    """
    gram = projection.double() @ projection.double().mT  # (q_heads, D, D)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.amax(-1, keepdim=True)
    diagonal += 1e-12 * largest
    factors, failed = torch.linalg.cholesky_ex(gram)
    factors = factors.masked_fill((failed > 0)[:, None, None], torch.nan)
    return factors.masked_fill((largest == 0)[:, None], 0.0).float()


def _entries_by_level(
    scores: torch.Tensor, grid: torch.Tensor, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's key blocks in order of level, and where each level begins.

    Returns:
        int32 ``level * k_blocks + block``, ascending, like ``scores`` (invisible blocks last); int32
        ``(batch, heads, q_blocks, levels + 1)``.
    """
    levels, blocks = len(grid), geometry.k_blocks
    level = block_levels(scores, grid, geometry)
    entries = level.mul_(blocks).add_(torch.arange(blocks, device=scores.device)).int().sort(-1).values
    starts = torch.arange(levels + 1, dtype=torch.int32, device=scores.device) * blocks
    bounds = torch.searchsorted(entries, starts.expand(*entries.shape[:3], -1).contiguous(), out_int32=True)
    return entries, bounds


def _project(value: torch.Tensor, kv_heads: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values times each head's factor and a power of two: fp32 for fp32 values, else fp16 ``(batch, heads, k_len, D)``.

    Returns:
        (projected values, the exponents: int64 ``(batch, heads)``).
    """
    projected = value[:, kv_heads.to(value.device)].float() @ factors
    largest = projected.abs().amax(dim=(-2, -1))
    exponent = (VALUE_EXPONENT - largest.frexp().exponent.long()).clamp_(-100, 100)
    projected *= _power_of_two(exponent)[..., None, None].float()
    return projected.to(torch.float32 if value.dtype == torch.float32 else torch.float16), exponent


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    return torch.pow(2.0, exponent.double())


def _summed_errors(work: _Work) -> torch.Tensor:
    """fp64 ``(batch, heads, levels)``, scaled up by what the projection and the kernel scale by."""
    attention = _attention_config(work)
    error = None
    errors = work.value.new_empty(0)
    for part in _parts(work, attention):
        _attend(work, attention, part)
        kept, dropped = _cumulative(part.masses)
        if error is None:
            error = _error_config(work, attention, part, kept, dropped)
            errors = _unsummed(work, attention, error)
        _merge(work, attention, error, part, kept, dropped, errors)
    return errors.double().sum(dim=(2, 3))


def _unsummed(work: _Work, attention: Config, error: Config) -> torch.Tensor:
    """One number for each tile, block of columns and level, so that they are added in the same order every time."""
    tiles = triton.cdiv(work.geometry.q_len, attention.tiles["BLOCK_M"])
    columns = triton.cdiv(work.head_dim, error.tiles["COLUMNS"])
    shape = (*work.value.shape[:2], tiles, columns, work.levels)
    return torch.empty(shape, dtype=torch.float32, device=work.value.device)


def _cumulative(masses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-masses ``(programs, levels, rows)`` of each level and all before it, and of all after it."""
    kept = masses.logcumsumexp(1)
    from_level = masses.flip(1).logcumsumexp(1).flip(1)
    dropped = functional.pad(from_level[:, 1:], (0, 0, 0, 1), value=-torch.inf)
    return kept, dropped


def _parts(work: _Work, attention: Config) -> Iterator[_Levels]:
    """Query tiles as many at a time as the scratch memory holds; all parts share it."""
    rows = attention.tiles["BLOCK_M"]
    total = work.pairs * triton.cdiv(work.geometry.q_len, rows)
    tile_bytes = work.levels * rows * work.head_dim * work.value.element_size()
    programs = min(total, max(1, SCRATCH_BYTES // tile_bytes))
    means = work.value.new_empty((programs, work.levels, rows, work.head_dim))
    masses = torch.empty(means.shape[:3], dtype=torch.float32, device=means.device)
    for first in range(0, total, programs):
        here = min(programs, total - first)
        yield _Levels(first, here, means, masses[:here])


def _attention_config(work: _Work) -> Config:
    """A query tile lies in one query block, a key tile in one key block."""
    size = work.geometry.block_size
    full = work.value.dtype == torch.float32

    def fitted(config: Config) -> Config:
        tiles = {name: min(config.tiles[name], size) for name in ("BLOCK_M", "BLOCK_N")}
        return Config(config.num_warps, config.num_stages, tiles)

    def measure(config: Config) -> float:
        part = next(_parts(work, config))
        return milliseconds(lambda: _attend(work, config, part))

    candidates = [fitted(config) for config in (FP32_CANDIDATES if full else ATTENTION_CANDIDATES)]
    key = {"head_dim": _padded(work.head_dim), "block_size": size, "bits": 32 if full else 16}
    return fitted(choose("sweep_attention", key, candidates, work.query.device, measure))


def _error_config(work: _Work, attention: Config, part: _Levels, kept: torch.Tensor, dropped: torch.Tensor) -> Config:
    if interpreted():  # its time goes by steps, not by numbers
        return Config(4, 1, {"ROWS": attention.tiles["BLOCK_M"], "COLUMNS": _padded(work.head_dim)})
    key = {"head_dim": _padded(work.head_dim), "bits": 8 * work.value.element_size()}

    def measure(config: Config) -> float:
        errors = _unsummed(work, attention, config)
        return milliseconds(lambda: _merge(work, attention, config, part, kept, dropped, errors))

    return choose("sweep_error", key, ERROR_CANDIDATES, work.query.device, measure)


def _padded(head_dim: int) -> int:
    return max(32, int(triton.next_power_of_2(head_dim)))


def _attend(work: _Work, config: Config, part: _Levels) -> None:
    query, key, value, geometry = work.query, work.key, work.value, work.geometry
    use_tma = fits_tma(key, value)
    padded = _padded(work.head_dim)
    box = [1, 1, config.tiles["BLOCK_N"], padded]
    _level_attention_kernel[(part.programs,)](
        query,
        TensorDescriptor(key, list(key.shape), [*descriptor_strides(key), 1], box) if use_tma else key,
        TensorDescriptor(value, list(value.shape), [*descriptor_strides(value), 1], box) if use_tma else value,
        work.entries,
        work.bounds,
        part.means,
        part.masses,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        part.first,
        work.first_head,
        value.shape[1],
        query.shape[1] // key.shape[1],
        geometry.q_len,
        geometry.k_len,
        geometry.q_blocks,
        geometry.k_blocks,
        work.levels,
        LOG2_E * (abs(work.scale) or 1.0),
        HEAD_DIM=work.head_dim,
        BLOCK_D=padded,
        BLOCK_SIZE=geometry.block_size,
        CAUSAL=geometry.causal,
        RAGGED=geometry.k_len % geometry.block_size != 0,
        SIGN=(work.scale > 0) - (work.scale < 0),
        SHIFT=0 if value.dtype == torch.float32 else FP16_SHIFT,
        PRECISION=work.precision,
        USE_TMA=use_tma,
        **config.launch_arguments(),
    )


def _merge(
    work: _Work,
    attention: Config,
    config: Config,
    part: _Levels,
    kept: torch.Tensor,
    dropped: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    level_block = min(32, max(16, triton.next_power_of_2(work.levels)))
    level_blocks = triton.cdiv(work.levels, level_block)
    _level_error_kernel[(part.programs, level_blocks, errors.shape[3])](
        part.means,
        part.masses,
        kept,
        dropped,
        errors,
        part.first,
        work.geometry.q_len,
        work.levels,
        HEAD_DIM=work.head_dim,
        BLOCK_M=attention.tiles["BLOCK_M"],
        LEVEL_BLOCK=level_block,
        LEVEL_BLOCKS=level_blocks,
        UPSCALE=2.0**MASS_EXPONENT,
        PRECISION=work.precision,
        **config.launch_arguments(),
    )
