"""The identity of a model whose weights are not loaded: from its config.json, or from a profile that was made for it."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from xcalib._yaml import quote
from xcalib.errors import ModelError
from xcalib.interop.files import parse_json, read_file
from xcalib.profile import ModelIdentity, load_profile

__all__ = ["BLOCK_KEY", "identity_of_config", "model_identity", "read_config"]

BLOCK_KEY = "sparse_attention_config"
MAX_LAYERS = 100_000


def model_identity(source: str) -> ModelIdentity:
    """Shape and config hash of a model, as :func:`xcalib.search` would record them.

    Args:
        source: a model's folder, its config.json, a profile (``.yaml``, ``.yml``), or a Hugging Face id.

    Raises:
        ModelError: none of these, or not the config of a decoder.
        ProfileError: a file that cannot be read.
    """
    path = Path(source)
    if path.suffix.lower() in (".yaml", ".yml"):
        return load_profile(path).model
    if path.suffix.lower() == ".gguf" or source == "demo":
        raise ModelError(f"--model {source}: give a profile of that model (xcalib search), a folder or a config.json")
    if path.exists():
        folder = path if path.is_dir() else path.parent
        name = folder.resolve().name if folder == Path() else str(folder)
        return identity_of_config(read_config(path), name)
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() == ".json":
        raise ModelError(f"model folder or file {source!r} does not exist")
    return _identity(source, source)


def read_config(path: str | Path) -> dict[str, Any]:
    """A model's config.json, or that of a folder; keys keep their order.

    Raises:
        ModelError: no config.json there, or not that of a model.
        ProfileError: a file that cannot be read or is not JSON.
    """
    file = Path(path)
    if file.is_dir():
        file /= "config.json"
        if not file.is_file():
            raise ModelError(f"{path}: the folder holds no config.json")
    config = parse_json(read_file(file)[1], str(file))
    if not (isinstance(config, dict) and isinstance(config.get("model_type"), str)):
        raise ModelError(f"{file}: not a model's config.json: it has no model_type")
    return config


def identity_of_config(config: dict[str, Any], name: str) -> ModelIdentity:
    """The identity of the model of a config.json's content; a sparse_attention_config in it does not count."""
    _refuse_many_layers(config, name)
    with tempfile.TemporaryDirectory() as folder:
        # Through a file, as the model itself is loaded: only so do all defaults, and with them the hash, come out alike.
        (Path(folder) / "config.json").write_text(json.dumps(config), "utf-8")
        return _identity(folder, name)


def _refuse_many_layers(config: dict[str, Any], name: str) -> None:
    """Configs make lists with an entry for each layer."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_many_layers(value, name)
        elif "layer" in key and isinstance(value, int) and value > MAX_LAYERS:
            raise ModelError(f"the config of {name!r} has {quote(value)} for {quote(key)}, more than {MAX_LAYERS:,}")


def _identity(source: str, name: str) -> ModelIdentity:
    from transformers import AutoConfig

    from xcalib.models.structure import describe_model

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        return describe_model(SimpleNamespace(config=config), name)
    except ModelError:
        raise ModelError(f"the config of {name!r} has no layers and heads; only decoders can be described") from None
    except Exception as error:  # wrong configs raise anything
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else "no message"
        raise ModelError(f"the config of {name!r} cannot be loaded: {type(error).__name__}: {reason}") from None
