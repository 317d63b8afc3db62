"""A long run of all readers under atheris (coverage-guided): ``python tests/fuzz/run.py --seconds 3600 --seed 1 --log FILE``.

Whatever is raised beside XcalibError is logged once for each place it comes from, its input is kept beside the log, and the run
goes on; the log ends with a line of counts, and every minute has one. Exit code 1 where anything was found. Without atheris
(``pip install atheris``) the same mutations run without its guidance, and the log says so.
"""

import argparse
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
try:
    import atheris
except ImportError:
    atheris = None

if atheris is not None:
    with atheris.instrument_imports(include=["xcalib._yaml", "xcalib._reading", "xcalib._arrays", "xcalib.profile"]):
        import xcalib._arrays
        import xcalib._reading
        import xcalib._yaml
        import xcalib.profile
    with atheris.instrument_imports(
        include=["xcalib.recipe", "xcalib.interop", "xcalib.data._jsonl", "xcalib.collect.reading"]
    ):
        import xcalib.collect.reading
        import xcalib.data._jsonl
        import xcalib.interop
        import xcalib.recipe  # noqa: F401

from mutations import mutated
from readers import Reader, holds, readers

SLOW = 10.0  # seconds of one input


class Run:
    """Counts what came of each input and keeps what should not have come."""

    def __init__(self, log: Path, seed: int) -> None:
        self.readers = readers()
        self.log, self.seed = log, seed
        self.began = self.told = time.monotonic()
        self.valid: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.found: dict[str, int] = {}
        self.log.parent.mkdir(parents=True, exist_ok=True)

    def one(self, data: bytes) -> None:
        """The first byte names the reader."""
        reader = self.readers[data[0] % len(self.readers)] if data else self.readers[0]
        start = time.process_time()  # not on the wall: others may have the processor
        try:
            (self.valid if holds(reader, data[1:]) else self.refused)[reader.name] += 1
            if time.process_time() - start > SLOW:
                self.keep(reader, data[1:], f"slow: {time.process_time() - start:.0f} s", "")
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = next((f"{f.filename}:{f.lineno}" for f in reversed(frames) if "/xcalib/" in f.filename), "?")
            self.keep(reader, data[1:], f"{type(error).__name__} at {place}", traceback.format_exc())
        if time.monotonic() - self.told > 60:
            self.tell("running")

    def keep(self, reader: Reader, data: bytes, what: str, trace: str) -> None:
        key = f"{reader.name}: {what}"
        self.found[key] = self.found.get(key, 0) + 1
        if self.found[key] == 1:
            file = self.log.with_name(f"{self.log.stem}-found-{len(self.found)}")
            file.write_bytes(data)
            self.write(f"FOUND {key}; input in {file.name}\n{trace}")

    def tell(self, state: str) -> None:
        self.told = time.monotonic()
        counts = {
            "state": state,
            "guided": atheris is not None,
            "seed": self.seed,
            "seconds": round(self.told - self.began),
            "cpu_seconds": round(time.process_time()),
            "executions": self.valid.total() + self.refused.total() + sum(self.found.values()),
            "valid": dict(self.valid),
            "refused": dict(self.refused),
            "found": self.found,
        }
        self.write(json.dumps(counts))

    def write(self, line: str) -> None:
        with self.log.open("a") as file:
            file.write(line + "\n")


def mutate(data: bytes, limit: int, seed: int, corpus: list[bytes]) -> bytes:
    """Keep the reader's byte, change the file; a third is left to the fuzzer's own mutations.

    One in six begins with a valid file: the fuzzer keeps only inputs that reach new code, and readers share most of theirs.
    """
    rng = random.Random(seed)
    if len(data) < 2 or rng.randrange(6) == 0:
        data = rng.choice(corpus)
    if atheris is not None and rng.randrange(3) == 0:
        return data[:1] + bytes(atheris.Mutate(data[1:] or b"x", limit - 1))
    return (data[:1] + mutated(rng, data[1:]))[:limit]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, required=True, help="of JSON lines; inputs that are kept lie beside it")
    chosen = parser.parse_args()
    run = Run(chosen.log, chosen.seed)
    corpus = [bytes([index]) + seed for index, reader in enumerate(run.readers) for seed in reader.seeds]
    if atheris is None:
        unguided(run, corpus, chosen.seconds, chosen.seed)
    else:
        guided(run, corpus, chosen.seconds, chosen.seed)
    return 1 if run.found else 0


def unguided(run: Run, corpus: list[bytes], seconds: int, seed: int) -> None:
    rng = random.Random(seed)
    while time.monotonic() - run.began < seconds:
        run.one(mutate(rng.choice(corpus), 1 << 16, rng.randrange(2**63), corpus))
    run.tell("done")


def guided(run: Run, corpus: list[bytes], seconds: int, seed: int) -> None:
    folder = run.log.with_name(f"{run.log.stem}-corpus")
    folder.mkdir(exist_ok=True)
    for index, data in enumerate(corpus):
        (folder / f"seed-{index:02d}").write_bytes(data)

    def one(data: bytes) -> None:
        run.one(data)
        if time.monotonic() - run.began > seconds:
            run.tell("done")
            sys.stderr.flush()
            os._exit(1 if run.found else 0)  # libFuzzer has no other way back

    options: list[Any] = [
        f"-seed={seed}",
        "-max_len=65536",
        "-timeout=120",
        "-rss_limit_mb=6144",
        "-use_value_profile=1",
    ]

    def mutator(data: bytes, limit: int, seed: int) -> bytes:
        return mutate(data, limit, seed, corpus)

    arguments = [sys.argv[0], *options, f"-artifact_prefix={folder.parent}/", str(folder)]
    atheris.Setup(arguments, one, custom_mutator=mutator, enable_python_coverage=True)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
