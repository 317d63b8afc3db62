"""``xcalib refine``, and what ``xcalib search --refine`` adds to a search."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from xcalib import choices
from xcalib.cli import options as opt
from xcalib.cli.by_length import bin_name
from xcalib.cli.completion import complete_model, complete_point, complete_profile
from xcalib.cli.found import reporting_misses
from xcalib.cli.output import console, print_json, progress, resumable
from xcalib.cli.recipes import RecipeIn, RecipeOut, write_recipe
from xcalib.errors import CurvesError, DataError

if TYPE_CHECKING:
    from xcalib.collect import Curves
    from xcalib.collect.units import Units
    from xcalib.data import SampleSet
    from xcalib.evaluation import Evaluation
    from xcalib.models.loading import LoadedModel
    from xcalib.profile import Profile
    from xcalib.search import Refinement

__all__ = ["refine", "refining"]

JOURNAL = "refine.journal"
VALIDATION_SAMPLES = 8


def refine(
    context: typer.Context,
    profile: Annotated[
        Path,
        typer.Argument(metavar="PROFILE", help="A profile that `xcalib search` made.", autocompletion=complete_profile),
    ],
    curves: Annotated[
        Path | None, typer.Option(help="The curves that it was searched on; default those in the --work folder.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help=opt.MODEL_HELP + " Default the profile's.", autocompletion=complete_model),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Profile to write (.yaml or .json).")] = Path("refined.yaml"),
    point: Annotated[
        str | None,
        typer.Option(help="Operating point to refine; default the profile's.", autocompletion=complete_point),
    ] = None,
    trials: Annotated[
        int, typer.Option("--trials", "-n", min=1, help="Finished trials in all, over all workers and earlier runs.")
    ] = choices.DEFAULT_TRIALS,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="journal:PATH, or a database such as sqlite:///study.db or postgresql://user@host/name; default a journal in "
            "the --work folder. The same command run again with the same --storage is a second worker on the same trials.",
        ),
    ] = None,
    data: opt.Data = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples that the trials measure.")] = 8,
    validation_samples: Annotated[
        int, typer.Option(min=2, help="Samples that decide whether anything is better; no trial sees them.")
    ] = VALIDATION_SAMPLES,
    heldout_samples: Annotated[int, typer.Option(min=0, help="Held-out samples; 0 leaves the evidence out.")] = 6,
    max_length: Annotated[
        int | None, typer.Option(min=64, help="Tokens of the longest sample; default the calibration's.")
    ] = None,
    min_length: opt.MinLength = None,
    groups: Annotated[
        int, typer.Option(min=1, max=24, help="Groups of layers, one dimension each.")
    ] = choices.DEFAULT_GROUPS,
    price_range: Annotated[
        float, typer.Option("--range", min=0.01, max=10, help="Largest shift of the log price of a block.")
    ] = choices.DEFAULT_RANGE,
    length_bin: Annotated[int, typer.Option("--bin", min=0, help="Length bin to refine, counted from 0.")] = 0,
    seed: opt.Seed = 0,
    work: Annotated[
        Path | None, typer.Option(help="Folder with the curves and the journal; default xcalib-out/MODEL.")
    ] = None,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.RemoteCode = False,
    resume: opt.Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it exists.")] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Write the profile although the refined point misses its target on held-out data."
        ),
    ] = False,
    recipe: RecipeIn = None,
    recipe_out: RecipeOut = None,
    as_json: opt.Json = False,
) -> None:
    """Try shifts around an operating point end to end, and keep the best only if samples that no trial saw confirm it.

    The profile that is written is the given one where there was no gain. Several workers may share the trials: run the same
    command again, on this or another machine, with the same --storage.
    """
    del recipe  # its values are in the options already
    if recipe_out is not None:
        write_recipe(context, recipe_out)
        return
    from xcalib.data import pooled, recorded_specs
    from xcalib.profile import load_profile, save_profile
    from xcalib.search import refine_point

    context.call_on_close(opt.take_output(out, overwrite).close)
    start = load_profile(profile)
    chosen = start.point(point)
    name = model or start.model.name
    folder = opt.work_folder(name, work)
    measured = _curves_of(start, length_bin, curves or folder / "curves")
    record = start.calibration
    specs = data or recorded_specs(record.sources)
    loaded = opt.open_model(name, device, dtype, trust_remote_code, device_map)
    every = (max_length,) if max_length else (record.lengths or (record.max_length,))
    own = every[length_bin] if len(every) > 1 else every[0]
    lengths: dict[str, Any] = {"max_length": own, "min_length": min_length}
    used = tuple(record.documents)
    # another seed than the calibration's: other windows of its documents. Validation takes its documents first, new ones.
    drawn: dict[str, Any] = {"split": "calibration", "seed": seed + 1, **lengths}
    validation = opt.read_samples(specs, loaded, num_samples=validation_samples, exclude=used, **drawn)
    chosen_documents = tuple(sorted(validation.documents))
    refined_on = opt.read_samples(specs, loaded, num_samples=samples, exclude=chosen_documents, **drawn)
    heldout = None
    if heldout_samples:
        used = (*used, *chosen_documents, *sorted(refined_on.documents))
        how: dict[str, Any] = {"num_samples": heldout_samples, "split": "heldout", "seed": seed, "exclude": used}
        heldout = pooled(
            opt.read_sets(specs, loaded, every, min_length=min_length, **how)
        )  # of all bins: so is the target
    where = storage or _journal(folder)
    go_on = "run the same command again" if storage else "run the same command with --resume"
    with resumable(go_on, "trials"), reporting_misses(out, as_json):
        result = refine_point(
            loaded.model, start, measured, refined_on, validation, point=chosen.name, trials=trials, groups=groups,
            price_range=price_range, seed=seed, bin_index=length_bin, storage=where,
            resume=True if resume else (None if storage else False), progress=progress,
        )  # fmt: skip
        units = None
        if heldout is not None and result.improved:
            units = _evidence_units(folder, result, heldout, out)
        final, evaluation = _with_evidence(loaded, start, result, heldout, force, units)
        save_profile(final, out)
        if units is not None:
            units.remove()
    _report(result, evaluation)
    console.print(f"wrote {out}{'' if result.improved else ', unchanged'}", markup=False, soft_wrap=True)
    if as_json:
        found = None if evaluation is None else evaluation.to_dict()
        print_json({"profile": str(out), **result.to_dict(), "heldout": found})


def _curves_of(profile: "Profile", length_bin: int, folder: Path) -> "Curves":
    """The curves of one length bin, from a folder with those of all bins or of this one alone."""
    from xcalib.collect import load_curve_sets

    bins = len(profile.length_bins)
    if length_bin >= bins:
        raise typer.BadParameter(f"is {length_bin}, the profile has {bins} length bins, from 0", param_hint="--bin")
    sets = load_curve_sets(folder)
    if len(sets) not in (1, bins):
        raise CurvesError(f"{folder}: has curves of {len(sets)} lengths, the profile has {bins} length bins")
    return sets[length_bin] if len(sets) > 1 else sets[0]


def _journal(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror or error}") from error
    return f"journal:{folder.absolute() / JOURNAL}"


def _evidence_units(folder: Path, result: "Refinement", heldout: "SampleSet", out: Path) -> "Units":
    """Where finished held-out samples are kept; each of several workers, who write files of their own, keeps its own."""
    from xcalib.collect.shares import stamped_units

    identity = {
        "profile": result.profile.content_sha256,
        "point": result.point,
        "data": heldout.tokens_sha256,
        "questions": heldout.questions_sha256,
        "out": str(out.absolute()),
    }
    return stamped_units(folder / "heldout", identity)


def _with_evidence(
    loaded: "LoadedModel",
    start: "Profile",
    result: "Refinement",
    heldout: "SampleSet | None",
    force: bool,
    units: "Units | None",
) -> "tuple[Profile, Evaluation | None]":
    """The refined point measured on held-out samples beside its start, and through the ship gate as after a search."""
    from xcalib.evaluation import evaluate_plans
    from xcalib.profile import make_profile
    from xcalib.runtime import sparse_plan
    from xcalib.search.evidence import with_evidence
    from xcalib.search.gate import enforce

    profile = result.profile
    if heldout is None or not result.improved:
        return profile, None
    plans = {
        result.point: sparse_plan(profile, result.point),
        f"{result.point} before": sparse_plan(start, result.point),
    }
    found = evaluate_plans(loaded.model, heldout, plans, tokenizer=loaded.tokenizer, units=units, progress=progress)
    profile = with_evidence(profile, found)
    refined = profile.point(result.point)
    enforce(make_profile(**{**dict(profile), "points": (refined,), "default_point": refined.name}), force=force)
    return profile, found


def refining(
    loaded: "LoadedModel",
    data: list[str] | None,
    sets: "Sequence[SampleSet]",
    used: tuple[str, ...],
    *,
    trials: int,
    folder: Path,
    resume: bool,
    seed: int,
    lengths: tuple[int, ...],
    min_length: int | None,
) -> "tuple[Callable[[Profile, Sequence[Curves]], Profile], tuple[str, ...]]":
    """What ``search`` runs on the profile before its held-out evidence, and the documents that no held-out sample may use.

    The trials measure the calibration samples; validation samples come from other documents of the same data. Each length bin
    is refined by itself.
    """
    from xcalib.collect.skipping import kept_samples
    from xcalib.search import refine_point

    exclude = tuple(sorted(set(used).union(*(samples.documents for samples in sets))))
    validation = opt.read_sets(
        data, loaded, lengths, num_samples=VALIDATION_SAMPLES, split="calibration", exclude=exclude, seed=seed,
        min_length=min_length,
    )  # fmt: skip
    where = _journal(folder)

    def adjust(profile: "Profile", measured: "Sequence[Curves]") -> "Profile":
        for point in profile.points:
            for index, (curves, given, judges) in enumerate(zip(measured, sets, validation, strict=True)):
                samples = kept_samples(given, curves)  # --skip-bad may have left some out
                if len(measured) > 1:
                    console.print(f"{point.name}, {bin_name(profile.length_bins[index])}:")
                result = refine_point(
                    loaded.model, profile, curves, samples, judges, point=point.name, trials=trials, seed=seed,
                    bin_index=index, storage=where, resume=None if resume else False, progress=progress,
                )  # fmt: skip
                _report(result, None)
                profile = result.profile
        return profile

    return adjust, (*exclude, *sorted({digest for judges in validation for digest in judges.documents}))


def _report(result: "Refinement", evaluation: "Evaluation | None") -> None:
    rows = _rows(result, evaluation)
    if rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), caption_justify="left")
        table.add_column("samples")
        for column in (
            "KL\nstart",
            "KL\nbest",
            "density\nstart",
            "density\nbest",
            f"{_NAMES[result.least]}\nratio",
            "paired\ninterval",
        ):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        table.caption = f"best: trial {result.trial}; KL in nats per token; ratio: to the start's"
        console.print(table)
    if result.shifts:
        shifts = ", ".join(f"{name} {shift:+.2f}" for name, shift in result.shifts.items())
        console.print(f"its shifts of the log price of a block: {shifts}", markup=False, soft_wrap=True)
    counts = ", ".join(f"{count} {state}" for state, count in result.trials.items())
    console.print(f"trials: {counts}; study {result.study!r}", markup=False, soft_wrap=True)
    console.print(result.text, markup=False, soft_wrap=True)


_NAMES = {"kl": "KL", "density": "blocks"}


def _rows(result: "Refinement", evaluation: "Evaluation | None") -> list[list[str]]:
    rows = []
    for label, found in (("refinement", result.refinement), ("validation", result.validation)):
        if found is not None:
            rows.append([f"{label} ({found.samples})", *_cells(found.kl, found.density, found.ratio, found.interval)])
    if evaluation is not None:
        after, before = evaluation.plan(result.point), evaluation.plan(f"{result.point} before")
        kl, density = (before.kl, after.kl), (before.density, after.density)
        first, last = kl if result.least == "kl" else density
        rows.append([f"held out ({evaluation.samples})", *_cells(kl, density, last / first if first else 1.0, None)])
    return rows


def _cells(
    kl: tuple[float, float], density: tuple[float, float], ratio: float, interval: tuple[float, float] | None
) -> list[str]:
    ends = "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    return [*(f"{value:.4f}" for value in kl), *(f"{value:.2%}" for value in density), f"{ratio:.3f}", ends]
