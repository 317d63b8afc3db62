"""The ship gate: does an operating point meet its target on data that the search never saw?

The rule is stated in docs/search.md. It needs nothing but the profile, so anyone can check it again on a file.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from xcalib.errors import TargetError, TargetMissedError, XcalibWarning
from xcalib.profile import Evidence, LengthBin, LengthEvidence, OperatingPoint, Profile, make_profile
from xcalib.search.targets import Target, parse_target

__all__ = ["DENSITY_TOLERANCE", "DROP_LIMIT", "KL_LIMIT", "Outcome", "Verdict", "enforce", "judge", "missed"]

DENSITY_TOLERANCE = 1.1  # times the density asked for: other text keeps a few more blocks at the same thresholds
KL_LIMIT = 1.5  # times the KL asked for: beyond it a wide interval is no excuse
DROP_LIMIT = 0.05  # above the drop asked for, as a share of the dense accuracy: the same
_ROUNDING = 1 + 1e-9

Outcome = Literal["met", "uncertain", "missed", "unmeasured"]


@dataclass(frozen=True)
class Verdict:
    """What held-out data say about one operating point.

    Attributes:
        point: its name.
        outcome: ``met``; ``uncertain`` (above the target, by less than the samples can tell); ``missed``; ``unmeasured``.
        text: one line with the target, the measured figure and its interval.
    """

    point: str
    outcome: Outcome
    text: str

    @property
    def verified(self) -> bool:
        """What the profile records: held-out figures are there and do not miss the target."""
        return self.outcome in ("met", "uncertain")


@dataclass(frozen=True)
class _Figure:
    """A measured figure against what was asked.

    Attributes:
        value: measured.
        target: asked.
        limit: the most that still meets the target.
        most: the most that the interval may excuse.
        interval: lower and upper end, None without one.
        text: the value with its unit and by how much it is above the target.
        ends: the interval in words.
    """

    value: float
    target: float
    limit: float
    most: float
    interval: tuple[float, float] | None
    text: str
    ends: str

    @property
    def sampled(self) -> bool:
        """Whether the figure differs much from sample to sample; a density has a tolerance instead of an interval."""
        return self.most > self.limit

    @property
    def outcome(self) -> Outcome:
        if self.value <= self.limit * _ROUNDING:
            return "met"
        if self.interval is None or self.interval[0] > self.limit * _ROUNDING or self.value > self.most * _ROUNDING:
            return "missed"
        return "uncertain"


_SEVERITY: tuple[Outcome, ...] = ("met", "uncertain", "missed")
_WORDS = {"met": "met", "uncertain": "not refuted", "missed": "missed"}


def judge(point: OperatingPoint) -> Verdict:
    """Hold a point's held-out figures against its target, over all lengths and in each length bin: the worst counts."""
    said = f"{point.name}: {point.target}"
    try:
        target = parse_target(point.target, point.name)
    except TargetError:
        return Verdict(point.name, "unmeasured", f"{said}: not verified: no target of a search")
    if point.heldout is None:
        return Verdict(point.name, "unmeasured", f"{said}: not verified: there are no held-out figures")
    figure = _figure(target, point.heldout)
    if figure is None:
        reason = "no held-out sample asks a question that the dense model answers"
        return Verdict(point.name, "unmeasured", f"{said}: not verified: {reason}")
    parts = list(_in_bins(target, point))
    outcome = max([figure.outcome, *(one for one, _ in parts)], key=_SEVERITY.index)
    texts = [text for one, text in parts if one == outcome]
    if figure.outcome == outcome:  # bins are named where they differ
        texts = [_told(figure), *(texts if outcome != "met" and len(texts) < len(parts) else [])]
    return Verdict(point.name, outcome, f"{said} {'; '.join(texts)}")


def _told(figure: _Figure, where: str = "", *, too_few: bool = False) -> str:
    """What was measured and what follows; ``too_few`` samples excuse a figure above the target."""
    word = _WORDS["uncertain" if too_few else figure.outcome]
    text = f"{word} on held-out data{where}: measured {figure.text}{figure.ends}"
    if too_few:
        return f"{text}, too few to tell: more held-out samples would"
    if figure.outcome == "uncertain":
        text += ", which reaches the target: more held-out samples would tell"
    if figure.outcome == "missed" and figure.interval and figure.interval[0] <= figure.limit:
        text += ", too far above for an interval to excuse"
    return text


def _in_bins(target: Target, point: OperatingPoint) -> Iterator[tuple[Outcome, str]]:
    """Outcome and text of each length bin, where the evidence parts them."""
    if point.heldout is None or point.heldout.by_length is None:
        return
    measured = {(part.min_length, part.max_length): part for part in point.heldout.by_length}
    expected = point.predicted.by_length if point.predicted else None
    for part in expected or point.heldout.by_length:
        where = f" at {_keys(part)}"
        evidence = measured.get((part.min_length, part.max_length))
        figure = None if evidence is None else _figure(target, evidence)
        if figure is None:
            lacking = "is that long" if evidence is None else "there asks a question that the dense model answers"
            yield "uncertain", f"not refuted on held-out data{where}: no sample {lacking}"
        elif figure.outcome == "missed" and figure.sampled and figure.interval is None:
            yield "uncertain", _told(figure, where, too_few=True)
        else:
            yield figure.outcome, _told(figure, where)


