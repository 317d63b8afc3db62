"""How far a sparsely attending model is from itself attending densely: KL, perplexity, task accuracy, density, time."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from xcalib.collect.ranks import ALONE, Ranks
from xcalib.collect.shares import Advance, Arrays, Shares
from xcalib.collect.skipping import Skipping, of_sample
from xcalib.collect.units import Units
from xcalib.data import Sample, SampleSet, pooled, score
from xcalib.errors import DataError, NonFiniteError
from xcalib.evaluation.by_length import Bins, LengthResult, part_by_length
from xcalib.evaluation.results import Evaluation, SampleResult, summarise
from xcalib.evaluation.timing import Stopwatch
from xcalib.evaluation.uniform import PUBLISHED, PUBLISHED_RULE, UNIFORM, UniformPoint, uniform_at
from xcalib.kernels import visible_blocks
from xcalib.models.logits import LogitHead, sampled_positions
from xcalib.models.placement import input_device, run_devices
from xcalib.models.sparse import SparseAttention, SparsePlan
from xcalib.profile import Profile
from xcalib.progress import Progress, silent
from xcalib.runtime import check_fits, sparse_plan

__all__ = [
    "PUBLISHED",
    "Evaluation",
    "LengthResult",
    "UniformPoint",
    "answer_score",
    "evaluate",
    "evaluate_plans",
    "plans_to_evaluate",
    "refuse_overlap",
    "uniform_at",
]


def evaluate(
    model: Any,
    data: SampleSet | Sequence[SampleSet],
    profile: Profile | None = None,
    *,
    point: str | None = None,
    uniform: Sequence[float] = (),
    published: Sequence[float] = (),
    tokenizer: Any = None,
    skip_bad: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Measure a model with and without a profile on the same samples.

    Args:
        model: a transformers causal language model, in evaluation mode.
        data: samples; those with answers are scored when ``tokenizer`` is given. Several sets are pooled, and the result has
            each set's length apart (``Evaluation.by_length``).
        profile: its points (or one ``point``) are measured; None measures the dense model and single taus only.
        point: name of the one operating point to measure; default all.
        uniform: single taus to measure the same way, with the profile's method.
        published: single taus by the published rule (antidiagonal, order by score), with the profile's stride and block size.
        tokenizer: turns generated tokens into text.
        skip_bad: leave out samples that give numbers that are not finite, up to half of them, in place of an error.
        progress: draws the work.

    Raises:
        ModelError: the profile is another model's.
        NonFiniteError: hidden states or logits are not finite, without ``skip_bad`` or in more than half of the samples.
        DataError: calibration documents of the profile are among the samples: figures on them would prove nothing.
    """
    sets = (data,) if isinstance(data, SampleSet) else tuple(data)
    together = pooled(sets)
    if profile is not None:
        refuse_overlap(profile.calibration.documents, together)
    plans = plans_to_evaluate(model, profile, point=point, uniform=uniform, published=published)
    lengths = [one.length for one in sets]
    return evaluate_plans(
        model, together, plans, tokenizer=tokenizer, lengths=lengths, skip_bad=skip_bad, progress=progress
    )


def plans_to_evaluate(
    model: Any,
    profile: Profile | None,
    *,
    point: str | None = None,
    uniform: Sequence[float] = (),
    published: Sequence[float] = (),
) -> dict[str, SparsePlan]:
    """Thresholds by name: the profile's points (or one) and single taus, as ``tau=0.9``, with the profile's method.

    ``published`` taus, as ``published tau=0.9``, go by the published rule (antidiagonal, order by score), whatever the profile's,
    with its stride and block size.

    Raises:
        ModelError: the profile is another model's.
        ProfileError: there is no such point.
        DataError: a tau is not in [0, 1].
    """
    plans: dict[str, SparsePlan] = {}
    if profile is not None:
        check_fits(model, profile)
        names = [profile.point(point).name] if point is not None else [candidate.name for candidate in profile.points]
        plans = {name: sparse_plan(profile, name) for name in names}
    for tau in uniform:
        plans[f"{UNIFORM}{tau:g}"] = _uniform_plan(model, profile, tau)
    for tau in published:
        plan = _uniform_plan(model, profile, tau)
        plans[f"{PUBLISHED}{tau:g}"] = dataclasses.replace(plan, **PUBLISHED_RULE)
    return plans


def refuse_overlap(documents: Iterable[str], data: SampleSet) -> None:
    """Raise DataError if one of the documents that were calibrated on (their digests) is among the samples'."""
    shared = set(documents) & data.documents
    if shared:
        raise DataError(
            f"{len(shared)} of the {len(data.documents)} documents were used to calibrate this profile: evaluate on the "
            "held-out split or on other data"
        )


def _uniform_plan(model: Any, profile: Profile | None, tau: float) -> SparsePlan:
    if not 0 <= tau <= 1:
        raise DataError(f"single tau is {tau}, expected a number in [0, 1]")
    config = model.config.get_text_config()
    shape = (1, config.num_hidden_layers, config.num_attention_heads)
    if profile is None:
        return SparsePlan(16, 128, "antidiagonal", ((0, None),), torch.full(shape, tau))
    plan = sparse_plan(profile, None)
    return dataclasses.replace(plan, thresholds=torch.full_like(plan.thresholds, tau))


