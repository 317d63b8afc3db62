"""Curves and gains against brute force: every figure again, by other means, from the model itself."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from xcalib.collect import CollectSettings, Curves, collect, load_curves
from xcalib.collect.curves import ARRAYS
from xcalib.errors import CurvesError, ModelError
from xcalib.kernels import block_sparse_attention, estimate_blocks, select_blocks, visible_blocks
from xcalib.kernels.api import Order
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.sparse import SparseAttention, SparsePlan
from xcalib.models.structure import attention_layers

Build = Callable[..., Any]

SETTINGS = CollectSettings(
    stride=16,
    block_size=64,
    grid=(0.0, 0.4, 0.55, 0.65, 0.75, 0.85, 1.0),
    gain_samples=2,
    gain_density=0.6,
    gain_every=5,
)
LENGTHS = (330, 448, 401)


@pytest.fixture(scope="module")
def model(tiny_model: Build) -> Any:
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def samples(random_samples: Build) -> Any:
    return random_samples(LENGTHS)


@pytest.fixture(scope="module")
def curves(model: Any, samples: Any, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    return collect(model, samples, tmp_path_factory.mktemp("curves"), settings=SETTINGS, name="tiny")


def ids(samples: Any, index: int) -> torch.Tensor:
    return torch.tensor(samples.samples[index].tokens)


def output_of(model: Any, layer: int, tokens: torch.Tensor, compute: Callable[..., Any] | None) -> torch.Tensor:
    """What a layer's output projection answers, fp64 ``(length, hidden)``; ``compute`` answers attention calls."""
    found: list[torch.Tensor] = []
    projection = attention_layers(model)[layer].output
    hook = projection.register_forward_hook(lambda _m, _i, output: found.append(output[0].double()))
    try:
        with torch.no_grad():
            if compute is None:
                model(tokens[None])
            else:
                with patch_attention(model, compute):
                    model(tokens[None])
    finally:
        hook.remove()
    return found[0]


def only(
    layer: int, head: int | None, tau: float, order: Order = "recent"
) -> Callable[[AttentionCall], torch.Tensor | None]:
    """Answers one layer by the sparse kernel: every block for all heads but one, which gets those of ``tau``."""

    def compute(call: AttentionCall) -> torch.Tensor | None:
        if call.layer != layer:
            return None
        scores = estimate_blocks(
            call.query, call.key, stride=16, block_size=64, scale=call.scale, pattern=SETTINGS.pattern
        )
        length = call.query.shape[2]
        mask = select_blocks(scores, tau, q_len=length, k_len=length, block_size=64, order=order)
        mask[:, [h for h in range(mask.shape[1]) if h != head]] = True
        return block_sparse_attention(call.query, call.key, call.value, mask, block_size=64, scale=call.scale)

    return compute


def test_shapes(curves: Curves) -> None:
    levels = len(SETTINGS.grid)
    assert curves.layers == (0, 1, 2)
    assert curves.error.shape == curves.kept.shape == (3, 3, 4, levels)
    assert curves.density.shape == curves.relative_error.shape == (3, 4, levels)
    assert curves.energy.shape == (3, 3)
    assert curves.gain.shape == (3,)
    assert curves.gain_kl.shape == curves.gain_error.shape == (2, 3)
    assert curves.tokens.tolist() == list(LENGTHS)
    assert curves.dense_reasons == {}
    assert curves.model["name"] == "tiny"
    assert curves.model["layers"] == 3


