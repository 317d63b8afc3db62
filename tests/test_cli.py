"""The command line, in this process: whole jobs on a tiny model, and one line for everything that is wrong."""

import dataclasses
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from xcalib.cli import main, output
from xcalib.collect import load_curves
from xcalib.collect.curves import save_curves
from xcalib.collect.measure import Sweeper
from xcalib.collect.slopes import SlopeMeter
from xcalib.models.logits import LogitHead
from xcalib.profile import load_profile, make_profile, save_profile

CALIBRATION = ["--data", "builtin:prose", "--max-length", "448", "--num-samples", "2"]
METHOD = ["--block-size", "64", "--gain-samples", "1"]
QUICK = [*CALIBRATION, *METHOD, "--heldout-samples", "1", "--target", "density=0.75"]


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(run: Callable[..., tuple[int, str, str]]) -> Run:
    return lambda *arguments: Result(*run(*arguments))


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder but for ``tiny``, the model."""
    (tmp_path / "tiny").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder in which ``search tiny --json`` ran: ``good.yaml`` and ``xcalib-out``."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny").symlink_to(tiny_folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.chdir(folder)
        out, err = folder / "stdout", folder / "stderr"
        with out.open("w") as stdout, err.open("w") as stderr:
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            patch.setattr(sys, "argv", ["xcalib", "search", "tiny", *QUICK, "--out", "good.yaml", "--json"])
            main()
    return folder, Result(int(str(caught.value.code)), out.read_text(), err.read_text())


@pytest.fixture
def copied(finished: tuple[Path, Result], tiny_folder: Path, here: Path) -> Path:
    """A copy of that folder, and current."""
    shutil.copy(finished[0] / "good.yaml", here)
    shutil.copytree(finished[0] / "xcalib-out", here / "xcalib-out")
    return here


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for the model's."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tiny" not in path.relative_to(folder).parts[:1]]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- what works


def test_search(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    assert result.code == 0, result.err
    profile = load_profile(folder / "good.yaml")
    assert profile.model.name == "tiny"
    assert profile.method.order == "recent"
    assert profile.calibration.sources == ("builtin:prose",)
    assert [point.name for point in profile.points] == ["fidelity", "balanced", "fast"]
    for point in profile.points:
        assert point.heldout is not None
        assert (point.heldout.samples, point.heldout.tokens) == (1, 448)
        assert point.heldout.density == pytest.approx(point.predicted.density, abs=0.08)
        assert point.bound is not None
    assert profile.point().predicted.density <= 0.75
    assert not list(folder.rglob("*.tmp"))


def test_json_is_all_of_stdout(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    printed = result.json()
    assert printed.pop("profile") == "good.yaml"
    assert printed == load_profile(folder / "good.yaml").model_dump(mode="json")
    for part in ("Loading tiny", "Measuring 2 samples", "wrote good.yaml", "balanced: within"):
        assert part in result.err
    assert "\x1b" not in result.out + result.err


def test_search_prints_nothing_to_stdout(copied: Path, run: Run) -> None:
    result = run("search", "--curves", "xcalib-out/tiny/curves", "--target", "a:kl=0.1", "--out", "new.json")
    assert (result.code, result.out) == (0, "")
    profile = load_profile("new.json")
    assert profile.points[0].predicted.kl <= 0.1
    assert profile.points[0].heldout is None


def test_collect_then_search_without_a_model(here: Path, run: Run) -> None:
    collected = run("collect", "tiny", *CALIBRATION, *METHOD, "--order", "score", "--out", "curves", "--json")
    assert collected.code == 0, collected.err
    printed = collected.json()
    assert len(printed["grid"]) == len(printed["density"]) == len(printed["error"])
    assert (printed["density"][-1], printed["error"][-1]) == (1.0, 0.0)
    assert len(printed["gain"]) == 3
    assert "wrote curves: 3 layers x 4 heads" in collected.err
    for method in ("knapsack", "paper"):
        found = run(
            "search", "--curves", "curves", "-t", "a:density=0.8", "--out", f"{method}.yaml", "--method", method
        )
        assert found.code == 0, found.err
        profile = load_profile(f"{method}.yaml")
        assert profile.points[0].predicted.density <= 0.8
        assert (profile.points[0].bound is None) == (method == "paper")
        assert profile.method.order == "score"


def test_search_with_a_model_and_curves(copied: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other targets on curves that are there: no sample is measured again, evidence is."""
    monkeypatch.setattr(Sweeper, "measure", None)
    result = run(
        "search", "tiny", "--curves", "xcalib-out/tiny/curves", *QUICK, "-t", "one:density=0.9", "--out", "new.yaml"
    )
    assert result.code == 0, result.err
    point = load_profile("new.yaml").point("one")
    assert point.heldout is not None
    again = run("search", "tiny", *QUICK, "-t", "two:density=0.8", "--resume", "--out", "newer.yaml")
    assert again.code == 0, again.err


