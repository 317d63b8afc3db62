"""Every fenced block of the README and of docs/ runs, or says why not and is checked all the same (docs_harness/).

One case for a page. Blocks of a page run in order in one folder, which holds:

- ``model/``, also as ``MODEL``, ``MODEL_FOLDER`` and ``Qwen/Qwen3-0.6B``: a tiny random Llama; ``demo`` is it too;
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
NOT_RUN = {"README.md": 2, "docs/large-models.md": 3, "docs/profiles.md": 3, "docs/reliability.md": 3}
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


def fence(code: str, language: str = "bash", before: str = "") -> str:
    return f"# Title\n\n{before}\n```{language}\n{code}\n```\n"


NOT_RUN_HERE = "<!-- not run: needs a GPU -->"
REFUSED = {
    "no language": (fence("x", ""), "p.md:4: a block without a language"),
    "unknown language": (fence("x", "fish"), "p.md:4: language 'fish' is unknown"),
    "nested": ("- item\n\n  ```fish\n  x\n  ```\n", "p.md:3: language 'fish' is unknown"),
    "in a tab": ('=== "Linux"\n\n    ```fish\n    x\n    ```\n', "p.md:3: language 'fish' is unknown"),
    "in an admonition": ("!!! note\n    text\n\n    ```fish\n    x\n    ```\n", "p.md:4: language 'fish' is unknown"),
    "indented": ("text\n\n    xcalib show\n", "p.md:3: indented code"),
    "no reason": (fence("x", before="<!-- not run: -->"), "p.md:3: must read <!-- not run: REASON -->"),
    "another form": (fence("x", before="<!-- not run, slow -->"), "p.md:3: must read <!-- not run: REASON -->"),
    "no block": (f"{NOT_RUN_HERE}\n\ntext\n\n{fence('ls')}", "p.md:1: 'not run' stands before no block"),
    "last": (NOT_RUN_HERE, "p.md:1: 'not run' stands before no block"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_pages_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(BlockError) as caught:
        blocks_of(text, "p.md")
    assert str(caught.value).startswith(message)


def test_blocks_are_found_wherever_they_stand() -> None:
    text = f"""# Title

{NOT_RUN_HERE}
```bash
one
```

1. item

    ```python title="two.py"
    two = 2
    ```

=== "Tab"

    !!! note "Inside"

        ```yaml
        # three.yaml
        three: 3
        ```

~~~json
4
~~~
"""
    found = [(block.language, block.line, block.code.split("\n")[0], block.file) for block in blocks_of(text, "p.md")]
    expected = [("bash", 5, "one", None), ("python", 11, "two = 2", "two.py")]
    assert found == [*expected, ("yaml", 19, "# three.yaml", "three.yaml"), ("json", 24, "4", None)]
    assert [block.not_run for block in blocks_of(text, "p.md")] == ["needs a GPU", None, None, None]


WRONG_NOT_RUN = {
    "option": (
        "xcalib search demo --targt kl=0.1",
        "p.md:5: xcalib search demo --targt kl=0.1: No such option: --targt",
    ),
    "command": ("xcalib serch demo", "p.md:5: xcalib serch demo: No such command 'serch'"),
    "value": (
        "ls\nxcalib collect M --out c \\\n    --max-length 32k",
        "p.md:6: xcalib collect M --out c --max-length 32k",
    ),
    "target": ("xcalib search demo --target speed", "p.md:5: xcalib search demo --target speed"),
    "pipe": ("ls | X=1 python -m xcalib show", "p.md:5: xcalib show: Missing argument"),
    "torchrun": ("torchrun --nproc-per-node 8 -m xcalib collect M", "p.md:5: xcalib collect M: Missing option"),
    "make": ("make demo\nmake denom", "p.md:6: make denom: the Makefile has no such target"),
    "extra": ("pip install 'xcalib[rapport]'", "p.md:5: pip install: xcalib has no extra rapport"),
    "path": ("torchrun docs/none.py", "p.md:5: docs/none.py: no such file in the checkout"),
    "syntax": ("for x in 1; do", "p.md:5: bash: "),
}


@pytest.mark.parametrize(("code", "message"), WRONG_NOT_RUN.values(), ids=WRONG_NOT_RUN)
def test_a_block_that_is_not_run_is_checked(code: str, message: str) -> None:
    (block,) = blocks_of(fence(code, before=NOT_RUN_HERE), "p.md")
    with pytest.raises(BlockError) as caught:
        docs_pages.check_not_run(block)
    assert str(caught.value).startswith(message)


def test_a_good_block_that_is_not_run() -> None:
    code = """# four hosts
