"""How much memory measuring takes at its peak, from plain numbers: no model is needed, and nothing is run.

docs/memory.md has the formulas and what each part grows with. They count tensors: the weights, what one layer works on, and what
is kept for later; not the interpreter, its libraries or a device's context.
"""

from collections.abc import Iterable
from dataclasses import replace

from xcalib.collect.workload import PHASES, Peak, Phase, Workload
from xcalib.errors import MemoryLimitError

__all__ = ["PHASES", "Peak", "Phase", "Workload", "largest_peak", "most_heads", "predict_peak"]

FLOAT, DOUBLE, LONG = 4, 8, 8  # bytes
POSITIONS = 256  # whose logits exist at a time
LOGITS = 5  # fp32 arrays of that many positions and the vocabulary: two logits, two log-softmaxes, a probability
SLOPE_ROWS = 256  # queries whose slopes are taken at a time
ATTENTION_ROWS = 512  # queries whose attention is computed again at a time in a backward pass
ORDERING = 44  # bytes for every block score while its level is found: five int64 arrays and the score
TRITON_BLOCKS, TRITON_PROJECTED, TRITON_SCRATCH, TRITON_LSE = 2**24, 2**28, 2**30, 2**30  # bounds of the kernels' own


def predict_peak(load: Workload, phase: Phase, heads: int | None = None) -> Peak:
    """The peak of one phase.

    Args:
        load: the decoder and its samples.
        phase: ``sweep``: all thresholds of all layers; ``gains``: layers switched one by one; ``joint``: all layers at once;
            ``slopes``: a round, its backward pass and its KLs; ``gradients``, ``mass``: what two objectives need; ``evaluate``.
        heads: key/value heads that measuring works on at a time; None for all.

    Raises:
        ValueError: there is no such phase, or ``heads`` is not 1 to ``load.kv_heads``.
    """
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}, expected one of {PHASES}")
    if heads is not None and not 1 <= heads <= load.kv_heads:
        raise ValueError(f"heads is {heads}, expected 1 to {load.kv_heads}, the key/value heads")
    chosen = heads or load.kv_heads
    moments = {
        "sweep": _sweep,
        "gains": _gains,
        "joint": _joint,
        "slopes": _slopes,
        "gradients": _gradients,
        "mass": _mass,
        "evaluate": _evaluate,
    }[phase](load, chosen)
    activations, working, kept, logits = max(moments, key=sum)
    # rounds compare the same dense hidden states again and again; other phases read those of one sample from its unit
    host = FLOAT * load.samples * load.compared * load.hidden if phase == "slopes" else 0
    total = load.weight_bytes + activations + working + kept + logits + (host if load.host else 0)
    return Peak(phase, load.weight_bytes, activations, working, kept, logits, host, total)


def largest_peak(load: Workload, phases: Iterable[Phase], heads: int | None = None) -> Peak:
    """The worst of several phases."""
    return max((predict_peak(load, phase, heads) for phase in phases), key=lambda peak: peak.total)


def most_heads(
    load: Workload, phases: Iterable[Phase], limit: int, beyond: int = 0, allowed: str = "are allowed"
) -> int:
    """As many key/value heads at a time as keep every phase's peak within ``limit`` bytes.

    Args:
        load: the decoder and its samples.
        phases: what will run.
        limit: bytes allowed.
        beyond: bytes taken by other than tensors, which count too.
        allowed: what the message says of the limit.

    Raises:
        MemoryLimitError: one head at a time is too much already.
    """
    names = tuple(phases)
    for heads in range(load.kv_heads, 0, -1):
        worst = largest_peak(load, names, heads)
        if worst.total + beyond <= limit:
            return heads
    parts = {"Python and libraries": beyond, "weights": worst.weights, "one layer's activations": worst.activations}
    parts |= {"measuring one head": worst.working, "kept from layer to layer": worst.kept, "logits": worst.logits}
    kept = worst.host if load.host else 0
    parts["kept of all samples"] = kept
    said = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
    lower = "--max-length or --num-samples" if kept else "--max-length"
    raise MemoryLimitError(
        f"{_size(limit)} {allowed}, but samples of {load.length:,} tokens need {_size(worst.total + beyond)} even with one "
        f"key/value head at a time ({said}): raise --max-memory or lower {lower}"
        + (", or choose --dtype bfloat16" if load.element > 2 else "")
    )


