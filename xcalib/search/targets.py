"""What a user asks of a profile: ``density=0.25``, ``kl=0.01``, ``drop=1%``, ``speedup=4``."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from xcalib.choices import TargetKind
from xcalib.errors import TargetError

__all__ = ["DEFAULT_TARGETS", "Target", "parse_target", "parse_targets"]

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}\Z")
_ALLOWED = {
    "density": "a number above 0 and at most 1, as density=0.25",
    "kl": "nats per token above 0, as kl=0.01",
    "drop": "a share of the dense accuracy from 0 to 100%, as drop=1%",
    "speedup": "a factor of at least 1, as speedup=4",
}


@dataclass(frozen=True)
class Target:
    """One operating point to find.

    Attributes:
        name: of the operating point.
        kind: what is bounded.
        value: density as a share, KL in nats per token, accuracy drop as a share of the dense accuracy, speed-up as a factor.
        offered: nobody asked for it: it is left out, with a warning, where it cannot be reached, or held-out data refute it.
    """

    name: str
    kind: TargetKind
    value: float
    offered: bool = False

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"

    def scaled(self, name: str, factor: float) -> "Target":
        """A target ``factor`` times as generous in blocks (below 1: faster, further from dense), which nobody asked for."""
        if self.kind == "density":
            return Target(name, self.kind, _rounded(min(1.0, self.value * factor)), offered=True)
        if self.kind == "speedup":
            return Target(name, self.kind, _rounded(max(1.0, self.value / factor)), offered=True)
        # Errors fall about as the fourth power of the blocks between the densities that are of use.
        most = 1.0 if self.kind == "drop" else math.inf
        return Target(name, self.kind, _rounded(min(self.value / factor**4, most)), offered=True)


def _rounded(value: float) -> float:
    """Three digits: people read it."""
    return float(f"{value:.3g}")


DEFAULT_TARGETS = (
    Target("fidelity", "density", 0.45),
    Target("balanced", "density", 0.33),
    Target("fast", "density", 0.22, offered=True),
)
SPREAD = {"fidelity": 1.5, "fast": 2 / 3}


def parse_target(text: str, name: str = "balanced") -> Target:
    """Read ``[NAME:]KIND=VALUE``.

    Raises:
        TargetError: it is malformed; the message says what is allowed.
    """
    head, colon, rest = text.partition(":")
    if colon:
        name, text = head, rest
    kind, equals, number = text.partition("=")
    if not _NAME.match(name):
        raise TargetError(
            f"target name {name!r}: expected lower-case letters, digits, '-' and '_', as fast:density=0.2"
        )
    if not equals or kind not in get_args(TargetKind):
        raise TargetError(f"target {text!r}: expected density=, kl=, drop= or speedup= and a number, as density=0.25")
    percent = number.endswith("%")
    try:
        value = float(number.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        raise TargetError(f"target {text!r}: {number!r} is no number; expected {_ALLOWED[kind]}") from None
    upper = 1.0 if kind in ("density", "drop") else math.inf
    lower_ok = value >= (1 if kind == "speedup" else 0) and (kind in ("drop", "speedup") or value > 0)
    if not (math.isfinite(value) and lower_ok and value <= upper):
        share = f"; {value:g} % is {kind}={value / 100:g}" if upper == 1 and 1 < value <= 100 else ""
        raise TargetError(f"target {text!r}: expected {_ALLOWED[kind]}{share}")
    return Target(name, kind, value)  # type: ignore[arg-type]


def parse_targets(texts: Sequence[str]) -> tuple[Target, ...]:
    """The operating points to find: the three default ones, those around one unnamed target, or exactly the named ones.

    Raises:
        TargetError: one is malformed, or two have one name.
    """
    if not texts:
        return DEFAULT_TARGETS
    if len(texts) == 1 and ":" not in texts[0]:
        balanced = parse_target(texts[0])
        return (
            balanced.scaled("fidelity", SPREAD["fidelity"]),
            balanced,
            balanced.scaled("fast", SPREAD["fast"]),
        )
    targets = tuple(parse_target(text, name=f"point{number}") for number, text in enumerate(texts, start=1))
    names = [target.name for target in targets]
    if len(set(names)) != len(names):
        raise TargetError(
            f"two targets are named {next(n for n in names if names.count(n) > 1)!r}: give each a name of its own"
        )
    return targets
