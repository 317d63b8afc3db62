"""Kill refinement workers that share one study, again and again, and count.

    python tests/soak_workers.py --kills 100 --trials 300

Several workers, each as if on a machine of its own (heartbeats alone tell who lives), work on a study on a PostgreSQL that this
script starts. One after the other is killed with SIGKILL at a random time and another takes its place. In the end there must be
exactly as many finished trials as asked for, with the numbers 0, 1, 2, ... as their draws and no two with the same values. Prints
JSON; exit code 1 where anything differs. ``--storage`` takes another storage, ``journal:PATH`` say.
"""

import argparse
import importlib.util
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.study import Study
from optuna.trial import Trial, TrialState

from xcalib.search import _study, _workers
from xcalib.search._sampler import DRAW, MERIT, ShiftSampler
from xcalib.search._storage import open_storage, open_study

FORK = multiprocessing.get_context("fork")
SPACE = {f"layer {number}": FloatDistribution(-1.0, 1.0) for number in range(4)}
BEAT, SILENCE, UNSIGNED = 0.3, 6.0, 3.0  # seconds: the shipped ones, shortened


def opened(url: str) -> Study:
    sampler = ShiftSampler(SPACE, seed=3)
    return open_study(open_storage(url), "s", {"point": "a"}, metric="KL", resume=None, sampler=sampler)


def work(url: str, trials: int, machine: str) -> None:
    _workers._machine = lambda: machine
    _workers.BEAT_SECONDS, _workers.SILENCE_SECONDS, _workers.UNSIGNED_SECONDS = BEAT, SILENCE, UNSIGNED

    def objective(trial: Trial) -> float:
        bowl = sum((trial.suggest_float(name, -1, 1) - 0.2) ** 2 for name in SPACE)
        trial.set_user_attr(MERIT, bowl - 0.12)
        for step in range(3):
            time.sleep(0.1)
            trial.report(bowl, step)
        return bowl

    _study.run_trials(opened(url), trials, objective)


@contextmanager
def storage(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    spec = importlib.util.spec_from_file_location("conftest", Path(__file__).with_name("conftest.py"))
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    programs = [conftest._program(name) for name in ("initdb", "postgres")]
    with tempfile.TemporaryDirectory(prefix="xcalib-postgresql-") as folder:
        server = conftest.PostgreSQL(Path(folder), *programs)
        try:
            yield server.new_database()
        finally:
            server.stop()


def soak(url: str, workers: int, trials: int, kills: int, rng: random.Random) -> dict[str, Any]:
    opened(url)
    began, started, killed = time.monotonic(), 0, 0
    alive: list[Any] = []
    while killed < kills or alive:
        alive = [worker for worker in alive if worker.is_alive()]
        finished = len(opened(url).get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        while len(alive) < workers and finished < trials:
            alive.append(FORK.Process(target=work, args=(url, trials, f"machine-{started}")))
            alive[-1].start()
            started += 1
        if finished >= trials and killed < kills:
            break  # too few trials for so many kills
        time.sleep(rng.uniform(0.2, 2.0))
        if killed < kills and alive:
            victim = alive.pop(rng.randrange(len(alive)))
            victim.kill()
            victim.join()
            killed += 1
    for worker in alive:
        worker.join()
    found = opened(url).get_trials(deepcopy=False)
    done = [trial for trial in found if trial.state == TrialState.COMPLETE]
    record = {
        "storage": url.partition(":")[0],
        "workers_at_once": workers,
        "workers_started": started,
        "workers_killed": killed,
        "trials_asked_for": trials,
        "trials_complete": len(done),
        "trials_failed": sum(trial.state == TrialState.FAIL for trial in found),
        "trials_in_other_states": len(found) - len(done) - sum(trial.state == TrialState.FAIL for trial in found),
        "retried": sum("retry of trial" in trial.user_attrs for trial in done),
        "distinct_values": len({tuple(trial.params.values()) for trial in done}),
        "draws_twice": sorted(d for d, n in Counter(t.user_attrs[DRAW] for t in done).items() if n > 1),
        "draws_are_0_to_n": sorted(trial.user_attrs[DRAW] for trial in done) == list(range(trials)),
        "seconds": round(time.monotonic() - began, 1),
    }
    exact = record["trials_complete"] == trials == record["distinct_values"] and record["draws_are_0_to_n"]
    return record | {"ok": exact and killed == kills and not record["trials_in_other_states"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage")
    options = parser.parse_args()
    with storage(options.storage) as url:
        record = soak(url, options.workers, options.trials, options.kills, random.Random(options.seed))
    print(json.dumps(record, indent=1))
    sys.exit(0 if record["ok"] else 1)


if __name__ == "__main__":
    main()
