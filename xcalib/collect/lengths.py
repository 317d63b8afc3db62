"""Curves of several lengths: one folder for each, and an index that is written when all are done."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from xcalib._lock import LOCK_NAME
from xcalib._reading import check_inside
from xcalib._yaml import one_line, quote
from xcalib.collect.curves import Curves, write_atomically
from xcalib.collect.reading import load_curves, read_record
from xcalib.data import check_lengths
from xcalib.errors import CurvesError, DataError, ProfileError
from xcalib.progress import Progress

__all__ = ["INDEX", "labelled", "load_curve_sets", "measured_length", "open_index", "write_index"]

INDEX = "lengths.json"
FORMAT = 1


def measured_length(curves: Curves) -> int:
    """What the curves stand for, in tokens: the length asked for, and in older files that of the longest sample."""
    lengths = curves.calibration.get("lengths") or [curves.calibration["max_length"]]
    return int(lengths[-1])


def labelled(progress: Progress, length: int) -> Progress:
    """The same progress, with the length before what is being done."""
    return lambda description, total: progress(f"{length:,} tokens: {description}", total)


def open_index(folder: str | os.PathLike[str], lengths: Sequence[int], *, resume: bool) -> Path:
    """The folder for collections of these lengths, once nothing else is in it.

    Raises:
        CurvesError: it holds something else, other lengths, or all of these already and ``resume`` is False.
    """
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise CurvesError(f"{root}: is not a folder; choose another name")
    wanted = {str(length) for length in lengths}
    found = {path.name for path in root.iterdir() if not _left_over(path)} if root.is_dir() else set()
    if "collect.json" in found:
        raise CurvesError(f"{root}: holds the collection of one length; choose another folder")
    others = found - wanted - {INDEX}
    if others and all(name.isdecimal() for name in others):
        listed = ", ".join(sorted(others, key=int))
        raise CurvesError(f"{root}: was started with other lengths ({listed}); use the same ones, or another folder")
    if others:
        raise CurvesError(f"{root}: is not empty and holds no collection; choose another folder")
    if INDEX in found and set(map(str, _read_index(root))) != wanted:
        raise CurvesError(f"{root}: holds other lengths; use the same ones, or another folder")
    if found and not resume:
        raise CurvesError(f"{root}: already holds a collection; go on with --resume, or choose another folder")
    return root


def _left_over(path: Path) -> bool:
    if path.name == LOCK_NAME:
        return True
    return path.suffix == ".tmp" and path.name.startswith(f".{INDEX}.")


def write_index(root: Path, lengths: Sequence[int]) -> None:
    """Say that the curves of all lengths are there."""
    write_atomically(root / INDEX, json.dumps({"format": FORMAT, "lengths": list(lengths)}).encode() + b"\n")


def _read_index(root: Path) -> tuple[int, ...]:
    try:
        record = read_record(root / INDEX)
        if record["format"] != FORMAT:
            raise CurvesError(
                f"{root}: index format {quote(record['format'])}, this version reads {FORMAT}: collect again"
            )
        return check_lengths(record["lengths"])
    except (ValueError, LookupError, TypeError, DataError, ProfileError) as error:
        raise CurvesError(f"{root / INDEX}: damaged ({one_line(str(error))}); collect again with --resume") from error


def load_curve_sets(folder: str | os.PathLike[str]) -> tuple[Curves, ...]:
    """Read the curves of a folder, of one length or of several in ascending order.

    Raises:
        CurvesError: missing, unfinished or damaged, or not of one model and one measurement.
    """
    root = Path(folder)
    if not (root / INDEX).is_file():
        if root.is_dir() and any(
            path.name.isdecimal() and (path / "collect.json").is_file() for path in root.iterdir()
        ):
            raise CurvesError(f"{root}: its collection of several lengths is unfinished: go on with --resume")
        return (load_curves(root),)
    sets = []
    for length in _read_index(root):
        try:
            check_inside(root / str(length), root)
        except ProfileError as error:
            raise CurvesError(str(error)) from None
        curves = load_curves(root / str(length))
        if measured_length(curves) != length:
            raise CurvesError(f"{root / str(length)}: holds curves of {measured_length(curves)} tokens; collect again")
        sets.append(curves)
    check_same(sets)
    return tuple(sets)


def check_same(sets: Sequence[Curves]) -> None:
    """Raise CurvesError unless all curves are of one model, measured with the same settings, at ascending lengths."""
    lengths = [measured_length(curves) for curves in sets]
    if lengths != sorted(set(lengths)):
        raise CurvesError(f"curves of several lengths must be in ascending order, got those of {lengths} tokens")
    first = sets[0]
    for curves in sets[1:]:
        if curves.settings != first.settings or curves.model["config_sha256"] != first.model["config_sha256"]:
            raise CurvesError(
                f"the curves of {measured_length(curves):,} tokens are of another model or with other settings than those "
                f"of {measured_length(first):,}: collect all lengths together"
            )
