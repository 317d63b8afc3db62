"""``xcalib report``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xcalib.cli import options as opt
from xcalib.cli.completion import complete_data, complete_model, complete_profile
from xcalib.cli.output import console, print_json, status
from xcalib.errors import DataError, ReportError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xcalib.profile import Profile
    from xcalib.report import Inputs

__all__ = ["report"]


def report(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile.", autocompletion=complete_profile)],
    curves: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the curves that it was searched on.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.json", help="What `xcalib evaluate --json` or `xcalib demo --json` printed; may be repeated."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help=f"{opt.MODEL_HELP} Runs one sample, for pictures of what heads keep.",
            autocompletion=complete_model,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            metavar="SPEC",
            help="With --model: the sample's data; default the profile's calibration data.",
            autocompletion=complete_data,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page, one HTML file.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the charts as PNG files.")] = None,
    card: Annotated[Path | None, typer.Option(metavar="FILE.md", help="A Markdown card for a model page.")] = None,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.RemoteCode = False,
    as_json: opt.Json = False,
) -> None:
    """One HTML page about PROFILE that works offline: verdicts, heatmaps, density against KL, curves, evidence.

    Files that exist are replaced. The page needs the extra `report`.
    """
    from xcalib.report import require_libraries, summarise, write_card, write_page, write_pngs

    require_libraries()
    _check_outputs(out, png, card)
    inputs = _read(profile, curves, evaluation or ())
    attention = () if model is None else _attention(inputs.profile, model, data, device, dtype, trust_remote_code)
    with status("Drawing the report"):
        made = summarise(inputs, attention)
        written = write_page(made, out)
        pictures = [] if png is None else write_pngs(made, png)
        if card is not None:
            write_card(made, card, profile.name)
    console.print(f"wrote {out} ({written / 1000:,.0f} kB)", markup=False, soft_wrap=True)
    for path in [*pictures, *filter(None, [card])]:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    if as_json:
        result: dict[str, Any] = {"report": str(out), "bytes": written, "png": [str(path) for path in pictures]}
        result |= {"card": None if card is None else str(card), "missing": made.missing}
        print_json(result | {"points": {row.name: row.outcome for row in made.points}, "front": made.line_rows})


def _read(profile: Path, curves: Path | None, evaluations: "Sequence[Path]") -> "Inputs":
    """The profile and what is given beside it, checked to belong together."""
    from xcalib.collect import load_curve_sets
    from xcalib.profile import load_profile
    from xcalib.report import Inputs, check_curves, read_evaluation

    loaded = load_profile(profile)
    measured = () if curves is None else check_curves(loaded, load_curve_sets(curves), str(curves))
    return Inputs(loaded, measured, tuple(read_evaluation(path, loaded) for path in evaluations))


def _check_outputs(out: Path, png: Path | None, card: Path | None) -> None:
    for path, suffixes in ((out, (".html", ".htm")), (card, (".md",))):
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            raise ReportError(f"{path}: expected a name that ends in {suffixes[0]}")
        if not path.parent.is_dir():
            raise ReportError(f"{path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise ReportError(f"{path}: is a folder")
    if png is not None and png.exists() and not png.is_dir():
        raise ReportError(f"{png}: is not a folder")


def _attention(
    profile: "Profile", name: str, data: list[str] | None, device: str | None, dtype: str, trust_remote_code: bool
) -> Any:
    """Pictures from the first held-out sample of ``data``, None for the kind that the profile was calibrated on."""
    from xcalib.data import load_samples, recorded_specs
    from xcalib.report import attention_pictures
    from xcalib.runtime import check_fits

    record = profile.calibration
    if not (data or record.sources) or not record.samples:
        raise ReportError("--model: the profile has no record of calibration data to run a sample of")
    specs = data or recorded_specs(record.sources)
    loaded = opt.open_model(name, device, dtype, trust_remote_code)
    check_fits(loaded.model, profile)
    with status("Looking at attention"):
        try:
            samples = load_samples(
                specs, loaded.tokenizer, num_samples=len(specs), max_length=record.max_length,
                seed=record.seed, split="heldout", exclude=record.documents,
            )  # fmt: skip
        except DataError as error:
            raise DataError(f"--model: no sample of the profile's calibration data: {error}") from error
        return attention_pictures(loaded.model, profile, samples.samples[0])
