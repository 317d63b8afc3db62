"""The main job: measure, search, and write down the evidence."""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xcalib.collect import CollectSettings, Curves, collect
from xcalib.collect.units import Units
from xcalib.data import DEFAULT_SPECS, Sample, SampleSet, load_samples
from xcalib.errors import TargetError
from xcalib.evaluation import evaluate_plans, refuse_overlap
from xcalib.models.sparse import SparsePlan
from xcalib.profile import OperatingPoint, Prediction, Profile, make_profile
from xcalib.progress import Progress, silent
from xcalib.search.evidence import add_evidence
from xcalib.search.gate import enforce
from xcalib.search.plan import Objective, Planned, SearchMethod, Tables, plan_point
from xcalib.search.targets import Target, parse_targets

__all__ = ["DEFAULT_CALIBRATION", "CalibrationData", "build_profile", "search"]

_OBJECTIVE_NAMES = {
    "tempered": "(gain x output error)^0.75",
    "gain": "gain x output error",
    "plain": "output error",
}
_PACKAGES = ("xcalib", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class CalibrationData:
    """How much data a search takes when it is given specs instead of samples (lengths in tokens)."""

    num_samples: int = 8
    heldout_samples: int = 6
    max_length: int = 2048
    min_length: int | None = None
    seed: int = 0


DEFAULT_CALIBRATION = CalibrationData()


def search(
    model: Any,
    data: SampleSet | str | Sequence[str] = DEFAULT_SPECS,
    *,
    target: str | Sequence[str] = (),
    tokenizer: Any = None,
    heldout: SampleSet | None = None,
    amount: CalibrationData = DEFAULT_CALIBRATION,
    method: SearchMethod = "knapsack",
    objective: Objective = "tempered",
    start_threshold: float = 0.9,
    settings: CollectSettings | None = None,
    curves: Curves | None = None,
    folder: str | os.PathLike[str] | None = None,
    name: str | None = None,
    resume: bool = False,
    force: bool = False,
    adjust: Callable[[Profile, Curves], Profile] | None = None,
    progress: Progress = silent,
) -> Profile:
    """Measure a model, find the thresholds of each operating point, and measure these on held-out data.

    Args:
        model: a transformers causal language model, in evaluation mode.
        data: samples, or specs such as ``"ruler"`` or ``"text:notes/*.md"`` (then ``tokenizer`` is needed and held-out
            samples come from the same specs, other documents).
        target: ``"density=0.25"``, ``"kl=0.01"``, ``"drop=1%"``, ``"speedup=4"``, several with names (``"fast:density=0.15"``);
            default three points at densities 0.45, 0.33 and 0.22.
        tokenizer: of the model.
        heldout: samples for the evidence; none with ``data`` given as samples means no evidence, and unverified points.
        amount: how much data to take from specs.
        method: ``knapsack`` or ``paper``.
        objective: ``tempered`` ((layer gain x output error)^0.75), ``gain`` (without the power) or ``plain`` (output error).
        start_threshold: of the paper's method.
        settings: of the measurement.
        curves: measured before; skips the measurement.
        folder: where curves and unfinished work are kept; default a temporary folder.
        name: what the user calls the model.
        resume: go on with what ``folder`` holds.
        force: return the profile although a point misses its target on held-out data; the point is marked unverified.
        adjust: changes what was found before it is measured on held-out data, as a refinement does.
        progress: draws the work.

    Raises:
        TargetMissedError: held-out data say that a target is missed (the rule: docs/search.md); it carries the profile.
        XcalibError: what is wrong, where, and what to do, in one line.
    """
    targets = parse_targets([target] if isinstance(target, str) else list(target))
    samples, heldout = _samples(data, heldout, tokenizer, amount)
    if heldout is not None:
        refuse_overlap(samples.documents if curves is None else curves.calibration["documents"], heldout)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(folder if folder is not None else temporary)
        if curves is None:
            curves = collect(
                model, samples, root / "curves", settings=settings, name=name, resume=resume, progress=progress
            )
        profile = build_profile(
            curves,
            targets,
            method=method,
            objective=objective,
            start_threshold=start_threshold,
            accuracy_drop=_drop_meter(model, samples, curves, tokenizer, progress),
        )
        if adjust is not None:
            profile = adjust(profile, curves)
        if heldout is None:
            return profile
        identity = _evidence_identity(profile, heldout)
        # a folder of its own: other targets on the same curves are no reason to refuse
        stamp = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        units = Units(root / "heldout" / stamp, identity, resume=resume)
        profile = add_evidence(model, profile, heldout, tokenizer=tokenizer, units=units, progress=progress)
        enforce(profile, force=force)  # a miss leaves the measured samples where they are, for the same with force
        shutil.rmtree(units.folder, ignore_errors=True)
        return profile


def _samples(
    data: SampleSet | str | Sequence[str], heldout: SampleSet | None, tokenizer: Any, amount: CalibrationData
) -> tuple[SampleSet, SampleSet | None]:
    if isinstance(data, SampleSet):
        return data, heldout
    specs = [data] if isinstance(data, str) else list(data)
    if tokenizer is None:
        raise TargetError("data is given as specs: pass tokenizer= to read them, or pass a SampleSet")
    lengths: dict[str, Any] = {"max_length": amount.max_length, "min_length": amount.min_length, "seed": amount.seed}
    samples = load_samples(specs, tokenizer, num_samples=amount.num_samples, split="calibration", **lengths)
    if heldout is None and amount.heldout_samples:
        heldout = load_samples(
            specs, tokenizer, num_samples=amount.heldout_samples, split="heldout", exclude=samples.documents, **lengths
        )
    return samples, heldout


def _evidence_identity(profile: Profile, heldout: SampleSet) -> dict[str, Any]:
    points = [(point.name, point.thresholds) for point in profile.points]
    return {"points": points, "config": profile.model.config_sha256, "heldout data": heldout.tokens_sha256}


def build_profile(
    curves: Curves,
    targets: Sequence[Target],
    *,
    method: SearchMethod = "knapsack",
    objective: Objective = "tempered",
    start_threshold: float = 0.9,
    accuracy_drop: Callable[[list[np.ndarray]], list[float]] | None = None,
) -> Profile:
    """Search the curves for every target; the profile carries predictions and no held-out evidence, so its points are unverified.

    Raises:
        TargetError: a target cannot be reached.
    """
    tables = Tables.of(curves, objective)
    points = []
    for target in targets:
        planned = plan_point(
            tables, target, method=method, start_threshold=start_threshold, accuracy_drop=accuracy_drop
        )
        points.append(_point(curves, target, planned, method, objective))
    names = [target.name for target in targets]
    settings, model = curves.settings, curves.model
    measured = set(curves.layers)
    return make_profile(
        method={"stride": settings.stride, "block_size": settings.block_size, "pattern": settings.pattern},
        model=model,
        dense_layers=tuple(layer for layer in range(int(model["layers"])) if layer not in measured),
        # Below four blocks nearly every block is the sink or a row's own.
        length_bins=({"min_length": 4 * settings.block_size, "max_length": None},),
        points=tuple(points),
        default_point="balanced" if "balanced" in names else names[0],
        calibration={
            **curves.calibration,
            "documents": tuple(curves.calibration["documents"]),
            "sources": tuple(curves.calibration["sources"]),
        },
        versions={package: metadata.version(package) for package in _PACKAGES} | {"python": platform.python_version()},
    )


def _point(
    curves: Curves, target: Target, planned: Planned, method: SearchMethod, objective: Objective
) -> OperatingPoint:
    return OperatingPoint(
        name=target.name,
        target=str(target),
        objective=_OBJECTIVE_NAMES[objective],
        method=method,
        thresholds=(_all_layers(curves, planned.thresholds),),
        predicted=Prediction(density=min(planned.density, 1.0), kl=planned.kl),
        bound=planned.bound,
        verified=False,
    )


def _all_layers(curves: Curves, thresholds: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Thresholds ``(measured layers, heads)`` to those of every layer; layers that stay dense get 1."""
    full = np.ones((int(curves.model["layers"]), thresholds.shape[1]))
    full[list(curves.layers)] = thresholds
    return tuple(tuple(float(tau) for tau in row) for row in full)


def _drop_meter(
    model: Any, samples: SampleSet, curves: Curves, tokenizer: Any, progress: Progress
) -> Callable[[list[np.ndarray]], list[float]] | None:
    """Measures by how much accuracy falls on the calibration samples that have answers; None without any."""
    asking: tuple[Sample, ...] = tuple(sample for sample in samples.samples if sample.answers)
    if not asking or tokenizer is None:
        return None

    def measure(candidates: list[np.ndarray]) -> list[float]:
        settings = curves.settings
        plans = {
            str(number): SparsePlan(
                settings.stride,
                settings.block_size,
                settings.pattern,
                ((0, None),),
                torch.tensor(_all_layers(curves, thresholds))[None],
            )
            for number, thresholds in enumerate(candidates)
        }
        data = SampleSet(samples=asking, dropped={}, specs=samples.specs, split=samples.split, seed=samples.seed)
        found = evaluate_plans(model, data, plans, tokenizer=tokenizer, progress=progress)
        dense = found.dense.accuracy
        if not dense:
            raise TargetError(
                "the dense model answers none of the calibration questions: a drop of accuracy means nothing here"
            )
        return [1 - (plan.accuracy or 0.0) / dense for plan in found.plans]

    return measure
