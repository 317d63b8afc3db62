"""Threshold tables ``[layer][query head]`` as the method's public implementation ships and reads them."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import xcalib
from xcalib import _yaml
from xcalib.choices import TABLE_BLOCK_SIZE
from xcalib.errors import ProfileError
from xcalib.interop.files import json_text, parse_json, read_file
from xcalib.interop.source import Number, python_tables
from xcalib.profile import Method, ModelIdentity, Profile, make_profile

__all__ = ["BLOCK_SIZE", "Table", "bin_for_length", "profile_from_table", "read_table", "table_name", "table_text"]

BLOCK_SIZE = TABLE_BLOCK_SIZE
STRIDES: tuple[int, ...] = get_args(Method.model_fields["stride"].annotation)
_STRIDE_IN_NAME = re.compile(r"_(\d+)$")

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Table:
    """One table: thresholds[layer][query head] in [0, 1], its name (None in a bare JSON list), and its file."""

    name: str | None
    thresholds: Rows
    file: str
    sha256: str

    @property
    def stride(self) -> int | None:
        """S in tokens where the name ends in it (``llama_fuse_8``), else None."""
        match = _STRIDE_IN_NAME.search(self.name or "")
        stride = int(match[1]) if match and len(match[1]) <= 2 else None
        return stride if stride in STRIDES else None

    @property
    def origin(self) -> str:
        """Name, file and the file's SHA-256, in one line."""
        what = f"{self.name} of " if self.name else ""
        return _yaml.one_line(f"{what}{Path(self.file).name} (sha256 {self.sha256[:16]}...)")


def read_table(path: str | Path, name: str | None = None) -> Table:
    """One threshold table of a JSON or Python file, which is parsed and never run.

    Args:
        path: JSON if it ends in ``.json`` or begins with ``[`` or ``{``: a nested list, or an object of named ones. Else Python
            source: module-level ``NAME = [[...], ...]``, bare or within ``torch.tensor``, ``np.array`` and the like.
        name: of the table; may be left out where the file holds one.

    Raises:
        ProfileError: no such file or table, or values that are not numbers in [0, 1] in rows of one length.
    """
    file = str(path)
    data, text = read_file(Path(path))
    is_json = file.lower().endswith(".json") or text.lstrip().startswith(("[", "{"))
    tables = _json_tables(text, file) if is_json else python_tables(text, file)
    if not tables:
        raise _yaml.fault(file, None, "holds no table: expected [[...], ...], numbers by layer and query head")
    found = _chosen(tables, name, file)
    digest = hashlib.sha256(data).hexdigest()
    return Table(found, _checked(tables[found], found or "table", file), file, digest)


def _json_tables(text: str, file: str) -> dict[str | None, Any]:
    document = parse_json(text, file)
    if isinstance(document, list):
        return {None: document}
    if not isinstance(document, dict):
        raise _yaml.fault(file, None, f"expected a table or an object of tables, got {_yaml.quote(document)}")
    if "schema_version" in document:
        raise _yaml.fault(file, None, "is a profile already: give --to table or --to config to export it")
    return {key: value for key, value in document.items() if isinstance(value, list)}


def _chosen(tables: dict[str | None, Any], name: str | None, file: str) -> str | None:
    if name is None and len(tables) == 1:
        return next(iter(tables))
    known = [key for key in tables if key is not None]
    listed = ", ".join(_yaml.quote(key)[1:-1] for key in known[:20]) + (", ..." if len(known) > 20 else "")
    if name is None:
        raise _yaml.fault(file, None, f"holds {len(tables)} tables: give --name with one of {listed}")
    if name not in tables:
        what = f"there is: {listed}" if known else "it is a bare list: leave --name out"
        raise _yaml.fault(file, None, f"no table {_yaml.quote(name)}; {what}")
    return name


def _checked(rows: Any, name: str, file: str) -> Rows:
    if not (isinstance(rows, list) and rows):
        raise _yaml.fault(file, None, f"{name}: must be a list of layers, got {_yaml.quote(rows)}")
    built: list[tuple[float, ...]] = []
    for layer, row in enumerate(rows):
        if not (isinstance(row, list) and row):
            raise _yaml.fault(file, None, f"{name}[{layer}]: must be a list of thresholds by head, got {_quoted(row)}")
        if built and len(row) != len(built[0]):
            raise _yaml.fault(file, None, f"{name}[{layer}]: {len(row)} heads, layer 0 has {len(built[0])}")
        built.append(tuple(_threshold(item, f"{name}[{layer}][{head}]", file) for head, item in enumerate(row)))
    return tuple(built)


