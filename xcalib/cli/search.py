"""``xcalib search``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xcalib import choices
from xcalib.cli import options as opt
from xcalib.cli.completion import complete_data, complete_model, complete_target
from xcalib.cli.found import report_profile, reporting_misses
from xcalib.cli.output import console, progress, resumable
from xcalib.cli.recipes import RecipeIn, RecipeOut, values_of, with_recipe, write_recipe
from xcalib.cli.refine import refining
from xcalib.cli.workers import Workers, joined, speaks
from xcalib.errors import ModelError

if TYPE_CHECKING:
    from xcalib.collect import Curves
    from xcalib.collect.ranks import Ranks
    from xcalib.data import SampleSet
    from xcalib.profile import Profile

__all__ = ["search"]


def _check_targets(texts: list[str]) -> None:
    from xcalib.search import parse_targets

    parse_targets(texts)


def search(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help=opt.MODEL_HELP + " May be left out with --curves.", autocompletion=complete_model
        ),
    ] = None,
    out: opt.FileOut = Path("profile.yaml"),
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            metavar="[NAME:]KIND=VALUE",
            callback=opt.checked(_check_targets),
            autocompletion=complete_target,
            help="density=0.25, kl=0.01, drop=1% (task accuracy) or speedup=4. One unnamed target is the point 'balanced', with "
            "'fidelity' and 'fast' around it; several get the names given.",
        ),
    ] = None,
    data: opt.Data = None,
    heldout_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            callback=opt.checked(opt.check_specs),
            autocompletion=complete_data,
            help="Held-out data; default: other documents of --data.",
        ),
    ] = None,
    num_samples: opt.NumSamples = 8,
    heldout_samples: Annotated[int, typer.Option(min=0, help="Held-out samples; 0 leaves the evidence out.")] = 6,
    max_length: opt.MaxLength = None,
    lengths: opt.Lengths = None,
    min_length: opt.MinLength = None,
    seed: opt.Seed = 0,
    method: Annotated[choices.SearchMethod, typer.Option(help="paper is the published recurrence.")] = "knapsack",
    objective: Annotated[
        choices.Objective,
        typer.Option(
            help="gain: layer gain x output error; tempered: that to the power of 0.75; plain: output error; fisher: "
            "Fisher-weighted output error; mass: attention mass left out."
        ),
    ] = "tempered",
    start_threshold: Annotated[float, typer.Option(min=0.01, max=1, help="Of --method paper.")] = 0.9,
    stride: opt.Stride = 16,
    block_size: opt.BlockSize = 128,
    pattern: opt.Pattern = "rows",
    order: opt.Order = "recent",
    gain_samples: opt.GainSamples = 2,
    rounds: opt.Rounds = choices.DEFAULT_ROUNDS,
    curves: Annotated[Path | None, typer.Option(help="Use the curves of this folder instead of measuring.")] = None,
    refine_trials: Annotated[
        int,
        typer.Option(
            "--refine", metavar="N", min=0, help="Refine every point end to end with N trials (docs/refine.md)."
        ),
    ] = 0,
    work: Annotated[
        Path | None, typer.Option(help="Folder for curves and unfinished work; default xcalib-out/MODEL.")
    ] = None,
    max_memory: opt.MaxMemory = None,
    skip_bad: opt.SkipBad = False,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    offload: opt.Offload = False,
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.RemoteCode = False,
    workers: Workers = None,
    resume: opt.Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it exists.")] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Write the profile although a target is missed on held-out data, marked unverified."
        ),
    ] = False,
    recipe: RecipeIn = None,
    recipe_out: RecipeOut = None,
    as_json: opt.Json = False,
) -> None:
    """Measure MODEL, find the thresholds of every head, and write a profile with held-out evidence.

    Exit code 3, and no file, when held-out data say that a target is missed; 2 for bad input.
    """
    del recipe  # its values are in the options already
    if recipe_out is not None:
        write_recipe(context, recipe_out)
        return
    from xcalib.collect.skipping import refuse_skipping
    from xcalib.data import pooled
    from xcalib.profile import save_profile
    from xcalib.search import search as search_model

    if speaks():
        opt.check_output(out, overwrite)
    limit = opt.memory_limit(max_memory, skip_bad, offload)
    tokens = opt.chosen_lengths(lengths, max_length, min_length)
    settings = opt.collect_settings(stride, block_size, pattern, order, gain_samples)
    _check_model(model, curves, refine_trials)
    made = partial(with_recipe, values=values_of(context), from_curves=curves is not None)
    chosen: dict[str, Any] = {"method": method, "objective": objective, "start_threshold": start_threshold}
    with joined(workers) as ranks:
        _check_shared(model, refine_trials, ranks)
        refuse_skipping(skip_bad, ranks)
        with ranks.together():
            if ranks.leader:  # not the launcher of --workers, which would hold it against its own rank 0
                context.call_on_close(opt.take_output(out, overwrite).close)
            measured = _curves(curves, objective) if curves else None
            if measured is not None:
                tokens = opt.lengths_of_curves(measured, tokens, given=bool(lengths or max_length))
        if model is None:
            profile = made(_from_curves(measured, target, chosen))
            save_profile(profile, out)
            report_profile(profile, out, as_json)
            _say_without_rounds(rounds, method, measured, ())  # at the end: what goes wrong gives one line, its own
            return
        with ranks.together():
            loaded = opt.open_model(model, device, dtype, trust_remote_code, device_map, offload, ranks)
            if measured is not None:
                _same_model(measured[0].model, loaded)
            how: dict[str, Any] = {"min_length": min_length, "seed": seed}
            samples = opt.read_sets(data, loaded, tokens, num_samples=num_samples, split="calibration", **how)
            used = [one.calibration["documents"] for one in measured] if measured else [pooled(samples).documents]
            exclude = tuple(sorted(set().union(*used)))
            folder = opt.work_folder(model, work)
            adjust, heldout = None, None
            if refine_trials:
                adjust, exclude = refining(
                    loaded, data, samples, exclude, trials=refine_trials, folder=folder, resume=resume, lengths=tokens, **how
                )  # fmt: skip
            if heldout_samples:
                how |= {"num_samples": heldout_samples, "split": "heldout", "exclude": exclude}
                heldout = pooled(opt.read_sets(heldout_data or data, loaded, tokens, **how))
        with resumable("run the same command with --resume"), reporting_misses(out, as_json):
            profile = search_model(
                loaded.model, samples, target=target or (), tokenizer=loaded.tokenizer, heldout=heldout, settings=settings,
                rounds=rounds, curves=measured, folder=folder, name=model, resume=resume, force=force, adjust=adjust,
                save=lambda found: save_profile(made(found), out), max_memory=limit, skip_bad=skip_bad, offload=offload,
                progress=progress, ranks=ranks, **chosen,
            )  # fmt: skip
        _say_without_rounds(rounds, method, measured, samples)
        if ranks.leader:
            report_profile(made(profile), out, as_json)


def _curves(folder: Path, objective: choices.Objective) -> "Sequence[Curves]":
    """Measured curves that the objective can be read off: that is known before the model is loaded."""
    from xcalib.collect import load_curve_sets
    from xcalib.search import require_measured

    measured = load_curve_sets(folder)
    for one in measured:
        require_measured(one, objective)
    return measured


def _from_curves(measured: "Sequence[Curves] | None", target: list[str] | None, chosen: dict[str, Any]) -> "Profile":
    from xcalib.search import build_profile, parse_targets

    assert measured is not None  # _check_model has seen to it
    return build_profile(measured, parse_targets(target or []), **chosen)


def _check_model(model: str | None, curves: Path | None, refine_trials: int) -> None:
    """Refuse what cannot be done without MODEL."""
    if model is None and curves is None:
        raise typer.BadParameter("give MODEL, or --curves FOLDER", param_hint="MODEL")
    if model is None and refine_trials:
        raise typer.BadParameter("needs MODEL: trials run it", param_hint="--refine")


def _check_shared(model: str | None, refine_trials: int, ranks: "Ranks") -> None:
    """Refuse what ranks cannot share."""
    if ranks.size > 1 and model is None:
        raise typer.BadParameter("needs MODEL: without it there is nothing to share out", param_hint="--workers")
    if ranks.size > 1 and refine_trials:
        raise typer.BadParameter(
            "goes without --workers and torchrun: search first, then run xcalib refine, which has workers of its own",
            param_hint="--refine",
        )


def _same_model(identity: dict[str, Any], loaded: Any) -> None:
    from xcalib.models.structure import describe_model

    found = describe_model(loaded.model, loaded.name).config_sha256
    if found != identity.get("config_sha256"):
        raise ModelError(
            f"the curves are of {identity.get('name')!r} ({identity.get('model_type')}), not of {loaded.name!r}"
        )


def _say_without_rounds(
    rounds: int, method: choices.SearchMethod, measured: "Sequence[Curves] | None", sets: "Sequence[SampleSet]"
) -> None:
    """Rounds are asked for by default: say so where they are left out."""
    from xcalib.search.rounds import are_measured_on

    if measured is None or not rounds or method != "knapsack" or (sets and are_measured_on(measured, sets)):
        return
    why = "these samples are not those of the curves" if sets else "they run MODEL"
    console.print(f"no rounds after the first search: {why}", markup=False, soft_wrap=True)
