"""Fisher-weighted output error: what a change of a head's output costs in the final distribution, to second order.

The Hessian of KL(p || p') at p' = p is the Fisher information, the covariance of the gradients of log p(y) with y drawn from p
(Martens, arXiv 1412.1193). So changes d of one head's output at its tokens t make the KL over all compared positions about

    1/2 E[(sum_t g_t . d_t)^2],    g_t the gradient of sum log p(y) over these positions with respect to the output at t,

each y drawn from the model's own distribution at its position: the scores of different positions are then uncorrelated, so that
one backward pass stands for all of them. Two approximations make it a sum over tokens: gradients at different tokens count as
uncorrelated, and their covariance as the same for every token of every sample, F = sum g_t g_t^T / tokens. What is left, 1/2
sum_t d_t^T F d_t, is the error that the sweep takes with a square root of F in the place of W_o.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from xcalib.collect.backward import differentiable, gradient_by_chunks, masked_attention
from xcalib.collect.chunks import HeadChunks
from xcalib.collect.curves import CollectSettings
from xcalib.collect.measure import each_layer, sweep_call
from xcalib.errors import NonFiniteError
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.logits import LogitHead, sampled_positions
from xcalib.models.shards import head_shards
from xcalib.models.structure import decoder_of

__all__ = ["FisherMeter", "square_roots"]


class FisherMeter:
    """Gradients of samples, and output errors weighted with their covariance, on one model."""

    def __init__(self, model: Any, settings: CollectSettings, chunks: HeadChunks | None = None) -> None:
        self._model = model
        self._settings = settings
        self._chunks = chunks or HeadChunks()
        self._head = LogitHead(model)
        self._shards = head_shards(model)

    def gram(
        self,
        tokens: torch.Tensor,
        layers: Sequence[int],
        seed: int,
        advance: Callable[[int], None] = lambda _n: None,
    ) -> np.ndarray:
        """Sum over tokens of g g^T for every head, from one dense forward and backward pass.

        Args:
            tokens: one sample, int64 ``(length,)``.
            layers: indices of layers that can be sparse.
            seed: of the tokens that are drawn.
            advance: called once a layer.

        Returns:
            fp64 ``(layers, heads, head_dim, head_dim)``; g is taken before W_o.

        Raises:
            NonFiniteError: gradients are not finite.
        """
        grams: dict[int, torch.Tensor] = {}
        seen: set[int] = set()

        def add(gradient: torch.Tensor, layer: int) -> None:
            grams[layer] = self._shards.all(_gram(gradient))
            advance(1)

        def compute(call: AttentionCall) -> torch.Tensor | None:
            if call.layer not in layers:
                return None
            block_size = self._settings.block_size
            output = masked_attention(call.query, call.key, call.value, None, block_size=block_size, scale=call.scale)
            if not output.requires_grad:  # the first layer's: no parameter before it wants a gradient
                output.requires_grad_(True)
            if call.layer not in seen:  # the backward pass calls it again
                seen.add(call.layer)
                output.register_hook(partial(add, layer=call.layer))
            return output

        with patch_attention(self._model, compute, gradients=True), differentiable(self._model):
            hidden = decoder_of(self._model)(input_ids=tokens[None], use_cache=False)[0][0]  # (length, hidden)
            compared = hidden[sampled_positions(self._settings.gain_every)]
            compared.backward(self._score_gradient(compared.detach(), torch.Generator().manual_seed(seed)))
        for layer, gram in grams.items():
            if not bool(gram.isfinite().all()):
                name = type(self._model).__name__
                raise NonFiniteError(f"layer {layer} of {name}: its gradients hold NaN or infinite numbers")
        return torch.stack([grams[layer] for layer in layers]).numpy()

    def _score_gradient(self, hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Gradient of the sum of log p(y) by hidden states ``(positions, hidden)``; one y is drawn at each position."""

        def part(chunk: torch.Tensor, _rows: slice) -> torch.Tensor:
            log_probability = functional.log_softmax(self._head.logits(chunk), dim=-1)  # (n, vocabulary)
            probability = log_probability.detach().exp().cpu()  # drawn on the CPU: the same on every device
            drawn = torch.multinomial(probability, 1, generator=generator).to(chunk.device)
            return log_probability.gather(-1, drawn).sum()

        return gradient_by_chunks(hidden, part)[1]

    def errors(
        self,
        tokens: torch.Tensor,
        roots: dict[int, torch.Tensor],
        advance: Callable[[int], None] = lambda _n: None,
    ) -> np.ndarray:
        """Sum over tokens of 1/2 d^T F d at every level: fp64 ``(layers, heads, levels)``, nats over all compared positions.

        Args:
            tokens: one sample, int64 ``(length,)``.
            roots: layer index to what :func:`square_roots` gives, ascending.
            advance: called once a layer.
        """

        def measure(call: AttentionCall) -> torch.Tensor:
            root = self._shards.own(roots[call.layer], call.query.shape[1]).to(call.query.device)
            return sweep_call(call, root, self._settings, self._chunks).error

        return each_layer(self._model, tokens, tuple(roots), measure, advance) / 2


def square_roots(covariance: np.ndarray) -> torch.Tensor:
    """fp32 ``(heads, head_dim, head_dim)`` R with R R^T the given symmetric matrices, negative eigenvalues taken as 0."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    return (vectors * values.clamp(min=0).sqrt()[:, None]).float()


def _gram(gradient: torch.Tensor) -> torch.Tensor:
    """fp64 ``(heads, head_dim, head_dim)`` on the CPU, of gradients ``(batch, heads, length, head_dim)``."""
    heads = gradient.transpose(0, 1).flatten(1, 2)  # (Hq, tokens, D)
    return torch.stack([rows.mT @ rows for rows in (head.cpu().double() for head in heads)])
