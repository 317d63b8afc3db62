"""Where trials are kept: a journal file, or a database by its URL."""

import json
import os
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study

from xcalib._files import append_lines
from xcalib._yaml import one_line
from xcalib.errors import StudyError

__all__ = ["open_storage", "open_study", "storage_errors"]

JOURNAL = "journal:"
IDENTITY = "refines"  # user attribute of a study


def open_storage(location: str | None) -> BaseStorage:
    """Open a storage, made if it is not there.

    Args:
        location: ``journal:PATH`` (also ``journal:///ABSOLUTE/PATH``) or a plain path for a journal file; a SQLAlchemy URL such
            as ``sqlite:///study.db`` or ``postgresql://user@host/name`` for a database; None keeps trials in memory.

    Raises:
        StudyError: it cannot be opened, or is no storage of Optuna's.
    """
    if location is None:
        return InMemoryStorage()
    if location.startswith(JOURNAL):
        return _journal(location.removeprefix(JOURNAL).removeprefix("//"))
    return _database(location) if "://" in location else _journal(location)


def _journal(name: str) -> BaseStorage:
    if not name:
        raise StudyError("storage 'journal:': names no file; expected journal:PATH")
    path = Path(name).expanduser().absolute()
    if not path.parent.is_dir():
        raise StudyError(f"storage {str(path)!r}: the folder {path.parent} does not exist")
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise StudyError(f"storage {str(path)!r}: is not a file")
    # not Optuna's default lock, a link: one left behind by a killed worker is never found stale where links dangle
    lock = JournalFileOpenLock(str(path))
    try:
        _check_first_line(path)
        backend = _Journal(path, lock)
        _cut_torn_line(path, lock)
        return JournalStorage(backend)
    except StudyError:
        raise
    except OSError as error:
        raise StudyError(f"storage {str(path)!r}: cannot be opened: {error.strerror or error}") from error
    except Exception as error:  # a file of another kind raises anything
        said = one_line(f"{type(error).__name__}: {error}")
        raise StudyError(f"storage {str(path)!r}: is no journal of Optuna's, or damaged ({said})") from error


class _Journal(JournalFileBackend):
    """Optuna's journal that a full disk leaves whole: entries are added or not at all, and what goes wrong is a StudyError."""

    def __init__(self, path: Path, lock: JournalFileOpenLock) -> None:
        super().__init__(str(path), lock_obj=lock)
        self._path = path

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        try:
            yield from super().read_logs(log_number_from)
        except OSError as error:
            raise self._failed("read", error) from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        try:
            self._lock.acquire()
            try:
                self._path.stat()  # one that vanished would be begun anew, without what stood in it
                append_lines(self._path, lines.encode())
            finally:
                self._lock.release()
        except OSError as error:
            raise self._failed("written", error) from error

    def _failed(self, what: str, error: OSError) -> StudyError:
        reason = error.strerror or str(error)
        return StudyError(f"storage {str(self._path)!r}: cannot be {what}: {reason}; finished trials are kept")


def _check_first_line(path: Path) -> None:
    """Raise ValueError for a file of another kind: Optuna reads over a last line that it does not understand, and appends."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        line = file.readline(1 << 20)
        if line and "op_code" not in json.loads(line):
            raise ValueError("the first line is no entry of a journal")


def _cut_torn_line(path: Path, lock: JournalFileOpenLock) -> None:
    """Drop the half line that a machine which died while writing left at the end; nothing could be read after it."""
    with path.open("rb") as file:
        if not _is_torn(file.seek(0, os.SEEK_END), file):
            return
    lock.acquire()
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if _is_torn(size, file):  # still, now that nobody writes
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _is_torn(size: int, file: Any) -> bool:
    if not size:
        return False
    file.seek(size - 1)
    return bool(file.read(1) != b"\n")


def _database(url: str) -> BaseStorage:
    import sqlalchemy

    shown = url.partition("://")[0] + "://..."
    try:
        parsed = sqlalchemy.make_url(url)
        shown = parsed.render_as_string(hide_password=True)
        if parsed.drivername == "postgresql" and find_spec("psycopg") is not None:
            parsed = parsed.set(
                drivername="postgresql+psycopg"
            )  # what SQLAlchemy takes by itself differs by its version
        # A trial may take longer than a server or a router keeps an idle connection: look before one is used again.
        return RDBStorage(parsed.render_as_string(hide_password=False), engine_kwargs={"pool_pre_ping": True})
    except ModuleNotFoundError as error:
        wanted = "'xcalib[postgres]'" if url.startswith("postgresql") else error.name
        raise StudyError(f"storage {shown!r}: needs a database driver: pip install {wanted}") from error
    except Exception as error:  # drivers raise what they like
        cause = error.__cause__ or error
        said = one_line(f"{type(cause).__name__}: {cause}".partition("\n")[0])
        raise StudyError(
            f"storage {shown!r}: cannot be opened ({said}); expected journal:PATH or a database URL"
        ) from error


@contextmanager
def storage_errors() -> Iterator[None]:
    """A database that fails or goes away while trials are run ends them with one line.

    Raises:
        StudyError: what the driver said.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause: BaseException = error
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        said = one_line(f"{type(cause).__name__}: {cause}".partition("\n")[0])
        raise StudyError(
            f"the storage of the trials failed ({said}); finished trials are kept: run the same command again"
        ) from error


def open_study(
    storage: BaseStorage,
    name: str,
    identity: Mapping[str, str | int | float],
    *,
    metric: str,
    resume: bool | None,
    sampler: optuna.samplers.BaseSampler,
) -> Study:
    """The study called ``name``, begun if it is not there; it records what it refines.

    Args:
        storage: from :func:`open_storage`.
        name: unique for ``identity``.
        identity: what makes trials comparable, in plain words.
        metric: name of the trials' value.
        resume: True goes on with a study and never begins beside one of the same point; False never goes on; None does either.
        sampler: of this worker.

    Raises:
        StudyError: ``resume`` forbids it; the message says what differs.
    """
    there = {study.study_name: study for study in optuna.get_all_study_summaries(storage, include_best_trial=False)}
    if name in there and resume is False:
        raise StudyError(
            "this refinement was begun before: go on with --resume (resume=True), or choose another storage"
        )
    if name not in there and resume:
        for summary in there.values():
            before = summary.user_attrs.get(IDENTITY)
            if isinstance(before, dict) and before.get("point") == identity["point"]:
                raise StudyError(_differences(before, identity))
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # that a study was made is ours to say
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            pruner = optuna.pruners.WilcoxonPruner(p_threshold=0.1)
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                load_if_exists=True,
                direction="minimize",
                sampler=sampler,
                pruner=pruner,
            )
            if study.metric_names is None:
                study.set_metric_names([metric])  # what a dashboard writes on its axis
    finally:
        optuna.logging.set_verbosity(verbosity)
    recorded = study.user_attrs.get(IDENTITY)
    if recorded is None:
        study.set_user_attr(IDENTITY, dict(identity))
    elif recorded != dict(identity):
        raise StudyError(_differences(recorded, identity))
    return study


def _differences(before: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    parts = [f"{key} {before.get(key)!r}, now {value!r}" for key, value in identity.items() if before.get(key) != value]
    return (
        f"the storage holds a refinement of point {before.get('point')!r} with another {'; another '.join(parts)}: use the same "
        "options, or leave --resume out to begin anew"
    )
