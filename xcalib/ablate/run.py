"""All tables of one call: they share the dense passes, and every setting that two of them have in common."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xcalib.ablate.breakdown import TimingSettings, measure_breakdown
from xcalib.ablate.limits import candidates, limits_around
from xcalib.ablate.measure import Measurement, Meter, measure_settings, probe_densities
from xcalib.ablate.record import Context, make_record
from xcalib.ablate.searched import solve
from xcalib.ablate.settings import AblateSettings
from xcalib.ablate.tables import Line, make_table
from xcalib.ablate.variants import MEASURED, Scoring, Setting, Variant, check_tables, variants_of
from xcalib.collect import CollectSettings, Curves, collect
from xcalib.collect.units import Units
from xcalib.data import SampleSet
from xcalib.errors import AblationError, DataError
from xcalib.evaluation import refuse_overlap
from xcalib.kernels.api import Order
from xcalib.models.placement import input_device
from xcalib.models.structure import describe_model
from xcalib.profile import ModelIdentity
from xcalib.progress import Progress, silent

__all__ = ["run_table", "run_tables"]

Record = dict[str, Any]


@dataclass
class _Job:
    """One call of :func:`run_tables`."""

    names: tuple[str, ...]
    model: Any
    tokenizer: Any
    samples: SampleSet
    heldout: SampleSet
    settings: AblateSettings
    folder: Path
    curves: Curves | None
    identity: ModelIdentity
    resume: bool
    progress: Progress
    command: str
    remarks: dict[str, list[str]] = field(default_factory=dict)

    @property
    def searched_order(self) -> Order:
        """Order of preference in the table ``threshold``: that of its curves, a collection's default where they are to come."""
        return CollectSettings.order if self.curves is None else self.curves.settings.order


def run_table(
    name: str,
    model: Any,
    tokenizer: Any,
    samples: SampleSet,
    heldout: SampleSet,
    settings: AblateSettings | None = None,
    **options: Any,
) -> Record:
    """One table: :func:`run_tables` with one name."""
    ((_, result),) = run_tables((name,), model, tokenizer, samples, heldout, settings, **options)
    return result


def run_tables(
    names: Sequence[str],
    model: Any,
    tokenizer: Any,
    samples: SampleSet,
    heldout: SampleSet,
    settings: AblateSettings | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    curves: Curves | None = None,
    name: str | None = None,
    command: str = "",
    resume: bool = False,
    progress: Progress = silent,
) -> Iterator[tuple[str, Record]]:
    """Measure tables of the paper on a model; yields each name with its results as they are done.

    Args:
        names: of ``pattern``, ``stride``, ``selection``, ``threshold``, ``breakdown``.
        model: a transformers causal language model, in evaluation mode.
        tokenizer: to score samples that ask something; None leaves accuracy out.
        samples: calibration: they set the limits, and the thresholds of the table ``threshold``.
        heldout: what is measured; no document of it may be among the calibration's.
        settings: default :class:`AblateSettings`.
        folder: where finished work is kept; default a temporary folder.
        curves: a collection of this model for the table ``threshold``, of the same method; default: one is made of ``samples``.
        name: what the user calls the model.
        command: kept with the results.
        resume: go on with what ``folder`` holds.
        progress: draws the work.

    Raises:
        AblationError: a name is unknown, or a setting cannot be used.
        DataError: samples share documents, or one is too short.
        ModelError: the model cannot be measured.
    """
    names = tuple(dict.fromkeys(names))
    check_tables(names)
    settings = settings or AblateSettings()
    _check_data(samples, heldout, settings)
    identity = describe_model(model, name)
    if curves is not None:
        _check_curves(curves, identity, heldout, settings)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(folder if folder is not None else temporary)
        job = _Job(
            names, model, tokenizer, samples, heldout, settings, root, curves, identity, resume, progress, command
        )
        units = Units(root / "measured", _identity(job), resume=resume)
        yield from _measured_tables(job, units)
        if "breakdown" in names:
            began = time.monotonic()
            result = measure_breakdown(model, heldout, _timing(job), units, progress)
            yield "breakdown", make_record(_context(job, "breakdown"), result, began)


def _check_data(samples: SampleSet, heldout: SampleSet, settings: AblateSettings) -> None:
    refuse_overlap(samples.documents, heldout)
    shortest = min(len(sample.tokens) for sample in (*samples.samples, *heldout.samples))
    least = max(4 * settings.block_size, settings.every)
    if shortest < least:
        raise DataError(
            f"a sample has {shortest} tokens, fewer than {least}: four blocks are needed, or nearly all are always kept"
        )


def _check_curves(curves: Curves, identity: ModelIdentity, heldout: SampleSet, settings: AblateSettings) -> None:
    if curves.model.get("config_sha256") != identity.config_sha256:
        raise AblationError(f"the curves are of {curves.model.get('name')!r}, not of {identity.name!r}")
    found = (curves.settings.block_size, curves.settings.stride, curves.settings.pattern)
    wanted = (settings.block_size, settings.stride, "antidiagonal")
    if found != wanted:
        raise AblationError(f"the curves have (block size, stride, pattern) {found}, this comparison has {wanted}")
    refuse_overlap(curves.calibration["documents"], heldout)


