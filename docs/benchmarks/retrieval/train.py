"""Trains the small retrieval model: ``python train.py OUT_FOLDER`` (one GPU; ``--steps 20 --tiny`` tries it on a CPU).

A Llama of about five million parameters, rotary embedding, grouped-query attention, 4,096 positions, on documents of
``retrieval_data.py`` made while it trains. Lengths grow from 512 to 4,096 tokens: retrieval is learnt on the short ones.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from retrieval_data import ANSWER, VOCABULARY, build_tokenizer, document
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlamaConfig, LlamaForCausalLM

TRAINING = 9  # first number of the seeds; data for measurement has others
STAGES = ((512, 0.40), (1024, 0.20), (2048, 0.20), (4096, 0.20))  # tokens, share of the steps


def build(tiny: bool) -> LlamaForCausalLM:
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    if not tiny:
        size = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        intermediate_size=11 * size["hidden_size"] // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attention_dropout=0.0,
        **size,
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 20_000.0}
    return LlamaForCausalLM(config)


class Documents(IterableDataset):
    """Batches ``(batch, length)`` of the lengths of all steps from ``first`` on, shared out among the workers."""

    def __init__(self, lengths: list[int], tokens: int, seed: int) -> None:
        self.lengths, self.tokens, self.seed = lengths, tokens, seed

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in range(first, len(self.lengths), step):
            length = self.lengths[number]
            count = max(1, self.tokens // length)
            rows = [
                document(np.random.default_rng((TRAINING, self.seed, number, row)), length)[0] for row in range(count)
            ]
            yield torch.from_numpy(np.stack(rows))


def answers_right(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Share of tokens behind ``answer`` that are the likeliest ones."""
    asked = tokens[:, :-1] == ANSWER
    return float((logits.argmax(-1) == tokens[:, 1:])[asked].float().mean())


def train(model: LlamaForCausalLM, options: argparse.Namespace, device: torch.device) -> list[dict[str, float]]:
    steps = options.steps
    lengths = [length for length, share in STAGES for _ in range(max(1, round(share * steps)))][:steps]
    data = DataLoader(
        Documents(lengths, options.tokens, options.seed),
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98))
    log: list[dict[str, float]] = []
    began = time.monotonic()
    for number, batch in enumerate(data):
        tokens = batch.to(device, non_blocking=True)
        warm, left = min(1.0, (number + 1) / 200), number / steps
        for group in optimiser.param_groups:
            group["lr"] = options.rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * left)))
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if number % 100 == 0 or number == steps - 1:
            right = answers_right(logits, tokens)
            log.append(
                {
                    "step": number,
                    "length": tokens.shape[1],
                    "loss": loss.item(),
                    "answers": right,
                    "seconds": time.monotonic() - began,
                }
            )
            sys.stderr.write(json.dumps(log[-1]) + "\n")
        if time.monotonic() - began > options.seconds:
            sys.stderr.write(f"stopped by --seconds at step {number}\n")
            break
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--tokens", type=int, default=65_536, help="of a batch")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=900.0, help="stop after this time, whatever the step")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(options.tiny).to(device)
    log = train(model, options, device)
    model.to(torch.float16).save_pretrained(options.out)
    build_tokenizer(options.out)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in model.parameters()),
        "log": log,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
