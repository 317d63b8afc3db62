"""What each table compares, and one way of choosing blocks as it is measured."""

import hashlib
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from xcalib.ablate.paper import PAPER
from xcalib.choices import ABLATIONS
from xcalib.errors import AblationError
from xcalib.kernels.api import STRIDES, Order, Pattern, Policy

__all__ = ["MEASURED", "TABLES", "Scoring", "Setting", "Variant", "check_tables", "variants_of"]

TABLES = ABLATIONS
MEASURED = tuple(PAPER)
PATTERN_STRIDES = (8, 16)


@dataclass(frozen=True)
class Scoring:
    """How blocks are scored, by what they are selected, and in which order of preference."""

    stride: int
    pattern: Pattern = "antidiagonal"
    policy: Policy = "threshold"
    order: Order = "score"

    @property
    def key(self) -> str:
        return f"{self.pattern}-{self.stride}-{self.policy}-{self.order}"


@dataclass(frozen=True)
class Variant:
    """One line of a table.

    Attributes:
        name: unique in the table.
        scoring: how it scores and selects.
        figure: its name among the paper's figures, "" for what the paper does not have.
        group: only variants of one group are compared.
        baseline: whether the others of its group are set against it.
        thresholds: where its limits come from: ``one`` value for all heads, or a search (``paper``, ``knapsack``).
    """

    name: str
    scoring: Scoring
    figure: str = ""
    group: str = ""
    baseline: bool = False
    thresholds: str = "one"


@dataclass(frozen=True, eq=False)
class Setting:
    """A way of choosing blocks with everything decided: ``limits`` is fp32 ``(layers, query heads)``, by policy."""

    scoring: Scoring
    limits: npt.NDArray[np.float32]

    @property
    def key(self) -> str:
        """Names the setting: equal for tables that share it."""
        digest = hashlib.sha256(f"{self.scoring.key} {self.limits.shape}".encode())
        digest.update(np.ascontiguousarray(self.limits, dtype="<f4").tobytes())
        return digest.hexdigest()[:20]

    @property
    def limit(self) -> float | None:
        """The value that all heads share, None where they differ."""
        first = float(self.limits.flat[0])
        return first if bool((self.limits == self.limits.flat[0]).all()) else None


def check_tables(names: tuple[str, ...]) -> None:
    """Raise AblationError unless every name is a table's."""
    for name in names:
        if name not in TABLES:
            raise AblationError(f"table {name!r} is unknown, expected one of {', '.join(TABLES)} or all")


def variants_of(table: str, stride: int, searched: Order = "score") -> tuple[Variant, ...]:
    """The lines of a measured table.

    ``stride`` is that of the tables that do not vary it, ``searched`` the order of the curves that the table ``threshold`` is
    solved on: all its lines have that, so that only the thresholds differ. The other tables have the paper's order.
    """
    if table == "pattern":
        return tuple(
            Variant(
                f"{pattern} S={size}",
                Scoring(size, pattern),
                pattern if pattern in PAPER["pattern"].figures else "",
                f"S={size}",
                pattern == "antidiagonal",
            )
            for size in PATTERN_STRIDES
            for pattern in get_args(Pattern)
        )
    if table == "stride":
        known = PAPER["stride"].figures
        names = {size: f"S={size}" for size in STRIDES}
        return tuple(
            Variant(name, Scoring(size), name if name in known else "", "", size == 8) for size, name in names.items()
        )
    if table == "selection":
        policies: tuple[Policy, ...] = ("threshold", "top-k", "ratio")
        return tuple(
            Variant(policy, Scoring(stride, policy=policy), policy, "", policy == "threshold") for policy in policies
        )
    scoring = Scoring(stride, order=searched)
    return (
        Variant("single tau", scoring, "single tau", "", baseline=True),
        Variant("published DP", scoring, "published DP", "", thresholds="paper"),
        Variant("ours", scoring, "", "", thresholds="knapsack"),
    )
