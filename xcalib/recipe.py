"""Recipes: the options of a command in a YAML file, to run it again.

What may stand in one comes from the command itself (:mod:`xcalib.cli.recipes`); this module reads, checks and writes. A
recipe is data: the reader is that of profiles (:mod:`xcalib._yaml`), which builds nothing but plain values.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from xcalib import _yaml
from xcalib._suggest import nearest
from xcalib.errors import ProfileError, RecipeError, XcalibError
from xcalib.profile import explain, parse_profile, read_profile

__all__ = ["Option", "parse_recipe", "read_recipe", "recipe_text"]

MAX_ITEMS = 64
MAX_TEXT = 4096


@dataclass(frozen=True)
class Option:
    """An option that a recipe may hold.

    Attributes:
        kind: the type of its value, as an annotation for pydantic's strict mode.
        many: it takes a list; one text then stands for a list of one.
        low: its least value, None for none.
        high: its largest value, None for none.
        check: called with the value; raises ValueError or XcalibError for one that does not do.
        stranger: called as well where a profile gives the value, which whoever runs it need not have read.
        kept: whether a profile keeps it: it decides the result, and is no matter of one machine.
    """

    kind: Any
    many: bool = False
    low: float | None = None
    high: float | None = None
    check: Callable[[Any], object] | None = None
    stranger: Callable[[Any], object] | None = None
    kept: bool = True


def read_recipe(path: str | os.PathLike[str], options: Mapping[str, Option]) -> dict[str, Any]:
    """The options that a recipe gives, by key; those that are null are left out.

    Args:
        path: a recipe, or a profile with the recipe that made it; a shipped profile by its name.
        options: what may be given, by long name with underscores; hyphens in the file stand for underscores.

    Raises:
        RecipeError: the file cannot be read, is no recipe, or holds a key, type or value that does not do.
    """
    name = os.fsdecode(path)
    try:
        data = read_profile(name)
    except ProfileError as error:
        raise RecipeError(str(error)) from None
    return parse_recipe(data, options, name=name)


def parse_recipe(text: str | bytes, options: Mapping[str, Option], *, name: str = "<recipe>") -> dict[str, Any]:
    """As :func:`read_recipe`, of the text of a file; ``name`` stands in messages."""
    try:
        body = _yaml.decode(text, name)
        if not body.strip():
            raise _yaml.fault(name, None, "the file is empty")
        document = _yaml.read_yaml(body, name)
        if "schema_version" in document.value:
            options = {key: option for key, option in options.items() if option.kept}
            return _checked(_recipe_of_profile(body, document, name), options, name, stranger=True)
        return _checked(document, options, name)
    except ProfileError as error:
        raise RecipeError(str(error)) from None


def _recipe_of_profile(body: str, document: _yaml.Document, name: str) -> _yaml.Document:
    if parse_profile(body, name=name).recipe is None:
        raise _yaml.fault(name, None, "is a profile that holds no recipe: `xcalib search` did not make it")
    return _yaml.Document(document.value["recipe"], document.lines)


def _checked(
    document: _yaml.Document, options: Mapping[str, Option], name: str, *, stranger: bool = False
) -> dict[str, Any]:
    given: dict[str, str] = {}  # key with underscores -> as it stands in the file
    for key in document.value:
        plain, line = key.replace("-", "_"), document.line_of([key])
        if plain not in options:
            hint = nearest(plain[:100], options) or f"; known are {', '.join(options)}"
            raise _yaml.fault(name, line, f"{_yaml.quote(key)[1:-1]}: unknown key{hint}")
        if plain in given:
            raise _yaml.fault(name, line, f"duplicate key {key}: given as {given[plain]} before")
        given[plain] = key
    values: dict[str, Any] = {}
    for plain, key in given.items():
        try:
            value = _value(document.value[key], options[plain], stranger)
        except (ValueError, XcalibError) as error:
            place, said = _place(key, error)
            raise _yaml.fault(name, document.line_of(place), f"{_dotted(place)}: {said}") from None
        if value is not None and value != []:  # an empty list is nothing given, as on the command line
            values[plain] = value
    return values


def _value(value: Any, option: Option, stranger: bool) -> Any:
    if option.many and isinstance(value, str):  # one text is a list of one
        value = [value]
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        raise ValueError(f"a list of {len(value):,}, more than {MAX_ITEMS}")
    kind = option.kind
    rule: Any = Annotated[kind, Field(ge=option.low, le=option.high)]
    value = TypeAdapter(rule, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not (text.isprintable() and 0 < len(text) <= MAX_TEXT):
            raise ValueError(f"must be printable text of 1 to {MAX_TEXT:,} characters, got {_yaml.quote(text)}")
    for check in (option.check, option.stranger if stranger else None):
        if check is not None and value is not None:
            check(value)
    return value


def _place(key: str, error: Exception) -> tuple[list[str | int], str]:
    """Where in the file it is wrong, and what."""
    if not isinstance(error, ValidationError):
        return [key], str(error)
    first = error.errors(include_url=False)[0]
    return [key, *(step for step in first["loc"][:1] if isinstance(step, int))], explain(first)


def _dotted(place: Sequence[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else step for step in place)


def recipe_text(values: Mapping[str, Any], title: str) -> str:
    """The text of a recipe of ``values``, in their order, under a comment; None and empty lists are left out."""
    plain = {key: _plain(value) for key, value in values.items() if value is not None and value not in ([], ())}
    return f"# {title}\n{_yaml.write_yaml(plain)}"


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fsdecode(value) if isinstance(value, Path) else value
