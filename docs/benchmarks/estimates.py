"""What other estimates of a block's weight would give the search: ``python estimates.py run MODEL --data SPEC --out FILE``.

Each head's curve is measured with several estimates of how much attention a block of keys takes, up to the exact one, which costs
as much as dense attention and so says what there is to win. The layer gains are those of the antidiagonal estimate. A figure is
the predicted loss, in nats, of the knapsack's choice at each density (and of one tau for all heads): the sum over heads of gain x
relative output error. ``python estimates.py table FILE...`` makes the Markdown of docs/objectives.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from xcalib.bench.machine import describe_machine
from xcalib.collect import CollectSettings, Curves, collect
from xcalib.data import load_samples
from xcalib.kernels import estimate_blocks
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.reference import sweep_thresholds
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.loading import load_model
from xcalib.models.structure import attention_layers, decoder_of, head_projection
from xcalib.search import knapsack

DENSITIES = (0.25, 0.33, 0.45)
BLOCK_SIZE = 64

Estimate = Callable[[AttentionCall], torch.Tensor]  # fp32 (B, Hq, nq, nk), rows sum to 1


def strided(stride: int) -> Estimate:
    """The antidiagonal estimate (arXiv 2503.16428, section 2)."""

    def estimate(call: AttentionCall) -> torch.Tensor:
        return estimate_blocks(call.query, call.key, stride=stride, block_size=BLOCK_SIZE, scale=call.scale)

    return estimate


def by_value(call: AttentionCall) -> torch.Tensor:
    """Antidiagonal estimate times the mean norm of the block's values; of the first block, the first value's."""
    norms = call.value.float().norm(dim=-1)  # (B, Hkv, k_len)
    weights = _by_block(norms).div(_by_block(torch.ones_like(norms)))  # (B, Hkv, nk)
    weights[..., 0] = norms[..., 0]
    group = call.query.shape[1] // call.key.shape[1]
    return _normalised(strided(16)(call) * weights.repeat_interleave(group, 1)[:, :, None])


def without_kept(call: AttentionCall) -> torch.Tensor:
    """Antidiagonal estimate of the blocks that are not always kept; tau is then a share of these."""
    scores = strided(16)(call)
    always = _geometry(call).always_kept(scores.device)
    return _normalised(scores.masked_fill(always, 0.0))


def sampled(stride: int) -> Estimate:
    """Exact weights of every ``stride``-th query, the last of its group: as many products as the antidiagonal estimate."""

    def estimate(call: AttentionCall) -> torch.Tensor:
        length = call.query.shape[2]
        chosen = (torch.arange(0, length, stride, device=call.query.device) + stride - 1).clamp(max=length - 1)
        mass = _by_block(_weights(call, chosen))  # (B, Hq, queries, nk)
        blocks = functional.one_hot(chosen // BLOCK_SIZE).float()  # (queries, nq)
        return _normalised(torch.einsum("nr,bhnk->bhrk", blocks, mass))

    return estimate


def exact(call: AttentionCall) -> torch.Tensor:
    """Attention weight that a block takes, mean over the query block."""
    everything = torch.arange(call.query.shape[2], device=call.query.device)
    return _normalised(_by_block(_by_block(_weights(call, everything)).mT).mT)


def exact_change(call: AttentionCall) -> torch.Tensor:
    """How far the output moves without the block's share: root of the sum over queries of ``||sum_j a_j (v_j - o)||^2``."""
    everything = torch.arange(call.query.shape[2], device=call.query.device)
    weights, group = _weights(call, everything), call.query.shape[1] // call.key.shape[1]
    value = call.value.float().repeat_interleave(group, 1)  # (B, Hq, k_len, D)
    output = weights @ value
    change = []
    for start in range(0, value.shape[2], BLOCK_SIZE):
        part = weights[..., start : start + BLOCK_SIZE]
        moved = part @ value[:, :, start : start + BLOCK_SIZE] - part.sum(-1, keepdim=True) * output
        change.append(_by_block(moved.square().sum(-1)).sqrt())  # (B, Hq, nq)
    return _normalised(torch.stack(change, dim=-1))


ESTIMATES: dict[str, Estimate] = {
    "antidiagonal, S = 16 (the paper's)": strided(16),
    "antidiagonal, S = 8": strided(8),
    "antidiagonal, S = 4": strided(4),
    "S = 16 x norm of values": by_value,
    "S = 16, tau a share of the blocks not always kept": without_kept,
    "every 16th query, exact": sampled(16),
    "every 8th query, exact": sampled(8),
    "exact weight": exact,
    "exact change of the output": exact_change,
}


def _geometry(call: AttentionCall) -> Geometry:
    return Geometry(call.query.shape[2], call.key.shape[2], BLOCK_SIZE, True)


def _weights(call: AttentionCall, queries: torch.Tensor) -> torch.Tensor:
    """Attention weights of some queries, fp32 ``(B, Hq, queries, k_len)``."""
    key = call.key.float().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    logits = (call.query[:, :, queries].float() * call.scale) @ key.mT
    hidden = torch.arange(key.shape[2], device=key.device) > queries[:, None]
    return logits.masked_fill_(hidden, -torch.inf).softmax(-1)


