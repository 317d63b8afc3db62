"""Search again from where a search ended, with all layers sparse: what heads do to each other is measured there.

The first search takes heads one by one: it adds up what each would cost alone. With all of them sparse at once a head's error may
add to that of others or cancel it. Around the thresholds found, the KL is close to a quadratic function of all errors. Its
slope along every head's change of threshold is measured by one backward pass a sample (:mod:`xcalib.collect.slopes`), and
the head's own curvature is its layer's gain times the output error that the change makes. The knapsack is solved for
that model, and the step is taken if it lowers the KL of samples that had no say in it.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xcalib.choices import DEFAULT_ROUNDS
from xcalib.collect.chunks import HeadChunks
from xcalib.collect.gains import GainMeter
from xcalib.collect.shares import Advance, Arrays, Shares
from xcalib.collect.skipping import of_sample
from xcalib.collect.slopes import SlopeMeter
from xcalib.data import SampleSet
from xcalib.models.logits import LogitHead, sampled_positions
from xcalib.models.placement import input_device
from xcalib.profile import SearchRound
from xcalib.search.knapsack import knapsack, knapsack_min_cost
from xcalib.search.plan import Planned, Tables
from xcalib.search.targets import Target

__all__ = ["DEFAULT_ROUNDS", "Sequential"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Curvature is taken this much larger than measured, still larger after a step that was not taken, and less where no head would
# move. With 1 the first step is too long for SmolLM2, with 8 hardly a head moves (docs/objectives.md).
DAMPING, RAISED, EASED = 2.0, 2.5, 0.5
DOUBT = 2.0  # a slope counts in full only where it is well above this many of its standard errors
FOLDS = 8
TOLERANCE = 1.02  # of a KL that was asked for
ENOUGH = 0.01  # a step that lowers the KL by less is the last


@dataclass(frozen=True, eq=False)
class _State:
    """Levels ``(layers, heads)``, their cost and every sample's KL with them."""

    levels: IntArray
    cost: float
    kl: FloatArray


