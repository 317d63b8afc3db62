"""Real ranks on this machine's CPU: the same bytes as one process, deaths, going on, hosts that share no disk."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xcalib._lock import lock_file, lock_folder

Run = Callable[..., tuple[int, str, str]]

XCALIB = [sys.executable, "-m", "xcalib"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
COLLECT = [
    *("collect", "tiny", "--data", "injected:documents", "--num-samples", "4", "--max-length", "448"),
    *("--min-length", "256", "--block-size", "64", "--measure", "fisher"),
]
FILES = ("curves.json", "curves.safetensors")

# Data that do something to the rank which reads them: DEATH="rank nth-sample signal", SLOW="seconds a sample"
INJECTED = """
import os, signal, time
from pathlib import Path

import xcalib
from xcalib.collect.measure import Sweeper

measure, calls = Sweeper.measure, []


def injected(self, *arguments):
    calls.append(1)
    rank, nth, number = os.environ.get("DEATH", "-1 0 0").split()
    if os.environ.get("RANK") == rank and len(calls) == int(nth):
        os.kill(os.getpid(), int(number))
    time.sleep(float(os.environ.get("SLOW", "0")))
    return measure(self, *arguments)


Sweeper.measure = injected


def documents(**_request):
    folder = Path(xcalib.__file__).parent / "data" / "corpus" / "prose"
    return [path.read_text("utf-8")[:9000] for path in sorted(folder.glob("*.txt"))[:8]]
"""


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the model ``tiny`` and the data function."""
    (tmp_path / "injected.py").write_text(INJECTED)
    (tmp_path / "tiny").symlink_to(tiny_folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*command: Any, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True
    )


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def units(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "units").glob("*.safetensors")}


def assert_same(found: Path, expected: Path) -> None:
    for name in FILES:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture
def expected(here: Path, run: Run) -> Path:
    """The curves that one process measures."""
    code, _, err = run(*COLLECT, "--out", "one")
    assert code == 0, err
    return here / "one"


def test_a_killed_rank_is_named_and_any_number_goes_on(here: Path, expected: Path) -> None:
    code, out, err = ended(start(*XCALIB, *COLLECT, "--out", "many", "--workers", 2, cwd=here, DEATH="1 2 9"))
    assert (code, out) == (1, "")
    *progress, last = err.splitlines()
    host = re.escape(socket.gethostname())
    assert re.match(rf"error: rank 1 on {host} was killed by SIGKILL .*--resume, with any number of ranks", last)
    assert [line for line in progress if not line.endswith(" ...")] == []
    kept = units(here / "many")
    assert "sample-00001" in kept  # what rank 1 had finished; rank 0 had none, one or two
    assert kept <= {"sample-00000", "sample-00001", "sample-00002"}
    stamps = {name: (here / "many" / "units" / f"{name}.safetensors").stat().st_mtime_ns for name in kept}
    (here / "kept").mkdir()
    for name in kept:  # to see that none was measured again: the folder is removed at the end
        os.link(here / "many" / "units" / f"{name}.safetensors", here / "kept" / name)

    arguments = (*COLLECT, "--out", "many", "--resume", "--json")
    code, out, err = ended(start(*TORCHRUN, "--nproc-per-node", 3, "-m", "xcalib", *arguments, cwd=here))
    assert code == 0, err
    assert json.loads(out)["curves"] == "many"  # once
    assert err.count("wrote many") == err.count("Measuring 4 samples ...") == 1
    assert {name: (here / "kept" / name).stat().st_mtime_ns for name in kept} == stamps
    assert_same(here / "many", expected)
    assert not (here / "many" / "units").exists()


