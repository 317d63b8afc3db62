"""``xcalib demo``: the whole job on the real SmolLM2-135M, ending with the profile against the best single tau."""

import time
from pathlib import Path
from typing import Any

from rich.table import Table

from xcalib._lock import remove_folder
from xcalib.cli import options as opt
from xcalib.cli.environment import environment
from xcalib.cli.output import console, evaluation_table, interval_labels, progress, status
from xcalib.cli.show import render_profile
from xcalib.collect import CollectSettings, Curves, collect
from xcalib.collect.units import Units
from xcalib.data import Sample
from xcalib.errors import XcalibError
from xcalib.evaluation import PUBLISHED, Evaluation, evaluate_plans, plans_to_evaluate, uniform_at
from xcalib.models.loading import LoadedModel
from xcalib.profile import Profile, save_profile
from xcalib.search import DEFAULT_TARGETS, build_profile, judge
from xcalib.search.evidence import with_evidence

__all__ = ["run_demo"]

# Sized for two CPU cores: under five minutes in all.
DEMO_SETTINGS = CollectSettings(stride=16, block_size=64, gain_samples=1, gain_every=5)
DEMO_SPECS = ["builtin@2", "ruler@1"]  # windows of each category of the corpus, and some tasks
DEMO_SAMPLES = 10
DEMO_HELDOUT = 6
DEMO_LENGTH = 1280
DEMO_EVERY = 3  # held-out KL is taken at every third position
POINT = "balanced"
# Single taus of the published rule, whose densities enclose the balanced one on this model, to interpolate between.
SINGLE_TAUS = (0.69, 0.8)


def run_demo(out: Path, *, seed: int = 0, resume: bool = False) -> dict[str, Any]:
    """Calibrate, search, evaluate on held-out documents, print the comparison, and write the profile to ``out``.

    Returns:
        What ``--json`` prints: command, machine, comparison, predictions and the evaluation.
    """
    began = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f"seed-{seed}"
    if not resume and (work / "curves" / "collect.json").is_file():
        remove_folder(work)  # an earlier demo's: this one starts anew
    loaded = opt.open_model("demo", None, "auto", False)
    lengths: dict[str, Any] = {"max_length": DEMO_LENGTH, "min_length": None, "seed": seed}
    samples = opt.read_samples(DEMO_SPECS, loaded, num_samples=DEMO_SAMPLES, split="calibration", **lengths)
    heldout = opt.read_samples(
        DEMO_SPECS, loaded, num_samples=DEMO_HELDOUT, split="heldout", exclude=tuple(samples.documents), **lengths
    )
    curves = collect(
        loaded.model, samples, work / "curves", settings=DEMO_SETTINGS, name="demo", resume=resume, progress=progress
    )
    profile = build_profile(curves, DEFAULT_TARGETS)
    plans = plans_to_evaluate(loaded.model, profile, published=SINGLE_TAUS)
    identity = {
        "plans": {k: v.record() for k, v in plans.items()},
        "data": heldout.tokens_sha256,
        "every": DEMO_EVERY,
    }
    units = Units(work / "heldout", identity, resume=resume)
    found = evaluate_plans(
        loaded.model, heldout, plans, tokenizer=loaded.tokenizer, every=DEMO_EVERY, units=units, progress=progress
    )
    profile = with_evidence(profile, found)
    save_profile(profile, out)
    comparison = compare(profile, found) | {"seed": seed, "seconds": time.monotonic() - began}
    _report(profile, found, comparison, out)
    _write_page(loaded, profile, curves, found, heldout.samples[0], out.with_name("report.html"))
    command = f"xcalib demo --seed {seed} --json"
    return {
        "command": command,
        "environment": environment(),
        "comparison": comparison,
        "profile": {point.name: point.predicted.model_dump() for point in profile.points if point.predicted},
        "evaluation": found.to_dict(),
    }


def _write_page(
    loaded: LoadedModel, profile: Profile, curves: Curves, found: Evaluation, sample: Sample, out: Path
) -> None:
    """The report beside the profile, with attention of one held-out sample; one line says where it is, or how to get it."""
    from xcalib import report

    try:
        report.require_libraries()
        with status("Drawing the report"):
            evaluated = report.Evaluated("xcalib demo", found, report.published(profile.method))
            pictures = report.attention_pictures(loaded.model, profile, sample)
            inputs = report.Inputs(profile, report.check_curves(profile, (curves,)), (evaluated,))
            report.write_page(report.summarise(inputs, pictures), out)
    except XcalibError as error:
        console.print(f"no report: {error}", markup=False, soft_wrap=True)
    else:
        console.print(f"wrote {out}: open it in a browser", markup=False, soft_wrap=True)


def compare(profile: Profile, found: Evaluation) -> dict[str, Any]:
    """The balanced point against the single tau of the same held-out density, and prediction against measurement."""
    predicted, measured = profile.point(POINT).predicted, found.plan(POINT)
    assert predicted is not None  # the search predicts every point
    uniform = uniform_at(found, measured.density, PUBLISHED)
    return {
        "density": measured.density,
        "kl": measured.kl,
        "kl_interval": measured.kl_interval,
        "kl_uniform": uniform.kl,
        "tau_uniform": uniform.tau,
        "ratio": measured.kl / uniform.kl,
        "predicted_kl": predicted.kl,
        "prediction_error": predicted.kl / measured.kl - 1,
    }


def _report(profile: Profile, found: Evaluation, comparison: dict[str, Any], out: Path) -> None:
    render_profile(profile, console)
    console.print(evaluation_table(found, "SmolLM2-135M, held-out documents: dense, the profile's points, single taus"))
    table = Table(title="At the same held-out density", title_justify="left")
    for column in ("attention", "density", "KL mean", "against single tau"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    density = f"{comparison['density']:.1%}"
    table.add_row("dense", "100.0%", "0", "")
    table.add_row(
        f"best single tau ({comparison['tau_uniform']:.3f}, interpolated)",
        density,
        f"{comparison['kl_uniform']:.4f}",
        "1.00",
    )
    table.add_row(f"profile, {POINT}", density, f"{comparison['kl']:.4f}", f"{comparison['ratio']:.2f}")
    for label, end in zip(interval_labels(found.confidence), comparison["kl_interval"] or (), strict=False):
        table.add_row(label, "", f"{end:.4f}", "")
    console.print(table)
    for point in profile.points:
        console.print(judge(point).text, markup=False, soft_wrap=True)
    console.print(
        f"predicted KL {comparison['predicted_kl']:.4f}, measured {comparison['kl']:.4f} "
        f"({comparison['prediction_error']:+.1%}); {comparison['seconds']:.0f} s in all"
    )
    console.print(f"wrote {out}; see it again with: xcalib show {out}", markup=False, soft_wrap=True)