Moment = tuple[int, int, int, int]  # activations, working, kept, logits


def _rotation(load: Workload) -> int:
    """Cosines and sines of every position."""
    return 2 * load.element * load.length * load.head_dim


def _attending(load: Workload) -> int:
    """While a layer attends: the first hidden states, the residual, what is attended to, queries, keys and values."""
    return 3 * load.stream + load.heads + load.key_values + _rotation(load)


def _forward(load: Workload) -> int:
    """The decoder's own peak: rotating queries, or the MLP."""
    rotating = 3 * load.stream + 4 * load.heads + load.key_values + _rotation(load)
    mlp = 4 * load.stream + 3 * load.element * load.length * load.intermediate + _rotation(load)
    return max(rotating, mlp)


def _query_heads(load: Workload, heads: int) -> int:
    return heads * load.query_heads // load.kv_heads


def _sweep(load: Workload, heads: int) -> list[Moment]:
    # projections and results of all layers, fp32 and fp64 with int64
    kept = load.layers * load.query_heads * (FLOAT * load.head_dim**2 + (DOUBLE + LONG) * load.levels)
    queries = _query_heads(load, heads)
    work = _triton_sweep(load, queries) if load.triton else _reference_sweep(load, queries, heads)
    return [(_attending(load), work, kept, 0), (_forward(load), 0, kept, 0)]


