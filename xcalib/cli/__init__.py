"""The command line: it parses, calls and prints."""

import os
import sys
from typing import Any, NoReturn

from xcalib.errors import XcalibError

__all__ = ["main"]


def main() -> None:
    """Entry point of ``xcalib``: every expected failure is one line on stderr and exit code 2; 3 is a missed target."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm: our own bar is the only one
    import typer

    from xcalib.cli.app import app
    from xcalib.cli.completion import COMPLETING, whole_words

    if os.environ.get(COMPLETING) == "complete_bash":
        with whole_words():
            app(prog_name="xcalib")

    usage_error: Any = typer.BadParameter.__bases__[0]  # typer has no public name for its base
    try:
        code = app(args=sys.argv[1:] or ["--help"], prog_name="xcalib", standalone_mode=False)
    except XcalibError as error:
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", code=130)
    except (RuntimeError, MemoryError) as error:
        from xcalib.collect.chunks import memory_error

        known = memory_error(error)
        if known is None:
            raise
        _fail(str(known))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}")
    except usage_error as error:
        context = getattr(error, "ctx", None)
        _fail(f"{error.format_message()} (see {context.command_path if context else 'xcalib'} --help)")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> NoReturn:
    from xcalib.cli.workers import speaks

    if speaks():
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(code)
