"""The main job: measure, search, and write down the evidence."""

import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from xcalib._lock import lock_folder
from xcalib.collect import CollectSettings, Curves, collect_lengths, measured_length, refuse_with_offload
from xcalib.collect.budget import chunks_for_search
from xcalib.collect.chunks import HeadChunks
from xcalib.collect.ranks import ALONE, Ranks
from xcalib.collect.shares import stamped_units
from xcalib.collect.skipping import kept_samples, refuse_skipping
from xcalib.data import DEFAULT_SPECS, SampleSet, Split, length_sets, load_samples, pooled
from xcalib.errors import CurvesError, TargetError, XcalibWarning
from xcalib.evaluation import refuse_overlap
from xcalib.profile import OperatingPoint, Profile, make_profile
from xcalib.progress import Progress, silent
from xcalib.search.drop import DropMeters
from xcalib.search.evidence import add_evidence
from xcalib.search.gate import enforce
from xcalib.search.lengths import (
    as_sets,
    at_length,
    calibration_documents,
    length_bins,
    pooled_calibration,
    pooled_prediction,
    refuse_unreachable,
    worst_bound,
)
from xcalib.search.objectives import OBJECTIVE_NAMES, Objective, measuring
from xcalib.search.plan import AccuracyDrop, Planned, SearchMethod, Tables, all_layers, plan_point
from xcalib.search.rounds import Improve, Rounds
from xcalib.search.sequential import DEFAULT_ROUNDS
from xcalib.search.targets import Target, parse_targets

__all__ = ["DEFAULT_CALIBRATION", "CalibrationData", "build_profile", "search"]

