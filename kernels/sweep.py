"""What every threshold of a grid does to each head, from one pass over the blocks (the Triton form of the reference's sweep).

A query block's key blocks fall into levels: level ``l`` holds those that the grid's threshold ``l`` keeps and the one before
drops. A program walks a row of blocks in order of level, in one software pipeline. Where the level changes it writes the level's
mean value, and the share that the level has of all that is kept with it, and begins anew. At the row's end it merges these:

    O_l-1 - O_l = share of l * (mean of what l-1 keeps - mean of l),

whose sums from the last level on are O_l - O_dense. Both factors keep their digits however little a level weighs, so nothing
nearly equal is subtracted and no mass underflows. Values are projected first, by a square factor of W_o,h W_o,h^T, so that the
squared norm of that difference is the error.

Programs take tiles of queries from a counter, and each reuses its own memory for the levels' means.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from xcalib.kernels.arguments import exponent_factor
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.reference import SweepResult, block_levels
from xcalib.kernels.tma import descriptor_strides, fits_tma
from xcalib.kernels.tuning import Config, choose, milliseconds, multiprocessors

__all__ = ["CANDIDATES", "FP32_CANDIDATES", "sweep_thresholds"]


def _config(num_warps: int, num_stages: int, block_m: int, block_n: int, **options: int) -> Config:
    return Config(num_warps, num_stages, {"BLOCK_M": block_m, "BLOCK_N": block_n, **options})


# COLUMNS of the means are merged at a time.
CANDIDATES = (
    _config(8, 2, 64, 64, COLUMNS=64),
    _config(8, 2, 128, 64, COLUMNS=64),
    _config(4, 2, 64, 64, COLUMNS=64),
    _config(8, 3, 128, 64, COLUMNS=64),
    _config(8, 2, 128, 128, COLUMNS=64),
)
# IEEE arithmetic uses no tensor cores, and each thread holds whole rows of its operands: tiles are small.
FP32_CANDIDATES = (_config(8, 1, 64, 64, COLUMNS=64), _config(8, 1, 32, 32, COLUMNS=64))

# fp16 keeps 11 bits of what is at least 2^-14: weights, at most 1, are shifted up.
FP16_SHIFT = 14
# Values and factors are scaled so that projected values, and their differences, stay below fp16's largest number, 2^16.
OPERAND_EXPONENT = 7
# The squares of small shares would be subnormal.
MASS_EXPONENT = 30
# Of a level's mean, changed to another layout at a time.
PIECE_BYTES = 2**14
# A row's entries are a level times this, and a block.
LEVEL_STEP = tl.constexpr(2**16)
# Bounds of what is in flight at once: the levels' means, the projected values, the block scores of some heads.
SCRATCH_BYTES = 2**30
PROJECTED_ELEMENTS = 2**28
SCORE_ELEMENTS = 2**24


# Not worth a kernel of their own for each kind of number.
RUNTIME = ["first_head", "heads", "group", "q_len", "k_len", "q_blocks", "k_blocks", "levels", "numbers"]


@triton.jit
def _load_tokens(
    source,  # descriptor, or pointer to (batch, heads, tokens, head_dim)
    strides,  # of batch, heads and tokens
    batch,
    head,
    first,
    length,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Tokens of one head, zeros past the end."""
    if USE_TMA:
        tile = source.load([batch, head, first, 0]).reshape(TOKENS, BLOCK_D)
    else:
        tokens = first + tl.arange(0, TOKENS)
        columns = tl.arange(0, BLOCK_D)
        inside = (tokens < length)[:, None] & (columns < HEAD_DIM)[None, :]
        source += tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
        tile = tl.load(source + tokens.to(tl.int64)[:, None] * strides[2] + columns[None, :], mask=inside, other=0.0)
    return tile  # (TOKENS, BLOCK_D)


