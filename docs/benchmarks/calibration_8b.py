"""How long calibration takes at the shape of an 8B Llama: random weights, random tokens, every step of ``xcalib search``.

``python calibration_8b.py calibration-8b.json`` on a CUDA device; tiny, anywhere:
``python calibration_8b.py out.json --layers 2 --hidden 512 --samples 2 --heldout 1 --length 4096``.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xcalib.bench.machine import describe_machine, describe_versions
from xcalib.collect import CollectSettings, collect
from xcalib.data import Sample, SampleSet
from xcalib.errors import XcalibError
from xcalib.profile import Profile, save_profile
from xcalib.search import DEFAULT_TARGETS, add_evidence, build_profile

HEAD_DIM, GROUP, VOCABULARY = 128, 4, 32_000


class Clock:
    """The seconds and the peak GPU memory of each phase; the library reports its own phases to it as progress."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = self.now()
        self.phases: list[dict[str, Any]] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, description: str, total: int = 1) -> Iterator[Callable[[int], None]]:
        """A phase; ``first_step_seconds`` is the time to its first advance, which what is prepared once takes longer."""
        phase: dict[str, Any] = {"phase": description, "steps": total}
        self.phases.append(phase)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = self.now()

        def advance(_steps: int) -> None:
            if "first_step_seconds" not in phase:
                phase["first_step_seconds"] = self.now() - start

        yield advance
        phase["seconds"] = self.now() - start
        if self.device.type == "cuda":
            phase["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        sys.stderr.write(f"{phase['seconds']:8.1f} s  {description}\n")


def random_model(layers: int, hidden: int, length: int, device: torch.device) -> Any:
    """Llama with 128 dimensions a head and four query heads to a KV head, initialised where it will run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = hidden // HEAD_DIM
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // GROUP,
        head_dim=HEAD_DIM,
        max_position_embeddings=length,
        initializer_range=0.02,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def random_samples(count: int, length: int, split: str, seed: int) -> SampleSet:
    generator = np.random.default_rng(seed)
    samples = [
        Sample(generator.integers(VOCABULARY, size=length), "random", (f"{seed:08x}{index:08x}",))
        for index in range(count)
    ]
    return SampleSet(samples=tuple(samples), dropped={}, specs=("random",), split=split, seed=seed)


def calibrate(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    clock = Clock(device)
    with clock("building the model"):
        model = random_model(options.layers, options.hidden, options.length, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ready = clock.now()
    samples = random_samples(options.samples, options.length, "calibration", seed=0)
    settings = CollectSettings(stride=options.stride)
    with tempfile.TemporaryDirectory() as folder:
        curves = collect(model, samples, Path(folder) / "curves", settings=settings, name="random", progress=clock)
        with clock("searching"):
            profile = build_profile(curves, DEFAULT_TARGETS)
        found = clock.now()
        if options.heldout:
            heldout = random_samples(options.heldout, options.length, "heldout", seed=1)
            profile = add_evidence(model, profile, heldout, progress=clock)
        save_profile(profile, Path(folder) / "profile.yaml")
    end = clock.now()
    return {
        "parameters": parameters,
        "phases": clock.phases,
        "collect_and_search_seconds": found - ready,
        "evidence_seconds": end - found,
        "end_to_end_seconds": end - clock.began,
        "points": points(profile),
    }


def points(profile: Profile) -> list[dict[str, Any]]:
    return [
        {
            "name": point.name,
            "predicted": point.predicted.model_dump(),
            "bound": point.bound.model_dump() if point.bound else None,
            "heldout": point.heldout.model_dump() if point.heldout else None,
        }
        for point in profile.points
    ]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help=f"a multiple of {HEAD_DIM * GROUP}")
    parser.add_argument("--samples", type=int, default=16, help="for calibration")
    parser.add_argument(
        "--heldout", type=int, default=6, help="for the evidence, as `xcalib search` takes them; 0: none"
    )
    parser.add_argument("--length", type=int, default=32_768, help="tokens of each sample")
    parser.add_argument("--stride", type=int, default=16, help="S")
    options = parser.parse_args()
    for name, least in (
        ("layers", 1),
        ("hidden", 1),
        ("samples", 1),
        ("heldout", 0),
        ("length", 4096),
    ):  # less has too few blocks
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least {least}")
    if options.hidden % (HEAD_DIM * GROUP):
        parser.error(f"--hidden is {options.hidden}, expected a multiple of {HEAD_DIM * GROUP}")
    if not options.out.parent.is_dir():
        parser.error(f"{options.out.parent} is not a folder: nothing could be written to {options.out}")
    return options


def main() -> None:
    options = parsed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "command": " ".join(["python", "calibration_8b.py", *sys.argv[1:]]),
        "machine": describe_machine(device),
        "versions": describe_versions() | {"transformers": metadata.version("transformers")},
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
    }
    try:
        record |= calibrate(options, device)
    except XcalibError as error:
        raise SystemExit(f"error: {error}") from error
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.stderr.write(f"{record['end_to_end_seconds']:8.1f} s  end to end; wrote {options.out}\n")


if __name__ == "__main__":
    main()
