"""Compare two profiles of one model: which heads moved, and which profile is better on held-out text, and how surely.

    python docs/examples/compare_profiles.py                        # two ways to search the same curves, a few minutes
    python docs/examples/compare_profiles.py old.yaml new.yaml --data text:notes

Without files it makes two profiles of the same density from the same curves: one by the default objective, which weighs a
head's error by what its layer does to the output, and one by the plain error. Both are measured on the same samples, so the
ratio of their KLs has an interval of its own (bootstrapped over samples, both profiles on the same draw): narrower than the
two intervals suggest, because what makes a sample hard is hard for both. `xcalib diff` shows the first half of this.
"""

import argparse
from pathlib import Path

from quick_profile import quick_curves

import xcalib
from xcalib.data import SampleSet, load_samples
from xcalib.evaluation import Evaluation
from xcalib.evaluation.bootstrap import ratio_interval
from xcalib.interop import compare_profiles
from xcalib.models.loading import LoadedModel
from xcalib.profile import Profile
from xcalib.search import build_profile, parse_targets


def two_profiles(loaded: LoadedModel, work: Path, max_length: int) -> tuple[Profile, Profile]:
    """One density, two objectives."""
    curves = quick_curves(loaded, work / "curves", max_length=max_length)
    targets = parse_targets(["balanced:density=0.45"])
    return build_profile(curves, targets, objective="plain"), build_profile(curves, targets, objective="tempered")


def show_difference(first: Profile, second: Profile, limit: int) -> None:
    """Which thresholds moved, the largest change first."""
    found = compare_profiles(first, second)
    for name, before, after in found.settings:
        if "sha256" not in name:
            print(f"setting {name}: {before} -> {after}")
    for point in found.points:
        moved = point.moved
        up = sum(head.after > head.before for head in moved)
        print(
            f"\n{' : '.join(dict.fromkeys(point.names))}: {len(moved)} of {point.heads} thresholds moved, "
            f"{up} up, {len(moved) - up} down"
        )
        for head in moved[:limit]:
            print(f"  layer {head.layer:>2} head {head.head:>2}: {head.before:.3f} -> {head.after:.3f}")


def show_evidence(profiles: tuple[Profile, Profile], found: tuple[Evaluation, Evaluation], samples: SampleSet) -> None:
    """Density and KL of both with their intervals, and the ratio of the KLs with its own."""
    print(f"\non {len(samples.samples)} held-out samples, KL from dense in nats per token:")
    print(f"{'':<8} {'density':>8} {'KL':>8} {'95% interval':>20}")
    plans = [one.plan(profile.default_point) for one, profile in zip(found, profiles, strict=True)]
    for name, plan in zip(("first", "second"), plans, strict=True):
        low, high = plan.kl_interval or (float("nan"), float("nan"))
        print(f"{name:<8} {plan.density:>8.1%} {plan.kl:>8.4f} {low:>9.4f} to {high:.4f}")
    tokens = [len(sample.tokens) for sample in samples.samples]
    sums = [[kl * count for kl, count in zip(plan.kl_by_sample, tokens, strict=True)] for plan in plans]
    interval = ratio_interval(sums[1], sums[0])
    if interval is None:
        print("one sample has no interval: take more")
        return
    verdict = "not told apart"
    if interval[1] < 1 or interval[0] > 1:
        verdict = f"the {'second' if interval[1] < 1 else 'first'} one is better"
    print(
        f"KL of the second over the first: {plans[1].kl / plans[0].kl:.3f}, 95% interval {interval[0]:.3f} to {interval[1]:.3f}:"
    )
    apart = abs(plans[0].density - plans[1].density)
    print(f"{verdict}, as far as {len(tokens)} samples can say (at densities that differ by {apart:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="*", type=Path, metavar="PROFILE", help="two files; default: two are made")
    parser.add_argument("--model", default="demo", help="a Hugging Face id, a folder, a .gguf file, or demo")
    parser.add_argument("--data", action="append", help="held-out data; default: shipped text")
    parser.add_argument("--num-samples", type=int, default=4, help="held-out samples")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=8, help="thresholds to print")
    parser.add_argument("--work", type=Path, default=Path("xcalib-out/examples"), help="where the curves are kept")
    options = parser.parse_args()
    if len(options.profiles) not in (0, 2):
        parser.error(f"give two profiles or none, got {len(options.profiles)}")

    loaded = xcalib.load_model(options.model)
    if options.profiles:
        first, second = (xcalib.load_profile(path) for path in options.profiles)
        names = (str(options.profiles[0]), str(options.profiles[1]))
    else:
        names = ("plain error", "error weighed by gains (the default objective)")
        first, second = two_profiles(loaded, options.work, options.max_length)
    print(f"first:  {names[0]}, point {first.default_point}\nsecond: {names[1]}, point {second.default_point}")
    show_difference(first, second, options.limit)

    used = sorted({*first.calibration.documents, *second.calibration.documents})  # neither may have seen a sample
    samples = load_samples(
        options.data or ["builtin"], loaded.tokenizer, num_samples=options.num_samples, max_length=options.max_length,
        split="heldout", exclude=used,
    )  # fmt: skip
    found = tuple(
        xcalib.evaluate(loaded.model, samples, profile, point=profile.default_point) for profile in (first, second)
    )
    show_evidence((first, second), (found[0], found[1]), samples)


if __name__ == "__main__":
    main()
