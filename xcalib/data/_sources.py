"""Documents from the shipped corpus and from text files."""

import codecs
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from xcalib._suggest import nearest
from xcalib.data._documents import Document, Drops, in_memory
from xcalib.data._sample import DIGEST_CHARS
from xcalib.data._utf8 import NotTextError, TextChecker
from xcalib.errors import DataError

__all__ = ["builtin_documents", "categories", "text_documents"]

_CHUNK = 1 << 20
_LEAST_TO_HALVE = 4096  # bytes: halves of less serve nobody
_BOM = codecs.BOM_UTF8


@cache
def _corpus() -> tuple[Document, ...]:
    documents: list[Document] = []
    for folder in files("xcalib.data.corpus").iterdir():
        if not folder.is_dir() or folder.name.startswith(("_", ".")):
            continue
        entries = [entry for entry in folder.iterdir() if entry.name.endswith(".txt")]
        kinds = Counter(_kind(entry.name) for entry in entries)
        for entry in entries:
            kind = _kind(entry.name)
            group = f"{folder.name}/{kind if kinds[kind] > 1 else kinds.most_common(1)[0][0]}"  # a kind of one joins the largest
            name = f"{folder.name}/{entry.name}"
            documents.append(in_memory(name, entry.read_text(encoding="utf-8"), group=group))
    return tuple(sorted(documents, key=lambda document: document.name))


def _kind(name: str) -> str:
    """Files of one origin begin with one word: ``jargon-a.txt``, ``tz-zones.txt``."""
    return name.partition("-")[0]


def categories() -> tuple[str, ...]:
    """Categories of the shipped corpus, in alphabetical order."""
    return tuple(sorted({document.category for document in _corpus()}))


def builtin_documents(argument: str) -> list[Document]:
    """The shipped corpus, or the categories named in ``argument`` (comma separated).

    Raises:
        DataError: an unknown category.
    """
    wanted = [name.strip() for name in argument.split(",")] if argument else list(categories())
    for name in wanted:
        if name not in categories():
            known = categories()
            raise DataError(
                f"builtin: unknown category '{name}'{nearest(name, known) or ';'} allowed: {', '.join(known)}"
            )
    return [document for document in _corpus() if document.category in wanted]


def text_documents(spec: str, argument: str, drops: Drops, *, halve: bool = True) -> Iterator[Document]:
    """One document per file of a file, folder (recursive) or glob pattern; of a single file its two halves, with ``halve``.

    Raises:
        DataError: the path does not exist or the pattern matches nothing.
    """
    paths = _find_files(spec, argument, drops)
    for path in paths:
        try:
            scanned = _scan_file(path)
        except NotTextError as error:
            drops.add(spec, error.reason, f"{path.name} {error.place}")
        except OSError as error:
            drops.add(spec, f"unreadable ({type(error).__name__})", path.name)
        else:
            if scanned is None:
                drops.add(spec, "empty", path.name)
            else:
                yield from _halves(*scanned) if halve and len(paths) == 1 else scanned[:1]


def _halves(document: Document, span: "_Span") -> list[Document]:
    """A file in two, at the line break after its middle: one half can calibrate, the other be held out."""
    if span.size < _LEAST_TO_HALVE:
        return [document]
    cut = span.cut()
    halves = (replace(span, size=cut), replace(span, first=span.first + cut, size=span.size - cut))
    digests = [half.digest() for half in halves]
    return [
        replace(
            document, name=f"{document.name} ({which} half)", digest=digests[index], size=half.size, read=half.read,
            whole=document.digest, other=digests[1 - index],
        )
        for index, (which, half) in enumerate(zip(("first", "second"), halves, strict=True))
    ]  # fmt: skip


@dataclass(frozen=True)
class _Span:
    """Bytes of a text file, of which nothing is held: ``size`` from ``first`` on."""

    path: Path
    first: int
    size: int

    def raw(self, start: int, stop: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.first + start)
            return file.read(max(0, min(stop, self.size) - start))

    def read(self, start: int, stop: int) -> str:
        return self.raw(start, stop).decode("utf-8", "ignore")

    def digest(self) -> str:
        found = hashlib.sha256()
        for start in range(0, self.size, _CHUNK):
            found.update(self.raw(start, start + _CHUNK))
        return found.hexdigest()[:DIGEST_CHARS]

    def cut(self) -> int:
        """Where the second half begins: at a line, or in a file without any at a character."""
        middle = self.size // 2
        after = self.raw(middle, middle + _CHUNK)
        line = after.find(b"\n") + 1
        if line and middle + line < self.size:
            return middle + line
        return middle + next(index for index, byte in enumerate(after) if byte & 0xC0 != 0x80)


def _find_files(spec: str, argument: str, drops: Drops) -> list[Path]:
    path = Path(argument).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _walk(spec, path, drops)
    parts = path.parts
    magic = next((i for i, part in enumerate(parts) if any(char in part for char in "*?[")), None)
    if magic is None:
        raise DataError(f"{spec}: no file or folder '{argument}'")
    base, pattern = Path(*parts[:magic]), Path(*parts[magic:])
    found = sorted(match for match in base.glob(str(pattern)) if match.is_file())
    if not any(part.startswith(".") for part in pattern.parts):
        for match in found:
            if _hidden(match, base):
                drops.add(spec, "hidden file or folder", match.name)
        found = [match for match in found if not _hidden(match, base)]
    if not found:
        raise DataError(f"{spec}: no file matches '{argument}'{drops.hint(spec)}")
    return found


def _hidden(path: Path, base: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(base).parts)


def _walk(spec: str, root: Path, drops: Drops) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        for name in subfolders + names:
            path = Path(folder, name)
            if name.startswith("."):
                drops.add(spec, "hidden file or folder", name)
            elif path.is_file():
                found.append(path)
            elif path.is_symlink() or not path.is_dir():
                drops.add(spec, "link to a folder, broken link or special file", name)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    return sorted(found)


def _scan_file(path: Path) -> tuple[Document, _Span] | None:
    """Check and hash a file in pieces, and where its text lies; None when it holds only white space.

    Raises:
        NotTextError: it holds a NUL byte, or bytes that are not UTF-8.
    """
    digest, size, blank = hashlib.sha256(), 0, True
    checker = TextChecker()
    with path.open("rb") as file:
        skipped = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(skipped)
        checker.position = skipped
        while data := file.read(_CHUNK):
            blank = checker.text(data).isspace() and blank
            digest.update(data)
            size += len(data)
        checker.text(b"", final=True)

    span = _Span(path, skipped, size)
    return (
        None if blank or size == 0 else (Document(path.name, digest.hexdigest()[:DIGEST_CHARS], size, span.read), span)
    )