@triton.jit
def _close_level(
    mean_ptr,  # (levels, BLOCK_M, BLOCK_D)
    mass_ptr,  # (2 + levels, BLOCK_M): peak and mass of all that is kept so far; each level's share of what is kept with it
    number,  # of the level, among those that hold blocks
    peak,  # (BLOCK_M,)
    mass,  # (BLOCK_M, 8)
    total,  # (BLOCK_M, BLOCK_D)
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Writes a level's mean and share. What is kept waits in memory: the loop over tiles has no register to spare.

    Threads may read there what others wrote a level before: every tile's operands go through shared memory, behind a barrier.
    """
    rows = tl.arange(0, BLOCK_M)
    mass_ptr += rows
    level_mass = tl.sum(mass, 1)
    kept_peak = tl.load(mass_ptr)
    new_peak = tl.maximum(peak, kept_peak)
    own = level_mass * tl.exp2(peak - new_peak)
    kept_mass = tl.load(mass_ptr + BLOCK_M) * tl.exp2(kept_peak - new_peak) + own
    tl.store(mass_ptr, new_peak)
    tl.store(mass_ptr + BLOCK_M, kept_mass)
    tl.store(mass_ptr + (2 + number) * BLOCK_M, own / kept_mass)
    mean = (total * (1.0 / level_mass)[:, None]).to(mean_ptr.dtype.element_ty)
    # In pieces: shared memory for the change of layout, taken beside the pipeline's, decides how many programs fit.
    columns = tl.arange(0, BLOCK_D // PIECES)
    mean_ptr += number * (BLOCK_M * BLOCK_D) + rows[:, None] * BLOCK_D + columns[None, :]
    if PIECES == 1:
        tl.store(mean_ptr, mean)
    else:
        left, right = mean.reshape(BLOCK_M, 2, BLOCK_D // 2).permute(0, 2, 1).split()
        tl.store(mean_ptr, left)
        tl.store(mean_ptr + BLOCK_D // 2, right)


@triton.jit
def _attend_levels(
    query,  # (BLOCK_M, BLOCK_D)
    keys,  # source and strides
    values,
    place,  # batch, query head among those of ``value``, key head, keys
    entry_ptr,
    count,
    seen,  # keys that the first query sees; the following ones see CAUSAL more each
    scale,
    mean_ptr,
    mass_ptr,
    SHIFT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
    CAUSAL: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Each level of a row by itself: writes means and shares one after the other and returns how many there are."""
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # of the scaled logits
    mass = tl.zeros((BLOCK_M, 8), tl.float32)  # sums of every eighth key: a thread's own registers
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tl.store(mass_ptr + tl.arange(0, BLOCK_M), peak)
    tl.store(mass_ptr + BLOCK_M + tl.arange(0, BLOCK_M), tl.zeros((BLOCK_M,), tl.float32))
    written = 0
    following = tl.load(entry_ptr)
    level = following // LEVEL_STEP
    for step in tl.range(0, count * TILES):
        entry = following
        # the next entry already: its latency passes behind this tile's arithmetic
        following = tl.load(entry_ptr + tl.minimum((step + 1) // TILES, count - 1))
        start = entry % LEVEL_STEP * BLOCK_SIZE + step % TILES * BLOCK_N
        if entry // LEVEL_STEP != level:
            _close_level(mean_ptr, mass_ptr, written, peak, mass, total, BLOCK_M, BLOCK_D, PIECES)
            written += 1
            level = entry // LEVEL_STEP
            peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # what was summed before decays to zero
        key = _load_tokens(keys[0], keys[1], place[0], place[2], start, place[3], BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA)
        # (BLOCK_M, BLOCK_D) x (BLOCK_D, BLOCK_N)
        logits = tl.dot(query, key.T, input_precision="ieee")
        if start + BLOCK_N > tl.minimum(seen, place[3]):
            limit = tl.minimum(seen + CAUSAL * tl.arange(0, BLOCK_M), place[3])
            inside = start + tl.arange(0, BLOCK_N)[None, :] < limit[:, None]
            logits = tl.where(inside, logits, float("-inf"))
        # A level's first tile holds a key that every query sees: the peak is finite from then on.
        new_peak = tl.maximum(peak, tl.max(logits, 1) * scale)
        decay = tl.exp2(peak - new_peak)
        weights = tl.exp2(logits * scale - (new_peak - SHIFT)[:, None])
        mass = mass * decay[:, None] + tl.sum(weights.reshape(BLOCK_M, BLOCK_N // 8, 8), 1)
        peak = new_peak
        value = _load_tokens(
            values[0], values[1], place[0], place[1], start, place[3], BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA
        )
        # (BLOCK_M, BLOCK_N) x (BLOCK_N, BLOCK_D)
        total = tl.dot(weights.to(value.dtype), value, total * decay[:, None], input_precision="ieee")
    tl.debug_barrier()
    _close_level(mean_ptr, mass_ptr, written, peak, mass, total, BLOCK_M, BLOCK_D, PIECES)
    return written + 1


@triton.jit
def _merge_levels(
    mean_ptr,  # (levels, BLOCK_M, BLOCK_D); becomes what is kept before a level minus that level's mean
    mass_ptr,  # (2 + levels, BLOCK_M)
    error_ptr,  # (BLOCK_D / COLUMNS, levels of the grid)
    count,
    queries,
    levels,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPSCALE: tl.constexpr,
):
    """Squared difference from the dense output where only the levels before each are kept, summed over the tile's queries."""
    rows = tl.arange(0, BLOCK_M)
    exists = rows < queries
    for part in tl.static_range(BLOCK_D // COLUMNS):
        offsets = rows[:, None] * BLOCK_D + (part * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        kept = tl.load(mean_ptr + offsets).to(tl.float32)  # (BLOCK_M, COLUMNS)
        for level in tl.range(1, count, num_stages=3):
            target_ptr = mean_ptr + level * (BLOCK_M * BLOCK_D) + offsets
            difference = kept - tl.load(target_ptr).to(tl.float32)
            tl.store(target_ptr, difference.to(mean_ptr.dtype.element_ty))
            kept -= tl.load(mass_ptr + (2 + level) * BLOCK_M + rows)[:, None] * difference
        tl.debug_barrier()
        error = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        # zero, unless something was not a number
        unsound = tl.where(exists, tl.sum(kept * 0.0, 1), 0.0)
        tl.store(error_ptr + part * levels + count - 1, tl.sum(unsound))
        for step in tl.range(1, count, num_stages=3):
            level = count - step
            difference = tl.load(mean_ptr + level * (BLOCK_M * BLOCK_D) + offsets).to(tl.float32)
            share = tl.load(mass_ptr + (2 + level) * BLOCK_M + rows) * UPSCALE
            error += share[:, None] * difference
            squares = tl.where(exists, tl.sum(error * error, 1), 0.0)
            tl.store(error_ptr + part * levels + level - 1, tl.sum(squares))


@triton.jit
def _place_of(number, pairs, tiles):
    """Head and tile of a running number: head after head, longest rows first, and short rows of all heads at the end."""
    later = tiles // 2
    first = number < pairs * (tiles - later)
    among = tl.where(first, tiles - later, later)
    number = tl.where(first, number, number - pairs * (tiles - later))
    return number // among, tl.where(first, tiles, later) - 1 - number % among


@triton.jit(do_not_specialize=RUNTIME)
def _sweep_kernel(
    query_ptr,
    key,  # descriptor of, or pointer to, (batch, k_heads, k_len, head_dim)
    value,  # likewise (batch, heads, k_len, head_dim), projected
    entry_ptr,  # (batch, heads, q_blocks, k_blocks): level and block, levels ascending, invisible blocks last
    bound_ptr,  # (batch, heads, q_blocks, levels + 1): where each level begins among a row's entries
    mean_ptr,  # (programs, levels, BLOCK_M, BLOCK_D), of the levels that hold blocks
    mass_ptr,  # (programs, 2 + levels, BLOCK_M)
    error_ptr,  # (batch, heads, tiles, BLOCK_D / COLUMNS, levels), likewise
    counter_ptr,
    query_strides,  # of batch, heads and tokens
    key_strides,
    value_strides,
    first_head,
    heads,
    group,
    q_len,
    k_len,
    q_blocks,
    k_blocks,
    levels,
    numbers,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHIFT: tl.constexpr,
    UPSCALE: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    mean_ptr += tl.program_id(0).to(tl.int64) * levels * (BLOCK_M * BLOCK_D)
    mass_ptr += tl.program_id(0).to(tl.int64) * (2 + levels) * BLOCK_M
    tiles = tl.cdiv(q_len, BLOCK_M)
    number = tl.atomic_add(counter_ptr, 1)
    while number < numbers:
        pair, tile = _place_of(number, numbers // tiles, tiles)
        batch, head = pair // heads, pair % heads
        first = tile * BLOCK_M
        query = _load_tokens(
            query_ptr, query_strides, batch, first_head + head, first, q_len, BLOCK_M, HEAD_DIM, BLOCK_D, False
        )
        seen = k_len
        if CAUSAL:
            seen = k_len - q_len + first + 1
        row = pair.to(tl.int64) * q_blocks + first // BLOCK_SIZE
        count = tl.load(bound_ptr + row * (levels + 1) + levels)
        written = _attend_levels(
            query, (key, key_strides), (value, value_strides), (batch, head, (first_head + head) // group, k_len),
            entry_ptr + row * k_blocks, count, seen, scale, mean_ptr, mass_ptr, SHIFT, HEAD_DIM, BLOCK_D,
            BLOCK_SIZE, BLOCK_M, BLOCK_N, PIECES, CAUSAL, USE_TMA,
        )  # fmt: skip
        tl.debug_barrier()  # other threads read what these wrote, and below write where others read
        errors = error_ptr + (pair.to(tl.int64) * tiles + tile) * (BLOCK_D // COLUMNS) * levels
        _merge_levels(mean_ptr, mass_ptr, errors, written, q_len - first, levels, BLOCK_M, BLOCK_D, COLUMNS, UPSCALE)
        tl.debug_barrier()
        number = tl.atomic_add(counter_ptr, 1)


def sweep_thresholds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    grid: torch.Tensor,
    projection: torch.Tensor,
    geometry: Geometry,
    scale: float,
    order: str = "score",
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
        order: of preference, ``"score"`` or ``"recent"``.

    Returns:
        Errors and counts per head and level; errors are not finite where the arithmetic overflowed. Unlike in the reference,
        logits of one row may lie any distance apart.
    """
    if scale < 0:
        query, scale = -query, -scale
    dtype = torch.float32 if value.dtype == torch.float32 else torch.float16
    factors = _square_factors(projection)
    # bounds of sums over head_dim, so that no product overflows
    factors, factor_exponent = _scaled(factors, factors.abs().sum(-2).amax(-1), dtype)
    values, value_exponent = _scaled(value, torch.linalg.vector_norm(value, ord=torch.inf, dim=(-2, -1)), dtype)
    errors, kept = [], []
    for heads in _parts(query, key, geometry):
        entries, bounds = _entries_by_level(scores[:, heads], grid, geometry, order)
        projected = _project(values, factors, heads)
        errors.append(_Work(query, key, projected, entries, bounds, heads.start, geometry, scale).errors())
        kept.append(bounds[..., 1:].sum(dim=(0, 2)))
    group = query.shape[1] // key.shape[1]
    exponent = factor_exponent + value_exponent[..., None].expand(-1, -1, group).flatten(1)  # (batch, q_heads)
    error = torch.cat(errors, 1) * _power_of_two(-2 * (exponent + MASS_EXPONENT))[..., None]
    return SweepResult(error.sum(0), torch.cat(kept), query.shape[0] * geometry.visible_count)


def _square_factors(projection: torch.Tensor) -> torch.Tensor:
    """fp32 ``(q_heads, D, D)`` with the Gram matrix of each head's ``(D, R)`` projection.

    The ridge, far below fp32's precision, lets a projection of low rank be factored.
    """
    head_dim, rank = projection.shape[1:]
    if rank <= head_dim:
        return functional.pad(projection, (0, head_dim - rank))
    gram = projection.double() @ projection.double().mT  # (q_heads, D, D)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.amax(-1, keepdim=True)
    diagonal += 1e-12 * largest
    factors, failed = torch.linalg.cholesky_ex(gram)
    factors = factors.masked_fill((failed > 0)[:, None, None], torch.nan)
    return factors.masked_fill((largest == 0)[:, None], 0.0).float()


def _scaled(tensor: torch.Tensor, bound: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``tensor`` times the power of two that takes the bounds ``(...)`` below 2^OPERAND_EXPONENT; int64 exponents ``(...)``."""
    exponent = (OPERAND_EXPONENT - bound.float().frexp().exponent.long()).clamp_(-100, 100)
    return (tensor * _power_of_two(exponent)[..., None, None].float()).to(dtype), exponent


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    return torch.pow(2.0, exponent.double())


def _parts(query: torch.Tensor, key: torch.Tensor, geometry: Geometry) -> Iterator[slice]:
    """Query heads as many at a time as memory allows, whole groups that share a key head if it allows that."""
    batch, q_heads, _, head_dim = query.shape
    group = q_heads // key.shape[1]
    block_scores = batch * geometry.q_blocks * geometry.k_blocks
    most = min(SCORE_ELEMENTS // block_scores, PROJECTED_ELEMENTS // (batch * geometry.k_len * head_dim))
    step = max(1, most // group * group)
    return (slice(first, min(first + step, q_heads)) for first in range(0, q_heads, step))


def _entries_by_level(
    scores: torch.Tensor, grid: torch.Tensor, geometry: Geometry, order: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's key blocks in order of level, and where each level begins.

    Returns:
        int32 ``level * LEVEL_STEP + block``, ascending, like ``scores`` (invisible blocks last); int32
        ``(batch, heads, q_blocks, levels + 1)``.
    """
    levels, blocks = len(grid), geometry.k_blocks
    level = block_levels(scores, grid, geometry, order).int()
    entries = level.mul_(LEVEL_STEP.value).add_(_counts(blocks, scores.device)).sort(-1).values
    starts = _counts(levels + 1, scores.device) * LEVEL_STEP.value
    bounds = torch.searchsorted(entries, starts.expand(*entries.shape[:3], -1).contiguous(), out_int32=True)
    return entries, bounds


def _counts(stop: int, device: torch.device) -> torch.Tensor:
    return torch.arange(stop, dtype=torch.int32, device=device)


def _project(values: torch.Tensor, factors: torch.Tensor, heads: slice) -> torch.Tensor:
    """``(batch, heads, k_len, D)``: values ``(batch, k_heads, k_len, D)`` times some heads' factors ``(q_heads, D, D)``."""
    batch, k_heads, k_len, head_dim = values.shape
    group = len(factors) // k_heads
    projected = values.new_empty((batch, heads.stop - heads.start, k_len, head_dim))
    run = min(group, heads.stop - heads.start)  # that share a key head
    for sequence in range(batch):
        for first in range(heads.start, heads.stop, run):
            shared = values[sequence, first // group].expand(run, -1, -1)
            here = slice(first - heads.start, first - heads.start + run)
            torch.bmm(shared, factors[first : first + run], out=projected[sequence, here])
    return projected


@dataclass(frozen=True)
class _Work:
    """Some heads of every sequence, prepared for the kernel; ``value`` is projected and holds these heads only."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    entries: torch.Tensor
    bounds: torch.Tensor
    first_head: int
    geometry: Geometry
    scale: float

    def errors(self) -> torch.Tensor:
        """fp64 ``(batch, heads, levels)``, scaled up by what the operands and the kernel's shares are scaled by."""
        config = self._config()
        written = self._launch(config).double().sum(3)  # (batch, heads, tiles, levels)
        nonempty = self.bounds.diff() > 0
        per_block = self.geometry.block_size // config.tiles["BLOCK_M"]
        place = (nonempty.cumsum(-1) - 1)[:, :, :, None].expand(-1, -1, -1, per_block, -1).flatten(2, 3)
        return written.gather(-1, place[:, :, : written.shape[2]]).sum(2)

    def _config(self) -> Config:
        """A query tile lies in one query block, a key tile in one key block."""
        size, width = self.geometry.block_size, _padded(self.query.shape[3])
        full = self.value.dtype == torch.float32

        def fitted(config: Config) -> Config:
            tiles = {name: min(config.tiles[name], size) for name in ("BLOCK_M", "BLOCK_N")}
            tiles["COLUMNS"] = min(config.tiles["COLUMNS"], width)
            return Config(config.num_warps, config.num_stages, {**config.tiles, **tiles})

        candidates = [fitted(config) for config in (FP32_CANDIDATES if full else CANDIDATES)]
        key = {"head_dim": width, "block_size": size, "bits": 32 if full else 16}
        device = self.query.device
        chosen = choose("sweep_attention", key, candidates, device, lambda c: milliseconds(lambda: self._launch(c)))
        return fitted(chosen)

    def _launch(self, config: Config) -> torch.Tensor:
        """fp32 ``(batch, heads, tiles, parts of the columns, levels)``: one number each, always added in the same order."""
        query, key, value, geometry = self.query, self.key, self.value, self.geometry
        device, padded, levels = query.device, _padded(query.shape[3]), self.bounds.shape[3] - 1
        rows, tokens = config.tiles["BLOCK_M"], config.tiles["BLOCK_N"]
        tiles = triton.cdiv(geometry.q_len, rows)
        numbers = value.shape[0] * value.shape[1] * tiles
        most = SCRATCH_BYTES // (levels * rows * padded * value.element_size())
        programs = max(1, min(numbers, most, multiprocessors(device) * max(1, 16 // config.num_warps)))
        means = value.new_empty((programs, levels, rows, padded))
        masses = torch.empty((programs, 2 + levels, rows), dtype=torch.float32, device=device)
        parts = padded // config.tiles["COLUMNS"]
        errors = torch.empty((*value.shape[:2], tiles, parts, levels), dtype=torch.float32, device=device)
        use_tma = fits_tma(key, value)
        _sweep_kernel[(programs,)](
            query,
            _source(key, tokens, padded, use_tma),
            _source(value, tokens, padded, use_tma),
            self.entries,
            self.bounds,
            means,
            masses,
            errors,
            torch.zeros(1, dtype=torch.int32, device=device),
            *(tensor.stride()[:3] for tensor in (query, key, value)),
            self.first_head,
            value.shape[1],
            query.shape[1] // key.shape[1],
            geometry.q_len,
            geometry.k_len,
            geometry.q_blocks,
            geometry.k_blocks,
            levels,
            numbers,
            exponent_factor(self.scale),
            HEAD_DIM=query.shape[3],
            BLOCK_D=padded,
            BLOCK_SIZE=geometry.block_size,
            PIECES=1 if rows * padded * value.element_size() <= PIECE_BYTES else 2,
            CAUSAL=geometry.causal,
            SHIFT=0 if value.dtype == torch.float32 else FP16_SHIFT,
            UPSCALE=2.0**MASS_EXPONENT,
            USE_TMA=use_tma,
            **config.launch_arguments(),
        )
        return errors


def _source(tensor: torch.Tensor, tokens: int, width: int, use_tma: bool) -> Any:
    """What the kernel reads a tile from: a descriptor, or the tensor."""
    if not use_tma:
        return tensor
    return TensorDescriptor(tensor, list(tensor.shape), [*descriptor_strides(tensor), 1], [1, 1, tokens, width])


def _padded(head_dim: int) -> int:
    return max(32, int(triton.next_power_of_2(head_dim)))
