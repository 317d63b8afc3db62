"""``xcalib plan``."""

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from xcalib import choices
from xcalib._files import replace_file
from xcalib.cli import options as opt
from xcalib.cli.completion import complete_config
from xcalib.cli.output import console, print_json, progress, quiet_libraries, short_count, status
from xcalib.errors import PlanError

if TYPE_CHECKING:
    from xcalib.plan import CalibrationPlan, Machine

__all__ = ["plan"]


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help=opt.MODEL_HELP + " Or a config.json alone; no weights are loaded.",
            autocompletion=complete_config,
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices; on a CPU processes of one thread.")] = 1,
    num_samples: Annotated[int, typer.Option("--samples", "--num-samples", min=1, help="Calibration samples.")] = 8,
    max_length: opt.MaxLength = None,
    lengths: opt.Lengths = None,
    stride: opt.Stride = 16,
    block_size: opt.BlockSize = 128,
    gain_samples: opt.GainSamples = 2,
    rounds: opt.Rounds = 2,
    density: Annotated[
        list[float] | None,
        typer.Option(min=0.001, max=0.999, help="Of an operating point; may be repeated. Default .45, .33 and .22."),
    ] = None,
    heldout_samples: Annotated[int, typer.Option(min=0, help="Held-out samples; 0 leaves the evidence out.")] = 6,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16, of the weights; default that of the rates.")
    ] = None,
    shard: Annotated[
        choices.Sharding,
        typer.Option(
            help="How a model that one device cannot hold is spread: by layers (a device map, one device works at a time), by "
            "heads (tensor parallel), or whichever fits on fewer and takes less time."
        ),
    ] = "auto",
    machine: Annotated[
        str, typer.Option(metavar="cpu|h200|FILE.json", help="Whose rates; --measure writes a file.")
    ] = "h200",
    price: Annotated[float | None, typer.Option(min=0, help="US dollars for one device for an hour.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time small layers on this machine and write its rates to --out.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Machine file that --measure writes.")] = Path(
        "machine.json"
    ),
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Time, memory, disk and cost of a calibration, before anything runs."""
    from xcalib.plan import Job, load_machine, plan_calibration, read_shape
    from xcalib.plan.steps import DENSITIES

    if measure:
        found = _measured(out, device, dtype)
        if model is None:
            if as_json:
                print_json(found.record())
            return
    elif model is None:
        raise typer.BadParameter("give MODEL, or --measure", param_hint="MODEL")
    else:
        found = load_machine(machine)
    opt.collect_settings(stride, block_size, "antidiagonal", "recent", gain_samples)  # checks what they may be
    job = Job(
        lengths=opt.chosen_lengths(lengths, max_length, None),
        samples=num_samples,
        stride=stride,
        block_size=block_size,
        gain_samples=gain_samples,
        rounds=rounds,
        heldout=heldout_samples,
        densities=tuple(density or DENSITIES),
    )
    quiet_libraries()
    with status(f"Reading the configuration of {model}"):
        shape = read_shape(model)
    made = plan_calibration(shape, job, found, gpus=gpus, dtype=dtype, sharding=shard, price=price)
    _render(made)
    if as_json:
        print_json(made.to_dict())


def _measured(out: Path, device: str | None, dtype: str | None) -> "Machine":
    from xcalib.plan import measure_machine

    if out.is_dir() or not out.parent.is_dir():
        raise PlanError(f"{out}: cannot be written: {'is a folder' if out.is_dir() else 'its folder does not exist'}")
    quiet_libraries()
    found = measure_machine(out.stem, device, dtype, progress)
    versions = {name: metadata.version(name) for name in ("torch", "transformers")} | {
        "python": platform.python_version()
    }
    record = found.record() | {"measured": dict(found.measured) | {"versions": versions}}
    replace_file(out, json.dumps(record, indent=1).encode() + b"\n")
    console.print(f"rates of this machine are in {out}", markup=False, soft_wrap=True)
    return found


def _render(made: "CalibrationPlan") -> None:
    console.print(_heading(made), markup=False, soft_wrap=True)
    console.print(_table(made))
    for line in (*_totals(made), *(f"note: {note}" for note in made.notes), *_rates(made)):
        console.print(line, markup=False, soft_wrap=True)


def _heading(made: "CalibrationPlan") -> str:
    shape, job = made.shape, made.job
    tokens = ", ".join(f"{length:,}" for length in job.lengths)
    return (
        f"{shape.name}: {short_count(shape.parameters)} parameters, {shape.layers} layers of {shape.q_heads} / {shape.kv_heads} "
        f"heads, {made.dtype}; {job.samples} samples of {tokens} tokens on {made.placement.gpus} x {made.machine.name}"
    )


def _table(made: "CalibrationPlan") -> Table:
    from xcalib.plan.advice import gigabytes

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("step", no_wrap=True)
    table.add_column("runs", overflow="fold")
    for column in ("FLOPs", "time", "a device"):
        table.add_column(column, justify="right", no_wrap=True)
    for step in made.steps:
        peak = gigabytes(step.peak) + ("" if step.fits else " !")
        table.add_row(step.name, step.passes, _flops(step.flops), _range(*made.seconds((step.name,))), peak)
    return table


def _flops(both: tuple[float, float]) -> str:
    least, most = (f"{number:.1e}".replace("e+", "e") for number in both)
    return least if least == most else f"{least} to {most}"


def _range(low: float, high: float) -> str:
    units = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))
    unit, size = next((one for one in units if high >= 1.5 * one[1]), units[-1])
    return f"{low / size:.2g} to {high / size:.2g} {unit}"


def _totals(made: "CalibrationPlan") -> list[str]:
    from xcalib.plan.advice import gigabytes
    from xcalib.plan.calibration import COLLECT

    low, high = made.seconds()
    gpus = made.placement.gpus
    lines = [
        f"xcalib collect: {_range(*made.seconds(COLLECT))}; with the search: {_range(low, high)}, "
        f"{low * gpus / 3600:.3g} to {high * gpus / 3600:.3g} device hours"
    ]
    if made.price is not None:
        cost = [made.price * seconds * gpus / 3600 for seconds in (low, high)]
        lines.append(f"cost: {cost[0]:,.2f} to {cost[1]:,.2f} USD at {made.price:g} a device hour")
    disk = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in made.disk.items() if size)
    return [*lines, f"disk: {disk}"]


def _rates(made: "CalibrationPlan") -> list[str]:
    margin = f"times are the prediction -/+ {made.machine.margin:.0%}; not in them: loading, reading data, the knapsack, answers"
    if not made.fits:
        margin = f"! more than the device has; {margin}"
    return [margin, *(f"rates: {source}" for source in made.machine.sources)]
