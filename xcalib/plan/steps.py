"""The steps of a calibration: what each one runs, how often, and in how many parts it can be shared out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xcalib.collect.curves import DEFAULT_GRID, CollectSettings
from xcalib.errors import PlanError
from xcalib.plan import cost
from xcalib.plan.cost import Work, total
from xcalib.plan.memory import Phase
from xcalib.plan.shape import ModelShape

__all__ = [
    "DENSITIES",
    "Batch",
    "Job",
    "Step",
    "evaluation",
    "gains",
    "joint",
    "kls",
    "round_slopes",
    "samples",
    "steps",
]

DEFAULTS = CollectSettings()
DENSITIES = (0.45, 0.33, 0.22)  # of the points that a search without a target finds


@dataclass(frozen=True)
class Job:
    """What is to be calibrated.

    Attributes:
        lengths: tokens of the samples; each length is a collection of its own.
        samples: of each length.
        stride: tokens per group of the scoring (S).
        block_size: tokens per block (B).
        gain_samples: samples of each length that measure the layer gains.
        gain_every: KLs are taken at every such position.
        joint_densities: at which all layers are measured together.
        levels: thresholds of the grid.
        rounds: steps after the first search, at most.
        densities: of the operating points.
        heldout: held-out samples of each length; 0 leaves the evidence out.
    """

    lengths: tuple[int, ...]
    samples: int
    stride: int = DEFAULTS.stride
    block_size: int = DEFAULTS.block_size
    gain_samples: int = DEFAULTS.gain_samples
    gain_every: int = DEFAULTS.gain_every
    joint_densities: tuple[float, ...] = DEFAULTS.joint_densities
    levels: int = len(DEFAULT_GRID)
    rounds: int = 2
    densities: tuple[float, ...] = DENSITIES
    heldout: int = 6

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < self.gain_every:
            raise PlanError(f"lengths are {self.lengths}, expected some of at least {self.gain_every} tokens")
        if self.samples < 1 or self.gain_samples < 1 or self.rounds < 0 or self.heldout < 0:
            raise PlanError("samples and gain samples must be at least 1, rounds and held-out samples at least 0")
        if not self.densities or not all(0 < density < 1 for density in self.densities):
            raise PlanError(f"densities are {self.densities}, expected numbers between 0 and 1")

    @property
    def rule(self) -> dict[str, int]:
        """Stride and block size, as the functions of :mod:`xcalib.plan.cost` take them."""
        return {"stride": self.stride, "block_size": self.block_size}


@dataclass(frozen=True)
class Batch:
    """Equal units of work, as many as there are samples; two ranks never share one."""

    count: int
    unit: Work


@dataclass(frozen=True)
class Step:
    """One step; its batches run one after the other.

    Attributes:
        name: of the step.
        phase: what decides how much memory it takes (:mod:`xcalib.plan.memory`).
        passes: what is run, in words.
        least: the batches that run in any case.
        most: those that run where every round is taken.
    """

    name: str
    phase: Phase
    passes: str
    least: tuple[Batch, ...]
    most: tuple[Batch, ...]

    @property
    def flops(self) -> tuple[float, float]:
        """At least and at most."""
        return _flops(self.least), _flops(self.most)


def _flops(batches: Sequence[Batch]) -> float:
    return sum(batch.count * batch.unit.flops for batch in batches)


def samples(shape: ModelShape, job: Job, length: int) -> Work:
    """One sample's sweep."""
    return cost.sweep_pass(shape, length, levels=job.levels, **job.rule)


