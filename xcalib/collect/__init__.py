"""From a model and samples to curves: what every threshold costs and does to every head.

One dense pass per sample carries the sweep of all thresholds; then the gain of each layer is measured on a few samples.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xcalib.collect.budget import chunks_within, collect_phases
from xcalib.collect.chunks import HeadChunks
from xcalib.collect.curves import DEFAULT_GRID, CollectSettings, Curves, Measure, save_curves
from xcalib.collect.hidden import HiddenStates
from xcalib.collect.job import Job
from xcalib.collect.lengths import labelled, load_curve_sets, measured_length, open_index, write_index
from xcalib.collect.offload import LayerPasses
from xcalib.collect.ranks import ALONE, Ranks
from xcalib.collect.reading import load_curves
from xcalib.collect.shared_units import SharedUnits
from xcalib.collect.shares import Shares, open_units
from xcalib.collect.skipping import Skipping, UnitStore, refuse_skipping
from xcalib.collect.units import Units
from xcalib.data import SampleSet, check_sets
from xcalib.errors import ModelError
from xcalib.models.shards import HeadShards, head_shards
from xcalib.models.structure import describe_model
from xcalib.progress import Progress, silent

CURVE_FILES = ("curves.json", "curves.safetensors")

__all__ = [
    "DEFAULT_GRID",
    "CollectSettings",
    "Curves",
    "Measure",
    "collect",
    "collect_lengths",
    "load_curve_sets",
    "load_curves",
    "measured_length",
    "refuse_with_offload",
    "save_curves",
]


def collect(
    model: Any,
    samples: SampleSet,
    folder: str | os.PathLike[str],
    *,
    settings: CollectSettings | None = None,
    name: str | None = None,
    resume: bool = False,
    offload: bool = False,
    max_memory: int | None = None,
    skip_bad: bool = False,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> Curves:
    """Measure a model's curves and layer gains, and save them.

    Each finished sample is on disk before the next begins; interrupt at any time and call again with ``resume=True``: the
    curves are the same, bit for bit, and finished samples are not repeated.

    Args:
        model: a transformers causal language model, in evaluation mode.
        samples: calibration data.
        folder: new or empty, or of the collection to resume; receives ``curves.safetensors`` and ``curves.json``.
        settings: what is measured; default :class:`CollectSettings`.
        name: what the user calls the model.
        resume: go on with what ``folder`` holds, with any number of ranks.
        offload: take all samples through one layer at a time (docs/large-models.md); the curves are the same.
        max_memory: bytes that the peak is predicted to stay within (docs/memory.md): heads are measured fewer at a time, with the
            same figures. On a CPU of this process, on a GPU of its tensors; None for no limit.
        skip_bad: leave out samples that give numbers that are not finite, up to half of them, in place of an error; one rank.
        progress: draws the work.
        ranks: processes that share the samples (docs/many-gpus.md); each has its own copy of the model and the same samples, and
            gets the curves. Rank 0 writes them.

    Raises:
        BusyError: another process is at work in the folder.
        CurvesError: the folder cannot be used, or the disk is full.
        MemoryLimitError: no part of the work is small enough.
        ModelError: the model cannot be measured, or not with ``offload`` and another of the options.
        NonFiniteError: activations are not finite, without ``skip_bad`` or in more than half of the samples.
        RankError: another rank failed, or there are several and ``skip_bad`` is set.
    """
    settings = settings or CollectSettings()
    chunks = _chunks(model, (samples,), settings, max_memory, skip_bad, offload, ranks)
    return _collect(
        model, samples, folder, chunks, settings=settings, name=name, resume=resume, skip_bad=skip_bad, offload=offload,
        progress=progress, ranks=ranks,
    )  # fmt: skip


def _chunks(
    model: Any,
    sets: Sequence[SampleSet],
    settings: CollectSettings,
    max_memory: int | None,
    skip_bad: bool,
    offload: bool,
    ranks: Ranks,
) -> HeadChunks:
    """Heads at a time for all of the sets, found once: what a process holds grows with the first of them."""
    refuse_skipping(skip_bad, ranks)
    if offload:
        refuse_with_offload(max_memory, skip_bad)
        return HeadChunks()
    with ranks.together():  # hosts may have more memory or less
        return chunks_within(model, sets, settings, collect_phases(settings), max_memory, ranks)


def _collect(
    model: Any,
    samples: SampleSet,
    folder: str | os.PathLike[str],
    chunks: HeadChunks,
    *,
    settings: CollectSettings,
    name: str | None,
    resume: bool,
    skip_bad: bool,
    offload: bool,
    progress: Progress,
    ranks: Ranks,
) -> Curves:
    identity = describe_model(model, name)
    shards = _shards(model, offload, skip_bad, ranks)
    asked = _identity(identity.model_dump(), model, samples, settings)
    opened = SharedUnits(folder, asked, shards, resume=resume) if shards.size > 1 else None
    with opened or open_units(folder, asked, resume=resume, ranks=ranks) as units:
        found = _finished(units, ranks) if resume else None
        if found is not None:
            units.discard()  # killed before it could
            return found
        skipping = Skipping(samples, units, allowed=skip_bad, ranks=ranks, offered=not offload)

        def measure(kept: SampleSet, store: UnitStore | None) -> Curves:
            job = Job(model, identity.query_heads, kept, settings, Shares(store or units, progress, ranks), chunks)
            if offload:
                passes = LayerPasses(model, identity.query_heads, kept, settings, units, progress)
                curves = _layer_by_layer(job, passes)
            else:
                curves = job.measure_joint(job.measure_gains(job.measure_samples()))
            curves = job.measure_others(curves)
            return dataclasses.replace(curves, calibration=_calibration(kept, settings, len(samples.samples)))

        curves = skipping.run(measure)
        curves = dataclasses.replace(curves, model=identity.model_dump(), skipped=tuple(sorted(skipping.reasons)))
        with ranks.together():
            if ranks.leader and shards.rank == 0:
                save_curves(curves, units.folder)
                HiddenStates(units.folder / "hidden").discard()
        units.discard()
    return curves


def refuse_with_offload(max_memory: int | None, skip_bad: bool) -> None:
    """Refuse what a collection layer by layer does not do; ModelError names it."""
    given = "--max-memory (max_memory)" if max_memory is not None else "--skip-bad (skip_bad)" if skip_bad else ""
    if given:
        raise ModelError(
            f"{given} goes without offload: it holds one layer and takes all samples through it; leave it out"
        )


def _shards(model: Any, offload: bool, skip_bad: bool, ranks: Ranks) -> HeadShards:
    """How the model's heads lie on ranks; ModelError for what does not go together."""
    shards = head_shards(model)
    if offload and shards.size > 1:
        raise ModelError("offload takes a whole model: this one's heads are on several ranks")
    if skip_bad and shards.size > 1:
        raise ModelError("skip_bad goes with one process: ranks that share a model have to measure the same samples")
    if ranks.size > 1 and (offload or shards.size > 1):
        what = "offload takes all samples through a layer" if offload else "ranks that share a model have all samples"
        raise ModelError(f"{what}, so samples cannot be shared among {ranks.size} ranks; use one of the two")
    return shards


