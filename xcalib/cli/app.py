"""The commands, registered. Their modules import nothing heavy: ``xcalib --help`` and completion answer at once."""

from pathlib import Path
from typing import Annotated

import typer

import xcalib
from xcalib._lock import lock_file
from xcalib.cli import options as opt
from xcalib.cli.ablate import ablate
from xcalib.cli.bench import bench
from xcalib.cli.collect import collect
from xcalib.cli.convert import convert
from xcalib.cli.diff import diff
from xcalib.cli.doctor import doctor
from xcalib.cli.evaluate import evaluate
from xcalib.cli.inspect import inspect
from xcalib.cli.output import print_json, resumable
from xcalib.cli.plan import plan
from xcalib.cli.profiles import profiles
from xcalib.cli.recipes import RecipeCommand
from xcalib.cli.refine import refine
from xcalib.cli.report import report
from xcalib.cli.search import search
from xcalib.cli.show import show
from xcalib.cli.validate import validate
from xcalib.cli.workers import refuse_ranks

__all__ = ["app"]

app = typer.Typer(
    help="Calibrated block sparse attention: measure every head, search the thresholds, ship one file.",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

# In the order in which they are met: before, during and after a calibration, and tools.
app.command(epilog="Example: `xcalib doctor demo`")(doctor)
app.command(epilog="Example: `xcalib inspect Qwen/Qwen3-0.6B`")(inspect)
app.command(epilog="Example: `xcalib plan config.json --gpus 8 --samples 128 --max-length 131072 --price 4`")(plan)
app.command(
    cls=RecipeCommand, epilog="Example: `xcalib search demo --data builtin --target density=0.25 --out demo.yaml`"
)(search)
app.command(cls=RecipeCommand, epilog="Example: `xcalib collect demo --data builtin --data ruler@0.5 --out curves/`")(
    collect
)
app.command(
    cls=RecipeCommand,
    epilog="Example: `xcalib refine profile.yaml --curves xcalib-out/demo/curves --trials 40 --out refined.yaml`",
)(refine)
app.command(epilog="Example: `xcalib evaluate demo --profile demo.yaml --uniform 0.9 --data builtin --json`")(evaluate)
app.command(epilog="Example: `xcalib show profile.yaml --point fast`")(show)
app.command(
    epilog="Example: `xcalib report profile.yaml --curves xcalib-out/demo/curves --out report.html --card CARD.md`"
)(report)
app.command(epilog="Example: `xcalib diff old.yaml new.yaml --point balanced`")(diff)
app.command(epilog="Example: `xcalib profiles`")(profiles)
app.command(epilog="Example: `xcalib validate profile.yaml other.yaml`")(validate)
app.command(epilog="Example: `xcalib convert TABLE.py --name llama_fuse_8 --model MODEL_FOLDER --out profile.yaml`")(
    convert
)
app.command(epilog="Example: `xcalib ablate demo --table pattern --data builtin@2 --data ruler --out ablations`")(
    ablate
)
app.command(epilog="Example: `xcalib bench --suite hopper --out bench.json --png bench.png`")(bench)


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


@app.command(epilog="Example: `xcalib demo`")
def demo(
    out: opt.FileOut = Path("xcalib-demo/profile.yaml"),
    seed: opt.Seed = 0,
    resume: opt.Resume = False,
    as_json: opt.Json = False,
) -> None:
    """The whole job on SmolLM2-135M: search, then prove on held-out text that the profile beats any single tau."""
    from xcalib.cli.demo import run_demo

    out.parent.mkdir(parents=True, exist_ok=True)
    with resumable("run 'xcalib demo --resume'"), lock_file(out):
        result = run_demo(out, seed=seed, resume=resume)
    if as_json:
        print_json(result)