def test_search_in_several_processes_gives_the_same_profile(here: Path, run: Run) -> None:
    search = [
        *("search", "tiny", "--data", "builtin", "--num-samples", "3", "--max-length", "448", "--block-size", "64"),
        *("--target", "a:density=0.7", "--rounds", "1", "--heldout-samples", "1", "--force"),
        *("--pattern", "antidiagonal"),  # by rows no step is tried here
    ]
    code, _, err = run(*search, "--out", "one.yaml", "--work", "one")
    assert code == 0, err
    code, out, err = ended(
        start(*XCALIB, *search, "--out", "many.yaml", "--work", "many", "--workers", 2, "--json", cwd=here)
    )
    assert code == 0, err
    assert (here / "many.yaml").read_bytes() == (here / "one.yaml").read_bytes()
    found = json.loads(out)
    assert found["profile"] == "many.yaml"
    assert found["points"][0]["rounds"][0]  # the round was shared too
    assert err.count("wrote many.yaml") == 1
    assert_same(here / "many" / "curves", here / "one" / "curves")


def test_bad_input_is_said_once(here: Path) -> None:
    found = ended(start(*XCALIB, "collect", "tiny", "--data", "text:gone", "--out", "c", "--workers", 2, cwd=here))
    assert found == (
        2,
        "",
        "Loading tiny ...\nReading calibration data ...\nerror: text:gone: no file or folder 'gone'\n",
    )
    assert not (here / "c").exists()


def test_one_job_at_a_time(here: Path) -> None:
    """Rank 0 holds the locks; the launcher, which runs the same command, holds none against it."""
    (here / "c").mkdir()
    search = ("search", "tiny", "--data", "builtin", "--workers", 2)
    me = rf"process {os.getpid()} on {re.escape(socket.gethostname())}, started .*, is at work on it"
    with lock_folder(here / "c"):
        code, _, err = ended(start(*XCALIB, *COLLECT, "--out", "c", "--workers", 2, cwd=here))
    assert code == 2 and err.count("error:") == 1, err
    assert re.search(rf"^error: c: {me}", err, re.MULTILINE)
    with lock_file(here / "p.yaml"):
        code, _, err = ended(start(*XCALIB, *search, "--out", "p.yaml", "--work", "w", cwd=here))
    assert code == 2 and err.count("error:") == 1, err
    assert re.search(rf"^error: p.yaml: {me}", err, re.MULTILINE)
    assert not (here / "w").exists()


def test_bad_samples_are_not_skipped_by_ranks(here: Path) -> None:
    code, out, err = ended(start(*XCALIB, *COLLECT, "--skip-bad", "--out", "c", "--workers", 2, cwd=here))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: --skip-bad (skip_bad) goes with one process")
    assert not (here / "c").exists()


def test_hosts_that_share_no_disk(here: Path, expected: Path) -> None:
    hosts = [here / "host-0", here / "host-1"]
    for host in hosts:
        host.mkdir()
        (host / "tiny").symlink_to(here / "tiny")
        shutil.copy(here / "injected.py", host)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ("--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port)
    parts = [
        start(*TORCHRUN, *where, "--node-rank", node, "-m", "xcalib", *COLLECT, "--out", "c", cwd=host)
        for node, host in enumerate(hosts)
    ]
    (code, _, err), (other, out, said) = (ended(part) for part in parts)
    assert (code, other, out) == (0, 0, ""), err + said
    assert "wrote c" in err
    assert "wrote c" not in said
    assert_same(hosts[0] / "c", expected)
    assert sorted(path.name for path in (hosts[1] / "c").iterdir()) == ["collect.json", "journal.jsonl"]


def test_ranks_end_with_what_started_them(here: Path) -> None:
    launcher = start(*XCALIB, *COLLECT, "--out", "c", "--workers", 2, cwd=here, SLOW="100")
    try:
        until(lambda: (here / "c" / "units").is_dir() or launcher.poll() is not None)
        ranks = children(launcher.pid)
        assert len(ranks) == 2
    finally:
        launcher.send_signal(signal.SIGKILL)
    _, err = launcher.communicate(timeout=60)  # when the ranks too have closed it
    assert re.search(r"error: what started the ranks was killed; .*--resume", err)
    assert err.count("error:") == 1
    until(lambda: not any(alive(rank) for rank in ranks))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
