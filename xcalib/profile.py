"""The profile file: the thresholds of every layer and head, the evidence for them, and nothing that runs.

A profile is immutable, validated data. Files are YAML or JSON of one schema (``docs/profile-format.md``,
``docs/profile.schema.json``); whatever is wrong with one is a :class:`~xcalib.errors.ProfileError` of one line that
names the line or the key. This module imports no model, search or terminal library.
"""

import hashlib
import json as _json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from pydantic import model_serializer as _model_serializer
from pydantic import model_validator as _model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from xcalib import _yaml
from xcalib._reading import read_regular
from xcalib._suggest import nearest
from xcalib.choices import PROFILE_SUFFIXES
from xcalib.errors import ModelError, ProfileError

__all__ = [
    "Bound",
    "Calibration",
    "Evidence",
    "Intervals",
    "LengthBin",
    "LengthEvidence",
    "LengthPrediction",
    "Method",
    "ModelIdentity",
    "OperatingPoint",
    "Prediction",
    "Profile",
    "Refined",
    "SearchRound",
    "content_sha256",
    "dump_profile",
    "json_schema",
    "load_profile",
    "make_profile",
    "parse_profile",
    "read_profile",
    "save_profile",
]


def _rule(text: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{text}", {"text": text})


def _printable(text: str) -> str:
    # These strings are printed on terminals: escape sequences and right-to-left overrides end here.
    if not text.isprintable():
        raise _rule(f"must be printable text, got {_yaml.quote(text)}")
    return text


def _integer(value: object) -> object:
    if type(value) is not int:  # Literal[1] alone takes True and 1.0 for 1
        raise _rule(f"must be an integer, got {_yaml.quote(value)}")
    return value


def _option(value: object) -> object:
    # Before the union, whose own errors name each of its members; and so that a long list costs no error for each item.
    texts = value if isinstance(value, list | tuple) else [value] if isinstance(value, str) else []
    plain = all(isinstance(text, str) and text.isprintable() and 0 < len(text) <= 1000 for text in texts[:65])
    if isinstance(value, int | float):
        plain = abs(value) < 2**63  # neither NaN nor infinite
    elif len(texts) > 64 or not isinstance(value, str | list | tuple):
        plain = False
    if not plain:
        raise _rule(
            f"must be printable text, a number, true, false or a list of at most 64 texts, got {_yaml.quote(value)}"
        )
    return value


class _FrozenDict(dict[str, Any]):
    """A dict that refuses changes and can be hashed and pickled, as every other part of a profile can."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a profile is immutable")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type["_FrozenDict"], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)


T = TypeVar("T")
Rows = Annotated[tuple[T, ...], FailFast()]  # FailFast: a wrong file of a million values gives few error objects
Key = Annotated[str, Field(strict=True, min_length=1, max_length=200), AfterValidator(_printable)]
Text = Annotated[str, Field(strict=True, min_length=1, max_length=1000), AfterValidator(_printable)]
Sha256 = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]
Hex = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{8,128}$")]
Whole = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
Count = Annotated[int, Field(strict=True, ge=1, le=2**63 - 1)]
Real = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Option = Annotated[
    Annotated[bool, Field(strict=True)]
    | Annotated[int, Field(strict=True)]
    | Annotated[float, Field(strict=True)]
    | Text
    | tuple[Text, ...],
    BeforeValidator(_option),
]
Recipe = Annotated[dict[Key, Option], Field(max_length=100), AfterValidator(_FrozenDict)]
Change = Annotated[float, Field(strict=True, le=1, allow_inf_nan=False)]  # of a share: negative where it grew


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", revalidate_instances="always")

    # Keys that came after the first files: not written while they have their default, so that those files keep their
    # content_sha256.
    _later: ClassVar[frozenset[str]] = frozenset()

    @_model_serializer(mode="wrap")
    def _without_later(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            key: value for key, value in handler(self).items() if key not in self._later or value != fields[key].default
        }


class Method(_Model):
    """How blocks are chosen: group size S and block size B in tokens, the pattern inside a group, the order of preference.

    order: "score" is the published rule; with "recent" every tau above 0 keeps the block before a row's own, which is our own
    departure from it (docs/kernels.md).
    """

    _later = frozenset({"order"})

    stride: Annotated[Literal[4, 8, 16, 32, 64], BeforeValidator(_integer)]
    block_size: Annotated[Literal[64, 128], BeforeValidator(_integer)]
    pattern: Literal["antidiagonal", "diagonal", "random", "rows"] = "antidiagonal"
    order: Literal["score", "recent"] = "score"


SHAPE = ("model_type", "layers", "query_heads", "kv_heads", "head_dim")


class ModelIdentity(_Model):
    """The model that was measured: its name as given, commit if known, shape, and SHA-256 of its canonical config."""

    name: Text
    commit: Text | None = None
    model_type: Text
    layers: Count
    query_heads: Count
    kv_heads: Count
    head_dim: Count
    config_sha256: Sha256

    @_model_validator(mode="after")
    def _check(self) -> "ModelIdentity":
        if self.query_heads % self.kv_heads:
            raise _rule(f"kv_heads must divide query_heads, got {self.kv_heads} and {self.query_heads}")
        return self

    def check(self, actual: "ModelIdentity", *, any_config: bool, otherwise: str) -> None:
        """Raise ModelError unless ``actual`` has this shape and, without ``any_config``, this config.

        ``otherwise`` says how to take another config all the same.
        """
        for field in SHAPE:
            ours, theirs = getattr(self, field), getattr(actual, field)
            if ours != theirs:
                raise ModelError(
                    f"the profile is for another model: {field} is {_yaml.quote(ours)} in the profile ({self.name}) and "
                    f"{_yaml.quote(theirs)} in {actual.name}"
                )
        if self.config_sha256 != actual.config_sha256 and not any_config:
            raise ModelError(
                f"the profile was made with another config than that of {actual.name}: config_sha256 is "
                f"{self.config_sha256[:12]}... in the profile and {actual.config_sha256[:12]}... here, so its "
                f"thresholds may not fit; {otherwise}"
            )


class LengthBin(_Model):
    """Key lengths in tokens that one set of thresholds serves: min_length (inclusive) to max_length (exclusive)."""

    min_length: Whole
    max_length: Count | None = None

    @_model_validator(mode="after")
    def _check(self) -> "LengthBin":
        if self.max_length is not None and self.max_length <= self.min_length:
            raise _rule(f"max_length must be above min_length, got {self.max_length} and {self.min_length}")
        return self

    def holds(self, length: int) -> bool:
        """Whether ``length`` keys are in the bin."""
        return self.min_length <= length and (self.max_length is None or length < self.max_length)


class Bound(_Model):
    """How far from the best the search can be at most.

    cost: mean density; error: the sum that was minimised, in the units of the objective; lower_bound: Lagrangian bound on it
    (on the cost for a kl target); gap: (error - lower_bound) / lower_bound, None where it is not defined. Each length bin is
    a search of its own: this is the bin with the largest gap.
    """

    cost: Real
    error: Real
    lower_bound: Real
    gap: Real | None = None


class Intervals(_Model):
    """What ``confidence`` of the bootstrap's ``resamples`` held: lower and upper end, over held-out samples.

    kl: of the mean KL in nats per token; accuracy: in [0, 1]; drop: of the share of the dense model's accuracy that is
    lost, negative where the sparse model answers better. Without two samples that ask something the last two are None.
    """

    confidence: Fraction
    resamples: Count
    kl: tuple[Real, Real]
    accuracy: tuple[Fraction, Fraction] | None = None
    drop: tuple[Change, Change] | None = None

    @_model_validator(mode="after")
    def _check(self) -> "Intervals":
        for name in ("kl", "accuracy", "drop"):
            ends = getattr(self, name)
            if ends is not None and ends[0] > ends[1]:
                raise _rule(f"{name} must be a lower and an upper end, got {ends[0]} and {ends[1]}")
        return self


class LengthEvidence(LengthBin):
    """The part of an :class:`Evidence` that samples of one length bin gave; the keys mean the same."""

    density: Fraction
    kl: Real
    accuracy: Fraction | None = None
    accuracy_dense: Fraction | None = None
    samples: Count
    tokens: Count
    intervals: Intervals | None = None


class Evidence(_Model):
    """Measured on held-out data: density in [0, 1], KL to the dense model in nats per token, accuracies in [0, 1].

    intervals: how sure these are; None with fewer than two samples, and in files written before there were any.
    by_length: of each length bin that held-out samples fall into; None where the profile has one bin.
    """

    _later = frozenset({"intervals", "by_length"})

    density: Fraction
    kl: Real
    kl_p99: Real | None = None
    accuracy: Fraction | None = None
    accuracy_dense: Fraction | None = None
    perplexity: Real | None = None
    perplexity_dense: Real | None = None
    samples: Count
    tokens: Count
    intervals: Intervals | None = None
    by_length: tuple[LengthEvidence, ...] | None = None


class LengthPrediction(LengthBin):
    """What the search expects in one length bin: density in [0, 1] and KL in nats per token."""

    density: Fraction
    kl: Real


class Prediction(_Model):
    """What the search expects: mean density in [0, 1], KL in nats per token, accuracy in [0, 1] where known.

    With several length bins the figures are means over all of them, and by_length has those of each, in order.
    """

    _later = frozenset({"by_length"})

    density: Fraction
    kl: Real
    accuracy: Fraction | None = None
    by_length: tuple[LengthPrediction, ...] | None = None


class SearchRound(_Model):
    """A step of the search from measurements with all layers sparse; KLs in nats per token on calibration samples.

    expected: what the local model says of the KL after the step; measured: what it is; others: the same, each sample at the
    step that the other samples asked for; density: blocks kept after it, in [0, 1]; taken: whether it was.
    """

    expected: Real
    measured: Real
    others: Real
    density: Fraction
    taken: Annotated[bool, Field(strict=True)]


class Refined(_Model):
    """How a point was refined end to end after its search (docs/refine.md).

    trials: finished; seed: of the proposals; dimensions: groups of layers that were shifted; samples: that the trials measured;
    validation_samples: that decided; least: what was minimised; ratio: of it to the start's on the validation samples, and the
    paired interval that holds it with ``confidence``.
    """

    trials: Count
    seed: Whole
    dimensions: Count
    samples: Count
    validation_samples: Count
    least: Literal["kl", "density"]
    ratio: Real
    interval: tuple[Real, Real]
    confidence: Fraction

    @_model_validator(mode="after")
    def _check(self) -> "Refined":
        if self.interval[0] > self.interval[1]:
            raise _rule(f"interval must be a lower and an upper end, got {self.interval[0]} and {self.interval[1]}")
        return self


class OperatingPoint(_Model):
    """One named choice of all taus: thresholds[bin][layer][query head], each in [0, 1].

    rounds: the steps after the first search, by length bin; None where none was tried. verified: whether the held-out figures
    meet the target by the rule of docs/search.md; False where they miss it or where there are none, None where nobody asked
    (files written before there was the rule). refined: by length bin, None where the thresholds are those that the
    search found, in a bin or in all.
    """

    _later = frozenset({"verified", "rounds", "refined"})

    name: Annotated[str, Field(strict=True, pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
    target: Text
    objective: Text
    method: Literal["knapsack", "paper", "uniform", "imported"]
    thresholds: Rows[Rows[Rows[Fraction]]]
    predicted: Prediction | None  # None: nothing was measured, as for a table that was imported
    heldout: Evidence | None = None
    bound: Bound | None = None
    verified: Annotated[bool, Field(strict=True)] | None = None
    rounds: tuple[tuple[SearchRound, ...], ...] | None = None
    refined: tuple[Refined | None, ...] | None = None

    @_model_validator(mode="after")
    def _check(self) -> "OperatingPoint":
        if self.verified and self.heldout is None:
            raise _rule("verified must not be true where heldout is null")
        return self


class Calibration(_Model):
    """The data that was searched on.

    Lengths are in tokens; documents are the hex hashes of its texts, so that an evaluation can refuse them; dropped
    counts the samples left out, by reason. lengths: what was asked of the longest samples, one for each length bin; None in
    files written before there were several. skipped: samples that were left out because the model's numbers on them were not
    finite.
    """

    _later = frozenset({"lengths", "skipped"})

    sources: Rows[Text]
    samples: Whole
    min_length: Whole
    max_length: Whole
    seed: Whole
    tokens_sha256: Sha256
    documents: Rows[Hex]
    gain_samples: Whole = 0
    dropped: Annotated[dict[Key, Whole], AfterValidator(_FrozenDict)] = Field(default_factory=_FrozenDict)
    lengths: tuple[Count, ...] | None = None
    skipped: Whole = 0

    @_model_validator(mode="after")
    def _check(self) -> "Calibration":
        if self.max_length < self.min_length:
            raise _rule(f"max_length must not be below min_length, got {self.max_length} and {self.min_length}")
        return self


class Profile(_Model):
    """A whole profile. Below the first bin's min_length, and in dense_layers, the model attends densely.

    recipe: the options of the `xcalib search` that made it, by their long names, as far as they decide the result
    (docs/recipes.md); None where it was made in another way, and in files written before there were recipes.
    """

    _later = frozenset({"recipe"})

    schema_version: Annotated[Literal[1], BeforeValidator(_integer)]
    method: Method
    model: ModelIdentity
    dense_layers: Rows[Whole]
    length_bins: Annotated[Rows[LengthBin], Field(min_length=1, max_length=64)]
    points: Annotated[Rows[OperatingPoint], Field(min_length=1, max_length=64)]
    default_point: Text
    calibration: Calibration
    versions: Annotated[dict[Key, Text], AfterValidator(_FrozenDict)]
    recipe: Recipe | None = None
    content_sha256: Sha256

    def point(self, name: str | None = None) -> OperatingPoint:
        """The operating point called ``name``, or the default one; ProfileError with the known names otherwise."""
        wanted = self.default_point if name is None else name
        for point in self.points:
            if point.name == wanted:
                return point
        known = ", ".join(point.name for point in self.points)
        raise ProfileError(f"no operating point {_yaml.quote(wanted)}; this profile has: {known}")

    @_model_validator(mode="after")
    def _check(self) -> "Profile":
        faults = [*_layer_faults(self), *_bin_faults(self), *_point_faults(self)]
        if faults:
            errors = [InitErrorDetails(type=_rule(text), loc=path, input=None) for path, text in faults]
            raise ValidationError.from_exception_data("Profile", errors)
        return self


KeyPath = tuple[str | int, ...]


def _layer_faults(profile: Profile) -> Iterator[tuple[KeyPath, str]]:
    previous = -1
    for index, layer in enumerate(profile.dense_layers):
        if layer >= profile.model.layers:
            yield ("dense_layers", index), f"layer {layer}, the model has {profile.model.layers}, counted from 0"
        elif layer <= previous:
            yield ("dense_layers", index), f"must be sorted and unique, got {layer} after {previous}"
        previous = layer


def _bin_faults(profile: Profile) -> Iterator[tuple[KeyPath, str]]:
    bins = profile.length_bins
    for index in range(1, len(bins)):
        end, start = bins[index - 1].max_length, bins[index].min_length
        if end is None:
            yield ("length_bins", index - 1, "max_length"), "only the last bin may be without an end"
        elif start != end:
            yield ("length_bins", index, "min_length"), f"must be {end}, where the bin before ends, got {start}"
    lengths = profile.calibration.lengths
    if lengths is None:
        return
    if len(lengths) != len(bins):
        yield ("calibration", "lengths"), f"{len(lengths)} lengths, the profile has {len(bins)} length bins"
    for index, (length, length_bin) in enumerate(zip(lengths, bins, strict=False)):
        if not length_bin.holds(length):
            yield ("calibration", "lengths", index), f"{length} is not in length_bins[{index}]"


def _point_faults(profile: Profile) -> Iterator[tuple[KeyPath, str]]:
    names: set[str] = set()
    for index, point in enumerate(profile.points):
        if point.name in names:
            yield ("points", index, "name"), f"a second point called {point.name}"
        names.add(point.name)
        for path, text in _threshold_faults(profile, point):
            yield ("points", index, "thresholds", *path), text
        for key, by_bin in (("rounds", point.rounds), ("refined", point.refined)):
            if by_bin is not None and len(by_bin) != len(profile.length_bins):
                counts = f"{len(by_bin)} length bins, the profile has {len(profile.length_bins)}"
                yield ("points", index, key), counts
        for path, text in _length_faults(profile, point):
            yield ("points", index, *path), text
    if profile.default_point not in names:
        known = ", ".join(sorted(names))
        yield ("default_point",), f"no point called {_yaml.quote(profile.default_point)}; there is: {known}"


def _threshold_faults(profile: Profile, point: OperatingPoint) -> Iterator[tuple[KeyPath, str]]:
    bins, layers, heads = len(profile.length_bins), profile.model.layers, profile.model.query_heads
    if len(point.thresholds) != bins:
        yield (), f"{len(point.thresholds)} length bins, the profile has {bins}"
    for bin_index, rows in enumerate(point.thresholds):
        if len(rows) != layers:
            yield (bin_index,), f"{len(rows)} layers, the model has {layers}"
        for layer, row in enumerate(rows):
            if len(row) != heads:
                yield (bin_index, layer), f"{len(row)} heads, the model has {heads}"
        for layer in profile.dense_layers:
            if layer < len(rows) and any(tau != 1 for tau in rows[layer]):
                yield (bin_index, layer), f"layer {layer} is one of dense_layers: every threshold must be 1.0"


def _length_faults(profile: Profile, point: OperatingPoint) -> Iterator[tuple[KeyPath, str]]:
    bins = [(length_bin.min_length, length_bin.max_length) for length_bin in profile.length_bins]
    predicted = point.predicted.by_length if point.predicted else None
    if predicted is not None and [(part.min_length, part.max_length) for part in predicted] != bins:
        yield ("predicted", "by_length"), "must have one entry for each of length_bins, with its lengths"
    measured = point.heldout.by_length if point.heldout else None
    if measured is not None:
        found = [(part.min_length, part.max_length) for part in measured]
        if found != [one for one in bins if one in found]:
            yield ("heldout", "by_length"), "must have the lengths of length_bins, each at most once and in order"


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile file, JSON where it ends in ``.json`` or begins with ``{`` and YAML otherwise.

    A name without a folder or one of these suffixes that is no file here, as ``"smollm2-135m"``, is that of a shipped profile.

    Raises ProfileError for a file that cannot be read, is not valid, or does not match its content_sha256.
    """
    name = os.fsdecode(path)
    return parse_profile(read_profile(name), name=name)


def read_profile(name: str) -> bytes:
    """The bytes of a profile file, or of a shipped profile, as :func:`load_profile` finds it; ProfileError if there is none."""
    if name.lower().endswith(PROFILE_SUFFIXES) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        return read_regular(name, _yaml.MAX_BYTES)
    from xcalib import profiles

    # A folder of this name, of a profile's work say, is not in the way.
    if os.path.lexists(name) and not (Path(name).is_dir() and name in profiles.names()):
        return read_regular(name, _yaml.MAX_BYTES)
    try:
        return profiles.read(name)
    except KeyError:
        known = profiles.names()
        said = f"no such file, and no shipped profile of this name; there is: {', '.join(known)}{nearest(name, known)}"
        raise _yaml.fault(name, None, said) from None


def parse_profile(text: str | bytes, *, name: str = "<profile>", json: bool | None = None) -> Profile:
    """A profile from the text of a file; ``name`` stands in messages, ``json`` None decides as load_profile does."""
    body = _yaml.decode(text, name)
    is_json = (name.lower().endswith(".json") or body.lstrip().startswith("{")) if json is None else json
    document = _yaml.read_json(body, name) if is_json else _yaml.read_yaml(body, name)
    try:
        profile = Profile.model_validate(document.value)
    except ValidationError as error:
        raise _invalid(error, name, document, body) from None
    actual = content_sha256(profile.model_dump())
    if actual != profile.content_sha256:
        raise _yaml.fault(name, document.line_of(["content_sha256"]), _hash_mismatch(profile.content_sha256, actual))
    return profile


def _hash_mismatch(stated: str, actual: str) -> str:
    return (
        f"content_sha256: the content does not match its content_sha256 (edited by hand?): {stated[:12]}... is stated, "
        f"{actual[:12]}... is there; if the change is meant, re-save with make_profile and save_profile"
    )


_PLAIN_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "unknown key",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
}


