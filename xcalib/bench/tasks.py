"""A single measurement, by name."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        length: queries and keys.
        kind: dense, scoring, selection, attention, whole, sweep, sparse (a peer on our mask), choose (scoring and selection in
            one call), public (the same by the public implementation) or served (what a served model runs at that length).
        peer: whose kernel; empty for ours.
        stride: where blocks are scored.
        density: of the mask that is wanted.
        tau: one threshold for all heads instead of a density.
        precision: of the scores where both are measured, native or fp8.
    """

    length: int
    kind: str
    peer: str = ""
    stride: int | None = None
    density: float | None = None
    tau: float | None = None
    precision: str = ""

    def __str__(self) -> str:
        parts = [f"{self.kind} {self.peer}".strip(), f"at {self.length}"]
        parts += [f"S={self.stride}"] if self.stride else []
        parts += [f"density {self.density:g}"] if self.density is not None else []
        parts += [f"tau {self.tau:g}"] if self.tau is not None else []
        parts += [self.precision] if self.precision else []
        return " ".join(parts)

    def settings(self) -> dict[str, Any]:
        """JSON values of what is set."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}
