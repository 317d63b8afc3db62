"""The plain-torch truth that every faster backend is compared with.

All arithmetic is fp32 (cumulative probabilities int64 fixed point). Work goes by rows of query blocks, so memory is
O(k_len) per head beyond the block scores; neither the (q_len x k_len) nor the (q_len/S x k_len/S) matrix ever exists.
Arguments were validated by :mod:`xcalib.kernels.api`.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from xcalib.kernels.geometry import Geometry

__all__ = [
    "SweepResult",
    "block_levels",
    "block_sparse_attention",
    "cut_offs",
    "estimate_blocks",
    "select_blocks",
    "strided_order",
    "sweep_thresholds",
]

# Cumulative probabilities are exact, whatever the order of summation: int64 multiples of 2^-52, each fp32 score truncated.
ONE = 2**52

# The cut-off of a block that no threshold may drop, and of one that no threshold reaches; real cut-offs are sums, so >= 0.
ALWAYS = -1
NEVER = torch.iinfo(torch.int64).max

# Most attention weights of a trained model are subnormal in fp32, and arithmetic on subnormal numbers is some ten times slower
# on CPUs: weights this far below the row's peak are zero, and errors are scaled up before they are squared.
NEGLIGIBLE = 1e-18
LOW_PEAK = 20.0
UPSCALE = 2.0**30


def strided_order(pattern: str, stride: int, seed: int, device: torch.device) -> torch.Tensor:
    """Which query of a group meets key 0, 1, ..., S-1 of a column group (the sampled pattern): int64 ``(S,)``."""
    if pattern == "antidiagonal":
        return torch.arange(stride - 1, -1, -1, device=device)
    if pattern == "diagonal":
        return torch.arange(stride, device=device)
    return torch.randperm(stride, generator=torch.Generator().manual_seed(seed)).to(device)


def _grouped(tokens: torch.Tensor, stride: int) -> torch.Tensor:
    """``(..., length, D)`` to fp32 ``(..., ceil(length / S), S, D)``; missing tokens are zeros."""
    missing = -tokens.shape[-2] % stride
    tokens = functional.pad(tokens.float(), (0, 0, 0, missing))
    return tokens.unflatten(-2, (-1, stride))


def estimate_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float,
    pattern: str,
    seed: int,
) -> torch.Tensor:
    """See :func:`xcalib.kernels.estimate_blocks`."""
    if pattern == "rows":
        return _estimate_rows(query, key, stride, Geometry(query.shape[2], key.shape[2], block_size, causal), scale)
    batch, q_heads, q_len, head_dim = query.shape
    k_heads, k_len = key.shape[1:3]
    geometry = Geometry(q_len, k_len, block_size, causal)
    order = strided_order(pattern, stride, seed, query.device)
    per_block = block_size // stride
    keys = _grouped(key, stride).flatten(-2)  # (B, Hkv, nk groups, S * D)
    columns = torch.arange(keys.shape[2], device=query.device)
    scores = query.new_zeros((batch, q_heads, geometry.q_blocks, geometry.k_blocks), dtype=torch.float32)
    for row in range(geometry.q_blocks):
        start, stop = geometry.query_span(row)
        groups = _grouped(query[:, :, start:stop], stride).index_select(-2, order)  # (B, Hq, rows, S, D)
        rows = groups.shape[2]
        groups = groups.reshape(batch, k_heads, -1, stride * head_dim)  # (B, Hkv, G * rows, S * D)
        blocks = geometry.visible_k_blocks(row)
        reach = min(blocks * per_block, keys.shape[2])
        logits = (groups @ keys[:, :, :reach].mT) * (scale / stride)  # (B, Hkv, G * rows, reach)
        logits = logits.view(batch, q_heads, rows, reach)
        if causal:
            last_key = geometry.offset + start + stride * torch.arange(1, rows + 1, device=query.device) - 1
            logits = logits.masked_fill(columns[:reach] * stride > last_key[:, None], -torch.inf)
        probabilities = logits.softmax(-1).mean(-2)  # (B, Hq, reach)
        probabilities = functional.pad(probabilities, (0, blocks * per_block - reach))
        scores[:, :, row, :blocks] = probabilities.unflatten(-1, (blocks, per_block)).sum(-1)
    return scores


def _estimate_rows(
    query: torch.Tensor, key: torch.Tensor, stride: int, geometry: Geometry, scale: float
) -> torch.Tensor:
    """The last query of each row group, exactly: mean over a block's groups of the attention weight that a key block takes."""
    batch, q_heads = query.shape[:2]
    k_heads, size = key.shape[1], geometry.block_size
    keys = key.float()  # (B, Hkv, k_len, D)
    scores = query.new_zeros((batch, q_heads, geometry.q_blocks, geometry.k_blocks), dtype=torch.float32)
    for row in range(geometry.q_blocks):
        start, stop = geometry.query_span(row)
        sampled = torch.arange(start + stride - 1, stop + stride - 1, stride, device=query.device).clamp_(max=stop - 1)
        blocks = geometry.visible_k_blocks(row)
        reach = min(blocks * size, geometry.k_len)
        queries = (query[:, :, sampled].float() * scale).reshape(
            batch, k_heads, -1, query.shape[3]
        )  # (B, Hkv, G * rows, D)
        logits = (queries @ keys[:, :, :reach].mT).view(batch, q_heads, -1, reach)  # (B, Hq, rows, reach)
        if geometry.causal:
            hidden = torch.arange(reach, device=query.device) > geometry.offset + sampled[:, None]
            logits.masked_fill_(hidden, -torch.inf)
        weights = functional.pad(logits.softmax(-1).mean(-2), (0, blocks * size - reach))  # (B, Hq, keys)
        scores[:, :, row, :blocks] = weights.unflatten(-1, (blocks, size)).sum(-1)
    return scores


