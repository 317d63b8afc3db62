"""Every fenced block of the README and of docs/ runs, or says why not and is checked all the same (docs_harness/).

One case for a page. Blocks of a page run in order in one folder, which holds:

- ``model/``, also as ``MODEL``, ``MODEL_FOLDER`` and ``Qwen/Qwen3-0.6B``: a tiny random Llama with a tokenizer; ``demo`` is it too;
- ``profile.yaml``, made for it by ``xcalib search`` with the points fidelity, balanced and fast, and ``curves/`` beside it;
- ``notes/*.md`` and ``notes.txt``: prose; and a copy of ``docs/`` and ``profiles/`` where a block speaks of them.

Python blocks of a page share their names, which begin with ``model``, ``tokenizer``, ``inputs`` (a batch of one, as the
tokenizer gives it), ``query``, ``key``, ``value`` (8 and 2 heads of 64) and ``xcalib``.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).with_name("docs_harness")))  # by mode importlib a test's folder is not there

import docs_pages
import docs_runner
from docs_pages import ROOT, BlockError, blocks_of

import xcalib

# The most blocks of a page that may say that they are not run; of others OTHER_PAGES.
NOT_RUN = {"README.md": 2, "docs/large-models.md": 3, "docs/reliability.md": 3}
OTHER_PAGES = 2
POINTS = ("fidelity:density=0.9", "balanced:density=0.75", "fast:density=0.65")


@pytest.fixture(scope="session")
def docs_folder(tiny_folder: Path, tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every page's folder holds, made once."""
    folder = tmp_path_factory.mktemp("docs")
    model = folder / "model"
    shutil.copytree(tiny_folder, model)
    vocabulary = len(xcalib_tokenizer(model))
    tiny_model("llama", num_hidden_layers=3, vocab_size=vocabulary, max_position_embeddings=2**20).save_pretrained(
        model
    )
    (folder / "Qwen").mkdir()
    for name in ("MODEL", "MODEL_FOLDER"):
        (folder / name).symlink_to("model")
    (folder / "Qwen" / "Qwen3-0.6B").symlink_to("../model")
    prose = sorted((ROOT / "xcalib" / "data" / "corpus" / "prose").glob("*.txt"))
    (folder / "notes" / "more").mkdir(parents=True)
    for number, file in enumerate(prose[:12]):
        place = folder / "notes" / ("more" if number % 3 == 0 else "") / f"{file.stem}.md"
        place.write_text(file.read_text("utf-8")[:20_000], "utf-8")
    shutil.copy(prose[0], folder / "notes.txt")
    with pytest.MonkeyPatch.context() as patch:
        docs_runner.shrink(patch, model)
        targets = [word for point in POINTS for word in ("--target", point)]
        command = ["search", "demo", *targets, "--work", str(folder), "--out", str(folder / "profile.yaml")]
        done = docs_runner.in_process("xcalib", command, str(folder), {})
        assert done["code"] == 0, done["err"]
    assert all(point.verified for point in xcalib.load_profile(folder / "profile.yaml").points)
    return folder


def xcalib_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def page_folder(docs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page's own folder; ``demo`` is its model."""
    folder = tmp_path / "page"
    shutil.copytree(docs_folder, folder, symlinks=True)
    docs_runner.shrink(monkeypatch, folder / "model")
    return folder


@pytest.fixture
def page(page_folder: Path) -> docs_runner.Page:
    """Runs blocks there, with the names that Python blocks begin with."""
    from transformers import AutoModelForCausalLM

    tokenizer = xcalib_tokenizer(page_folder / "model")
    text = (page_folder / "notes.txt").read_text("utf-8")
    generator = torch.Generator().manual_seed(0)
    heads = {"query": 8, "key": 2, "value": 2}
    names = {name: torch.randn(1, count, 1024, 64, generator=generator) for name, count in heads.items()}
    names["model"] = AutoModelForCausalLM.from_pretrained(page_folder / "model").eval()
    names["tokenizer"] = tokenizer
    names["inputs"] = tokenizer(text, return_tensors="pt", truncation=True, max_length=640)
    return docs_runner.Page(page_folder, {**names, "xcalib": xcalib})


@pytest.mark.parametrize("name", docs_pages.pages())
def test_page(name: str, page: docs_runner.Page) -> None:
    blocks = blocks_of((ROOT / name).read_text("utf-8"), name)
    skipped = [block for block in blocks if block.not_run is not None]
    for block in skipped:
        print(f"{block.page}:{block.line}: not run: {block.not_run}")
    limit = NOT_RUN.get(name, OTHER_PAGES)
    assert len(skipped) <= limit, f"{name}: {len(skipped)} blocks are not run, {limit} may be (NOT_RUN)"
    if any("docs/" in block.code or "profiles/" in block.code for block in blocks):
        for part in ("docs", "profiles"):
            shutil.copytree(ROOT / part, page.folder / part)
    page.run(blocks)