def test_resume_and_overwrite(copied: Path, run: Run) -> None:
    before = load_profile("good.yaml")
    result = run("search", "tiny", *QUICK, "--out", "good.yaml", "--resume", "--overwrite")
    assert result.code == 0, result.err
    assert load_profile("good.yaml") == before


def test_evaluate(copied: Path, run: Run) -> None:
    result = run("evaluate", "tiny", "--profile", "good.yaml", "--uniform", "0.5", "--num-samples", "2", "--json")
    assert result.code == 0, result.err
    printed = result.json()
    assert [plan["name"] for plan in printed["plans"]] == ["fidelity", "balanced", "fast", "tau=0.5"]
    assert (printed["samples"], printed["tokens"]) == (2, 896)  # the calibration's length and data
    assert printed["sources"] == ["builtin:prose"]
    kl = {plan["name"]: plan["kl"] for plan in printed["plans"]}
    assert kl["fidelity"] <= kl["balanced"] <= kl["fast"]
    for part in ("dense against sparse, held out", "balanced", "density by layer"):
        assert part in result.err


def test_evaluate_one_point_and_single_taus(copied: Path, run: Run) -> None:
    small = ["--num-samples", "1", "--max-length", "384"]
    one = run("evaluate", "tiny", "-p", "good.yaml", "--point", "fast", *small, "--json")
    assert [plan["name"] for plan in one.json()["plans"]] == ["fast"]
    taus = run("evaluate", "tiny", "--uniform", "0", "--uniform", "1", *small, "--data", "builtin:prose", "--json")
    assert [plan["name"] for plan in taus.json()["plans"]] == ["tau=0", "tau=1"]
    assert taus.json()["plans"][1]["kl"] == 0
    silent = run("evaluate", "tiny", "--uniform", "0.5", *small, "--data", "builtin:prose")
    assert (silent.code, silent.out) == (0, "")


def test_evaluate_with_answers(here: Path, run: Run) -> None:
    result = run(
        "evaluate",
        "tiny",
        "--uniform",
        "0.5",
        "--num-samples",
        "1",
        "--max-length",
        "512",
        "-d",
        "ruler:single",
        "--json",
    )
    assert result.code == 0, result.err
    assert result.json()["asking"] == 1
    assert result.json()["dense"]["accuracy"] == 0.0  # random weights know nothing


def test_validate(copied: Path, run: Run) -> None:
    (copied / "bad.yaml").write_text((copied / "good.yaml").read_text().replace("stride: 16", "stride: 17"))
    good = run("validate", "good.yaml", "--json")
    assert (good.code, good.json()) == (0, {"good.yaml": None})
    assert good.err.strip() == "good.yaml: valid"
    bad = run("validate", "good.yaml", "bad.yaml", "gone.yaml")
    assert (bad.code, bad.out) == (2, "")
    lines = bad.err.strip().splitlines()
    assert lines[0] == "good.yaml: valid"
    assert re.match(r"error: bad\.yaml.*stride.*17", lines[1])
    assert re.match(r"error: gone\.yaml: cannot be read", lines[2])
    assert len(lines) == 3


