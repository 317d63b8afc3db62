"""What all tables of one call have in common."""

from dataclasses import dataclass

from xcalib.errors import AblationError
from xcalib.kernels.api import BLOCK_SIZES, STRIDES

__all__ = ["AblateSettings"]


@dataclass(frozen=True)
class AblateSettings:
    """What all tables have in common.

    Attributes:
        densities: at which variants are compared, in (0, 1).
        tau: the fixed one of the raw figures and the breakdown.
        block_size: tokens per block (B).
        stride: S of the tables that do not vary it; the paper's is 8.
        every: KLs are taken at every such position; odd, so that every place within a block has its turn.
        planning_samples: calibration samples on which limits for the densities are found.
        gain_samples: of the collection for the table ``threshold``.
        lengths: tokens that the breakdown times; none: the longest sample's length, its half and its quarter.
        limit_seconds: for the repetitions of one timed call.
        seed: of the random pattern.

    Raises:
        AblationError: a value is out of range.
    """

    densities: tuple[float, ...] = (0.2, 0.33)
    tau: float = 0.9
    block_size: int = 64
    stride: int = 8
    every: int = 3
    planning_samples: int = 4
    gain_samples: int = 2
    lengths: tuple[int, ...] = ()
    limit_seconds: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.densities or not all(0 < density < 1 for density in self.densities):
            raise AblationError(f"densities are {list(self.densities)}, expected numbers between 0 and 1, as 0.2,0.33")
        if not 0 < self.tau <= 1:
            raise AblationError(f"tau is {self.tau:g}, expected a number above 0 and at most 1")
        for name, value, allowed in (("block size", self.block_size, BLOCK_SIZES), ("stride", self.stride, STRIDES)):
            if value not in allowed:
                raise AblationError(f"{name} is {value}, allowed are {', '.join(map(str, allowed))}")
        if self.every < 1 or self.every % 2 == 0:
            raise AblationError(f"every is {self.every}, expected an odd number, at least 1")
        if self.planning_samples < 1:
            raise AblationError(f"planning_samples is {self.planning_samples}, expected at least 1")
