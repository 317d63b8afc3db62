"""End-to-end figures of thresholds, sample by sample; the dense model runs once on each sample."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xcalib.collect.skipping import of_sample
from xcalib.data import SampleSet
from xcalib.errors import DataError
from xcalib.kernels import visible_blocks
from xcalib.models.logits import LogitHead, sampled_positions
from xcalib.models.placement import input_device
from xcalib.models.sparse import SparseAttention, SparsePlan

__all__ = ["Figures", "Meter"]

FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Figures:
    """Of one set of thresholds on all samples: fp64 ``(samples,)`` mean KL in nats per token and density, and what weighs them.

    Attributes:
        kl: KL(dense || sparse), mean over a sample's compared positions.
        density: blocks computed over visible blocks in layers that may be sparse.
        positions: compared positions of each sample.
        blocks: visible blocks of one head.
    """

    kl: FloatArray
    density: FloatArray
    positions: FloatArray
    blocks: FloatArray

    @property
    def mean_kl(self) -> float:
        """Over positions, as an evaluation pools it."""
        return float(np.average(self.kl, weights=self.positions))

    @property
    def mean_density(self) -> float:
        """Over blocks."""
        return float(np.average(self.density, weights=self.blocks))

    def only(self, samples: list[int]) -> "Figures":
        """The same of some samples."""
        return Figures(*(getattr(self, field.name)[samples] for field in dataclasses.fields(self)))


class Meter:
    """Measures thresholds of one length bin on samples that the bin serves.

    Keeps the dense hidden states at the compared positions on the host, ``(positions, hidden)`` of each sample in the model's
    own precision, and every figure that it measured.
    """

    def __init__(self, model: Any, plan: SparsePlan, samples: SampleSet, *, bin_index: int, every: int) -> None:
        """Check the samples.

        Raises:
            DataError: a sample is of a length that the bin does not serve, or ``every`` is not odd or more than its tokens.
        """
        self._model, self._plan, self._bin, self._every = model, plan, bin_index, every
        self._head = LogitHead(model)
        self._device = input_device(model)
        self._tokens = [torch.tensor(sample.tokens) for sample in samples.samples]
        self._dense: dict[int, torch.Tensor] = {}
        self._known: dict[tuple[int, bytes], tuple[float, float]] = {}
        lengths = [len(tokens) for tokens in self._tokens]
        if every < 1 or every % 2 == 0 or every > min(lengths):
            raise DataError(f"every is {every}, expected an odd number of at most {min(lengths)}, the shortest sample")
        for index, length in enumerate(lengths):
            if plan.bin_index(length) != bin_index or plan.is_beyond(length):
                start, end = plan.bins[bin_index]
                served = f"{start} to {end - 1}" if end is not None else f"{start} and more"
                raise DataError(f"sample {index} has {length} tokens, but the thresholds to refine serve {served}")
        self.positions = np.array([len(range(every - 1, length, every)) for length in lengths], dtype=np.float64)
        self.blocks = np.array([_visible(length, plan.block_size) for length in lengths])

    def __len__(self) -> int:
        return len(self._tokens)

    def one(self, index: int, thresholds: FloatArray) -> tuple[float, float]:
        """Mean KL and density of sample ``index`` under thresholds ``(layers, heads)``.

        Raises:
            ModelError: the model's head is not supported.
            NonFiniteError: hidden states or logits are not finite.
        """
        key = (index, thresholds.tobytes())
        if key not in self._known:
            with of_sample(index):
                self._known[key] = self._measure(index, thresholds)
        return self._known[key]

    def all(self, thresholds: FloatArray, advance: Any = lambda _steps: None) -> Figures:
        """Every sample; ``advance`` is called once for each."""
        found = []
        for index in range(len(self)):
            found.append(self.one(index, thresholds))
            advance(1)
        return self.figures(*zip(*found, strict=True))

    def figures(self, kl: npt.ArrayLike, density: npt.ArrayLike) -> Figures:
        """What is known of all samples, with these samples' weights."""
        return Figures(np.asarray(kl, np.float64), np.asarray(density, np.float64), self.positions, self.blocks)

    def remember(self, thresholds: FloatArray, figures: Figures) -> None:
        """Figures that were measured before, by another worker or run: they are not measured again."""
        for index, pair in enumerate(zip(figures.kl.tolist(), figures.density.tolist(), strict=True)):
            self._known[index, thresholds.tobytes()] = pair

    def _measure(self, index: int, thresholds: FloatArray) -> tuple[float, float]:
        tokens = self._tokens[index].to(self._device)
        compared = sampled_positions(self._every)
        if index not in self._dense:
            self._dense[index] = self._head.prefill(tokens).hidden[compared].cpu()
        taus = self._plan.thresholds.clone()
        taus[self._bin] = torch.from_numpy(thresholds)
        with SparseAttention(self._model, dataclasses.replace(self._plan, thresholds=taus)) as sparse:
            hidden = self._head.prefill(tokens).hidden[compared]
            density = sparse.density()  # (layers, heads)
        density[sorted(self._plan.dense_layers)] = np.nan
        kl = self._head.kl(self._dense[index].to(hidden), [hidden])  # (1, positions)
        return float(kl.double().mean()), float(np.nanmean(density))


def _visible(length: int, block_size: int) -> float:
    return float(visible_blocks(length, length, block_size=block_size).sum())