class Sequential:
    """Rounds of measuring and searching again, on the samples that the curves were measured on."""

    def __init__(
        self,
        model: Any,
        samples: SampleSet,
        tables: Tables,
        shares: Shares | None = None,
        chunks: HeadChunks | None = None,
    ) -> None:
        """Prepare; nothing is measured yet.

        Args:
            model: a transformers causal language model, in evaluation mode.
            samples: those of the curves.
            tables: of those curves.
            shares: where finished measurements are kept, so that an interrupted search goes on, what draws the work, and the
                ranks that share the samples; default none of these.
            chunks: heads that are measured at a time.
        """
        self._model = model
        self._samples = samples
        self._tables = tables
        self._curves = tables.curves
        self._shares = shares or Shares()
        self._chunks = chunks
        self._point = ""  # what is said to be worked on
        self._dense: dict[int, torch.Tensor] = {}

    def improve(self, target: Target, planned: Planned, rounds: int = DEFAULT_ROUNDS) -> Planned:
        """Take up to ``rounds`` steps from what the first search found.

        Args:
            target: a density, a speed-up or a KL; a drop of accuracy has no slope, so its plan is returned as it is.
            planned: thresholds on the curves' grid.
            rounds: steps tried at most.

        Returns:
            The plan with the thresholds of the last step that was taken, the KL predicted from measurements at them, and a record
            of every step.
        """
        if target.kind == "drop" or rounds < 1:
            return planned
        self._point = target.name
        levels = self._shares.ranks.same(self._levels_of(planned.thresholds))
        state = _State(levels, self._cost(levels), self._kl("as found", [levels] * self._count))
        optimism = planned.kl / max(state.kl.mean(), 1e-12)  # the curves' prediction is cross-validated
        slopes, damping, record = None, DAMPING, []
        for _ in range(rounds):
            if slopes is None:
                slopes = self._slopes(state.levels)
            step, expected = self._step(target, state, slopes, damping, optimism)
            step = self._shares.ranks.same(step)
            if np.array_equal(step, state.levels):
                damping *= EASED
                continue
            new = _State(step, self._cost(step), self._kl("after a step", [step] * self._count))
            folds = self._shares.ranks.same(np.stack(self._fold_levels(target, state, slopes, damping, optimism)))
            others = self._kl("on other samples", list(folds))
            taken = self._is_better(target, state, new, others, optimism)
            record.append(_round(expected, new, others, taken))
            if not taken:
                damping *= RAISED
                continue
            gain = 1 - new.kl.mean() / max(state.kl.mean(), 1e-12)
            optimism *= others.mean() / max(new.kl.mean(), 1e-12)
            state, slopes = new, None
            if target.kind != "kl" and gain < ENOUGH:
                break
        return self._planned(planned, state, optimism, tuple(record))

    @property
    def _count(self) -> int:
        return len(self._samples.samples)

    @cached_property
    def _meter(self) -> GainMeter:
        return GainMeter(self._model, self._curves.settings, self._tables.shape[1])

    @cached_property
    def _head(self) -> LogitHead:
        return LogitHead(self._model)

    @cached_property
    def _slope_meter(self) -> SlopeMeter:
        return SlopeMeter(self._model, self._curves.settings, self._curves.layers, self._chunks)

    def _levels_of(self, thresholds: FloatArray) -> IntArray:
        return np.abs(thresholds[..., None] - self._tables.grid).argmin(-1)

    def _cost(self, levels: IntArray) -> float:
        return float(np.take_along_axis(self._tables.cost, levels.reshape(-1, 1), axis=1).sum())

    def _planned(self, planned: Planned, state: _State, optimism: float, record: tuple[SearchRound, ...]) -> Planned:
        if not any(one.taken for one in record):
            return replace(planned, rounds=record)
        kl = float(optimism * state.kl.mean())
        # the bound was on the sum that the first search minimised
        return replace(
            planned,
            thresholds=self._tables.grid[state.levels],
            density=state.cost,
            kl=kl,
            bound=None,
            rounds=record,
        )

    def _local_loss(self, state: _State, slopes: FloatArray, damping: float) -> FloatArray:
        """Change of the KL when one head goes to each level, ``(layers, heads, levels)``, 0 at its own."""
        error = self._curves.relative_error
        own = state.levels[..., None]
        change = slopes - np.take_along_axis(slopes, own[None], axis=-1)  # (samples, layers, heads, levels)
        linear = change.mean(axis=0)
        if len(change) > 1:
            doubt = DOUBT * change.std(axis=0, ddof=1) / np.sqrt(len(change))
            square = linear**2
            linear = linear * square / np.maximum(square + doubt**2, 1e-300)
        # A block dropped more, or less, changes the output in a direction of its own: errors of two levels differ by its error.
        curvature = self._curves.gain[:, None, None] * np.abs(error - np.take_along_axis(error, own, axis=-1))
        return linear + damping * curvature

    def _step(
        self, target: Target, state: _State, slopes: FloatArray, damping: float, optimism: float
    ) -> tuple[IntArray, float]:
        """The levels that the local model takes, and the KL that it expects there on these samples."""
        local = self._local_loss(state, slopes, damping)
        floor = local.min(axis=-1, keepdims=True)
        loss = (local - floor).reshape(self._tables.cost.shape)  # the knapsack asks for losses of at least 0
        if target.kind == "kl":
            allowed = target.value / max(optimism, 1e-12) - state.kl.mean() - floor.sum()
            choice = knapsack_min_cost(self._tables.cost, loss, max(allowed, float(loss.min(axis=1).sum())))
        else:
            budget = target.value if target.kind == "density" else 1 / target.value
            choice = knapsack(self._tables.cost, loss, max(budget, state.cost))
        levels = choice.choice.reshape(state.levels.shape)
        change = np.take_along_axis(local, levels[..., None], axis=-1).sum()
        return levels, float(max(state.kl.mean() + change, 0.0))

    def _fold_levels(
        self, target: Target, state: _State, slopes: FloatArray, damping: float, optimism: float
    ) -> list[IntArray]:
        """For each sample the levels of the step that the other samples ask for; one sample has no others."""
        folds = np.arange(self._count) % min(FOLDS, self._count)
        if self._count == 1:
            return [self._step(target, state, slopes, damping, optimism)[0]]
        steps = {
            fold: self._step(target, state, slopes[folds != fold], damping, optimism)[0] for fold in np.unique(folds)
        }
        return [steps[fold] for fold in folds]

    def _is_better(self, target: Target, state: _State, new: _State, others: FloatArray, optimism: float) -> bool:
        """Whether the step lowers the KL, or saves blocks at the KL that was asked for, also where samples had no say in it."""
        worse = max(new.kl.mean(), others.mean())
        allowed = TOLERANCE * target.value / max(optimism, 1e-12) if target.kind == "kl" else 0.0
        if state.kl.mean() > allowed:
            return bool(worse < state.kl.mean())
        return bool(worse <= allowed and new.cost < state.cost)

    def _slopes(self, levels: IntArray) -> FloatArray:
        """fp64 ``(samples, layers, heads, levels)``."""

        def measure(index: int, advance: Advance) -> Arrays:
            found = self._slope_meter.measure(self._tokens(index), levels, self._dense_hidden(index))
            advance(1)
            return {"slope": found.slope}

        what = f"{self._point}: measuring what heads do to each other"
        return np.stack([unit["slope"] for unit in self._each(what, "slopes", [levels] * self._count, measure)])

    def _kl(self, what: str, levels: Sequence[IntArray]) -> FloatArray:
        """Every sample's mean KL at levels of its own, fp64 ``(samples,)``."""

        def measure(index: int, advance: Advance) -> Arrays:
            dense = self._dense_hidden(index).numpy()
            thresholds = self._tables.grid[levels[index]][None]
            kl = self._meter.together(self._tokens(index), self._curves.layers, thresholds, dense, advance)
            return {"kl": kl}

        what = f"{self._point}: measuring the KL {what}"
        return np.array([float(unit["kl"][0]) for unit in self._each(what, "kl", levels, measure)])

    def _tokens(self, index: int) -> torch.Tensor:
        return torch.tensor(self._samples.samples[index].tokens, device=input_device(self._model))

    def _dense_hidden(self, index: int) -> torch.Tensor:
        """The dense model's last hidden states at the compared positions, ``(positions, hidden)``; kept."""
        if index not in self._dense:
            hidden = self._head.prefill(self._tokens(index)).hidden
            self._dense[index] = hidden[sampled_positions(self._curves.settings.gain_every)].float().cpu().clone()
        return self._dense[index]

    def _each(
        self, what: str, kind: str, levels: Sequence[IntArray], measure: Callable[[int, Advance], Arrays]
    ) -> Iterator[Arrays]:
        """What is measured of every sample at levels of its own; the levels' digest names the units."""

        def one(index: int, advance: Advance) -> Arrays:
            with of_sample(index):
                return measure(index, advance)

        digests = [hashlib.sha256(np.ascontiguousarray(own, dtype="<i8").tobytes()).hexdigest()[:16] for own in levels]
        names = [f"{kind}-{digest}-{index:05d}" for index, digest in enumerate(digests)]
        return self._shares.each(what, names, one, [1] * self._count)


def _round(expected: float, new: _State, others: FloatArray, taken: bool) -> SearchRound:
    return SearchRound(
        expected=expected,
        measured=float(new.kl.mean()),
        others=float(others.mean()),
        density=min(new.cost, 1.0),
        taken=taken,
    )
