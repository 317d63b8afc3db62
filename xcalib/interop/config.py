"""A profile's operating point as the ``sparse_attention_config`` block of a model's config.json."""

from pathlib import Path
from typing import Any

import xcalib
from xcalib.errors import ModelError
from xcalib.interop.files import json_text
from xcalib.interop.identity import BLOCK_KEY, identity_of_config, read_config
from xcalib.profile import Profile

__all__ = ["config_with_block", "sparse_attention_block"]

FORMAT_VERSION = 1


def sparse_attention_block(profile: Profile, point: str | None = None) -> dict[str, Any]:
    """What another runtime needs to apply one operating point, as plain data (docs/interop.md lists the keys).

    Args:
        profile: where the thresholds come from.
        point: name of the operating point; None for the profile's default.

    Raises:
        ProfileError: no such point.
    """
    chosen = profile.point(point)
    bins = zip(profile.length_bins, chosen.thresholds, strict=True)
    return {
        "method": "xattention",
        "format_version": FORMAT_VERSION,
        **profile.method.model_dump(),
        "order": profile.method.order,
        "dense_layers": list(profile.dense_layers),
        "length_bins": [
            {**length_bin.model_dump(), "thresholds": [list(row) for row in rows]} for length_bin, rows in bins
        ],
        "point": chosen.name,
        "verified": bool(chosen.verified),
        "heldout": None if chosen.heldout is None else chosen.heldout.model_dump(),
        "model": profile.model.model_dump(),
        "profile_sha256": profile.content_sha256,
        "producer": f"xcalib {xcalib.__version__}",
    }


def config_with_block(
    profile: Profile, path: str | Path, point: str | None = None, *, replace: bool = False, other_config: bool = False
) -> str:
    """The text of a copy of a config.json with the block in it; every other key keeps its value and place.

    Args:
        profile: where the thresholds come from.
        path: the config.json, or the folder with it; it is only read.
        point: name of the operating point; None for the profile's default.
        replace: take the place of a ``sparse_attention_config`` that is there.
        other_config: take a config of the profile's shape that is not the profile's.

    Raises:
        ModelError: the config is of another model, or has such a block and may not lose it.
        ProfileError: no such point, or a file that cannot be read.
    """
    block = sparse_attention_block(profile, point)
    config = read_config(path)
    if BLOCK_KEY in config and not replace:
        raise ModelError(f"{path}: has a {BLOCK_KEY} already; --force replaces it in the copy")
    otherwise = "--other-config takes it all the same"
    profile.model.check(identity_of_config(config, str(path)), any_config=other_config, otherwise=otherwise)
    return json_text({**config, BLOCK_KEY: block}) + "\n"
