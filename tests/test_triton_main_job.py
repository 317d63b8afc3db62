"""The main job on a tiny model with Triton's kernels (interpreted without a GPU) against the reference path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xcalib.collect import CollectSettings, Curves, collect
from xcalib.models.sparse import SparseAttention, SparsePlan
from xcalib.search import Target, build_profile

pytest.importorskip("triton")

Build = Callable[..., Any]

SETTINGS = CollectSettings(
    stride=16,
    block_size=64,
    grid=(0.0, 0.4, 0.6, 0.75, 0.85, 1.0),
    gain_samples=1,
    gain_density=0.7,
    gain_every=5,
    joint_densities=(0.75,),
)


@pytest.fixture(scope="module")
def model(tiny_model: Build) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def curves(model: Any, random_samples: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curves]:
    """By backend."""
    samples, found = random_samples([257, 300]), {}
    with pytest.MonkeyPatch.context() as patch:
        for backend in ("reference", "triton"):
            patch.setenv("XCALIB_BACKEND", backend)
            found[backend] = collect(model, samples, tmp_path_factory.mktemp(backend), settings=SETTINGS, name="tiny")
    return found


def test_the_curves_are_the_same(curves: dict[str, Curves]) -> None:
    truth, ours = curves["reference"], curves["triton"]
    assert np.array_equal(ours.kept, truth.kept)
    assert np.array_equal(ours.energy, truth.energy)
    scale = truth.error.max(axis=-1, keepdims=True)  # (samples, layers, heads, 1)
    assert (scale > 0).all()
    np.testing.assert_allclose(ours.error / scale, truth.error / scale, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours.gain, truth.gain, rtol=1e-3)
    np.testing.assert_allclose(ours.joint_kl, truth.joint_kl, rtol=1e-3)


def test_the_profile_is_the_same(curves: dict[str, Curves]) -> None:
    target = (Target("balanced", "density", 0.75),)
    truth, ours = (build_profile(curves[backend], target) for backend in ("reference", "triton"))
    assert ours.point().thresholds == truth.point().thresholds
    assert ours.point().predicted.density == pytest.approx(truth.point().predicted.density, abs=0)
    assert ours.point().predicted.kl == pytest.approx(truth.point().predicted.kl, rel=1e-3)


def test_a_served_model_is_the_same(model: Any, random_samples: Build, tmp_path: Path) -> None:
    tokens = torch.tensor(random_samples([300]).samples[0].tokens)[None]
    plan = SparsePlan(16, 64, "antidiagonal", ((0, None),), torch.full((1, 2, 4), 0.6))
    logits, densities = {}, {}
    for backend in ("reference", "triton"):
        with SparseAttention(model, plan, backend=backend) as sparse, torch.inference_mode():
            logits[backend] = model(tokens).logits
            densities[backend] = sparse.density()
            assert sparse.stats()["sparse_calls"] == 2
    assert np.array_equal(densities["triton"], densities["reference"])
    assert (densities["triton"] < 1).all()
    torch.testing.assert_close(logits["triton"], logits["reference"], rtol=1e-4, atol=1e-4)
