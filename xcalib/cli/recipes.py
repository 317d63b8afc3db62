"""``--recipe`` and ``--write-recipe``: what may stand in a recipe is read off the command's own signature."""

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo, ParameterInfo

from xcalib._files import replace_file
from xcalib.cli.completion import complete_profile
from xcalib.cli.output import console, print_json
from xcalib.cli.workers import speaks
from xcalib.errors import RecipeError

if TYPE_CHECKING:
    from xcalib.profile import Profile
    from xcalib.recipe import Option

__all__ = ["RecipeCommand", "RecipeIn", "RecipeOut", "options_of", "values_of", "with_recipe", "write_recipe"]

# Of one machine or one run: a profile does not keep them, nor may one turn them on for who runs its recipe.
NOT_KEPT = {
    *("out", "work", "curves", "storage", "device", "device_map", "offload", "workers", "max_memory", "json"),
    *("resume", "overwrite", "force", "trust_remote_code"),
}
_OURS = {"recipe", "write_recipe"}
# What goes without each other: a flag takes the place of the keys beside it.
_EXCLUDES = {
    "--lengths": ("max_length", "min_length"),
    "--max-length": ("lengths",),
    "--min-length": ("lengths",),
    "--device": ("device_map",),
    "--device-map": ("device",),
}
_FLAGS = "xcalib.flags"


class RecipeCommand(TyperCommand):
    """A command that takes ``--recipe``: it remembers which flags were typed, before any of them is read."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click's."""
        ctx.meta[_FLAGS] = {argument.partition("=")[0] for argument in args}
        return super().parse_args(ctx, args)


def _parameters(command: Callable[..., Any]) -> dict[str, tuple[str, Any, ParameterInfo]]:
    """Long name with underscores -> the parameter's name, type and typer's description of it."""
    hints = get_type_hints(command, include_extras=True)
    found = {}
    for name in inspect.signature(command).parameters:
        kind, *rest = get_args(hints[name]) or (None,)
        info = next((item for item in rest if isinstance(item, ParameterInfo)), None)
        if info is None:  # typer's context
            continue
        # within Annotated the first name stands where a default would
        declared = [info.default, *(info.param_decls or ())] if isinstance(info, OptionInfo) else []
        named = [text for text in declared if isinstance(text, str) and text.startswith("--")]
        long = named[0].partition("/")[0] if named else name
        found[long.removeprefix("--").replace("-", "_")] = (name, kind, info)
    return {long: parameter for long, parameter in found.items() if long not in _OURS}


def options_of(command: Callable[..., Any]) -> "dict[str, Option]":
    """What a recipe of ``command`` may hold: its arguments and options, by long name with underscores."""
    from xcalib.recipe import Option

    return {
        long: Option(
            kind=_as_text(kind),
            many="list[" in str(kind),
            low=info.min,
            high=info.max,
            check=_plain(info.callback),
            stranger=_no_function if long in ("data", "heldout_data") else None,
            kept=long not in NOT_KEPT,
        )
        for long, (_, kind, info) in _parameters(command).items()
    }


def _plain(callback: Callable[[Any], Any] | None) -> Callable[[Any], object] | None:
    """An option's own check, with a ValueError for the usage error, whose text names a flag."""

    def check(value: Any) -> None:
        try:
            callback(value)  # type: ignore[misc]
        except typer.BadParameter as error:
            raise ValueError(error.message) from None

    return None if callback is None else check


def _no_function(specs: list[str]) -> None:
    from xcalib.data import recorded_specs

    recorded_specs(specs)


def _as_text(kind: Any) -> Any:
    """The type with text where it has a path."""
    if kind is Path:
        return str
    if get_origin(kind) in (Union, types.UnionType):
        return Union[tuple(_as_text(part) for part in get_args(kind))]  # noqa: UP007  # of a tuple
    return kind


def _command(context: typer.Context) -> Callable[..., Any]:
    """The function behind the command, with its annotations."""
    callback: Any = context.command.callback
    return inspect.unwrap(callback)


