"""A model without its weights, on torch's meta device: its modules and shapes, from the configuration alone."""

import json
from pathlib import Path
from typing import Any

import torch

from xcalib._yaml import one_line
from xcalib.errors import ModelError
from xcalib.models.loading import NOT_INSPECTED, load_config, needs_remote_code

__all__ = ["NotCausalError", "build_empty", "empty_model", "read_config"]

MAX_CONFIG_BYTES = 4 << 20


class NotCausalError(ModelError):
    """transformers has a configuration, and no causal language model for it."""


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
        NotCausalError: transformers has no such model for this configuration.
        ModelError: it cannot be built, or needs code from its repository.
    """
    from transformers import AutoModelForCausalLM

    try:
        return build_empty(AutoModelForCausalLM, config)
    except Exception as error:  # models' code raises anything
        if needs_remote_code(error):
            raise ModelError(f"model {name!r} {NOT_INSPECTED}") from error
        if str(error).startswith("Unrecognized configuration class"):
            raise NotCausalError(
                f"{name!r} is no causal language model: transformers has none for {config.model_type}"
            ) from error
        said = one_line(f"{type(error).__name__}: {error}")
        raise ModelError(f"{name!r} cannot be built without weights: {said}") from error


def build_empty(kind: Any, config: Any) -> Any:
    """A model of ``kind``, one of transformers' Auto classes, on the meta device; none of its repository's code runs.

    Whatever attention the configuration asks for is left out: its package need not be installed here, or would be fetched.
    """
    arguments = {"trust_remote_code": False}
    with torch.device("meta"):
        try:
            return kind.from_config(config, attn_implementation="sdpa", **arguments).eval()
        except Exception:  # some models have no such attention, and say so in their own ways
            return kind.from_config(config, attn_implementation="eager", **arguments).eval()


def _read_json(path: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if not path.is_file():
        raise ModelError(f"configuration {str(path)!r} does not exist")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB, so it is no model's configuration")
    try:
        values = dict(json.loads(path.read_bytes()))
        if "model_type" not in values:
            raise LookupError("it has no model_type")
        if "auto_map" in values and values["model_type"] not in CONFIG_MAPPING:
            raise ModelError(f"model {str(path)!r} {NOT_INSPECTED}")
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except ModelError:
        raise
    except Exception as error:  # configurations check and compute their values each in their own way
        said = one_line(f"{type(error).__name__}: {error}")
        raise ModelError(f"{path}: is not a model's configuration ({said})") from error