def gains(shape: ModelShape, job: Job, length: int) -> Work:
    """The gains of all layers on one sample: with layer l switched, blocks l to the last run again."""
    layers, sparse = shape.layers, shape.sparse_layers
    dense = cost.attention(shape.q_heads, shape.head_dim, length)
    again = sparse * (layers + 1) / 2  # blocks, on average over layers
    switched = cost.sparse_layer(shape, length, DEFAULTS.gain_density, **job.rule)
    return (
        cost.dense_pass(shape, length)
        + cost.linear(shape, length) * (again / layers)
        + dense * (again - sparse)
        + switched * sparse
        + cost.logits(shape, length // job.gain_every, 1 + sparse)
    )


def kls(shape: ModelShape, job: Job, length: int, densities: Sequence[float]) -> Work:
    """The KL of one sample with all layers sparse, at some densities; the dense model's hidden states are there."""
    passes = total(cost.sparse_pass(shape, length, density, **job.rule) for density in densities)
    return passes + cost.logits(shape, length // job.gain_every, 1 + len(densities))


def joint(shape: ModelShape, job: Job, length: int, densities: Sequence[float]) -> Work:
    """All layers together, on one sample."""
    return kls(shape, job, length, densities)


def round_slopes(shape: ModelShape, job: Job, length: int) -> Work:
    """The slopes of one sample."""
    three = cost.logits(shape, length // job.gain_every, 3)  # the dense model's, the sparse one's, and the gradient
    return cost.slope_pass(shape, length, levels=job.levels, **job.rule) + three


def evaluation(shape: ModelShape, job: Job, length: int) -> Work:
    """One held-out sample: densely, and at every operating point; distributions at all positions."""
    passes = total(cost.sparse_pass(shape, length, density, **job.rule) for density in job.densities)
    return cost.dense_pass(shape, length) + passes + cost.logits(shape, length, 1 + len(job.densities))


def steps(shape: ModelShape, job: Job) -> tuple[Step, ...]:
    """Every step of ``xcalib search``, in order; the first three are ``xcalib collect``."""
    gain_samples = min(job.gain_samples, job.samples)

    def each(count: int, unit: Callable[[ModelShape, Job, int], Work]) -> tuple[Batch, ...]:
        return tuple(Batch(count, unit(shape, job, length)) for length in job.lengths)

    def first(shape: ModelShape, job: Job, length: int) -> Work:
        return joint(shape, job, length, job.joint_densities[:1])

    def others(shape: ModelShape, job: Job, length: int) -> Work:
        return joint(shape, job, length, job.joint_densities)

    others_too = len(job.joint_densities) - 1
    swept = each(job.samples, samples)
    gained = each(gain_samples, gains)
    together = each(gain_samples, others) + each(job.samples - gain_samples, first)
    found = [
        Step("samples", "sweep", f"{len(job.lengths) * job.samples} sweeps", swept, swept),
        Step("gains", "gains", f"{len(job.lengths) * gain_samples} x {shape.sparse_layers} layers", gained, gained),
        Step(
            "joint losses",
            "joint",
            f"{len(job.lengths) * (job.samples + gain_samples * others_too)} sparse passes",
            together,
            together,
        ),
    ]
    if job.rounds:
        found.append(_rounds(shape, job))
    if job.heldout:
        batches = each(job.heldout, evaluation)
        passes = f"{len(job.lengths) * job.heldout} x (1 dense, {len(job.densities)} sparse)"
        found.append(Step("held-out evaluation", "evaluate", passes, batches, batches))
    return tuple(found)


def _rounds(shape: ModelShape, job: Job) -> Step:
    """Per point: slopes where the last step was taken, and the KL before, after and on other samples. Steps may not be taken."""
    least, most = [], []
    for length in job.lengths:
        dense = Batch(job.samples, cost.dense_pass(shape, length))
        slope = Batch(job.samples, round_slopes(shape, job, length))
        least.append(dense)
        most.append(dense)
        for density in job.densities:
            kl = Batch(job.samples, kls(shape, job, length, (density,)))
            least += [kl, slope]  # no head moves
            most += [kl, *[slope, kl, kl] * job.rounds]
    sparse, count = 1 + 2 * job.rounds, len(job.lengths) * job.samples
    passes = f"{len(job.densities)} points x {count} x up to ({sparse} sparse, {job.rounds} backward)"
    return Step("rounds", "slopes", passes, tuple(least), tuple(most))