torchrun --nnodes 4 --node-rank $NODE --nproc-per-node 8 -m xcalib collect MODEL --num-samples $N --out curves  # all
make demo DEMO_ARGS=--json && pip install -e '.[demo,hf]'
xcalib show p.yaml --json > p.json; xcalib search --help"""
    (block,) = blocks_of(fence(code, before=NOT_RUN_HERE), "p.md")
    docs_pages.check_not_run(block)


WRONG = {
    "program": ("make demo", "bash", "p.md:5: exit code 127"),
    "second line": ("ls\nxcalib show none.yaml\nls", "bash", "p.md:6: exit code 2; the block printed:"),
    "in a pipe": ("xcalib show none.yaml | cat", "bash", "p.md:5: exit code 2"),
    "console": ("$ xcalib validate profile.yaml\nprofile.yaml: valid\n$ cat none", "console", "p.md:7: exit code 1"),
    "assertion": ("a = 1\nassert a == 2, a", "python", "p.md:6: AssertionError: 1"),
    "warning": (
        "import warnings\nfrom xcalib.errors import XcalibWarning\nwarnings.warn('w', XcalibWarning)",
        "python",
        "p.md:7: XcalibWarning: w",
    ),
    "name": ("from xcalib import serch", 'python title="x.py"', "p.md:5: No module named 'xcalib.serch'"),
    "profile": ("schema_version: 1\nx: 2", "yaml", "p.md:5: <profile>: "),
    "recipe": ("model: demo\ntargets: kl=1", "yaml", "p.md:5: <recipe>: line 2: targets: unknown key"),
    "json": ('{"a": 1,}', "json", "p.md:5: "),
    "toml": ("a = ", "toml", "p.md:5: "),
}


@pytest.mark.parametrize(("code", "language", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_block_fails(page: docs_runner.Page, code: str, language: str, message: str) -> None:
    with pytest.raises(BlockError) as caught:
        page.run(blocks_of(fence(code, language), "p.md"))
    assert str(caught.value).startswith(message)


def test_blocks_share_folder_and_names(page: docs_runner.Page) -> None:
    text = fence(
        "xcalib show profile.yaml --json > shown.json\ncd notes && ls *.md | wc -l > ../count\nX=a; echo $X > ../x"
    )
    text += fence(
        "import json\nshown = json.load(open('shown.json'))\nassert shown['default_point'] == 'balanced'", "python"
    )
    text += fence("assert [p['name'] for p in shown['points']] == ['fidelity', 'balanced', 'fast']", "python")
    text += fence("import sys\nfrom xcalib.models.loading import load_config\n"
                  "print(load_config('demo').num_hidden_layers, *sys.argv[1:])", 'python title="own.py"')  # fmt: skip
    text += fence("python own.py --flag > own.txt 2>/dev/null\npython -c 'print(1 + 1)' | tee two")
    page.run(blocks_of(text, "p.md"))
    assert int((page.folder / "count").read_text()) == len(list((page.folder / "notes").glob("*.md")))
    texts = [(page.folder / name).read_text().strip() for name in ("x", "own.txt", "two")]
    assert texts == ["a", "3 --flag", "2"]


def test_no_page_is_left_out() -> None:
    names = docs_pages.pages()
    assert {"README.md", "docs/search.md", "docs/benchmarks/demo.md"} <= set(names)
    assert set(NOT_RUN) <= set(names)
    assert sum(len(blocks_of((ROOT / name).read_text("utf-8"), name)) for name in names) > 50
