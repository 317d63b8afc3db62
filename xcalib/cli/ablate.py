"""``xcalib ablate``."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from xcalib._files import replace_file
from xcalib._lock import remove_folder
from xcalib.choices import ABLATIONS
from xcalib.cli import options as opt
from xcalib.cli.completion import offering
from xcalib.cli.output import console, print_json, progress, resumable
from xcalib.errors import AblationError

__all__ = ["ablate"]


def ablate(
    model: opt.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for TABLE.json and TABLE.png.")],
    table: Annotated[
        list[str] | None,
        typer.Option(
            "--table",
            "-t",
            metavar="TABLE",
            autocompletion=offering(*ABLATIONS, "all"),
            help=f"Required: {', '.join(ABLATIONS)} or all; may be given several times.",
        ),
    ] = None,
    data: opt.Data = None,
    num_samples: opt.NumSamples = 8,
    heldout_samples: Annotated[int, typer.Option(min=1, help="Held-out samples: what is measured.")] = 12,
    max_length: opt.MaxLength = 2048,
    min_length: opt.MinLength = None,
    densities: Annotated[str, typer.Option(help="Where variants are compared, as 0.2,0.33.")] = "0.2,0.33",
    tau: Annotated[float, typer.Option(help="Of the raw figures and of the breakdown.")] = 0.9,
    stride: opt.Stride = 8,
    block_size: opt.BlockSize = 64,
    every: Annotated[int, typer.Option(min=1, help="KL is taken at every such position; an odd number.")] = 3,
    gain_samples: opt.GainSamples = 2,
    curves: Annotated[
        Path | None, typer.Option(help="Curves for the table threshold (`xcalib collect`), instead of measuring them.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens that the breakdown times, as 8192,16384; default up to --max-length.")
    ] = None,
    md: Annotated[Path | None, typer.Option(help="All tables as Markdown, in one file.")] = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="Draw the pictures (needs the extra `bench`).")] = True,
    seed: opt.Seed = 0,
    device: opt.Device = None,
    device_map: opt.DeviceMap = None,
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.RemoteCode = False,
    resume: opt.Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace tables that --out holds.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Repeat the paper's ablations on MODEL: its variants at equal density on held-out text, beside the paper's figures.

    Samples with answers (`--data ruler`) are scored as well. The time breakdown means something on a CUDA machine only.
    """
    from xcalib.ablate import AblateSettings, check_matplotlib, markdown, render, run_tables
    from xcalib.collect import load_curves

    names = _names(table)
    settings = AblateSettings(
        densities=_numbers("densities", densities, float),
        tau=tau,
        block_size=block_size,
        stride=stride,
        every=every,
        gain_samples=gain_samples,
        lengths=_numbers("lengths", lengths, int) if lengths else (),
        seed=seed,
    )
    if png:
        check_matplotlib()
    _check_out(out, names, md, resume or overwrite)
    measured = load_curves(curves) if curves else None
    loaded = opt.open_model(model, device, dtype, trust_remote_code, device_map)
    amount: dict[str, Any] = {"max_length": max_length, "min_length": min_length, "seed": seed}
    samples = opt.read_samples(data, loaded, num_samples=num_samples, split="calibration", **amount)
    used = {*samples.documents, *(measured.calibration["documents"] if measured else ())}
    heldout = opt.read_samples(
        data, loaded, num_samples=heldout_samples, split="heldout", exclude=tuple(sorted(used)), **amount
    )
    command = shlex.join(["xcalib", *sys.argv[1:]])
    work = out / "work"
    if overwrite and not resume:
        remove_folder(work)
    results = {}
    with resumable("run the same command with --resume"):
        for name, result in run_tables(
            names, loaded.model, loaded.tokenizer, samples, heldout, settings, folder=work, curves=measured,
            name=model, command=command, resume=resume, progress=progress,
        ):  # fmt: skip
            _write(out, name, result, png)
            render(result, console)
            results[name] = result
    shutil.rmtree(work, ignore_errors=True)
    if md is not None:
        replace_file(md, "\n".join(markdown(one, f"## {name}") for name, one in results.items()).encode())
    written = [f"{name}.{kind}" for name in results for kind in (("json", "png") if png else ("json",))]
    console.print(f"wrote {out}: {', '.join(written)}", markup=False, soft_wrap=True)
    if as_json:
        print_json(results)


def _names(given: list[str] | None) -> tuple[str, ...]:
    """Tables in the order of the paper."""
    if not given:
        raise AblationError(f"give --table, one of {', '.join(ABLATIONS)} or all")
    from xcalib.ablate import check_tables

    check_tables(tuple(name for name in given if name != "all"))
    return ABLATIONS if "all" in given else tuple(name for name in ABLATIONS if name in given)


def _numbers(option: str, text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise AblationError(f"--{option} is {text!r}, expected numbers with commas between") from None


def _check_out(out: Path, names: tuple[str, ...], md: Path | None, replace: bool) -> None:
    """Refuse what could not be written, before any work is done."""
    if out.exists() and not out.is_dir():
        raise AblationError(f"{out}: is not a folder")
    if md is not None and not md.parent.is_dir():
        raise AblationError(f"{md}: the folder {md.parent} does not exist")
    present = [name for name in names if (out / f"{name}.json").exists()]
    if present and not replace:
        raise AblationError(f"{out / present[0]}.json: exists already; choose another folder, or give --overwrite")


def _write(out: Path, name: str, result: dict[str, Any], png: bool) -> None:
    replace_file(out / f"{name}.json", json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
    if png:
        from xcalib.ablate import draw

        replace_file(out / f"{name}.png", draw(result))
