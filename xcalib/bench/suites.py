"""What is measured: a suite of settings, and the list of single measurements that it means."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from xcalib.errors import BenchError

__all__ = ["SUITES", "Suite", "Task", "suite_of"]


@dataclass(frozen=True)
class Suite:
    """Causal prefill of one layer at several lengths (queries and keys alike).

    Attributes:
        name: as asked for.
        lengths: at which everything is measured.
        crossover_lengths: further lengths, where only dense attention and the whole of xattention are measured.
        strides: S.
        densities: of the masks, found by per-head thresholds.
        q_heads: query heads.
        k_heads: KV heads.
        head_dim: of all heads.
        batch: sequences.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        block_size: B.
        levels: of the sweep's grid.
        tau: threshold of all heads where the crossover is looked for.
        limit_seconds: at most about this long for the repetitions of one measurement.
    """

    name: str
    lengths: tuple[int, ...]
    crossover_lengths: tuple[int, ...] = ()
    strides: tuple[int, ...] = (8, 16)
    densities: tuple[float, ...] = (0.05, 0.10, 0.25, 0.50)
    q_heads: int = 32
    k_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    dtype: str = "bfloat16"
    block_size: int = 128
    levels: int = 32
    tau: float = 0.9
    limit_seconds: float = 2.0

    def settings(self) -> dict[str, Any]:
        """JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def tasks(self, dense: tuple[str, ...], sparse: tuple[str, ...]) -> Iterator["Task"]:
        """All measurements, by length; those that the crossover needs come first at each length.

        Args:
            dense: names of the dense peers.
            sparse: names of the peers that take our mask; they are measured on the first stride's.
        """
        for length in sorted({*self.lengths, *self.crossover_lengths}):
            yield from (Task(length, "dense", peer=peer) for peer in dense)
            yield from (Task(length, "whole", stride=stride, tau=self.tau) for stride in self.strides)
            if length not in self.lengths:
                continue
            for stride in self.strides:
                yield Task(length, "scoring", stride=stride)
                for density in self.densities:
                    for kind in ("selection", "attention", "whole"):
                        yield Task(length, kind, stride=stride, density=density)
            yield Task(length, "sweep", stride=self.strides[-1])
            for peer in sparse:
                for density in self.densities:
                    yield Task(length, "sparse", peer=peer, stride=self.strides[0], density=density)


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        length: queries and keys.
        kind: dense, scoring, selection, attention, whole, sweep or sparse (a peer on our mask).
        peer: whose kernel; empty for ours.
        stride: where blocks are scored.
        density: of the mask that is wanted.
        tau: one threshold for all heads instead of a density.
    """

    length: int
    kind: str
    peer: str = ""
    stride: int | None = None
    density: float | None = None
    tau: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.kind} {self.peer}".strip(), f"at {self.length}"]
        parts += [f"S={self.stride}"] if self.stride else []
        parts += [f"density {self.density:g}"] if self.density is not None else []
        parts += [f"tau {self.tau:g}"] if self.tau is not None else []
        return " ".join(parts)


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
    ),
    "hopper": Suite(
        "hopper",
        lengths=(8_192, 32_768, 65_536, 131_072, 262_144),
        crossover_lengths=(1_024, 2_048, 3_072, 4_096, 6_144),
    ),
}


def suite_of(name: str, **changes: Any) -> Suite:
    """The suite of that name with some settings changed; a change of the lengths leaves out the extra crossover lengths.

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
    suite = replace(SUITES[name], **tuples)
    _check(suite)
    return suite


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
