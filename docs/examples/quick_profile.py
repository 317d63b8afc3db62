"""A small profile, so that the other examples have one: the whole calibration in about a minute on a CPU.

    python docs/examples/quick_profile.py --out demo-profile.yaml

It measures three samples, so its thresholds are good enough to look at and not to serve with: for that, calibrate on your own
data (calibrate_your_data.py), or run `xcalib search`, which takes more samples and goes further.
"""

import argparse
from pathlib import Path

import xcalib
from xcalib.collect import CollectSettings, Curves, collect, load_curves
from xcalib.data import load_samples
from xcalib.models.loading import LoadedModel
from xcalib.profile import Profile
from xcalib.search import add_evidence, build_profile, parse_targets

TARGETS = ["fidelity:density=0.6", "balanced:density=0.45"]
SPECS = ["builtin@2", "ruler"]  # shipped text, and tasks that ask for something far back


def profile_for(given: Path | None, loaded: LoadedModel, work: Path) -> Profile:
    """The profile that was given, the shipped one of the demo's model, or a small one that is made now."""
    if given is not None:
        return xcalib.load_profile(given)
    return xcalib.load_profile("smollm2-135m") if loaded.name == "demo" else quick_profile(loaded, work)


def quick_curves(loaded: LoadedModel, folder: Path, *, num_samples: int, max_length: int) -> Curves:
    """Density and error of every head at every threshold; measured once, then read from ``folder``."""
    if (folder / "curves.json").exists():
        return load_curves(folder)
    samples = load_samples(SPECS, loaded.tokenizer, num_samples=num_samples, max_length=max_length)
    print(f"measuring {num_samples} samples of {max_length} tokens into {folder} ...")
    settings = CollectSettings(block_size=64, gain_samples=1)  # blocks of 64 tokens: the samples are short
    return collect(loaded.model, samples, folder, settings=settings, name=loaded.name, resume=folder.exists())


def quick_profile(loaded: LoadedModel, work: Path, *, num_samples: int = 3, max_length: int = 1024) -> Profile:
    """Curves, thresholds, and the evidence on held-out text."""
    curves = quick_curves(loaded, work / "curves", num_samples=num_samples, max_length=max_length)
    used = curves.calibration["documents"]  # never to be measured on again
    heldout = load_samples(
        SPECS, loaded.tokenizer, num_samples=num_samples, max_length=max_length, split="heldout", exclude=used
    )
    print("measuring the thresholds found on held-out text ...")
    return add_evidence(
        loaded.model, build_profile(curves, parse_targets(TARGETS)), heldout, tokenizer=loaded.tokenizer
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a Hugging Face id, a folder, a .gguf file, or demo")
    parser.add_argument("--work", type=Path, default=Path("xcalib-out/examples"), help="where the curves are kept")
    parser.add_argument("--num-samples", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("demo-profile.yaml"))
    options = parser.parse_args()
    loaded = xcalib.load_model(options.model)
    profile = quick_profile(loaded, options.work, num_samples=options.num_samples, max_length=options.max_length)
    xcalib.save_profile(profile, options.out)
    print(f"wrote {options.out}; look at it with: xcalib show {options.out}")


if __name__ == "__main__":
    main()
