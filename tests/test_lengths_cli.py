"""``--lengths`` on the command line: collect, search, evaluate, show, convert and diff, as a user types them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from xcalib.collect import load_curve_sets
from xcalib.profile import load_profile

Run = Callable[..., tuple[int, str, str]]
DATA = ["--data", "builtin:prose", "--num-samples", "1"]
METHOD = ["--block-size", "64", "--gain-samples", "1"]
SEARCH = ["search", "tiny", *DATA, *METHOD, "--lengths", "512,256", "--heldout-samples", "1", "-t", "one:density=0.8"]


@pytest.fixture(scope="module")
def workplace(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lengths-cli")
    (folder / "tiny").symlink_to(tiny_folder)
    return folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture
def found(here: Path, run: Run) -> Path:
    """A profile of two bins, searched once."""
    if not Path("good.yaml").exists():
        code, out, err = run(*SEARCH, "--out", "good.yaml", "--json")
        assert code == 0, err
        assert "256 tokens: Measuring 1 samples" in err and "512 tokens: Measuring 1 samples" in err
        assert "by length" in err
        assert len(json.loads(out)["points"][0]["predicted"]["by_length"]) == 2
    return here / "good.yaml"


def test_search(found: Path) -> None:
    profile = load_profile(found)
    assert [(part.min_length, part.max_length) for part in profile.length_bins] == [(192, 363), (363, 513)]
    assert profile.calibration.lengths == (256, 512)
    heldout = profile.point().heldout
    assert heldout is not None and heldout.by_length is not None
    assert [part.tokens for part in heldout.by_length] == [256, 512]
    assert (heldout.samples, heldout.tokens) == (2, 768)


def test_collect_then_search(here: Path, run: Run) -> None:
    code, out, err = run("collect", "tiny", *DATA, *METHOD, "--lengths", "256,512", "--out", "curves", "--json")
    assert code == 0, err
    assert "27 levels at 512 tokens" in err
    assert [part["length"] for part in json.loads(out)["by_length"]] == [256, 512]
    assert len(load_curve_sets("curves")) == 2
    assert run("search", "--curves", "curves", "-t", "a:kl=0.2", "--out", "a.yaml")[0] == 0
    code, _, err = run("search", "--curves", "curves", "-t", "a:density=0.5", "--out", "b.yaml")
    assert (code, Path("b.yaml").exists()) == (2, False)
    assert err.startswith("error: point a, at 256 tokens: target density=0.5 is out of reach")
    code, _, err = run("search", "--curves", "curves", "--lengths", "1k", "--out", "b.yaml")
    assert (code, err) == (
        2,
        "error: the curves are of 256,512 tokens: leave --lengths and --max-length out, or collect others\n",
    )
    code, _, err = run("collect", "tiny", *DATA, *METHOD, "--lengths", "256,1k", "--out", "curves", "--resume")
    assert code == 2
    assert "was started with other lengths (512)" in err


def test_one_length_looks_as_before(here: Path, run: Run) -> None:
    for name, length in (("by-lengths", ["--lengths", "256"]), ("by-max", ["--max-length", "256"])):
        code, _, err = run("collect", "tiny", *DATA, *METHOD, *length, "--out", name)
        assert code == 0, err
    files = [sorted(path.name for path in Path(name).iterdir()) for name in ("by-lengths", "by-max")]
    assert files[0] == files[1] == ["collect.json", "curves.json", "curves.safetensors", "journal.jsonl"]
    assert Path("by-lengths/curves.json").read_bytes() == Path("by-max/curves.json").read_bytes()


def test_evaluate_by_length(found: Path, run: Run) -> None:
    code, out, err = run("evaluate", "tiny", "--profile", found, "--num-samples", "1", "--json")
    assert code == 0, err
    parts = json.loads(out)["by_length"]  # without --lengths those of the calibration
    assert [(part["max_tokens"], part["length_bin"]) for part in parts] == [(256, [192, 363]), (512, [363, 513])]
    code, out, err = run(
        "evaluate", "tiny", "-p", found, "--num-samples", "2", "--lengths", "128,1k", "--uniform", "0.5", "--json"
    )
    assert code == 0, err
    short, long = json.loads(out)["by_length"]
    assert (short["length_bin"], long["length_bin"], long["extrapolated"]) == (None, [363, 513], True)
    assert [plan["name"] for plan in long["plans"]] == ["one", "tau=0.5"]
    for shown in ("by length", "no bin (dense)", "bin 363 to 512 +", "2 samples", "1,024"):
        assert shown in err
    code, out, err = run("evaluate", "tiny", *DATA, "--uniform", "0.5", "--lengths", "128,256", "--json")
    assert code == 0, err
    assert [part["samples"] for part in json.loads(out)["by_length"]] == [1, 1]


def test_show_convert_diff_validate(found: Path, run: Run) -> None:
    code, out, _ = run("show", found)
    assert code == 0
    for shown in ("192 to 362 keys; 363 to 512 keys", "counted as extrapolated", "256, 512 tokens", "held-out (1)"):
        assert shown in " ".join(out.split())
    assert run("validate", found)[0] == 0
    code, _, err = run("convert", found, "--to", "table", "--out", "t.json")
    assert code == 2
    assert err.endswith("give --length, of 192-362, 363-512\n")
    thresholds = load_profile(found).point().thresholds
    for length, index, noted in (("300", 0, False), ("512", 1, False), ("9000", 1, True)):
        code, out, err = run(
            "convert", found, "--to", "table", "--length", length, "--out", "t.json", "--force", "--json"
        )
        assert code == 0, err
        (table,) = json.loads(Path("t.json").read_text()).values()
        assert tuple(map(tuple, table)) == thresholds[index]
        assert ("note: 9,000 keys are beyond" in err) == noted
        assert json.loads(out)["length_bin"]["min_length"] == (192, 363)[index]
    code, _, err = run("convert", found, "--to", "config", "--config", "tiny", "--out", "c.json")
    assert code == 0, err
    block = json.loads(Path("c.json").read_text())["sparse_attention_config"]
    assert [part["max_length"] for part in block["length_bins"]] == [363, 513]
    code, out, err = run("diff", found, found)
    assert (code, "identical" in err) == (0, True)


def test_diff_has_the_figures_of_bins_that_both_have(found: Path, run: Run) -> None:
    assert run(*SEARCH, "-t", "two:density=0.9", "--work", "xcalib-out/tiny", "--resume", "--out", "other.yaml")[0] == 0
    code, out, err = run("diff", found, "other.yaml", "--point", "one:two", "--json")
    assert code == 0, err
    measures = {part["measure"]: part for part in json.loads(out)["points"][0]["measures"]}
    at = measures["predicted density, 363 to 512 keys"]
    assert at["a"] <= 0.8 < at["b"] <= 0.9
    assert "held-out KL, 192 to 362 keys" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "1k,", "--out", "new"], "error: lengths '1k,': expected token counts"),
        (["--lengths", "", "--out", "new"], "error: lengths '': expected token counts"),
        (["--lengths", "1k,1024", "--out", "new"], "error: lengths: 1,024 tokens are given twice"),
        (
            ["--lengths", "10,1k", "--out", "new"],
            "error: lengths: expected whole numbers of tokens, at least 64, got 10",
        ),
        (["--lengths", "1k,4k", "--out", "new"], "has 2048 positions: choose at most 2048"),
        (["--lengths", "1k", "--max-length", "1024", "--out", "new"], "is given together with --max-length"),
        (["--lengths", "1k,2k", "--min-length", "512", "--out", "new"], "is given together with --min-length"),
        (["--lengths", "1k", "2k", "--out", "new"], "2k"),
        (["--data", "text:short.txt", "--lengths", "1k,2k", "--num-samples", "2", "--out", "new"], "found 0 of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(here: Path, run: Run, arguments: list[str], said: str) -> None:
    Path("short.txt").write_text("A few words.\n")
    code, out, err = run("collect", "tiny", *DATA, *METHOD, *arguments)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert "Traceback" not in err
    assert not Path("new").exists()
