"""What a profile's record says, in rows and plain words: verdicts, points, lengths, data and how it was made."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xcalib._words import how_found
from xcalib.evaluation import LengthResult
from xcalib.profile import Evidence, OperatingPoint, Profile
from xcalib.report.front import method_name
from xcalib.report.inputs import Inputs
from xcalib.report.words import count, interval, keys_in, kl, number, percent
from xcalib.search.gate import Verdict, judge

__all__ = [
    "PointRow",
    "data_notes",
    "facts",
    "headline",
    "length_rows",
    "point_rows",
    "recipe_lines",
    "unmeasured_lead",
]

WORDS = {
    "met": "verified",
    "uncertain": "verified, within the interval",
    "missed": "missed",
    "unmeasured": "not verified",
}


@dataclass(frozen=True)
class PointRow:
    """One operating point as the table shows it; figures are words, empty where there are none.

    Attributes:
        outcome: of the ship gate, computed again from the figures in the profile, but ``unmeasured`` where the profile itself
            does not call the point verified.
        word: the outcome in a few words.
        text: the verdict in one sentence.
        drop: share of the dense model's accuracy that is lost.
    """

    name: str
    is_default: bool
    target: str
    outcome: str
    word: str
    text: str
    density: str
    density_predicted: str
    kl: str
    kl_interval: str
    kl_predicted: str
    kl_p99: str
    accuracy: str
    accuracy_dense: str
    drop: str
    drop_interval: str
    perplexity: str
    perplexity_dense: str
    samples: str
    confidence: str


def point_rows(profile: Profile) -> list[PointRow]:
    """All operating points, in the profile's order."""
    return [_point_row(point, profile) for point in profile.points]


def _point_row(point: OperatingPoint, profile: Profile) -> PointRow:
    verdict = judge(point)
    outcome = _outcome(point, verdict)
    heldout, predicted = point.heldout, point.predicted
    ends = heldout.intervals if heldout else None
    lost = _drop(heldout)
    return PointRow(
        name=point.name,
        is_default=point.name == profile.default_point,
        target=point.target,
        outcome=outcome,
        word=WORDS[outcome],
        text=_sentence(verdict, outcome),
        density=percent(heldout.density) if heldout else "",
        density_predicted=percent(predicted.density) if predicted else "",
        kl=kl(heldout.kl) if heldout else "",
        kl_interval=interval(ends.kl) if ends else "",
        kl_predicted=kl(predicted.kl) if predicted else "",
        kl_p99=number(heldout.kl_p99) if heldout and heldout.kl_p99 is not None else "",
        accuracy=percent(heldout.accuracy) if heldout and heldout.accuracy is not None else "",
        accuracy_dense=percent(heldout.accuracy_dense) if heldout and heldout.accuracy_dense is not None else "",
        drop=percent(lost) if lost is not None else "",
        drop_interval=interval(ends.drop, shares=True) if ends else "",
        perplexity=number(heldout.perplexity) if heldout and heldout.perplexity is not None else "",
        perplexity_dense=number(heldout.perplexity_dense) if heldout and heldout.perplexity_dense is not None else "",
        samples=f"{count(heldout.samples, 'sample')}, {heldout.tokens:,} tokens" if heldout else "",
        confidence=percent(ends.confidence, 0) if ends else "",
    )


def _outcome(point: OperatingPoint, verdict: Verdict) -> str:
    """The gate's, unless the file says less: a point that its profile leaves unverified is not called verified here."""
    return "unmeasured" if verdict.verified and point.verified is False else verdict.outcome


def _sentence(verdict: Verdict, outcome: str) -> str:
    marked = "" if outcome == verdict.outcome else "; the profile marks it as not verified"
    return f"Target {verdict.text.partition(': ')[2]}{marked}."


def _drop(heldout: Evidence | None) -> float | None:
    if heldout is None or heldout.accuracy is None or not heldout.accuracy_dense:
        return None
    return 1 - heldout.accuracy / heldout.accuracy_dense


