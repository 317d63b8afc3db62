"""What operating points do on data that the search never saw, written into their profile."""

from collections.abc import Iterator
from typing import Any

from xcalib.collect.ranks import ALONE, Ranks
from xcalib.collect.units import Units
from xcalib.data import SampleSet
from xcalib.evaluation import Evaluation, evaluate_plans
from xcalib.evaluation.results import PlanResult
from xcalib.profile import Evidence, Intervals, LengthEvidence, OperatingPoint, Profile, make_profile
from xcalib.progress import Progress, silent
from xcalib.runtime import sparse_plan
from xcalib.search.gate import judge

__all__ = ["add_evidence", "with_evidence"]


def add_evidence(
    model: Any,
    profile: Profile,
    heldout: SampleSet,
    *,
    tokenizer: Any = None,
    units: Units | None = None,
    skip_bad: bool = False,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> Profile:
    """Measure every operating point on held-out samples; the profile with the figures, each point verified or not.

    With ``skip_bad`` the figures are those of the samples on which all numbers are finite, at least half of them.

    Raises:
        ModelError: the model's head is not supported.
        NonFiniteError: hidden states or logits are not finite.
    """
    plans = {point.name: sparse_plan(profile, point.name) for point in profile.points}
    how: dict[str, Any] = {"units": units, "skip_bad": skip_bad, "progress": progress, "ranks": ranks}
    found = evaluate_plans(model, heldout, plans, tokenizer=tokenizer, **how)
    return with_evidence(profile, found)


def with_evidence(profile: Profile, found: Evaluation) -> Profile:
    """The profile with an evaluation's figures for those of its points that were measured, each verified or not.

    With several length bins the evaluation must have parted its samples by these alone (``evaluate_plans`` without
    ``lengths``), so that each bin has one row of its ``by_length``.
    """
    measured = {plan.name: plan for plan in found.plans}
    points = (
        _judged(point.model_copy(update={"heldout": _evidence(measured[point.name], found, len(profile.length_bins))}))
        if point.name in measured
        else point
        for point in profile.points
    )
    return make_profile(**{**dict(profile), "points": tuple(points)})


def _judged(point: OperatingPoint) -> OperatingPoint:
    return point.model_copy(update={"verified": judge(point).verified})


def _evidence(result: PlanResult, found: Evaluation, bins: int) -> Evidence:
    return Evidence(
        density=result.density,
        kl=result.kl,
        kl_p99=result.kl_p99,
        accuracy=result.accuracy,
        accuracy_dense=found.dense.accuracy,
        perplexity=result.perplexity,
        perplexity_dense=found.dense.perplexity,
        samples=found.samples,
        tokens=found.tokens,
        intervals=_intervals(result, found),
        by_length=tuple(_at_each_length(result.name, found)) if bins > 1 else None,
    )


def _at_each_length(name: str, found: Evaluation) -> Iterator[LengthEvidence]:
    """One entry for each length bin with samples in it; what is dense below the first or beyond the last is nobody's."""
    for part in found.by_length:
        if part.length_bin is None or part.extrapolated:
            continue
        result = {plan.name: plan for plan in part.plans}[name]
        yield LengthEvidence(
            min_length=part.length_bin[0],
            max_length=part.length_bin[1],
            density=result.density,
            kl=result.kl,
            accuracy=result.accuracy,
            accuracy_dense=part.dense.accuracy,
            samples=part.samples,
            tokens=part.tokens,
            intervals=_intervals(result, found),
        )


def _intervals(result: PlanResult, found: Evaluation) -> Intervals | None:
    if result.kl_interval is None:
        return None
    return Intervals(
        confidence=found.confidence,
        resamples=found.resamples,
        kl=result.kl_interval,
        accuracy=result.accuracy_interval,
        drop=result.drop_interval,
    )
