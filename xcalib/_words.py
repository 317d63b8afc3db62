"""Words about a profile's record that the terminal and the report share; imports nothing heavy."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xcalib.profile import OperatingPoint

__all__ = ["how_found"]


def how_found(point: "OperatingPoint") -> list[str]:
    """How a point's thresholds were found, in parts to be joined: method and objective, rounds, refinement."""
    if point.method == "imported":
        return ["imported from another tool, not searched"]
    parts = [f"by {point.method}, least {point.objective}"]
    if rounds := [one for length_bin in point.rounds or () for one in length_bin]:
        parts.append(f"{sum(one.taken for one in rounds)} of {len(rounds)} rounds taken")
    if trials := [one.trials for one in point.refined or () if one]:
        parts.append(f"refined by {' + '.join(map(str, trials))} trial{'' if sum(trials) == 1 else 's'}")
    return parts
