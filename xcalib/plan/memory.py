"""Bytes on one device and on disk at the worst moment of a step, from plain numbers.

Counted are tensors: weights, what is kept of all blocks, and what one block and the measuring in it work on; not the
interpreter, the libraries and a device's context. With the model spread by layers a device holds some blocks whole; by heads
it holds a part of each, while the residual stream, and all that has its width, exists on every device.
"""

from typing import Literal

__all__ = ["Phase", "Spread", "device_bytes", "disk_bytes"]

Phase = Literal["sweep", "gains", "joint", "slopes", "evaluate"]
Spread = Literal["layers", "heads"]

FLOAT, DOUBLE, LONG = 4, 8, 8
LOGIT_ROWS, LOGIT_COPIES = (
    256,
    5,
)  # positions whose logits exist at a time; two logits, two log-softmaxes, a probability
MASK_ROWS, SLOPE_ROWS = 512, 256  # queries at a time in a backward pass
ORDERING = 44  # bytes for every block score while blocks are put in order
SCORE_ELEMENTS, PROJECTED_ELEMENTS, SCRATCH_BYTES = 2**24, 2**28, 2**30  # bounds of the sweep's kernels


def device_bytes(
    phase: Phase,
    *,
    layers: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    intermediate: int,
    vocabulary: int,
    parameters: int,
    weight_size: int,
    activation_size: int,
    length: int,
    block_size: int,
    levels: int,
    positions: int,
    points: int,
    shards: int = 1,
    spread: Spread = "layers",
    kernels: bool = True,
) -> dict[str, float]:
    """What one of ``shards`` devices holds at the worst moment of a phase, by kind.

    Args:
        phase: what runs.
        layers: decoder blocks.
        q_heads: query heads of a layer.
        kv_heads: key and value heads of a layer.
        head_dim: dimensions of a head.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        vocabulary: logits of a position.
        parameters: of the whole model.
        weight_size: bytes of a weight.
        activation_size: bytes of an activation.
        length: tokens.
        block_size: tokens per block.
        levels: thresholds of the grid.
        positions: at which distributions are compared.
        points: operating points that are evaluated together.
        shards: devices that share one model.
        spread: how.
        kernels: Triton's kernels run, not the reference.
    """
    parts = shards if spread == "heads" else 1
    blocks = -(-layers // shards) if spread == "layers" else layers  # on this device
    stream = float(length * hidden * activation_size)
    queries = length * q_heads * head_dim / parts
    pairs = q_heads / parts * (-(-length // block_size)) ** 2
    call = activation_size * (2 * queries + 2 * length * kv_heads * head_dim / parts)  # query, key, value, output
    mlp = 3 * length * intermediate / parts * activation_size
    held = {
        "weights": parameters * weight_size / shards,
        "hidden states": 3 * stream,
        "block": max(mlp, call),
        "logits": float(LOGIT_COPIES * LOGIT_ROWS * vocabulary * FLOAT),
    }
    if phase == "sweep":
        held["projections"] = blocks * q_heads / parts * head_dim**2 * FLOAT
        swept = (
            call
            + pairs * FLOAT
            + _sweep(queries, pairs, q_heads / parts, length, block_size, levels, head_dim, kernels)
        )
        energy = length * hidden * (FLOAT + 2.0 * DOUBLE)
        held["block"] = max(mlp, swept, energy)
    elif phase == "gains":
        held["kept for later"] = blocks * stream + float((layers + 1) * positions * hidden * activation_size)
    elif phase == "slopes":
        held["kept for later"] = blocks * stream
        held["block"] = 2 * mlp + call + _slopes(queries, pairs, q_heads / parts, length, activation_size)
    elif phase == "evaluate":
        held["kept for later"] = (1 + points) * stream
    return held


def _sweep(
    queries: float, pairs: float, heads: float, length: int, block_size: int, levels: int, head_dim: int, kernels: bool
) -> float:
    if kernels:
        ordered = min(pairs, SCORE_ELEMENTS) * ORDERING
        return ordered + min(queries, PROJECTED_ELEMENTS) * 2 + SCRATCH_BYTES
    row = heads * block_size * FLOAT  # bytes of a number for every query of a row of blocks
    return pairs * ORDERING + 4 * queries * FLOAT + 3 * row * length + 8 * row * levels * (head_dim + 1)


def _slopes(queries: float, pairs: float, heads: float, length: int, activation_size: int) -> float:
    """Levels, keys and values for every query head, and the larger of a chunk's mask and a chunk's weights and slopes."""
    mask = heads * MASK_ROWS * length * (2 + 2 * activation_size)
    weights = heads * SLOPE_ROWS * length * FLOAT * 4
    return pairs * (LONG + FLOAT) + 4 * queries * activation_size + max(mask, weights)


def disk_bytes(
    *,
    layers: int,
    q_heads: int,
    hidden: int,
    levels: int,
    length: int,
    positions: int,
    samples: int,
    rounds: int,
    points: int,
    heldout: int,
) -> dict[str, float]:
    """What one length leaves on disk: finished units, removed once all is found, and the curves."""
    table = layers * q_heads * levels
    unit = (
        (DOUBLE + LONG) * table + DOUBLE * layers + FLOAT * positions * hidden
    )  # errors, blocks, energies, hidden states
    return {
        "units": float(samples * unit),
        "curves": float(samples * ((DOUBLE + LONG) * table + DOUBLE * layers)),
        "rounds": float(rounds * points * samples * DOUBLE * table),
        "held-out units": float(heldout * points * (FLOAT * length + DOUBLE * layers * q_heads)),
    }
