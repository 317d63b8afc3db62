"""The likeliest mistakes: one line that says what is wrong, where, and what to do; exit code 2, no traceback, no file."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

Run = Callable[..., tuple[int, str, str]]
DOC = (Path(__file__).parent.parent / "docs" / "profile-format.md").read_text("utf-8")
OUT = ("--out", "new.yaml")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a new user works: a model, a profile of another model, a text too short, an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "tiny").symlink_to(tiny_folder)
    (tmp_path / "profile.yaml").write_text(re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)[0])
    (tmp_path / "notes.txt").write_text("Too short.\n")
    (tmp_path / "empty").mkdir()
    transformers.AutoConfig.for_model("llama", num_hidden_layers=2).to_json_file(tmp_path / "config.json")
    return tmp_path


def case(arguments: tuple[str, ...], *said: str, name: str) -> object:
    return pytest.param(arguments, said, id=name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        # MODEL
        case(("search", "dmo", *OUT), "no such folder or file here", "did you mean 'demo'?", name="misspelt demo"),
        case(("inspect", "tinny"), "did you mean 'tiny'?", name="misspelt folder"),
        case(
            ("search", "Qwen/Qwen9", *OUT), "as a Hugging Face id", "see its spelling (OWNER/NAME)", name="unknown id"
        ),
        case(("inspect", "empty"), "the folder holds no config.json", name="empty folder"),
        case(("search", "notes.txt", *OUT), "it is a file, and no .gguf", "'demo'", name="text for MODEL"),
        case(("search", "profile.yaml", *OUT), "a profile goes with --profile", name="profile for MODEL"),
        case(("search", "config.json", *OUT), "give its folder", name="config.json has no weights"),
        case(("search", "tiny/model.safetensors", *OUT), "give its folder, 'tiny'", name="weights for MODEL"),
        case(
            ("plan", "tiny/tokenizer.json"), "is not a model's configuration", "it has no model_type", name="other json"
        ),
        case(("search", "./gone", *OUT), "folder or file './gone' does not exist", name="missing path"),
        case(("search", *OUT), "give MODEL, or --curves FOLDER", "xcalib search --help", name="no MODEL"),
        # commands and options
        case(("serach", "tiny"), "Did you mean 'search'?", "(see xcalib --help)", name="misspelt command"),
        case(
            ("search", "tiny", "--traget", "kl=1"),
            "--traget",
            "--target",
            "xcalib search --help",
            name="misspelt option",
        ),
        case(("collect", "tiny"), "Missing option '--out'", "(see xcalib collect --help)", name="no --out"),
        case(("show",), "Missing argument 'FILE'", "(see xcalib show --help)", name="no FILE"),
        case(("evaluate", "tiny"), "give --profile FILE, --uniform TAU, --published TAU", name="nothing to evaluate"),
        case(("search", "tiny", "--stride", "12", *OUT), "12 is not one of 4, 8, 16, 32, 64", name="stride"),
        case(("search", "tiny", "--objective", "gains", *OUT), "gains", "tempered", name="objective"),
        # numbers
        case(("search", "tiny", "--target", "density=25", *OUT), "25 % is density=0.25", name="density in percent"),
        case(("search", "tiny", "--target", "0.25", *OUT), "density=", "as density=0.25", name="target without kind"),
        case(
            ("search", "tiny", "--target", "kl=low", *OUT),
            "'low' is no number",
            "kl=0.01",
            name="target without number",
        ),
        case(("evaluate", "tiny", "--uniform", "1.5"), "'--uniform'", "less than or equal to 1", name="tau above 1"),
        case(("evaluate", "tiny", "--uniform", "much"), "'--uniform'", "number", name="tau is no number"),
        case(
            ("search", "tiny", "--max-length", "9000000", *OUT), "2048 positions: choose at most 2048", name="too long"
        ),
        # data
        case(("search", "tiny", "--data", "bultin", *OUT), "did you mean 'builtin'?", "allowed:", name="misspelt spec"),
        case(
            ("search", "gone", "--data", "builtin:cod", *OUT), "did you mean 'code'?", "prose", name="misspelt category"
        ),
        case(("search", "gone", "--data", "ruler:sngle", *OUT), "did you mean 'single'?", name="misspelt task"),
        case(("search", "tiny", "--data", "text:gone.txt", *OUT), "no file or folder 'gone.txt'", name="missing text"),
        case(
            ("search", "tiny", "--data", "text:notes.txt", *OUT),
            "shorter than 2048 tokens",
            "add text",
            name="short text",
        ),
        # profiles, curves and output
        case(("show", "gone.yaml"), "gone.yaml: cannot be read: No such file", name="missing profile"),
        case(("show", "empty"), "empty: not a file", name="folder for a profile"),
        case(("show", "profile.yaml", "--point", "fast"), "no operating point 'fast'", "has: balanced", name="point"),
        case(("evaluate", "tiny", "--profile", "profile.yaml"), "the profile is for another model", name="other model"),
        case(
            ("search", "--curves", "empty", *OUT), "holds no curves.json; run 'xcalib collect' first", name="no curves"
        ),
        case(
            ("search", "tiny", "--out", "gone/new.yaml"), "the folder gone does not exist", name="no folder for --out"
        ),
        case(("search", "tiny", "--out", "new.txt"), "a profile ends in .yaml, .yml or .json", name="suffix of --out"),
        case(("search", "tiny", "--out", "profile.yaml"), "exists already", "--overwrite", name="--out exists"),
    ],
)
def test_one_line_with_the_next_step(run: Run, folder: Path, arguments: tuple[str, ...], said: tuple[str, ...]) -> None:
    before = sorted(folder.iterdir())
    code, out, err = run(*arguments)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (2, "")
    assert err.endswith(f"{line}\n") and "Traceback" not in err
    for part in said:
        assert part in line
    assert sorted(folder.iterdir()) == before


def test_an_extra_that_is_missing_is_named_with_the_pip_line(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "weights.gguf").touch()
    monkeypatch.setattr("xcalib.models.loading.find_spec", lambda name: None if name == "gguf" else object())
    code, _, err = run("inspect", "weights.gguf")
    assert (code, err.splitlines()[-1]) == (2, "error: GGUF weights need gguf: pip install 'xcalib[demo]'")


def test_retries_of_the_hub_are_not_said(run: Run) -> None:
    _, _, err = run("inspect", "Qwen/Qwen9")
    assert len(err.splitlines()) == 2  # what is being read, and the error
