"""Calibrate on your own data: a folder of text, and questions with answers, to a profile with evidence.

    python docs/examples/calibrate_your_data.py
    python docs/examples/calibrate_your_data.py --model Qwen/Qwen3-0.6B --text 'notes/**/*.md' --questions mine.jsonl

Without arguments the text is this project's own documentation, and the questions are made up here: records with a question
whose answer stands far back. It shows the four steps of `xcalib search` apart: read samples, measure, search, prove. What
comes out is a file for `xcalib show`, `xcalib evaluate` and `xcalib.apply_profile`. The same by one command:

    xcalib search demo --data 'text:docs/*.md' --data jsonl:questions.jsonl --target density=0.5 --max-length 1024 \\
        --block-size 64 --num-samples 4 --heldout-samples 4 --gain-samples 1 --rounds 0 \\
        --force --out mine.yaml
"""

import argparse
import json
import random
from pathlib import Path

import xcalib
from xcalib.collect import CollectSettings
from xcalib.data import SampleSet, load_samples
from xcalib.profile import Profile

DOCUMENTATION = Path(__file__).resolve().parent.parent
TOWNS = ["Bern", "Cork", "Dover", "Genoa", "Lyon", "Malmo", "Porto", "Riga", "Sofia", "Turin", "Vigo", "York"]


def write_questions(path: Path, rows: int = 24, records: int = 8) -> None:
    """Rows as `jsonl:` reads them: a whole prompt and what its answer must hold."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            numbers = {town: rng.randrange(10_000, 99_999) for town in rng.sample(TOWNS, records)}
            lines = [
                f"The office in {town} was visited in May and found in good order; its staff had nothing to report. "
                f"The number of the office in {town} is {number}."
                for town, number in numbers.items()
            ]
            town = rng.choice(list(numbers)[: records // 2])
            question = (
                f"Question: What is the number of the office in {town}?\nAnswer: The number of the office in {town} is"
            )
            row = {"text": "\n".join(lines) + f"\n\n{question}", "answers": [str(numbers[town])]}
            file.write(json.dumps(row) + "\n")


def describe(name: str, samples: SampleSet) -> None:
    """What was read, and what was left out and why."""
    asking = sum(bool(sample.answers) for sample in samples.samples)
    sizes = sorted(len(sample.tokens) for sample in samples.samples)
    print(f"{name}: {len(sizes)} samples of {sizes[0]} to {sizes[-1]} tokens, {asking} with a question", end="; ")
    print(f"from {len(samples.documents)} documents; dropped: {dict(samples.dropped) or 'nothing'}")


def show_evidence(profile: Profile, heldout: SampleSet) -> None:
    """What the search expected, and what held-out samples say."""
    asking = sum(bool(sample.answers) for sample in heldout.samples)
    questions = f"of {asking} question{'' if asking == 1 else 's'}"
    print(
        f"\n{'point':<10} {'target':<16} {'density':>8} {'expected KL':>12} {'measured':>12} {'95% interval':>18} answers right"
    )
    for point in profile.points:
        expected, found = point.predicted, point.heldout
        if expected is None or found is None:
            continue
        kind, _, amount = point.target.partition("=")  # the file has six digits
        target = f"{kind} {float(amount):.3g}"
        low, high = found.intervals.kl if found.intervals else (float("nan"), float("nan"))
        answers = (
            "no questions"
            if found.accuracy is None
            else f"{found.accuracy:.0%} {questions}, dense {found.accuracy_dense:.0%}"
        )
        print(
            f"{point.name:<10} {target:<16} {found.density:>8.1%} {expected.kl:>12.4f} {found.kl:>12.4f} "
            f"{low:>8.4f} - {high:.4f} {answers}{'' if point.verified else ' (not verified)'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a Hugging Face id, a folder, a .gguf file, or demo")
    parser.add_argument(
        "--text", default=str(DOCUMENTATION / "*.md"), help="a file, a folder or a glob; one file is one document"
    )
    parser.add_argument("--questions", type=Path, help="JSON lines with text and answers; default: made up")
    parser.add_argument("--target", default="density=0.5", help="or kl=0.05, drop=1%%")
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument(
        "--work", type=Path, default=Path("xcalib-out/own-data"), help="curves, and an interrupted run's progress"
    )
    parser.add_argument("--out", type=Path, default=Path("mine.yaml"))
    options = parser.parse_args()

    questions = options.questions or Path("questions.jsonl")
    if options.questions is None:
        write_questions(questions)
    loaded = xcalib.load_model(options.model)

    # 1. Samples. Calibration and held-out samples never share a document: each file, and each row, is on one side.
    specs = [f"text:{options.text}", f"jsonl:{questions}"]
    amount = {"num_samples": options.num_samples, "max_length": options.max_length}
    samples = load_samples(specs, loaded.tokenizer, **amount, split="calibration")
    heldout = load_samples(specs, loaded.tokenizer, **amount, split="heldout", exclude=samples.documents)
    describe("calibration", samples)
    describe("held out", heldout)

    # 2. to 4. Measure every head at every threshold, search, and measure the result on the held-out samples. The folder keeps
    # what is finished: the same call with resume=True goes on after an interruption. rounds=0 leaves out, for time, the steps
    # that measure with all layers sparse and search again.
    print("measuring, searching, proving ...")
    profile = xcalib.search(
        loaded.model, samples, target=options.target, heldout=heldout, tokenizer=loaded.tokenizer, name=loaded.name,
        settings=CollectSettings(block_size=64, gain_samples=1), rounds=0, folder=options.work, resume=options.work.exists(),
        force=True,  # keep a point that misses its target on so few samples; it is marked as not verified
    )  # fmt: skip
    show_evidence(profile, heldout)
    xcalib.save_profile(profile, options.out)
    print(f"\nwrote {options.out}; look at it with: xcalib show {options.out}")


if __name__ == "__main__":
    main()
