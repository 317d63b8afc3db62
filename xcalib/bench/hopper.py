"""The suite ``hopper``: its goals, and the measurements beside the regular ones that they need."""

from collections.abc import Iterator

from xcalib.bench.goals import Goal
from xcalib.bench.tasks import Task

__all__ = ["CELLS", "CROSSOVER_LENGTHS", "DENSITIES", "GOALS", "LENGTHS", "STRIDES", "TAU"]

LENGTHS = (8_192, 32_768, 65_536, 131_072, 262_144)
CROSSOVER_LENGTHS = (512, 1_024, 2_048, 3_072, 4_096, 6_144)
STRIDES = (8, 16)
DENSITIES = (0.05, 0.10, 0.25, 0.50)
TAU = 0.9
SERVED_STRIDE = 16
COMPARED_LENGTHS = (8_192, 32_768, 65_536, 131_072)  # with the public implementation
COMPARED_DENSITY = 0.10
# (length, density, times as fast as dense): the densities published for S = 16 at these lengths
WHOLE = ((65_536, 0.113, 6.0), (131_072, 0.073, 9.0), (262_144, 0.05, 12.0))
SELECTION = ((16, "native", 0.036), (8, "native", 0.07), (16, "fp8", 0.022))


def _chosen(length: int, stride: int, kind: str = "choose", precision: str = "native") -> Task:
    return Task(length, kind, stride=stride, density=COMPARED_DENSITY, precision=precision)


def _public(length: int, stride: int) -> Task:
    return _chosen(length, stride, "public", "")


def _served(length: int) -> Task:
    """From the suite's regular lengths on that is the whole of xattention, which is measured anyway."""
    kind = "whole" if length in LENGTHS else "served"
    return Task(length, kind, stride=SERVED_STRIDE, tau=TAU)


def _dense(length: int) -> Task:
    return Task(length, "dense")


CELLS = (
    *(_served(length) for length in CROSSOVER_LENGTHS),
    *(Task(length, "whole", stride=16, density=density) for length, density, _ in WHOLE if density not in DENSITIES),
    *(_chosen(length, stride) for length in COMPARED_LENGTHS for stride in STRIDES),
    *(_chosen(131_072, stride, precision="fp8") for stride in STRIDES),
    *(_public(length, stride) for length in COMPARED_LENGTHS for stride in STRIDES),
)


def _goals() -> Iterator[Goal]:
    for length in (32_768, 131_072):
        for stride in STRIDES:
            for density in DENSITIES:
                what = f"attention / (density x dense), {density:.0%}, S={stride}"
                task = Task(length, "attention", stride=stride, density=density)
                yield Goal(what, task, _dense(length), "at most", 1.10, per_density=True)
    for stride, precision, bound in SELECTION:
        task = _chosen(131_072, stride, precision=precision)
        what = f"scoring + selection / dense, S={stride}, {precision} scores"
        yield Goal(what, task, _dense(131_072), "at most", bound)
    for length, density, bound in WHOLE:
        task = Task(length, "whole", stride=16, density=density)
        yield Goal(f"dense / whole, {100 * density:.3g}%, S=16", _dense(length), task, "at least", bound)
    yield Goal("sweep of 32 levels / dense", Task(32_768, "sweep"), _dense(32_768), "at most", 2.0)
    for length in (*CROSSOVER_LENGTHS, *LENGTHS):
        yield Goal(f"served / dense, tau {TAU:g}", _served(length), _dense(length), "at most", 1.0, noise=0.03)
    for length in COMPARED_LENGTHS:
        for stride in STRIDES:
            what = f"public scoring + selection / ours, S={stride}"
            sides = (_public(length, stride), _chosen(length, stride))
            yield Goal(what, *sides, "at least", 5.0) if length == 131_072 else Goal(what, *sides, "above", 1.0)


GOALS = tuple(_goals())