def _threshold(item: Any, place: str, file: str) -> float:
    line, value = (item.line, item.value) if isinstance(item, Number) else (None, item)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _yaml.fault(file, line, f"{place}: must be a number, got {_quoted(value)}")
    if not 0 <= value <= 1:  # NaN as well
        raise _yaml.fault(file, line, f"{place}: must be between 0 and 1, got {_quoted(value)}")
    return float(value)


def _quoted(value: Any) -> str:
    return _yaml.quote(value.value if isinstance(value, Number) else value)


def profile_from_table(
    table: Table,
    model: ModelIdentity,
    *,
    stride: int | None = None,
    block_size: int = BLOCK_SIZE,
    min_length: int = 0,
    point: str = "imported",
) -> Profile:
    """A profile of one operating point, which says that nothing was measured for it.

    Layers whose thresholds are all 1 become dense layers, which is the same attention.

    Args:
        table: thresholds[layer][query head].
        model: the model that they are meant for; its layers and query heads must be the table's.
        stride: S in tokens; None for the one in the table's name.
        block_size: B in tokens.
        min_length: keys, in tokens, below which attention stays dense.
        point: name of the operating point.

    Raises:
        ProfileError: the table does not fit the model, its stride is unknown, or an argument is out of range.
    """
    layers, heads = len(table.thresholds), len(table.thresholds[0])
    if (layers, heads) != (model.layers, model.query_heads):
        fits = f"{model.name} has {model.layers} and {model.query_heads}"
        raise _yaml.fault(table.file, None, f"the table has {layers} layers and {heads} query heads, {fits}")
    method = {"stride": _stride(table, stride), "block_size": block_size}
    none = {"sources": (), "samples": 0, "min_length": 0, "max_length": 0, "seed": 0, "documents": ()}
    chosen = {"name": point, "method": "imported", "target": table.origin, "objective": "unknown"}
    return make_profile(
        method=method,
        model=model,
        dense_layers=tuple(layer for layer, row in enumerate(table.thresholds) if set(row) == {1.0}),
        length_bins=({"min_length": min_length, "max_length": None},),
        points=({**chosen, "thresholds": (table.thresholds,), "predicted": None, "verified": False},),
        default_point=point,
        calibration={**none, "tokens_sha256": hashlib.sha256(b"").hexdigest()},
        versions={"xcalib": xcalib.__version__},
    )


def _stride(table: Table, stride: int | None) -> int:
    told = table.stride
    if stride is None:
        if told is None:
            named = _yaml.quote(table.name) if table.name else "a table without a name"
            allowed = ", ".join(str(item) for item in STRIDES)
            raise _yaml.fault(table.file, None, f"{named} does not tell its stride: give --stride, one of {allowed}")
        return told
    if told not in (None, stride):
        raise _yaml.fault(table.file, None, f"{table.name} is a table for stride {told}, --stride is {stride}")
    return stride


def bin_for_length(profile: Profile, length: int | None = None) -> int:
    """Index of the length bin that serves ``length`` keys (in tokens), beyond the last one's end as the runtime does: the last.

    None will do where there is one bin only. Raises ProfileError where several are left to choose from, or where attention is
    dense at that length.
    """
    bins = profile.length_bins
    spans = ", ".join(f"{b.min_length}-{'' if b.max_length is None else b.max_length - 1}" for b in bins)
    if length is None:
        if len(bins) > 1:
            raise ProfileError(f"a table holds one length bin, the profile has {len(bins)}: give --length, of {spans}")
        return 0
    for index, length_bin in enumerate(bins):
        if length_bin.holds(length):
            return index
    if length < bins[0].min_length:
        raise ProfileError(f"no length bin serves {length} keys; the profile has: {spans}")
    return len(bins) - 1


def table_name(profile: Profile) -> str:
    """``MODEL_fuse_STRIDE``, as the public implementation names its tables: ``llama_fuse_8``."""
    return (
        f"{re.sub('[^A-Za-z0-9]+', '_', profile.model.model_type).strip('_') or 'model'}_fuse_{profile.method.stride}"
    )


def table_text(rows: Sequence[Sequence[float]], name: str, *, python: bool) -> str:
    """A file with one table that :func:`read_table` and the public implementation's readers understand.

    Args:
        rows: thresholds[layer][query head], in [0, 1]; they come back exactly.
        name: of the table; Python source needs an identifier.
        python: ``NAME = [[...], ...]`` instead of ``{"NAME": [[...], ...]}``.

    Raises:
        ProfileError: the name cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name):
        raise ProfileError(f"--name must be letters, digits and underscores (100 at most), got {_yaml.quote(name)}")
    table = [list(row) for row in rows]
    return f"{name} = {json_text(table)}\n" if python else json_text({name: table}) + "\n"