def test_density_from_the_always_kept_blocks_to_all(curves: Curves) -> None:
    blocks = np.array([-(-length // 64) for length in LENGTHS])
    assert curves.visible.tolist() == (blocks * (blocks + 1) // 2).tolist()
    # the first row of blocks has its own block only, every other one the sink and its own
    assert (curves.kept[..., 0] == (2 * blocks - 1)[:, None, None]).all()
    assert (curves.kept[..., -1] == curves.visible[:, None, None]).all()
    assert (np.diff(curves.kept, axis=-1) >= 0).all()
    assert (curves.density[..., -1] == 1).all()
    assert (np.diff(curves.density.mean(axis=(0, 1))) > 0).all()


def test_error_from_much_to_none(curves: Curves) -> None:
    assert (curves.error[..., -1] == 0).all()
    assert (curves.error[..., 0] > 0).all()
    assert (np.diff(curves.error.sum(axis=(0, 1, 2))) < 0).all()
    assert (curves.energy > 0).all()


def test_calibration_record(curves: Curves, samples: Any) -> None:
    record = curves.calibration
    assert record["sources"] == ["random"]
    assert (record["samples"], record["gain_samples"], record["seed"]) == (3, 2, 0)
    assert (record["min_length"], record["max_length"]) == (330, 448)
    assert record["tokens_sha256"] == samples.tokens_sha256
    assert record["documents"] == sorted(samples.documents)


@pytest.mark.parametrize("sample", range(3), ids=lambda index: f"length{LENGTHS[index]}")
@pytest.mark.parametrize(("layer", "head", "level"), [(0, 0, 0), (0, 3, 2), (1, 1, 1), (2, 2, 3), (2, 0, 4), (1, 3, 5)])
def test_error_of_one_head_equals_brute_force(
    model: Any, samples: Any, curves: Curves, sample: int, layer: int, head: int, level: int
) -> None:
    tokens = ids(samples, sample)
    dense = output_of(model, layer, tokens, only(layer, None, 1.0))
    sparse = output_of(model, layer, tokens, only(layer, head, SETTINGS.grid[level]))
    error = float((sparse - dense).square().sum())
    # two fp32 runs are subtracted here, the sweep subtracts nothing nearly equal
    assert curves.error[sample, layer, head, level] == pytest.approx(
        error, rel=1e-4, abs=1e-9 * curves.energy[sample, layer]
    )


def test_the_published_order_is_measured_on_request(model: Any, samples: Any, curves: Curves, tmp_path: Path) -> None:
    """Its errors are its own, and what is always kept is the same in both."""
    assert curves.settings.order == "recent"
    found = collect(model, samples, tmp_path, settings=dataclasses.replace(SETTINGS, order="score"))
    layer, head, level = 1, 1, 2
    for sample in range(3):
        tokens = ids(samples, sample)
        dense = output_of(model, layer, tokens, only(layer, None, 1.0))
        sparse = output_of(model, layer, tokens, only(layer, head, SETTINGS.grid[level], "score"))
        error = float((sparse - dense).square().sum())
        assert found.error[sample, layer, head, level] == pytest.approx(error, rel=1e-4)
    np.testing.assert_allclose(found.error[..., 0], curves.error[..., 0], rtol=1e-6)
    assert not np.array_equal(found.error[..., 2], curves.error[..., 2])


@pytest.mark.parametrize("layer", range(3))
def test_energy_equals_brute_force(model: Any, samples: Any, curves: Curves, layer: int) -> None:
    for index in range(len(LENGTHS)):
        energy = float(output_of(model, layer, ids(samples, index), None).square().sum())
        assert curves.energy[index, layer] == pytest.approx(energy, rel=1e-5)


def test_a_bias_of_the_projection_is_no_energy(tiny_model: Build, random_samples: Build, tmp_path: Path) -> None:
    data = random_samples([330])
    plain = collect(tiny_model(), data, tmp_path / "plain", settings=SETTINGS)
    biased = tiny_model(attention_bias=True)
    for (name, parameter), other in zip(
        tiny_model().named_parameters(), (p for n, p in biased.named_parameters() if "bias" not in n), strict=True
    ):
        assert parameter.shape == other.shape, name
        other.data.copy_(parameter.data)
    for layer in attention_layers(biased):
        layer.output.bias.data.fill_(0.0)
    attention_layers(biased)[-1].output.bias.data.fill_(3.0)  # of the last layer: it changes no attention
    with_bias = collect(biased, data, tmp_path / "biased", settings=SETTINGS)
    np.testing.assert_allclose(with_bias.energy, plain.energy, rtol=1e-4)
    np.testing.assert_allclose(with_bias.error, plain.error, rtol=1e-4)


def test_sliding_layers_stay_dense(tiny_model: Build, samples: Any, tmp_path: Path) -> None:
    found = collect(tiny_model("gemma3_text"), samples, tmp_path, settings=SETTINGS)
    assert found.layers == (1, 2)
    assert found.dense_reasons == {"sliding window": 1}
    assert found.error.shape[:2] == (3, 2)


def test_a_model_without_a_sparse_layer_is_refused(tiny_model: Build, samples: Any, tmp_path: Path) -> None:
    model = tiny_model("mistral", sliding_window=64)
    with pytest.raises(
        ModelError, match=r"MistralForCausalLM: no layer can attend sparsely: sliding window \(2 layers\)"
    ):
        collect(model, samples, tmp_path, settings=SETTINGS)


def measured_kl(model: Any, tokens: torch.Tensor, plan: SparsePlan) -> float:
    """Mean KL(dense || sparse) at the compared positions, from two whole runs, in fp64."""
    compared = slice(SETTINGS.gain_every - 1, None, SETTINGS.gain_every)
    with torch.no_grad():
        dense = model(tokens[None]).logits[0, compared].double()
        with SparseAttention(model, plan):
            sparse = model(tokens[None]).logits[0, compared].double()
    logs = functional.log_softmax(dense, -1)
    return float((logs.exp() * (logs - functional.log_softmax(sparse, -1))).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_losses_equal_whole_runs(
    tiny_model: Build, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Every plan that collect switches to, run again without its shortcuts; and the errors that belong to it."""
    plans: list[SparsePlan] = []
    use = SparseAttention.use

    def record(self: SparseAttention, plan: SparsePlan) -> None:
        if (plan.thresholds < 1).any():
            plans.append(plan)
        use(self, plan)

    model = tiny_model(family, num_hidden_layers=3)
    with monkeypatch.context() as patch:
        patch.setattr(SparseAttention, "use", record)
        found = collect(model, samples, tmp_path, settings=SETTINGS)
    layers = list(found.layers)
    single = [plan for plan in plans if (plan.thresholds[0] < 1).any(-1).sum() == 1]
    joint = [plan for plan in plans if (plan.thresholds[0] < 1).any(-1).sum() > 1]
    assert (len(single), len(joint)) == (2 * len(layers), 2 * 3 + 1)
    assert {plan.order for plan in plans} == {"recent"}  # as the errors were measured

    def errors(plan: SparsePlan, sample: int) -> np.ndarray:
        level = np.abs(plan.thresholds[0, layers, :, None].numpy() - found.grid).argmin(-1)  # (layers, heads)
        taken = np.take_along_axis(found.error[sample], level[..., None], -1)[..., 0]
        return taken.sum(-1) / found.energy[sample]

    for number, plan in enumerate(single):
        sample, row = divmod(number, len(layers))
        assert (plan.thresholds[0, layers[row]] < 1).any()
        assert measured_kl(model, ids(samples, sample), plan) == pytest.approx(found.gain_kl[sample, row], rel=1e-3)
        assert errors(plan, sample)[row] == pytest.approx(found.gain_error[sample, row], rel=1e-9)
    for number, plan in enumerate(joint):
        sample, column = divmod(number, 3)
        assert measured_kl(model, ids(samples, sample), plan) == pytest.approx(found.joint_kl[sample, column], rel=1e-3)
        # measured at levels chosen on the other samples, summed at those chosen on all: near, and often the same
        assert errors(plan, sample) @ found.gain == pytest.approx(found.joint_sum[sample, column], rel=0.5)
    assert np.isnan(found.joint_kl[2]).tolist() == [False, True, True]
    assert found.gain_kl.min() > 1e-5
    assert all("forward" not in vars(layer.block) for layer in attention_layers(model))  # nothing is skipped any more


def test_gain_is_loss_over_error(curves: Curves) -> None:
    assert (curves.gain > 0).all()
    np.testing.assert_allclose(curves.gain, curves.gain_kl.sum(axis=0) / curves.gain_error.sum(axis=0))


def test_fewer_samples_than_gain_samples(model: Any, random_samples: Build, tmp_path: Path) -> None:
    found = collect(model, random_samples([330]), tmp_path, settings=SETTINGS)
    assert len(found.gain_kl) == 1
    assert found.calibration["gain_samples"] == 1


def same(left: Curves, right: Curves) -> None:
    for name in ARRAYS:
        a, b = getattr(left, name), getattr(right, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=name)
    for field in ("settings", "model", "calibration", "layers", "dense_reasons"):
        assert getattr(left, field) == getattr(right, field)


def test_saved_curves_come_back(curves: Curves, model: Any, samples: Any, tmp_path: Path) -> None:
    again = collect(model, samples, tmp_path / "new", settings=SETTINGS, name="tiny")
    same(again, curves)
    same(load_curves(tmp_path / "new"), curves)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["collect.json", "curves.json", "curves.safetensors", "journal.jsonl"]


def test_resume_of_a_finished_collection_measures_nothing(
    curves: Curves, model: Any, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(model, samples, tmp_path, settings=SETTINGS, name="tiny")
    monkeypatch.setattr(type(model), "forward", None)
    same(collect(model, samples, tmp_path, settings=SETTINGS, name="tiny", resume=True), curves)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"grid": (0.0, 0.5)}, "expected ascending thresholds from 0 to 1"),
        ({"grid": (0.1, 1.0)}, "expected ascending thresholds from 0 to 1"),
        ({"grid": (0.0, 0.5, 0.5, 1.0)}, "expected ascending thresholds from 0 to 1"),
        ({"grid": (0.0, float("nan"), 1.0)}, "expected ascending thresholds from 0 to 1"),
        ({"grid": ()}, "expected ascending thresholds from 0 to 1"),
        ({"gain_samples": 0}, "gain_samples is 0, expected at least 1"),
        ({"gain_density": 1.0}, "expected numbers between 0 and 1"),
        ({"joint_densities": (0.3, 0.0)}, "expected numbers between 0 and 1"),
        ({"joint_densities": ()}, "joint_densities"),
        ({"gain_every": 0}, "gain_every is 0, expected an odd number, at least 1"),
        ({"gain_every": 8}, "gain_every is 8, expected an odd number, at least 1"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_settings_are_checked(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(CurvesError, match=rule):
        dataclasses.replace(SETTINGS, **values)


def poisoned(model: Any, path: str) -> Any:
    model.get_parameter(path).data.view(-1)[7] = float("nan")
    return model


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "layer 1 of LlamaForCausalLM"),
        ("model.layers.1.self_attn.v_proj.weight", "layer 1 of LlamaForCausalLM"),
        ("model.layers.1.self_attn.o_proj.weight", "layer 1 of LlamaForCausalLM"),
        ("model.layers.0.mlp.down_proj.weight", "layer 1 of LlamaForCausalLM"),
        ("model.layers.2.mlp.down_proj.weight", "layer 2 of LlamaForCausalLM: its output"),
        ("model.norm.weight", "LlamaForCausalLM: the last hidden states"),
    ],
)
def test_nan_weights_name_layer_and_sample(
    tiny_model: Build, samples: Any, tmp_path: Path, path: str, where: str
) -> None:
    model = poisoned(tiny_model("llama", num_hidden_layers=3), path)
    with pytest.raises(ModelError) as caught:
        collect(model, samples, tmp_path, settings=SETTINGS)
    assert str(caught.value).startswith(f"sample 0: {where}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "curves.json").exists()


def test_nan_of_one_token_names_its_sample(tiny_model: Build, random_samples: Build, tmp_path: Path) -> None:
    model, data = tiny_model(vocab_size=256), random_samples([330, 350])
    model.get_input_embeddings().weight.data[200] = float("nan")
    data.samples[1].tokens.setflags(write=True)
    data.samples[1].tokens[40] = 200
    with pytest.raises(ModelError, match=r"^sample 1: layer 0 of LlamaForCausalLM"):
        collect(model, data, tmp_path, settings=SETTINGS)


def test_samples_that_are_too_short_lose_nothing(model: Any, random_samples: Build, tmp_path: Path) -> None:
    with pytest.raises(CurvesError, match="lose nothing at any threshold; use longer samples or smaller blocks"):
        collect(model, random_samples([100, 90]), tmp_path, settings=SETTINGS)


def test_visible_blocks_are_the_kernels(curves: Curves) -> None:
    assert curves.visible.tolist() == [int(visible_blocks(n, n, block_size=64).sum()) for n in LENGTHS]
