"""Memory and time of the worst files within the readers' limits, as rows of Markdown: ``python tests/fuzz/worst.py``."""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from xcalib.data._documents import Drops
from xcalib.data._jsonl import MAX_LINE, jsonl_documents
from xcalib.errors import XcalibError
from xcalib.interop import read_table
from xcalib.interop.source import MAX_CHARS
from xcalib.profile import load_profile

MIB = 1 << 20


def read_rows(path: Path) -> object:
    return list(jsonl_documents("jsonl:worst", str(path), Drops()))


# what it is -> the file's name, its text, its reader
WORST: dict[str, tuple[str, Callable[[], str], Callable[[Path], object]]] = {
    "profile, YAML, 2,000,000 numbers": ("p.yaml", lambda: "a: [" + "1," * 1_999_000 + "1]", load_profile),
    "profile, YAML, texts": ("p.yaml", lambda: "a: [" + "'xA'," * (15 * MIB // 8) + "]", load_profile),
    "profile, YAML, one text": ("p.yaml", lambda: "a: " + "x" * (16 * MIB - 10), load_profile),
    "profile, JSON, 2,000,000 lists": ("p.json", lambda: '{"a":[' + "[]," * 1_999_000 + "[]]}", load_profile),
    "a row of lists": ("r.jsonl", lambda: '{"a":[' + "[]," * ((MAX_LINE - 100) // 3) + "[]]}\n", read_rows),
    "table, JSON, lists": ("t.json", lambda: "[" + "[]," * ((4 * MIB - 100) // 3) + "[]]", read_table),
    "table, Python, statements": ("t.py", lambda: "a;" * (MAX_CHARS // 2), read_table),
    "table, Python, lists": ("t.py", lambda: "x=[" + "[]," * (MAX_CHARS // 3 - 9) + "]", read_table),
}


def one(what: str) -> None:
    name, text, read = WORST[what]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_text(text())
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with suppress(XcalibError):
            read(path)
        seconds = time.process_time() - start
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"| {what} | {path.stat().st_size / MIB:.1f} | {more:.0f} | {seconds:.1f} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(sys.argv[1])
    else:
        for each in WORST:  # a process of its own for each: a peak never falls
            subprocess.run([sys.executable, __file__, each], check=True)
