"""What operating points do on data that the search never saw, written into their profile."""

from typing import Any

from xcalib.collect.units import Units
from xcalib.data import SampleSet
from xcalib.evaluation import Evaluation, evaluate_plans
from xcalib.evaluation.results import PlanResult
from xcalib.profile import Evidence, Intervals, OperatingPoint, Profile, make_profile
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
    progress: Progress = silent,
) -> Profile:
    """Measure every operating point on held-out samples; the profile with the figures, each point verified or not.

    Raises:
        ModelError: hidden states are not finite or the model's head is not supported.
    """
    plans = {point.name: sparse_plan(profile, point.name) for point in profile.points}
    found = evaluate_plans(model, heldout, plans, tokenizer=tokenizer, units=units, progress=progress)
    return with_evidence(profile, found)


def with_evidence(profile: Profile, found: Evaluation) -> Profile:
    """The profile with an evaluation's figures for those of its points that were measured, each verified or not."""
    measured = {plan.name: plan for plan in found.plans}
    points = (
        _judged(point.model_copy(update={"heldout": _evidence(measured[point.name], found)}))
        if point.name in measured
        else point
        for point in profile.points
    )
    return make_profile(**{**dict(profile), "points": tuple(points)})


def _judged(point: OperatingPoint) -> OperatingPoint:
    return point.model_copy(update={"verified": judge(point).verified})


def _evidence(result: PlanResult, found: Evaluation) -> Evidence:
    intervals = None
    if result.kl_interval is not None:
        intervals = Intervals(
            confidence=found.confidence,
            resamples=found.resamples,
            kl=result.kl_interval,
            accuracy=result.accuracy_interval,
            drop=result.drop_interval,
        )
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
        intervals=intervals,
    )
