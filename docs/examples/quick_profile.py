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
from xcalib.models.structure import describe_model
from xcalib.profile import Profile
from xcalib.search import add_evidence, build_profile, parse_targets

TARGETS = ["fidelity:density=0.6", "balanced:density=0.45"]
SPECS = ["builtin@2", "ruler"]  # shipped text, and tasks that ask for something far back


def profile_for(given: Path | None, loaded: LoadedModel, work: Path) -> Profile:
    """The profile that was given, the shipped one of the demo's model, or a small one that is made now."""
    if given is not None:
        return xcalib.load_profile(given)
    return xcalib.load_profile("smollm2-135m") if loaded.name == "demo" else quick_profile(loaded, work)


def quick_curves(
    loaded: LoadedModel, folder: Path, *, num_samples: int | None = None, max_length: int | None = None
) -> Curves:
    """Density and error of every head at every threshold; measured once, then read from ``folder``.

    None takes what the folder holds, and where it holds nothing 3 samples of 1024 tokens.
    """
    if (folder / "curves.json").exists():
        return existing_curves(loaded, folder, num_samples, max_length)
    num_samples, max_length = num_samples or 3, max_length or 1024
    samples = load_samples(SPECS, loaded.tokenizer, num_samples=num_samples, max_length=max_length)
    print(f"measuring {num_samples} samples of {max_length} tokens into {folder} ...")
    settings = CollectSettings(block_size=64, gain_samples=1)  # blocks of 64 tokens: the samples are short
    return collect(loaded.model, samples, folder, settings=settings, name=loaded.name, resume=folder.exists())


def existing_curves(loaded: LoadedModel, folder: Path, num_samples: int | None, max_length: int | None) -> Curves:
    """The curves in ``folder``, if they are what was asked for."""
    curves = load_curves(folder)
    have = curves.calibration
    print(f"reading {folder}: {have['samples']} samples of {have['max_length']} tokens of {curves.model['name']}")
    differ = [
        asked
        for asked, same in (
            (f"{num_samples} samples", num_samples in (None, have["samples"])),
            (f"{max_length} tokens", max_length in (None, have["max_length"])),
            (loaded.name, describe_model(loaded.model).config_sha256 == curves.model["config_sha256"]),
        )
        if not same
    ]
    if differ:
        raise SystemExit(f"{folder} holds other curves than those asked for ({', '.join(differ)}): give another --work")
    return curves


def quick_profile(
    loaded: LoadedModel, work: Path, *, num_samples: int | None = None, max_length: int | None = None
) -> Profile:
    """Curves, thresholds, and the evidence on held-out text: as many samples, of the same length."""
    curves = quick_curves(loaded, work / "curves", num_samples=num_samples, max_length=max_length)
    used = curves.calibration["documents"]  # never to be measured on again
    heldout = load_samples(
        SPECS, loaded.tokenizer, num_samples=curves.calibration["samples"], max_length=curves.calibration["max_length"],
        split="heldout", exclude=used,
    )  # fmt: skip
    print("measuring the thresholds found on held-out text ...")
    return add_evidence(
        loaded.model, build_profile(curves, parse_targets(TARGETS)), heldout, tokenizer=loaded.tokenizer
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a Hugging Face id, a folder, a .gguf file, or demo")
    parser.add_argument("--work", type=Path, default=Path("xcalib-out/examples"), help="where the curves are kept")
    parser.add_argument("--num-samples", type=int, help="default 3, or as many as the curves in --work have")
    parser.add_argument("--max-length", type=int, help="tokens; default 1024, or those of the curves in --work")
    parser.add_argument("--out", type=Path, default=Path("demo-profile.yaml"))
    options = parser.parse_args()
    loaded = xcalib.load_model(options.model)
    profile = quick_profile(loaded, options.work, num_samples=options.num_samples, max_length=options.max_length)
    xcalib.save_profile(profile, options.out)
    print(f"wrote {options.out}; look at it with: xcalib show {options.out}")


if __name__ == "__main__":
    main()