def _is_typed(context: typer.Context, key: str) -> bool:
    """Whether the option of this long name is among the flags, in any of its forms."""
    name = _parameters(_command(context))[key][0]
    forms = next(parameter.opts for parameter in context.command.params if parameter.name == name)
    short = tuple(form for form in forms if not form.startswith("--"))
    typed = context.meta.get(_FLAGS, set())
    return bool(typed & set(forms)) or any(bool(short) and flag.startswith(short) for flag in typed)


def _apply(context: typer.Context, file: Path | None) -> Path | None:
    """The recipe's values become the defaults of the command's options, which flags override."""
    if file is not None:
        from xcalib.recipe import read_recipe

        command = _command(context)
        parameters = _parameters(command)
        options = options_of(command)
        for key in ("data", "heldout_data"):  # a function that is named on the command line is the caller's own
            if key in options and _is_typed(context, key):
                options[key] = replace(options[key], stranger=None)
        values = read_recipe(file, options)
        for flag in context.meta.get(_FLAGS, set()) & _EXCLUDES.keys():
            for key in _EXCLUDES[flag]:
                values.pop(key, None)
        context.default_map = {parameters[key][0]: value for key, value in values.items()}
    return file


RecipeIn = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        callback=_apply,
        autocompletion=complete_profile,
        is_eager=True,  # before all that it gives defaults for
        help="Options from a YAML file, by their long names, or from a profile's recipe (docs/recipes.md); flags override it.",
    ),
]
RecipeOut = Annotated[
    Path | None,
    typer.Option("--write-recipe", metavar="FILE", help="Write the options in force to this file, and run nothing."),
]


def values_of(context: typer.Context) -> dict[str, Any]:
    """All options in force, by long name with underscores; those without a value are left out."""
    parameters = _parameters(_command(context))
    values = {long: context.params.get(name) for long, (name, _, _) in parameters.items()}
    return {long: value for long, value in values.items() if value is not None and value not in ([], ())}


def write_recipe(context: typer.Context, file: Path) -> None:
    """Write the options in force, whole or not at all.

    Raises:
        RecipeError: the file exists, or its folder does not.
    """
    if not speaks():  # of several ranks one writes
        return
    if not file.parent.is_dir():
        raise RecipeError(f"{file}: the folder {file.parent} does not exist")
    if file.exists():
        raise RecipeError(f"{file}: exists already; choose another file")
    from xcalib.recipe import recipe_text

    values = values_of(context)
    replace_file(file, recipe_text(values, f"xcalib {context.command.name} --recipe THIS_FILE").encode())
    console.print(
        f"wrote {file}, ran nothing; run it: xcalib {context.command.name} --recipe {file}",
        markup=False,
        soft_wrap=True,
    )
    if values.get("json"):
        print_json({"recipe": str(file)})


def with_recipe(profile: "Profile", values: Mapping[str, Any], *, from_curves: bool) -> "Profile":
    """The profile with the recipe that made it: of ``values``, what decides the result.

    What was left to a default that the command fills in later, and what given curves decide, is taken from the profile.
    """
    from xcalib.profile import make_profile

    kept = {key: value for key, value in values.items() if key not in NOT_KEPT}
    record = profile.calibration
    found: dict[str, Any] = {"model": profile.model.name, "data": list(record.sources)}
    if from_curves:
        kept |= {
            "num_samples": (record.samples + record.skipped) // len(profile.length_bins),
            "seed": record.seed,
        } | found
        kept |= {"skip_bad": True} if record.skipped else {}
        kept |= {"gain_samples": record.gain_samples} if record.gain_samples else {}
    kept = found | kept | {key: getattr(profile.method, key) for key in ("stride", "block_size", "pattern", "order")}
    lengths = record.lengths or (record.max_length,)
    if len(lengths) > 1:
        kept.pop("max_length", None)
        kept["lengths"] = ",".join(map(str, lengths))
    else:
        kept.pop("lengths", None)
        kept["max_length"] = lengths[0]
    return make_profile(**{**dict(profile), "recipe": kept})
