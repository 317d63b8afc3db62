"""From a model and samples to curves: what every threshold costs and does to every head.

One dense pass per sample carries the sweep of all thresholds; then the gain of each layer is measured on a few samples.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from xcalib.collect.curves import DEFAULT_GRID, CollectSettings, Curves, Measure, load_curves, save_curves
from xcalib.collect.hidden import HiddenStates
from xcalib.collect.job import Job
from xcalib.collect.lengths import labelled, load_curve_sets, measured_length, open_index, write_index
from xcalib.collect.offload import LayerPasses
from xcalib.collect.shared_units import open_units
from xcalib.data import SampleSet, check_sets
from xcalib.errors import ModelError
from xcalib.models.shards import head_shards
from xcalib.models.structure import describe_model
from xcalib.progress import Progress, silent

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
    progress: Progress = silent,
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
        resume: go on with what ``folder`` holds.
        offload: take all samples through one layer at a time (docs/large-models.md); the curves are the same.
        progress: draws the work.

    Raises:
        CurvesError: the folder cannot be used.
        ModelError: the model cannot be measured, or its activations are not finite.
    """
    settings = settings or CollectSettings()
    identity = describe_model(model, name)
    identity_of_work = _identity(identity.model_dump(), model, samples, settings)
    shards = head_shards(model)
    units = open_units(folder, identity_of_work, shards, resume=resume)
    if offload and shards.size > 1:
        raise ModelError("offload takes a whole model: this one's heads are on several ranks")
    if resume and (units.folder / "curves.json").is_file():
        return load_curves(units.folder)
    job = Job(model, identity.query_heads, samples, settings, units, progress)
    if offload:
        curves = _layer_by_layer(job, LayerPasses(model, identity.query_heads, samples, settings, units, progress))
    else:
        curves = job.measure_joint(job.measure_gains(job.measure_samples()))
    curves = job.measure_others(curves)
    curves = dataclasses.replace(curves, model=identity.model_dump(), calibration=_calibration(samples, settings))
    if shards.rank == 0:
        save_curves(curves, units.folder)
        HiddenStates(units.folder / "hidden").discard()
    units.discard()
    return curves


def collect_lengths(
    model: Any,
    sets: Sequence[SampleSet],
    folder: str | os.PathLike[str],
    *,
    settings: CollectSettings | None = None,
    name: str | None = None,
    resume: bool = False,
    offload: bool = False,
    progress: Progress = silent,
) -> tuple[Curves, ...]:
    """Measure a model at several lengths: a collection of its own, as :func:`collect` makes it, for each set of samples.

    Args:
        model: a transformers causal language model, in evaluation mode.
        sets: calibration data, one set a length, in ascending order (:func:`xcalib.data.length_sets`).
        folder: new or empty, or of the collection to resume. Receives a folder named after each length and, when all are
            done, ``lengths.json``; with one set it is that set's own folder.
        settings: what is measured, the same at every length.
        name: what the user calls the model.
        resume: go on with what ``folder`` holds.
        offload: take all samples through one layer at a time (docs/large-models.md); the curves are the same.
        progress: draws the work.

    Raises:
        CurvesError: the folder cannot be used, or holds other lengths.
        DataError: as :func:`xcalib.data.check_sets`.
        ModelError: the model cannot be measured, or its activations are not finite.
    """
    options: dict[str, Any] = {"settings": settings, "name": name, "resume": resume, "offload": offload}
    if len(sets) == 1:
        return (collect(model, sets[0], folder, progress=progress, **options),)
    check_sets(sets)
    lengths = [samples.length for samples in sets]
    root = open_index(folder, lengths, resume=resume)
    curves = tuple(
        collect(model, samples, root / str(length), progress=labelled(progress, length), **options)
        for samples, length in zip(sets, lengths, strict=True)
    )
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


def _calibration(samples: SampleSet, settings: CollectSettings) -> dict[str, Any]:
    lengths = [len(sample.tokens) for sample in samples.samples]
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
    }
