"""Full and read-only disks, things that vanish, two processes at one job, and kills: one line, and what was finished is kept."""

import dataclasses
import datetime
import errno
import fcntl
import json
import multiprocessing
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import Trial, TrialState
from safetensors.numpy import load_file, save_file

import xcalib
from xcalib import _files
from xcalib._lock import LOCK_NAME, lock_file, lock_folder, remove_folder
from xcalib.collect import CollectSettings, Curves, collect
from xcalib.collect.measure import Sweeper
from xcalib.collect.units import Units
from xcalib.errors import BusyError, CurvesError, ProfileError, StudyError, XcalibError, XcalibWarning
from xcalib.profile import Profile, load_profile, save_profile
from xcalib.search._sampler import ShiftSampler
from xcalib.search._storage import open_storage, open_study
from xcalib.search._study import run_trials

FORK = multiprocessing.get_context("fork")
SETTINGS = CollectSettings(block_size=64, grid=(0.0, 0.4, 0.6, 0.8, 1.0), gain_samples=1, gain_every=15)
RESULT = ("curves.safetensors", "curves.json")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def samples(random_samples: Callable[..., Any]) -> Any:
    return random_samples([300, 320])


@pytest.fixture(scope="module")
def whole(model: Any, samples: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a collection that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    collect(model, samples, folder, settings=SETTINGS, name="tiny")
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULT}


def collected(model: Any, samples: Any, folder: Path, resume: bool = False) -> Curves:
    return collect(model, samples, folder, settings=SETTINGS, name="tiny", resume=resume)


