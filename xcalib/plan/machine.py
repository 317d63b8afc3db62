"""Machines: how long each amount of work takes on one device, fitted to measurements, and what else a plan has to know."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from xcalib._yaml import one_line
from xcalib.errors import PlanError
from xcalib.plan.cost import Work

__all__ = ["REFERENCE_ONLY", "SHIPPED", "Machine", "Timing", "fit", "load_machine"]

SHIPPED = ("cpu", "h200")
# What takes time in plain torch on a CPU and not in the kernels of a GPU: there what tensor cores do is taken as the cause.
REFERENCE_ONLY = (
    *(
        "attention.pairs",
        "scoring.cells",
        "scoring.rows",
        "sparse.pairs",
        "sparse.gathered",
        "sparse.tiles",
        "sweep.pairs",
    ),
    *("sweep.members", "sweep.entries", "sweep.rows", "sweep.spilled_levels", "sweep.doubled", "sweep.doubled_levels"),
)
FORMAT = 1
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Timing:
    """Work that was done, and the seconds that it took."""

    what: str
    work: Work
    seconds: float


@dataclass(frozen=True)
class Machine:
    """One device of one kind.

    Attributes:
        name: of the file, or what the user calls it.
        device: ``cpu`` or ``cuda``.
        dtype: of the weights that the rates were measured with.
        memory_bytes: of the device; of a CPU, of its host.
        rates: seconds per unit of every amount (:mod:`xcalib.plan.cost`).
        spread: by operation, the largest deviation of a measurement from the fit, as a share of the measurement.
        margin: how far a whole calibration may be from its prediction, as a share: predicted times are shown as a range.
        assumed: operations whose rates nobody measured.
        link_bytes_per_second: between two devices, one way, None where a plan for several would be a guess.
        sources: the measurements, and what was assumed; said with every plan.
        measured: the hardware and the versions.
    """

    name: str
    device: str
    dtype: str
    memory_bytes: int
    rates: Mapping[str, float]
    spread: Mapping[str, float]
    margin: float
    assumed: tuple[str, ...]
    link_bytes_per_second: float | None
    sources: tuple[str, ...]
    measured: Mapping[str, Any]

    def seconds(self, work: Work) -> float:
        """How long one device takes.

        Raises:
            PlanError: the machine has no rate for some of the work.
        """
        amounts = _on_device(work)
        missing = sorted(amounts.keys() - self.rates.keys())
        if missing:
            raise PlanError(f"machine {self.name!r} has no rate for {', '.join(missing)}: measure it with --measure")
        return sum(amount * self.rates[name] for name, amount in amounts.items())

    def memory_each(self, devices: int) -> float:
        """Bytes that each of several devices has: on a CPU they are processes, which share the host's."""
        return self.memory_bytes / devices if self.device == "cpu" else self.memory_bytes

    def record(self) -> dict[str, Any]:
        """What a machine's file holds."""
        return {"format": FORMAT, **asdict(self), "sources": list(self.sources), "assumed": list(self.assumed)}


def load_machine(name: str) -> Machine:
    """A shipped machine, ``cpu`` or ``h200``, or one from a JSON file that ``xcalib plan --measure`` wrote.

    Raises:
        PlanError: there is no such machine, or the file is no machine's.
    """
    try:
        if name in SHIPPED:
            text = (files("xcalib.plan") / "machines" / f"{name}.json").read_text("utf-8")
        else:
            path = Path(name)
            if not path.is_file():
                raise PlanError(
                    f"machine {name!r} is neither {' nor '.join(SHIPPED)} nor a file; make one with --measure"
                )
            if path.stat().st_size > MAX_BYTES:
                raise PlanError(f"{name}: larger than {MAX_BYTES >> 20} MiB, so it is no machine's file")
            text = path.read_text("utf-8")
        values = json.loads(text)
        if values.pop("format") != FORMAT:
            raise PlanError(f"{name}: another format than this version reads: measure again")
        return _checked(Machine(**values | {name: tuple(values[name]) for name in ("sources", "assumed")}))
    except PlanError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        said = one_line(f"{type(error).__name__}: {error}")
        raise PlanError(f"{name}: is not a machine's file ({said}); make one with --measure") from error


def _checked(machine: Machine) -> Machine:
    numbers = [machine.memory_bytes, machine.margin, *machine.rates.values(), *machine.spread.values()]
    if machine.link_bytes_per_second is not None:
        numbers += [machine.link_bytes_per_second, 1 / machine.link_bytes_per_second]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
            raise PlanError(f"{machine.name}: {number!r} is no rate or size: expected a finite number, at least 0")
    if not all(
        isinstance(text, str)
        for text in (machine.name, machine.device, machine.dtype, *machine.sources, *machine.assumed)
    ):
        raise PlanError(f"{machine.name}: name, device, dtype and sources must be texts")
    return machine


def _on_device(work: Work) -> dict[str, float]:
    """All but what devices send each other."""
    return {name: amount for name, amount in work.amounts.items() if amount and not name.startswith("link.")}


def fit(timings: Sequence[Timing], zero: Sequence[str] = ()) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per unit of every amount that occurs: non-negative least squares over relative deviations.

    A timing may be of several operations at once, or of a whole run. Each counts the same, however long it took.

    Args:
        timings: more of them than amounts.
        zero: amounts that take no time.

    Returns:
        (rates by name; by operation, the largest relative deviation of a timing in which it is most of the time).

    Raises:
        PlanError: a timing has no time or no work.
    """
    from scipy.optimize import nnls  # slow to import, and plans need no fit

    timings = [Timing(one.what, one.work.without(*zero), one.seconds) for one in timings]
    names = sorted({name for timing in timings for name in _on_device(timing.work)})
    if not names or any(not timing.seconds > 0 for timing in timings):
        raise PlanError("rates are fitted to timings of some work, each longer than 0 seconds")
    table = np.array([[timing.work.amounts.get(name, 0.0) / timing.seconds for name in names] for timing in timings])
    scale = table.max(axis=0)
    found = nnls(table / scale, np.ones(len(timings)), maxiter=100 * len(names))[0] / scale
    rates = dict(zip(names, found.tolist(), strict=True))
    spread: dict[str, float] = {}
    for timing, deviation in zip(timings, np.abs(table @ found - 1), strict=True):
        most = _longest(timing.work, rates)
        spread[most] = max(spread.get(most, 0.0), float(deviation))
    return rates | dict.fromkeys(zero, 0.0), spread


def _longest(work: Work, rates: Mapping[str, float]) -> str:
    """The operation that takes most of the time."""
    operations: dict[str, float] = {}
    for name, amount in _on_device(work).items():
        operation = name.partition(".")[0]
        operations[operation] = operations.get(operation, 0.0) + amount * rates[name]
    return max(operations, key=lambda operation: operations[operation])