def evaluate_plans(
    model: Any,
    data: SampleSet,
    plans: Mapping[str, SparsePlan],
    *,
    tokenizer: Any = None,
    every: int = 1,
    lengths: Sequence[int] = (),
    units: Units | None = None,
    skip_bad: bool = False,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Measure the dense model and each plan on every sample.

    Args:
        model: a transformers causal language model, in evaluation mode.
        data: samples.
        plans: name to thresholds.
        tokenizer: needed to score samples with answers.
        every: KL and losses are taken at every such position; odd, so that every place within a block has its turn.
        lengths: that samples were drawn at, in tokens, if several: the result has them apart.
        units: where finished samples are kept, so that an interrupted evaluation goes on.
        skip_bad: leave out samples that give numbers that are not finite, up to half of them, in place of an error; one rank.
        progress: draws the work.
        ranks: processes that share the samples; all get the result.

    Raises:
        ModelError: the model's head is not supported.
        NonFiniteError: hidden states or logits are not finite, without ``skip_bad`` or in more than half of the samples.
        DataError: ``every`` is even, or a sample is shorter than that or than two tokens.
        RankError: another rank failed, or there are several and ``skip_bad`` is set.
    """
    shortest = min(len(sample.tokens) for sample in data.samples)
    if every < 1 or every % 2 == 0 or every > shortest:
        raise DataError(
            f"every is {every}, expected an odd number of at most {shortest}, the tokens of the shortest sample"
        )
    if shortest < 2:
        index = next(index for index, sample in enumerate(data.samples) if len(sample.tokens) < 2)
        source = data.samples[index].source
        raise DataError(f"sample {index} ({source}) has one token: nothing follows it to be predicted; leave it out")
    head = LogitHead(model)
    skipping = Skipping(data, units, allowed=skip_bad, ranks=ranks)
    indices = skipping.indices

    def measure(place: int, advance: Advance) -> Arrays | None:
        index = indices[place]
        try:
            with of_sample(index):
                return _evaluate_sample(model, head, data.samples[index], plans, tokenizer, every, advance).arrays()
        except NonFiniteError as error:
            skipping.skip(index, error)
            return None

    count = len(indices)
    names = [f"evaluated-{index:05d}" for index in indices]
    each = Shares(units, progress, ranks).each(f"Evaluating {count} samples", names, measure, [1 + len(plans)] * count)
    results = [SampleResult(**unit) for unit in each]
    data = skipping.samples
    by_length = part_by_length(list(plans), results, data, _bins(plans), lengths)
    found = summarise(list(plans), results, data)
    return dataclasses.replace(found, by_length=by_length, skipped=len(skipping.reasons))


def _bins(plans: Mapping[str, SparsePlan]) -> Bins:
    """The length bins of the plans: those of one profile and its single taus are the same."""
    return next((plan.bins for plan in plans.values()), ((0, None),))


def _evaluate_sample(
    model: Any,
    head: LogitHead,
    sample: Sample,
    plans: Mapping[str, SparsePlan],
    tokenizer: Any,
    every: int,
    advance: Any,
) -> SampleResult:
    tokens = torch.tensor(sample.tokens, device=input_device(model))
    asks = bool(sample.answers) and tokenizer is not None
    watch = Stopwatch(run_devices(model))
    compared = sampled_positions(every)
    accuracy, hidden = [], []
    with watch:
        dense = head.prefill(tokens, use_cache=asks)
    accuracy.append(answer_score(model, head, dense, sample, tokenizer) if asks else np.nan)
    advance(1)
    densities, blocks = [], []
    for plan in plans.values():
        with SparseAttention(model, plan) as sparse:
            with watch:
                prefill = head.prefill(tokens, use_cache=asks)
            density = sparse.density()  # (layers, heads)
            density[sorted(plan.dense_layers)] = np.nan
            densities.append(density)
            blocks.append(int(visible_blocks(len(tokens), len(tokens), block_size=plan.block_size).sum()))
            accuracy.append(answer_score(model, head, prefill, sample, tokenizer) if asks else np.nan)
        hidden.append(prefill.hidden[compared])
        advance(1)
    divergence = head.compare(dense.hidden[compared], hidden, tokens[1:][compared])
    return SampleResult(
        kl=divergence.kl.cpu().numpy(),
        loss=divergence.loss.double().sum(1).cpu().numpy(),
        targets=np.array(divergence.loss.shape[1], dtype=np.int64),
        density=np.stack(densities) if densities else np.zeros((0, 0, 0)),
        blocks=np.array(blocks, dtype=np.float64),
        accuracy=np.array(accuracy, dtype=np.float64),
        seconds=np.array(watch.laps, dtype=np.float64),
    )


@torch.inference_mode()
def answer_score(model: Any, head: LogitHead, prefill: Any, sample: Sample, tokenizer: Any) -> float:
    """Generate greedily after the prompt and score the text, in [0, 1]."""
    stop = getattr(model.generation_config, "eos_token_id", None)
    stops = set(stop) if isinstance(stop, list) else {stop}
    generated: list[int] = []
    device = input_device(model)
    logits, cache = head.logits(prefill.hidden[-1:])[0], prefill.cache
    for _ in range(sample.max_new_tokens):
        token = int(logits.argmax())
        if token in stops:
            break
        generated.append(token)
        output = model(input_ids=torch.tensor([[token]], device=device), past_key_values=cache, use_cache=True)
        logits, cache = output.logits[0, -1], output.past_key_values
        if bool(logits.isnan().any()):
            raise NonFiniteError(f"{type(model).__name__}: the logits of generated token {len(generated)} hold NaN")
    return score(sample, tokenizer.decode(generated, skip_special_tokens=True))
