"""``xcalib bench``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xcalib._files import replace_file
from xcalib.cli import options as opt
from xcalib.cli.output import console, print_json, progress, resumable
from xcalib.errors import BenchError

__all__ = ["bench"]


def _numbers(name: str, text: str | None, kind: type) -> list[Any] | None:
    """``"8192,32768"`` to numbers; None stays None."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise BenchError(f"--{name} is {text!r}, expected numbers with commas between") from None


def bench(
    suite: Annotated[str, typer.Option(help="`hopper` (CUDA) or `smoke` (toy sizes, anywhere).")] = "hopper",
    smoke: Annotated[bool, typer.Option("--smoke", help="The same as --suite smoke.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file, written after every measurement.")] = Path(
        "xcalib-bench.json"
    ),
    png: Annotated[Path | None, typer.Option(help="Picture (needs matplotlib: the extra `bench`).")] = None,
    md: Annotated[Path | None, typer.Option(help="The tables as Markdown.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens, as 8192,32768.")] = None,
    densities: Annotated[str | None, typer.Option(help="Shares of blocks kept, as 0.1,0.25.")] = None,
    strides: Annotated[str | None, typer.Option(help="S, as 8,16.")] = None,
    q_heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    k_heads: Annotated[int | None, typer.Option(help="KV heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Of all heads.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    block_size: Annotated[int | None, typer.Option(help="B, 64 or 128.")] = None,
    budget_seconds: Annotated[
        float | None, typer.Option(help="Begin nothing after so many seconds; what is left out is listed.")
    ] = None,
    limit_seconds: Annotated[
        float | None, typer.Option(help="About so long for the repetitions of one measurement; default the suite's.")
    ] = None,
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
) -> None:
    """Time the kernels against dense attention and other tools on this machine, and find the length from which sparse wins.

    Tools that are not installed are listed. The method's public implementation is measured where a checkout of
    github.com/mit-han-lab/x-attention (and its block_sparse_attn) is on PYTHONPATH.
    """
    from xcalib.bench import draw, markdown, render, run_bench, suite_of

    for path in filter(None, (md, png)):
        if not path.parent.is_dir():
            raise BenchError(f"{path.parent} is not a folder: nothing could be written to {path}")
    name = "smoke" if smoke else suite
    numbers = {
        "lengths": _numbers("lengths", lengths, int),
        "densities": _numbers("densities", densities, float),
        "strides": _numbers("strides", strides, int),
    }
    scalars: dict[str, Any] = {"q_heads": q_heads, "k_heads": k_heads, "head_dim": head_dim, "dtype": dtype}
    scalars |= {"block_size": block_size, "limit_seconds": limit_seconds}
    chosen = suite_of(name, **numbers, **scalars)
    changes = {key.replace("_", "-"): value for key, value in (numbers | scalars).items() if value is not None}
    typed = [
        f"--{key} {','.join(map(str, value)) if isinstance(value, list) else value}" for key, value in changes.items()
    ]
    typed += [f"--budget-seconds {budget_seconds:g}"] if budget_seconds is not None else []
    command = " ".join(["xcalib bench --suite", name, *typed, f"--seed {seed}"])
    with resumable(f"what was measured is in {out}"):
        results = run_bench(chosen, out, command=command, budget_seconds=budget_seconds, seed=seed, progress=progress)
    render(results, console)
    if md is not None:
        replace_file(md, markdown(results).encode())
    if png is not None:
        draw(results, png)
    console.print(f"wrote {out}", markup=False, soft_wrap=True)
    if as_json:
        print_json(results)