def headline(rows: list[PointRow]) -> tuple[str, str]:
    """An outcome for the whole profile and one sentence about it."""
    total, missed = len(rows), [row.name for row in rows if row.outcome == "missed"]
    met = [row.name for row in rows if row.outcome == "met"]
    unsure = [row.name for row in rows if row.outcome == "uncertain"]
    unmeasured = [row.name for row in rows if row.outcome == "unmeasured"]
    if missed:
        return "missed", f"Held-out data say that {_names(missed)} {_misses(len(missed))}."
    if len(met) == total:
        points = "The operating point meets its target" if total == 1 else f"{_all(total)} meet their targets"
        return "met", f"{points} on data that the search never saw."
    if len(unmeasured) == total:
        none = "The operating point is" if total == 1 else f"None of the {total} operating points is"
        return "unmeasured", f"{none} {'not ' if total == 1 else ''}verified on held-out data."
    within = "above target by less than the samples can tell"
    if len(unsure) == total:
        points = "The operating point is" if total == 1 else f"{_all(total)} are"
        return "uncertain", f"{points} verified on held-out data, {within}."
    said = ((met, "verified"), (unsure, f"verified, {within}"), (unmeasured, "not verified"))
    parts = [f"{_names(names)} {text}" for names, text in said if names]
    return ("uncertain" if not unmeasured else "unmeasured"), f"On held-out data: {'; '.join(parts)}."


def unmeasured_lead(rows: list[PointRow]) -> str:
    """What stands on the page where the default point has no held-out figures."""
    default = next(row for row in rows if row.is_default)
    measured = [row.name for row in rows if row.density]
    predicted = [row.name for row in rows if row.density_predicted]
    from_samples = "predicted from calibration samples"
    if measured:
        others = f"{_names(measured)} {'has' if len(measured) == 1 else 'have'} them"
        what = f"its own are {from_samples}" if default.name in predicted else "nothing was predicted for it either"
        return f"The default point, {default.name}, has no held-out figures; {others}, {what}."
    none = "The operating point has" if len(rows) == 1 else "No operating point has"
    if not predicted:
        return f"{none} {'no ' if len(rows) == 1 else ''}held-out figures, and nothing was predicted."
    which = "" if len(predicted) == len(rows) else f"of {_names(predicted)} "
    return f"{none} {'no ' if len(rows) == 1 else ''}held-out figures: what stands here {which}is {from_samples}."


def _all(total: int) -> str:
    return "Both operating points" if total == 2 else f"All {total} operating points"


def _misses(number_of: int) -> str:
    return "misses its target" if number_of == 1 else "miss their targets"


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def facts(profile: Profile) -> list[tuple[str, str]]:
    """What was calibrated, on what and with what: labels and text."""
    model, record = profile.model, profile.calibration
    commit = f" at commit {model.commit}" if model.commit else ""
    heads = f"{model.query_heads} query and {model.kv_heads} KV heads of {model.head_dim}"
    dense = ", ".join(map(str, profile.dense_layers)) or "none"
    dropped = ", ".join(f"{number_of} {reason}" for reason, number_of in record.dropped.items())
    skipped = f"; {count(record.skipped, 'sample')} skipped for numbers that are not finite" if record.skipped else ""
    found = [
        ("Model", f"{model.name}{commit}"),
        ("Shape", f"{model.model_type}, {model.layers} layers, {heads}"),
        ("Config SHA-256", model.config_sha256),
        ("Method", method_name(profile.method)),
        ("Key lengths", "; ".join(keys_in(length_bin) for length_bin in profile.length_bins)),
        ("Layers that stay dense", dense),
        ("Calibration data", ", ".join(record.sources) or "none"),
        ("Calibration samples", f"{_calibrated(profile)}{skipped}" + (f"; dropped: {dropped}" if dropped else "")),
        ("Calibration tokens SHA-256", record.tokens_sha256),
        ("Held-out data", _heldout(profile)),
        *_searches(profile),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(profile.versions.items()))),
        ("Profile content SHA-256", profile.content_sha256),
    ]
    return [(label, text) for label, text in found if text]


def _searches(profile: Profile) -> list[tuple[str, str]]:
    """How the points were found; one line where all were found alike."""
    how = {point.name: search_of(point) for point in profile.points}
    if len(set(how.values())) == 1:
        return [("Search", next(iter(how.values())))]
    return [(f"Search of {name}", text) for name, text in how.items()]


def search_of(point: OperatingPoint) -> str:
    """Method, objective, what came after the first search, and what is proven."""
    gap = None if point.bound is None else point.bound.gap
    proven = [] if gap is None else [f"at most {percent(gap, 2)} from the best choice on the curves"]
    return "; ".join([*how_found(point), *proven])


