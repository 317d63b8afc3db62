"""``xcalib convert``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from xcalib._files import replace_file
from xcalib.choices import PROFILE_SUFFIXES, TABLE_BLOCK_SIZE
from xcalib.cli import options as opt
from xcalib.cli.by_length import bin_name
from xcalib.cli.completion import complete_point
from xcalib.cli.output import console, print_json, quiet_libraries, status
from xcalib.errors import DataError

if TYPE_CHECKING:
    from xcalib.profile import Profile

__all__ = ["convert"]

Form = Literal["profile", "table", "config"]
_SUFFIXES: dict[Form, tuple[str, ...]] = {
    "profile": PROFILE_SUFFIXES,
    "table": (".json", ".py"),
    "config": (".json",),
}
_OPTIONS: dict[Form, tuple[str, ...]] = {
    "profile": ("name", "model", "stride", "block-size", "min-length", "point"),
    "table": ("name", "point", "length"),
    "config": ("point", "config", "other-config"),
}


def convert(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A threshold table (.py, .json), or a profile.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; for a table .json or .py.")],
    to: Annotated[
        Form, typer.Option(help="What to write: a profile from a table, or a profile as one of the others.")
    ] = "profile",
    name: Annotated[
        str | None, typer.Option(help="Table to read where FILE has several, or name of the one to write.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="To a profile: the model's folder, config.json or Hugging Face id, or a profile of it."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="To a profile: S, where the table's name does not end in it.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help=f"To a profile: B, 64 or 128; default {TABLE_BLOCK_SIZE}.")
    ] = None,
    min_length: Annotated[
        int | None, typer.Option(min=0, help="To a profile: keys below which attention stays dense; default 0.")
    ] = None,
    point: Annotated[
        str | None,
        typer.Option(help="Operating point to read (default the profile's) or to name.", autocompletion=complete_point),
    ] = None,
    length: Annotated[int | None, typer.Option(min=0, help="To a table: a key length in the bin to write.")] = None,
    config: Annotated[Path | None, typer.Option(help="To a config: the model's config.json, which is copied.")] = None,
    other_config: Annotated[
        bool, typer.Option("--other-config", help="To a config: take one of the same shape that is not the profile's.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace --out, or the copy's block, if it exists.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Thresholds from and for other tools: [layer][head] tables and a sparse_attention_config in a copy of config.json."""
    from xcalib.profile import load_profile

    given: dict[str, Any] = {
        "name": name,
        "model": model,
        "stride": stride,
        "block-size": block_size,
        "min-length": min_length,
    }
    given |= {"point": point, "length": length, "config": config, "other-config": other_config or None}
    _check_options(to, {key for key, value in given.items() if value is not None})
    _check_out(out, to, force, [source, *([config] if config else [])])
    if to == "profile":
        sizes = {
            "stride": stride,
            "block_size": TABLE_BLOCK_SIZE if block_size is None else block_size,
            "min_length": min_length or 0,
        }
        summary = _to_profile(source, out, name, str(model), point or "imported", sizes)
    elif source.suffix.lower() == ".py":
        raise DataError(f"{source}: is a Python file; --to {to} takes a profile")
    elif to == "table":
        summary = _to_table(load_profile(source), out, name, point, length)
    else:
        summary = _to_config(
            load_profile(source), out, Path(str(config)), point, replace=force, other_config=other_config
        )
    if as_json:
        print_json({"out": str(out), "to": to, **summary})


def _check_options(to: Form, given: set[str]) -> None:
    for option in sorted(given - set(_OPTIONS[to])):
        fits = " or ".join(form for form, options in _OPTIONS.items() if option in options)
        raise typer.BadParameter(f"goes with --to {fits}, not with --to {to}", param_hint=f"--{option}")
    if to == "profile" and "model" not in given:
        raise typer.BadParameter(
            "needed to know whose thresholds these are: the model's folder, config.json or Hugging Face id, or a profile of "
            "it (to convert a profile, give --to table or --to config)",
            param_hint="--model",
        )
    if to == "config" and "config" not in given:
        raise typer.BadParameter("needed: the model's config.json, which is copied", param_hint="--config")


