"""Documents from JSON lines: plain text, questions with their answers, and rows in the form of LongBench."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from xcalib.data._documents import Document, Drops, Question, in_memory, one_line
from xcalib.data._longbench import context_of, known_metric, prompt
from xcalib.data._metrics import METRICS, Metric
from xcalib.data._sample import text_digest
from xcalib.errors import DataError

__all__ = ["MAX_LINE", "jsonl_documents"]

# Bytes of a row: a million tokens take 4 to 6 MB. JSON of nothing but brackets grows twentyfold in memory.
MAX_LINE = 16 * 2**20


def jsonl_documents(spec: str, argument: str, drops: Drops) -> Iterator[Document]:
    """One document per line; rows with ``answers`` or ``answer`` are whole prompts.

    The text is the field that ``argument`` names, else ``text``, else made from ``context`` and ``input``.

    Raises:
        DataError: the file does not exist or cannot be read.
    """
    path, field = _file_and_field(spec, argument)
    try:
        with path.open("rb") as file:
            start, blank = 0, True
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    drops.add(spec, f"more than {MAX_LINE:,} bytes", f"line {number}")
                    start, blank = start + _skip_line(file, line), False
                    continue
                if line.strip():
                    try:
                        yield replace(_document(path, start, line, field), name=f"line {number}")
                    except UnicodeDecodeError as error:
                        drops.add(spec, "not UTF-8", f"line {number} byte {start + error.start}")
                    except ValueError as error:
                        drops.add(spec, str(error), f"line {number}")
                start += len(line)
                blank = blank and not line.strip()
            if blank:
                drops.add(spec, "empty", path.name)
    except OSError as error:
        raise DataError(f"{spec}: cannot read '{path}' ({one_line(error)})") from error


def _file_and_field(spec: str, argument: str) -> tuple[Path, str]:
    try:
        path, field = Path(argument).expanduser(), ""
        if not path.is_file() and ":" in argument:
            name, _, field = argument.rpartition(":")
            path = Path(name).expanduser()
        if path.is_file():
            return path, field
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, or the home of nobody
        raise DataError(f"{spec}: {one_line(error)}") from None
    raise DataError(f"{spec}: no file '{path}'")


def _skip_line(file: BinaryIO, line: bytes) -> int:
    """Read on to the end of a line without keeping it; its length in bytes, with the part that was read."""
    length = len(line)
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE)
        length += len(line)
    return length


def _document(path: Path, start: int, line: bytes, field: str) -> Document:
    """Raises ValueError with the reason for which the row is of no use."""
    row = _parse(line)
    text = _text(row, field)
    length = len(line)

    def read(first: int, last: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            again = _text(_parse(file.read(length)), field)
        return again.encode("utf-8", "replace")[first:last].decode("utf-8", "ignore")

    # Only the digest and the size are kept: the text is read again when a window is needed.
    context = None if field or "text" in row else context_of(row)
    question = _question(row, None if context is None else known_metric(row))
    document = replace(in_memory("", text, question=question), read=read)
    if context is None:
        return document
    # Rows that ask about one context must not be parted by the split.
    return replace(document, digest=text_digest(context), variant=document.digest)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError("bad JSON") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _text(row: Mapping[str, Any], field: str) -> str:
    name = field or "text"
    if name not in row:
        context = None if field else context_of(row)
        if context is None:
            raise ValueError(f"no field '{name}'")
        text = prompt(row) if context.strip() else ""
    else:
        text = row[name]
        if not isinstance(text, str):
            raise ValueError(f"field '{name}' is not a string")
    if not text.strip():
        raise ValueError("empty")
    return text


def _question(row: Mapping[str, Any], usual: Metric | None) -> Question:
    answers = _answers(row)
    metric = row.get("metric")
    if not answers:
        if metric is not None:
            raise ValueError("a metric but no answers")
        return Question()
    dataset = row.get("dataset")
    return Question(
        answers=answers,
        metric=(usual or "recall") if metric is None else _metric(metric),
        max_new_tokens=_new_tokens(row.get("max_new_tokens")),
        task=" ".join(dataset.split()) if isinstance(dataset, str) else "",
    )


def _answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = row.get("answers", row.get("answer"))
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) and _finite(item) and str(item).strip() for item in values):
        raise ValueError("answers are not a string or a list of strings")
    return tuple(dict.fromkeys(str(item).strip() for item in values))


def _finite(item: str | int | float) -> bool:
    return not isinstance(item, float) or math.isfinite(item)


def _metric(value: Any) -> Metric:
    name = value.lower() if isinstance(value, str) else value
    if name not in METRICS:
        raise ValueError(f"unknown metric {str(value)[:40]!r}; allowed: {', '.join(METRICS)}")
    return cast("Metric", name)


def _new_tokens(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("max_new_tokens is not a whole number of at least 1")
    return value