def _calibrated(profile: Profile) -> str:
    record = profile.calibration
    if not record.samples:
        return "none"
    if record.lengths is not None and len(record.lengths) > 1:
        lengths = ", ".join(f"{length:,}" for length in record.lengths)
    elif record.min_length == record.max_length:
        lengths = f"{record.max_length:,}"
    else:
        lengths = f"{record.min_length:,} to {record.max_length:,}"
    documents = count(len(record.documents), "document")
    gains = f"{record.gain_samples} for the layer gains" if record.gain_samples else ""
    return f"{count(record.samples, 'sample')} of {lengths} tokens from {documents}, seed {record.seed}" + (
        f"; {gains}" if gains else ""
    )


def _heldout(profile: Profile) -> str:
    measured = {(point.heldout.samples, point.heldout.tokens) for point in profile.points if point.heldout}
    return "; ".join(f"{count(samples, 'sample')}, {tokens:,} tokens" for samples, tokens in sorted(measured)) or "none"


def data_notes(inputs: Inputs) -> list[str]:
    """What a reader must know about the data that were given beside the profile."""
    notes = []
    if inputs.curves:
        from xcalib.search.lengths import pooled_calibration

        if pooled_calibration(inputs.curves)["tokens_sha256"] != inputs.profile.calibration.tokens_sha256:
            notes.append(
                "The curves were measured on other tokens than the profile's calibration: what is read off them is not what "
                "its search saw."
            )
    for evaluated in inputs.evaluations:
        found = evaluated.found
        used = dict.fromkeys(filter(None, (evaluated.method_of(plan.name) for plan in found.plans)))
        methods = " and ".join(map(method_name, used))
        method = f"; its single taus were used with {methods}" if used else ""
        notes.append(
            f"{evaluated.source}: {count(found.samples, 'sample')}, {found.tokens:,} tokens from "
            f"{', '.join(found.sources)}{method}."
        )
    return notes


def recipe_lines(profile: Profile) -> list[tuple[str, str]]:
    """The options that made the profile."""
    return [(key.replace("_", "-"), _option(value)) for key, value in (profile.recipe or {}).items()]


def _option(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def length_rows(inputs: Inputs) -> list[dict[str, Any]]:
    """Density and KL by length, predicted and held out; nothing where no figures are parted by length."""
    rows = [row for point in inputs.profile.points for row in _length_rows(point)]
    known = {(row["name"], row["length"], row["density"], row["kl"]) for row in rows}
    for evaluated in inputs.evaluations:
        for part in evaluated.found.by_length:
            length, start = _served(inputs.profile, part)
            for plan in part.plans:
                if (plan.name, length, plan.density, plan.kl) in known:
                    continue  # the profile's own evidence
                rows.append(
                    _length_row(plan.name, "measured", length, start, plan, plan.kl_interval)
                    | {"source": evaluated.source, "samples": part.samples}
                )
    return rows


def _served(profile: Profile, part: LengthResult) -> tuple[str, int]:
    """A label and a place on the axis: the profile's bin that served these samples, their own lengths where it has but one."""
    bins = [one for one in profile.length_bins if (one.min_length, one.max_length) == part.length_bin]
    if len(profile.length_bins) > 1 and bins and not part.extrapolated:
        return keys_in(bins[0]), bins[0].min_length
    same = part.min_tokens == part.max_tokens
    tokens = f"{part.max_tokens:,}" if same else f"{part.min_tokens:,} to {part.max_tokens:,}"
    return f"{tokens} tokens{' (extrapolated)' if part.extrapolated else ''}", part.min_tokens


def _length_rows(point: OperatingPoint) -> Iterator[dict[str, Any]]:
    for part in (point.predicted and point.predicted.by_length) or ():
        row = _length_row(point.name, "predicted", keys_in(part), part.min_length, part, None)
        yield row | {"source": "profile, predicted", "samples": None}
    for found in (point.heldout and point.heldout.by_length) or ():
        ends = found.intervals.kl if found.intervals else None
        row = _length_row(point.name, "measured", keys_in(found), found.min_length, found, ends)
        yield row | {"source": "profile, held-out data", "samples": found.samples}


def _length_row(
    name: str, kind: str, length: str, start: int, figures: Any, ends: tuple[float, float] | None
) -> dict[str, Any]:
    low, high = ends or (None, None)
    return {
        "name": name,
        "kind": kind,
        "length": length,
        "start": start,
        "density": figures.density,
        "kl": figures.kl,
        "low": low,
        "high": high,
    }