def _sampled(load: Workload) -> int:
    """Groups of queries of one block row, each scored as one."""
    return -(-load.block_size // load.stride)


def _triton_lse(load: Workload, queries: int) -> int:
    """A log-sum-exp of every group of queries and key block, by every pattern."""
    return FLOAT * queries * load.block_pairs * _sampled(load)


def _scoring(load: Workload, queries: int) -> int:
    """Block scores of one call and their order, whichever takes more."""
    scores, ordering = FLOAT * queries * load.block_pairs, ORDERING * queries * load.block_pairs
    if load.triton:
        return max(ordering, scores + _triton_lse(load, queries))
    if load.pattern != "rows":
        return ordering  # groups of keys are few beside it
    heads = queries * load.kv_heads // load.query_heads
    # of every key: logits and weights of the sampled queries, their mean and its padded copy
    row = FLOAT * queries * load.length * (2 * _sampled(load) + 2)
    keys = FLOAT * load.length * load.head_dim * heads if load.element < FLOAT else 0
    return max(ordering, scores + row + keys)


def _reference_sweep(load: Workload, queries: int, heads: int) -> int:
    width = load.head_dim + 1  # of projected values and the mass
    row = (
        FLOAT * queries * load.length * (2 * load.block_size + width)
    )  # logits, weights, and their products with the values
    row += 7 * FLOAT * queries * load.levels * load.block_size * width
    copies = FLOAT * load.length * load.head_dim * (heads + queries)  # keys, projected values
    ordered = (FLOAT + LONG) * queries * load.block_pairs
    return max(row + copies + ordered, _scoring(load, queries))


def _triton_sweep(load: Workload, queries: int) -> int:
    part = min(
        queries, max(1, TRITON_BLOCKS // load.block_pairs), max(1, TRITON_PROJECTED // (load.length * load.head_dim))
    )
    scores = FLOAT * queries * load.block_pairs
    ordering = ORDERING * part * load.block_pairs
    projected = load.element * load.length * load.head_dim * part + load.key_values // 2
    sweeping = max(ordering, projected + FLOAT * part * load.block_pairs + TRITON_SCRATCH)
    return scores + max(sweeping, _triton_lse(load, queries))


def _sparse(load: Workload) -> Moment:
    """Sparse attention of one layer: scores, selection, output."""
    if load.triton:
        selecting = min(TRITON_LSE, _triton_lse(load, load.query_heads))
        return (_attending(load), selecting + 2 * load.query_heads * load.block_pairs + load.heads, 0, 0)
    return (_attending(load), _scoring(load, load.query_heads) + 2 * load.heads, 0, 0)


def _logits(load: Workload, positions: int) -> int:
    return LOGITS * FLOAT * min(POSITIONS, positions) * load.vocabulary


def _with(moment: Moment, kept: int) -> Moment:
    return (moment[0], moment[1], moment[2] + kept, moment[3])


def _states(load: Workload, variants: int) -> int:
    """Hidden states at the compared positions."""
    return variants * load.element * load.compared * load.hidden


def _gains(load: Workload, _heads: int) -> list[Moment]:
    outputs = load.layers * load.stream  # of every block, so that a switched layer's predecessors need not run
    states = _states(load, 1 + load.layers)
    passes = [_with(moment, outputs + states) for moment in ((_forward(load), 0, 0, 0), _sparse(load))]
    return [*passes, (0, 0, outputs + states, _logits(load, load.compared))]


def _joint(load: Workload, _heads: int) -> list[Moment]:
    states = _states(load, load.allocations)
    passes = [_with(moment, states) for moment in ((_forward(load), 0, 0, 0), _sparse(load))]
    return [*passes, (0, 0, states + _states(load, 1), _logits(load, load.compared))]


def _mlp_backward(load: Workload) -> int:
    """What a decoder block that is computed again keeps for its backward pass, and the gradients in work at its MLP."""
    inner = 6 * load.element * load.length * load.intermediate
    return 5 * load.stream + inner + load.key_values + _rotation(load)


def _attention_backward(load: Workload) -> int:
    """The same at its attention, without the mask: queries, repeated keys and values, the output, and gradients of all."""
    return 4 * load.stream + 7 * load.heads + load.key_values + _rotation(load)


def _slopes(load: Workload, heads: int) -> list[Moment]:
    queries = _query_heads(load, heads)
    levels = load.query_heads * load.block_pairs * (1 if load.levels < 2**8 else LONG)  # of one layer
    kept = load.layers * (load.stream + load.heads + load.key_values + levels)
    rows = min(SLOPE_ROWS, load.length)
    chunk = 5 * FLOAT * queries * rows * load.length + 3 * DOUBLE * queries * rows * (load.levels + 1)
    mask = (
        (2 + load.element) * queries * min(ATTENTION_ROWS, load.length) * load.length
    )  # what may be seen, as a number to add
    return [
        (2 * load.stream + 3 * load.heads + load.key_values + _rotation(load), chunk, kept, 0),
        (_attention_backward(load), mask, kept, 0),
        (_mlp_backward(load), 0, kept, 0),
        (_attending(load), _scoring(load, queries), kept, 0),
        (2 * load.stream, 0, kept, _logits(load, load.compared)),
        *_joint(replace(load, allocations=1), heads),
    ]


def _gradients(load: Workload, _heads: int) -> list[Moment]:
    kept = load.layers * (load.stream + DOUBLE * load.query_heads * load.head_dim**2)
    mask = (1 + load.element) * min(ATTENTION_ROWS, load.length) * load.length  # of all heads
    return [
        (_attention_backward(load), mask, kept, 0),
        (_mlp_backward(load), 0, kept, 0),
        (2 * load.stream, 0, kept, _logits(load, load.compared)),
    ]


def _mass(load: Workload, heads: int) -> list[Moment]:
    queries = _query_heads(load, heads)
    row = 2 * FLOAT * queries * load.block_size * load.length  # logits, weights
    ordered = (FLOAT + LONG) * queries * load.block_pairs
    return [
        (_attending(load), max(row + ordered, _scoring(load, queries)), 0, 0),
        (_forward(load), 0, 0, 0),
    ]


def _evaluate(load: Workload, _heads: int) -> list[Moment]:
    kept = (1 + load.plans) * load.stream
    if load.asking:
        kept += 2 * load.layers * load.key_values  # of the dense model and of one plan
    passes = [_with(moment, kept - load.stream) for moment in ((_forward(load), 0, 0, 0), _sparse(load))]
    return [*passes, (0, 0, kept, _logits(load, load.length))]


def _size(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
