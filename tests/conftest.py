"""Fixtures that several test files share."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
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
# What is printed hangs on none of these of whoever runs the tests. A fixture would be late: a Rich console reads them when it is
# made, which for one of them is the first import of xcalib.cli.
for _name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_name, None)
if find_spec("triton") is not None:
    import triton  # noqa: F401  # it reads the variable once: at its first import, which is then not a test's that unset it

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


@pytest.fixture(scope="session")
def invented_curves() -> Callable[..., Any]:
    """Makes curves of any shape, with heads that differ: density rises with tau to 1, error falls to 0."""
    from xcalib.collect import DEFAULT_GRID, CollectSettings, Curves

    def make(
        measured: Sequence[int] = (0, 2, 3),
        layers: int = 4,
        heads: int = 4,
        length: int = 2048,
        seed: int = 0,
        **how: Any,
    ) -> Any:
        rng = np.random.default_rng(seed)
        shape, levels = (2, len(measured), heads), len(how.setdefault("grid", DEFAULT_GRID))
        kept = np.rint(100 + 900 * np.sort(rng.random((*shape, levels)), axis=-1)).astype(np.int64)
        kept[..., 0], kept[..., -1] = 100, 1000
        error = np.sort(rng.random((*shape, levels)), axis=-1)[..., ::-1] * np.exp(
            rng.normal(-3, 1.5, (1, *shape[1:], 1))
        )
        error[..., -1] = 0
        gain, gain_error = np.exp(rng.normal(-2, 1, len(measured))), np.full((1, len(measured)), 0.1)
        joint = np.array([[0.05, 0.01, 0.2]]).repeat(2, axis=0)
        identity = {"name": "invented", "commit": None, "model_type": "llama", "layers": layers, "query_heads": heads}
        record = {"sources": ["builtin"], "samples": 2, "min_length": length, "max_length": length, "seed": 0}
        record |= {"tokens_sha256": "cd" * 32, "documents": ["0123456789abcdef"], "gain_samples": 1, "dropped": {}}
        return Curves(
            settings=CollectSettings(block_size=64, gain_samples=1, **how),
            model=identity | {"kv_heads": heads, "head_dim": 64, "config_sha256": "ab" * 32},
            calibration=record,
            layers=tuple(measured),
            error=error,
            energy=np.exp(rng.normal(2, 0.3, shape[:2])),
            kept=kept,
            visible=np.full(2, 1000),
            tokens=np.full(2, length),
            gain=gain,
            gain_kl=gain * gain_error,
            gain_error=gain_error,
            joint_sum=joint,
            joint_kl=joint * 1.5,
        )

    return make


def _program(name: str) -> str | None:
    """A program of PostgreSQL's; Debian does not put them on PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name, reverse=True)
    return shutil.which(name) or next((str(path / name) for path in places if (path / name).is_file()), None)


class PostgreSQL:
    """A server on loopback with a data folder of its own, as a user who is not root; ``url`` is its database's, with password."""

    def __init__(self, folder: Path, initdb: str, postgres: str) -> None:
        self.folder, self._postgres = folder, postgres
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:  # it refuses to run as root
            import pwd

            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"postgresql://xcalib:secret@127.0.0.1:{self._port}/postgres"
        (folder / "password").write_text("secret")
        (folder / "password").chmod(0o644)
        command = [initdb, "-D", str(folder / "data"), "-U", "xcalib", "-A", "scram-sha-256", "--no-sync", "--locale=C"]
        command += ["--encoding=UTF8", f"--pwfile={folder / 'password'}"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, **self._user)
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        import psycopg

        options = ["-h", "127.0.0.1", "-p", str(self._port), "-k", "", "-F"]
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [self._postgres, "-D", str(self.folder / "data"), *options],
                cwd=self.folder, stdout=log, stderr=log, **self._user,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url).close()
                return
            except psycopg.OperationalError:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.folder / "log").read_text("utf-8")) from None
                time.sleep(0.05)

    def stop(self) -> None:
        """At once: connections are closed. Nothing committed is lost."""
        self._server.send_signal(signal.SIGINT)
        self._server.wait(60)

    def new_database(self) -> str:
        """An empty database; its URL."""
        import psycopg

        name = f"x{os.urandom(6).hex()}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type,unused-ignore]
        return self.url.removesuffix("postgres") + name


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A real server. Without PostgreSQL the test is skipped, and fails where XCALIB_REQUIRE_POSTGRES is 1."""
    programs = [_program(name) for name in ("initdb", "postgres")]
    if None in programs or find_spec("psycopg") is None:
        reason = "needs PostgreSQL (Debian's package postgresql) and psycopg"
        (pytest.fail if os.environ.get("XCALIB_REQUIRE_POSTGRES") == "1" else pytest.skip)(reason)
    with tempfile.TemporaryDirectory(prefix="xcalib-postgresql-", ignore_cleanup_errors=True) as folder:
        server = PostgreSQL(Path(folder), *(str(program) for program in programs))
        yield server
        server.stop()
