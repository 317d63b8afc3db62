"""``xcalib evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from xcalib.cli import options as opt
from xcalib.cli.by_length import evaluation_by_length
from xcalib.cli.by_task import task_table
from xcalib.cli.completion import complete_point, complete_profile
from xcalib.cli.output import by_layer_table, console, evaluation_table, print_json, progress, resumable

__all__ = ["evaluate"]


def evaluate(
    model: opt.Model,
    profile: Annotated[
        Path | None, typer.Option("--profile", "-p", help="Profile to measure.", autocompletion=complete_profile)
    ] = None,
    point: Annotated[
        str | None, typer.Option(help="One operating point; default all.", autocompletion=complete_point)
    ] = None,
    uniform: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="Measure a single tau the same way; may be repeated.")
    ] = None,
    published: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            metavar="TAU",
            help="Measure a single tau by the published rule (antidiagonal, order by score), whatever the profile's.",
        ),
    ] = None,
    data: opt.Data = None,
    num_samples: Annotated[
        int | None,
        typer.Option(min=1, help="Samples, shared out among the data; default 6, or all that --limit lets through."),
    ] = None,
    limit: opt.Limit = None,
    max_length: Annotated[
        int | None, typer.Option(min=64, help="Tokens of the longest sample; default the calibration's.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS,...",
            help="Several lengths, as 1k,2k,4k: --num-samples of each, and a table by length; default the calibration's.",
        ),
    ] = None,
    min_length: opt.MinLength = None,
    seed: opt.Seed = 0,
    work: Annotated[Path | None, typer.Option(help="Keep finished samples in this folder, for --resume.")] = None,
    skip_bad: opt.SkipBad = False,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.RemoteCode = False,
    resume: opt.Resume = False,
    as_json: opt.Json = False,
) -> None:
    """Compare MODEL attending sparsely with itself attending densely, on documents that calibration never saw."""
    if profile is None and not uniform and not published:
        raise typer.BadParameter(
            "give --profile FILE, --uniform TAU, --published TAU, or several", param_hint="--profile"
        )
    if resume and work is None:
        raise typer.BadParameter("needs --work FOLDER", param_hint="--resume")
    from xcalib.collect.units import Units
    from xcalib.data import pooled, recorded_specs
    from xcalib.evaluation import evaluate_plans, plans_to_evaluate
    from xcalib.profile import load_profile

    loaded_profile = load_profile(profile) if profile else None
    if loaded_profile is not None and point is not None:
        loaded_profile.point(point)
    record = loaded_profile.calibration if loaded_profile else None
    default = ((record.lengths or (record.max_length,)) if record and record.samples else None) or (opt.DEFAULT_LENGTH,)
    tokens = opt.chosen_lengths(lengths, max_length, min_length, default[-1:] if min_length else default)
    loaded = opt.open_model(model, device, dtype, trust_remote_code, device_map)
    plans = plans_to_evaluate(
        loaded.model, loaded_profile, point=point, uniform=uniform or (), published=published or ()
    )
    specs = data or (recorded_specs(record.sources) if record else None)
    sets = opt.read_sets(
        specs,
        loaded,
        tokens,
        num_samples=num_samples or (None if limit else 6),
        limit=limit,
        min_length=min_length,
        seed=seed,
        split="heldout",
        exclude=record.documents if record else (),
    )
    samples = pooled(sets)
    units = None
    if work is not None:
        identity = {
            "plans": {k: v.record() for k, v in plans.items()},
            "data": samples.tokens_sha256,
            "questions": samples.questions_sha256,
            "model": model,
        }
        units = Units(work, identity, resume=resume)
    with resumable("run the same command with --resume" if work else "give --work FOLDER to be able to --resume"):
        found = evaluate_plans(
            loaded.model, samples, plans, tokenizer=loaded.tokenizer, lengths=tokens, units=units, skip_bad=skip_bad,
            progress=progress,
        )  # fmt: skip
    console.print(evaluation_table(found, f"{model}: dense against sparse, held out"))
    if found.by_length:
        console.print(evaluation_by_length(found))
    if found.tasks:
        console.print(task_table(found))
    console.print(by_layer_table(found))
    if as_json:
        print_json(found.to_dict())
