"""Runs a suite: one measurement after the other, each written to the file as soon as it is known."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from xcalib._files import replace_file
from xcalib.bench.data import Inputs, copies, structured_inputs, thresholds_for_density
from xcalib.bench.machine import describe_machine, describe_versions
from xcalib.bench.parts import Parts, Selected
from xcalib.bench.peers import DENSE, SPARSE, Peer, missing
from xcalib.bench.public import PUBLIC, Public
from xcalib.bench.suites import Suite, suite_of
from xcalib.bench.summary import summarise
from xcalib.bench.tasks import Task
from xcalib.bench.timing import Budget, measure
from xcalib.errors import BenchError
from xcalib.kernels.backends import resolve
from xcalib.kernels.geometry import Geometry
from xcalib.progress import Progress, silent

__all__ = ["run_bench"]

SCHEMA_VERSION = 1
Call = Callable[[], object]


def run_bench(
    suite: str | Suite,
    out: Path,
    *,
    command: str = "",
    budget_seconds: float | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measures a suite and writes its results as JSON, anew after every measurement.

    Args:
        suite: a name of :data:`xcalib.bench.SUITES`, or a suite from :func:`xcalib.bench.suite_of`.
        out: the JSON file.
        command: as typed, for the record.
        budget_seconds: what has not begun by then is listed as skipped; None for no end.
        seed: of the random inputs.
        device: default the current CUDA device if there is one, else the CPU, where ``smoke`` alone runs.
        progress: how the work reports itself.

    Returns:
        The results: settings, machine, versions, every measurement with its status, ratios and the crossover.

    Raises:
        BenchError: the suite cannot run on this device, or the folder of ``out`` does not exist.
    """
    suite = suite_of(suite) if isinstance(suite, str) else suite
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and suite.name != "smoke":
        raise BenchError(f"suite {suite.name!r} needs a CUDA device: on {device.type} only 'smoke' runs")
    if not out.parent.is_dir():
        raise BenchError(f"{out.parent} is not a folder: nothing could be written to {out}")
    absent = missing((*DENSE, *SPARSE, *PUBLIC), device)
    dense, sparse = (tuple(peer for peer in peers if peer.name not in absent) for peers in (DENSE, SPARSE))
    public = tuple(form for form in PUBLIC if form.name not in absent)
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "suite": suite.settings(),
        "seed": seed,
        "budget_seconds": budget_seconds,
        "complete": False,
        "unavailable": absent,
        "measurements": [],
    }
    names = (tuple(peer.name for peer in peers) for peers in (dense, sparse, public))
    tasks = list(suite.tasks(*names))
    peers = {peer.name: peer for peer in (*dense, *sparse)}
    runner = _Runner(suite, device, seed, peers, {form.name: form for form in public}, Budget(budget_seconds))
    with progress("measuring", len(tasks)) as advance, torch.no_grad():
        for task in tasks:
            results["measurements"].append(runner.run(task))
            _write(results, out)
            advance(1)
    results["complete"] = True
    _write(results, out)
    return results


def _write(results: dict[str, Any], out: Path) -> None:
    """A run that is stopped leaves what it had measured."""
    results["summary"] = summarise(results)
    replace_file(out, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())


