"""Ranks in one process: who measures what, how a death is told, what exit code a job has. Real ones: test_ranks_processes."""

import json
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from xcalib.cli import workers
from xcalib.collect import ranks as ranks_module
from xcalib.collect import watch as watch_module
from xcalib.collect.ranks import ALONE, LAUNCHED, Place, Ranks, describe
from xcalib.collect.shares import Arrays, Shares, open_units
from xcalib.collect.units import Units
from xcalib.collect.watch import LOST, Watch
from xcalib.errors import CurvesError, ModelError, RankError

Run = Callable[..., tuple[int, str, str]]

# a watch that would end its process ends its thread
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Crowd:
    """Ranks as threads: collectives by way of shared lists instead of torch.distributed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.slots: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def run(self, work: Callable[[Ranks], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                results[rank] = work(Member(self, rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results


class Member(Ranks):
    """One rank of a :class:`Crowd`."""

    def __init__(self, crowd: Crowd, rank: int) -> None:
        super().__init__(Place(rank, crowd.size, rank))
        self._crowd = crowd

    def lowest(self, values: np.ndarray) -> np.ndarray:
        return np.min(self._crowd.exchange(self.rank, values), axis=0)

    def broadcast(self, arrays: Any, source: int = 0) -> Arrays:
        return dict(self._crowd.exchange(self.rank, arrays)[source])

    def arrive(self) -> None:
        self._crowd.exchange(self.rank, None)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("disk", ["none", "one", "own"])
def test_every_unit_is_measured_once_and_known_to_all(tmp_path: Path, size: int, disk: str) -> None:
    count, measured = 4, queue.SimpleQueue[tuple[int, int]]()

    def work(ranks: Ranks) -> list[Arrays]:
        units = None
        if disk != "none":
            folder = tmp_path / (str(ranks.rank) if disk == "own" else "shared")
            units = ranks.in_turn(lambda: Units(folder, {"a": 1}, resume=not ranks.leader))

        def measure(index: int, advance: Callable[[int], None]) -> Arrays:
            measured.put((index, ranks.rank))
            advance(1)
            return {"value": np.array(index / 3), "large": np.zeros(9)}

        names = [f"unit-{index}" for index in range(count)]
        return list(Shares(units, ranks=ranks).each("x", names, measure, [1] * count, local=("large",)))

    found = Crowd(size).run(work) if size > 1 else [work(ALONE)]
    done = sorted(measured.get() for _ in range(measured.qsize()))
    assert done == [(index, index % size) for index in range(count)]
    for results in found:
        assert [float(unit["value"]) for unit in results] == [index / 3 for index in range(count)]
        assert all(set(unit) == {"value"} for unit in results)


@settings(max_examples=25, deadline=None)
@given(
    finished=st.lists(st.sets(st.integers(0, 2)), min_size=1, max_size=7),  # of each unit, the disks that have it
    size=st.integers(2, 3),
)
def test_finished_units_are_not_repeated_whoever_has_them(
    tmp_path_factory: pytest.TempPathFactory, finished: list[set[int]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("disks")
    names = [f"unit-{index}" for index in range(len(finished))]
    disks = [Units(folder / str(rank), {}, resume=False) for rank in range(3)]
    for name, places in zip(names, finished, strict=True):
        for place in places:
            disks[place].save(name, {"from": np.array(-1)})
    steps = [queue.SimpleQueue[int]() for _ in range(size)]

    def work(ranks: Ranks) -> list[int]:
        @contextmanager
        def progress(_what: str, total: int) -> Iterator[Callable[[int], None]]:
            assert total == 2 * len(names)
            yield steps[ranks.rank].put

        def measure(index: int, advance: Callable[[int], None]) -> Arrays:
            advance(2)
            return {"from": np.array(ranks.rank)}

        shares = Shares(disks[ranks.rank], progress, ranks)
        return [int(unit["from"]) for unit in shares.each("x", names, measure, [2] * len(names))]

    results = Crowd(size).run(work)
    missing = [index for index, places in enumerate(finished) if not places & set(range(size))]
    expected = [-1] * len(names)
    for place, index in enumerate(missing):
        expected[index] = place % size
    assert results == [expected] * size
    assert sum(item.get() for item in steps for _ in range(item.qsize())) == 2 * len(names)


def test_the_journal_has_the_seconds_of_each_unit_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = threading.local()  # each rank's own
    monkeypatch.setattr("xcalib.collect.units.time", SimpleNamespace(monotonic=lambda: getattr(clock, "now", 0.0)))

    def work(ranks: Ranks) -> None:
        def measure(_index: int, _advance: Callable[[int], None]) -> Arrays:
            clock.now = getattr(clock, "now", 0.0) + 2.5
            return {"x": np.ones(1)}

        units = open_units(tmp_path, {"a": 1}, resume=False, ranks=ranks)
        list(Shares(units, ranks=ranks).each("x", list("abcdef"), measure, [1] * 6))

    assert Crowd(2).run(work) == [None, None]
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert sorted((line["unit"], line["seconds"]) for line in lines) == [(name, 2.5) for name in "abcdef"]


def test_ranks_that_came_to_other_units_are_told_so() -> None:
    def work(ranks: Ranks) -> list[Arrays]:
        shares = Shares(ranks=ranks)
        return list(shares.each("x", [f"kl-{ranks.rank}"], lambda _index, _advance: {}, [1]))

    results = Crowd(2).run(work)
    assert all(isinstance(error, RankError) and "different levels" in str(error) for error in results)


def test_ranks_with_other_data_are_told_so(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Units:
        identity = {"data": ranks.rank // 2, "model": "m"}
        return open_units(tmp_path / str(ranks.rank), identity, resume=False, ranks=ranks)

    results = Crowd(3).run(work)
    assert [str(error).partition(":")[0] for error in results] == ["ranks were given another data"] * 3
    assert not any(tmp_path.iterdir())


def test_a_failure_of_one_is_everybodys() -> None:
    def work(ranks: Ranks) -> str:
        with ranks.together():
            if ranks.rank == 1:
                raise ModelError("no such model")
        return "went on"

    first, second, third = Crowd(3).run(work)
    assert isinstance(second, ModelError)
    for other in (first, third):
        assert isinstance(other, RankError)
        assert str(other).startswith("rank 1 on ")
        assert str(other).endswith(": no such model")


def test_in_turn_stops_at_the_first_failure() -> None:
    made = queue.SimpleQueue[int]()

    def work(ranks: Ranks) -> int:
        def make() -> int:
            made.put(ranks.rank)
            if ranks.rank == 1:
                raise CurvesError("no room")
            return ranks.rank

        return ranks.in_turn(make)

    results = Crowd(3).run(work)
    assert [type(error) for error in results] == [RankError, CurvesError, RankError]
    assert [made.get() for _ in range(made.qsize())] == [0, 1]


def test_alone_asks_nobody() -> None:
    array = np.arange(3)
    assert ALONE.leader
    assert ALONE.same(array) is array
    assert ALONE.broadcast({"a": array}) == {"a": array}
    assert ALONE.device("cuda") == "cuda"
    ALONE.arrive()
    ALONE.leave(2, "nothing happens")
    with pytest.raises(ModelError, match="its own"), ALONE.together():
        raise ModelError("its own")
    assert ALONE.in_turn(lambda: 7) == 7


# --- the place in the environment


def place(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, local: int = 0) -> None:
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place.of_environment() is None
    place(monkeypatch, 3, 8, 1)
    assert Place.of_environment() == Place(3, 8, 1, local_size=8)  # all of them, where nothing says how many are here
    for here, counted in (("2", 2), ("0", 1), ("9", 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert Place.of_environment() == Place(3, 8, 1, local_size=counted)
    assert (Ranks(Place(3, 8, 1, local_size=2)).local_size, ALONE.local_size) == (2, 1)
    monkeypatch.delenv("LOCAL_RANK")  # as cluster managers set them, for torchrun to read
    assert Place.of_environment() is None
    place(monkeypatch, 0, 1)
    assert Place.of_environment() is None
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(RankError, match="must be numbers"):
        Place.of_environment()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    ranks = Ranks(Place(5, 6, 1))
    assert [ranks.device(asked) for asked in (None, "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert chosen == [1, 1]
    with pytest.raises(ModelError, match=r"rank 4 is number 2 on its host \(from 0\), which has 2 GPUs"):
        Ranks(Place(4, 6, 2)).device(None)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "1e30"])
def test_a_timeout_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("XCALIB_RANK_TIMEOUT", text)
    with pytest.raises(RankError, match="expected seconds above 0"):
        ranks_module._wait_seconds()


def test_describe() -> None:
    assert describe(ModelError("two\n lines")) == "two lines"
    assert describe(OSError(28, "No space left on device", "/data")) == "/data: No space left on device"
    assert describe(typer.BadParameter("is odd", param_hint="--x")) == "Invalid value for --x: is odd"
    assert describe(KeyError("gone")) == "KeyError: 'gone'"


# --- the watch


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> "queue.SimpleQueue[int]":
    """Exit codes with which a watch would have ended its process."""
    codes = queue.SimpleQueue[int]()

    def end(code: int) -> None:
        codes.put(code)
        sys.exit()  # this thread

    monkeypatch.setattr(watch_module, "_end", end)
    return codes


def watches(size: int, said: "queue.SimpleQueue[str]", silent: bool = False) -> list[Watch]:
    listener = Watch.listen("127.0.0.1")
    where, token = listener.getsockname(), "secret"
    found: list[Watch | None] = [None] * size
    options: dict[str, Any] = {"silent": silent, "says": said.put}

    def lead() -> None:
        found[0] = Watch.accept(listener, token, size, 20, **options)

    def join(rank: int) -> None:
        found[rank] = Watch.connect(where, token, rank, 20, **options)

    threads = [threading.Thread(target=lead)] + [threading.Thread(target=join, args=(r,)) for r in range(1, size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [watch for watch in found if watch is not None]


def hang_up(watch: Watch) -> None:
    """What the system does when a process ends."""
    for peer in watch._peers.values():
        with suppress(OSError):  # at its end already
            peer.connection.shutdown(2)


def test_a_death_is_told_once_and_ends_all(ended: "queue.SimpleQueue[int]") -> None:
    said = queue.SimpleQueue[str]()
    group = watches(3, said)
    hang_up(group[2])
    lines = [said.get(timeout=20)]
    assert {ended.get(timeout=20), ended.get(timeout=20)} == {LOST}  # rank 0, and 2 itself, whose connection it was
    assert lines[0].startswith(
        f"rank 2 on {os.uname().nodename} (process {os.getpid()}) died; what was finished is kept"
    )
    assert said.empty()
    hang_up(group[0])
    assert ended.get(timeout=20) == LOST  # rank 1 was told to stop, and waited for rank 0
    assert said.empty()


def test_of_a_dead_rank_0_the_next_speaks(ended: "queue.SimpleQueue[int]", monkeypatch: pytest.MonkeyPatch) -> None:
    said = queue.SimpleQueue[str]()
    group = watches(3, said)
    group[0]._says = lambda line: None  # the dead say nothing, and send nothing
    for peer in group[0]._peers.values():
        monkeypatch.setattr(peer, "send", lambda _message: None)
    hang_up(group[0])
    assert said.get(timeout=20).startswith("rank 0 on ")
    assert [ended.get(timeout=20) for _ in range(3)] == [LOST] * 3
    assert said.empty()


def test_the_launcher_speaks_of_deaths(ended: "queue.SimpleQueue[int]") -> None:
    said = queue.SimpleQueue[str]()
    hang_up(watches(2, said, silent=True)[1])
    assert [ended.get(timeout=20) for _ in range(2)] == [LOST] * 2
    assert said.empty()


def test_ranks_that_part_may_end(ended: "queue.SimpleQueue[int]") -> None:
    said = queue.SimpleQueue[str]()
    group = watches(2, said)
    group[1].part()
    group[0].part()
    hang_up(group[1])
    for watch in group:
        watch._thread.join(20)
        assert not watch._thread.is_alive()
    assert ended.empty()
    assert said.empty()


def test_an_error_of_another_rank_is_said_by_rank_0(
    ended: "queue.SimpleQueue[int]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "SAME_SECONDS", 0.1)
    said = queue.SimpleQueue[str]()
    group = watches(2, said, silent=True)
    group[1]._peers[0].send({"error": "/data: No space left on device", "code": 2})
    assert ended.get(timeout=20) == 2
    assert said.get(timeout=20).endswith(": /data: No space left on device")
    hang_up(group[0])
    assert ended.get(timeout=20) == 2


def test_an_error_that_rank_0_meets_too_is_said_in_its_own_words(ended: "queue.SimpleQueue[int]") -> None:
    said = queue.SimpleQueue[str]()
    group = watches(2, said)
    group[1]._peers[0].send({"error": "the same", "code": 2})
    group[0].leave(2, "the same")  # returns: the main thread prints it
    hang_up(group[0])
    assert ended.get(timeout=20) == 2  # rank 1, after rank 0
    group[0]._thread.join(20)
    assert said.empty()


def test_steps_of_all_are_drawn_where_they_belong(ended: "queue.SimpleQueue[int]") -> None:
    group = watches(2, queue.SimpleQueue[str]())
    drawn = queue.SimpleQueue[tuple[str, int]]()

    @contextmanager
    def bar(what: str, _total: int) -> Iterator[Callable[[int], None]]:
        yield lambda steps: drawn.put((what, steps)) if steps else None

    leading, following = group[0].progress(bar), group[1].progress(bar)
    with leading("first", 3) as advance:
        with following("first", 3) as other:
            other(2)
        with following("second", 5) as other:  # before rank 0 is there
            other(4)
        advance(1)
        assert {drawn.get(timeout=20), drawn.get(timeout=20)} == {("first", 1), ("first", 2)}
        group[1].part()
        group[0]._thread.join(0.2)
    with leading("second", 5) as advance:
        advance(1)
        assert {drawn.get(timeout=20), drawn.get(timeout=20)} == {("second", 4), ("second", 1)}
    assert ended.empty()


def test_strangers_are_hung_up_on(ended: "queue.SimpleQueue[int]") -> None:
    listener = Watch.listen("127.0.0.1")
    where = listener.getsockname()
    found = queue.SimpleQueue[Watch]()
    accepting = threading.Thread(target=lambda: found.put(Watch.accept(listener, "secret", 2, 20)))
    accepting.start()
    for token, rank in (("guess", 1), ("secret", 2), ("secret", 0)):
        with pytest.raises(OSError, match="hung up"):
            Watch.connect(where, token, rank, 20)
    right = Watch.connect(where, "secret", 1, 20)
    accepting.join(20)
    leader = found.get(timeout=20)
    right.part()
    leader.part()
    assert ended.empty()


# --- the command line


@pytest.mark.parametrize(
    ("failures", "code", "said"),
    [
        ({}, 0, ""),
        ({0: 2, 1: -15}, 2, ""),
        ({1: 3, 0: -15}, 3, ""),
        ({0: LOST, 1: -9, 2: -15}, 1, "rank 1 on .* was killed by SIGKILL .*memory.*--resume"),
        ({2: -15, 0: -15}, 1, "rank 2 on .* was killed by SIGTERM;"),
        ({1: -6, 0: 2}, 2, ""),
        ({1: 1, 0: 2}, 2, ""),
        ({1: -9, 0: 2}, 1, "rank 1 on .* was killed by SIGKILL"),
        ({1: 1, 0: LOST}, 1, "rank 1 on .* ended with exit code 1;"),
        ({0: LOST}, 1, f"rank 0 on .* ended with exit code {LOST};"),
    ],
)
def test_what_the_launcher_makes_of_its_ranks(
    failures: dict[int, int], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {rank: SimpleNamespace(exitcode=exitcode) for rank, exitcode in failures.items()}
    assert workers._code_for(found) == code
    line = capsys.readouterr().err
    assert line.count("\n") == bool(said)
    assert re.search(said, line)


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = workers._environment(2, 3, 4567)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("2", "2", "3")
    assert (found["MASTER_PORT"], found["OMP_NUM_THREADS"], found[LAUNCHED]) == ("4567", "2", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in workers._environment(2, 3, 4567)


@pytest.mark.parametrize("command", ["evaluate", "refine", "show", "demo"])
def test_other_commands_refuse_ranks_and_one_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    arguments = {"evaluate": ["m", "--uniform", "0.5"], "refine": ["p"], "show": ["p"], "demo": []}[command]
    place(monkeypatch, 0, 2)
    code, out, err = run(command, *arguments)
    assert (code, out) == (2, "")
    assert f"{command} runs in one process: start it without torchrun" in err
    place(monkeypatch, 1, 2)
    assert run(command, *arguments) == (2, "", "")


def test_a_rank_that_is_no_number(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, 0, 2)
    monkeypatch.setenv("RANK", "first")
    code, out, err = run("show", "p.yaml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers" in err


def test_workers_under_torchrun(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place(monkeypatch, 0, 4)
    code, _, err = run("collect", "m", "--out", tmp_path / "c", "--workers", "2")
    assert code == 2
    assert "torchrun has started 4 ranks already" in err


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_number_of_workers(run: Run, tmp_path: Path, number: str) -> None:
    code, out, err = run("collect", "m", "--out", tmp_path / "c", "--workers", number)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--workers" in err


@contextmanager
def two(_workers: int | None) -> Iterator[Ranks]:
    yield Ranks(Place(0, 2, 0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("m", "--refine", "4"), "--refine"), (("--curves", "c"), "needs MODEL"), (("m", "--skip-bad"), "--skip-bad")],
)
def test_what_ranks_cannot_share(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("xcalib.cli.search.joined", two)
    code, out, err = run("search", *arguments, "--out", tmp_path / "p.yaml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert not any(tmp_path.iterdir())


def test_ranks_of_a_collection_skip_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("xcalib.cli.collect.joined", two)
    code, out, err = run("collect", "m", "--skip-bad", "--out", tmp_path / "c")
    assert (code, out) == (2, "")
    assert err == (
        "error: --skip-bad (skip_bad) goes with one process: ranks do not agree on the samples that are left out; run without "
        "--workers and torchrun, or take the bad samples out of the data\n"
    )
    assert not any(tmp_path.iterdir())


def test_memory_that_runs_out_on_a_rank_ends_all_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an error that was expected: the other ranks print it."""
    told: list[tuple[int, str | None]] = []

    class One(Ranks):
        def leave(self, code: int, message: str | None = None) -> None:
            told.append((code, message))

    monkeypatch.setattr(workers, "_open", One)
    with pytest.raises(torch.OutOfMemoryError), workers.joined(None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")
    ((code, message),) = told
    assert code == 2
    assert message is not None
    assert message.startswith("memory ran out (CUDA out of memory. Tried to allocate 20.00 GiB.): lower --max-length")
