"""apply_profile: the right model only, points by name, and nothing of the search is imported."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from xcalib.errors import ModelError, ProfileError
from xcalib.models.structure import describe_model
from xcalib.profile import Profile, make_profile
from xcalib.runtime import apply_profile, check_fits, sparse_plan

Build = Callable[..., Any]
IDS = torch.randint(3, 128, (1, 203), generator=torch.Generator().manual_seed(0))


def profile_for(model: Any, points: dict[str, list[float]], **fields: Any) -> Profile:
    """``points``: name to one threshold per length bin, 64 to 200 tokens and beyond; the first is the default."""
    identity = describe_model(model, "tiny")
    layers = range(identity.layers)
    dense = fields.get("dense_layers", ())

    def point(name: str, taus: list[float]) -> dict[str, Any]:
        rows = tuple(
            tuple((1.0 if layer in dense else tau,) * identity.query_heads for layer in layers) for tau in taus
        )
        return {
            "name": name,
            "target": "none",
            "objective": "kl",
            "method": "uniform",
            "thresholds": rows,
            "predicted": {"density": 0.5, "kl": 0.1},
        }

    settings = {
        "method": {"stride": 16, "block_size": 64, "pattern": "antidiagonal"},
        "model": identity,
        "dense_layers": (),
        "length_bins": ({"min_length": 64, "max_length": 200}, {"min_length": 200, "max_length": None}),
        "points": tuple(point(*item) for item in points.items()),
        "default_point": next(iter(points)),
        "calibration": {
            "sources": ("none",),
            "samples": 0,
            "min_length": 0,
            "max_length": 0,
            "seed": 0,
            "tokens_sha256": "0" * 64,
            "documents": (),
        },
        "versions": {"xcalib": "0"},
    }
    return make_profile(**settings, **fields) if not fields else make_profile(**{**settings, **fields})


@pytest.fixture
def model(tiny_model: Build) -> Any:
    return tiny_model()


def test_points_and_bins(model: Any) -> None:
    profile = profile_for(model, {"balanced": [1.0, 0.4], "fast": [0.4, 0.0]})
    with torch.no_grad():
        dense, short = model(IDS).logits, model(IDS[:, :150]).logits
        with apply_profile(model, profile) as handle:
            assert (handle.point, handle.profile) == ("balanced", profile)
            balanced = model(IDS).logits
            assert torch.equal(model(IDS[:, :150]).logits, short)
            handle.use("fast")
            assert handle.point == "fast"
            fast = model(IDS).logits
            assert not torch.equal(model(IDS[:, :150]).logits, short)
            handle.use()
            assert handle.point == "balanced"
            assert torch.equal(model(IDS).logits, balanced)
            with pytest.raises(ProfileError, match="no operating point"):
                handle.use("slow")
            assert handle.point == "balanced"
        with apply_profile(model, profile, "fast", backend="reference") as handle:
            assert torch.equal(model(IDS).logits, fast)
        assert torch.equal(model(IDS).logits, dense)
    assert not torch.equal(fast, balanced)
    assert not torch.equal(fast, dense)
    assert handle.stats()["sparse_calls"] == 2
    assert handle.stats()["density"] == 0.7
    handle.reset_stats()
    assert handle.stats()["density"] is None
    handle.remove()
    handle.remove()
    assert model.config._attn_implementation == "sdpa"


def test_dense_layers(model: Any) -> None:
    profile = profile_for(model, {"only": [0.0, 0.0]}, dense_layers=(0,))
    with torch.no_grad(), apply_profile(model, profile) as handle:
        model(IDS)
    assert handle.stats()["dense_reasons"] == {"layer kept dense by the profile": 1}
    assert [layer["density"] for layer in handle.stats()["by_layer"]] == [1.0, 0.7]


def test_plan_of_a_profile(model: Any) -> None:
    plan = sparse_plan(profile_for(model, {"a": [0.25, 0.5], "b": [0.0, 1.0]}), "b")
    assert (plan.stride, plan.block_size, plan.pattern) == (16, 64, "antidiagonal")
    assert plan.bins == ((64, 200), (200, None))
    assert plan.thresholds.shape == (2, 2, 4)
    assert plan.thresholds[:, 0, 0].tolist() == [0.0, 1.0]


def test_the_order_of_a_profile_is_served(model: Any) -> None:
    method = {"stride": 16, "block_size": 64, "pattern": "antidiagonal"}
    profiles = [
        profile_for(model, {"only": [0.4, 0.4]}, method={**method, **order})
        for order in ({}, {"order": "score"}, {"order": "recent"})
    ]
    assert [sparse_plan(profile).order for profile in profiles] == ["score", "score", "recent"]
    outputs = []
    with torch.no_grad():
        for profile in profiles:
            with apply_profile(model, profile):
                outputs.append(model(IDS).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("other", "field", "values"),
    [
        ({"family": "qwen3"}, "model_type", "'llama' in the profile (tiny) and 'qwen3'"),
        ({"num_hidden_layers": 3}, "layers", "2 in the profile (tiny) and 3"),
        ({"num_attention_heads": 8}, "query_heads", "4 in the profile (tiny) and 8"),
        ({"num_key_value_heads": 4}, "kv_heads", "2 in the profile (tiny) and 4"),
        ({"head_dim": 64}, "head_dim", "32 in the profile (tiny) and 64"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_other_models_are_refused(
    tiny_model: Build, model: Any, other: dict[str, Any], field: str, values: str
) -> None:
    profile, wrong = profile_for(model, {"only": [0.0, 0.0]}), tiny_model(**other)
    for force in (False, True):
        with pytest.raises(ModelError) as caught:
            apply_profile(wrong, profile, force=force)
        assert str(caught.value).startswith(f"the profile is for another model: {field} is {values} in ")
    assert wrong.config._attn_implementation == "sdpa"


def test_another_config_of_the_same_shape_needs_force(tiny_model: Build, model: Any) -> None:
    profile, other = profile_for(model, {"only": [0.0, 0.0]}), tiny_model(max_position_embeddings=2048)
    with pytest.raises(ModelError, match=r"config_sha256 is .* in the profile and .*force=True applies it"):
        apply_profile(other, profile)
    check_fits(model, profile)
    check_fits(other, profile, force=True)
    with apply_profile(other, profile, force=True), pytest.raises(ModelError, match="patched already"):
        apply_profile(other, profile, force=True)


def test_a_patched_model_still_fits_its_profile(model: Any) -> None:
    profile = profile_for(model, {"only": [0.0, 0.0]})
    with apply_profile(model, profile):
        check_fits(model, profile)


def test_sliding_layers_of_gemma_3(tiny_model: Build) -> None:
    model = tiny_model("gemma3_text")
    with torch.no_grad(), apply_profile(model, profile_for(model, {"only": [0.0, 0.0]}, dense_layers=(0,))) as handle:
        model(IDS)
    assert handle.stats()["dense_reasons"] == {"sliding window": 1}
    assert handle.stats()["sparse_calls"] == 2


LIGHT = """
import sys
import xcalib, xcalib.runtime
search = {"optuna", "rich", "typer", "xcalib.search", "xcalib.collect", "xcalib.cli", "xcalib.evaluation"}
heavy = {"torch", "transformers", "numpy", "xcalib.models"} | search
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import xcalib.models.sparse, xcalib.profile
assert not search & set(sys.modules), search & set(sys.modules)
"""


def test_imports_are_light() -> None:
    result = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False, cwd="/")
    assert result.returncode == 0, result.stderr
