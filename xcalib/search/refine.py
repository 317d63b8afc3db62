"""Refinement: shift what blocks cost in groups of layers, solve again, and keep what is better end to end (docs/refine.md)."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from xcalib.choices import DEFAULT_GROUPS, DEFAULT_RANGE, DEFAULT_TRIALS
from xcalib.collect.curves import Curves
from xcalib.data import SampleSet
from xcalib.errors import DataError, TargetError
from xcalib.profile import OperatingPoint, Prediction, Profile, Refined, make_profile
from xcalib.progress import Progress, silent
from xcalib.runtime import check_fits, sparse_plan
from xcalib.search._judge import Aim, Comparison, Measure
from xcalib.search._meter import Meter
from xcalib.search._space import PriceSpace, price_space

if TYPE_CHECKING:  # Optuna is imported where it is used: nothing else of xcalib waits for it
    from optuna.study import Study

    from xcalib.search._validation import Candidate

__all__ = ["DEFAULT_GROUPS", "DEFAULT_RANGE", "DEFAULT_TRIALS", "Refinement", "refine_point"]

DEFAULT_EVERY = 7  # KLs are taken at every such position, as for the layer gains


@dataclass(frozen=True)
class Refinement:
    """What came of refining one point.

    Attributes:
        profile: with the refined point, which has no held-out figures yet; the given profile where there was no gain.
        point: the point's name.
        improved: whether the profile has changed.
        least: what was minimised, ``kl`` or ``density``; the other was bounded by the start's.
        text: the outcome in one line.
        trials: finished ones by state (``complete``, ``pruned``), and ``failed`` ones, which do not count.
        trial: number of the best candidate's trial; None when no trial was better than the start on the refinement samples.
        shifts: its shift for each group of layers.
        refinement: it against the start on the samples of the trials.
        validation: the same on the validation samples, which decide.
        study: name of Optuna's study.
    """

    profile: Profile
    point: str
    improved: bool
    least: Measure
    text: str
    trials: dict[str, int]
    trial: int | None
    shifts: dict[str, float] | None
    refinement: Comparison | None
    validation: Comparison | None
    study: str

    def to_dict(self) -> dict[str, Any]:
        """Plain types for ``json.dumps``, without the profile."""
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "profile"
        }
        return {
            key: dataclasses.asdict(value) if isinstance(value, Comparison) else value for key, value in fields.items()
        }


def refine_point(
    model: Any,
    profile: Profile,
    curves: Curves,
    samples: SampleSet,
    validation: SampleSet,
    *,
    point: str | None = None,
    trials: int = DEFAULT_TRIALS,
    groups: int = DEFAULT_GROUPS,
    price_range: float = DEFAULT_RANGE,
    seed: int = 0,
    every: int = DEFAULT_EVERY,
    bin_index: int = 0,
    storage: str | None = None,
    resume: bool | None = None,
    progress: Progress = silent,
) -> Refinement:
    """Search around one operating point with Optuna, end to end, and keep the best only if validation samples confirm it.

    Args:
        model: a transformers causal language model, in evaluation mode, the profile's.
        profile: that has the point, found by the knapsack.
        curves: that it was searched on, of the length bin that is refined.
        samples: what the trials measure, of calibration data.
        validation: what decides, at least two samples, of calibration data that share no document with ``samples``.
        point: name of the operating point, default the profile's.
        trials: finished trials in all, over all workers and earlier runs.
        groups: dimensions at most, up to 24: contiguous groups of layers.
        price_range: largest shift of a group's log price.
        seed: of the proposals and the order of samples.
        every: KLs are taken at every such position; odd.
        bin_index: the length bin whose thresholds are refined; the samples must be of its lengths.
        storage: ``journal:PATH``, a path, or a database URL; None keeps the study in memory.
        resume: True goes on with the study in ``storage`` and refuses one with other options, False refuses to go on, None does
            either: then a second process with the same arguments works on the same study.
        progress: draws the work.

    Raises:
        StudyError: the storage cannot be opened, or ``resume`` forbids what it holds.
        CurvesError: the curves are not those that the point was searched on.
        XcalibError: what else is wrong, in one line.
    """
    from xcalib.search._objective import PointObjective
    from xcalib.search._sampler import ShiftSampler
    from xcalib.search._storage import open_storage, open_study, storage_errors
    from xcalib.search._study import run_trials
    from xcalib.search._validation import Validation

    chosen = profile.point(point)
    check_fits(model, profile)
    _check(profile, samples, validation, trials, price_range, bin_index)
    space = price_space(profile, chosen, curves, groups=groups, bin_index=bin_index)
    plan = sparse_plan(profile, chosen.name)
    objective = PointObjective(space, Meter(model, plan, samples, bin_index=bin_index, every=every), price_range, seed)
    judge_on = Meter(model, plan, validation, bin_index=bin_index, every=every)
    options = {"dimensions": len(space.names), "price range": price_range, "seed": seed, "every": every}
    identity = _identity(profile, chosen, space, samples, bin_index) | options
    with storage_errors():
        study = open_study(
            open_storage(storage),
            f"xcalib {chosen.name} {_digest(identity)}",
            identity,
            metric={"kl": "KL", "density": "density"}[objective.aim.least],
            resume=resume,
            sampler=ShiftSampler(objective.distributions(), seed),
        )
        objective.prepare(study, progress)
        run_trials(study, trials, objective, description=f"Refining {chosen.name}", progress=progress)
        best = Validation(study, objective, judge_on).best(validation, progress)
        record = _Record(seed, len(space.names), samples, validation, bin_index)
        return _refinement(profile, chosen, study, objective.aim, best, record)


def _check(
    profile: Profile, samples: SampleSet, validation: SampleSet, trials: int, price_range: float, bin_index: int
) -> None:
    if trials < 1:
        raise TargetError(f"trials is {trials}, expected at least 1")
    if not 0 < price_range <= 10:
        raise TargetError(f"price_range is {price_range}, expected a number above 0 and at most 10")
    if not 0 <= bin_index < len(profile.length_bins):
        raise TargetError(f"bin_index is {bin_index}, the profile has {len(profile.length_bins)} length bins")
    if len(validation.samples) < 2:
        raise DataError("validation has one sample: it takes at least two to tell whether anything is better")
    shared = samples.documents & validation.documents
    if shared:
        raise DataError(f"{len(shared)} documents are in the samples of the trials and in the validation samples")


def _identity(
    profile: Profile, point: OperatingPoint, space: PriceSpace, samples: SampleSet, bin_index: int
) -> dict[str, Any]:
    tables = space.tables
    read = hashlib.sha256()
    for table in (tables.grid, tables.cost, tables.loss, tables.kl):
        read.update(np.ascontiguousarray(table).tobytes())
    return {
        "point": point.name,
        "target": point.target,
        "model": f"{profile.model.name} {profile.model.config_sha256[:12]}",
        "method": f"stride {profile.method.stride}, block {profile.method.block_size}, {profile.method.pattern}, "
        f"order {profile.method.order}",
        "thresholds": _digest([list(row) for row in point.thresholds[bin_index]]),
        "length bin": bin_index,
        "curves": read.hexdigest()[:12],
        "samples": samples.tokens_sha256[:12],
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class _Record:
    seed: int
    dimensions: int
    samples: SampleSet
    validation: SampleSet
    bin_index: int


def _refinement(
    profile: Profile,
    point: OperatingPoint,
    study: "Study",
    aim: Aim,
    best: "Candidate | None",
    record: _Record,
) -> Refinement:
    trials = _count(study)
    improved = best is not None and best.validation.accepted
    if best is not None and improved:
        profile = _refined_profile(profile, point, aim, best, trials["complete"] + trials["pruned"], record)
    return Refinement(
        profile=profile,
        point=point.name,
        improved=improved,
        least=aim.least,
        text=_text(point.name, aim, trials, best),
        trials=trials,
        trial=None if best is None else best.trial.number,
        shifts=None if best is None else dict(best.trial.params),
        refinement=None if best is None else best.refinement,
        validation=None if best is None else best.validation,
        study=study.study_name,
    )


def _count(study: "Study") -> dict[str, int]:
    states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    return {"complete": states.count("complete"), "pruned": states.count("pruned"), "failed": states.count("fail")}


def _text(name: str, aim: Aim, trials: dict[str, int], best: "Candidate | None") -> str:
    finished = trials["complete"] + trials["pruned"]
    if best is None:
        return f"{name}: no gain: none of {finished} trials was better than the start on the samples that they measured"
    found, what = best.validation, {"kl": "KL", "density": "blocks"}[aim.least]
    ends = (
        ""
        if found.interval is None
        else f", {found.confidence:.1%} interval {found.interval[0]:.3f} to {found.interval[1]:.3f}"
    )
    figures = f"{found.ratio:.3f} times the start's {what} on {found.samples} validation samples{ends}"
    if found.accepted:
        return f"{name}: refined: {figures}"
    bounded = {"kl": "KL", "density": "density"}[aim.bounded]
    return f"{name}: no gain: the best of {finished} trials had {figures}, with {found.excess:+.2%} {bounded}; the start stays"


def _refined_profile(
    profile: Profile, point: OperatingPoint, aim: Aim, best: "Candidate", trials: int, record: _Record
) -> Profile:
    found = best.validation
    assert found.interval is not None  # nothing is accepted without one
    refined = Refined(
        trials=trials,
        seed=record.seed,
        dimensions=record.dimensions,
        samples=len(record.samples.samples),
        validation_samples=found.samples,
        least=aim.least,
        ratio=found.ratio,
        interval=found.interval,
        confidence=found.confidence,
    )
    thresholds = list(point.thresholds)
    thresholds[record.bin_index] = tuple(tuple(row) for row in best.thresholds.tolist())
    by_bin = list(point.refined or [None] * len(thresholds))
    by_bin[record.bin_index] = refined
    update = {
        "thresholds": tuple(thresholds),
        "predicted": _predicted(profile, point.predicted, found, record.bin_index),
        "bound": None,  # it was of the choice that the search took
        "heldout": None,
        "verified": False,
        "refined": tuple(by_bin),
    }
    points = tuple(p.model_copy(update=update) if p.name == point.name else p for p in profile.points)
    new = (record.samples.documents | record.validation.documents) - set(profile.calibration.documents)
    calibration = profile.calibration.model_copy(
        update={"documents": (*profile.calibration.documents, *sorted(new))}  # no evaluation may use them
    )
    versions = dict(profile.versions) | {"optuna": metadata.version("optuna")}
    return make_profile(**{**dict(profile), "points": points, "calibration": calibration, "versions": versions})


def _predicted(profile: Profile, predicted: Prediction | None, found: Comparison, index: int) -> Prediction | None:
    """What the search expected, changed as much as the validation samples did in the bin that was refined.

    The mean over several bins moves by that bin's share: each was searched on as many samples, and a sample weighs by its tokens
    in the KL and by its blocks in the density.
    """
    if predicted is None:
        return None
    lengths = profile.calibration.lengths or (profile.length_bins[0].min_length,) * len(profile.length_bins)
    blocks = [length * (length + profile.method.block_size) for length in lengths]
    parts = list(predicted.by_length or ())
    old = parts[index] if parts else predicted
    kl, density = (after / before if before > 0 else 1.0 for before, after in (found.kl, found.density))
    new = {"density": min(old.density * density, 1.0), "kl": old.kl * kl}
    if parts:
        parts[index] = parts[index].model_copy(update=new)
    moved = (new["density"] - old.density) * blocks[index] / sum(blocks)
    return Prediction(
        density=min(predicted.density + moved, 1.0),
        kl=predicted.kl + (new["kl"] - old.kl) * lengths[index] / sum(lengths),
        by_length=tuple(parts) or None,
    )
