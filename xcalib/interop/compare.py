"""Two profiles of one model, side by side."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xcalib import _yaml
from xcalib.errors import ProfileError
from xcalib.profile import SHAPE, OperatingPoint, Profile

__all__ = ["MovedHead", "PointDifference", "ProfileDifference", "compare_profiles"]

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class MovedHead:
    """A head of another threshold: layer and query head from 0, key lengths in tokens (the end exclusive, None open)."""

    layer: int
    head: int
    min_length: int
    max_length: int | None
    before: float
    after: float


@dataclass(frozen=True)
class PointDifference:
    """One operating point of A against one of B.

    Attributes:
        names: of the point in A and in B.
        measures: ``(what, A, B)`` with densities in [0, 1] and KL in nats per token, None where not known.
        heads: heads that were compared, once for each range of key lengths that both serve.
        moved: those whose thresholds differ, the largest change first.
    """

    names: tuple[str, str]
    measures: tuple[tuple[str, float | None, float | None], ...]
    heads: int
    moved: tuple[MovedHead, ...]

    @property
    def mean_change(self) -> float:
        """Mean of after - before over all heads that were compared."""
        return sum(head.after - head.before for head in self.moved) / max(1, self.heads)


@dataclass(frozen=True)
class ProfileDifference:
    """All that differs: whether nothing does, other settings as ``(key, A, B)``, and the points that were compared."""

    identical: bool
    settings: tuple[tuple[str, Any, Any], ...]
    points: tuple[PointDifference, ...]


def compare_profiles(first: Profile, second: Profile, point: str | None = None) -> ProfileDifference:
    """What changed from one profile to another of the same model.

    Args:
        first: A, before.
        second: B, after.
        point: the operating point to compare, ``"NAME"`` or ``"NAME_IN_A:NAME_IN_B"``; None for all that have a namesake, and
            the two default points where none has.

    Raises:
        ProfileError: they are of different models, or a point is not there.
    """
    for field in (*SHAPE, "config_sha256"):
        ours, theirs = getattr(first.model, field), getattr(second.model, field)
        if ours != theirs:
            raise ProfileError(
                f"profiles of different models cannot be compared: {field} is {_yaml.quote(ours)} in A ({first.model.name}) "
                f"and {_yaml.quote(theirs)} in B ({second.model.name})"
            )
    pairs = _pairs(first, second, point)
    return ProfileDifference(
        identical=first.content_sha256 == second.content_sha256,
        settings=(*_settings(first, second), *_point_settings(pairs)),
        points=tuple(_compare_points(first, second, a, b) for a, b in pairs),
    )


def _pairs(first: Profile, second: Profile, point: str | None) -> list[tuple[OperatingPoint, OperatingPoint]]:
    if point is not None:
        name_a, colon, name_b = point.partition(":")
        return [(_point(first, name_a, "A"), _point(second, name_b if colon else name_a, "B"))]
    theirs = {item.name: item for item in second.points}
    shared = [(item, theirs[item.name]) for item in first.points if item.name in theirs]
    return shared or [(first.point(), second.point())]


def _point(profile: Profile, name: str, side: str) -> OperatingPoint:
    try:
        return profile.point(name)
    except ProfileError as error:
        raise ProfileError(f"{side}: {error}") from None


def _compare_points(first: Profile, second: Profile, a: OperatingPoint, b: OperatingPoint) -> PointDifference:
    moved: list[MovedHead] = []
    heads = 0
    for start, end, before, after in _shared_ranges(first, second, a, b):
        for layer, rows in enumerate(zip(before, after, strict=True)):
            heads += len(rows[0])
            moved += [
                MovedHead(layer, head, start, end, x, y)
                for head, (x, y) in enumerate(zip(*rows, strict=True))
                if x != y
            ]
    moved.sort(key=lambda item: (-abs(item.after - item.before), item.min_length, item.layer, item.head))
    return PointDifference((a.name, b.name), tuple(_measures(a, b)), heads, tuple(moved))


def _shared_ranges(
    first: Profile, second: Profile, a: OperatingPoint, b: OperatingPoint
) -> Iterator[tuple[int, int | None, Rows, Rows]]:
    for bin_a, rows_a in zip(first.length_bins, a.thresholds, strict=True):
        for bin_b, rows_b in zip(second.length_bins, b.thresholds, strict=True):
            start = max(bin_a.min_length, bin_b.min_length)
            ends = [end for end in (bin_a.max_length, bin_b.max_length) if end is not None]
            if not ends or start < min(ends):
                yield start, min(ends) if ends else None, rows_a, rows_b


def _measures(a: OperatingPoint, b: OperatingPoint) -> Iterator[tuple[str, float | None, float | None]]:
    for kind in ("predicted", "heldout"):
        for what in ("density", "kl"):
            yield f"{kind} {what}", getattr(getattr(a, kind), what, None), getattr(getattr(b, kind), what, None)
        before, after = ({_span(part): part for part in _by_length(point, kind)} for point in (a, b))
        for span in before:
            if span in after:  # bins of other ends hold other samples
                for what in ("density", "kl"):
                    yield f"{kind} {what}, {span}", getattr(before[span], what), getattr(after[span], what)


def _by_length(point: OperatingPoint, kind: str) -> tuple[Any, ...]:
    return getattr(getattr(point, kind), "by_length", None) or ()


def _span(part: Any) -> str:
    return f"{part.min_length:,} " + (
        "keys and more" if part.max_length is None else f"to {part.max_length - 1:,} keys"
    )


def _settings(first: Profile, second: Profile) -> Iterator[tuple[str, Any, Any]]:
    ours, theirs = first.model_dump(mode="json"), second.model_dump(mode="json")
    for profile, data in ((first, ours), (second, theirs)):
        data["method"]["order"] = profile.method.order  # not written while it is the paper's
    for group in ("model", "method", "calibration", "versions"):
        for key in dict.fromkeys([*ours[group], *theirs[group]]):
            if ours[group].get(key) != theirs[group].get(key):
                yield f"{group}.{key}", ours[group].get(key), theirs[group].get(key)
    recipes = ours.get("recipe") or {}, theirs.get("recipe") or {}
    for key in dict.fromkeys([*recipes[0], *recipes[1]]) if all(recipes) else ():
        if recipes[0].get(key) != recipes[1].get(key):
            yield f"recipe.{key}", recipes[0].get(key), recipes[1].get(key)
    for key in ("dense_layers", "length_bins", "default_point"):
        if ours[key] != theirs[key]:
            yield key, ours[key], theirs[key]
    names: list[Any] = [[item["name"] for item in data["points"]] for data in (ours, theirs)]
    if names[0] != names[1]:
        yield "points", *names


def _point_settings(pairs: list[tuple[OperatingPoint, OperatingPoint]]) -> Iterator[tuple[str, Any, Any]]:
    for a, b in pairs:
        for key in ("target", "objective", "method", "verified"):
            if getattr(a, key) != getattr(b, key):
                yield f"{a.name}.{key}", getattr(a, key), getattr(b, key)
        for key, ours, theirs in (("rounds", _rounds(a), _rounds(b)), ("refined", _refined(a), _refined(b))):
            if ours != theirs:
                yield f"{a.name}.{key}", ours, theirs


def _rounds(point: OperatingPoint) -> str | None:
    """How often the point was searched again, over all length bins."""
    if point.rounds is None:
        return None
    tried = [one for length_bin in point.rounds for one in length_bin]
    return f"{sum(one.taken for one in tried)} of {len(tried)} taken"


def _refined(point: OperatingPoint) -> str | None:
    """By how many trials each length bin was refined."""
    if point.refined is None:
        return None
    return ", ".join("not" if one is None else f"by {one.trials} trials" for one in point.refined)
