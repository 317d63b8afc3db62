"""A model without its weights, on torch's meta device: its modules and shapes, from the configuration alone."""

import json
from pathlib import Path
from typing import Any

import torch

from xcalib._yaml import one_line
from xcalib.errors import ModelError
from xcalib.models.loading import load_config

__all__ = ["empty_model", "read_config"]

MAX_CONFIG_BYTES = 4 << 20


def read_config(name: str) -> Any:
    """The transformers configuration of MODEL; no weights are read but a .gguf file's header.

    Args:
        name: a Hugging Face id, a folder, a .gguf file, ``demo``, or a .json file.

    Raises:
        ModelError: there is no such configuration.
    """
    return _read_json(Path(name)) if Path(name).suffix == ".json" else load_config(name)


def empty_model(config: Any, name: str) -> Any:
    """The causal language model of a configuration, all of its tensors on the meta device.

    Raises:
        ModelError: transformers has no such model for this configuration.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:  # models' code raises anything
        said = str(error).strip().splitlines()
        raise ModelError(
            f"{name!r} is no causal language model: {said[0] if said else type(error).__name__}"
        ) from error


def _read_json(path: Path) -> Any:
    from transformers import AutoConfig

    if not path.is_file():
        raise ModelError(f"configuration {str(path)!r} does not exist")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB, so it is no model's configuration")
    try:
        values = dict(json.loads(path.read_bytes()))
        if "model_type" not in values:
            raise LookupError("it has no model_type")
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        said = one_line(f"{type(error).__name__}: {error}")
        raise ModelError(f"{path}: is not a model's configuration ({said})") from error