def _by_block(tokens: torch.Tensor) -> torch.Tensor:
    """Sum over each block of the last dimension."""
    return functional.pad(tokens, (0, -tokens.shape[-1] % BLOCK_SIZE)).unflatten(-1, (-1, BLOCK_SIZE)).sum(-1)


def _normalised(scores: torch.Tensor) -> torch.Tensor:
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def sweep(model: Any, samples: Any, curves: Curves) -> dict[str, dict[str, np.ndarray]]:
    """Error and kept blocks of every estimate and order, summed over samples: fp64 ``(layers, heads, levels)``."""
    heads = curves.error.shape[2]
    projections = {layer.index: head_projection(layer, heads) for layer in attention_layers(model)}
    grid = torch.tensor(curves.settings.grid, dtype=torch.float64)
    rows = {layer: row for row, layer in enumerate(curves.layers)}
    shape = (len(rows), heads, len(grid))
    names = [f"{order}, {name}" for order in ("recent", "score") for name in ESTIMATES]
    found = {name: {"error": np.zeros(shape), "kept": np.zeros(shape)} for name in names}

    def compute(call: AttentionCall) -> None:
        for name, estimate in ESTIMATES.items():
            scores = estimate(call)
            for order in ("recent", "score"):
                result = sweep_thresholds(
                    call.query, call.key, call.value, scores, grid.to(scores.device), projections[call.layer],
                    _geometry(call), call.scale, order,
                )  # fmt: skip
                entry = found[f"{order}, {name}"]
                entry["error"][rows[call.layer]] += result.error.cpu().numpy()
                entry["kept"][rows[call.layer]] += result.kept.cpu().numpy()

    with torch.inference_mode(), patch_attention(model, compute):
        for sample in samples.samples:
            tokens = torch.tensor(sample.tokens, device=next(model.parameters()).device)
            decoder_of(model)(input_ids=tokens[None], use_cache=False)
    return found


def losses(entry: dict[str, np.ndarray], curves: Curves) -> dict[str, Any]:
    """Predicted loss at each density, of the knapsack's choice and of one tau for all heads."""
    energy, gain = curves.energy.sum(axis=0), curves.gain
    loss = (entry["error"] * (gain / energy)[:, None, None]).reshape(-1, entry["error"].shape[-1])
    cost = entry["kept"].reshape(loss.shape) / (curves.visible.sum() * len(loss))
    total = np.log(np.maximum(loss.sum(axis=0), 1e-12))
    return {
        "search": [float(knapsack(cost, loss, density).error) for density in DENSITIES],
        "single tau": [float(np.exp(np.interp(density, cost.sum(axis=0), total))) for density in DENSITIES],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    loaded = load_model(options.model, dtype="float32")
    samples = load_samples(
        options.data, loaded.tokenizer, num_samples=options.samples, max_length=options.length, seed=options.seed
    )
    settings = CollectSettings(block_size=BLOCK_SIZE, pattern="antidiagonal", gain_every=5, joint_densities=(0.33,))
    with tempfile.TemporaryDirectory() as folder:
        curves = collect(loaded.model, samples, Path(folder) / "curves", settings=settings, name=options.model)
    found = sweep(loaded.model, samples, curves)
    return {
        "command": " ".join(["python", "estimates.py", *sys.argv[1:]]),
        "machine": describe_machine(next(loaded.model.parameters()).device),
        "model": options.label or options.model,
        "samples": len(samples.samples),
        "tokens": [len(sample.tokens) for sample in samples.samples],
        "tokens_sha256": samples.tokens_sha256,
        "densities": DENSITIES,
        "losses": {name: losses(entry, curves) for name, entry in found.items()},
    }


def table(files: list[Path]) -> str:
    """Markdown, one table a model."""
    parts = []
    for record in (json.loads(path.read_text()) for path in files):
        heads = " | ".join(f"{density:g}" for density in record["densities"])
        title = f"**{record['model']}**, {record['samples']} samples of up to {max(record['tokens']):,} tokens"
        middle = record["densities"].index(0.33)
        parts += [
            title,
            "",
            f"| order, estimate | {heads} | single tau, 0.33 |",
            "|---|" + "---|" * (len(DENSITIES) + 1),
        ]
        for name, loss in record["losses"].items():
            cells = [f"{value:.4f}" for value in (*loss["search"], loss["single tau"][middle])]
            parts.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="do", required=True)
    one = parts.add_parser("run")
    one.add_argument("model")
    one.add_argument("--label", help="what the table calls the model")
    one.add_argument("--data", action="append", required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--samples", type=int, default=8)
    one.add_argument("--length", type=int, default=2048)
    one.add_argument("--weights", type=Path, help="the GGUF file of the model 'demo'")
    one.add_argument("--out", type=Path, required=True)
    parts.add_parser("table").add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if options.do == "table":
        sys.stdout.write(table(options.files))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.weights is not None:
            from demo_gpu import give_weights

            give_weights(options.weights, Path(folder))
        options.out.write_text(json.dumps(run(options), indent=1) + "\n")


if __name__ == "__main__":
    main()
