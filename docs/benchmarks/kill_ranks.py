"""Kill random ranks of a collection at random moments, go on with any number of ranks, compare with one process.

    python docs/benchmarks/kill_ranks.py --collections 2 --kills 4 --json docs/benchmarks/kill-ranks.json

Every collection is started ``--kills`` times, each time with two or three ranks of which one is killed (SIGKILL) while it
measures; then it runs to its end, and its files are compared byte for byte with those of one process. CPU only; Linux.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parent.resolve() / "retrieval" / "model"
DATA = ("--data", "builtin", "--num-samples", "12", "--max-length", "512", "--min-length", "256", "--block-size", "64")
FILES = ("curves.json", "curves.safetensors")


def start(out: Path, ranks: int) -> "subprocess.Popen[str]":
    workers = ("--workers", str(ranks)) if ranks > 1 else ()
    command = [sys.executable, "-m", "xcalib", "collect", str(MODEL), *DATA, "--out", str(out), *workers, "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=out.parent, env=environment)


def processes(launcher: int, ranks: int) -> list[int]:
    """Process numbers of the ranks, in their order."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found[int(next(item[5:] for item in variables if item.startswith(b"RANK=")))] = int(child)
    return [found[rank] for rank in range(ranks)]


def finished_units(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "units").glob("[!.]*.safetensors")}


def kill_one(out: Path, chance: random.Random, longest: float) -> dict[str, Any]:
    """Start with some ranks, kill one of them at a random moment of the measurement, and see how the job ends."""
    ranks, before = chance.randint(2, 3), finished_units(out)
    victim = chance.randrange(ranks)
    process = start(out, ranks)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("Measuring"):
            break
    time.sleep(chance.uniform(0, longest))
    began = time.monotonic()
    if process.poll() is None:
        os.kill(processes(process.pid, ranks)[victim], signal.SIGKILL)
    lines += process.stderr.read().splitlines()  # until all ranks have closed it
    code = process.wait()
    seconds, after = time.monotonic() - began, finished_units(out)
    line = f"error: rank {victim} on \\S+ was killed by SIGKILL .*--resume"
    return {
        "ranks": ranks,
        "victim": victim,
        "code": code,
        "named": re.match(line, lines[-1]) is not None,
        "lines": sum(text.startswith("error") for text in lines),
        "seconds": round(seconds, 2),
        "kept": len(after),
        "lost_or_repeated": sum(after.get(name) != stamp for name, stamp in before.items()),
    }


def one_collection(root: Path, number: int, kills: int, longest: float) -> dict[str, Any]:
    chance, out = random.Random(number), root / f"collection-{number}"
    killed = []
    while len(killed) < kills:
        found = kill_one(out, chance, longest)
        if found["code"] == 0:  # done before the kill
            break
        killed.append(found)
        print(json.dumps(found), flush=True)
    ranks = chance.randint(1, 3)
    process = start(out, ranks)
    process.communicate()
    same = all((out / name).read_bytes() == (root / "alone" / name).read_bytes() for name in FILES)
    return {"seed": number, "kills": killed, "last_ranks": ranks, "code": process.returncode, "same_bytes": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collections", type=int, default=5)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring before a kill, at most")
    parser.add_argument("--json", type=Path, help="file for the record")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start(root / "alone", 1).communicate()
        found = [one_collection(root, number, chosen.kills, chosen.seconds) for number in range(chosen.collections)]
    every = [kill for one in found for kill in one["kills"]]
    record = {
        "command": " ".join(["python", "docs/benchmarks/kill_ranks.py", *sys.argv[1:]]),
        "kills": len(every),
        "named_in_one_line": sum(kill["named"] and kill["lines"] == 1 for kill in every),
        "slowest_end_seconds": max(kill["seconds"] for kill in every),
        "units_lost_or_repeated": sum(kill["lost_or_repeated"] for kill in every),
        "collections": len(found),
        "same_bytes": sum(one["same_bytes"] for one in found),
        "runs": found,
    }
    if chosen.json:
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "runs"}, indent=1))


if __name__ == "__main__":
    main()
