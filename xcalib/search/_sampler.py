"""What the next trial tries."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

__all__ = ["DRAW", "MERIT", "RETRY", "ShiftSampler", "is_start"]

MERIT = "merit"  # user attribute of a trial: see Comparison.merit
DRAW = "draw"  # user attribute of a trial: number of its proposal, which seeds it
RETRY = "retry of trial"  # user attribute of a trial: number of the one that failed
RETRY_POLLS = 30
PAIRS_PER_MINIMUM = 4
STEP = 0.25  # of the pairs, in root mean square over the dimensions and as a share of the range
FloatArray = npt.NDArray[np.float64]


def is_start(trial: FrozenTrial, dimensions: int) -> bool:
    """Whether the trial measures the point that is refined: all shifts 0."""
    return len(trial.params) == dimensions and not any(trial.params.values())


class ShiftSampler(BaseSampler):
    """The start, pairs of opposite shifts around it, the minimum that these suggest, then multivariate TPE.

    The directions of the pairs are orthogonal. Near the start the merit along each is about a parabola, through the start and
    the two of the pair; after every few pairs one trial goes to where all parabolas so far are lowest, no further away than a
    pair. TPE, which knows no slopes, goes on from there.

    Proposals are numbered; a trial takes the lowest number (``draw``) that no other trial has, those that failed aside, and a
    trial that retries a failed one has its number. A proposal depends on the seed, its number and the trials before it, never on
    the process: a study that was killed and resumed by one worker gives the same trials as one that was not, and no two of
    several workers draw with the same seed.
    """

    def __init__(self, space: Mapping[str, BaseDistribution], seed: int) -> None:
        self._space = dict(space)
        self._seed = seed
        size = len(self._space)
        reach = np.array([distribution.high for distribution in self._space.values()])  # type: ignore[attr-defined]
        rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
        self._reach = reach
        # (directions, dimensions); no entry reaches the end of its range
        steps = rotation.T * np.sqrt(size) * STEP
        self._steps = reach * steps / np.maximum(1.0, np.abs(steps).max(axis=1, keepdims=True))
        # of each draw after the start: direction and sign of a step, or None for the minimum
        self._plan: list[tuple[int, int] | None] = []
        for direction in range(len(self._steps)):
            self._plan += [(direction, 1), (direction, -1)]
            if direction % PAIRS_PER_MINIMUM == PAIRS_PER_MINIMUM - 1 or direction == len(self._steps) - 1:
                self._plan.append(None)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All dimensions, always."""
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A value for every dimension."""
        draw = trial.user_attrs.get(DRAW)
        if draw is None:
            draw = _claim(study, trial)
        if draw == 0:
            return dict.fromkeys(self._space, 0.0)
        before = [t for t in _others(study, trial) if t.number < trial.number]
        planned = self._planned(draw, before)
        if planned is not None:
            return dict(zip(self._space, planned.tolist(), strict=True))
        state = int(np.random.SeedSequence([self._seed, draw]).generate_state(1)[0])
        tpe = TPESampler(multivariate=True, n_startup_trials=1, seed=state)
        found = tpe.sample_relative(study, trial, tpe.infer_relative_search_space(study, trial))
        # many workers began at once, and nothing is finished yet
        random = np.random.default_rng([self._seed, draw]).normal(0, STEP, len(self._space)).clip(-1, 1) * self._reach
        return found or dict(zip(self._space, random.tolist(), strict=True))

    def _planned(self, draw: int, before: list[FrozenTrial]) -> FloatArray | None:
        if not 1 <= draw <= len(self._plan):
            return None
        step = self._plan[draw - 1]
        if step is None:
            return self._minimum(before)
        direction, sign = step
        shifts: FloatArray = sign * self._steps[direction]
        return shifts

    def _minimum(self, before: list[FrozenTrial]) -> FloatArray | None:
        """Where the parabolas of the finished pairs are lowest; None where no pair is finished."""
        merits = {
            _key([trial.params[name] for name in self._space]): float(trial.user_attrs[MERIT])
            for trial in before
            if MERIT in trial.user_attrs and trial.state.is_finished()
        }
        shifts, pairs = np.zeros(len(self._space)), 0
        for step in self._steps:
            plus, minus = merits.get(_key(step)), merits.get(_key(-step))
            if plus is not None and minus is not None:
                slope, bend = (plus - minus) / 2, (plus + minus) / 2
                along = -slope / (2 * bend) if bend > 0 else -np.sign(slope)
                shifts += np.clip(along, -1, 1) * step
                pairs += 1
        # No further than the pairs went: what is known along each direction says little about all of them at once.
        length, measured = (float(np.linalg.norm(one / self._reach)) for one in (shifts, self._steps[0]))
        return shifts * min(1.0, measured / max(length, 1e-12)) if pairs else None

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never asked for."""
        raise NotImplementedError("all dimensions are sampled together")


def _others(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    """All other trials that have not failed."""
    trials = study.get_trials(deepcopy=False)
    return [other for other in trials if other.number != trial.number and other.state != TrialState.FAIL]


def _claim(study: Study, trial: FrozenTrial) -> int:
    """Take the lowest number that nobody has, and write it into the trial."""
    while True:
        _await_retries(study)
        others = _others(study, trial)
        taken = {other.user_attrs[DRAW] for other in others if DRAW in other.user_attrs}
        free = (number for number in range(len(others) + len(taken) + 1) if number not in taken)
        # trials before this one that have no number yet are about to take theirs, or their worker died
        waiting = sum(DRAW not in other.user_attrs and other.number < trial.number for other in others)
        draw = [next(free) for _ in range(waiting + 1)][-1]
        study._storage.set_trial_user_attr(trial._trial_id, DRAW, draw)
        rivals = _rivals(study, trial, draw)
        if rivals and min(rivals) > trial.number:  # it draws again, unless it looked before this one wrote
            time.sleep(0.1)
            rivals = _rivals(study, trial, draw)
        if not rivals:
            return draw


def _await_retries(study: Study) -> None:
    """Wait for trials that another worker has just failed and is about to queue again, with their numbers.

    Not for long: a worker killed between the two leaves the number to whoever takes it.
    """
    for _ in range(RETRY_POLLS):
        trials = study.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get(RETRY) for trial in trials}
        held = {trial.user_attrs.get(DRAW) for trial in trials if trial.state != TrialState.FAIL}
        if not any(
            trial.state == TrialState.FAIL
            and (trial.params or trial.system_attrs.get("fixed_params"))
            and trial.number not in retried
            and trial.user_attrs.get(DRAW) not in held
            for trial in trials
        ):
            return
        time.sleep(0.1)


def _rivals(study: Study, trial: FrozenTrial, draw: int) -> list[int]:
    """Others with the same number: a trial failed between two workers' looks."""
    return [other.number for other in _others(study, trial) if other.user_attrs.get(DRAW) == draw]


def _key(shifts: npt.ArrayLike) -> tuple[float, ...]:
    """The same for the same direction on another machine, whose last digits may differ."""
    return tuple(float(shift) for shift in np.round(np.asarray(shifts, dtype=np.float64), 9))
