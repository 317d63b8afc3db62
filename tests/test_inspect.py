"""``xcalib inspect`` on many architectures, from tiny configurations: always a row or one clear line, never a traceback."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from xcalib.cli.inspect import spans
from xcalib.collect.curves import DEFAULT_GRID, CollectSettings
from xcalib.errors import ModelError
from xcalib.models.attention import patch_attention
from xcalib.models.inspection import Inspection, inspect_config, inspect_model

Run = Callable[..., tuple[int, str, str]]

SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def inspected(family: str, **settings: Any) -> Inspection:
    return inspect_config(transformers.AutoConfig.for_model(family, **settings), family)


def rows(found: Inspection) -> list[tuple[str, int | None, str | None]]:
    return [(layer.kind, layer.window, layer.reason) for layer in found.layers]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "gemma", "smollm3"])
def test_plain_decoders(family: str) -> None:
    found = inspected(family, **SMALL, pad_token_id=0, **({"sliding_window": None} if family == "mistral" else {}))
    assert rows(found) == [("full", None, None)] * 4
    assert found.problem is None and found.seen == 4 and found.sparse_layers == (0, 1, 2, 3)
    assert {(layer.query_heads, layer.kv_heads) for layer in found.layers} == {(4, 2)}
    assert found.max_positions == 4096


def test_experts_are_passed_by() -> None:
    """Which experts a token goes to depends on values, and there are none."""
    for family in ("mixtral", "qwen3_moe", "phimoe"):
        found = inspected(family, **SMALL, **EXPERTS, sliding_window=None)
        assert rows(found) == [("full", None, None)] * 4, family
        assert found.seen == 4


def test_sliding_windows() -> None:
    found = inspected("mistral", **SMALL, sliding_window=512)
    assert rows(found) == [("sliding", 512, "sliding window")] * 4
    assert found.problem == "no layer can attend sparsely: sliding window"
    found = inspected("gemma3_text", **SMALL, sliding_window=64, pad_token_id=0)
    kinds = transformers.AutoConfig.for_model("gemma3_text", **SMALL).layer_types
    expected = [
        ("sliding", 64, "sliding window") if kind == "sliding_attention" else ("full", None, None) for kind in kinds
    ]
    assert rows(inspected("cohere2", **SMALL, sliding_window=64, pad_token_id=0))[3] == ("full", None, None)
    assert rows(found) == expected


def test_a_window_as_long_as_the_model_hides_nothing() -> None:
    found = inspected("mistral", **SMALL, sliding_window=4096)
    assert found.problem is None and {reason for _, _, reason in rows(found)} == {None}


def test_softcaps_and_sinks() -> None:
    found = inspected("gemma2", **SMALL, sliding_window=64, pad_token_id=0)
    assert {reason for _, _, reason in rows(found)} == {"logit softcapping"}
    assert {(kind, window) for kind, window, _ in rows(found)} == {("sliding", 64), ("full", None)}
    found = inspected("gpt_oss", **SMALL, **EXPERTS, sliding_window=64, pad_token_id=0)
    assert {reason for _, _, reason in rows(found)} == {"attention sinks"}
    assert found.problem == "no layer can attend sparsely: attention sinks"


def test_heads_that_the_kernels_do_not_take() -> None:
    found = inspected("llama", **{**SMALL, "head_dim": 16})
    assert found.problem == "no layer can attend sparsely: unsupported head_dim 16"


def test_hybrids_have_rows_for_layers_without_attention() -> None:
    found = inspected(
        "qwen3_next", **SMALL, **EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=32, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    none = "no attention that could be replaced"
    assert rows(found) == [("linear_attention", None, none)] * 3 + [("full", None, None)]
    assert found.sparse_layers == (3,) and found.layers[0].query_heads == 0
    jamba = inspected(
        "jamba",
        **{**SMALL, "num_hidden_layers": 8},
        **EXPERTS,
        attn_layer_period=4,
        attn_layer_offset=2,
        mamba_dt_rank=8,
    )
    assert jamba.sparse_layers == (2, 6)


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128}, "has no num_attention_heads"),
        ("rwkv", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128}, "has no num_attention_heads"),
        ("bert", {**VISION, "vocab_size": 128}, "no attention module with layer_idx"),
        (
            "t5",
            {"d_model": 32, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 128},
            "no attention module",
        ),
        ("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 128}, "only plain decoders"),
        ("vit", VISION, "no attention module"),
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 2, "vocab_size": 128}, "AttentionInterface"),
        (
            "falcon",
            {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128},
            "AttentionInterface",
        ),
        ("gemma4_text", {**SMALL, "pad_token_id": 0}, "per-layer"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_cannot_be_served_says_why(family: str, settings: dict[str, Any], said: str) -> None:
    found = inspected(family, **settings)
    assert found.problem is not None and said in found.problem and "\n" not in found.problem
    assert not found.sparse_layers and found.layers


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_the_text_decoder_of_a_multi_modal_model(family: str) -> None:
    text = {**SMALL, "hidden_size": 128, "num_hidden_layers": 6, "pad_token_id": 0, "sliding_window": 64}
    if family == "qwen2_vl":
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2} if family == "qwen2_vl" else VISION
    config = transformers.AutoConfig.for_model(family, text_config=text, vision_config=vision)
    found = inspect_config(config, family)
    assert found.problem is None and found.sparse_layers and found.seen == 6
    assert ("load this one in Python" in found.note) == (family != "gemma3")


def test_what_is_said_is_what_a_pass_does(tiny_model: Callable[..., Any]) -> None:
    """The same reasons as calls with weights get, on models of every kind that the runtime is tested with."""
    for family in ("llama", "mistral", "qwen3", "phi3", "gemma2", "gemma3_text", "gpt_oss"):
        model = tiny_model(family)
        reasons: dict[int, str | None] = {}
        with (
            patch_attention(model, lambda call, into=reasons: into.update({call.layer: call.dense_reason})),
            torch.no_grad(),
        ):
            model(torch.randint(3, 128, (1, 300)))
        found = inspect_config(model.config, family)
        assert [layer.reason for layer in found.layers] == [reasons[index] for index in sorted(reasons)], family
        assert [layer.reason for layer in inspect_model(model, family).layers] == [
            layer.reason for layer in found.layers
        ], family


def test_a_model_is_left_as_it_was(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").to("meta")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    assert inspect_model(model, "m").seen == 2
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == implementation


# --- the command


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config.json alone: Gemma 3 with twelve layers, five of six of them sliding."""
    settings = {**SMALL, "num_hidden_layers": 12, "sliding_window": 512, "dtype": "bfloat16"}
    path = tmp_path / "config.json"
    transformers.AutoConfig.for_model("gemma3_text", **settings).to_json_file(path, use_diff=False)
    return path