def _ranking(scores: torch.Tensor, geometry: Geometry, order: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Preference in each row: always kept first, then by score, ties by the lower block index, invisible last.

    By order ``recent`` the block before the row's own comes between those always kept and the others.

    Returns:
        (int64 block indices like ``scores``, the preferred first; bool always-kept flags ``(q_blocks, k_blocks)``).
    """
    visible = geometry.visible(scores.device)
    forced = geometry.always_kept(scores.device) & visible
    preference = scores.masked_fill(~visible, -torch.inf)
    if order == "recent":
        preference.masked_fill_(geometry.previous(scores.device), torch.finfo(torch.float32).max)
    preference.masked_fill_(forced, torch.inf)
    return preference.argsort(dim=-1, descending=True, stable=True), forced


def cut_offs(scores: torch.Tensor, geometry: Geometry, order: str = "score") -> torch.Tensor:
    """The limit above which each block is kept: the probability of everything preferred to it, in units of ``1 / ONE``.

    By order ``recent`` it is 0 for the block before the row's own, whatever those always kept hold.

    Returns:
        int64 like ``scores``: ALWAYS for the sink and own blocks, NEVER for invisible ones; a block is kept at a threshold
        when its cut-off is below :func:`_fixed_limits` of that threshold. Rows must sum to less than 2,048.
    """
    ranking, forced = _ranking(scores, geometry, order)
    visible = geometry.visible(scores.device)
    fixed = (scores.masked_fill(~visible, 0.0).double() * ONE).long()  # the product is exact, .long() truncates
    ranked = fixed.gather(-1, ranking)
    before = ranked.cumsum_(-1).sub_(fixed.gather(-1, ranking))
    limits = fixed.scatter_(-1, ranking, before)
    if order == "recent":
        limits.masked_fill_(geometry.previous(scores.device), 0)  # by every threshold above 0
    return limits.masked_fill_(forced, ALWAYS).masked_fill_(~visible, NEVER)


def _fixed_limits(threshold: torch.Tensor) -> torch.Tensor:
    """Thresholds, taken as fp32, in the units of :func:`cut_offs`: int64 of the same shape, NEVER where they are 1 or more."""
    tau = threshold.float().double()
    return (tau * ONE).ceil().long().masked_fill_(tau >= 1, NEVER)


def block_levels(scores: torch.Tensor, grid: torch.Tensor, geometry: Geometry, order: str = "score") -> torch.Tensor:
    """The first of ascending thresholds that keeps each block: int64 like ``scores``, ``len(grid)`` for invisible ones."""
    return torch.searchsorted(_fixed_limits(grid), cut_offs(scores, geometry, order), right=True)


def select_blocks(
    scores: torch.Tensor, threshold: torch.Tensor, geometry: Geometry, policy: str, order: str = "score"
) -> torch.Tensor:
    """See :func:`xcalib.kernels.select_blocks`; ``threshold`` is fp32 ``(q_heads,)``."""
    limit = threshold.to(scores.device)[:, None, None]  # (Hq, 1, 1)
    if policy == "threshold":
        return cut_offs(scores, geometry, order) < _fixed_limits(limit)
    ranking, forced = _ranking(scores, geometry, order)
    visible = geometry.visible(scores.device)
    rank = torch.empty_like(ranking).scatter_(
        -1, ranking, torch.arange(ranking.shape[-1], device=ranking.device).expand_as(ranking)
    )
    if policy == "ratio":
        # a tenth of ten blocks is one block, although fp32 holds a little more than a tenth
        limit = (limit.double() * visible.sum(-1)[:, None] * (1 - 2.0**-23)).ceil()
    return ((rank < limit) | forced) & visible


def block_sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, geometry: Geometry, scale: float
) -> torch.Tensor:
    """See :func:`xcalib.kernels.block_sparse_attention`."""
    batch, q_heads, _, _ = query.shape
    group = q_heads // key.shape[1]
    size = geometry.block_size
    output = torch.zeros_like(query)
    kept = mask & geometry.visible(mask.device)
    tokens = torch.arange(size, device=query.device)
    for row in range(geometry.q_blocks):
        start, stop = geometry.query_span(row)
        first_position = geometry.offset + start
        positions = torch.arange(first_position, geometry.offset + stop, device=query.device)
        for b in range(batch):
            for h in range(q_heads):
                blocks = kept[b, h, row].nonzero()[:, 0]
                if not len(blocks):
                    continue
                columns = (blocks[:, None] * size + tokens).flatten()
                columns = columns[columns < geometry.k_len]
                keys = key[b, h // group].index_select(0, columns).float()  # (n, D)
                logits = (query[b, h, start:stop].float() * scale) @ keys.mT  # (rows, n)
                if geometry.causal:
                    # only columns past the first query's position can be hidden from any of these queries
                    ahead = int((columns > first_position).sum())
                    tail = logits[:, logits.shape[1] - ahead :]
                    tail.masked_fill_(columns[len(columns) - ahead :] > positions[:, None], -torch.inf)
                weights = logits.softmax(-1)
                if geometry.causal and ahead == logits.shape[1]:
                    # a query that may see none of its kept keys attends to nothing: zero, not softmax's NaN
                    weights = weights.masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)
                values = value[b, h // group].index_select(0, columns).float()
                output[b, h, start:stop] = (weights @ values).to(output.dtype)
    return output


@dataclass(frozen=True)
class SweepResult:
    """What every threshold of a grid does to each head of one attention call, summed over its tokens.

    Attributes:
        error: fp64 ``(q_heads, levels)``, sum over batch and tokens of ``||(O_tau - O_dense) W_o,h||^2``.
        kept: int64 ``(q_heads, levels)``, blocks computed, summed over the batch.
        visible: blocks that dense attention computes for one head, summed over the batch.
    """

    error: torch.Tensor
    kept: torch.Tensor
    visible: int


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
    """See :func:`xcalib.kernels.sweep_thresholds`; ``scores`` are those of :func:`estimate_blocks`."""
    batch, q_heads, _, head_dim = query.shape
    k_heads, group, size = key.shape[1], q_heads // key.shape[1], geometry.block_size
    levels = len(grid)
    level = block_levels(scores, grid, geometry, order).clamp_(max=levels - 1)  # nothing reads the invisible blocks'
    padding = (0, 0, 0, geometry.k_blocks * size - geometry.k_len)
    keys = functional.pad(key.float(), padding).unflatten(2, (-1, size))  # (B, Hkv, nk, Bk, D)
    grouped_value = value.float().unsqueeze(2)  # (B, Hkv, 1, k_len, D)
    values = grouped_value @ projection.float().unflatten(0, (k_heads, group))  # (B, Hkv, G, k_len, R)
    values = functional.pad(values, padding).unflatten(3, (-1, size))  # (B, Hkv, G, nk, Bk, R)
    error = torch.zeros((q_heads, levels), dtype=torch.float64, device=query.device)
    counts = torch.zeros((q_heads, levels), dtype=torch.int64, device=query.device)
    for row in range(geometry.q_blocks):
        start, stop = geometry.query_span(row)
        blocks = geometry.visible_k_blocks(row)
        queries = (query[:, :, start:stop].float() * scale).reshape(batch, k_heads, 1, -1, head_dim)
        logits = (queries @ keys[:, :, :blocks].mT).unflatten(3, (group, -1))  # (B, Hkv, n, G, Bq, Bk)
        _hide_tokens(logits, geometry, row)
        row_level = level[:, :, row, :blocks].unflatten(1, (k_heads, group))  # (B, Hkv, G, n)
        member = functional.one_hot(row_level, levels)  # (B, Hkv, G, n, levels)
        counts += member.sum(dim=(0, 3)).flatten(0, 1)
        row_error = _row_error(logits.transpose(2, 3), values[:, :, :, :blocks], member.mT)
        error += row_error.sum(0).flatten(0, 1)
    return SweepResult(error, counts.cumsum(-1), batch * geometry.visible_count)


def _hide_tokens(logits: torch.Tensor, geometry: Geometry, row: int) -> None:
    """Set logits ``(B, Hkv, n, G, Bq, Bk)`` of keys that do not exist or lie ahead of the query to -inf, in place."""
    start, stop = geometry.query_span(row)
    first = geometry.own_k_blocks(row)[0] if geometry.causal else geometry.k_blocks - 1
    size, blocks = geometry.block_size, logits.shape[2]
    columns = torch.arange(first * size, blocks * size, device=logits.device).view(
        -1, 1, 1, size
    )  # (n - first, 1, 1, Bk)
    if geometry.causal:
        positions = geometry.offset + torch.arange(start, stop, device=logits.device)
        hidden = columns > positions[:, None]  # (n - first, 1, Bq, Bk)
    else:
        hidden = columns >= geometry.k_len
    logits[:, :, first:].masked_fill_(hidden, -torch.inf)


def _row_error(logits: torch.Tensor, values: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """Squared error after each level, for one row of query blocks.

    Args:
        logits: fp32 ``(B, Hkv, G, n, Bq, Bk)``, hidden tokens -inf.
        values: fp32 ``(B, Hkv, G, n, Bk, R)``, projected.
        member: int64 ``(B, Hkv, G, levels, n)``, one where a key block enters at a level.

    Returns:
        ``(B, Hkv, G, levels)``, summed over the row's queries.
    """
    peaks = logits.amax(-1)  # (B, Hkv, G, n, Bq)
    peak = peaks.amax(-2, keepdim=True)
    kept_peak = peaks.masked_fill((member[..., 0, :] == 0).unsqueeze(-1), -torch.inf).amax(-2, keepdim=True)
    # Where what is always kept lies far below the row's peak, its fp32 weights would lose their digits. Each key head decides for
    # itself, so that its figures do not depend on which others are in the call.
    exact = (peak - kept_peak).amax((0, 2, 3, 4)) < LOW_PEAK  # (Hkv,), False where NaN
    error = logits.new_empty(member.shape[:-1], dtype=torch.float64)
    for heads, dtype in ((exact, torch.float32), (~exact, torch.float64)):
        if bool(heads.all()):
            return _level_error(logits, peak, values, member, dtype)
        if bool(heads.any()):
            chosen = (logits[:, heads], peak[:, heads], values[:, heads], member[:, heads])
            error[:, heads] = _level_error(*chosen, dtype)
    return error


def _level_error(
    logits: torch.Tensor, peak: torch.Tensor, values: torch.Tensor, member: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """:func:`_row_error` in one precision; ``peak`` is the largest logit of each query, ``(B, Hkv, G, 1, Bq)``."""
    weights = (logits - peak.unsqueeze(-1)).to(dtype).exp_()
    if dtype == torch.float32:
        functional.threshold(weights, NEGLIGIBLE, 0.0, inplace=True)
    by_block = torch.cat([weights @ values.to(dtype), weights.sum(-1, keepdim=True)], dim=-1)  # (..., n, Bq, R + 1)
    by_level = (member.to(dtype) @ by_block.flatten(-2)).unflatten(-1, by_block.shape[-2:])  # (..., levels, Bq, R + 1)
    kept = by_level.cumsum(-3)
    from_level = by_level.flip(-3).cumsum(-3).flip(-3)
    dropped = functional.pad(from_level[..., 1:, :, :], (0, 0, 0, 0, 0, 1))  # what later levels add
    kept_mass, dropped_mass = kept[..., -1:], dropped[..., -1:]
    total = kept_mass + dropped_mass
    # O_tau - O_dense, written so that nothing nearly equal is subtracted when little is dropped
    difference = kept[..., :-1] * (dropped_mass / (total * kept_mass)) - dropped[..., :-1] / total
    return difference.mul_(UPSCALE).square_().sum(dim=(-2, -1)).double() / UPSCALE**2