def one_line(error: pytest.ExceptionInfo[XcalibError], *parts: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def mounted(where: Path, kilobytes: int) -> Iterator[Path]:
    """A small disk of its own; skipped where this process may not mount one."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(where)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", 4096)


class Full:
    """Makes a folder's disk full and empty again: for real on a mounted one, else by what flushing answers."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch | None) -> None:
        self.folder, self._patch = folder, patch

    def fill(self) -> None:
        if self._patch is not None:

            def fsync(_descriptor: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            self._patch.setattr(os, "fsync", fsync)
            return
        with pytest.raises(OSError, match="No space left"), (self.folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def empty(self) -> None:
        if self._patch is not None:
            self._patch.undo()
        else:
            (self.folder / "filler").unlink()


@pytest.fixture(params=["mounted", "patched"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Full]:
    if request.param == "mounted":
        for folder in mounted(tmp_path / "disk", 4096):
            yield Full(folder, None)
    else:
        with pytest.MonkeyPatch.context() as patch:
            yield Full(tmp_path, patch)


def interrupt() -> None:
    raise KeyboardInterrupt


# --- a disk that is full


def after_sample(count: int, act: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Do something when ``count`` samples are finished and the next begins."""
    measure, calls = Sweeper.measure, iter(range(count))

    def acting(self: Sweeper, *arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            act()
        return measure(self, *arguments, **options)

    patch.setattr(Sweeper, "measure", acting)


def test_a_full_disk_ends_a_collection_with_one_line(
    full: Full, model: Any, samples: Any, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = full.folder / "curves"
    with monkeypatch.context() as patch:
        after_sample(1, full.fill, patch)
        with pytest.raises(CurvesError) as caught:
            collected(model, samples, folder)
    one_line(caught, folder, "sample-00001", "cannot be written: No space left on device")
    assert sorted(path.name for path in (folder / "units").iterdir()) == ["sample-00000.safetensors"]
    before = (folder / "units" / "sample-00000.safetensors").stat().st_mtime_ns
    full.empty()
    with monkeypatch.context() as patch:
        calls: list[int] = []
        after_sample(0, lambda: calls.append((folder / "units/sample-00000.safetensors").stat().st_mtime_ns), patch)
        collected(model, samples, folder, resume=True)
    assert calls == [before] and contents(folder) == whole  # only the second sample, the first as it was


def test_a_full_disk_leaves_the_old_profile(full: Full, profile: Profile, other_profile: Profile) -> None:
    path = full.folder / "profile.yaml"
    save_profile(profile, path)
    full.fill()
    with pytest.raises(ProfileError) as caught:
        save_profile(other_profile, path)
    one_line(caught, path, "cannot be written: No space left on device")
    full.empty()
    assert load_profile(path) == profile and [entry.name for entry in full.folder.iterdir()] == ["profile.yaml"]


def opened(location: Path) -> Any:
    sampler = ShiftSampler({"x": FloatDistribution(-1.0, 1.0)}, seed=3)
    return open_study(open_storage(str(location)), "s", {"point": "a"}, metric="KL", resume=None, sampler=sampler)


def value_of(trial: Trial) -> float:
    return trial.suggest_float("x", -1, 1) ** 2


def test_a_full_disk_leaves_the_journal_of_trials_whole(full: Full) -> None:
    journal = full.folder / "refine.journal"

    def filling(trial: Trial) -> float:
        if trial.number == 3:
            full.fill()
        return value_of(trial)

    with pytest.raises(StudyError) as caught:
        run_trials(opened(journal), 6, filling)
    one_line(caught, journal, "cannot be written: No space left on device; finished trials are kept")
    full.empty()
    for line in journal.read_text().splitlines():
        assert isinstance(json.loads(line), dict)
    run_trials(opened(journal), 6, value_of)
    trials = opened(journal).get_trials(deepcopy=False)
    assert [trial.state.name for trial in trials].count("COMPLETE") == 6
    assert [trial.number for trial in trials if trial.state == TrialState.FAIL] == [3]


def test_half_a_line_is_taken_back_and_one_from_before_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"first\nhal")
    _files.append_lines(path, b"second\n")
    write = os.write

    def short(descriptor: int, data: bytes) -> int:
        if len(data) < 5:
            raise OSError(errno.ENOSPC, "full")
        return write(descriptor, data[:4])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        with pytest.raises(OSError, match="full"):
            _files.append_lines(path, b"third line\n")
    _files.append_lines(path, b"fourth\n")
    assert path.read_bytes() == b"first\nsecond\nfourth\n"


def test_files_and_folders_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after replace_file finds the new file: its bytes before it takes the name, then the folder's list of names."""
    done: list[str] = []
    flush, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"{os.fstat(descriptor).st_size} bytes")
        flush(descriptor)

    def replacing(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replacing)
    _files.replace_file(tmp_path / "a", b"12345")
    _files.append_lines(tmp_path / "b", b"12\n")
    _files.append_lines(tmp_path / "b", b"34\n")
    assert done == ["5 bytes", "rename", "folder", "3 bytes", "folder", "6 bytes"]


# --- a folder that may not be written


@pytest.fixture(params=["mounted", "chmod"])
def closing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Callable[[bool], None]]]:
    """A folder, and what makes it read-only (True) and writable again."""
    if request.param == "mounted":
        for folder in mounted(tmp_path / "disk", 4096):

            def remount(closed: bool, folder: Path = folder) -> None:
                subprocess.run(["mount", "-o", f"remount,{'ro' if closed else 'rw'}", str(folder)], check=True)

            yield folder, remount
        return
    if os.getuid() == 0:
        pytest.skip("root may write everything")
    folder = tmp_path / "folder"
    folder.mkdir()

    def chmod(closed: bool) -> None:
        for path in (folder, *folder.rglob("*")):
            path.chmod((path.stat().st_mode & ~0o222) if closed else (path.stat().st_mode | 0o200))

    yield folder, chmod
    chmod(False)


def test_a_read_only_folder_is_one_line(
    closing: tuple[Path, Callable[[bool], None]],
    model: Any,
    samples: Any,
    whole: dict[str, bytes],
    profile: Profile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, close = closing
    folder = root / "curves"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after_sample(1, interrupt, patch)
        collected(model, samples, folder)
    close(True)
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK_NAME}
    assert set(before) == {"collect.json", "journal.jsonl", "sample-00000.safetensors"}
    with pytest.raises(CurvesError) as caught:
        collected(model, samples, folder, resume=True)
    one_line(caught, folder, "cannot be ")
    with pytest.raises(ProfileError, match="cannot be written: "):
        save_profile(profile, root / "p.yaml")
    with pytest.raises(StudyError, match="cannot be opened: "):
        opened(root / "refine.journal")
    after = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK_NAME}
    assert after == before
    close(False)
    collected(model, samples, folder, resume=True)
    assert contents(folder) == whole


def test_a_read_only_folder_ends_a_command(
    closing: tuple[Path, Callable[[bool], None]], tiny_folder: Path, run: Run
) -> None:
    root, close = closing
    close(True)
    for command in (["collect", tiny_folder, "--out", root / "new"], ["search", tiny_folder, "--out", root / "p.yaml"]):
        code, out, err = run(*command, *DATA)
        last = err.splitlines()[-1]
        assert (code, out) == (2, "") and last.startswith(f"error: {root}") and "Traceback" not in err, err
    assert list(root.iterdir()) == []


# --- what vanishes

DATA = [
    "--data",
    "builtin:prose",
    "--max-length",
    "384",
    "--num-samples",
    "2",
    "--block-size",
    "64",
    "--gain-samples",
    "1",
]


def test_a_data_file_that_vanishes(
    tiny_folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During the measurement it is no longer needed; for --resume it is, and the finished sample waits."""
    monkeypatch.chdir(tmp_path)
    text = (Path(xcalib.__file__).parent / "data" / "corpus" / "prose").glob("*.txt")
    lines = [json.dumps({"text": path.read_text("utf-8")[:6000]}) for path in sorted(text)[:8]]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    command = ["collect", tiny_folder, *DATA[2:], "--data", f"jsonl:{data}:text"]
    with monkeypatch.context() as patch:
        after_sample(1, lambda: data.rename("away"), patch)
        code, _, err = run(*command, "--out", "whole")
        assert code == 0, err
    Path("away").rename(data)

    def stop() -> None:
        data.rename("away")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        after_sample(1, stop, patch)
        assert run(*command, "--out", "curves")[0] == 130
    unit = Path("curves/units/sample-00000.safetensors")
    before = unit.read_bytes()
    code, out, err = run(*command, "--out", "curves", "--resume")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (2, "", 1) and str(data) in errors[0] and unit.read_bytes() == before
    Path("away").rename(data)
    code, _, err = run(*command, "--out", "curves", "--resume")
    assert code == 0, err
    assert contents(Path("curves")) == contents(Path("whole"))


def test_a_work_folder_that_vanishes_is_one_line(
    model: Any, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_sample(1, lambda: shutil.rmtree(tmp_path / "curves"), monkeypatch)
    with pytest.raises(CurvesError) as caught:
        collected(model, samples, tmp_path / "curves")
    one_line(caught, tmp_path / "curves", "cannot be written: No such file or directory")


def test_a_journal_of_trials_that_vanishes_is_one_line(tmp_path: Path) -> None:
    journal = tmp_path / "refine.journal"

    def vanishing(trial: Trial) -> float:
        if trial.number == 2:
            journal.rename(tmp_path / "away")
        return value_of(trial)

    with pytest.raises(StudyError) as caught:
        run_trials(opened(journal), 4, vanishing)
    one_line(caught, journal, "No such file or directory")
    assert not journal.exists()
    (tmp_path / "away").rename(journal)
    run_trials(opened(journal), 4, value_of)
    assert [trial.state.name for trial in opened(journal).trials].count("COMPLETE") == 4


# --- the journal of finished units


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_the_journal_says_what_was_finished(model: Any, samples: Any, tmp_path: Path) -> None:
    collected(model, samples, tmp_path / "c")
    lines = lines_of(tmp_path / "c")
    names = ["sample-00000", "sample-00001", "gain-00000", "joint-00000", "joint-00001"]
    assert [line["unit"] for line in lines] == names
    for line in lines:
        assert line["seconds"] >= 0 and line["bytes"] > 0 and line["pid"] == os.getpid()
        assert re.fullmatch(r"[0-9a-f]{64}", line["sha256"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["finished"])


def test_a_unit_whose_bytes_have_changed_is_not_finished(tmp_path: Path) -> None:
    """Still a good file of the same collection: only the digest tells."""
    units = Units(tmp_path, {"a": 1}, resume=False)
    units.save("one", {"x": np.arange(3)})
    path = tmp_path / "units" / "one.safetensors"
    arrays = load_file(path)
    save_file({**arrays, "x": arrays["x"] + 1}, path)
    assert units.load("one") is None
    units.save("one", {"x": np.arange(3)})
    found = units.load("one")
    assert found is not None and found["x"].tolist() == [0, 1, 2]


def test_a_unit_killed_before_its_line_is_finished(tmp_path: Path) -> None:
    with Units(tmp_path, {"a": 1}, resume=False) as units:
        units.save("one", {"x": np.arange(3)})
        units.save("two", {"x": np.arange(4)})
    journal = tmp_path / "journal.jsonl"
    first, second = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + second[:20])
    with Units(tmp_path, {"a": 1}, resume=True) as units:
        assert units.load("one") is not None and units.load("two") is not None
    lines = lines_of(tmp_path)
    assert [(line["unit"], line["seconds"] is None) for line in lines][1] == ("two", True)
    assert lines[1]["sha256"] == json.loads(second)["sha256"]


def test_lines_that_are_no_record_say_nothing(tmp_path: Path) -> None:
    Units(tmp_path, {"a": 1}, resume=False).save("one", {"x": np.arange(3)})
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(b'\xff\n[]\nnull\n{"unit": 3}\n' + journal.read_bytes())
    assert Units(tmp_path, {"a": 1}, resume=True).load("one") is not None


def test_what_a_killed_writer_left_is_removed(tmp_path: Path, profile: Profile) -> None:
    Units(tmp_path / "c", {"a": 1}, resume=False).save("one", {"x": np.arange(3)})
    left = tmp_path / "c" / "units" / ".two.safetensors.0123456789abcdef.tmp"
    left.write_bytes(b"half")
    Units(tmp_path / "c", {"a": 1}, resume=True)
    assert not left.exists()
    mine, theirs = tmp_path / ".p.yaml.0123456789abcdef.tmp", tmp_path / ".q.yaml.0123456789abcdef.tmp"
    for path in (mine, theirs):
        path.touch()
    _files.remove_left_overs(tmp_path / "p.yaml")
    assert (mine.exists(), theirs.exists()) == (False, True)


# --- two processes


class Holder:
    """Another process that holds what ``take`` gives it, until it is let go or killed."""

    def __init__(self, take: Callable[[], object]) -> None:
        self._end, theirs = FORK.Pipe()

        def hold() -> None:
            kept = take()
            theirs.send("held")
            theirs.recv()
            del kept

        self.began = time.time()
        self._process = FORK.Process(target=hold)
        self._process.start()
        assert self._end.recv() == "held"
        self.pid = self._process.pid

    def let_go(self) -> None:
        self._end.send("enough")
        self._process.join(60)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(60)


@pytest.fixture
def holding() -> Iterator[Callable[[Callable[[], object]], Holder]]:
    holders: list[Holder] = []

    def hold(take: Callable[[], object]) -> Holder:
        holders.append(Holder(take))
        return holders[-1]

    yield hold
    for holder in holders:
        holder.kill()


def named(message: str, holder: Holder) -> None:
    """The message names the process, its host and when it began."""
    assert f"process {holder.pid} on {platform.node()}, started " in message
    found = re.search(r"started (\S+ \S+),", message)
    assert found is not None
    began = datetime.datetime.fromisoformat(found[1]).timestamp()
    assert abs(began - holder.began) < 10  # the kernel's clock and ours are rounded


def test_the_second_process_is_refused_until_the_first_is_gone(tmp_path: Path, holding: Any) -> None:
    holder = holding(lambda: Units(tmp_path / "c", {"a": 1}, resume=False))
    for resume in (True, False):
        with pytest.raises(BusyError) as caught:
            Units(tmp_path / "c", {"a": 1}, resume=resume)
        one_line(caught, tmp_path / "c")
        named(str(caught.value), holder)
    holder.kill()
    with Units(tmp_path / "c", {"a": 1}, resume=True):
        assert (tmp_path / "c" / LOCK_NAME).exists()
    assert not (tmp_path / "c" / LOCK_NAME).exists()


def test_a_lock_goes_with_its_owner(tmp_path: Path, holding: Any) -> None:
    holder = holding(lambda: lock_folder(tmp_path))
    with pytest.raises(BusyError):
        lock_folder(tmp_path)
    holder.let_go()
    with lock_folder(tmp_path), lock_folder(tmp_path):  # once more in one process is no conflict
        pass
    assert list(tmp_path.iterdir()) == []
    first, second = lock_folder(tmp_path), lock_folder(tmp_path)
    first.close()
    first.close()
    assert refused_elsewhere(tmp_path)
    second.close()
    assert not refused_elsewhere(tmp_path)


def test_a_folder_that_another_works_in_is_not_removed(tmp_path: Path, holding: Any) -> None:
    holder = holding(lambda: Units(tmp_path / "work" / "curves", {"a": 1}, resume=False))
    with pytest.raises(BusyError) as caught:
        remove_folder(tmp_path / "work")
    one_line(caught, tmp_path / "work" / "curves")
    assert (tmp_path / "work" / "curves" / "collect.json").is_file()
    holder.let_go()
    remove_folder(tmp_path / "work")
    assert not (tmp_path / "work").exists()
    remove_folder(tmp_path / "work")  # nothing is there: nothing to do


def test_a_lock_of_a_folder_made_again_stays(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    lost = lock_folder(tmp_path / "work")
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / LOCK_NAME).write_text("another's")
    lost.close()
    assert (tmp_path / "work" / LOCK_NAME).read_text() == "another's"


def refused_elsewhere(folder: Path) -> bool:
    """Whether another process may not take the folder."""

    def take() -> None:
        try:
            lock_folder(folder)
        except BusyError:
            sys.exit(7)

    other = FORK.Process(target=take)
    other.start()
    other.join(60)
    assert other.exitcode in (0, 7)
    return other.exitcode == 7


def test_a_folder_that_was_made_again_is_locked_again(tmp_path: Path) -> None:
    """In a notebook, say, that still has an object of the first one."""
    folder = tmp_path / "c"
    first = Units(folder, {"a": 1}, resume=False)
    shutil.rmtree(folder)
    second = Units(folder, {"a": 1}, resume=False)
    assert refused_elsewhere(folder)
    first.close()
    assert refused_elsewhere(folder)
    second.close()
    assert not refused_elsewhere(folder)


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path, holding: Any) -> None:
    """A data loader's worker, say, that lives longer than the process that held the lock."""
    mine = lock_folder(tmp_path)
    holding(lambda: None)
    assert refused_elsewhere(tmp_path)
    mine.close()
    assert not refused_elsewhere(tmp_path)


def test_ranks_of_one_job_share_a_folder(tmp_path: Path, holding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has the lock; another rank may open it, save, and see what the others saved."""

    def rank_0() -> Units:
        units = Units(tmp_path, {"a": 1}, resume=False)
        units.save("one", {"x": np.arange(3)})
        return units

    holding(rank_0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(BusyError):  # a cluster manager's, say: torchrun sets more than these
        Units(tmp_path, {"a": 1}, resume=True)
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BusyError):
        Units(tmp_path, {"a": 1}, resume=True)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(CurvesError, match="another a"):
        Units(tmp_path, {"a": 2}, resume=False)
    units = Units(tmp_path, {"a": 1}, resume=False)
    units.save("two", {"x": np.arange(4)})
    assert units.load("one") is not None
    assert [line["unit"] for line in lines_of(tmp_path)] == ["one", "two"]


def test_a_file_system_without_locks_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(XcalibWarning, match="has no locks; start no second process on it"):
        lock_folder(tmp_path).close()


def test_an_owner_that_has_not_signed_is_another_process(tmp_path: Path, holding: Any) -> None:
    holder = holding(lambda: lock_file(tmp_path / "p.yaml"))
    (tmp_path / ".p.yaml.lock").write_text("")
    with pytest.raises(BusyError, match="another process is at work on it") as caught:
        lock_file(tmp_path / "p.yaml")
    one_line(caught, tmp_path / "p.yaml", "choose another file")
    holder.kill()
    lock_file(tmp_path / "p.yaml").close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["collect", "search", "search --out", "refine --out", "evaluate"])
def test_a_command_at_the_same_job_is_refused(
    command: str, tiny_folder: Path, tmp_path: Path, run: Run, holding: Any, profile: Profile, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    save_profile(profile, "p.yaml")
    held: Callable[[], object] = lambda: lock_folder(tmp_path / "work")  # noqa: E731
    arguments = {
        "collect": ["collect", tiny_folder, *DATA, "--out", "work"],
        "search": ["search", tiny_folder, *DATA, "--heldout-samples", "0", "--work", "work", "--out", "s.yaml"],
        "search --out": ["search", tiny_folder, *DATA, "--work", "other", "--out", "s.yaml"],
        "refine --out": ["refine", "p.yaml", "--model", tiny_folder, "--out", "s.yaml"],
        "evaluate": ["evaluate", tiny_folder, "--uniform", "0.9", *DATA[:6], "--work", "work", "--resume"],
    }[command]
    if command.endswith("--out"):
        held = lambda: lock_file(tmp_path / "s.yaml")  # noqa: E731
    else:
        Path("work").mkdir()
    holder = holding(held)
    code, out, err = run(*arguments)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert (code, out) == (2, "") and "Traceback" not in err
    named(line, holder)
    assert not Path("s.yaml").exists()


# --- kills


@pytest.fixture(scope="module")
def profile(model: Any, samples: Any) -> Profile:
    return xcalib.search(model, samples, target="a:density=0.8", settings=SETTINGS, rounds=0)


@pytest.fixture(scope="module")
def other_profile(model: Any, samples: Any) -> Profile:
    return xcalib.search(model, samples, target="b:density=0.9", settings=SETTINGS, rounds=0)


@pytest.mark.parametrize("target", ["a:density=0.8", "a:drop=50%"])
def test_a_search_killed_while_its_profile_is_saved_repeats_nothing(
    target: str, model: Any, samples: Any, random_samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heldout = random_samples([300], seed=5, split="heldout")
    asked: dict[str, Any] = {"target": target, "heldout": heldout, "settings": SETTINGS, "force": True}
    if target.endswith("%"):  # questions that are always answered
        asking = [dataclasses.replace(sample, answers=("x",), max_new_tokens=1) for sample in samples.samples]
        samples = dataclasses.replace(samples, samples=tuple(asking))
        monkeypatch.setattr("xcalib.evaluation.answer_score", lambda *_arguments: 1.0)
        asked |= {"tokenizer": object(), "heldout": None}

    with pytest.raises(KeyboardInterrupt):
        xcalib.search(model, samples, folder=tmp_path, save=lambda _profile: interrupt(), **asked)
    kept = {"curves", "drop"} if target.endswith("%") else {"curves", "heldout", "rounds"}
    assert {path.name for path in tmp_path.iterdir() if any(path.rglob("*.safetensors"))} == kept
    saved: list[Profile] = []
    with monkeypatch.context() as patch:
        patch.setattr(Units, "save", None)  # nothing is measured again
        found = xcalib.search(model, samples, folder=tmp_path, save=saved.append, resume=True, **asked)
    assert saved == [found] and sorted(path.name for path in tmp_path.iterdir()) == ["curves"]


def test_killed_again_and_again_gives_the_same_bytes(tiny_folder: Path) -> None:
    """The commands; the recorded run of a hundred kills is in docs/reliability.md."""
    script = Path(__file__).with_name("soak_kills.py")
    command = [sys.executable, str(script), "--kills", "8", "--model", str(tiny_folder)]
    done = subprocess.run(
        [*command, "--data", "builtin:prose", "--length", "384"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)
    assert record["kills"] >= 8 and record["runs_compared"] >= 1 and record["ok"]
    assert record["runs_equal"] == record["runs_compared"] and record["wrong"] == []
