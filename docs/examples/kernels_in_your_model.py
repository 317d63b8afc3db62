"""The kernels in a model of your own: a Llama in plain torch, about a hundred lines, that attends by a profile.

    python docs/examples/kernels_in_your_model.py   # with the shipped profile
    python docs/examples/kernels_in_your_model.py --profile demo-profile.yaml

`xcalib.apply_profile` needs a transformers model. An engine with its own attention needs three functions instead, and the
thresholds of its heads from the profile: `estimate_blocks` scores blocks, `select_blocks` chooses, `block_sparse_attention`
attends. The example takes its weights from the MODEL (any Llama of transformers), and checks that

1. dense, the hand-written model gives transformers' logits;
2. at tau 1 the kernels give dense attention;
3. by the profile, it keeps the blocks that `xcalib.apply_profile` keeps, and gives its logits.
"""

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quick_profile import profile_for

import xcalib
from xcalib.kernels import block_density, block_sparse_attention, estimate_blocks, select_blocks
from xcalib.profile import Profile


class SparseAttention:
    """Block sparse causal attention by a profile's thresholds; what your attention layer calls in place of SDPA.

    Attributes:
        density: of each layer so far, blocks computed over blocks that causality allows, mean over heads.
    """

    def __init__(self, profile: Profile, point: str | None = None, tau: float | None = None) -> None:
        self.method, self.bins, self.dense_layers = profile.method, profile.length_bins, profile.dense_layers
        # (length bins, layers, query heads)
        self.thresholds = torch.tensor(profile.point(point).thresholds)
        if tau is not None:  # one threshold for all
            self.thresholds = torch.full_like(self.thresholds, tau)
        self.density: dict[int, float] = {}

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
        """``(batch, query heads, tokens, head_dim)`` and ``(batch, kv heads, tokens, head_dim)`` -> like ``query``."""
        q_len, k_len = query.shape[2], key.shape[2]
        if layer in self.dense_layers or q_len == 1 or k_len < self.bins[0].min_length:
            return dense_attention(query, key, value, layer)
        number = sum(k_len >= one.min_length for one in self.bins) - 1  # the bin that serves so many keys
        taus = self.thresholds[number, layer].to(query.device)
        block: dict[str, Any] = {"block_size": self.method.block_size}
        scores = estimate_blocks(query, key, stride=self.method.stride, pattern=self.method.pattern, **block)
        mask = select_blocks(scores, taus, q_len=q_len, k_len=k_len, order=self.method.order, **block)
        self.density[layer] = float(block_density(mask, q_len=q_len, k_len=k_len, **block).mean())
        return block_sparse_attention(query, key, value, mask, **block)


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
    """The same shapes, every visible block."""
    del layer
    return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True)


