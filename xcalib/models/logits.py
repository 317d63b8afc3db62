"""From hidden states to logits, a few positions at a time: a (length x vocabulary) tensor never exists."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from xcalib.errors import ModelError, NonFiniteError
from xcalib.models.finite import hidden_state_error
from xcalib.models.structure import decoder_of

__all__ = ["Divergence", "LogitHead", "Prefill", "sampled_positions"]


def sampled_positions(every: int) -> slice:
    """Every ``every``-th position of a sample; odd numbers give every place within a block its turn."""
    return slice(every - 1, None, every)


@dataclass(frozen=True)
class Prefill:
    """One prompt through the model: the decoder's last hidden states ``(length, hidden)`` and the cache, if kept."""

    hidden: torch.Tensor
    cache: Any


@dataclass(frozen=True)
class Divergence:
    """Per position: fp32 ``(variants, positions)`` KL(dense || variant) in nats, and next-token losses in nats with the dense
    model's first, ``(1 + variants, positions that have a next token)``."""

    kl: torch.Tensor
    loss: torch.Tensor


class LogitHead:
    """Runs a causal language model to its last hidden states and applies the head to chosen positions.

    The head is the output embedding followed by what the config says (soft cap, logit scale). It is compared with the
    model's own logits of the last position at every prefill, so a model with a head of another kind is refused.
    """

    def __init__(self, model: Any, *, chunk: int = 256) -> None:
        self._model = model
        self._decoder = decoder_of(model)
        self._embedding = model.get_output_embeddings()
        self._chunk = chunk
        if self._embedding is None or self._decoder is None or self._decoder is model:
            raise ModelError(f"{type(model).__name__}: no decoder with an output embedding was found")
        config = model.config.get_text_config()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._divisor = getattr(config, "logits_scaling", None)
        self._factor = getattr(config, "logit_scale", None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states ``(n, hidden)`` to fp32 logits ``(n, vocabulary)``."""
        logits: torch.Tensor = self._embedding(hidden)
        if self._divisor is not None:
            logits = logits / self._divisor
        if self._factor is not None:
            logits = logits * self._factor
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.float()

    @torch.inference_mode()
    def prefill(self, tokens: torch.Tensor, *, use_cache: bool = False) -> Prefill:
        """Run one prompt, int64 ``(length,)``.

        Raises:
            ModelError: the head is of an unknown kind.
            NonFiniteError: hidden states or logits are not finite.
        """
        captured: list[torch.Tensor] = []
        hook = self._decoder.register_forward_hook(lambda _m, _a, output: captured.append(output[0]))
        try:
            output = self._model(input_ids=tokens[None], use_cache=use_cache, logits_to_keep=1)
        finally:
            hook.remove()
        hidden = captured[0][0]  # (length, hidden)
        if not bool(hidden.isfinite().all()):
            raise hidden_state_error(self._model, tokens)
        own, ours = output.logits[0, -1].float(), self.logits(hidden[-1:])[0]
        if bool(own.isnan().any()) or bool(own.isposinf().any()):
            raise self._logits_error()
        if not torch.allclose(own, ours.to(own.device), rtol=1e-2, atol=1e-2 * float(own.abs().max())):
            raise ModelError(
                f"{type(self._model).__name__}: its logits are not its output embedding's; this head is not supported"
            )
        return Prefill(hidden, output.past_key_values if use_cache else None)

    @torch.inference_mode()
    def kl(self, dense: torch.Tensor, variants: Sequence[torch.Tensor]) -> torch.Tensor:
        """KL(dense || variant) in nats, fp32 ``(variants, n)``, from hidden states ``(n, hidden)`` at the same positions.

        Raises:
            NonFiniteError: logits are not finite.
        """
        return self._compare(dense, variants, None)[0]

    @torch.inference_mode()
    def compare(self, dense: torch.Tensor, variants: Sequence[torch.Tensor], targets: torch.Tensor) -> Divergence:
        """KL of each variant from the dense model at the given positions, and the next-token losses of all.

        Args:
            dense: hidden states ``(n, hidden)`` of the dense model.
            variants: the same of each variant.
            targets: the token that follows each position, int64 ``(n,)``, or ``(n - 1,)`` where nothing follows the last.

        Raises:
            NonFiniteError: logits are not finite.
        """
        kl, loss = self._compare(dense, variants, targets)
        return Divergence(kl, loss)

    def _compare(
        self, dense: torch.Tensor, variants: Sequence[torch.Tensor], targets: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        divergences = dense.new_zeros((len(variants), len(dense)), dtype=torch.float32)
        losses = dense.new_zeros((1 + len(variants), 0 if targets is None else len(targets)), dtype=torch.float32)
        for start in range(0, len(dense), self._chunk):
            rows = slice(start, start + self._chunk)
            reference = functional.log_softmax(self.logits(dense[rows]), dim=-1)  # (n, vocabulary)
            # (n, 1), one less at the end; the head may be on another device than the tokens
            wanted = targets[rows, None].to(reference.device) if targets is not None else None
            probability = reference.exp()
            if wanted is not None:
                losses[0, rows] = -reference[: len(wanted)].gather(-1, wanted)[:, 0]
            for index, hidden in enumerate(variants):
                log_probability = functional.log_softmax(self.logits(hidden[rows]), dim=-1)
                if wanted is not None:
                    losses[1 + index, rows] = -log_probability[: len(wanted)].gather(-1, wanted)[:, 0]
                divergences[index, rows] = -log_probability.sub_(reference).mul_(probability).sum(-1)
        if not bool(divergences.isfinite().all()):
            raise self._logits_error()
        return divergences.clamp_(min=0), losses

    def _logits_error(self) -> NonFiniteError:
        return NonFiniteError(f"{type(self._model).__name__}: its logits hold NaN or infinite numbers")
