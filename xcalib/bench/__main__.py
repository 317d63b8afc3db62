"""``python -m xcalib.bench bench.json`` prints a file of results as Markdown, summed up anew."""

import json
import sys
from pathlib import Path

from xcalib.bench.report import markdown
from xcalib.bench.summary import summarise


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m xcalib.bench FILE")
    try:
        results = json.loads(Path(sys.argv[1]).read_text())
        results["summary"] = summarise(results)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(
            f"error: {sys.argv[1]} holds no results of the bench ({type(error).__name__}: {error})"
        ) from error
    sys.stdout.write(markdown(results))


if __name__ == "__main__":
    main()
