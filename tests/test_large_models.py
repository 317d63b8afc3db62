"""Models that one device does not hold: spread by accelerate, and taken layer by layer; the curves must be the same bytes."""

import dataclasses
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xcalib.collect import CollectSettings, Curves, collect, load_curves
from xcalib.collect.curves import ARRAYS
from xcalib.collect.fisher import FisherMeter
from xcalib.collect.slopes import SlopeMeter
from xcalib.errors import CurvesError, ModelError
from xcalib.evaluation import evaluate_plans
from xcalib.models.layers import LayerStack
from xcalib.models.loading import load_model
from xcalib.models.placement import fetches_weights, input_device, materialised, run_device, run_devices
from xcalib.models.shards import HeadShards
from xcalib.models.sparse import SparsePlan
from xcalib.models.structure import attention_layers, head_projection

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
Build = Callable[..., Any]

SETTINGS = CollectSettings(
    stride=16,
    block_size=64,
    grid=(0.0, 0.4, 0.6, 0.8, 1.0),
    gain_samples=2,
    gain_density=0.6,
    joint_densities=(0.6, 0.7),
    gain_every=5,
)
LENGTHS = (140, 200, 170)
FAMILIES = ("llama", "mistral", "qwen3", "phi3", "gemma3_text")


def same(found: Curves, wanted: Curves) -> None:
    assert found.layers == wanted.layers
    assert found.dense_reasons == wanted.dense_reasons
    for name in (*ARRAYS, *wanted.settings.measures):
        assert getattr(found, name).tobytes() == getattr(wanted, name).tobytes(), name


@pytest.fixture(scope="module")
def samples(random_samples: Build) -> Any:
    return random_samples(LENGTHS)


@pytest.fixture(scope="module")
def both_measures() -> CollectSettings:
    return dataclasses.replace(SETTINGS, measures=("fisher", "mass"))


@pytest.fixture(scope="module")
def wanted(tiny_model: Build, samples: Any, both_measures: CollectSettings, tmp_path_factory: Any) -> Curves:
    return collect(tiny_model(num_hidden_layers=3), samples, tmp_path_factory.mktemp("plain"), settings=both_measures)


@pytest.fixture(scope="module")
def shards(tiny_model: Build, tmp_path_factory: Any) -> Path:
    """A checkpoint of many files, its embeddings tied."""
    folder = tmp_path_factory.mktemp("shards")
    tiny_model(num_hidden_layers=3, tie_word_embeddings=True).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Build:
    """``load_model(...).model`` of a folder without a tokenizer."""
    monkeypatch.setattr("xcalib.models.loading.load_tokenizer", lambda *_a, **_k: None)
    return lambda *arguments, **how: load_model(*map(str, arguments), **how).model


def spread(model: Any, how: str, folder: Path) -> Any:
    """A model with its weights elsewhere, by accelerate's own functions."""
    if how == "cpu_offload":
        return accelerate.cpu_offload(model)
    if how == "disk_offload":
        return accelerate.disk_offload(model, str(folder))
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    return accelerate.dispatch_model(model, device_map, offload_dir=str(folder))


class TestPlacement:
    @pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch"])
    def test_weights_on_meta_are_read(self, tiny_model: Build, tmp_path: Path, how: str) -> None:
        plain = tiny_model(num_hidden_layers=3)
        model = spread(tiny_model(num_hidden_layers=3), how, tmp_path)
        layer = attention_layers(model)[1]
        assert layer.output.weight.is_meta
        assert fetches_weights(layer.output)
        assert torch.equal(head_projection(layer, 4), head_projection(attention_layers(plain)[1], 4))
        assert layer.output.weight.is_meta
        assert run_device(layer.output) == input_device(model) == torch.device("cpu")
        assert run_devices(model) == (torch.device("cpu"),)

    def test_nothing_is_fetched_twice(self, tiny_model: Build) -> None:
        model = accelerate.cpu_offload(tiny_model())
        output = attention_layers(model)[0].output
        with materialised(output):
            held = output.weight
            with materialised(output):
                assert output.weight is held
            assert output.weight is held
        assert output.weight.is_meta

    def test_a_plain_model(self, tiny_model: Build) -> None:
        model = tiny_model()
        assert not fetches_weights(model.lm_head)
        assert input_device(model) == torch.device("cpu")


