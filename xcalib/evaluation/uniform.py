"""The single tau that a profile has to beat: interpolated between measured ones at the profile's own density."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from xcalib.errors import DataError
from xcalib.evaluation.results import Evaluation

__all__ = ["PUBLISHED", "PUBLISHED_RULE", "UNIFORM", "UniformPoint", "uniform_at"]

# What the names of single taus begin with: those by the profile's own rule, and those by the published one.
UNIFORM = "tau="
PUBLISHED = "published tau="
PUBLISHED_RULE: dict[str, Any] = {"pattern": "antidiagonal", "order": "score"}


@dataclass(frozen=True)
class UniformPoint:
    """A single tau at a density, with the KL (nats per token) that it would have there."""

    tau: float
    density: float
    kl: float


def uniform_at(evaluation: Evaluation, density: float, prefix: str = UNIFORM) -> UniformPoint:
    """Interpolate the measured single taus whose names begin with ``prefix`` at ``density``: log KL and tau, linear in density.

    Raises:
        DataError: fewer than two single taus were measured, or their densities do not enclose ``density``.
    """
    rows = sorted(
        (plan.density, float(plan.name.removeprefix(prefix)), plan.kl)
        for plan in evaluation.plans
        if plan.name.startswith(prefix)
    )
    if len(rows) < 2 or not rows[0][0] <= density <= rows[-1][0]:
        measured = ", ".join(f"{row[0]:.3f}" for row in rows) or "none"
        raise DataError(
            f"density {density:.3f} is not between those of the measured single taus ({measured}): measure more"
        )
    densities, taus, kls = (np.array(column) for column in zip(*rows, strict=True))
    log_kl = np.interp(density, densities, np.log(np.maximum(kls, 1e-12)))
    return UniformPoint(float(np.interp(density, densities, taus)), density, float(np.exp(log_kl)))
