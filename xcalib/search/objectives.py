"""What a search minimises the sum of, and which curves it can be read off."""

from dataclasses import replace
from typing import get_args

import numpy as np

from xcalib.choices import Objective
from xcalib.collect.allocate import TEMPER
from xcalib.collect.curves import CollectSettings, Curves, Measure
from xcalib.errors import TargetError

__all__ = ["OBJECTIVE_NAMES", "Objective", "losses", "measuring", "require_measured"]

OBJECTIVE_NAMES: dict[Objective, str] = {
    "tempered": "(gain x output error)^0.75",
    "gain": "gain x output error",
    "plain": "output error",
    "fisher": "Fisher-weighted output error",
    "mass": "attention mass left out",
}


def losses(curves: Curves, objective: Objective) -> np.ndarray:
    """What each head adds to the sum at each level: fp64 ``(layers, heads, levels)``.

    ``gain`` is gain x output error, ``tempered`` that to the power of 0.75, which trusts the largest and noisiest measurements
    less, ``plain`` the output error alone, ``fisher`` the Fisher-weighted output error (:mod:`xcalib.collect.fisher`) and
    ``mass`` the attention probability outside the kept blocks.

    Raises:
        TargetError: the curves were measured without what the objective needs.
    """
    require_measured(curves, objective)
    error = curves.relative_error
    kl = curves.gain[:, None, None] * error
    always = {"gain": kl, "tempered": kl**TEMPER, "plain": error}
    return {**always, "fisher": curves.fisher_kl, "mass": curves.dropped_mass}[objective]


def require_measured(curves: Curves, objective: Objective) -> None:
    """Raise TargetError if the curves were measured without what the objective needs."""
    if objective in get_args(Measure) and getattr(curves, objective) is None:
        raise TargetError(
            f"--objective {objective} needs curves measured with it: collect again with --measure {objective}"
        )


def measuring(settings: CollectSettings, objective: Objective) -> CollectSettings:
    """The settings, with what the objective needs among the measures."""
    needed = {measure for measure in get_args(Measure) if measure == objective}
    return replace(settings, measures=tuple(sorted(needed.union(settings.measures))))