def test_show(copied: Path, run: Run) -> None:
    result = run("show", "good.yaml", "--point", "fast")
    assert (result.code, result.err) == (0, "")
    for part in (
        "tiny",
        "fidelity",
        "balanced",
        "fast",
        "predicted",
        "held-out",
        "fast: thresholds for 256 to 448 keys",
    ):
        assert part in result.out
    assert max(len(line) for line in result.out.splitlines()) <= 80
    printed = run("show", "good.yaml", "--json")
    assert printed.json() == load_profile("good.yaml").model_dump(mode="json")


@pytest.mark.parametrize("command", ["search", "collect", "evaluate", "validate", "show", "demo"])
def test_help_has_an_example(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert re.search(rf"Example: .*xcalib {command}", result.out)
    assert "--json" in result.out


def test_help_names_the_commands(run: Run) -> None:
    for arguments in ((), ("--help",)):
        result = run(*arguments)
        assert result.code == 0
        for command in ("search", "collect", "evaluate", "validate", "show", "demo"):
            assert command in result.out


# --- what does not


def assert_refused(result: Result, said: str) -> None:
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert result.err.count("error:") == 1
    last = result.err.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(said, last), last


COMMANDS = {"search": ["search", "tiny", *QUICK], "collect": ["collect", "tiny", *CALIBRATION, *METHOD, "--out", "new"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["search", "gone/away", *QUICK], "model 'gone/away' cannot be loaded", id="no such model"),
        pytest.param(["search", "./gone", *QUICK], r"'\./gone' does not exist", id="no such folder"),
        pytest.param(["collect", "/gone", "--out", "new"], "'/gone' does not exist", id="no such absolute folder"),
        pytest.param(["collect", "empty", "--out", "new"], "model 'empty' cannot be loaded", id="empty folder"),
        pytest.param(
            ["evaluate", "gone.gguf", "--uniform", "0.5"], "model file 'gone.gguf' does not exist", id="no gguf"
        ),
        pytest.param(["search", "tiny", "--device", "fast", *QUICK], "Expected one of cpu, cuda", id="device"),
        pytest.param(["search", "tiny", "--dtype", "int4", *QUICK], "'int4' is not one of auto, float32", id="dtype"),
        pytest.param([*COMMANDS["search"], "--out", "p.txt"], r"ends in \.yaml, \.yml or \.json", id="suffix"),
        pytest.param([*COMMANDS["search"], "--out", "a/p.yaml"], "the folder a does not exist", id="folder of out"),
        pytest.param([*COMMANDS["search"], "--out", "dir.yaml"], "is a folder", id="out is a folder"),
        pytest.param([*COMMANDS["search"], "--out", "there.yaml"], "exists already.*--overwrite", id="existing out"),
        pytest.param([*COMMANDS["search"], "-t", "density=2"], "expected a number above 0 and at most 1", id="target"),
        pytest.param(
            [*COMMANDS["search"], "-t", "quick"], "expected density=, kl=, drop= or speedup=", id="target word"
        ),
        pytest.param([*COMMANDS["search"], "--data", "what"], "unknown data spec 'what'", id="data"),
        pytest.param([*COMMANDS["search"], "--data", "text:gone"], "no file or folder 'gone'", id="no data"),
        pytest.param([*COMMANDS["search"], "--data", "builtin:x"], "unknown category 'x'", id="category"),
        pytest.param([*COMMANDS["search"], "--heldout-data", "what"], "unknown data spec 'what'", id="heldout data"),
        pytest.param(
            [*COMMANDS["search"], "--max-length", "4096"], "has 2048 positions: choose at most 2048", id="long"
        ),
        pytest.param([*COMMANDS["search"], "--max-length", "10"], "max-length", id="short"),
        pytest.param([*COMMANDS["search"], "--min-length", "500"], "1 <= min_length <= max_length", id="min above max"),
        pytest.param([*COMMANDS["search"], "--num-samples", "0"], "num-samples", id="no samples"),
        pytest.param([*COMMANDS["search"], "--num-samples", "many"], "num-samples", id="samples word"),
        pytest.param([*COMMANDS["search"], "--data", "text:small.txt"], "found 0 of", id="little data"),
        pytest.param([*COMMANDS["search"], "--method", "greedy"], "'greedy' is not one of", id="method"),
        pytest.param([*COMMANDS["search"], "--objective", "best"], "'best' is not one of", id="objective"),
        pytest.param([*COMMANDS["search"], "--start-threshold", "2"], "start-threshold", id="start threshold"),
        pytest.param([*COMMANDS["search"], "--stride", "5"], "5 is not one of 4, 8, 16, 32, 64", id="stride"),
        pytest.param([*COMMANDS["search"], "--block-size", "100"], "100 is not one of 64, 128", id="block"),
        pytest.param([*COMMANDS["search"], "--pattern", "zigzag"], "'zigzag' is not one of", id="pattern"),
        pytest.param([*COMMANDS["collect"], "--order", "newest"], "'newest' is not one of", id="order"),
        pytest.param([*COMMANDS["search"], "--curves", "gone"], "gone: holds no curves.json", id="no curves"),
        pytest.param([*COMMANDS["search"], "--fast"], "No such option: --fast", id="option"),
        pytest.param(["search"], "give MODEL, or --curves FOLDER", id="no model"),
        pytest.param(["search", "--curves", "empty"], "empty: holds no curves.json", id="curves alone"),
        pytest.param(["search", "tiny", "again"], "again", id="two models"),
        pytest.param(["collect", "tiny"], "--out", id="collect without out"),
        pytest.param(
            [*COMMANDS["collect"][:-1], "there.yaml"], r"there\.yaml: cannot be made", id="collect into a file"
        ),
        pytest.param(
            [*COMMANDS["collect"][:-1], "empty/.."], "is not empty and holds no collection", id="folder in use"
        ),
        pytest.param([*COMMANDS["collect"], "--data", "what"], "unknown data spec 'what'", id="collect data"),
        pytest.param(
            ["evaluate", "tiny"],
            "give --profile FILE, --uniform TAU, --published TAU",
            id="nothing to evaluate",
        ),
        pytest.param(["evaluate", "tiny", "--uniform", "1.5"], "uniform", id="tau"),
        pytest.param(["evaluate", "tiny", "--uniform", "0.5", "--resume"], "needs --work FOLDER", id="resume what"),
        pytest.param(["evaluate", "tiny", "-p", "gone.yaml"], r"gone\.yaml: cannot be read", id="no profile"),
        pytest.param(["evaluate", "tiny", "-p", "there.yaml"], r"there\.yaml", id="bad profile"),
        pytest.param(["validate"], "FILE", id="validate nothing"),
        pytest.param(["validate", "gone.yaml"], r"gone\.yaml: cannot be read", id="validate gone"),
        pytest.param(["validate", "empty"], "empty: not a file", id="validate a folder"),
        pytest.param(["show", "there.yaml"], r"there\.yaml", id="show bad"),
        pytest.param(["demo", "--seed", "-1"], "seed", id="seed"),
        pytest.param(["serach", "tiny"], "No such command 'serach'", id="command"),
    ],
)
def test_bad_input(here: Path, run: Run, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (here / "empty").mkdir()
    (here / "dir.yaml").mkdir()
    (here / "there.yaml").write_text("schema_version: 1\n")
    (here / "small.txt").write_text("Too little.")
    before = contents(here)
    assert_refused(run(*arguments), said)
    assert contents(here) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(
            ["evaluate", "tiny", "-p", "good.yaml", "--point", "quick"], "no operating point 'quick'", id="point"
        ),
        pytest.param(["show", "good.yaml", "--point", "quick"], "no operating point 'quick'", id="show point"),
        pytest.param(
            ["show", "good.yaml", "--point", "quick", "--json"], "no operating point 'quick'", id="json point"
        ),
        pytest.param(["search", "tiny", *QUICK, "--out", "new.yaml"], "already holds a collection", id="no resume"),
        pytest.param(
            ["search", "tiny", *QUICK, "--seed", "1", "--resume", "--out", "new.yaml"],
            "was started with another data",
            id="other seed",
        ),
        pytest.param(
            ["search", "tiny", *QUICK, "--stride", "8", "--resume", "--out", "new.yaml"],
            "was started with another settings",
            id="other stride",
        ),
        pytest.param(
            ["search", "--curves", "xcalib-out/tiny/curves", "-t", "density=0.1", "--out", "new.yaml"],
            "out of reach",
            id="out of reach",
        ),
        pytest.param(
            ["search", "--curves", "xcalib-out/tiny/curves", "-t", "drop=1%", "--out", "new.yaml"],
            "needs the model and samples with answers",
            id="drop without a model",
        ),
        pytest.param(
            ["evaluate", "tiny", "-p", "good.yaml", "--max-length", "4096"], "choose at most 2048", id="evaluate long"
        ),
        pytest.param(
            ["evaluate", "tiny", "-p", "good.yaml", "--num-samples", "1000"],
            "found .* of 1000 samples",
            id="little data",
        ),
    ],
)
def test_bad_input_beside_good_files(copied: Path, run: Run, arguments: list[str], said: str) -> None:
    before = contents(copied)
    assert_refused(run(*arguments), said)
    assert contents(copied) == before


