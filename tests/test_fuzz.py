"""Any bytes in place of any file that is read give a valid object or one line of XcalibError (tests/fuzz has the readers)."""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent / "fuzz"
CASES = 10_000


@pytest.fixture(scope="module", autouse=True)
def _modules() -> Iterator[None]:
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def readers() -> ModuleType:
    import readers

    return readers


def test_the_files_to_start_from_are_valid(readers: ModuleType) -> None:
    seeds = readers.seeds()
    assert len({reader.name for reader, _ in seeds}) == 12
    assert all(readers.holds(reader, data) for reader, data in seeds)


def test_ten_thousand_mutated_files(readers: ModuleType) -> None:
    """Derandomised: the same cases on every machine; hypothesis shrinks what fails."""
    from mutations import mutated

    seeds, outcomes = readers.seeds(), Counter[tuple[str, bool]]()

    @settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, len(seeds) - 1), st.integers(0, 2**64 - 1))
    def check(index: int, seed: int) -> None:
        reader, data = seeds[index]
        outcomes[reader.name, readers.holds(reader, mutated(random.Random(seed), data))] += 1

    check()
    assert outcomes.total() >= CASES
    by_reader = Counter({name: 0 for name, _ in outcomes})
    for (name, _), count in outcomes.items():
        by_reader[name] += count
    assert len(by_reader) == 12
    assert min(by_reader.values()) >= CASES // 50
    assert sum(count for (_, valid), count in outcomes.items() if not valid) > CASES // 2


def test_structured_mutations_that_shrink(readers: ModuleType) -> None:
    """Fewer cases, every choice hypothesis' own, so that what fails comes out small."""
    from mutations import mutated

    seeds, done = readers.seeds(), []

    @settings(max_examples=500, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(range(len(seeds))), st.randoms(use_true_random=False))
    def check(index: int, rng: random.Random) -> None:
        reader, data = seeds[index]
        readers.holds(reader, mutated(rng, data))
        done.append(index)

    check()
    assert len(done) >= 500


def test_arbitrary_bytes(readers: ModuleType) -> None:
    done = []

    @settings(max_examples=500, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(readers.readers()), st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
    def check(reader: object, data: bytes) -> None:
        readers.holds(reader, data)
        done.append(data)

    check()
    assert len(done) >= 500


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), ValueError("a\nb"), MemoryError()])
def test_the_property_can_fail(readers: ModuleType, error: Exception) -> None:
    def broken(data: bytes) -> object:
        raise error

    with pytest.raises(type(error)):
        readers.holds(readers.Reader("broken", (b"",), broken), b"")


@pytest.mark.parametrize("message", ["", "two\nlines", "\x1b[31m", "x" * 2000])
def test_an_error_must_be_one_short_line(readers: ModuleType, message: str) -> None:
    from xcalib.errors import CurvesError

    def broken(data: bytes) -> object:
        raise CurvesError(message)

    with pytest.raises(AssertionError):
        readers.holds(readers.Reader("broken", (b"",), broken), b"")


WITHOUT = """
import runpy, sys
sys.modules["atheris"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("guided", [True, False], ids=["atheris", "without"])
def test_the_long_run_runs(guided: bool, tmp_path: Path) -> None:
    if guided:
        pytest.importorskip("atheris", reason="atheris is not installed (pip install atheris): no guided run")
    log = tmp_path / "run.log"
    start = [sys.executable] if guided else [sys.executable, "-c", WITHOUT]
    command = [*start, str(HERE / "run.py"), "--seconds", "1", "--seed", "3", "--log", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["state"], last["guided"], last["seed"], last["found"]) == ("done", guided, 3, {})
    assert last["executions"] == sum(last["valid"].values()) + sum(last["refused"].values()) > 0


def test_the_long_run_keeps_what_it_finds(readers: ModuleType, tmp_path: Path) -> None:
    import run

    def broken(data: bytes) -> object:
        raise KeyError("x")

    one = run.Run(tmp_path / "run.log", 0)
    one.readers = (readers.Reader("broken", (b"",), broken),)
    one.one(b"\0abc")
    one.one(b"\0def")
    one.tell("done")
    assert (tmp_path / "run-found-1").read_bytes() == b"abc"
    assert list(json.loads((tmp_path / "run.log").read_text().splitlines()[-1])["found"].values()) == [2]
