"""Fixtures that several test files share."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Before anything imports triton: without a GPU its kernels are tested in the interpreter, where a test asks for them by name;
# everything else stays on the reference backend.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["XCALIB_BACKEND"] = "reference"

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen3": {},
    "phi3": {},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 16, "num_hidden_layers": 3},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 64},
}
_SPECIAL["gemma3_text"]["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]


@pytest.fixture(autouse=True)
def _same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data function puts the working directory, here the checkout, on sys.path: its kernels/ is not Hugging Face's."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``xcalib ARGUMENTS`` in this process: exit code, stdout, stderr."""
    from xcalib.cli import main

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["xcalib", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Builds a tiny random causal language model: ``tiny_model("llama", seed=0, **config overrides)``.

    The families are llama, mistral, qwen3, phi3, gemma2, gemma3_text and gpt_oss: 2 or 3 layers, 4 query and 2 KV heads
    of 32 dimensions, 128 tokens; fp32, in eval mode. Weights are large enough for attention to be far from uniform.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def build(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
        settings = {**_COMMON, **_SPECIAL[family], **overrides}
        settings.setdefault("hidden_size", 16 * settings["num_attention_heads"])
        implementation = settings.pop("attn_implementation", None)
        config = transformers.AutoConfig.for_model(family, **settings)
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0.0, 0.15, generator=generator)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def tiny_folder(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``from_pretrained`` reads it: the tiny Llama with three layers, 512 tokens and 2048 positions, and a
    byte-level BPE tokenizer trained on some of the shipped prose, which adds a bos token."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    prose = Path(__file__).parent.parent / "xcalib" / "data" / "corpus" / "prose"
    bpe.train([str(file) for file in sorted(prose.glob("emma-*.txt"))], trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("tiny-model")
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder)
    model = tiny_model("llama", num_hidden_layers=3, vocab_size=bpe.get_vocab_size(), max_position_embeddings=2048)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_samples() -> Callable[..., Any]:
    """Makes a sample set of random tokens below 128: ``random_samples([300, 400], seed=0)``, one document a sample."""
    from xcalib.data import Sample, SampleSet

    def make(lengths: Sequence[int], seed: int = 0, split: str = "calibration") -> Any:
        rng = np.random.default_rng(seed)
        samples = [
            Sample(rng.integers(3, 128, length), "random", (f"{1000 * seed + index:016x}",))
            for index, length in enumerate(lengths)
        ]
        return SampleSet(tuple(samples), {}, ("random",), split, seed)  # type: ignore[arg-type]

    return make
