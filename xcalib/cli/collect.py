"""``xcalib collect``."""

from pathlib import Path
from typing import Annotated

import typer

from xcalib.cli import options as opt
from xcalib.cli.by_length import report_curves
from xcalib.cli.output import progress, resumable
from xcalib.cli.recipes import RecipeIn, RecipeOut, write_recipe
from xcalib.cli.workers import Workers, joined

__all__ = ["collect"]


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
    from xcalib.collect import collect_lengths
    from xcalib.collect.skipping import refuse_skipping

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