class _Runner:
    """Measures single tasks; inputs, scores and masks of one length are kept for the tasks that follow."""

    def __init__(
        self,
        suite: Suite,
        device: torch.device,
        seed: int,
        peers: dict[str, Peer],
        public: dict[str, Public],
        budget: Budget,
    ) -> None:
        self.suite, self.device, self.seed, self.budget = suite, device, seed, budget
        self.peers, self.public = peers, public
        self.kept: dict[Any, Any] = {}
        self.length = 0

    def run(self, task: Task) -> dict[str, Any]:
        """The record of one task: ``status`` is ok, error (with the reason) or skipped (the budget was spent)."""
        record = task.settings()
        if self.budget.spent:
            return record | {"status": "skipped", "reason": "the budget of seconds was spent"}
        if task.length != self.length:
            self._forget()
            self.length = task.length
        try:
            calls, facts = getattr(self, f"_{task.kind}")(task)
            timing = measure(calls, self.device, self.budget.at_most(self.suite.limit_seconds))
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                self._forget()
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            return record | {"status": "error", "reason": reason}
        return record | facts | asdict(timing) | {"status": "ok"}

    def _forget(self) -> None:
        self.kept.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _keep(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.length, self.length, self.suite.block_size, True)

    def _inputs(self) -> list[Inputs]:
        def make() -> list[Inputs]:
            suite = self.suite
            inputs = structured_inputs(
                self.length,
                batch=suite.batch,
                q_heads=suite.q_heads,
                k_heads=suite.k_heads,
                head_dim=suite.head_dim,
                dtype=getattr(torch, suite.dtype),
                device=self.device,
                seed=self.seed + self.length,
            )
            return copies(inputs, self.device)

        return list(self._keep("inputs", make))

    def _parts(self) -> Parts:
        first = self._inputs()[0]
        return Parts(resolve(None, first.query, first.key, first.value), self.geometry, self.suite.head_dim)

    def _thresholds(self, task: Task) -> torch.Tensor:
        """fp32 ``(q_heads,)`` on the device."""
        if task.density is None:
            return torch.full((self.suite.q_heads,), float(task.tau or 0.0), device=self.device)

        def make() -> torch.Tensor:
            thresholds, _ = thresholds_for_density(
                self._scores(task.stride or 0), task.density or 0.0, self.length, self.suite.block_size
            )
            return thresholds.to(self.device)

        found: torch.Tensor = self._keep(("thresholds", task.stride, task.density), make)
        return found

    def _scores(self, stride: int) -> torch.Tensor:
        scores: torch.Tensor = self._keep(("scores", stride), lambda: self._parts().scores(self._inputs()[0], stride))
        return scores

    def _scored(self, stride: int) -> torch.Tensor:
        scored: torch.Tensor = self._keep(("scored", stride), self._parts().scoring(self._inputs()[0], stride))
        return scored

    def _selected(self, task: Task) -> Selected:
        def make() -> Selected:
            assert task.stride is not None
            parts = self._parts()
            return parts.selected(parts.selection(self._scored(task.stride), self._thresholds(task), task.stride)())

        selected: Selected = self._keep(("selected", task.stride, task.density, task.tau), make)
        return selected

    def _facts(self, task: Task) -> dict[str, Any]:
        thresholds = self._thresholds(task)
        return {
            "backend": self._parts().backend,
            "found_density": self._selected(task).density(self.geometry),
            "threshold_least": float(thresholds.min()),
            "threshold_most": float(thresholds.max()),
        }

    def _dense(self, task: Task) -> tuple[list[Call], dict[str, Any]]:
        made = [self.peers[task.peer].prepare(inputs, None, self.geometry) for inputs in self._inputs()]
        return [call for call, _ in made], {"note": made[0][1]}

    def _sparse(self, task: Task) -> tuple[list[Call], dict[str, Any]]:
        mask = self._selected(task).mask
        call, note = self.peers[task.peer].prepare(self._inputs()[0], mask, self.geometry)
        return [call], self._facts(task) | {"note": note}

    def _scoring(self, task: Task) -> tuple[list[Call], dict[str, Any]]:
        assert task.stride is not None
        parts = self._parts()
        return [parts.scoring(inputs, task.stride) for inputs in self._inputs()], {"backend": parts.backend}

    def _selection(self, task: Task) -> tuple[list[Call], dict[str, Any]]:
        assert task.stride is not None
        call = self._parts().selection(self._scored(task.stride), self._thresholds(task), task.stride)
        return [call], self._facts(task)

    def _attention(self, task: Task) -> tuple[list[Call], dict[str, Any]]:
        parts, selected = self._parts(), self._selected(task)
        return [parts.attention(inputs, selected) for inputs in self._inputs()], self._facts(task)

    def _whole(self, task: Task) -> tuple[list[Call], dict[str, Any]]:
        assert task.stride is not None
        parts, thresholds = self._parts(), self._thresholds(task)
        return [parts.whole(inputs, thresholds, task.stride) for inputs in self._inputs()], self._facts(task)

    def _choose(self, task: Task) -> tuple[list[Call], dict[str, Any]]:
        assert task.stride is not None
        parts, thresholds = self._parts(), self._thresholds(task)
        calls = [parts.choose(inputs, thresholds, task.stride, task.precision) for inputs in self._inputs()]
        found = parts.selected(calls[0]()).density(self.geometry)
        return calls, {"backend": parts.backend, "found_density": found}

    def _public(self, task: Task) -> tuple[list[Call], dict[str, Any]]:
        assert task.stride is not None
        form, thresholds = self.public[task.peer], self._thresholds(task)
        made = [form.prepare(inputs, thresholds, task.stride, self.geometry) for inputs in self._inputs()]
        found = Selected(made[0][0]()).density(self.geometry)
        return [call for call, _ in made], {"found_density": found, "note": made[0][1]}

    def _served(self, task: Task) -> tuple[list[Call], dict[str, Any]]:
        assert task.stride is not None
        parts, thresholds = self._parts(), self._thresholds(task)
        made = [parts.served(inputs, thresholds, task.stride) for inputs in self._inputs()]
        return [call for call, _ in made], {"backend": parts.backend, "path": made[0][1]}

    def _sweep(self, task: Task) -> tuple[list[Call], dict[str, Any]]:
        assert task.stride is not None
        parts = self._parts()
        calls = [parts.sweep(inputs, self.suite.levels, task.stride) for inputs in self._inputs()]
        return calls, {"backend": parts.backend, "levels": self.suite.levels}
