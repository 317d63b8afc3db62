"""The main job on the real SmolLM2-135M, reduced: search, save, load, serve, and beat the single tau of its density."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import xcalib
from xcalib.collect import CollectSettings
from xcalib.data import load_samples
from xcalib.evaluation import evaluate_plans, plans_to_evaluate, uniform_at
from xcalib.models.loading import DEMO_PACKAGE, load_model
from xcalib.search import CalibrationData

NEEDED = (DEMO_PACKAGE, "gguf", "accelerate", "sentencepiece")
MISSING = [package for package in NEEDED if find_spec(package) is None]

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(bool(MISSING), reason=f"the demo model needs {', '.join(MISSING)}: run 'make demo'"),
]

DENSITY = 0.6  # at 512 tokens and blocks of 64 the always-kept blocks are 0.42 already
GRID = (0.0, 0.3, 0.5, 0.6, 0.7, 0.78, 0.84, 0.89, 0.93, 0.96, 0.98, 1.0)
SETTINGS = CollectSettings(block_size=64, grid=GRID, gain_samples=1, gain_every=31, joint_densities=(DENSITY,))
AMOUNT = CalibrationData(num_samples=2, heldout_samples=2, max_length=512)


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_model("demo")


def test_search_save_load_apply_evaluate(demo: Any, tmp_path: Path) -> None:
    model, tokenizer = demo.model, demo.tokenizer
    found = xcalib.search(
        model,
        ["builtin"],
        target=f"balanced:density={DENSITY}",
        tokenizer=tokenizer,
        amount=AMOUNT,
        settings=SETTINGS,
        folder=tmp_path / "work",
        name="demo",
        rounds=1,  # for the test's time
    )
    xcalib.save_profile(found, tmp_path / "demo.yaml")
    profile = xcalib.load_profile(tmp_path / "demo.yaml")
    assert profile == found
    assert (profile.model.layers, profile.model.query_heads, profile.model.kv_heads) == (30, 9, 3)
    assert profile.dense_layers == ()
    point = profile.point()
    assert point.predicted.density == pytest.approx(DENSITY, abs=0.01)
    assert len({tau for row in point.thresholds[0] for tau in row}) > 5
    evidence = point.heldout
    assert evidence is not None
    assert (evidence.samples, evidence.tokens) == (2, 1024)
    assert evidence.density == pytest.approx(DENSITY, abs=0.05)
    assert evidence.kl < 0.1
    assert evidence.perplexity == pytest.approx(evidence.perplexity_dense, rel=0.1)

    heldout = load_samples(
        ["builtin"],
        tokenizer,
        num_samples=AMOUNT.heldout_samples,
        max_length=AMOUNT.max_length,
        split="heldout",
        exclude=profile.calibration.documents,
    )
    ids = torch.tensor(heldout.samples[0].tokens)[None]
    with torch.inference_mode():
        dense = model(ids).logits
        handle = xcalib.apply_profile(model, profile)
        sparse = model(ids).logits
        stats = handle.stats()
        handle.remove()
        assert torch.equal(model(ids).logits, dense)
    assert stats["sparse_calls"] + stats["dense_calls"] == 30
    assert stats["sparse_calls"] >= 28  # a layer whose heads all got 1 runs dense
    assert stats["density"] == pytest.approx(DENSITY, abs=0.08)
    assert 0 < (sparse - dense).abs().max() < dense.abs().max()

    plans = plans_to_evaluate(model, profile, uniform=[0.6, 0.75, 0.9])
    plans |= {name: replace(plan, order="score") for name, plan in plans.items() if name.startswith("tau=")}
    evaluation = evaluate_plans(model, heldout, plans)
    ours = evaluation.plan("balanced")
    single = uniform_at(evaluation, ours.density)  # of the published rule
    assert ours.kl == pytest.approx(evidence.kl, rel=1e-6)
    assert ours.density == pytest.approx(evidence.density)
    assert ours.kl < 0.6 * single.kl
