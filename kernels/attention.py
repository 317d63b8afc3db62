"""Block sparse attention in Triton: softmax over the listed key blocks of each query block, online, in base 2.

One program takes BLOCK_M queries of one head and walks its row of the block lists. The walk is one software pipeline whatever
the mask: a branch that all threads take together masks the tiles that reach past the first query (or past the last key), so
the others cost what a dense kernel's do, and a short list has no second pipeline to fill. On Hopper and later the tiles come by
TMA; where strides or addresses do not allow that, and before Hopper, by pointers.

Programs start longest first (:mod:`xcalib.kernels.order`); the hardware starts the next as another ends. On Hopper a kernel of
its own, :mod:`xcalib.kernels.attention_hopper`, takes the calls that it serves.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from xcalib.kernels import attention_hopper
from xcalib.kernels.arguments import exponent_factor
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.order import launch_order
from xcalib.kernels.selection import BlockLists
from xcalib.kernels.tma import descriptor_strides, fits_tma
from xcalib.kernels.tuning import Config, choose, interpreted, milliseconds

__all__ = [
    "CANDIDATES",
    "FP32_CANDIDATES",
    "PackedLists",
    "block_sparse_attention",
    "block_sparse_attention_varlen",
    "block_sparse_attention_with_lse",
    "pack_lists",
]


def _config(num_warps: int, num_stages: int, block_m: int, block_n: int, **options: int) -> Config:
    return Config(num_warps, num_stages, {"BLOCK_M": block_m, "BLOCK_N": block_n, **options})


# Triton's warp specialisation (3.6) is not among these: on an H200 its results were wrong, and it was no faster.
# maxnreg=128 lets two programs of eight warps share a multiprocessor, one's softmax beside the other's products.
CANDIDATES = (
    _config(8, 3, 128, 128),
    _config(8, 2, 128, 128),
    _config(8, 3, 128, 64),
    _config(8, 2, 128, 64),
    _config(8, 2, 128, 64, maxnreg=128),
    _config(4, 3, 64, 64),
    _config(4, 2, 64, 64),
    _config(4, 2, 64, 128),
    _config(4, 2, 64, 32),
)
# IEEE arithmetic uses no tensor cores, and each thread holds whole rows of its operands: tiles are small.
FP32_CANDIDATES = (_config(8, 1, 64, 64), _config(8, 1, 64, 32), _config(8, 1, 32, 32))

TABLE_COLUMNS = 7


@dataclass(frozen=True, eq=False)
class PackedLists:
    """The block lists of several sequences, whose rows of query blocks follow each other.

    Attributes:
        indices: int16, one dimension: ``(q_heads, q_blocks, k_blocks)`` of each sequence, flattened, one after the other.
        counts: int32 ``(q_heads, sum of q_blocks)``.
        geometries: one for each sequence; they share block size and causality.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    geometries: tuple[Geometry, ...]


def pack_lists(lists: Sequence[BlockLists], geometries: Sequence[Geometry]) -> PackedLists:
    """Joins the lists of sequences that were scored and selected one by one (each a batch of one).

    Args:
        lists: one for each sequence, ``(1, q_heads, ...)``.
        geometries: the sequences' lengths; from ``cu_seqlens``, the differences of neighbours.
    """
    if len({(geometry.block_size, geometry.causal) for geometry in geometries}) != 1 or len(lists) != len(geometries):
        raise ValueError(
            f"lists are {len(lists)} and geometries {tuple(geometries)}, "
            "expected as many, at least one, with the same block_size and causal"
        )
    indices = torch.cat([each.indices.reshape(-1) for each in lists])
    counts = torch.cat([each.counts[0] for each in lists], dim=-1)
    return PackedLists(indices, counts, tuple(geometries))


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    geometry: Geometry,
    scale: float,
) -> torch.Tensor:
    """:func:`xcalib.kernels.block_sparse_attention` over lists instead of a mask.

    Args:
        query: fp32, fp16 or bf16 ``(batch, q_heads, q_len, head_dim)``, head_dim up to 256.
        key: same dtype, ``(batch, k_heads, k_len, head_dim)``; any strides, the last dimension contiguous.
        value: like ``key``.
        lists: ascending visible blocks; what lies past the counts is not used.
        geometry: lengths, block size and causality.
        scale: factor of the dot product.

    Returns:
        Like ``query``, laid out as ``(batch, q_len, q_heads, head_dim)`` and transposed: what transformers does to it next
        copies nothing. Rows without blocks, and queries that see none of their kept keys, are zero.
    """
    output = _empty_output(query)
    _attention(query, key, value, output, lists, geometry, scale)
    return output


