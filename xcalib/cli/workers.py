"""Commands in several processes: ``--workers N`` starts them on this host, ``torchrun`` on any number of hosts."""

import logging
import os
import platform
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from xcalib._lock import RANK_VARIABLES
from xcalib.cli.output import console
from xcalib.errors import RankError, XcalibError

if TYPE_CHECKING:
    from xcalib.collect.ranks import Place, Ranks

__all__ = ["Workers", "joined", "launch", "refuse_ranks", "speaks"]

SHARED = ("collect", "search")  # commands that ranks share
INTERRUPTED = 130
POLL_SECONDS = 0.1
CLOSE_SECONDS = 10  # for the others to end once one has, before they are killed

Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Share the samples among N processes on this host, one a GPU (docs/many-gpus.md); several hosts: torchrun.",
    ),
]


def _place() -> "Place | None":
    if any(name not in os.environ for name in RANK_VARIABLES):
        return None  # without importing torch: most commands are one process
    from xcalib.collect.ranks import Place

    return Place.of_environment()


def speaks() -> bool:
    """Whether this process prints: of several ranks, rank 0 alone does."""
    try:
        place = _place()
    except RankError:  # to be said
        return True
    return place is None or place.rank == 0


def refuse_ranks(command: str | None) -> None:
    """Refuse a command that would do the same work, and write the same files, once for every rank."""
    if command not in SHARED and _place() is not None:
        raise typer.BadParameter(f"{command} runs in one process: start it without torchrun", param_hint="torchrun")


@contextmanager
def joined(workers: int | None) -> "Iterator[Ranks]":
    """This process as a rank, if it is one; all ranks end with one exit code, and rank 0 alone prints.

    Args:
        workers: of ``--workers``; above 1 this process starts that many, waits for them, and does not return.
    """
    from xcalib.collect.chunks import memory_error
    from xcalib.collect.ranks import LAUNCHED, describe

    place = _place()
    if place is None and (workers or 1) > 1:
        launch(workers or 1)
    if place is not None and workers and LAUNCHED not in os.environ:
        raise typer.BadParameter(
            f"torchrun has started {place.size} ranks already: leave it out", param_hint="--workers"
        )
    if not speaks():
        console.quiet = True
        warnings.simplefilter("ignore")  # rank 0 has the same
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    with _open() as ranks:
        try:
            yield ranks
        except BaseException as error:
            told = memory_error(error) or error
            code = _code_of(told)
            if code is not None:
                ranks.leave(code, describe(told) if isinstance(told, Exception) and code == 2 else None)
            raise


def _open() -> "Ranks":
    from xcalib.collect.ranks import Ranks

    try:
        return Ranks.open(says=_say)
    except RankError as error:
        if not speaks():  # rank 0 cannot know, and would wait
            _say(str(error))
        raise


def _code_of(error: BaseException) -> int | None:
    """The exit code that an expected end of a command has; None for one that nobody expected."""
    if isinstance(error, typer.Exit):
        return int(error.exit_code)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED
    return 2 if isinstance(error, XcalibError | OSError) or hasattr(error, "format_message") else None


def _say(line: str) -> None:
    console.show_cursor(True)  # a progress bar may have hidden it
    console.quiet = False
    console.print(f"error: {' '.join(line.split())}", markup=False, soft_wrap=True)


def launch(workers: int) -> NoReturn:
    """Run this command again in ``workers`` processes, and end as they do; a rank that dies ends all, in one line."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # -P: as in the installed command, the working directory is no place to import from
    arguments = ("-P", "-m", "xcalib", *sys.argv[1:])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with tempfile.TemporaryDirectory() as logs:
        context = start_processes(
            "xcalib",
            sys.executable,
            dict.fromkeys(range(workers), arguments),
            {rank: _environment(rank, workers, store.port) for rank in range(workers)},
            DefaultLogsSpecs(log_dir=logs),
        )
        try:
            result = context.wait(period=POLL_SECONDS)
        except (SignalException, KeyboardInterrupt) as error:
            context.close(timeout=CLOSE_SECONDS)
            console.show_cursor(True)
            number = getattr(error, "sigval", signal.SIGINT)
            word = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
            console.print(f"{word}: finished samples are kept; run the same command with --resume")
            raise typer.Exit(128 + number) from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    raise typer.Exit(_code_for(result.failures if result else {}))


def _environment(rank: int, workers: int, port: int) -> dict[str, str]:
    from xcalib.collect.ranks import LAUNCHED

    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), LAUNCHED: "1"}
    quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL")}  # what it reports, ranks say better
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers}
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, _cores() // workers))}
    return where | quiet | {name: str(value) for name, value in place.items()} | threads


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _code_for(failures: dict[int, Any]) -> int:
    """The exit code of all; a line about the rank that died, if one did."""
    from xcalib.collect.watch import KEPT, LOST

    # in the order in which they were seen; ranks that another one's death ended are not its cause
    ended = [(rank, int(failure.exitcode)) for rank, failure in failures.items()]
    causes = [(rank, code) for rank, code in ended if code != LOST] or ended
    if not causes:
        return 0
    rank, code = causes[0]
    expected = next((code for _rank, code in causes if code in (2, 3, INTERRUPTED)), None)
    # Rank 0 has said why then. Another rank may be seen to end first, of a connection that broke under it, but not by a signal
    # that somebody sent.
    if expected is not None and (code >= 0 or code == -signal.SIGABRT):
        return expected
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (as the system does when memory runs out)" if name == "SIGKILL" else ""
        how = f"was killed by {name}{hint}"
    else:
        how = f"ended with exit code {code}"
    _say(f"rank {rank} on {platform.node()} {how}; {KEPT}")
    return 1