class TestDeviceMap:
    @pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch"])
    def test_the_curves_are_the_same(
        self, tiny_model: Build, samples: Any, wanted: Curves, tmp_path: Path, how: str
    ) -> None:
        model = spread(tiny_model(num_hidden_layers=3), how, tmp_path / "weights")
        hooked = {name: vars(module).get("forward") for name, module in model.named_modules()}
        same(collect(model, samples, tmp_path / "curves", settings=wanted.settings), wanted)
        assert {name: vars(module).get("forward") for name, module in model.named_modules()} == hooked
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_a_projection_with_a_bias(self, tiny_model: Build, samples: Any, tmp_path: Path) -> None:
        """Its bias is away by the time that the energy is taken."""

        def biased() -> Any:
            model = tiny_model(attention_bias=True)
            with torch.no_grad():
                for layer in model.model.layers:
                    layer.self_attn.o_proj.bias.normal_(generator=torch.Generator().manual_seed(1))
            return model

        plain = collect(biased(), samples, tmp_path / "plain", settings=SETTINGS)
        same(collect(accelerate.cpu_offload(biased()), samples, tmp_path / "away", settings=SETTINGS), plain)

    def test_slopes_and_evaluation(self, tiny_model: Build, samples: Any, tmp_path: Path) -> None:
        plain = tiny_model(num_hidden_layers=3)
        model = spread(tiny_model(num_hidden_layers=3), "dispatch", tmp_path)
        tokens, levels = torch.tensor(samples.samples[0].tokens), np.zeros((3, 4), dtype=np.int64)
        found = []
        for one in (plain, model):
            with torch.no_grad():
                dense = one.model(tokens[None])[0][0][4::5]
            found.append(SlopeMeter(one, SETTINGS, (0, 1, 2)).measure(tokens, levels, dense))
            assert FisherMeter(one, SETTINGS).gram(tokens, (0, 1, 2), seed=0).any()
        assert found[0].kl == found[1].kl > 0
        assert found[0].slope.tobytes() == found[1].slope.tobytes()
        plan = SparsePlan(16, 64, "antidiagonal", ((0, None),), torch.zeros((1, 3, 4)))
        one, two = (evaluate_plans(m, samples, {"none": plan}, tokenizer=None).to_dict() for m in (plain, model))
        assert one["plans"][0]["kl"] == two["plans"][0]["kl"] > 0

    def test_loading(self, shards: Path, load: Build, samples: Any, tmp_path: Path) -> None:
        wanted = collect(load(shards, device="cpu"), samples, tmp_path / "plain", settings=SETTINGS)
        assert run_devices(load(shards, device_map="auto")) == (input_device(load(shards)),)  # one device holds it
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        device_map |= {"model.layers.0": "cpu", "model.layers.1": "cpu", "model.layers.2": "disk"}
        model = load(shards, device_map=json.dumps(device_map))
        assert model.model.layers[2].self_attn.o_proj.weight.is_meta
        same(collect(model, samples, tmp_path / "map", settings=SETTINGS), wanted)

    @pytest.mark.parametrize("text", ["automatic", "{}", "[1]", '{"a": null}'])
    def test_a_malformed_map(self, shards: Path, load: Build, text: str) -> None:
        with pytest.raises(ModelError, match=r"device map is .*, allowed are auto, balanced, .*JSON object"):
            load(shards, device_map=text)

    def test_accelerate_is_asked_for(self, shards: Path, load: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("xcalib.models.spread.find_spec", lambda _name: None)
        for how in ({"device_map": "auto"}, {"offload": True}):
            with pytest.raises(ModelError, match=r"needs accelerate: pip install 'xcalib\[large\]'"):
                load(shards, **how)

    def test_one_way_at_a_time(self, shards: Path, load: Build) -> None:
        with pytest.raises(ModelError, match="give one of them"):
            load(shards, device_map="auto", device="cpu")


class TestOffload:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_curves_are_the_same(self, tiny_model: Build, samples: Any, tmp_path: Path, family: str) -> None:
        model = tiny_model(family)
        plain = collect(model, samples, tmp_path / "plain", settings=SETTINGS)
        same(collect(model, samples, tmp_path / "layers", settings=SETTINGS, offload=True), plain)
        assert not (tmp_path / "layers" / "hidden").exists()
        assert not (tmp_path / "layers" / "units").exists()

    def test_one_layer_at_a_time(
        self, shards: Path, load: Build, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = load(shards, device="cpu")
        wanted = collect(plain, samples, tmp_path / "plain", settings=SETTINGS)
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in plain.model.layers]
        around = sum(p.numel() for p in plain.parameters()) - sum(sizes)
        model = load(shards, device="cpu", offload=True)
        held, read = [], []

        def count() -> int:
            return sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)

        def forward(stack: LayerStack, index: int, entry: Any, hidden: torch.Tensor) -> torch.Tensor:
            held.append(count())
            output = own(stack, index, entry, hidden)
            held.append(count())
            return output

        def resident(stack: LayerStack, index: int) -> Any:
            read.append(index)
            return own_resident(stack, index)

        own, own_resident = LayerStack.forward, LayerStack.resident
        monkeypatch.setattr(LayerStack, "forward", forward)
        monkeypatch.setattr(LayerStack, "resident", resident)
        assert count() == around
        same(collect(model, samples, tmp_path / "layers", settings=SETTINGS, offload=True), wanted)
        assert set(held) == {around + size for size in sizes}
        assert count() == around
        assert read == [0, 1, 2] * 3  # the sweep, the gains, all layers together

    def test_other_measures(
        self, tiny_model: Build, samples: Any, wanted: Curves, shards: Path, tmp_path: Path
    ) -> None:
        model = accelerate.disk_offload(tiny_model(num_hidden_layers=3), str(tmp_path / "weights"))
        same(collect(model, samples, tmp_path / "curves", settings=wanted.settings, offload=True), wanted)

    @pytest.mark.parametrize("stop", [0, 4, 10, 19, 23, 36])
    def test_interrupted_anywhere(
        self, tiny_model: Build, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
    ) -> None:
        """3 samples in 3 blocks, 2 x (3 + 2 + 1) for the gains, 3 x (2 + 2 + 1) for all layers together."""
        model = tiny_model(num_hidden_layers=3)
        calls = []

        def forward(stack: LayerStack, index: int, entry: Any, hidden: torch.Tensor) -> torch.Tensor:
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(index)
            return own(stack, index, entry, hidden)

        own = LayerStack.forward
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(LayerStack, "forward", forward)
            collect(model, samples, tmp_path, settings=SETTINGS, offload=True)
            raise KeyboardInterrupt  # the last case stops after all blocks
        done = len(calls)
        stop = -1
        with monkeypatch.context() as patch:
            patch.setattr(LayerStack, "forward", forward)
            found = collect(model, samples, tmp_path, settings=SETTINGS, offload=True, resume=True)
        assert len(calls) == 36 or done == 36
        same(found, load_curves(tmp_path))
        same(found, _remembered(tiny_model, samples, tmp_path))

    def test_begun_in_one_way_and_ended_in_the_other(
        self, tiny_model: Build, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_model(num_hidden_layers=3)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("xcalib.collect.job.Job.measure_joint", _interrupt)
            collect(model, samples, tmp_path / "b", settings=SETTINGS, offload=True)
        assert (tmp_path / "b" / "hidden").is_dir()
        found = collect(model, samples, tmp_path / "b", settings=SETTINGS, resume=True)
        same(found, _remembered(tiny_model, samples, tmp_path))
        assert not (tmp_path / "b" / "hidden").exists()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("xcalib.collect.job.Job.measure_gains", _interrupt)
            collect(model, samples, tmp_path / "a", settings=SETTINGS)
        same(
            collect(model, samples, tmp_path / "a", settings=SETTINGS, offload=True, resume=True),
            _remembered(tiny_model, samples, tmp_path),
        )

    def test_experts_that_have_to_be_converted(self, load: Build, samples: Any, tmp_path: Path) -> None:
        """The checkpoint names experts one by one, the model holds them in one tensor."""
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 64}
        config = transformers.AutoConfig.for_model(
            "mixtral", vocab_size=128, intermediate_size=48, num_hidden_layers=2, num_local_experts=4, **sizes
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
        model.save_pretrained(tmp_path / "model")
        wanted = collect(load(tmp_path / "model", device="cpu"), samples, tmp_path / "plain", settings=SETTINGS)
        model = load(tmp_path / "model", device="cpu", offload=True)
        assert model.model.layers[0].mlp.experts.gate_up_proj.is_meta
        same(collect(model, samples, tmp_path / "layers", settings=SETTINGS, offload=True), wanted)

    def test_no_room(self, tiny_model: Build, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("xcalib.collect.hidden.shutil.disk_usage", lambda _p: type("usage", (), {"free": 1000}))
        with pytest.raises(CurvesError, match=r"hidden states take .* GB, the disk has .* free: choose another folder"):
            collect(tiny_model(), samples, tmp_path, settings=SETTINGS, offload=True)

    def test_not_finite(self, tiny_model: Build, samples: Any, tmp_path: Path) -> None:
        model = tiny_model(num_hidden_layers=3)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
        with pytest.raises(ModelError, match=r"^sample 0: LlamaForCausalLM: the hidden states after layer 1 hold NaN"):
            collect(model, samples, tmp_path, settings=SETTINGS, offload=True)

    def test_something_between_the_layers(self, tiny_model: Build, samples: Any, tmp_path: Path) -> None:
        model = tiny_model()
        first, own = model.model.layers[0], type(model.model.layers[0]).__call__

        class Doubling(type(first)):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return 2 * own(self, *args, **kwargs)

        first.__class__ = Doubling
        with pytest.raises(ModelError, match="does more between its layers"):
            collect(model, samples, tmp_path, settings=SETTINGS, offload=True)

    def test_a_gguf_file_is_refused(self, tmp_path: Path, load: Build) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        with pytest.raises(ModelError, match=r"GGUF file, which is not read layer by layer: use safetensors"):
            load(tmp_path / "model.gguf", offload=True)


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_weights_keep_their_dtype_and_sums_have_more(
        self, tiny_model: Build, samples: Any, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        model = tiny_model(num_hidden_layers=3).to(dtype)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = collect(model, samples, tmp_path / "half", settings=SETTINGS)
        assert all(value.dtype == dtype and torch.equal(value, before[n]) for n, value in model.state_dict().items())
        for name in ("error", "energy", "gain", "gain_kl", "joint_kl"):
            assert getattr(found, name).dtype == np.float64
        assert head_projection(attention_layers(model)[0], 4).dtype == torch.float32
        # the same weights, all arithmetic in fp32: sums in half precision would be off by far more than activations are
        exact = collect(model.float(), samples, tmp_path / "single", settings=SETTINGS)
        assert np.allclose(found.energy, exact.energy, rtol=0.01)
        assert np.allclose(found.error[..., 0].sum(-1), exact.error[..., 0].sum(-1), rtol=0.05)
        assert (found.error[..., -1] == 0).all()
        assert len(np.unique(found.energy.astype(np.float32))) == found.energy.size

    def test_layer_by_layer(self, tiny_model: Build, samples: Any, tmp_path: Path) -> None:
        model = tiny_model("qwen3").to(torch.bfloat16)
        plain = collect(model, samples, tmp_path / "plain", settings=SETTINGS)
        same(collect(model, samples, tmp_path / "layers", settings=SETTINGS, offload=True), plain)

    def test_loading(self, tiny_model: Build, load: Build, tmp_path: Path) -> None:
        tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
        for how in ({"device": "cpu"}, {"device_map": "auto"}, {"device": "cpu", "offload": True}):
            model = load(tmp_path, dtype="bfloat16", **how)
            with materialised(model.model.layers[0].self_attn.o_proj):
                assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
                assert not model.model.layers[0].self_attn.o_proj.weight.is_meta


class TestTensorParallel:
    def test_two_ranks_find_what_one_process_finds(
        self, tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiny_model().save_pretrained(tmp_path / "model")
        rng = np.random.default_rng(0)
        np.savez(tmp_path / "tokens.npz", a=rng.integers(3, 128, 140), b=rng.integers(3, 128, 200))
        worker = Path(__file__).with_name("tensor_parallel_worker.py")
        monkeypatch.setattr("xcalib.models.loading.load_tokenizer", None)  # the worker sets it
        (tmp_path / "one").mkdir()
        runpy.run_path(str(worker))["main"](str(tmp_path / "model"), str(tmp_path / "tokens.npz"), tmp_path / "one")
        (tmp_path / "two").mkdir()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker]
        command = [*launcher, tmp_path / "model", tmp_path / "tokens.npz", tmp_path / "two"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        wanted = np.load(tmp_path / "one" / "rank0.npz")
        for rank in range(2):
            found = np.load(tmp_path / "two" / f"rank{rank}.npz")
            for name in wanted.files:
                scale = np.nanmax(np.abs(wanted[name]))
                assert np.allclose(found[name], wanted[name], rtol=0, atol=1e-5 * scale, equal_nan=True), name
            assert (found["kept"] == wanted["kept"]).all()
        saved = load_curves(tmp_path / "two" / "host0" / "curves")
        assert saved.error.tobytes() == np.load(tmp_path / "two" / "rank0.npz")["error"].tobytes()

    def test_own_and_all(self) -> None:
        shards = HeadShards(8, rank=1, size=4)
        assert shards.own(torch.arange(8), 2).tolist() == [2, 3]
        assert shards.own(torch.arange(8), 8).tolist() == list(range(8))
        assert shards.all(torch.arange(8)).tolist() == list(range(8))
        with pytest.raises(ModelError, match="a layer has 3 query heads on rank 1, expected 8 / 4"):
            shards.all(torch.arange(3))

    def test_without_ranks(self, shards: Path, load: Build) -> None:
        with pytest.raises(ModelError, match="torchrun"):
            load(shards, tp_plan="auto")
        with pytest.raises(ModelError, match="allowed is auto"):
            load(shards, tp_plan="mine")


class TestCommands:
    def test_collect(self, run: Build, tiny_folder: Path, tmp_path: Path) -> None:
        common = ["collect", tiny_folder, "--data", "builtin:prose", "--num-samples", "2", "--max-length", "160"]
        common += ["--block-size", "64", "--gain-samples", "1", "--device", "cpu"]
        assert run(*common, "--out", tmp_path / "plain")[0] == 0
        assert run(*common, "--offload", "--out", tmp_path / "layers")[0] == 0
        assert run(*common[:-2], "--device-map", "auto", "--out", tmp_path / "map")[0] == 0
        for name in ("curves.safetensors", "curves.json"):
            wanted = (tmp_path / "plain" / name).read_bytes()
            assert (tmp_path / "layers" / name).read_bytes() == wanted
            assert (tmp_path / "map" / name).read_bytes() == wanted

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--device-map", "auto", "--device", "cpu"), "goes without --device"),
            (("--device-map", "auto", "--offload"), "goes without --offload"),
            (("--device-map", "somehow"), "allowed are auto, balanced"),
        ],
        ids=["device", "offload", "malformed"],
    )
    def test_bad_input(
        self, run: Build, tiny_folder: Path, tmp_path: Path, arguments: Sequence[str], said: str
    ) -> None:
        code, _, stderr = run("collect", tiny_folder, "--out", tmp_path / "curves", *arguments)
        assert code == 2
        assert said in " ".join(stderr.split())
        assert "Traceback" not in stderr

    def test_search(self, run: Build, tiny_folder: Path, tmp_path: Path) -> None:
        common = ["search", tiny_folder, "--data", "builtin:prose", "--num-samples", "2", "--max-length", "160"]
        common += ["--block-size", "64", "--gain-samples", "1", "--device", "cpu", "--heldout-samples", "0"]
        common += ["--target", "all:density=0.9", "--rounds", "0"]
        for name, extra in (("plain", ()), ("layers", ("--offload",))):
            work = ("--work", tmp_path / name, "--out", tmp_path / f"{name}.yaml")
            code, _, stderr = run(*common, *extra, *work)
            assert code == 0, stderr
        assert (tmp_path / "plain.yaml").read_bytes() == (tmp_path / "layers.yaml").read_bytes()


def _interrupt(*_args: Any) -> None:
    raise KeyboardInterrupt


_known: dict[str, Curves] = {}


def _remembered(tiny_model: Build, samples: Any, folder: Path) -> Curves:
    if "curves" not in _known:
        _known["curves"] = collect(tiny_model(num_hidden_layers=3), samples, folder / "plain", settings=SETTINGS)
    return _known["curves"]