def test_a_good_file_stays_when_overwriting_fails(copied: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (copied / "good.yaml").read_bytes()
    work = ["--out", "good.yaml", "--overwrite", "--work", "work"]
    assert_refused(run("search", "tiny", *QUICK, *work, "-t", "a:density=0.1"), "out of reach")
    assert (copied / "good.yaml").read_bytes() == before

    def broken(*_arguments: Any, **_options: Any) -> Any:
        raise OSError(28, "No space left on device", "good.yaml")

    monkeypatch.setattr("os.fsync", broken)
    result = run("search", "--curves", "xcalib-out/tiny/curves", "-t", "a:density=0.8", *work)
    assert_refused(result, r"good\.yaml: .*No space left on device")
    assert (copied / "good.yaml").read_bytes() == before
    assert not list(copied.glob(".*.tmp"))


# --- the ship gate


MISSING = ["search", "tiny", "--curves", "hopeful", *CALIBRATION, "--heldout-samples", "2", "-t", "a:kl=1e-5"]


@pytest.fixture
def hopeful(copied: Path) -> Path:
    """Beside ``good.yaml``, curves that promise a thousandth of the KL that comes out."""
    curves = load_curves("xcalib-out/tiny/curves")
    (copied / "hopeful").mkdir()
    save_curves(dataclasses.replace(curves, gain=curves.gain / 1000), copied / "hopeful")
    return copied


def test_a_missed_target_writes_nothing(hopeful: Path, run: Run) -> None:
    before = (hopeful / "good.yaml").read_bytes()
    replacing = run(*MISSING, "--out", "good.yaml", "--overwrite", "--json")
    assert (hopeful / "good.yaml").read_bytes() == before
    new = run(*MISSING, "--out", "new.yaml", "--resume")
    assert not (hopeful / "new.yaml").exists()
    assert not list(hopeful.glob(".*.tmp"))
    for result, place in ((replacing, r"good\.yaml stays as it was"), (new, r"new\.yaml is not written")):
        assert result.code == 3, result.err
        last = result.err.rstrip("\n").splitlines()[-1]
        measured = r"measured [\d.]+ nats per token, [\d.]+% above, 95% interval [\d.]+ to [\d.]+ \(2 samples\)"
        assert re.match(rf"error: a: kl=1e-05 missed on held-out data: {measured}; {place}: ", last), last
        for advice in ("--num-samples", "looser --target", "--resume --force"):
            assert advice in last
        assert "Traceback" not in result.err
    printed = replacing.json()
    assert printed["profile"] is None
    assert printed["verdicts"]["a"]["outcome"] == "missed"
    (point,) = printed["points"]
    assert point["verified"] is False
    assert 1e-5 < point["heldout"]["intervals"]["kl"][0] <= point["heldout"]["kl"]
    assert new.out == ""


@pytest.mark.filterwarnings("always::xcalib.errors.XcalibWarning")
def test_force_keeps_what_missed(hopeful: Path, run: Run) -> None:
    assert run(*MISSING, "--out", "kept.yaml").code == 3
    result = run(*MISSING, "--out", "kept.yaml", "--resume", "--force", "--json")
    assert result.code == 0, result.err
    assert "warning: a: kl=1e-05 missed on held-out data" in result.err
    assert "kept, marked unverified" in " ".join(result.err.split())
    point = load_profile("kept.yaml").point()
    assert point.verified is False
    assert point.heldout is not None and point.heldout.intervals is not None
    assert result.json()["points"][0]["verified"] is False
    checked = run("validate", "good.yaml", "kept.yaml")
    assert checked.code == 0
    assert checked.err.splitlines() == ["good.yaml: valid", "kept.yaml: valid; NOT verified: a (kl=1e-05)"]
    shown = run("show", "kept.yaml").out
    assert re.search(r"95% from +[\d.]+(e-\d+)? *\n +95% to ", shown)
    assert re.search(r"a: kl=1e-05 by [^:]*;\s+NOT\s+verified", shown)
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_met_targets_are_verified(finished: tuple[Path, Result], run: Run) -> None:
    folder, result = finished
    assert [point.verified for point in load_profile(folder / "good.yaml").points] == [True] * 3
    assert "balanced: density=0.75 met on held-out data: measured density 0." in result.err
    assert "balanced: density=0.75 by knapsack" in run("show", folder / "good.yaml").out


def test_no_heldout_data_no_verification(copied: Path, run: Run) -> None:
    result = run("search", "--curves", "xcalib-out/tiny/curves", "-t", "a:kl=0.1", "--out", "new.yaml")
    assert result.code == 0, result.err
    assert "a: kl=0.1: not verified: there are no held-out figures" in result.err
    assert load_profile("new.yaml").point().verified is False
    assert "new.yaml: valid; NOT verified: a (kl=0.1)" in run("validate", "new.yaml").err


def test_evaluation_shows_intervals(copied: Path, run: Run) -> None:
    small = ["-p", "good.yaml", "--point", "fast", "--max-length", "384", "--json"]
    two, one = (run("evaluate", "tiny", *small, "--num-samples", count) for count in ("2", "1"))
    low, high = two.json()["plans"][0]["kl_interval"]
    assert low <= two.json()["plans"][0]["kl"] <= high
    assert re.search(rf"95% from │ +│ +{low:.4f} │", two.err)
    assert "intervals are bootstrapped over samples" in " ".join(two.err.split())
    assert one.json()["plans"][0]["kl_interval"] is None
    assert "95%" not in one.err
    assert "no interval from 1 sample" in " ".join(one.err.split())


def other_model(folder: Path, name: str) -> Path:
    """The tiny model with another rope base."""
    other = folder / name
    shutil.copytree((folder / "tiny").resolve(), other)
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (other / "config.json").write_text(json.dumps(config))
    return other


def test_curves_and_profiles_of_another_model(copied: Path, run: Run) -> None:
    other_model(copied, "other")
    before = contents(copied)
    curves = ["--curves", "xcalib-out/tiny/curves", *QUICK, "--out", "new.yaml"]
    assert_refused(run("search", "other", *curves), r"the curves are of 'tiny' \(llama\), not of 'other'")
    assert_refused(run("evaluate", "other", "-p", "good.yaml"), "the profile was made with another config")
    assert contents(copied) == before


def test_weights_with_nan(here: Path, run: Run) -> None:
    from safetensors.numpy import load_file, save_file

    bad = here / "bad"
    shutil.copytree((here / "tiny").resolve(), bad)
    weights = load_file(bad / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"] = np.full_like(
        weights["model.layers.1.self_attn.k_proj.weight"], np.nan
    )
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    result = run("search", "bad", *QUICK, "--out", "new.yaml")
    assert_refused(result, "sample 0: layer 1 of LlamaForCausalLM cannot be measured")
    assert not (here / "new.yaml").exists()


def test_truncated_weights(here: Path, run: Run) -> None:
    bad = here / "bad"
    shutil.copytree((here / "tiny").resolve(), bad)
    data = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert_refused(run("search", "bad", *QUICK, "--out", "new.yaml"), "model 'bad' cannot be loaded")


def test_a_folder_without_a_tokenizer(here: Path, run: Run) -> None:
    bad = here / "bad"
    shutil.copytree((here / "tiny").resolve(), bad, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    assert_refused(run("search", "bad", *QUICK, "--out", "new.yaml"), "tokenizer of 'bad' cannot be loaded")


def test_evaluation_on_calibration_documents_is_not_possible(copied: Path, run: Run) -> None:
    """They are left out, even where the data has nothing else."""
    profile = load_profile("good.yaml")
    from xcalib.data import load_samples
    from xcalib.models.loading import load_tokenizer

    everything = load_samples(
        ["builtin:prose"], load_tokenizer("tiny"), num_samples=40, max_length=448, split="heldout"
    )
    calibration = {**profile.calibration.model_dump(), "documents": tuple(sorted(everything.documents))}
    save_profile(make_profile(**{**dict(profile), "calibration": calibration}), "all.yaml")
    assert_refused(
        run("evaluate", "tiny", "-p", "all.yaml"), "builtin:prose: no document is left for the heldout split"
    )


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, after: int) -> None:
    method, calls = getattr(owner, name), iter(range(after))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [(Sweeper, "measure", 1), (LogitHead, "prefill", 2), (SlopeMeter, "measure", 1), (LogitHead, "compare", 0)],
    ids=["samples", "gains", "rounds", "evidence"],
)
def test_interrupt_and_resume(
    finished: tuple[Path, Result],
    here: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    after: int,
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, after)
        stopped = run("search", "tiny", *QUICK, "--out", "new.yaml")
    assert stopped.code == 130
    assert "--resume" in stopped.err
    assert "Traceback" not in stopped.err
    assert not (here / "new.yaml").exists()
    resumed = run("search", "tiny", *QUICK, "--out", "new.yaml", "--resume")
    assert resumed.code == 0, resumed.err
    assert load_profile("new.yaml") == load_profile(finished[0] / "good.yaml")


