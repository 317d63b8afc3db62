"""What a report is made of, checked to belong together."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from xcalib import _yaml
from xcalib._reading import read_regular
from xcalib.collect import Curves
from xcalib.errors import CurvesError, ProfileError, ReportError
from xcalib.evaluation import Evaluation
from xcalib.evaluation.by_length import LengthResult
from xcalib.evaluation.results import PlanResult
from xcalib.evaluation.uniform import PUBLISHED, PUBLISHED_RULE, UNIFORM
from xcalib.profile import Method, Profile, explain

__all__ = [
    "Evaluated",
    "Inputs",
    "check_curves",
    "check_evaluation",
    "published",
    "read_evaluation",
    "require_libraries",
    "tau_of",
]

LIBRARIES = ("altair", "jinja2", "vl_convert")


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and where it comes from.

    Attributes:
        source: the file's name, or what stands for it.
        found: what was measured.
        single_method: stride, block size, pattern and order that its single taus were used with, but for those whose names say
            that they go by the published rule.
    """

    source: str
    found: Evaluation
    single_method: Method

    def method_of(self, plan: str) -> Method | None:
        """With what the single tau of this name was used; None for a plan that is none."""
        if plan.startswith(PUBLISHED):
            return published(self.single_method)
        return self.single_method if plan.startswith(UNIFORM) else None


@dataclass(frozen=True)
class Inputs:
    """Everything that a report can show.

    Attributes:
        profile: the profile.
        curves: of its length bins, in order; empty without.
        evaluations: further measurements of the same model.
    """

    profile: Profile
    curves: tuple[Curves, ...] = ()
    evaluations: tuple[Evaluated, ...] = ()


def require_libraries() -> None:
    """Raise ReportError, naming the extra, unless all libraries that draw a report are installed."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise ReportError(f"a report needs {names}: pip install 'xcalib[report]'")


def check_curves(profile: Profile, sets: Sequence[Curves], name: str = "the curves") -> tuple[Curves, ...]:
    """The curves, one for each length bin, of the profile's model, method and layers.

    Raises:
        CurvesError: they are of something else; the message says of what.
    """
    for curves in sets:
        _check_model(profile, curves, name)
        for key in ("stride", "block_size", "pattern", "order"):
            ours, theirs = getattr(profile.method, key), getattr(curves.settings, key)
            if ours != theirs:
                raise CurvesError(
                    f"{name}: measured with {key} {theirs}, the profile has {ours}: give the curves that it was searched on"
                )
    if len(sets) != len(profile.length_bins):
        raise CurvesError(
            f"{name}: curves of {len(sets)} length{'s' if len(sets) != 1 else ''}, the profile has "
            f"{len(profile.length_bins)} length bins: give the curves that it was searched on"
        )
    measured = {layer for curves in sets for layer in curves.layers}
    if measured != set(range(profile.model.layers)) - set(profile.dense_layers):
        raise CurvesError(
            f"{name}: curves of other layers than those that the profile makes sparse: give the curves that it was searched on"
        )
    return tuple(sets)


def _check_model(profile: Profile, curves: Curves, name: str) -> None:
    for key in ("layers", "query_heads", "config_sha256"):
        ours, theirs = getattr(profile.model, key), curves.model.get(key)
        if ours != theirs:
            said = f"{_yaml.quote(theirs)} there and {_yaml.quote(ours)} in the profile"
            raise CurvesError(
                f"{name}: curves of another model, {_yaml.quote(curves.model.get('name'))}: {key} is {said}"
            )


def read_evaluation(path: Path, profile: Profile) -> Evaluated:
    """What ``xcalib evaluate --json`` or ``xcalib demo --json`` printed.

    Raises:
        ReportError: the file is something else, or of a model with other layers.
    """
    name = _yaml.one_line(str(path))
    try:
        document = _yaml.read_json(_yaml.decode(read_regular(path, _yaml.MAX_BYTES), name), name).value
        is_demo = isinstance(document, dict) and "evaluation" in document
        found: Evaluation = _adapter().validate_python(document["evaluation"] if is_demo else document)
    except ProfileError as error:
        raise ReportError(str(error)) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ReportError(
            f"{name}: not what 'xcalib evaluate --json' prints: {_yaml.one_line(key, 80)}: {explain(first)}"
        ) from None
    for plan in found.plans:
        _check_plan(plan, name)
    evaluated = Evaluated(_yaml.one_line(path.name, 80), found, _single_method(found, profile, is_demo=is_demo))
    check_evaluation(profile, evaluated)
    return evaluated


def _adapter() -> TypeAdapter[Evaluation]:
    adapter = TypeAdapter(Evaluation)
    adapter.rebuild(force=True, _types_namespace={"LengthResult": LengthResult, **_names()})
    return adapter


def _names() -> dict[str, Any]:
    from xcalib.evaluation import results

    return vars(results)


def _check_plan(plan: PlanResult, name: str) -> None:
    figures = {"density": plan.density, "kl": plan.kl}
    for key, value in figures.items():
        if not 0 <= value <= (1 if key == "density" else 1e6):  # a NaN is in no range
            raise ReportError(f"{name}: {key} of {_yaml.quote(plan.name)} is {value}, which no evaluation gives")
    if _is_single(plan.name):
        try:
            inside = 0 <= float(tau_of(plan.name)) <= 1
        except ValueError:
            inside = False
        if not inside:
            raise ReportError(f"{name}: {_yaml.quote(plan.name)} is no single tau between 0 and 1")


def _is_single(plan: str) -> bool:
    return plan.startswith((UNIFORM, PUBLISHED))


def tau_of(plan: str) -> str:
    """The tau in the name of a single tau, any other name as it is."""
    return plan.removeprefix(PUBLISHED).removeprefix(UNIFORM)


def _single_method(found: Evaluation, profile: Profile, *, is_demo: bool) -> Method:
    """With what the single taus of an evaluation were used; the file does not say, the commands' rules do."""
    if is_demo:
        return published(profile.method)
    if all(_is_single(plan.name) for plan in found.plans):  # no profile was given
        return Method(stride=16, block_size=128, **PUBLISHED_RULE)
    return profile.method


def published(method: Method) -> Method:
    """The published rule at a method's stride and block size."""
    return method.model_copy(update=PUBLISHED_RULE)


def check_evaluation(profile: Profile, evaluated: Evaluated) -> None:
    """Raise ReportError where an evaluation has other layers than the profile's model, or no point of the profile."""
    known = {point.name for point in profile.points}
    others = [plan.name for plan in evaluated.found.plans if not _is_single(plan.name)]
    if others and not known.intersection(others):
        raise ReportError(
            f"{evaluated.source}: evaluates {_yaml.one_line(', '.join(others), 80)}, the profile has "
            f"{', '.join(sorted(known))}: it is of another profile"
        )
    for plan in evaluated.found.plans:
        if len(plan.density_by_layer) != profile.model.layers:
            raise ReportError(
                f"{evaluated.source}: of a model with {len(plan.density_by_layer)} layers, the profile's has "
                f"{profile.model.layers}"
            )
