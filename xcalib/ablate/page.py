"""``python -m xcalib.ablate DIR`` prints the tables of a folder as Markdown; ``--into PAGE --label NAME`` fills a page,
``--png`` draws the pictures anew.

A page has, for each table, a line ``<!-- ablate NAME TABLE -->`` and after it ``<!-- end -->``: what stands between is replaced.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from xcalib._files import replace_file
from xcalib.ablate.plot import draw
from xcalib.ablate.report import TITLES, check_result, markdown
from xcalib.ablate.variants import TABLES
from xcalib.errors import AblationError

__all__ = ["fill", "load_results", "main"]

END = "<!-- end -->"


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The tables of a folder by name, in the order of the paper.

    Raises:
        AblationError: there is none, or a file is not a table's results.
    """
    found = {}
    for table in TABLES:
        path = folder / f"{table}.json"
        if path.is_file():
            try:
                found[table] = check_result(json.loads(path.read_bytes()), str(path))
            except (OSError, ValueError) as error:
                raise AblationError(f"{path}: cannot be read: {error}") from error
    if not found:
        raise AblationError(f"{folder}: holds no results of 'xcalib ablate' ({', '.join(TABLES)}.json)")
    return found


def fill(page: str, label: str, results: dict[str, dict[str, Any]], pictures: dict[str, str], where: str) -> str:
    """The page with each table between its marks, and the table's picture below it where there is one (path from the page).

    Raises:
        AblationError: a table has no marks in the page.
    """
    for table, result in results.items():
        mark = f"<!-- ablate {label} {table} -->"
        before, found, rest = page.partition(mark)
        _, closed, after = rest.partition(END)
        if not found or not closed:
            raise AblationError(f"{where}: has no '{mark}' with '{END}' after it")
        picture = f"\n![{TITLES[table]}]({pictures[table]})\n" if table in pictures else ""
        page = f"{before}{mark}\n{markdown(result)}{picture}{END}{after}"
    return page


def _pictures(folder: Path, page: Path, results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Those that exist, as a path from the page."""
    paths = {table: folder / f"{table}.png" for table in results}
    return {
        table: Path(os.path.relpath(path, page.parent)).as_posix() for table, path in paths.items() if path.is_file()
    }


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m xcalib.ablate", description="Tables of a folder as Markdown.")
    parser.add_argument("folder", type=Path, help="--out of 'xcalib ablate'")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="replace what stands between this page's marks")
    parser.add_argument("--label", metavar="NAME", help="which marks, as in <!-- ablate NAME pattern -->")
    parser.add_argument("--png", action="store_true", help="draw TABLE.png of every table in the folder")
    chosen = parser.parse_args(arguments)
    if (chosen.into is None) != (chosen.label is None):
        parser.error("--into and --label go together")
    try:
        results = load_results(chosen.folder)
        for table, one in results.items() if chosen.png else ():
            replace_file(chosen.folder / f"{table}.png", draw(one))
        if chosen.into is None:
            sys.stdout.write("\n".join(markdown(one, f"## {TITLES[table]}") for table, one in results.items()))
        else:
            pictures = _pictures(chosen.folder, chosen.into, results)
            page = fill(chosen.into.read_text("utf-8"), chosen.label, results, pictures, str(chosen.into))
            replace_file(chosen.into, page.encode())
    except (AblationError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except (LookupError, TypeError) as error:  # JSON that only looks like ours
        raise SystemExit(f"error: {chosen.folder}: a result is incomplete ({type(error).__name__}: {error})") from error
