"""The H200's rates from what is committed: ``python h200.py fit`` writes its machine, ``python h200.py check`` a table.

Fitted to: of kernels-h200.json the lengths 8k, 32k and 128k; of calibration-8b.json the samples and the joint losses; of
objectives/h200-smollm2-seed1.json the dense prefill. Checked on: 64k and 256k; the gains, the held-out evaluation and the whole
of calibration-8b.json; the dense prefills of the other seeds.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xcalib.plan import Machine, ModelShape, Timing, Work, check_run, cost, fit, load_machine
from xcalib.plan.cost import total
from xcalib.plan.machine import REFERENCE_ONLY

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent
OUT = HERE.parents[2] / "xcalib" / "plan" / "machines" / "h200.json"
FITTED = (8192, 32768, 131072)
SMOLLM2 = ModelShape("SmolLM2-135M", 30, 30, 576, 9, 3, 64, 1536, 49152, 106168320, 134515008, 8192, "float32")

# Assumed, not measured: the memory's bandwidth that passes over large tensors reach, of 4.8 TB/s, and what a link reaches of
# 450 GB/s one way, both the vendor's figures.
BANDWIDTH, LINK = 0.8 * 4.8e12, 0.7 * 450e9
LOGIT_PASSES, SLOPE_PASSES = 7, 9  # reads and writes of fp32, eight bytes together, for each logit and each pair
FP32_FLOPS = 40e12  # of slopes, whose products are fp32 outside tensor cores


def record_of(name: str) -> dict[str, Any]:
    return json.loads((BENCHMARKS / name).read_text())


def kernels() -> Iterator[tuple[int, Timing]]:
    """Length and timing of every measurement of the kernels that a calibration runs."""
    record = record_of("kernels-h200.json")
    heads, head_dim, block_size = record["suite"]["q_heads"], record["suite"]["head_dim"], record["suite"]["block_size"]
    for one in record["measurements"]:
        length, kind = one["length"], one["kind"]
        if one.get("status") != "ok" or length < FITTED[0]:
            continue
        shape, rule = (heads, head_dim, length), {"stride": one.get("stride") or 16, "block_size": block_size}
        scored = cost.scoring(*shape, **rule)
        if kind == "dense" and one["peer"] == "sdpa-cudnn":
            work = cost.attention(*shape)
        elif kind == "choose" and one["precision"] == "native":
            work = scored + cost.selection(heads, length, block_size=block_size)
        elif kind == "attention" and one["stride"] == 16:
            work = cost.sparse(*shape, one["found_density"], block_size=block_size)
        elif kind == "sweep":
            work = scored + cost.sweep(*shape, 0, block_size=block_size, levels=one["levels"])
        else:
            continue
        density = f", density {one['density']:g}" if kind == "attention" else ""
        stride = f", S = {one['stride']}" if kind in ("choose", "sweep") else ""
        yield length, Timing(f"{kind}, {length} tokens{stride}{density}", work, one["median_ms"] / 1e3)


def calibration() -> dict[str, Any]:
    """calibration-8b.json in the form of runs.py."""
    record = record_of("calibration-8b.json")
    chosen, hidden = record["settings"], record["settings"]["hidden"]
    heads, mlp, layers = hidden // 128, hidden * 7 // 2, chosen["layers"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * mlp)
    shape = ModelShape(
        "8B-shaped",
        layers,
        layers,
        hidden,
        heads,
        heads // 4,
        128,
        mlp,
        32000,
        weights,
        record["parameters"],
        None,
        "bfloat16",
    )
    settings = {"stride": chosen["stride"], "block_size": 128, "gain_samples": 2, "gain_every": 7, "levels": 27}
    return {
        "shape": vars(shape),
        "lengths": [chosen["length"]] * chosen["samples"],
        "heldout_lengths": [chosen["length"]] * chosen["heldout"],
        "settings": settings | {"joint_densities": [0.33, 0.45, 0.22], "densities": [0.45, 0.33, 0.22]},
        "phases": [phase for phase in record["phases"] if phase["phase"] not in ("building the model", "searching")],
    }


def runs() -> Iterator[Timing]:
    from xcalib.plan.steps import Job, joint, samples

    record = calibration()
    shape, length, count = ModelShape(**record["shape"]), record["lengths"][0], len(record["lengths"])
    job = Job((length,), count)
    swept, _, together = record["phases"][:3]
    first = swept["first_step_seconds"]
    share = (swept["steps"] - 1) / swept["steps"]  # without the first layer, in whose time the projections are made
    yield Timing("calibration-8b, samples", samples(shape, job, length) * count * share, swept["seconds"] - first)
    yield Timing("calibration-8b, projections", cost.projections(shape), first)
    passes = [joint(shape, job, length, job.joint_densities)] * 2 + [joint(shape, job, length, (0.33,))] * (count - 2)
    yield Timing("calibration-8b, joint losses", total(passes), together["seconds"])
    yield dense(1)


def dense(seed: int) -> Timing:
    record = record_of(f"objectives/h200-smollm2-seed{seed}.json")
    count, length = record["settings"]["heldout"], record["settings"]["length"]
    work = cost.dense_pass(SMOLLM2, length) * count
    return Timing(f"SmolLM2-135M, {count} dense prefills, seed {seed}", work, record["evaluation"]["dense"]["seconds"])


def make() -> Machine:
    """Two measurements of whole models cannot tell FLOPs of products from passes over activations: these go with the FLOPs."""
    efficient = [
        one["median_ms"] / 1e3 / cost.attention(32, 128, one["length"]).flops
        for one in record_of("kernels-h200.json")["measurements"]
        if one["kind"] == "dense" and one.get("peer") == "sdpa-efficient" and one["length"] == 32768
    ]
    known = {"linear.elements": 0.0, "logits.cells": LOGIT_PASSES * 8 / BANDWIDTH, "masked.flops": efficient[0]}
    known |= {"masked.pairs": 0.0, "masked.calls": 0.0, "slopes.flops": 1 / FP32_FLOPS, "slopes.levels": 0.0}
    known |= {"slopes.pairs": SLOPE_PASSES * 8 / BANDWIDTH, "slopes.rows": 0.0}
    used = [timing for length, timing in kernels() if length in FITTED] + list(runs())
    # logits are counted as products like others; what their cells take is known beforehand and taken off
    prepared = []
    for timing in used:
        cells = timing.work.amounts.get("logits.cells", 0.0) * known["logits.cells"]
        amounts = dict(timing.work.without("linear.elements", "logits.cells", "logits.flops").amounts)
        amounts["linear.flops"] = amounts.get("linear.flops", 0.0) + timing.work.amounts.get("logits.flops", 0.0)
        prepared.append(Timing(timing.what, Work(amounts), timing.seconds - cells))
    rates, spread = fit(prepared, REFERENCE_ONLY)
    rates |= known | {"logits.flops": rates["linear.flops"]}
    record = record_of("calibration-8b.json")
    return Machine(
        name="h200",
        device="cuda",
        dtype="bfloat16",
        memory_bytes=record["machine"]["gpu"]["memory_bytes"],
        rates=dict(sorted(rates.items())),
        spread=spread,
        margin=0.25,
        assumed=("masked", "slopes"),
        link_bytes_per_second=LINK,
        sources=(
            "docs/benchmarks/kernels-h200.json (8k, 32k, 128k): attention, scoring, selection, sparse, sweep",
            "docs/benchmarks/calibration-8b.json (samples, joint losses): linear, sweep.energy, projection",
            "docs/benchmarks/objectives/h200-smollm2-seed1.json (dense prefill): linear.calls",
            "assumed: logits are products like the others' and 7 passes over memory; the backward pass's attention runs like "
            "SDPA's efficient kernel, its slopes at 40 TFLOP/s and 9 passes over memory; memory at 3.84 TB/s, links at 315 GB/s",
        ),
        measured={"machine": record["machine"], "versions": record["versions"]},
    )


def check(machine: Machine) -> str:
    rows = [(timing.what, machine.seconds(timing.work), timing.seconds) for n, timing in kernels() if n not in FITTED]
    rows += [(f"calibration-8b, {row.step}", row.predicted, row.measured) for row in check_run(calibration(), machine)]
    rows += [(one.what, machine.seconds(one.work), one.seconds) for one in map(dense, (0, 1, 2))]
    fitted = {"calibration-8b, samples", "calibration-8b, joint losses", dense(1).what}
    lines = ["| what | used in the fit | predicted s | measured s | predicted / measured |", "|---|---|---|---|---|"]
    for what, predicted, measured in rows:
        used = "yes" if what in fitted else "no"
        lines.append(f"| {what} | {used} | {predicted:.4g} | {measured:.4g} | {predicted / measured:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=("fit", "check"))
    parser.add_argument(
        "--machine", default="h200", help="whose rates are checked: h200, or a file of xcalib plan --measure"
    )
    options = parser.parse_args()
    if options.do == "fit":
        OUT.write_text(json.dumps(make().record(), indent=1) + "\n")
    else:
        sys.stdout.write(check(load_machine(options.machine)) + "\n")


if __name__ == "__main__":
    main()