def block_sparse_attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    geometry: Geometry,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`block_sparse_attention` and the natural log-sum-exp of each query's scaled dot products with its kept keys.

    Returns:
        (output, fp32 ``(batch, q_heads, q_len)``, minus infinity where a query sees no kept key).
    """
    output = _empty_output(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    _attention(query, key, value, output, lists, geometry, scale, lse=lse)
    return output, lse


def block_sparse_attention_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lists: PackedLists, scale: float
) -> torch.Tensor:
    """:func:`block_sparse_attention` of several sequences of any lengths, each aligned to its own last key.

    The lengths are those of ``lists.geometries``: a launch needs them on the host, where ``cu_seqlens`` would have to be
    copied from the GPU.

    Args:
        query: fp32, fp16 or bf16 ``(sum of q_len, q_heads, head_dim)``, the sequences one after the other.
        key: same dtype, ``(sum of k_len, k_heads, head_dim)``.
        value: like ``key``.
        lists: from :func:`pack_lists`.
        scale: factor of the dot product.

    Returns:
        Like ``query``, contiguous.

    Raises:
        ValueError: the tensors do not hold as many tokens as the geometries.
    """
    q_tokens, k_tokens = (sum(lengths) for lengths in zip(*((g.q_len, g.k_len) for g in lists.geometries), strict=True))
    if (query.shape[0], key.shape[0]) != (q_tokens, k_tokens):
        raise ValueError(
            f"query holds {query.shape[0]} tokens and key {key.shape[0]}, "
            f"expected {q_tokens} and {k_tokens}, the sums over the sequences"
        )
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rows = BlockLists(lists.indices, lists.counts.unsqueeze(0))
    table = _row_table(lists.geometries, query.shape[1], query.device)
    query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
    _attention(query, key, value, output.transpose(0, 1).unsqueeze(0), rows, lists.geometries[0], scale, table=table)
    return output


def _empty_output(query: torch.Tensor) -> torch.Tensor:
    batch, heads, length, head_dim = query.shape
    return torch.empty((batch, length, heads, head_dim), dtype=query.dtype, device=query.device).transpose(1, 2)


@functools.lru_cache(maxsize=64)
def _row_table(geometries: tuple[Geometry, ...], q_heads: int, device: torch.device) -> torch.Tensor:
    """Where each row of query blocks of packed sequences begins: int64 ``(sum of q_blocks, TABLE_COLUMNS)``.

    Columns: first query, in the packed tensor; queries from there to the sequence's end; position of the first query among
    the sequence's keys; first key, in the packed tensor; keys; first list entry, of head 0; list entries between heads.
    """
    tables = []
    first_query = first_key = first_entry = 0
    for geometry in geometries:
        rows = torch.arange(geometry.q_blocks)
        table = torch.empty((geometry.q_blocks, TABLE_COLUMNS), dtype=torch.int64)
        table[:, 0] = first_query + rows * geometry.block_size
        table[:, 1] = geometry.q_len - rows * geometry.block_size
        table[:, 2] = geometry.offset + rows * geometry.block_size
        table[:, 3] = first_key
        table[:, 4] = geometry.k_len
        table[:, 5] = first_entry + rows * geometry.k_blocks
        table[:, 6] = geometry.q_blocks * geometry.k_blocks
        tables.append(table)
        first_query += geometry.q_len
        first_key += geometry.k_len
        first_entry += q_heads * geometry.q_blocks * geometry.k_blocks
    return torch.cat(tables).to(device)


@dataclass(frozen=True, eq=False)
class _Call:
    """Attention of tensors ``(batch, heads, tokens, head_dim)``; with ``table`` of packed sequences, a batch of one."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor | None
    indices: torch.Tensor
    counts: torch.Tensor  # (batch, q_heads, rows)
    geometry: Geometry
    table: torch.Tensor | None
    scale: float

    def run(self) -> None:
        order = launch_order(self.counts, self.key.shape[1])
        tensors = (self.query, self.key, self.value)
        if self.table is None and self.lse is None and attention_hopper.serves(*tensors, self.geometry):
            lists = (self.indices, self.counts, order)
            attention_hopper.launch(*tensors, self.output, *lists, self.geometry, exponent_factor(self.scale))
            return
        launch = functools.partial(self._launch, order=order, tma=fits_tma(*tensors))
        launch(self._choose(launch))

    def _choose(self, launch: Callable[[Config], None]) -> Config:
        head_dim, size = self.query.shape[-1], self.geometry.block_size
        dtype = str(self.query.dtype).removeprefix("torch.")
        key = {"head_dim": head_dim, "width": triton.next_power_of_2(head_dim), "block_size": size, "dtype": dtype}
        candidates = FP32_CANDIDATES if dtype == "float32" and not interpreted() else CANDIDATES
        fitting = [config for config in candidates if max(config.tiles["BLOCK_M"], config.tiles["BLOCK_N"]) <= size]
        return choose("attention", key, fitting, self.query.device, lambda config: milliseconds(lambda: launch(config)))

    def _launch(self, config: Config, *, order: torch.Tensor, tma: bool) -> None:
        query, key, value, geometry = self.query, self.key, self.value, self.geometry
        head_dim = query.shape[-1]
        settings = _settings(config, head_dim, geometry.block_size)
        grid = (self.counts.numel() * (geometry.block_size // settings["BLOCK_M"]),)
        _attention_kernel[grid](
            *_sources(query, settings["BLOCK_M"], settings, tma),
            *_sources(key, settings["BLOCK_N"], settings, tma),
            *_sources(value, settings["BLOCK_N"], settings, tma),
            self.output,
            self.output if self.lse is None else self.lse,
            self.indices,
            self.counts,
            order,
            self.counts if self.table is None else self.table,
            *(tensor.stride()[:3] for tensor in (query, key, value, self.output)),
            query.shape[2],
            geometry.k_len,
            self.counts.shape[2],
            geometry.k_blocks,
            key.shape[1],
            query.shape[1] // key.shape[1],
            exponent_factor(self.scale),
            HEAD_DIM=head_dim,
            BLOCK_SIZE=geometry.block_size,
            CAUSAL=geometry.causal,
            VARLEN=self.table is not None,
            USE_TMA=tma,
            STORE_LSE=self.lse is not None,
            **settings,
        )


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lists: BlockLists,
    geometry: Geometry,
    scale: float,
    lse: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> None:
    if scale < 0:
        query, scale = -query, -scale
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    indices, counts = lists.indices.contiguous(), lists.counts.contiguous()
    _Call(query, key, value, output, lse, indices, counts, geometry, table, scale).run()


def _settings(config: Config, head_dim: int, block_size: int) -> dict[str, Any]:
    """Launch arguments: the configuration, cut down to what this call allows, and how the columns are split."""
    settings = config.launch_arguments()
    for name in ("BLOCK_M", "BLOCK_N"):
        settings[name] = min(settings[name], block_size)
    width, rest = _split(head_dim)
    return settings | {"WIDTH": width, "REST": rest}


def _split(head_dim: int) -> tuple[int, int]:
    """Columns of the two parts that a head goes in, powers of two; the second is 0 where one part is as good.

    80 = 64 + 16, 96 = 64 + 32 and 192 = 128 + 64 save columns of zeros. 256 = 128 + 128 saves none, but with accumulators of
    256 columns ptxas waits after each instruction of the tensor cores.
    """
    whole = max(16, int(triton.next_power_of_2(head_dim)))
    half = whole // 2
    if head_dim <= max(16, half):
        return whole, 0
    rest = max(16, int(triton.next_power_of_2(head_dim - half)))
    return (half, rest) if half + rest < whole or whole > 128 else (whole, 0)


def _sources(tensor: torch.Tensor, tokens: int, settings: dict[str, Any], tma: bool) -> tuple[Any, Any]:
    """What the kernel reads both parts of the columns from: two descriptors, or the tensor twice."""
    if not tma:
        return tensor, tensor
    width, rest = [
        TensorDescriptor(tensor, list(tensor.shape), [*descriptor_strides(tensor), 1], [1, 1, tokens, columns])
        for columns in (settings["WIDTH"], settings["REST"] or settings["WIDTH"])
    ]
    return width, rest


@triton.jit
def _load_tile(
    source,  # descriptor, or pointer to the head's first token
    batch,
    head,
    first,
    tokens_left,
    token_stride,
    COLUMN: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Tokens from ``first`` and columns from COLUMN on; zeros past HEAD_DIM, and past ``tokens_left`` or the tensor's end."""
    if USE_TMA:
        tile = source.load([batch, head, first, COLUMN]).reshape(TOKENS, COLUMNS)
    else:
        tokens = tl.arange(0, TOKENS)[:, None]
        columns = COLUMN + tl.arange(0, COLUMNS)[None, :]
        inside = tokens < tokens_left
        if COLUMN + COLUMNS > HEAD_DIM:
            inside = inside & (columns < HEAD_DIM)
        pointers = source + tl.cast(first, tl.int64) * token_stride + tokens * token_stride + columns
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile  # (TOKENS, COLUMNS)


@triton.jit
def _softmax_step(logits, peak, mass, scale):
    """Weights of one tile of logits, the new row maxima and sums, and the factor of what was summed before.

    ``mass`` has eight columns, sums of every eighth key: a thread's own registers, reduced across threads only at the end.
    """
    BLOCK_M: tl.constexpr = logits.shape[0]
    BLOCK_N: tl.constexpr = logits.shape[1]
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale)  # (BLOCK_M,)
    # a query that has seen no key yet: minus infinity minus itself is not a number
    pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    decay = tl.exp2(peak - pivot)
    weights = tl.exp2(logits * scale - pivot[:, None])  # (BLOCK_M, BLOCK_N)
    mass = mass * decay[:, None] + tl.sum(tl.reshape(weights, (BLOCK_M, BLOCK_N // 8, 8)), 1)
    return weights, new_peak, mass, decay


@triton.jit
def _attend(
    query,  # (BLOCK_M, WIDTH) and, if REST, (BLOCK_M, REST)
    keys,  # sources of both parts, and the stride of tokens
    values,  # likewise
    place,  # sequence, key head, first key, keys
    start,
    bounds,
    scale,
    state,
    RAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """One tile of keys, from the sequence's key ``start`` on.

    Bounds: before which key all queries see, and before which each (BLOCK_M,). State: row maxima of the scaled logits
    (BLOCK_M,), sums of the weights (see ``_softmax_step``), and weighted sums, (BLOCK_M, WIDTH) and (BLOCK_M, REST).
    """
    peak, mass, total, total_rest = state[0], state[1], state[2], state[3]
    batch, kv_head, first, left = place[0], place[1], place[2] + start, place[3] - start
    key = _load_tile(keys[0], batch, kv_head, first, left, keys[2], 0, BLOCK_N, WIDTH, HEAD_DIM, USE_TMA)
    logits = tl.dot(query[0], key.T, input_precision="ieee")  # (BLOCK_M, WIDTH) x (WIDTH, BLOCK_N)
    if REST:
        key = _load_tile(keys[1], batch, kv_head, first, left, keys[2], WIDTH, BLOCK_N, REST, HEAD_DIM, USE_TMA)
        logits = tl.dot(query[1], key.T, logits, input_precision="ieee")  # (BLOCK_M, REST) x (REST, BLOCK_N)
    columns = tl.arange(0, BLOCK_N)
    if start + BLOCK_N > bounds[0]:
        logits = tl.where(columns[None, :] < (bounds[1] - start)[:, None], logits, float("-inf"))
    weights, peak, mass, decay = _softmax_step(logits, peak, mass, scale)
    value = _load_tile(values[0], batch, kv_head, first, left, values[2], 0, BLOCK_N, WIDTH, HEAD_DIM, USE_TMA)
    if RAGGED:  # a zero weight would not stop an infinity of the next sequence
        value = tl.where(columns[:, None] < left, value, 0.0)
    weights = weights.to(value.dtype)
    # (BLOCK_M, BLOCK_N) x (BLOCK_N, WIDTH)
    total = tl.dot(weights, value, total * decay[:, None], input_precision="ieee")
    if REST:
        value = _load_tile(values[1], batch, kv_head, first, left, values[2], WIDTH, BLOCK_N, REST, HEAD_DIM, USE_TMA)
        if RAGGED:
            value = tl.where(columns[:, None] < left, value, 0.0)
        total_rest = tl.dot(weights, value, total_rest * decay[:, None], input_precision="ieee")  # (BLOCK_M, REST)
    return peak, mass, total, total_rest


@triton.jit
def _head_of(source_ptr, strides, batch, head):
    return source_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _load_query(
    sources,
    batch,
    head,
    first,
    queries,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Both parts of a tile of queries, (BLOCK_M, WIDTH) and (BLOCK_M, REST); without REST the first, twice."""
    stride = sources[2]
    query = _load_tile(sources[0], batch, head, first, queries, stride, 0, BLOCK_M, WIDTH, HEAD_DIM, USE_TMA)
    rest = query
    if REST:
        rest = _load_tile(sources[1], batch, head, first, queries, stride, WIDTH, BLOCK_M, REST, HEAD_DIM, USE_TMA)
    return query, rest


@triton.jit
def _store_rows(output_ptr, total, queries, stride, COLUMN: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A tile of output, from column COLUMN on, (BLOCK_M, columns)."""
    tokens = tl.arange(0, total.shape[0])[:, None]
    columns = COLUMN + tl.arange(0, total.shape[1])[None, :]
    stored = total.to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + tokens * stride + columns, stored, mask=(tokens < queries) & (columns < HEAD_DIM))


@triton.jit
def _row_place(
    batch, head, row, heads, rows, q_len, k_len, k_blocks, table_ptr, BLOCK_SIZE: tl.constexpr, VARLEN: tl.constexpr
):
    """First query, queries from it to the sequence's end, its position, first key, keys, and where the row's list begins."""
    if VARLEN:
        table_ptr += row * 7
        entry = tl.load(table_ptr + 5) + head * tl.load(table_ptr + 6)
        first_query, queries = tl.load(table_ptr).to(tl.int32), tl.load(table_ptr + 1).to(tl.int32)
        position, first_key = tl.load(table_ptr + 2).to(tl.int32), tl.load(table_ptr + 3).to(tl.int32)
        k_len = tl.load(table_ptr + 4).to(tl.int32)
    else:
        entry = ((batch.to(tl.int64) * heads + head) * rows + row) * k_blocks
        first_query, first_key = row * BLOCK_SIZE, row * 0
        queries = q_len - first_query
        position = k_len - queries
    return first_query, queries, position, first_key, k_len, entry


@triton.jit
def _span(
    last,
    count,
    queries,
    position,
    k_len,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """How many tiles of keys a tile of queries walks; how many keys all of it sees, and how many each query, (BLOCK_M,).

    Lists ascend: only the last block of one may hold tiles that no query of this tile sees.
    """
    common = k_len
    limit = tl.zeros((BLOCK_M,), tl.int32) + k_len
    seen = k_len
    if CAUSAL:
        common = position + 1
        limit = tl.minimum(limit, common + tl.arange(0, BLOCK_M))
        seen = tl.minimum(k_len, position + BLOCK_M)
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    unseen = tl.maximum((last + 1) * BLOCK_SIZE - seen, 0) // BLOCK_N
    tiles = tl.where(queries > 0, count * TILES - tl.minimum(unseen, TILES), 0)
    return tiles, (common, limit)


@triton.jit
def _walk(
    query,
    keys,
    values,
    place,
    indices_ptr,
    count,
    tiles,
    bounds,
    scale,
    BLOCK_SIZE: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Online softmax over the first ``tiles`` tiles of the listed blocks; arguments as in ``_attend``."""
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M, 8), tl.float32)
    total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    total_rest = tl.zeros((BLOCK_M, REST if REST else 1), tl.float32)
    ragged, final = 0, 0
    if RAGGED:  # the tile in which a packed sequence ends waits for its own step
        block = tl.load(indices_ptr + tl.maximum(tiles - 1, 0) // TILES).to(tl.int32)
        final = block * BLOCK_SIZE + tl.maximum(tiles - 1, 0) % TILES * BLOCK_N
        ragged = ((tiles > 0) & (final + BLOCK_N > place[3])).to(tl.int32)
    block = tl.load(indices_ptr)
    for tile in tl.range(0, tiles - ragged):
        start = block.to(tl.int32) * BLOCK_SIZE + tile % TILES * BLOCK_N
        # the next entry already: its latency passes behind this tile's arithmetic
        block = tl.load(indices_ptr + tl.minimum((tile + 1) // TILES, count - 1))
        state = (peak, mass, total, total_rest)
        peak, mass, total, total_rest = _attend(
            query,
            keys,
            values,
            place,
            start,
            bounds,
            scale,
            state,
            False,
            BLOCK_N,
            WIDTH,
            REST,
            HEAD_DIM,
            USE_TMA,
        )
    if RAGGED and ragged > 0:
        state = (peak, mass, total, total_rest)
        peak, mass, total, total_rest = _attend(
            query,
            keys,
            values,
            place,
            final,
            bounds,
            scale,
            state,
            True,
            BLOCK_N,
            WIDTH,
            REST,
            HEAD_DIM,
            USE_TMA,
        )
    return peak, tl.sum(mass, 1), total, total_rest


@triton.jit(do_not_specialize=["length", "k_len", "rows", "k_blocks"])
def _attention_kernel(
    query_source,  # each source: a descriptor of (batch, heads, tokens, head_dim), or a pointer to it
    query_rest_source,
    key_source,
    key_rest_source,
    value_source,
    value_rest_source,
    output_ptr,
    lse_ptr,  # (batch, q_heads, length)
    indices_ptr,
    counts_ptr,  # (batch, q_heads, rows)
    order_ptr,
    table_ptr,  # (rows, 7)
    query_strides,  # of batch, heads and tokens
    key_strides,
    value_strides,
    output_strides,
    length,  # queries of a sequence, or of all of them if VARLEN
    k_len,
    rows,
    k_blocks,
    k_heads,
    group,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr,
    USE_TMA: tl.constexpr,
    STORE_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
):
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_M
    number = tl.load(order_ptr + tl.program_id(0) // PARTS)
    count = tl.load(counts_ptr + number)
    heads, row = k_heads * group, number % rows
    batch, head = number // rows // heads, number // rows % heads
    kv_head = head // group
    first_query, queries, position, first_key, k_len, entry = _row_place(
        batch, head, row, heads, rows, length, k_len, k_blocks, table_ptr, BLOCK_SIZE, VARLEN
    )
    part = tl.program_id(0) % PARTS * BLOCK_M
    first_query, queries, position = first_query + part, queries - part, position + part
    indices_ptr += entry
    last = tl.load(indices_ptr + tl.maximum(count - 1, 0)).to(tl.int32)
    tiles, bounds = _span(last, count, queries, position, k_len, CAUSAL, BLOCK_SIZE, BLOCK_M, BLOCK_N)

    if not USE_TMA:
        key_source = _head_of(key_source, key_strides, batch, kv_head)
        value_source = _head_of(value_source, value_strides, batch, kv_head)
        key_rest_source, value_rest_source = key_source, value_source
    if not USE_TMA:
        query_source = _head_of(query_source, query_strides, batch, head)
        query_rest_source = query_source
    query_sources = (query_source, query_rest_source, query_strides[2])
    query = _load_query(query_sources, batch, head, first_query, queries, BLOCK_M, WIDTH, REST, HEAD_DIM, USE_TMA)
    keys = (key_source, key_rest_source, key_strides[2])
    values = (value_source, value_rest_source, value_strides[2])
    peak, mass, total, total_rest = _walk(
        query,
        keys,
        values,
        (batch, kv_head, first_key, k_len),
        indices_ptr,
        count,
        tiles,
        bounds,
        scale,
        BLOCK_SIZE,
        VARLEN and USE_TMA,  # what TMA reads past the end of a packed sequence is the next one
        BLOCK_M,
        BLOCK_N,
        WIDTH,
        REST,
        HEAD_DIM,
        USE_TMA,
    )

    filled = tl.where(mass == 0.0, 1.0, mass)  # (BLOCK_M,)
    share = (1.0 / filled)[:, None]
    output_ptr = _head_of(output_ptr, output_strides, batch, head) + first_query.to(tl.int64) * output_strides[2]
    _store_rows(output_ptr, total * share, queries, output_strides[2], 0, HEAD_DIM)
    if REST:
        _store_rows(output_ptr, total_rest * share, queries, output_strides[2], WIDTH, HEAD_DIM)
    if STORE_LSE:
        lse = tl.where(mass == 0.0, float("-inf"), (peak + tl.log2(filled)) * 0.6931471805599453)
        tokens = tl.arange(0, BLOCK_M)
        lse_ptr += (batch.to(tl.int64) * heads + head) * length + first_query
        tl.store(lse_ptr + tokens, lse, mask=tokens < queries)