_PACKAGES = ("xcalib", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class CalibrationData:
    """How much data a search takes when it is given specs instead of samples (lengths in tokens).

    ``lengths`` takes the place of ``max_length``: samples of each length, as many of each as the two numbers say, and
    thresholds of their own for each (docs/lengths.md). ``min_length`` then has to be None.
    """

    num_samples: int = 8
    heldout_samples: int = 6
    max_length: int = 2048
    min_length: int | None = None
    seed: int = 0
    lengths: tuple[int, ...] = ()


DEFAULT_CALIBRATION = CalibrationData()


def search(
    model: Any,
    data: SampleSet | Sequence[SampleSet] | str | Sequence[str] = DEFAULT_SPECS,
    *,
    target: str | Sequence[str] = (),
    tokenizer: Any = None,
    heldout: SampleSet | Sequence[SampleSet] | None = None,
    amount: CalibrationData = DEFAULT_CALIBRATION,
    method: SearchMethod = "knapsack",
    objective: Objective = "tempered",
    start_threshold: float = 0.9,
    settings: CollectSettings | None = None,
    curves: Curves | Sequence[Curves] | None = None,
    folder: str | os.PathLike[str] | None = None,
    name: str | None = None,
    rounds: int = DEFAULT_ROUNDS,
    resume: bool = False,
    force: bool = False,
    max_memory: int | None = None,
    skip_bad: bool = False,
    adjust: Callable[[Profile, Sequence[Curves]], Profile] | None = None,
    save: Callable[[Profile], object] | None = None,
    offload: bool = False,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> Profile:
    """Measure a model, find the thresholds of each operating point, and measure these on held-out data.

    Args:
        model: a transformers causal language model, in evaluation mode.
        data: samples, or specs such as ``"ruler"`` or ``"text:notes/*.md"`` (then ``tokenizer`` is needed and held-out
            samples come from the same specs, other documents). Several sets of samples, in ascending order of length, give
            thresholds for each length.
        target: ``"density=0.25"``, ``"kl=0.01"``, ``"drop=1%"``, ``"speedup=4"``, several with names (``"fast:density=0.15"``);
            default three points at densities 0.45, 0.33 and 0.22.
        tokenizer: of the model.
        heldout: samples for the evidence; none with ``data`` given as samples means no evidence, and unverified points.
        amount: how much data to take from specs, and of which lengths; default those of several ``curves``.
        method: ``knapsack`` or ``paper``.
        objective: ``tempered`` ((layer gain x output error)^0.75), ``gain`` (without the power), ``plain`` (output error),
            ``fisher`` (Fisher-weighted output error) or ``mass`` (attention mass left out).
        start_threshold: of the paper's method.
        settings: of the measurement.
        curves: measured before, of one length or of several; skips the measurement.
        folder: where curves and unfinished work are kept; default a temporary folder.
        name: what the user calls the model.
        rounds: how often to measure with all layers sparse and search again, from what the knapsack found first
            (:mod:`xcalib.search.sequential`); 0 leaves it out, and it is left out where the samples are not the curves'.
        resume: go on with what ``folder`` holds, with any number of ranks.
        force: return the profile although a point misses its target on held-out data; the point is marked unverified.
        max_memory: bytes that the peak is predicted to stay within, as in :func:`xcalib.collect.collect`.
        skip_bad: leave out samples that give numbers that are not finite, up to half of them, in place of an error; one rank.
        adjust: changes what was found before it is measured on held-out data, as a refinement does.
        save: gets the profile before finished measurements are removed from ``folder``, so that a search that is killed before
            the profile is on disk repeats nothing; of several ranks, rank 0 calls it.
        offload: measure the curves layer by layer, as :func:`xcalib.collect.collect`.
        progress: draws the work.
        ranks: processes that share the samples of every measurement, as in :func:`xcalib.collect.collect`; all get the profile.

    Raises:
        BusyError: another process is at work in ``folder``.
        TargetMissedError: held-out data say that a target is missed (the rule: docs/search.md); it carries the profile.
        XcalibError: what is wrong, where, and what to do, in one line.
    """
    targets = parse_targets([target] if isinstance(target, str) else list(target))
    if rounds < 0:
        raise TargetError(f"rounds is {rounds}, expected at least 0")
    refuse_skipping(skip_bad, ranks)
    measured = None if curves is None else as_sets(curves)
    if measured is not None and len(measured) > 1 and not amount.lengths:
        amount = replace(amount, lengths=tuple(measured_length(one) for one in measured))
    sets, heldout = _samples(data, heldout, tokenizer, amount)
    if heldout is not None:
        refuse_overlap(calibration_documents(sets, measured), heldout)
    settings = measured[0].settings if measured else measuring(settings or CollectSettings(), objective)
    if offload:
        refuse_with_offload(max_memory, skip_bad)
        chunks = HeadChunks()
    else:
        what: dict[str, Any] = {"collecting": measured is None, "rounds": bool(rounds)}
        what |= {"plans": len(targets), "asking": any(one.kind == "drop" for one in targets)}
        with ranks.together():  # hosts may have more memory or less
            chunks = chunks_for_search(model, sets, heldout, settings, max_memory, ranks, **what)
    with tempfile.TemporaryDirectory() as temporary, _work_in(Path(folder or temporary), ranks) as root:
        if measured is None:
            refuse_unreachable(targets, sets, settings.block_size)
            measured = collect_lengths(
                model, sets, root / "curves", settings=settings, name=name, resume=resume, max_memory=max_memory,
                skip_bad=skip_bad, offload=offload, progress=progress, ranks=ranks,
            )  # fmt: skip
        if len(sets) == len(measured):
            sets = tuple(kept_samples(*pair) for pair in zip(sets, measured, strict=True))
        count = rounds if method == "knapsack" else 0
        again = Rounds(count, sets, measured, root / "rounds", ranks, chunks=chunks, skip_bad=skip_bad)
        drops = DropMeters(model, tokenizer, root / "drop", progress, ranks, skip_bad=skip_bad)
        profile = build_profile(
            measured,
            targets,
            method=method,
            objective=objective,
            start_threshold=start_threshold,
            accuracy_drop=drops.of(sets, measured),
            improve=again.improvers(model, objective, progress),
        )
        if adjust is not None:
            profile = adjust(profile, measured)
        units = None
        if heldout is not None:
            units = stamped_units(root / "heldout", _evidence_identity(profile, heldout), resume=resume, ranks=ranks)
            profile = add_evidence(
                model,
                profile,
                heldout,
                tokenizer=tokenizer,
                units=units,
                skip_bad=skip_bad,
                progress=progress,
                ranks=ranks,
            )
            # a miss leaves what was measured where it is, for the same with force
            profile = enforce(profile, force=force, offered={one.name for one in targets if one.offered})
        if save is not None:
            with ranks.together():
                if ranks.leader:
                    save(profile)
        if units is not None:
            units.remove()
        drops.discard()
        again.discard()
        return profile


@contextmanager
def _work_in(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """The folder, made if it is not there, and no other job's meanwhile."""
    with ranks.together():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
        except OSError as error:
            raise CurvesError(f"{folder}: cannot be made: {error.strerror or error}") from error
    with lock:
        yield folder


def _samples(
    data: SampleSet | Sequence[SampleSet] | str | Sequence[str],
    heldout: SampleSet | Sequence[SampleSet] | None,
    tokenizer: Any,
    amount: CalibrationData,
) -> tuple[tuple[SampleSet, ...], SampleSet | None]:
    """Calibration samples by length, and all held-out samples together."""
    if heldout is not None and not isinstance(heldout, SampleSet):
        heldout = pooled(heldout)
    given = [data] if isinstance(data, SampleSet | str) else list(data)
    sets = tuple(item for item in given if isinstance(item, SampleSet))
    specs = [item for item in given if isinstance(item, str)]
    if sets and specs:
        raise TargetError("data has both samples and specs: give one kind")
    if sets:
        return sets, heldout
    if tokenizer is None:
        raise TargetError("data is given as specs: pass tokenizer= to read them, or pass a SampleSet")
    if amount.lengths and amount.min_length is not None:
        raise TargetError("min_length goes with max_length: with lengths, samples of each length are drawn")

    def read(split: Split, count: int, exclude: frozenset[str]) -> tuple[SampleSet, ...]:
        def one(length: int) -> SampleSet:
            return load_samples(
                specs, tokenizer, num_samples=count, max_length=length, min_length=amount.min_length, seed=amount.seed,
                split=split, exclude=exclude,
            )  # fmt: skip

        return length_sets(amount.lengths, one) if amount.lengths else (one(amount.max_length),)

    calibration = read("calibration", amount.num_samples, frozenset())
    if heldout is None and amount.heldout_samples:
        heldout = pooled(read("heldout", amount.heldout_samples, pooled(calibration).documents))
    return calibration, heldout


def _evidence_identity(profile: Profile, heldout: SampleSet) -> dict[str, Any]:
    points = [(point.name, point.thresholds) for point in profile.points]
    bins = [part.model_dump() for part in profile.length_bins]
    data = {"heldout data": heldout.tokens_sha256, "heldout questions": heldout.questions_sha256}
    method = profile.method.model_dump()
    return {"points": points, "bins": bins, "method": method, "config": profile.model.config_sha256, **data}


def build_profile(
    curves: Curves | Sequence[Curves],
    targets: Sequence[Target],
    *,
    method: SearchMethod = "knapsack",
    objective: Objective = "tempered",
    start_threshold: float = 0.9,
    accuracy_drop: AccuracyDrop | Sequence[AccuracyDrop | None] | None = None,
    improve: Sequence[Improve] | None = None,
) -> Profile:
    """Search the curves for every target; the profile carries predictions and no held-out evidence, so its points are unverified.

    Curves of several lengths, in ascending order, give one length bin each, and every target is met in each of them
    (docs/lengths.md). ``accuracy_drop`` and ``improve``, which goes on from what the curves give, then have one entry for each.

    Raises:
        TargetError: a target that was asked for cannot be reached, at one of the lengths; points offered beside it are left out
            with a warning.
        CurvesError: curves of several lengths are not of one model and one measurement.
    """
    sets = as_sets(curves)
    drops = accuracy_drop if isinstance(accuracy_drop, Sequence) else [accuracy_drop] * len(sets)
    tables = [Tables.of(one, objective) for one in sets]
    found: dict[str, OperatingPoint] = {}
    for target in sorted(targets, key=lambda target: target.offered):  # what was asked for fails first
        planned = []
        try:
            for index, (table, drop) in enumerate(zip(tables, drops, strict=True)):
                with at_length(table.curves, target, len(sets)):
                    plan = plan_point(table, target, method=method, start_threshold=start_threshold, accuracy_drop=drop)
                    planned.append(improve[index](target, plan) if improve else plan)
        except TargetError as error:
            if not target.offered:
                raise
            warnings.warn(f"point {target.name!r} is left out: {error}", XcalibWarning, stacklevel=2)
            continue
        found[target.name] = _point(sets, target, planned, method, objective)
    points = tuple(found[target.name] for target in targets if target.name in found)
    settings, model = sets[0].settings, sets[0].model
    somewhere = {layer for one in sets for layer in one.layers}
    return make_profile(
        method={key: getattr(settings, key) for key in ("stride", "block_size", "pattern", "order")},
        model=model,
        dense_layers=tuple(layer for layer in range(int(model["layers"])) if layer not in somewhere),
        length_bins=length_bins(sets),
        points=points,
        default_point="balanced" if "balanced" in found else points[0].name,
        calibration=pooled_calibration(sets),
        versions={package: metadata.version(package) for package in _PACKAGES} | {"python": platform.python_version()},
    )


def _point(
    sets: Sequence[Curves], target: Target, planned: Sequence[Planned], method: SearchMethod, objective: Objective
) -> OperatingPoint:
    return OperatingPoint(
        name=target.name,
        target=str(target),
        objective=OBJECTIVE_NAMES[objective],
        method=method,
        thresholds=tuple(all_layers(curves, one.thresholds) for curves, one in zip(sets, planned, strict=True)),
        predicted=pooled_prediction(sets, planned),
        bound=worst_bound(planned),
        verified=False,
        rounds=tuple(one.rounds for one in planned) if any(one.rounds for one in planned) else None,
    )