def test_equal_layers_share_a_row(run: Run, config: Path) -> None:
    code, out, err = run("inspect", config)
    assert code == 0, err
    assert "Gemma3ForCausalLM (gemma3_text)" in out and "bfloat16, 4,096 positions, attention sdpa" in out
    table = [" ".join(line.split()) for line in out.splitlines()]
    assert "0-4, 6-10 sliding (512) 4 2 2 32 dense: sliding window" in table
    assert "5, 11 full 4 2 2 32 sparse" in table
    assert "supported: 2 of 12 layers can attend sparsely" in table
    assert f"a search measures 8 heads at {len(DEFAULT_GRID)} levels of tau each (S 16, B 128)" in table
    assert "blocks of a head that causality allows: 528 at 4,096 tokens" in table
    assert max(len(line) for line in out.splitlines()[1:] if "xcalib plan" not in line) <= 80


def test_json(run: Run, config: Path) -> None:
    code, out, _ = run("inspect", config, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["sparse_layers"] == [5, 11] and found["unknown_layers"] == [] and found["problem"] is None
    assert found["layers"][0] == {
        "kind": "sliding", "window": 512, "query_heads": 4, "kv_heads": 2, "head_dim": 32, "reason": "sliding window",
        "known": True,
    }  # fmt: skip
    assert found["measured"] == {"heads": 8, "levels": len(DEFAULT_GRID), "stride": 16, "block_size": 128}
    assert found["blocks"] == {"4096": 528}
    settings = CollectSettings()
    assert (found["measured"]["stride"], found["measured"]["block_size"]) == (settings.stride, settings.block_size)


def test_a_model_that_cannot_be_served_is_an_answer(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bert.json"
    transformers.AutoConfig.for_model("bert", **VISION).to_json_file(path, use_diff=False)
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "not supported: BertLMHeadModel: no attention module" in out and "plan" not in out


def test_a_folder(run: Run, tiny_folder: Path) -> None:
    code, out, _ = run("inspect", tiny_folder)
    assert code == 0 and "supported: 3 of 3 layers" in out


@pytest.mark.model
def test_the_demo_is_read_from_its_gguf_header(run: Run) -> None:
    code, out, _ = run("inspect", "demo")
    assert code == 0 and "0-29 full 9 3 3 64 sparse" in " ".join(out.split())


def test_layers_that_a_pass_does_not_reach_are_dense_by_their_attributes_or_not_known(
    run: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, seen, _ = run("inspect", config)
    monkeypatch.setattr("xcalib.models.inspection.decoder_of", lambda _model: None)
    code, out, _ = run("inspect", config)
    note = "note: 12 layers are judged by their attributes: the pass without weights did not come to their attention\n"
    assert code == 0 and note in out and note not in seen
    table = [" ".join(line.split()) for line in out.splitlines()]
    assert "0-4, 6-10 sliding (512) 4 2 2 32 dense: sliding window" in table
    assert "5, 11 full 4 2 2 32 not known" in table
    assert "not known: at most 2 of 12 layers can attend sparsely" in table
    assert "a search measures at most 8 heads" in out
    found = json.loads(run("inspect", config, "--json")[1])
    assert (found["sparse_layers"], found["unknown_layers"]) == ([], [5, 11])
    assert [layer["known"] for layer in found["layers"]] == [index not in (5, 11) for index in range(12)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, _ = run("doctor", config)
    said = " ".join(out.split())
    assert code == 0 and "warning model" in said and "at most 2 of 12 layers can attend sparsely; 10 stay dense" in said
    assert out.rstrip().endswith("nothing failed; which of the model's layers can attend sparsely is not known")


def test_cross_attention_that_a_pass_does_not_reach_is_dense() -> None:
    text = {**SMALL, "hidden_size": 128, "cross_attention_layers": [1], "pad_token_id": 0}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    vision = {**VISION, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 64, "image_size": 28}
    config = transformers.AutoConfig.for_model("mllama", text_config=text, vision_config=vision)
    found = inspect_config(config, "mllama")
    assert [layer.reason for layer in found.layers] == [None, "cross-attention", None, None]
    assert found.sparse_layers == (0, 2, 3) and not found.unknown_layers


def test_no_model_raises() -> None:
    class Alone(transformers.PreTrainedConfig):
        model_type = "alone"

    with pytest.raises(ModelError, match=r"^'m' is no causal language model: transformers has none for alone$"):
        inspect_config(Alone(), "m")


def test_a_model_that_fails_to_build_is_no_other_kind_of_model() -> None:
    config = transformers.AutoConfig.for_model("llama", **SMALL)
    config.num_attention_heads = 0
    with pytest.raises(ModelError, match=r"^'m' cannot be built without weights: \w+Error: .+") as caught:
        inspect_config(config, "m")
    assert "causal" not in str(caught.value)


def test_the_attention_that_a_configuration_asks_for_need_not_be_installed() -> None:
    for asked in ("flash_attention_2", "somebody/kernels"):
        found = inspected("llama", **SMALL, attn_implementation=asked)
        assert (found.implementation, found.sparse_layers) == ("sdpa", (0, 1, 2, 3))


@pytest.mark.parametrize("command", ["inspect", "plan"])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"max_position_embeddings": None}, {"num_attention_heads": 0}, {"layer_types": ["full_attention"] * 3},
        {"dtype": "float7"}, {"hidden_size": "64"}, {"max_position_embeddings": 4096.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_configuration_is_one_line(
    run: Run, tmp_path: Path, wrong: dict[str, Any], folder: bool, command: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SMALL, **wrong}), "utf-8")
    code, out, err = run(command, tmp_path if folder else path)
    assert (code, out) == (2, "")
    (said,) = [line for line in err.splitlines() if not line.endswith(" ...")]
    assert said.startswith("error: ") and ("configuration" in said or "cannot be built" in said)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A model that comes with code, which says that it ran."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig\n"
    code += "class Foreign(LlamaConfig):\n    model_type = 'foreign'\n"
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "conf.py").write_text(code, "utf-8")
    values = {"model_type": "foreign", "auto_map": {"AutoConfig": "conf.Foreign"}, **SMALL}
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("command", "part"),
    [(name, part) for name in ("inspect", "doctor", "plan") for part in ("", "config.json")] + [("search", "")],
)
def test_code_of_a_repository_does_not_run(
    run: Run, foreign: Path, monkeypatch: pytest.MonkeyPatch, command: str, part: str
) -> None:
    """transformers asks on stdin unless it is told: nobody is asked."""
    stdin = io.StringIO("y\ny\ny\n")
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setenv("HF_MODULES_CACHE", str(foreign.parent / "modules"))
    code, out, err = run(command, foreign / part)
    assert (code, out) == (2, "")
    said = err.splitlines()[-1]
    assert "needs code from its own repository" in said and "--trust-remote-code" in said
    assert stdin.tell() == 0 and "y/N" not in err
    assert not (foreign.parent / "ran").exists()


def test_a_model_class_of_a_repository_does_not_run(run: Run, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration is transformers' own, and only the model's code is foreign."""
    values = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "conf.Foreign"}}
    (foreign / "config.json").write_text(json.dumps(values), "utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    code, _, err = run("inspect", foreign)
    assert code == 2 and "needs code from its own repository" in err
    assert not (foreign.parent / "ran").exists()


def test_spans() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert spans([3]) == "3"