def test_interrupted_evaluation(copied: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["evaluate", "tiny", "-p", "good.yaml", "--point", "fast", "--num-samples", "2", "--json"]
    for work, hint in (([], "give --work FOLDER"), (["--work", "work"], "run the same command with --resume")):
        with monkeypatch.context() as patch:
            interrupt(patch, LogitHead, "prefill", 3)
            stopped = run(*command, *work)
        assert (stopped.code, stopped.out) == (130, "")
        assert hint in " ".join(stopped.err.split())
    assert_refused(run(*command, "--work", "work"), "already holds a collection; go on with --resume")
    resumed, whole = run(*command, "--work", "work", "--resume"), run(*command)
    assert resumed.code == whole.code == 0
    assert resumed.json()["plans"][0]["kl"] == whole.json()["plans"][0]["kl"]


def test_brackets_in_names_are_no_markup_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(output, "console", terminal)
    with output.status("Reading the configuration of [/models]/one"):
        pass
    with output.progress("Measuring [/models]/two", 1) as advance:
        advance(1)
    dense = SimpleNamespace(perplexity=1.0, accuracy=None, accuracy_interval=None, seconds=1.0)
    found: Any = SimpleNamespace(
        dense=dense, plans=(), samples=1, skipped=0, asking=0, tokens=9, sources=("text:[/notes]",), confidence=0.95
    )
    terminal.print(output.evaluation_table(found, "[/models]/three"))
    said = terminal.file.getvalue()
    assert all(f"[/models]/{name}" in said for name in ("one", "two", "three")) and "text:[/notes]" in said


@pytest.mark.parametrize(
    ("number", "said"),
    [(999, "999"), (134_515_008, "135M"), (999_900_000, "1B"), (7_000_000_000, "7B"), (1.2e12, "1.2T")],
)
def test_short_counts(number: int, said: str) -> None:
    assert output.short_count(number) == said
