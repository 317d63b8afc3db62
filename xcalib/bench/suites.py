"""What is measured: a suite of settings, and the list of single measurements that it means."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from xcalib.bench import hopper
from xcalib.bench.goals import Goal
from xcalib.bench.tasks import Task
from xcalib.errors import BenchError

__all__ = ["SUITES", "Suite", "suite_of"]

GOALS_ARE_FOR = {"q_heads", "k_heads", "head_dim", "batch", "dtype", "block_size", "levels", "tau"}


@dataclass(frozen=True)
class Suite:
    """Causal prefill of one layer at several lengths (queries and keys alike).

    Attributes:
        name: as asked for.
        lengths: at which everything is measured.
        crossover_lengths: further lengths, where only dense attention and the whole of xattention are measured.
        strides: S.
        densities: of the masks, found by per-head thresholds.
        densities_at: other densities at some lengths.
        cells: single measurements beside those; one of kind public is made with every form of the public implementation.
        q_heads: query heads.
        k_heads: KV heads.
        head_dim: of all heads.
        batch: sequences.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        block_size: B.
        levels: of the sweep's grid.
        tau: threshold of all heads where the crossover is looked for.
        limit_seconds: at most about this long for the repetitions of one measurement.
        goals: that the measurements are held against.
    """

    name: str
    lengths: tuple[int, ...]
    crossover_lengths: tuple[int, ...] = ()
    strides: tuple[int, ...] = (8, 16)
    densities: tuple[float, ...] = (0.05, 0.10, 0.25, 0.50)
    densities_at: tuple[tuple[int, tuple[float, ...]], ...] = ()
    cells: tuple[Task, ...] = ()
    q_heads: int = 32
    k_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    dtype: str = "bfloat16"
    block_size: int = 128
    levels: int = 32
    tau: float = 0.9
    limit_seconds: float = 2.0
    goals: tuple[Goal, ...] = ()

    def settings(self) -> dict[str, Any]:
        """JSON values."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        nested = {"cells": [cell.settings() for cell in self.cells], "goals": [goal.settings() for goal in self.goals]}
        return plain | nested | {"densities_at": {str(length): list(found) for length, found in self.densities_at}}

    def tasks(self, dense: tuple[str, ...], sparse: tuple[str, ...], public: tuple[str, ...] = ()) -> Iterator[Task]:
        """All measurements, by length; those that the crossover needs come first at each length.

        Args:
            dense: names of the dense peers.
            sparse: names of the peers that take our mask; they are measured on the first stride's.
            public: names of the public implementation's forms.
        """
        for length in sorted({*self.lengths, *self.crossover_lengths}):
            yield from (Task(length, "dense", peer=peer) for peer in dense)
            yield from (Task(length, "whole", stride=stride, tau=self.tau) for stride in self.strides)
            if length in self.lengths:
                yield from self._regular(length, sparse)
            for cell in self.cells:
                if cell.length == length:
                    yield from (replace(cell, peer=peer) for peer in public) if cell.kind == "public" else (cell,)

    def _regular(self, length: int, sparse: tuple[str, ...]) -> Iterator[Task]:
        densities = dict(self.densities_at).get(length, self.densities)
        for stride in self.strides:
            yield Task(length, "scoring", stride=stride)
            for density in densities:
                for kind in ("selection", "attention", "whole"):
                    yield Task(length, kind, stride=stride, density=density)
        yield Task(length, "sweep", stride=self.strides[-1])
        for peer in sparse:
            for density in densities:
                yield Task(length, "sparse", peer=peer, stride=self.strides[0], density=density)


SUITES = {
    "smoke": Suite(
        "smoke",
        lengths=(256, 384),
        crossover_lengths=(128,),
        densities=(0.5, 0.75),
        q_heads=2,
        k_heads=1,
        head_dim=32,
        dtype="float32",
        block_size=64,
        levels=6,
        limit_seconds=0.03,
        cells=(
            Task(128, "served", stride=16, tau=0.9),
            Task(256, "choose", stride=16, density=0.5, precision="native"),
            Task(256, "public", stride=16, density=0.5),
        ),
    ),
    "hopper": Suite(
        "hopper",
        lengths=hopper.LENGTHS,
        crossover_lengths=hopper.CROSSOVER_LENGTHS,
        strides=hopper.STRIDES,
        densities=hopper.DENSITIES,
        densities_at=((262_144, (0.05, 0.10)),),  # to keep the suite short
        cells=hopper.CELLS,
        tau=hopper.TAU,
        goals=hopper.GOALS,
    ),
}


def suite_of(name: str, **changes: Any) -> Suite:
    """The suite of that name with some settings changed.

    A change of the lengths leaves out the extra crossover lengths, one of lengths, strides or densities the single
    measurements that no longer belong, and one of the shapes, of tau or of the levels the goals, which are not for those.

    Raises:
        BenchError: no such suite or setting, or values that the kernels do not take.
    """
    if name not in SUITES:
        raise BenchError(f"suite is {name!r}, there are {', '.join(SUITES)}")
    changes = {key: value for key, value in changes.items() if value is not None}
    unknown = sorted(set(changes) - set(Suite.__dataclass_fields__))
    if unknown:
        raise BenchError(f"a suite has no {', '.join(unknown)}")
    if "lengths" in changes:
        changes.setdefault("crossover_lengths", ())
    tuples: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    suite = _fitting(replace(SUITES[name], **tuples), set(changes))
    _check(suite)
    return suite


def _fitting(suite: Suite, changed: set[str]) -> Suite:
    """Without the cells and goals that are not for the settings that were changed."""
    asked = (None, *suite.densities)
    cells = tuple(
        cell
        for cell in suite.cells
        if cell.length in {*suite.lengths, *suite.crossover_lengths}
        and cell.stride in suite.strides
        and ("densities" not in changed or cell.density in asked)
    )
    goals = () if changed & GOALS_ARE_FOR else suite.goals
    densities_at = () if "densities" in changed else suite.densities_at
    return replace(suite, cells=cells, goals=goals, densities_at=densities_at)


def _check(suite: Suite) -> None:
    rules = {
        "lengths": (bool(suite.lengths) and min(suite.lengths) >= 1, "one or more, each at least 1"),
        "strides": (bool(suite.strides) and set(suite.strides) <= {4, 8, 16, 32, 64}, "from 4, 8, 16, 32, 64"),
        "densities": (all(0 < density <= 1 for density in suite.densities), "above 0, at most 1"),
        "k_heads": (suite.k_heads >= 1 and suite.q_heads % suite.k_heads == 0, f"a divisor of {suite.q_heads}"),
        "head_dim": (32 <= suite.head_dim <= 256, "32 to 256"),
        "batch": (suite.batch >= 1, "at least 1"),
        "dtype": (suite.dtype in ("bfloat16", "float16", "float32"), "bfloat16, float16 or float32"),
        "block_size": (suite.block_size in (64, 128), "64 or 128"),
        "levels": (suite.levels >= 2, "at least 2"),
        "tau": (0 <= suite.tau <= 1, "0 to 1"),
        "limit_seconds": (suite.limit_seconds > 0, "above 0"),
    }
    for name, (fits, allowed) in rules.items():
        if not fits:
            raise BenchError(f"{name} is {getattr(suite, name)}, allowed is {allowed}")