def _keys(part: LengthBin) -> str:
    return f"{part.min_length:,} to {part.max_length - 1:,} keys" if part.max_length else f"{part.min_length:,} keys on"


def _figure(target: Target, heldout: Evidence | LengthEvidence) -> _Figure | None:
    if target.kind == "kl":
        return _kl(target, heldout)
    if target.kind == "drop":
        return _drop(target, heldout)
    asked = target.value if target.kind == "density" else 1 / target.value
    limit = min(1.0, asked * DENSITY_TOLERANCE)
    over = f", {_above(heldout.density, asked)} where {DENSITY_TOLERANCE - 1:.0%} is allowed"
    speedup = f" (a speed-up of {1 / heldout.density:.2f} by blocks)" if target.kind == "speedup" else ""
    text = f"density {heldout.density:.3f}{speedup}{over if heldout.density > asked * _ROUNDING else ''}"
    return _Figure(heldout.density, asked, limit, limit, None, text, f" ({_count(heldout.samples)})")


def _kl(target: Target, heldout: Evidence | LengthEvidence) -> _Figure:
    interval = None if heldout.intervals is None else heldout.intervals.kl
    over = f", {_above(heldout.kl, target.value)}" if heldout.kl > target.value * _ROUNDING else ""
    ends = _ends(heldout, interval and f"{interval[0]:.4g} to {interval[1]:.4g}")
    return _Figure(
        value=heldout.kl,
        target=target.value,
        limit=target.value,
        most=target.value * KL_LIMIT,
        interval=interval,
        text=f"{heldout.kl:.4g} nats per token{over}",
        ends=ends,
    )


def _drop(target: Target, heldout: Evidence | LengthEvidence) -> _Figure | None:
    if heldout.accuracy is None or not heldout.accuracy_dense:
        return None
    value = 1 - heldout.accuracy / heldout.accuracy_dense
    interval = None if heldout.intervals is None else heldout.intervals.drop
    over = f", {100 * (value - target.value):.1f} points above" if value > target.value * _ROUNDING else ""
    ends = _ends(heldout, interval and f"{interval[0]:.1%} to {interval[1]:.1%}")
    text = f"{value:.1%} of the dense model's accuracy{over}"
    return _Figure(value, target.value, target.value, target.value + DROP_LIMIT, interval, text, ends)


def _above(value: float, target: float) -> str:
    return f"{value / target - 1:.1%} above"


def _ends(heldout: Evidence | LengthEvidence, ends: str | None) -> str:
    if ends is None or heldout.intervals is None:
        return f" (no interval: {_count(heldout.samples)})"
    return f", {heldout.intervals.confidence:.0%} interval {ends} ({_count(heldout.samples)})"


def _count(samples: int) -> str:
    return f"{samples} sample{'s' if samples != 1 else ''}"


def missed(verdicts: Sequence[Verdict]) -> str:
    """One line about the points that missed their targets; empty when none did."""
    return "; ".join(verdict.text for verdict in verdicts if verdict.outcome == "missed")


def enforce(profile: Profile, *, force: bool = False, offered: Collection[str] = ()) -> Profile:
    """Let a profile with held-out figures pass, or not; points that nobody asked for are left out where they missed.

    Warns (:class:`~xcalib.errors.XcalibWarning`) for every point that passes without having met its target: an uncertain or
    unmeasured one, and with ``force`` one that missed; and for every one that is left out.

    Args:
        profile: with held-out figures.
        force: keep points that missed their targets, marked unverified.
        offered: names of points that nobody asked for.

    Raises:
        TargetMissedError: a point that was asked for missed its target, and ``force`` is False.
    """
    verdicts = [judge(point) for point in profile.points]
    out = {one.point for one in verdicts if one.outcome == "missed" and one.point in offered and not force}
    left_out = [verdict for verdict in verdicts if verdict.point in out]
    verdicts = [verdict for verdict in verdicts if verdict.point not in out]
    complaint = missed(verdicts)
    if complaint and not force:
        raise TargetMissedError(
            f"{complaint}; search with more samples or a looser target, or keep the profile with force=True",
            profile,
            verdicts,
        )
    for verdict in verdicts:
        if verdict.outcome != "met":
            kept = "; kept, marked unverified" if verdict.outcome == "missed" else ""
            warnings.warn(f"{verdict.text}{kept}", XcalibWarning, stacklevel=3)
    for verdict in left_out:
        warnings.warn(f"{verdict.text}; left out, since nobody asked for this point", XcalibWarning, stacklevel=3)
    points = tuple(point for point in profile.points if point.name not in out)
    return profile if not out else make_profile(**{**dict(profile), "points": points})
