"""kill -9 at many moments over ``collect``, ``search`` with rounds, ``refine`` and the saving of profiles; then the same bytes.

    python tests/soak_kills.py --kills 100

Each run is a child that this process, with torch imported, forks; it runs the commands with ``--resume``, those whose file is
there already left out, as make would. Half of the kills come at a random time; the others at a random one of the moments at which
the child flushes something to disk, so that the middle of writing is met as often. When a child gets to the end, what it
made is compared with that of a run that nobody killed, and the next begins anew. A trace says which unit of work was begun
and finished when: none that was finished may be begun again. Prints JSON; exit code 1 where anything differs.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RETRIEVAL = Path(__file__).parent.parent / "docs" / "benchmarks" / "retrieval"
FILES = (
    "curves/curves.safetensors", "curves/curves.json", "work/curves/curves.safetensors", "work/curves/curves.json",
    "profile.yaml", "refined.yaml",
)  # fmt: skip
TRACE = "trace.jsonl"


def commands(model: str, data: list[str], length: int) -> dict[str, tuple[str, list[str]]]:
    """The file that a command ends with, and its arguments."""
    specs = [part for spec in data for part in ("--data", spec)]
    how = [*specs, "--max-length", str(length), "--num-samples", "2", "--block-size", "64", "--gain-samples", "1"]
    drawn = ["--samples", "2", "--validation-samples", "2", "--heldout-samples", "2", "--max-length", str(length)]
    profile = ["--target", "balanced:density=0.6", "--heldout-samples", "2", "--rounds", "2", "--force"]
    trials = ["--model", model, *specs, *drawn, "--trials", "5", "--groups", "2", "--range", "2", "--force"]
    return {
        "collect": ("curves/curves.json", ["collect", model, *how, "--out", "curves"]),
        "search": ("profile.yaml", ["search", model, *how, *profile, "--work", "work", "--out", "profile.yaml"]),
        "refine": ("refined.yaml", ["refine", "profile.yaml", *trials, "--work", "work", "--out", "refined.yaml"]),
    }


def documents(path: Path, length: int) -> str:
    """Write documents for the retrieval model; the spec that reads them."""
    import numpy as np

    sys.path.insert(0, str(RETRIEVAL))
    from retrieval_data import document, words

    vocabulary, lines = words(), []
    for number in range(40):
        tokens = document(np.random.default_rng(number), 2 * length)[0][1:]  # without the bos token
        lines.append(json.dumps({"text": " ".join(vocabulary[token] for token in tokens)}))
    path.write_text("\n".join(lines) + "\n")
    return f"jsonl:{path}:text"


# --- in the child


class Trace:
    """What the child does, on disk at once; and its death at the flush whose number is ``die_at``."""

    def __init__(self, die_at: int | None) -> None:
        self._file = os.open(TRACE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._flush, self.flushes, self._die_at = os.fsync, 0, die_at
        self.command = ""

    def say(self, event: str, unit: str) -> None:
        os.write(self._file, json.dumps([event, self.command, unit]).encode() + b"\n")

    def fsync(self, descriptor: int) -> None:
        self.flushes += 1
        if self.flushes == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._flush(descriptor)

    def install(self) -> None:
        """Into everything that is a unit of work."""
        from xcalib.collect.units import Units
        from xcalib.search import _study
        from xcalib.search._objective import PointObjective
        from xcalib.search._sampler import DRAW
        from xcalib.search._validation import Validation

        load, save, objective = Units.load, Units.save, PointObjective.__call__
        run_one, validate = _study._run_one, Validation._measure
        os.fsync = self.fsync  # type: ignore[assignment]

        def loading(units: Units, name: str) -> Any:
            found = load(units, name)
            if found is None:
                self.say("begin", f"{units.folder}/{name}")
            return found

        def saving(units: Units, name: str, arrays: Any) -> None:
            save(units, name, arrays)
            self.say("done", f"{units.folder}/{name}")

        def draw(study: Any, number: int) -> str:
            return f"trial {study.get_trials(deepcopy=False)[number].user_attrs[DRAW]}"

        def trying(self_: PointObjective, trial: Any) -> float:
            self.say(
                "begin", f"trial {_study.place_of(trial.study, trial.number)}"
            )  # one worker: its draw, not drawn yet
            return objective(self_, trial)

        def running(study: Any, *arguments: Any) -> None:
            run_one(study, *arguments)
            self.say("done", draw(study, study.get_trials(deepcopy=False)[-1].number))

        def validating(self_: Validation, key: str, *arguments: Any) -> Any:
            known = key in self_._study.user_attrs
            if not known:
                self.say("begin", key)
            found = validate(self_, key, *arguments)
            if not known:
                self.say("done", key)
            return found

        Units.load, Units.save = loading, saving  # type: ignore[method-assign]
        PointObjective.__call__, Validation._measure = trying, validating  # type: ignore[method-assign]
        _study._run_one = running


def child(steps: dict[str, tuple[str, list[str]]], die_at: int | None) -> None:
    """Run what is not done yet; never returns."""
    from xcalib.cli import main

    output = os.open("output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    trace = Trace(die_at)
    trace.install()
    for name, (file, arguments) in steps.items():
        if Path(file).exists():
            continue
        trace.command = name
        trace.say("command", name)
        sys.argv = ["xcalib", *arguments, "--resume"]
        try:
            main()
        except SystemExit as left:
            sys.stderr.flush()
            if left.code:
                os._exit(int(left.code))  # type: ignore[arg-type]
    trace.say("command", "")
    trace.say("flushes", str(trace.flushes))
    os._exit(0)


# --- in the parent


def run(folder: Path, steps: dict[str, tuple[str, list[str]]], seconds: float | None, die_at: int | None) -> int:
    """Exit code of a child, negative for the signal that ended it; killed after ``seconds``."""
    pid = os.fork()
    if not pid:
        os.chdir(folder)
        try:
            child(steps, die_at)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(99)
    if seconds is not None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def events(folder: Path) -> list[tuple[str, str, str]]:
    with contextlib.suppress(FileNotFoundError):
        return [tuple(json.loads(line)) for line in (folder / TRACE).read_text().splitlines()]  # type: ignore[misc]
    return []


def result(folder: Path) -> dict[str, str]:
    """Digests of all that a run makes, its trials among it."""
    import optuna

    from xcalib.search._sampler import DRAW
    from xcalib.search._storage import open_storage

    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    storage = open_storage(str(folder / "work" / "refine.journal"))
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    kept = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name != "FAIL"]
    trials = sorted((t.user_attrs[DRAW], t.state.name, t.value, sorted(t.params.items())) for t in kept)
    return found | {"trials": json.dumps(trials)}


def repeated(trace: list[tuple[str, str, str]]) -> tuple[int, list[str]]:
    """How often a unit was begun again, and those that were begun again although they were finished."""
    begun, done, wrong = Counter[str](), set(), []
    for event, command, unit in trace:
        key = f"{command}: {unit}"
        if event == "begin":
            begun[key] += 1
            wrong += [key] if key in done else []
        elif event == "done":
            done.add(key)
    return sum(begun.values()) - len(begun), wrong


def soak(root: Path, steps: dict[str, tuple[str, list[str]]], kills: int, seed: int, say: Callable[[str], None]) -> Any:
    rng = random.Random(seed)
    whole = root / "whole"
    whole.mkdir()
    began = time.monotonic()
    if run(whole, steps, None, None):
        raise SystemExit((whole / "output.log").read_text())
    took, expected = time.monotonic() - began, result(whole)
    (flushes,) = (int(text) for event, _, text in events(whole) if event == "flushes")
    units = sum(event == "begin" for event, _, _ in events(whole))
    say(f"not killed: {took:.1f} s, {units} units, {flushes} flushes")
    record: dict[str, Any] = {"kills": 0, "kills_by_command": Counter(), "runs_compared": 0, "runs_equal": 0}
    record |= {"units_per_run": units, "seconds_per_run": round(took, 1), "units_begun_again": 0, "wrong": []}
    while record["kills"] < kills:
        folder = root / f"run-{record['runs_compared']}"
        folder.mkdir()
        killed = 0
        while True:
            timed = rng.random() < 0.5
            last = record["kills"] + killed >= kills
            code = run(
                folder,
                steps,
                rng.uniform(0, took / 4) if timed and not last else None,
                rng.randrange(1, flushes // 4) if not timed and not last else None,
            )
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise SystemExit(f"exit code {code}\n{(folder / 'output.log').read_text()[-3000:]}")
            killed += 1
            commands_seen = [command for event, _, command in events(folder) if event == "command"]
            record["kills_by_command"][commands_seen[-1] if commands_seen else "start"] += 1
        again, wrong = repeated(events(folder))
        record["kills"] += killed
        record["runs_compared"] += 1
        record["runs_equal"] += result(folder) == expected
        record["units_begun_again"] += again
        record["wrong"] += wrong
        say(
            f"{record['kills']} kills, {record['runs_equal']} of {record['runs_compared']} runs equal, {again} units again"
        )
    record["seconds"] = round(time.monotonic() - began, 1)
    record["ok"] = record["runs_equal"] == record["runs_compared"] and not record["wrong"]
    record["ok"] &= record["units_begun_again"] <= record["kills"]
    return record


def warm_up(model: str) -> None:
    """Import all that children need, once; forked ones have no pool of threads."""
    import torch

    torch.set_num_threads(1)
    import scipy.stats
    import sqlalchemy

    import xcalib.cli.app
    import xcalib.evaluation
    from xcalib.models.loading import load_model
    from xcalib.search import _objective, _storage, _validation

    used = (scipy.stats, sqlalchemy, xcalib.cli.app, xcalib.evaluation, _objective, _storage, _validation)
    assert all(used)
    load_model(model)


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="xcalib-kills-") as temporary:
        yield Path(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(RETRIEVAL / "model"))
    parser.add_argument("--data", action="append", help="default the retrieval model's")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--work", type=Path, help="a new folder, kept")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    warm_up(options.model)
    with work_folder(options.work) as root:
        data = options.data or [documents(root / "documents.jsonl", options.length)]
        steps = commands(options.model, data, options.length)
        record = soak(root, steps, options.kills, options.seed, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(record, indent=1))
    sys.exit(0 if record["ok"] else 1)


if __name__ == "__main__":
    main()
