"""Options that several commands share, and what they are turned into."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from xcalib import choices
from xcalib._files import remove_left_overs
from xcalib._lock import Lock, lock_file
from xcalib.cli.completion import COMPLETING, complete_data, complete_model, offering
from xcalib.cli.output import console, quiet_libraries, status
from xcalib.errors import CurvesError, DataError

if TYPE_CHECKING:
    from xcalib.collect import CollectSettings, Curves
    from xcalib.collect.ranks import Ranks
    from xcalib.data import SampleSet, Split
    from xcalib.models.loading import LoadedModel

MODEL_HELP = "A Hugging Face id, a folder, a .gguf file, or 'demo'."
DATA_HELP = (
    "Data, may be given several times, each with a weight at its end (@2): builtin[:CATEGORY], ruler[:TASK,... or :all], "
    "text:PATH, jsonl:PATH[:field], hf:NAME[:config][:split], or package.module:function."
)


def checked(read: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A callback that looks at an option's value before anything is done, and leaves it as it is."""

    def check(value: Any) -> Any:
        if value not in (None, [], ()) and COMPLETING not in os.environ:  # a check may import what takes a second
            read(value)
        return value

    return check


def one_of(*allowed: Any) -> Callable[[Any], Any]:
    """A callback that refuses all but ``allowed`` values."""

    def read(value: Any) -> None:
        for item in value if isinstance(value, list | tuple) else [value]:
            if item not in allowed:
                raise typer.BadParameter(f"{item!r} is not one of {', '.join(map(str, allowed))}")

    return checked(read)


def check_specs(specs: list[str]) -> None:
    """Raise DataError unless all data specs are well formed, and categories and tasks exist; files are looked at later."""
    from xcalib.data import parse_specs
    from xcalib.data._ruler import check_tasks
    from xcalib.data._sources import builtin_documents

    for spec in parse_specs(specs):
        if spec.kind == "ruler":
            check_tasks(spec)
        elif spec.kind == "builtin":
            builtin_documents(spec.argument)


