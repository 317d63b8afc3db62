"""Options that several commands share, and what they are turned into."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from xcalib.cli.output import console, quiet_libraries, status
from xcalib.collect import CollectSettings
from xcalib.data import DEFAULT_SPECS, SampleSet, Split, load_samples
from xcalib.errors import DataError
from xcalib.kernels import api as kernels
from xcalib.kernels.api import BLOCK_SIZES, STRIDES
from xcalib.models.loading import LoadedModel, load_model

MODEL_HELP = "A Hugging Face id, a folder, a .gguf file, or 'demo'."
DATA_HELP = (
    "Data, may be given several times, each with a weight at its end (@2): builtin[:CATEGORY], ruler[:TASK,...], "
    "text:PATH, jsonl:PATH[:field], hf:NAME[:config][:split], or package.module:function."
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Data = Annotated[list[str] | None, typer.Option("--data", "-d", metavar="SPEC", help=DATA_HELP)]
NumSamples = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
MaxLength = Annotated[int, typer.Option(min=64, help="Tokens of the longest sample.")]
MinLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens of the shortest sample; default: all have --max-length.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of windows, needles and everything random.")]
Stride = Annotated[int, typer.Option(help="Tokens per group of the scoring (S): 4, 8, 16, 32 or 64.")]
BlockSize = Annotated[int, typer.Option(help="Tokens per block (B): 64 or 128.")]
Pattern = Annotated[kernels.Pattern, typer.Option(help="Which query of a group meets which key.")]
GainSamples = Annotated[int, typer.Option(min=1, help="Samples that measure the layer gains.")]
Device = Annotated[str | None, typer.Option(help="Torch device; default cuda if there is one, else cpu.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let code from the model's repository run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run finished.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]

SIZES = {"stride": STRIDES, "block-size": BLOCK_SIZES}


def collect_settings(stride: int, block_size: int, pattern: kernels.Pattern, gain_samples: int) -> CollectSettings:
    """Checked settings of a measurement; a usage error names the option and what is allowed."""
    for option, value in (("stride", stride), ("block-size", block_size)):
        if value not in SIZES[option]:
            allowed = ", ".join(str(item) for item in SIZES[option])
            raise typer.BadParameter(f"{value!r} is not one of {allowed}", param_hint=f"--{option}")
    return CollectSettings(stride=stride, block_size=block_size, pattern=pattern, gain_samples=gain_samples)


def work_folder(model: str, work: Path | None) -> Path:
    """Where curves and unfinished work are kept: ``work``, or ``xcalib-out/MODEL``."""
    return work or Path("xcalib-out") / (re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model")


def open_model(name: str, device: str | None, dtype: str, trust_remote_code: bool) -> LoadedModel:
    """Load MODEL, saying so while it lasts."""
    quiet_libraries()
    with status(f"Loading {name}"):
        return load_model(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def read_samples(
    specs: list[str] | None,
    loaded: LoadedModel,
    *,
    num_samples: int,
    max_length: int,
    min_length: int | None,
    seed: int,
    split: Split,
    exclude: tuple[str, ...] = (),
) -> SampleSet:
    """Samples of the given or default data; what was dropped is said on stderr."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise DataError(
            f"--max-length is {max_length}, but {loaded.name} has {limit} positions: choose at most {limit}"
        )
    arguments: dict[str, Any] = {"num_samples": num_samples, "max_length": max_length, "min_length": min_length}
    with status(f"Reading {split} data"):
        samples = load_samples(
            list(specs or DEFAULT_SPECS),
            loaded.tokenizer,
            seed=seed,
            split=split,
            exclude=exclude,
            **arguments,
        )
    for reason, count in samples.dropped.items():
        console.print(f"dropped {count}: {reason}", markup=False)
    return samples


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse an output file that could not be written, before any work is done.

    Raises:
        DataError: the folder is missing, or the file exists and may not be replaced.
    """
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise DataError(f"{path}: a profile ends in .yaml, .yml or .json")
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise DataError(f"{path}: is a folder")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists already; choose another file, or give --overwrite")