def _finished(units: Units | SharedUnits, ranks: Ranks) -> Curves | None:
    """The curves of a collection that was done before, the same on every rank; None where there are none."""
    if isinstance(units, SharedUnits):
        files = {name: units.read(name) for name in CURVE_FILES}
        return None if None in files.values() else _load_copies(files)
    done = np.array((units.folder / "curves.json").is_file())
    return _load_on_all(units.folder, ranks) if ranks.same(done) else None


def _load_copies(files: Mapping[str, Any]) -> Curves:
    with tempfile.TemporaryDirectory() as copy:
        for name, data in files.items():
            (Path(copy) / name).write_bytes(bytes(data))
        return load_curves(copy)


def _load_on_all(folder: Path, ranks: Ranks) -> Curves:
    """Finished curves, of which the hosts of other ranks may have no copy."""
    curves, files = None, None
    with ranks.together():
        if ranks.leader:
            curves = load_curves(folder)
            files = (
                {name: np.frombuffer((folder / name).read_bytes(), np.uint8) for name in CURVE_FILES}
                if ranks.size > 1
                else {}
            )
    files = ranks.broadcast(files)
    if curves is not None:
        return curves
    return _load_copies(files)


def collect_lengths(
    model: Any,
    sets: Sequence[SampleSet],
    folder: str | os.PathLike[str],
    *,
    settings: CollectSettings | None = None,
    name: str | None = None,
    resume: bool = False,
    offload: bool = False,
    max_memory: int | None = None,
    skip_bad: bool = False,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> tuple[Curves, ...]:
    """Measure a model at several lengths: a collection of its own, as :func:`collect` makes it, for each set of samples.

    Args:
        model: a transformers causal language model, in evaluation mode.
        sets: calibration data, one set a length, in ascending order (:func:`xcalib.data.length_sets`).
        folder: new or empty, or of the collection to resume. Receives a folder named after each length and, when all are
            done, ``lengths.json``; with one set it is that set's own folder.
        settings: what is measured, the same at every length.
        name: what the user calls the model.
        resume: go on with what ``folder`` holds, with any number of ranks.
        offload: take all samples through one layer at a time (docs/large-models.md); the curves are the same.
        max_memory: as in :func:`collect`.
        skip_bad: as in :func:`collect`.
        progress: draws the work.
        ranks: as in :func:`collect`.

    Raises:
        CurvesError: the folder cannot be used, or holds other lengths.
        DataError: as :func:`xcalib.data.check_sets`.
        MemoryLimitError, ModelError, NonFiniteError, RankError: as :func:`collect`.
    """
    settings = settings or CollectSettings()
    chunks = _chunks(model, sets, settings, max_memory, skip_bad, offload, ranks)
    options: dict[str, Any] = {
        "settings": settings,
        "name": name,
        "resume": resume,
        "offload": offload,
        "skip_bad": skip_bad,
        "ranks": ranks,
    }
    if len(sets) == 1:
        return (_collect(model, sets[0], folder, chunks, progress=progress, **options),)
    check_sets(sets)
    lengths = [samples.length for samples in sets]
    root = Path(folder)
    with ranks.together():
        if ranks.leader:
            open_index(root, lengths, resume=resume)
    curves = tuple(
        _collect(model, samples, root / str(length), chunks, progress=labelled(progress, length), **options)
        for samples, length in zip(sets, lengths, strict=True)
    )
    with ranks.together():
        if ranks.leader:
            write_index(root, lengths)
    return curves


def _layer_by_layer(job: Job, passes: LayerPasses) -> Curves:
    """Each pass leaves the units that the job's next step reads."""
    passes.sweep()
    curves = job.measure_samples()
    passes.gains(curves)
    curves = job.measure_gains(curves)
    passes.joint(curves)
    return job.measure_joint(curves)


def _identity(
    model_identity: dict[str, Any], model: Any, samples: SampleSet, settings: CollectSettings
) -> dict[str, Any]:
    parameter = next(model.parameters())
    chosen = dataclasses.asdict(settings)
    if not settings.measures:
        del chosen["measures"]  # what was started before there were any can be resumed
    return {
        "settings": chosen,
        "model": {key: value for key, value in model_identity.items() if key != "name"},
        "data": samples.tokens_sha256,
        "dtype": str(parameter.dtype),
    }


def _calibration(samples: SampleSet, settings: CollectSettings, given: int) -> dict[str, Any]:
    lengths = [len(sample.tokens) for sample in samples.samples]
    skipped = given - len(lengths)
    return {
        "sources": list(samples.specs),
        "samples": len(lengths),
        "min_length": min(lengths),
        "max_length": max(lengths),
        "seed": samples.seed,
        "tokens_sha256": samples.tokens_sha256,
        "documents": sorted(samples.documents),
        "gain_samples": min(settings.gain_samples, len(lengths)),
        "dropped": dict(samples.dropped),
        "lengths": [samples.length],
        **({"skipped": skipped} if skipped else {}),
    }