def _check_lengths(text: str) -> None:
    from xcalib.data import parse_lengths

    parse_lengths(text)


Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", "-d", metavar="SPEC", callback=checked(check_specs), autocompletion=complete_data, help=DATA_HELP
    ),
]
NumSamples = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
MaxLength = Annotated[int | None, typer.Option(min=64, help="Tokens of the longest sample; default 2048.")]
Lengths = Annotated[
    str | None,
    typer.Option(
        metavar="TOKENS,...",
        callback=checked(_check_lengths),
        help="Several lengths instead of --max-length, as 1k,2k,4k (k is 1,024): --num-samples of each, and thresholds of their "
        "own for each.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="At most N samples of each task: of each ruler task, of each data set that the rows of a jsonl file name, and of "
        "every other --data. Without --num-samples there are N of each, or as many as the data have.",
    ),
]
MinLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens of the shortest sample; default: all have --max-length.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of windows, needles and everything random.")]
Stride = Annotated[
    int,
    typer.Option(
        callback=one_of(*choices.STRIDES),
        autocompletion=offering(*choices.STRIDES),
        help="Tokens per group of the scoring (S): 4, 8, 16, 32 or 64.",
    ),
]
BlockSize = Annotated[
    int,
    typer.Option(
        callback=one_of(*choices.BLOCK_SIZES),
        autocompletion=offering(*choices.BLOCK_SIZES),
        help="Tokens per block (B): 64 or 128.",
    ),
]
Pattern = Annotated[
    choices.Pattern,
    typer.Option(
        help="Which query of a group meets which key; rows: the last one meets every key by itself, others are the paper's."
    ),
]
Order = Annotated[
    choices.Order,
    typer.Option(
        help="Of preference: recent takes the block before a row's own at every tau above 0, score is the paper's rule."
    ),
]
Measures = Annotated[
    list[str] | None,
    typer.Option(
        "--measure",
        metavar="fisher|mass",
        callback=one_of(*get_args(choices.Measure)),
        autocompletion=offering(*get_args(choices.Measure)),
        help="Measure also what --objective fisher or mass needs; may be given several times.",
    ),
]
GainSamples = Annotated[int, typer.Option(min=1, help="Samples that measure the layer gains.")]
Rounds = Annotated[
    int,
    typer.Option(
        min=0,
        help="Steps after the first search: measure with all layers sparse, search again (docs/search.md). Each takes about as "
        "long as ten dense passes over the samples, for every target; 0 leaves them out.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(autocompletion=offering("cuda", "cpu"), help="Torch device; default cuda if there is one, else cpu."),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="auto|balanced|...",
        autocompletion=offering("auto", "balanced", "balanced_low_0", "sequential"),
        help="Spread MODEL over all GPUs, and over host memory where they do not hold it, instead of --device: auto, balanced, "
        "balanced_low_0, sequential or a JSON object, as transformers' device_map (docs/large-models.md).",
    ),
]
Offload = Annotated[
    bool,
    typer.Option(
        "--offload",
        help="For a MODEL larger than memory: read its layers from the checkpoint one at a time, all samples through each.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        callback=one_of("auto", *choices.DTYPE_NAMES),
        autocompletion=offering("auto", *choices.DTYPE_NAMES),
        help="auto, float32, float16 or bfloat16.",
    ),
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let code from the model's repository run.")]
FileOut = Annotated[Path, typer.Option("--out", "-o", help="Profile to write (.yaml or .json).")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Stay within 8G, 600M, ...: heads are measured fewer at a time, with the same figures; refused at once if nothing "
        "helps. On a CPU of the whole process, on a GPU of tensors (docs/memory.md).",
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad",
        help="Leave out samples on which the model's numbers are NaN or infinite, up to half of them, and count them.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run finished.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]

DEFAULT_LENGTH = 2048  # tokens of a sample


def collect_settings(
    stride: int,
    block_size: int,
    pattern: choices.Pattern,
    order: choices.Order,
    gain_samples: int,
    measures: Sequence[str] = (),
) -> "CollectSettings":
    """Settings of a measurement, from options that are checked."""
    from xcalib.collect import CollectSettings

    chosen = tuple(name for name in get_args(choices.Measure) if name in measures)  # --resume takes them in any order
    return CollectSettings(
        stride=stride, block_size=block_size, pattern=pattern, order=order, gain_samples=gain_samples, measures=chosen
    )


def memory_limit(text: str | None, skip_bad: bool, offload: bool) -> int | None:
    """``--max-memory`` in bytes; MemoryLimitError where it is no size, ModelError where ``--offload`` goes without it."""
    limit = None
    if text is not None:
        from xcalib.collect.budget import parse_memory

        limit = parse_memory(text)
    if offload:
        from xcalib.collect import refuse_with_offload

        refuse_with_offload(limit, skip_bad)
    return limit


def work_folder(model: str, work: Path | None) -> Path:
    """Where curves and unfinished work are kept: ``work``, or ``xcalib-out/MODEL``."""
    return work or Path("xcalib-out") / (re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model")


def open_model(
    name: str,
    device: str | None,
    dtype: str,
    trust_remote_code: bool,
    device_map: str | None = None,
    offload: bool = False,
    ranks: "Ranks | None" = None,
) -> "LoadedModel":
    """Load MODEL, saying so while it lasts; of several ranks each onto its own device.

    The other arguments are those of :func:`xcalib.models.loading.load_model`.
    """
    if device_map is not None and (device is not None or offload):
        other = "--offload" if offload else "--device"
        raise typer.BadParameter(f"goes without {other}: give one of them", param_hint="--device-map")
    if ranks is not None and ranks.size > 1 and (device_map is not None or offload):
        name_of = "--offload" if offload else "--device-map"
        raise typer.BadParameter(
            f"is for one process: {ranks.size} ranks hold a model each; use it without --workers and torchrun",
            param_hint=name_of,
        )
    quiet_libraries()
    from xcalib.models.loading import load_model

    device = device if ranks is None else ranks.device(device)
    with status(f"Loading {name}"):
        return load_model(
            name,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            offload=offload,
        )


def check_positions(loaded: "LoadedModel", length: int) -> None:
    """Raise DataError if the model has fewer positions than samples of ``length`` tokens need."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise DataError(
            f"samples of {length:,} tokens are asked for, but {loaded.name} has {limit} positions: choose at most {limit}"
        )


def read_samples(
    specs: list[str] | None,
    loaded: "LoadedModel",
    *,
    num_samples: int | None,
    max_length: int,
    min_length: int | None,
    seed: int,
    split: "Split",
    exclude: tuple[str, ...] = (),
    limit: int | None = None,
) -> "SampleSet":
    """Samples of the given or default data; what was dropped is said on stderr."""
    from xcalib.data import DEFAULT_SPECS, load_samples

    check_positions(loaded, max_length)
    arguments: dict[str, Any] = {"num_samples": num_samples, "max_length": max_length, "min_length": min_length}
    with status(f"Reading {split} data"):
        samples = load_samples(
            list(specs or DEFAULT_SPECS),
            loaded.tokenizer,
            seed=seed,
            split=split,
            exclude=exclude,
            limit=limit,
            **arguments,
        )
    for reason, count in samples.dropped.items():
        console.print(f"dropped {count}: {reason}", markup=False)
    return samples


def chosen_lengths(
    lengths: str | None, max_length: int | None, min_length: int | None, default: Sequence[int] = (DEFAULT_LENGTH,)
) -> tuple[int, ...]:
    """Lengths of samples in tokens, ascending: those of --lengths, or the one of --max-length, or the default ones.

    Raises:
        DataError: --lengths is malformed.
    """
    if lengths is None:
        return tuple(default) if max_length is None else (max_length,)
    for option, value in (("--max-length", max_length), ("--min-length", min_length)):
        if value is not None:
            raise typer.BadParameter(
                f"is given together with {option} (by flag or in a recipe): --lengths alone says how long samples are",
                param_hint="--lengths",
            )
    from xcalib.data import parse_lengths

    return parse_lengths(lengths)


def lengths_of_curves(measured: "Sequence[Curves]", asked: tuple[int, ...], *, given: bool) -> tuple[int, ...]:
    """Lengths of the samples that go with measured curves: those of several, and for one the length asked for.

    Raises:
        CurvesError: other lengths were ``given``.
    """
    from xcalib.collect import measured_length

    found = tuple(measured_length(curves) for curves in measured)
    if len(found) == 1 and len(asked) == 1:
        return asked
    if given and asked != found:
        has = ",".join(map(str, found))
        raise CurvesError(f"the curves are of {has} tokens: leave --lengths and --max-length out, or collect others")
    return found


def read_sets(
    specs: list[str] | None, loaded: "LoadedModel", lengths: Sequence[int], **how: Any
) -> "tuple[SampleSet, ...]":
    """One set of samples for each length; the arguments are those of :func:`read_samples`."""
    if len(lengths) == 1:
        return (read_samples(specs, loaded, max_length=lengths[0], **how),)
    if how.get("min_length") is not None:
        raise typer.BadParameter("goes with one length: with several, samples have these", param_hint="--min-length")
    from xcalib.data import length_sets

    check_positions(loaded, lengths[-1])
    return length_sets(lengths, lambda length: read_samples(specs, loaded, max_length=length, **how))


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse an output file that could not be written, before any work is done.

    Raises:
        DataError: the folder is missing, or the file exists and may not be replaced.
    """
    if path.suffix.lower() not in choices.PROFILE_SUFFIXES:
        raise DataError(f"{path}: a profile ends in .yaml, .yml or .json")
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise DataError(f"{path}: is a folder")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists already; choose another file, or give --overwrite")


def take_output(path: Path, overwrite: bool = False) -> Lock:
    """Check an output file and take it: one process at a time may make it.

    Raises:
        BusyError: another process is making it.
        DataError: as :func:`check_output`.
    """
    check_output(path, overwrite)
    try:
        lock = lock_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    remove_left_overs(path)
    return lock
