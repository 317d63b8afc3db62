"""Small pictures with a palette, as PNG data."""

import base64
import struct
import zlib

import numpy as np
import numpy.typing as npt

__all__ = ["data_uri", "indexed_png"]

Colour = tuple[int, int, int, int]  # red, green, blue, alpha, each 0 to 255


def indexed_png(indices: npt.NDArray[np.uint8], palette: list[Colour]) -> bytes:
    """A PNG of ``(height, width)`` indices into at most 256 colours."""
    height, width = indices.shape
    rows = np.zeros((height, width + 1), dtype=np.uint8)  # each row begins with its filter, 0: none
    rows[:, 1:] = indices
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(channel for colour in palette for channel in colour[:3])),
        (b"tRNS", bytes(colour[3] for colour in palette)),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def data_uri(png: bytes) -> str:
    """For the ``src`` of an image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
