"""One rank of a tensor-parallel collection: ``torchrun --nproc-per-node 2 tensor_parallel_worker.py MODEL SAMPLES OUT``."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

os.environ["XCALIB_BACKEND"] = "reference"

from xcalib.collect import CollectSettings, collect
from xcalib.collect.job import Job
from xcalib.collect.slopes import SlopeMeter
from xcalib.data import Sample, SampleSet
from xcalib.evaluation import evaluate_plans
from xcalib.models import loading
from xcalib.models.shards import head_shards
from xcalib.models.sparse import SparsePlan

SETTINGS = CollectSettings(
    stride=16,
    block_size=64,
    grid=(0.0, 0.4, 0.6, 0.8, 1.0),
    gain_samples=1,
    gain_density=0.6,
    joint_densities=(0.6, 0.7),
    gain_every=5,
    measures=("fisher", "mass"),
)


def _interrupt(*_args: object) -> None:
    raise KeyboardInterrupt


def main(model_folder: str, tokens: str, out: Path) -> None:
    arrays = np.load(tokens)
    found = [Sample(arrays[name], "random", (f"{index:016x}",)) for index, name in enumerate(sorted(arrays))]
    samples = SampleSet(tuple(found), {}, ("random",), "calibration", 0)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    how = {"tp_plan": "auto"} if "RANK" in os.environ else {}
    loading.load_tokenizer = lambda *_a, **_k: None  # the folder has none
    model = loading.load_model(model_folder, device="cpu", **how).model
    rank = head_shards(model).rank
    folder = out / f"host{rank}" / "curves"  # ranks may be on hosts that share no disk: the first one's counts
    whole = Job.measure_joint
    Job.measure_joint = _interrupt  # type: ignore[method-assign]
    try:
        collect(model, samples, folder, settings=SETTINGS)
    except KeyboardInterrupt:
        Job.measure_joint = whole  # type: ignore[method-assign]
    curves = collect(model, samples, folder, settings=SETTINGS, resume=True)
    again = collect(model, samples, folder, settings=SETTINGS, resume=True)  # done: every rank has to find that out
    np.testing.assert_array_equal(again.error, curves.error)
    ids, levels = torch.tensor(samples.samples[0].tokens), np.array([[0, 1, 2, 3]] * len(curves.layers))
    with torch.no_grad():
        dense = model.model(ids[None])[0][0][4::5]
    slopes = SlopeMeter(model, SETTINGS, curves.layers).measure(ids, levels, dense)
    thresholds = torch.tensor([[[0.0, 0.3, 0.6, 0.9]] * len(curves.layers)])
    plan = SparsePlan(16, 64, "antidiagonal", ((0, None),), thresholds)
    evaluation = evaluate_plans(model, samples, {"plan": plan}, tokenizer=None)
    np.savez(
        out / f"rank{rank}.npz",
        **{name: getattr(curves, name) for name in ("error", "kept", "energy", "gain", "joint_kl", "fisher", "mass")},
        slope=slopes.slope,
        slope_kl=slopes.kl,
        kl=[one.kl for one in evaluation.plans],
        density=[one.density for one in evaluation.plans],
    )
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
