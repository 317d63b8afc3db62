"""Real calibrations against the cost model: ``python runs.py run MODEL --out FILE``, then ``python runs.py table FILE...``.

``run`` measures MODEL as ``xcalib search`` does and writes the time of every step: on one CPU thread (``OMP_NUM_THREADS=1``) the
process's own, so that other programs on the machine matter little. MODEL is as on the
command line, or ``random:LAYERS,HIDDEN,HEADS,KV_HEADS,HEAD_DIM,MLP,VOCABULARY``, a Llama with random weights on random tokens.
``table`` predicts the same steps with a machine that was not fitted to them and makes the table of docs/scale.md.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xcalib.bench.machine import describe_machine
from xcalib.collect import CollectSettings, collect
from xcalib.collect.measure import Sweeper
from xcalib.data import Sample, SampleSet, load_samples
from xcalib.models.loading import load_model
from xcalib.plan import check_run, load_machine
from xcalib.plan.shape import shape_of
from xcalib.search import search

DENSITY = 0.33


class Clock:
    """The seconds of each phase that the library reports as progress."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: list[dict[str, Any]] = []
        own = device.type == "cpu" and torch.get_num_threads() == 1
        self.kind = "process time, one thread" if own else "wall time"
        self._now = time.process_time if own else time.perf_counter

    @contextmanager
    def __call__(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        start = self._time()
        yield lambda _steps: None
        seconds = self._time() - start
        self.phases.append({"phase": description, "steps": total, "seconds": seconds})
        sys.stderr.write(f"{seconds:8.1f} s  {description}\n")

    def _time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._now()


def random_model(numbers: Sequence[int], length: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, heads, kv_heads, head_dim, mlp, vocabulary = numbers
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=length,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def random_samples(count: int, length: int, vocabulary: int, split: Any, seed: int) -> SampleSet:
    generator = np.random.default_rng(seed)
    samples = [
        Sample(generator.integers(vocabulary, size=length), "random", (f"{seed:08x}{index:08x}",))
        for index in range(count)
    ]
    return SampleSet(samples=tuple(samples), dropped={}, specs=("random",), split=split, seed=seed)


def opened(options: argparse.Namespace) -> tuple[Any, SampleSet, SampleSet | None]:
    count = options.heldout if options.rounds is not None else 0
    if options.model.startswith("random:"):
        numbers = [int(number) for number in options.model.removeprefix("random:").split(",")]
        model = random_model(numbers, options.length)
        calibration = random_samples(options.samples, options.length, numbers[-1], "calibration", 0)
        return model, calibration, random_samples(count, options.length, numbers[-1], "heldout", 1) if count else None
    loaded = load_model(options.model)
    how: dict[str, Any] = {"max_length": options.length, "seed": 0}
    specs = options.data or ["builtin"]
    samples = load_samples(specs, loaded.tokenizer, num_samples=options.samples, **how)
    how |= {"num_samples": count, "split": "heldout", "exclude": samples.documents}
    return loaded.model, samples, load_samples(specs, loaded.tokenizer, **how) if count else None


def run(options: argparse.Namespace) -> None:
    model, samples, heldout = opened(options)
    device = next(model.parameters()).device
    clock = Clock(device)
    sizes = {"block_size": options.block_size, "stride": options.stride, "gain_samples": options.gain_samples}
    settings = CollectSettings(**sizes, pattern="antidiagonal")  # what the rates were timed with
    first = torch.tensor(samples.samples[0].tokens[:256], device=device)
    heads = model.config.get_text_config().num_attention_heads
    Sweeper(model, settings, heads).measure(first)  # a process's first pass waits for its libraries
    with tempfile.TemporaryDirectory() as folder:
        if options.rounds is None:
            collect(model, samples, Path(folder) / "curves", settings=settings, progress=clock)
        else:
            search(
                model, samples, target=f"balanced:density={DENSITY}", heldout=heldout, settings=settings, rounds=options.rounds,
                folder=folder, force=True, progress=clock,
            )  # fmt: skip
    record = {
        "command": " ".join(["python", "runs.py", *sys.argv[1:]]),
        "machine": describe_machine(device),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "threads": torch.get_num_threads(),
        "clock": clock.kind,
        "warmed": True,
        "shape": asdict(shape_of(model, re.sub(r".*/", "", options.model))),
        "lengths": [len(sample.tokens) for sample in samples.samples],
        "heldout_lengths": [len(sample.tokens) for sample in heldout.samples] if heldout else [],
        "settings": {key: getattr(settings, key) for key in ("stride", "block_size", "gain_samples", "gain_every")}
        | {"levels": len(settings.grid), "joint_densities": list(settings.joint_densities), "densities": [DENSITY]},
        "phases": clock.phases,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")


def table(files: Sequence[Path], machine: str) -> str:
    used = load_machine(machine)
    lines = ["| run | step | predicted s | measured s | predicted / measured |", "|---|---|---|---|---|"]
    for file in files:
        for index, row in enumerate(check_run(json.loads(file.read_text()), used)):
            name = file.stem if index == 0 else ""
            lines.append(f"| {name} | {row.step} | {row.predicted:.2f} | {row.measured:.2f} | {row.ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="do", required=True)
    one = parts.add_parser("run")
    one.add_argument("model")
    one.add_argument("--data", action="append")
    one.add_argument("--samples", type=int, default=4)
    one.add_argument("--length", type=int, default=1024)
    one.add_argument("--block-size", type=int, default=128)
    one.add_argument("--stride", type=int, default=16)
    one.add_argument("--gain-samples", type=int, default=2)
    one.add_argument("--rounds", type=int, help="search too, with so many rounds; without it: collect alone")
    one.add_argument("--heldout", type=int, default=2)
    one.add_argument("--out", type=Path, required=True)
    many = parts.add_parser("table")
    many.add_argument("files", type=Path, nargs="+")
    many.add_argument("--machine", default="cpu")
    options = parser.parse_args()
    if options.do == "run":
        run(options)
    else:
        sys.stdout.write(table(options.files, options.machine) + "\n")


if __name__ == "__main__":
    main()