def _identity(job: _Job) -> Record:
    parameter = next(job.model.parameters())
    return {
        "tables": list(job.names),
        "settings": dataclasses.asdict(job.settings),
        "model": job.identity.model_dump(exclude={"name"}),
        "calibration data": job.samples.tokens_sha256,
        "held-out data": job.heldout.tokens_sha256,
        "curves": None if job.curves is None else job.curves.calibration["tokens_sha256"],
        "searched order": job.searched_order,
        "dtype": str(parameter.dtype),
        "device": input_device(job.model).type,
    }


def _timing(job: _Job) -> TimingSettings:
    settings = job.settings
    longest = max(len(sample.tokens) for sample in job.heldout.samples)
    lengths = settings.lengths or tuple(
        n for n in (longest // 4, longest // 2, longest) if n >= 4 * settings.block_size
    )
    return TimingSettings(tuple(sorted(lengths)), (8, 16), settings.block_size, settings.tau, settings.limit_seconds)


def _measured_tables(job: _Job, units: Units) -> Iterator[tuple[str, Record]]:
    wanted = [table for table in job.names if table in MEASURED]
    if not wanted:
        return
    began = time.monotonic()
    variants = {table: variants_of(table, job.settings.stride, job.searched_order) for table in wanted}
    limits = _limits(job, {v.scoring for lines in variants.values() for v in lines}, units)
    if not any(limits.values()):
        raise AblationError(
            f"no variant comes down to density {max(job.settings.densities):g}: what is always kept is more; choose longer "
            "samples, smaller blocks or higher densities"
        )
    lines = {table: [_line(job, table, variant, limits) for variant in found] for table, found in variants.items()}
    settings = {s.key: s for found in lines.values() for line in found for s in (*line.settings, line.fixed) if s}
    measurement = _measure(job, settings, units)
    for table in wanted:
        result = make_table(table, lines[table], measurement, job.settings.densities)
        result["remarks"] += [*job.remarks.get(table, []), *_order_remark(table, job.searched_order)]
        yield table, make_record(_context(job, table), result, began)


PAPERS_CURVES = "xcalib collect --pattern antidiagonal --order score --stride 8 --block-size 64"


def _order_remark(table: str, searched: Order) -> list[str]:
    if table != "threshold" or searched == "score":
        return []
    return [
        f"all three lines prefer blocks in the order {searched!r}, which is ours (docs/kernels.md): the paper's is 'score', and "
        f"curves of '{PAPERS_CURVES}' compare in that"
    ]


def _limits(job: _Job, scorings: set[Scoring], units: Units) -> dict[Scoring, list[float]]:
    """For every scoring, limits on both sides of every compared density."""
    ordered = sorted(scorings, key=lambda scoring: scoring.key)
    chosen = dataclasses.replace(job.samples, samples=job.samples.samples[: job.settings.planning_samples])
    k_blocks = -(-max(len(sample.tokens) for sample in job.heldout.samples) // job.settings.block_size)
    tried = {scoring: candidates(scoring.policy, k_blocks) for scoring in ordered}
    options: Record = {"block_size": job.settings.block_size, "seed": job.settings.seed, "units": units}
    densities = probe_densities(job.model, chosen, tried, progress=job.progress, **options)
    return {
        scoring: sorted(
            {
                limit
                for wanted in job.settings.densities
                for limit in limits_around(scoring, tried[scoring], densities[scoring], wanted)
            }
        )
        for scoring in ordered
    }


def _line(job: _Job, table: str, variant: Variant, limits: dict[Scoring, list[float]]) -> Line:
    shape = (job.identity.layers, job.identity.query_heads)
    if variant.thresholds == "one":
        found = [np.full(shape, limit, dtype=np.float32) for limit in limits[variant.scoring]]
        fixed = None
        if variant.scoring.policy == "threshold":
            fixed = Setting(variant.scoring, np.full(shape, job.settings.tau, dtype=np.float32))
        settings = tuple(Setting(variant.scoring, table) for table in found)
        return Line(variant, settings, fixed)
    solved = solve(
        _curves(job), job.settings.densities, "paper" if variant.thresholds == "paper" else "knapsack", variant.name
    )
    job.remarks.setdefault(table, []).extend(solved.remarks)
    return Line(variant, tuple(Setting(variant.scoring, thresholds) for thresholds in solved.thresholds))


def _curves(job: _Job) -> Curves:
    if job.curves is None:
        settings = CollectSettings(
            stride=job.settings.stride,
            block_size=job.settings.block_size,
            pattern="antidiagonal",
            order=job.searched_order,
            gain_samples=job.settings.gain_samples,
        )
        job.curves = collect(
            job.model,
            job.samples,
            job.folder / "curves",
            settings=settings,
            name=job.identity.name,
            resume=job.resume,
            progress=job.progress,
        )
    return job.curves


def _measure(job: _Job, settings: dict[str, Setting], units: Units) -> Measurement:
    options: Record = {"block_size": job.settings.block_size, "every": job.settings.every, "seed": job.settings.seed}
    meter = Meter(job.model, job.tokenizer, units=units, **options)
    return measure_settings(meter, job.heldout, settings, job.progress)


def _context(job: _Job, table: str) -> Context:
    curves = job.curves.calibration if job.curves is not None and table == "threshold" else None
    return Context(table, job.command, job.model, job.identity, job.settings, job.samples, job.heldout, curves)
