"""Safetensors files from strangers: their header is checked against the file before any of the data is read."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from xcalib import _yaml
from xcalib._reading import open_regular

__all__ = ["MAX_BYTES", "Layout", "arrays_of", "read_arrays", "read_checked"]

MAX_BYTES = (
    8 << 30
)  # curves of a 128-layer, 128-head model, 256 samples and 32 levels take 2 GiB, and 4 with all measures
MAX_HEADER = 1 << 20  # of ten thousand arrays; the library would take 100 MB
MAX_DIMENSIONS = 8
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # bytes of an item

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # array -> the header's name of its dtype, its shape


def read_arrays(
    path: str | os.PathLike[str], check: Callable[[Layout], object] = lambda layout: None
) -> dict[str, np.ndarray]:
    """All arrays of a file of at most MAX_BYTES; memory is at most twice the file's size.

    Args:
        path: of the file.
        check: called with what the header says before the data are read; raises what it likes.

    Raises:
        ProfileError: the file cannot be read, or its header does not describe it.
    """
    return arrays_of(read_checked(path, check), path)


def read_checked(path: str | os.PathLike[str], check: Callable[[Layout], object] = lambda layout: None) -> bytes:
    """All bytes of a file for :func:`arrays_of`; arguments and error as those of :func:`read_arrays`."""
    name = os.fsdecode(path)
    with open_regular(path, MAX_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise _yaml.fault(name, None, f"no safetensors file: its header has {length:,} of {size:,} bytes")
        head = file.read(length)
        check(_layout(head, size - 8 - length, name))
        return b"".join((length.to_bytes(8, "little"), head, file.read(size)))


def arrays_of(data: bytes, path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays in the bytes of a file that :func:`read_checked` gave; ProfileError where they are none."""
    try:
        return load(data)
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        said = f"no safetensors file: {_yaml.one_line(str(error))}"
        raise _yaml.fault(os.fsdecode(path), None, said) from None


def _layout(head: bytes, size: int, name: str) -> Layout:
    """What a header says of ``size`` bytes of data, which its arrays must fill in order and without a gap."""
    header = _yaml.read_json(_yaml.decode(head, name), name).value
    header.pop("__metadata__", None)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    ends: list[tuple[int, int]] = []
    for key, entry in header.items():
        kind, shape, span = _entry(entry)
        if kind not in _SIZES or math.prod(shape) * _SIZES[kind] != span[1] - span[0]:
            raise _yaml.fault(name, None, f"the header is wrong about {_yaml.quote(key)}: {_yaml.quote(entry)}")
        layout[key] = (kind, shape)
        ends.append(span)
    at = 0
    for start, end in sorted(ends):
        if start != at:
            raise _yaml.fault(name, None, f"the header has arrays that overlap or leave a gap at byte {at:,}")
        at = end
    if at != size:
        raise _yaml.fault(name, None, f"the header describes {at:,} bytes of data, the file has {size:,}")
    return layout


def _entry(entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and span in bytes; an empty dtype for an entry that is none."""
    if isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}:
        kind, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if isinstance(kind, str) and _whole(shape) and len(shape) <= MAX_DIMENSIONS and _whole(span) and len(span) == 2:
            return kind, tuple(shape), (span[0], span[1])
    return "", (), (0, 0)


def _whole(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