class Llama:
    """A decoder of one's own: ``model(tokens, attention)`` -> logits ``(batch, tokens, vocabulary)``."""

    def __init__(self, weights: dict[str, torch.Tensor], config: Any) -> None:
        self.weights, self.layers = weights, config.num_hidden_layers
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.epsilon, self.base = config.rms_norm_eps, config.rope_parameters["rope_theta"]

    def __call__(self, tokens: torch.Tensor, attention: Any) -> torch.Tensor:
        hidden = F.embedding(tokens, self.weights["model.embed_tokens.weight"])
        cos, sin = self._rotary(tokens.shape[1], hidden)
        for layer in range(self.layers):
            hidden = hidden + self._attend(self._norm(hidden, layer, "input_layernorm"), layer, attention, cos, sin)
            hidden = hidden + self._mlp(self._norm(hidden, layer, "post_attention_layernorm"), layer)
        hidden = F.rms_norm(hidden, hidden.shape[-1:], self.weights["model.norm.weight"], self.epsilon)
        return F.linear(hidden, self.weights["lm_head.weight"])

    def _of(self, layer: int, name: str) -> torch.Tensor:
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def _norm(self, hidden: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self._of(layer, name), self.epsilon)

    def _attend(
        self, hidden: torch.Tensor, layer: int, attention: Any, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        def project(name: str, heads: int) -> torch.Tensor:
            flat = F.linear(hidden, self._of(layer, f"self_attn.{name}"))
            return flat.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

        query, key = project("q_proj", self.heads), project("k_proj", self.kv_heads)
        query, key = (each * cos + self._turned(each) * sin for each in (query, key))  # positions first, then scores
        output = attention(query, key, project("v_proj", self.kv_heads), layer)
        return F.linear(output.transpose(1, 2).flatten(2), self._of(layer, "self_attn.o_proj"))

    def _mlp(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        gate, up = (F.linear(hidden, self._of(layer, f"mlp.{name}_proj")) for name in ("gate", "up"))
        return F.linear(F.silu(gate) * up, self._of(layer, "mlp.down_proj"))

    def _rotary(self, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps = torch.arange(0, self.head_dim, 2, device=like.device, dtype=torch.float32)
        angles = torch.arange(length, device=like.device)[:, None] / self.base ** (steps / self.head_dim)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(like.dtype), both.sin().to(like.dtype)

    @staticmethod
    def _turned(each: torch.Tensor) -> torch.Tensor:
        first, second = each.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)


def check(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference of two sets of logits, against the size of the logits."""
    error = float((found - expected).abs().max() / expected.abs().max())
    print(f"{name}: largest difference {error:.1e} of the largest logit")
    if error > tolerance:
        raise SystemExit(f"{name}: more than {tolerance}")


@torch.inference_mode()
def run(model: Any, profile: Profile, point: str | None, tokens: torch.Tensor) -> None:
    """The three checks, and what each layer keeps."""
    own = Llama(dict(model.state_dict()), model.config)
    dense = model(tokens).logits
    check("1. own model, dense, against transformers", own(tokens, dense_attention), dense, 1e-3)
    check("2. own model, kernels at tau 1, against dense", own(tokens, SparseAttention(profile, tau=1.0)), dense, 1e-3)
    attention = SparseAttention(profile, point)
    logits = own(tokens, attention)
    with xcalib.apply_profile(model, profile, point) as handle:
        served = model(tokens).logits
        stats = handle.stats()
    check("3. own model, kernels by the profile, against xcalib.apply_profile", logits, served, 1e-3)
    theirs = [one["density"] for one in stats["by_layer"] if one["sparse_calls"]]
    if len(theirs) != len(attention.density) or any(
        abs(mine - other) > 0.01 for mine, other in zip(attention.density.values(), theirs, strict=True)
    ):
        raise SystemExit(f"densities differ: {list(attention.density.values())} and {theirs}")
    print(f"\nblocks computed, by layer; {stats['density']:.1%} in all, as xcalib.apply_profile:")
    for layer, density in attention.density.items():
        print(f"  layer {layer:>2} {density:>6.1%} {'#' * round(40 * density)}")
    kl = F.kl_div(logits.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    print(f"KL from dense: {float(kl):.4f} nats per token, over {tokens.shape[1]} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a Llama: a Hugging Face id, a folder, a .gguf file, or demo")
    parser.add_argument(
        "--profile", type=Path, help="default: the shipped one for demo; for others a small one is made"
    )
    parser.add_argument("--point", help="an operating point; default the profile's")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument(
        "--work", type=Path, default=Path("xcalib-out/examples"), help="where a small profile's curves are kept"
    )
    options = parser.parse_args()
    loaded = xcalib.load_model(options.model)
    if loaded.model.config.model_type != "llama" or loaded.model.config.rope_parameters.get("rope_type") != "default":
        raise SystemExit(f"{options.model}: the hand-written model is a plain Llama, this is another architecture")
    profile = profile_for(options.profile, loaded, options.work)
    text = (files("xcalib.data.corpus") / "prose" / "emma-01.txt").read_text("utf-8")
    encoded = loaded.tokenizer(text, return_tensors="pt", truncation=True, max_length=options.tokens)
    run(loaded.model, profile, options.point, encoded["input_ids"].to(loaded.model.device))


if __name__ == "__main__":
    main()