def _invalid(error: ValidationError, name: str, document: _yaml.Document | None, body: str = "") -> ProfileError:
    # Pydantic counts an item that failed as absent: a list of one bad point is not "too short" as well.
    details = [d for d in error.errors(include_url=False) if not (d["type"] == "too_short" and d["input"])]
    first = details[0]
    path = [step for step in first["loc"] if step != "[key]"]
    if document is not None and not document.lines:
        with suppress(ProfileError):  # JSON that is not YAML, by its surrogate escapes say, goes without its line
            document = _yaml.read_yaml(body, name)
    line = None if document is None else document.line_of(path)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return _yaml.fault(name, line, f"{_key(path)}: {explain(first)}{more}")


def _key(path: Sequence[str | int]) -> str:
    steps = (
        f"[{step}]"
        if isinstance(step, int)
        else (f".{step}" if step.isidentifier() and len(step) <= 40 else f"[{_yaml.quote(step)}]")
        for step in path
    )
    return "".join(steps).lstrip(".") or "profile"


def explain(detail: ErrorDetails) -> str:
    """What pydantic found, in this project's words."""
    kind, text = detail["type"], detail["msg"]
    if kind in ("rule", "missing", "extra_forbidden"):
        return _PLAIN_WORDS.get(kind, text)
    # "Input should be ..." and "String should match ..." become "must be ..." and "must match ...".
    rule = "must" + text.partition(" should")[2] if " should" in text else text
    return f"{_PLAIN_WORDS.get(kind, rule)}, got {_yaml.quote(detail['input'])}"


