"""The commands."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import xcalib
from xcalib._lock import lock_file
from xcalib.cli import options as opt
from xcalib.cli.ablate import ablate
from xcalib.cli.bench import bench
from xcalib.cli.by_length import evaluation_by_length, report_curves
from xcalib.cli.by_task import task_table
from xcalib.cli.convert import convert
from xcalib.cli.demo import run_demo
from xcalib.cli.diff import diff
from xcalib.cli.output import by_layer_table, console, evaluation_table, print_json, progress, resumable
from xcalib.cli.plan import plan
from xcalib.cli.recipes import RecipeCommand, RecipeIn, RecipeOut, write_recipe
from xcalib.cli.refine import refine
from xcalib.cli.report import report
from xcalib.cli.search import search
from xcalib.cli.show import render_profile, unverified_points
from xcalib.cli.workers import Workers, joined, refuse_ranks
from xcalib.collect import collect_lengths
from xcalib.collect.skipping import refuse_skipping
from xcalib.collect.units import Units
from xcalib.data import pooled
from xcalib.errors import XcalibError
from xcalib.evaluation import evaluate_plans, plans_to_evaluate
from xcalib.profile import load_profile

__all__ = ["app"]

app = typer.Typer(
    help="Calibrated block sparse attention: measure every head, search the thresholds, ship one file.",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.command(epilog="Example: `xcalib ablate demo --table pattern --data builtin@2 --data ruler --out ablations`")(
    ablate
)
app.command(epilog="Example: `xcalib bench --suite hopper --out bench.json --png bench.png`")(bench)
app.command(epilog="Example: `xcalib convert TABLE.py --name llama_fuse_8 --model MODEL_FOLDER --out profile.yaml`")(
    convert
)
app.command(epilog="Example: `xcalib diff old.yaml new.yaml --point balanced`")(diff)
app.command(epilog="Example: `xcalib plan config.json --gpus 8 --samples 128 --max-length 131072 --price 4`")(plan)
app.command(
    cls=RecipeCommand,
    epilog="Example: `xcalib refine profile.yaml --curves xcalib-out/demo/curves --trials 40 --out refined.yaml`",
)(refine)
app.command(
    epilog="Example: `xcalib report profile.yaml --curves xcalib-out/demo/curves --out report.html --card CARD.md`"
)(report)
app.command(
    cls=RecipeCommand, epilog="Example: `xcalib search demo --data builtin --target density=0.25 --out demo.yaml`"
)(search)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"xcalib {xcalib.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version
    refuse_ranks(context.invoked_subcommand)


@app.command(cls=RecipeCommand, epilog="Example: `xcalib collect demo --data builtin --data ruler@0.5 --out curves/`")
def collect(
    context: typer.Context,
    model: opt.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the curves.")],
    data: opt.Data = None,
    num_samples: opt.NumSamples = 8,
    max_length: opt.MaxLength = None,
    lengths: opt.Lengths = None,
    min_length: opt.MinLength = None,
    seed: opt.Seed = 0,
    stride: opt.Stride = 16,
    block_size: opt.BlockSize = 128,
    pattern: opt.Pattern = "rows",
    order: opt.Order = "recent",
    gain_samples: opt.GainSamples = 2,
    measure: opt.Measures = None,
    max_memory: opt.MaxMemory = None,
    skip_bad: opt.SkipBad = False,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    offload: opt.Offload = False,
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.RemoteCode = False,
    workers: Workers = None,
    resume: opt.Resume = False,
    recipe: RecipeIn = None,
    recipe_out: RecipeOut = None,
    as_json: opt.Json = False,
) -> None:
    """Measure the curves of every head and the layer gains, and keep them for `xcalib search --curves`."""
    del recipe  # its values are in the options already
    if recipe_out is not None:
        write_recipe(context, recipe_out)
        return
    tokens = opt.chosen_lengths(lengths, max_length, min_length)
    settings = opt.collect_settings(stride, block_size, pattern, order, gain_samples, measure or ())
    limit = opt.memory_limit(max_memory, skip_bad, offload)
    with joined(workers) as ranks:
        refuse_skipping(skip_bad, ranks)
        with ranks.together():
            loaded = opt.open_model(model, device, dtype, trust_remote_code, device_map, offload, ranks)
            samples = opt.read_sets(
                data, loaded, tokens, num_samples=num_samples, min_length=min_length, seed=seed, split="calibration"
            )
        with resumable("run the same command with --resume"):
            sets = collect_lengths(
                loaded.model, samples, out, settings=settings, name=model, resume=resume, max_memory=limit, skip_bad=skip_bad,
                offload=offload, progress=progress, ranks=ranks,
            )  # fmt: skip
        report_curves(sets, out, as_json)


@app.command(epilog="Example: `xcalib evaluate demo --profile demo.yaml --uniform 0.9 --data builtin --json`")
def evaluate(
    model: opt.Model,
    profile: Annotated[Path | None, typer.Option("--profile", "-p", help="Profile to measure.")] = None,
    point: Annotated[str | None, typer.Option(help="One operating point; default all.")] = None,
    uniform: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="Measure a single tau the same way; may be repeated.")
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
    if profile is None and not uniform:
        raise typer.BadParameter("give --profile FILE, --uniform TAU, or both", param_hint="--profile")
    if resume and work is None:
        raise typer.BadParameter("needs --work FOLDER", param_hint="--resume")
    loaded_profile = load_profile(profile) if profile else None
    if loaded_profile is not None and point is not None:
        loaded_profile.point(point)
    record = loaded_profile.calibration if loaded_profile else None
    default = ((record.lengths or (record.max_length,)) if record and record.samples else None) or (opt.DEFAULT_LENGTH,)
    tokens = opt.chosen_lengths(lengths, max_length, min_length, default[-1:] if min_length else default)
    loaded = opt.open_model(model, device, dtype, trust_remote_code, device_map)
    plans = plans_to_evaluate(loaded.model, loaded_profile, point=point, uniform=uniform or ())
    sets = opt.read_sets(
        data or (list(record.sources) if record else None),
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


@app.command(epilog="Example: `xcalib validate profile.yaml other.yaml`")
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Profiles.")],
    as_json: opt.Json = False,
) -> None:
    """Check profiles: exit code 0 when all are valid, 2 with one line for each that is not; names unverified points."""
    verdicts: dict[str, str | None] = {}
    for file in files:
        try:
            profile = load_profile(file)
            verdicts[str(file)] = None
            console.print(f"{file}: valid{unverified_points(profile)}", markup=False, soft_wrap=True)
        except XcalibError as error:
            verdicts[str(file)] = str(error)
            console.print(f"error: {error}", markup=False, soft_wrap=True)
    if as_json:
        print_json(verdicts)
    if any(verdict is not None for verdict in verdicts.values()):
        raise typer.Exit(2)


@app.command(epilog="Example: `xcalib show profile.yaml --point fast`")
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A profile.")],
    point: Annotated[str | None, typer.Option(help="Operating point of the heatmap; default the profile's.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Summary of a profile and a heatmap of its thresholds, layers x heads."""
    profile = load_profile(file)
    if as_json:
        profile.point(point)
        print_json(json.loads(profile.model_dump_json()))
        return
    render_profile(profile, Console(highlight=False), point)


@app.command(epilog="Example: `xcalib demo`")
def demo(
    out: opt.FileOut = Path("xcalib-demo/profile.yaml"),
    seed: opt.Seed = 0,
    resume: opt.Resume = False,
    as_json: opt.Json = False,
) -> None:
    """The whole job on SmolLM2-135M: search, then prove on held-out text that the profile beats any single tau."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with resumable("run 'xcalib demo --resume'"), lock_file(out):
        result = run_demo(out, seed=seed, resume=resume)
    if as_json:
        print_json(result)
