"""Collection layer by layer, for models larger than memory: each block is read once a pass, and all samples go through it.

What :class:`xcalib.collect.job.Job` would measure sample by sample is measured here beforehand and left as its units, the same
numbers, so that the job only reads them. A pass takes hidden states through the blocks in order. The unit of work is one sample,
or one variant of it, in one block; between blocks hidden states are on disk. There are three passes:

1. the sweep of every sample. Of a gain sample the hidden states before each block are kept: they are where its variants start;
2. the gains: a variant of each gain sample for every layer, which is sparse there and dense in all later ones;
3. the joint losses: a variant of every sample for every allocation, sparse in all layers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from xcalib.collect.curves import CollectSettings, Curves
from xcalib.collect.gains import GainMeter
from xcalib.collect.hidden import HiddenStates
from xcalib.collect.job import as_unit, check_lengths, gain_levels, joint_levels
from xcalib.collect.layer_sweep import LayerSweep
from xcalib.collect.shared_units import SharedUnits
from xcalib.collect.units import Units
from xcalib.data import SampleSet
from xcalib.errors import ModelError
from xcalib.models.layers import Entry, LayerStack
from xcalib.models.logits import sampled_positions
from xcalib.models.placement import input_device
from xcalib.models.sparse import SparseAttention
from xcalib.progress import Progress

__all__ = ["LayerPasses"]


@dataclass(frozen=True, eq=False)
class _Run:
    """Sample ``index`` from block ``start`` on, with thresholds by layer, dense elsewhere; ``name`` is that of its state."""

    name: str
    index: int
    start: int = 0
    thresholds: Mapping[int, np.ndarray] = field(default_factory=dict)


Through = Callable[[int, _Run, Entry, torch.Tensor], torch.Tensor]


class LayerPasses:
    """Fills one collection's units of samples, gains and joint losses, holding one block of the model at a time.

    Raises:
        CurvesError: the disk has no room for the hidden states, or a sample is too short.
        ModelError: the model cannot be taken layer by layer.
    """

    def __init__(
        self,
        model: Any,
        query_heads: int,
        samples: SampleSet,
        settings: CollectSettings,
        units: Units | SharedUnits,
        progress: Progress,
    ) -> None:
        check_lengths(samples, settings)
        self._model, self._settings, self._units, self._progress = model, settings, units, progress
        self._samples = samples.samples
        self._stack = LayerStack(model)
        self._sweeps = LayerSweep(model, settings, query_heads)
        self._meter = GainMeter(model, settings, query_heads)
        self._hidden = HiddenStates(units.folder / "hidden")
        self._gain_samples = min(settings.gain_samples, len(self._samples))
        self._entry = lru_cache(maxsize=1)(self._enter)

    def sweep(self) -> None:
        """The units of all samples."""
        self._dense([index for index in range(len(self._samples)) if not self._has("sample", index)], measure=True)

    def gains(self, curves: Curves) -> None:
        """The units of the gain samples."""
        wanted = [index for index in range(self._gain_samples) if not self._has("gain", index)]
        # where the samples were measured without these passes, or a pass of before has used the hidden states up
        started = [
            i for i in wanted if all(self._hidden.layer(_start(i, layer)) is not None for layer in curves.layers)
        ]
        self._dense([index for index in wanted if index not in started], measure=False)
        thresholds = curves.grid[gain_levels(curves)]  # (layers, heads)
        rows = list(zip(curves.layers, thresholds, strict=True))
        runs = {i: [_Run(_start(i, layer), i, layer, {layer: row}) for layer, row in rows] for i in wanted}
        self._sparse(runs, "gain", "the layer gains")

    def joint(self, curves: Curves) -> None:
        """The units of the joint losses; the curves have their gains."""
        runs = {}
        for index in range(len(self._samples)):
            if not self._has("joint", index):
                runs[index] = [
                    _Run(f"joint-{index:05d}-{number}", index, thresholds=dict(zip(curves.layers, rows, strict=True)))
                    for number, rows in enumerate(curves.grid[joint_levels(curves, index)])
                ]
        self._sparse(runs, "joint", "all layers together")

    def _has(self, kind: str, index: int) -> bool:
        return self._units.load(f"{kind}-{index:05d}") is not None

    @torch.inference_mode()
    def _dense(self, wanted: Sequence[int], *, measure: bool) -> None:
        """Take samples densely through all blocks, sweep them on the way if asked to, and keep where variants start."""
        if not wanted:
            return
        self._make_room({index: 1 + self._stack.depth * (index < self._gain_samples) for index in wanted})
        runs = [_Run(f"{'sweep' if measure else 'dense'}-{index:05d}", index) for index in wanted]

        def through(layer: int, run: _Run, entry: Entry, hidden: torch.Tensor) -> torch.Tensor:
            if run.index < self._gain_samples:
                self._hidden.save(_start(run.index, layer), layer, hidden)
            if not measure:
                return self._stack.forward(layer, entry, hidden)
            output, found = self._sweeps.measure(layer, lambda: self._stack.forward(layer, entry, hidden))
            self._units.save(_swept(run.index, layer), found)
            return output

        with self._sweeps.measuring() if measure else nullcontext():
            what = "Measuring" if measure else "Preparing the gains of"
            self._pass(f"{what} {len(wanted)} samples, layer by layer", runs, through)
        for run in runs:
            if measure:
                self._finish_sweep(run)
            self._hidden.drop(run.name)

    def _finish_sweep(self, run: _Run) -> None:
        last = self._last(run).float().cpu().numpy()
        found = {layer: self._units.load(_swept(run.index, layer)) or {} for layer in range(self._stack.depth)}
        curves = self._sweeps.gather(found, len(self._samples[run.index].tokens), last)
        self._units.save(f"sample-{run.index:05d}", as_unit(curves))

    @torch.inference_mode()
    def _sparse(self, runs: Mapping[int, Sequence[_Run]], kind: str, what: str) -> None:
        """Take variants of samples through the blocks, and save the KL of each from the dense model as a unit by sample."""
        if not runs:
            return
        self._make_room({index: len(own) for index, own in runs.items()})
        with self._stack.passing():  # the blocks do nothing here: it is the head that is looked at
            self._meter.check_head(self._tokens(next(iter(runs))))
        with SparseAttention(self._model, self._meter.plan({})) as switch:

            def through(layer: int, run: _Run, entry: Entry, hidden: torch.Tensor) -> torch.Tensor:
                own = run.thresholds
                switch.use(self._meter.plan({layer: own[layer]} if layer in own else {}))
                return self._stack.forward(layer, entry, hidden)

            self._pass(f"Measuring {what}, layer by layer", [run for own in runs.values() for run in own], through)
        for index, own in runs.items():
            last = [self._last(run).clone() for run in own]
            dense = (self._units.load(f"sample-{index:05d}") or {})["hidden"]
            self._units.save(
                f"{kind}-{index:05d}", {"kl": self._meter.mean_kl(torch.from_numpy(dense).to(last[0]), last)}
            )
            for run in own:
                self._hidden.drop(run.name)

    def _pass(self, what: str, runs: Sequence[_Run], through: Through) -> None:
        """Every run through the blocks that it has not gone through yet; what each finished is on disk before the next."""
        at = {run: max(run.start, self._hidden.layer(run.name) or 0) for run in runs}
        with self._progress(what, sum(self._stack.depth - run.start for run in runs)) as advance:
            advance(sum(at[run] - run.start for run in runs))
            for layer in range(self._stack.depth):
                due = [run for run in runs if at[run] == layer]
                if not due:
                    continue
                with self._stack.resident(layer):
                    for run in due:
                        self._step(layer, run, through)
                        at[run] = layer + 1
                        advance(1)

    def _step(self, layer: int, run: _Run, through: Through) -> None:
        entry = self._entry(run.index)
        hidden = self._hidden.load(run.name, entry.hidden.device) if layer else entry.hidden
        try:
            if hidden is None:
                raise ModelError(f"its hidden states before layer {layer} are gone; go on with --resume")
            output = through(layer, run, entry, hidden)
        except ModelError as error:
            raise ModelError(f"sample {run.index}: {error}") from error
        self._hidden.save(run.name, layer + 1, output)

    def _last(self, run: _Run) -> torch.Tensor:
        """The decoder's last hidden states at the compared positions, ``(positions, hidden)``, after :meth:`_pass`."""
        hidden = self._hidden.load(run.name, self._entry(run.index).hidden.device)
        if hidden is None:
            raise ModelError(f"sample {run.index}: its last hidden states are gone; go on with --resume")
        return self._stack.leave(self._tokens(run.index), hidden)[sampled_positions(self._settings.gain_every)]

    def _make_room(self, states: Mapping[int, int]) -> None:
        """Open the folder, with room for a number of hidden states of each sample, and one more while it is replaced."""
        first = next(iter(states))
        by_token = self._entry(first).hidden.nbytes / len(self._samples[first].tokens)
        sizes = {index: by_token * len(self._samples[index].tokens) for index in states}
        self._hidden.open(int(sum(sizes[index] * count for index, count in states.items()) + max(sizes.values())))

    def _enter(self, index: int) -> Entry:
        return self._stack.enter(self._tokens(index))

    def _tokens(self, index: int) -> torch.Tensor:
        return torch.tensor(self._samples[index].tokens, device=input_device(self._model))


def _start(index: int, layer: int) -> str:
    """The state of a gain sample's variant that is sparse in ``layer``."""
    return f"gain-{index:05d}-{layer:04d}"


def _swept(index: int, layer: int) -> str:
    return f"layer-{index:05d}-{layer:04d}"