def _check_out(out: Path, to: Form, force: bool, inputs: list[Path]) -> None:
    if out.suffix.lower() not in _SUFFIXES[to]:
        raise DataError(f"{out}: a {to} ends in {' or '.join(_SUFFIXES[to])}")
    if not out.parent.is_dir():
        raise DataError(f"{out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise DataError(f"{out}: is a folder")
    for path in inputs:
        file = path / "config.json" if path.is_dir() else path
        if out.exists() and file.exists() and out.samefile(file):
            raise DataError(f"{out}: is what is read; choose another file")
    if os.path.lexists(out) and not force:
        raise DataError(f"{out}: exists already; choose another file, or give --force")


def _to_profile(
    source: Path, out: Path, name: str | None, model: str, point: str, sizes: dict[str, int | None]
) -> dict[str, Any]:
    from xcalib.interop import model_identity, profile_from_table, read_table
    from xcalib.profile import save_profile

    if source.suffix.lower() in (".yaml", ".yml"):
        raise DataError(f"{source}: is a profile by its name: give --to table or --to config to export it")
    table = read_table(source, name)
    quiet_libraries()
    with status(f"Reading the config of {model}"):
        identity = model_identity(model)
    profile = profile_from_table(table, identity, point=point, **sizes)  # type: ignore[arg-type]  # None only for stride
    save_profile(profile, out)
    figures = _figures(profile, profile.points[0].thresholds[0])
    _report(out, table.name or "the table", figures)
    console.print(
        "imported and unverified: there is no calibration and no evidence; measure it with xcalib evaluate MODEL "
        f"--profile {out} --max-length TOKENS",
        markup=False,
        soft_wrap=True,
    )
    return {**figures, "table": table.name, "point": point, "verified": False, "content_sha256": profile.content_sha256}


def _to_table(profile: "Profile", out: Path, name: str | None, point: str | None, length: int | None) -> dict[str, Any]:
    from xcalib.interop import bin_for_length, table_name, table_text

    chosen = profile.point(point)
    index = bin_for_length(profile, length)
    rows, length_bin = chosen.thresholds[index], profile.length_bins[index]
    name = name or table_name(profile)
    replace_file(out, table_text(rows, name, python=out.suffix.lower() == ".py").encode())
    figures = _figures(profile, rows)
    several = f", {bin_name(length_bin)}" if len(profile.length_bins) > 1 else ""
    _report(out, f"{name}, point {chosen.name}{several}", figures)
    if length is not None and not length_bin.holds(length):
        console.print(
            f"note: {length:,} keys are beyond what these thresholds were measured for: {bin_name(length_bin)}"
        )
    if (profile.method.block_size, profile.method.pattern) != (TABLE_BLOCK_SIZE, "antidiagonal"):
        console.print(
            f"note: these hold for block {profile.method.block_size} and {profile.method.pattern}, which a table does not "
            f"say; the public implementation takes block {TABLE_BLOCK_SIZE} and antidiagonal",
            soft_wrap=True,
        )
    _note_order(profile, "which a table does not say")
    return {
        **figures,
        "table": name,
        "point": chosen.name,
        "length_bin": length_bin.model_dump(),
        "profile_sha256": profile.content_sha256,
    }


def _to_config(
    profile: "Profile", out: Path, config: Path, point: str | None, *, replace: bool, other_config: bool
) -> dict[str, Any]:
    from xcalib.interop import config_with_block

    quiet_libraries()
    with status(f"Reading {config}"):
        text = config_with_block(profile, config, point, replace=replace, other_config=other_config)
    replace_file(out, text.encode())
    chosen = profile.point(point)
    figures = _figures(profile, [row for rows in chosen.thresholds for row in rows])
    _report(out, f"sparse_attention_config, point {chosen.name}", figures)
    _note_order(profile, "as the block says")
    return {**figures, "config": str(config), "point": chosen.name, "profile_sha256": profile.content_sha256}


def _note_order(profile: "Profile", said: str) -> None:
    if profile.method.order != "score":
        console.print(
            f"note: these hold for the order of preference {profile.method.order!r}, {said}; the public implementation has "
            "'score' alone",
            soft_wrap=True,
        )


def _figures(profile: "Profile", rows: Any) -> dict[str, Any]:
    taus = [tau for row in rows for tau in row]
    return {
        "model": profile.model.name,
        "layers": profile.model.layers,
        "query_heads": profile.model.query_heads,
        **profile.method.model_dump(),
        "order": profile.method.order,
        "dense_layers": list(profile.dense_layers),
        "threshold": {"min": min(taus), "mean": sum(taus) / len(taus), "max": max(taus)},
    }


def _report(out: Path, what: str, figures: dict[str, Any]) -> None:
    tau = figures["threshold"]
    console.print(
        f"wrote {out}: {what}, {figures['layers']} layers x {figures['query_heads']} heads, stride {figures['stride']}, "
        f"tau {tau['min']:g} to {tau['max']:g}, mean {tau['mean']:.3f}",
        markup=False,
        soft_wrap=True,
    )