def make_profile(**fields: Any) -> Profile:
    """A profile from the fields of :class:`Profile`; schema_version is 1 and content_sha256 is computed.

    To change one: ``make_profile(**{**dict(profile), "points": points})``. Raises ProfileError.
    """
    data = {**fields, "schema_version": 1, "content_sha256": "0" * 64}
    try:
        profile = Profile.model_validate(data)
    except ValidationError as error:
        raise _invalid(error, "new profile", None) from None
    return profile.model_copy(update={"content_sha256": content_sha256(profile.model_dump())})


def content_sha256(data: Mapping[str, Any]) -> str:
    """SHA-256, as 64 lower hex digits, of everything in ``data`` but its content_sha256.

    What is hashed is ASCII JSON with sorted keys, no whitespace, and floats as Python's repr writes them. All keys
    count, so ``data`` must be complete (defaults filled in), as every file written here is. Raises ProfileError.
    """
    rest = {key: value for key, value in data.items() if key != "content_sha256"}
    try:
        canonical = _json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ProfileError(f"content cannot be hashed: {_yaml.one_line(str(error))}") from None
    return hashlib.sha256(canonical.encode()).hexdigest()


def dump_profile(profile: Profile, *, format: Literal["yaml", "json"] = "yaml") -> str:
    """The text of the profile's file; numbers come back exactly. ProfileError if its content_sha256 is not its own."""
    data = profile.model_dump(mode="json")
    actual = content_sha256(data)
    if actual != profile.content_sha256:
        raise ProfileError(_hash_mismatch(profile.content_sha256, actual))
    if format == "json":
        return _json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return "# An xcalib profile. Changes by hand break content_sha256.\n" + _yaml.write_yaml(data)


def save_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write a ``.yaml``, ``.yml`` or ``.json`` file, whole or not at all; links are followed. Raises ProfileError."""
    name = os.fsdecode(path)
    suffix = Path(name).suffix.lower()
    if suffix not in PROFILE_SUFFIXES:
        raise _yaml.fault(name, None, f"a profile's name must end in .yaml, .yml or .json, got {_yaml.quote(suffix)}")
    text = dump_profile(profile, format="json" if suffix == ".json" else "yaml")
    if parse_profile(text, name=name) != profile:  # one made with model_construct, say
        raise _yaml.fault(name, None, "this profile would not read back as it is")
    from xcalib._files import replace_file  # here: reading a profile needs nothing of it

    try:
        replace_file(Path(os.path.realpath(name)), text.encode())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _yaml.fault(name, None, f"cannot be written: {reason}") from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of the file; shapes across keys and content_sha256 are checked on load only."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Profile.model_json_schema()}
