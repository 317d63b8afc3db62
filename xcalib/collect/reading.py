"""Curves from their folder, which may come from strangers: whole, of the right shapes and sane, or one CurvesError."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from xcalib import _yaml
from xcalib._arrays import Layout, read_arrays
from xcalib._reading import check_inside, read_regular
from xcalib.collect.curves import ARRAYS, FORMAT, CollectSettings, Curves
from xcalib.errors import CurvesError, ProfileError
from xcalib.profile import Calibration, Method, ModelIdentity

__all__ = ["load_curves", "read_record"]

COUNTS = ("kept", "visible", "tokens")
MAX_COUNT = 2**53  # of blocks or tokens in all samples: beyond it fp64 no longer tells neighbours apart


def read_record(path: Path) -> dict[str, Any]:
    """The object of a small JSON file that lies in its folder itself; ProfileError otherwise."""
    check_inside(path, path.parent)
    name = str(path)
    return _yaml.read_json(_yaml.decode(read_regular(path, _yaml.MAX_BYTES), name), name).value


def load_curves(folder: str | os.PathLike[str]) -> Curves:
    """Read what :func:`~xcalib.collect.curves.save_curves` wrote.

    What its files say is checked before their data are read, and links that lead out of the folder are refused.

    Raises:
        CurvesError: missing, unfinished or damaged.
    """
    root = Path(folder)
    try:
        if not (root / "curves.json").is_file():
            started = (root / "collect.json").is_file()
            hint = "its collection is unfinished: go on with --resume" if started else "run 'xcalib collect' first"
            raise CurvesError(f"{root}: holds no curves.json; {hint}")
        curves = _read(root)
    except (ProfileError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        said = str(error) if isinstance(error, ProfileError) else f"{type(error).__name__}: {error}"
        raise CurvesError(
            f"{_yaml.one_line(str(root))}: damaged curves ({_yaml.one_line(said)}); collect again"
        ) from error
    for fault in _faults(curves):
        raise CurvesError(f"{root}: damaged curves ({fault}); collect again")
    return curves


def _read(root: Path) -> Curves:
    record = read_record(root / "curves.json")
    if record["format"] != FORMAT:
        said = _yaml.quote(record["format"])
        raise CurvesError(f"{root}: curves format {said}, this version reads {FORMAT}: collect again")
    settings = _settings(record["settings"])
    model = ModelIdentity.model_validate(record["model"])
    calibration = Calibration.model_validate(record["calibration"])
    layers = TypeAdapter(tuple[int, ...]).validate_python(tuple(record["layers"]), strict=True)
    names = (*ARRAYS, *settings.measures)
    shapes = _shapes(settings, calibration.samples, len(layers), model.query_heads)
    path = root / "curves.safetensors"
    check_inside(path, root)
    arrays = read_arrays(path, lambda layout: _check_layout(layout, shapes))
    return Curves(
        settings=settings,
        model=dict(record["model"]),
        calibration=dict(record["calibration"]),
        layers=layers,
        dense_reasons=dict(record["dense_reasons"]),
        skipped=TypeAdapter(tuple[int, ...]).validate_python(tuple(record.get("skipped", ())), strict=True),
        **{name: arrays[name] for name in names},
    )


def _settings(given: dict[str, Any]) -> CollectSettings:
    plain: dict[str, Any] = {"order": "score"}  # files from before there were two
    plain |= {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    try:
        settings = CollectSettings(**plain)
    except CurvesError as error:  # its message holds the value, which may be long
        raise ProfileError(_yaml.one_line(str(error))) from error
    method = {key: getattr(settings, key) for key in ("stride", "block_size", "pattern", "order")}
    Method.model_validate(method)
    return TypeAdapter(CollectSettings).validate_python(vars(settings))


def _shapes(settings: CollectSettings, samples: int, layers: int, heads: int) -> dict[str, tuple[int | None, ...]]:
    """What each array must have; None for the number of gain samples."""
    sweep, joint = (samples, layers, heads, len(settings.grid)), (samples, len(settings.joint_densities))
    return {
        "error": sweep,
        "kept": sweep,
        "energy": (samples, layers),
        "visible": (samples,),
        "tokens": (samples,),
        "gain": (layers,),
        "gain_kl": (None, layers),
        "gain_error": (None, layers),
        "joint_sum": joint,
        "joint_kl": joint,
        **dict.fromkeys(settings.measures, sweep),
    }


def _check_layout(layout: Layout, shapes: dict[str, tuple[int | None, ...]]) -> None:
    unknown = sorted(set(layout) - set(shapes))
    if unknown:
        raise ValueError(f"unknown array {_yaml.quote(unknown[0])}")
    for name, wanted in shapes.items():
        kind, shape = layout[name]
        dtype = "I64" if name in COUNTS else "F64"
        gains = layout["gain_kl"][1][:1]
        shape_of = tuple(gains[0] if size is None and gains else size for size in wanted)
        if kind != dtype or shape != shape_of or 0 in shape or (gains and gains[0] > layout["tokens"][1][0]):
            expected = f"finite, not negative and of {dtype}, shape {shape_of}"
            raise ValueError(f"{name} must be {expected}, has {_yaml.quote(kind)}, {shape}")


def _faults(curves: Curves) -> Iterator[str]:
    layers = list(curves.layers)
    if layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < curves.model["layers"]:
        yield f"layers must be ascending and below {curves.model['layers']}, got {_yaml.quote(layers)}"
    if not all(type(layer) is int for layer in curves.dense_reasons.values()):
        yield "dense_reasons must be whole numbers"
    for name in (*ARRAYS, *curves.settings.measures):
        array = getattr(curves, name)
        # beyond the gain samples only the first allocation was measured
        values = np.r_[array[: len(curves.gain_kl)].ravel(), array[:, 0]] if name == "joint_kl" else array
        if not np.isfinite(values).all() or (values < 0).any():
            yield f"{name} must be finite, not negative and of shape {array.shape}"
    for name in ("visible", "tokens"):
        counts = getattr(curves, name)
        if (counts < 1).any() or counts.sum(dtype=np.float64) > MAX_COUNT:
            yield f"{name} must be at least 1 and {MAX_COUNT:,} in all"
    if (curves.kept > curves.visible[:, None, None, None]).any():
        yield "kept must not be above visible"
