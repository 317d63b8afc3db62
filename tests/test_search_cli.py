"""``xcalib search`` with lengths, rounds and refinement together, and every command on the profile that has them all."""

import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xcalib.collect import CollectSettings, collect_lengths
from xcalib.collect.slopes import SlopeMeter
from xcalib.errors import XcalibWarning
from xcalib.profile import Profile, Refined, SearchRound, load_profile, make_profile, save_profile
from xcalib.search import build_profile, parse_targets, refine_point
from xcalib.search._meter import Meter

Run = Callable[..., tuple[int, str, str]]
DATA = ["--data", "builtin:prose", "--num-samples", "2", "--block-size", "64", "--gain-samples", "1"]
ONE = ["search", "tiny", *DATA, "--max-length", "384", "--heldout-samples", "1", "-t", "a:density=0.7"]
BOTH = ["search", "tiny", *DATA, "--lengths", "256,512", "--heldout-samples", "1", "-t", "a:density=0.8"]


@pytest.fixture(scope="module")
def workplace(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search-cli")
    (folder / "tiny").symlink_to(tiny_folder)
    return folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture
def searched(here: Path, run: Run) -> Path:
    """A profile of two bins from one search with rounds and refinement, made once."""
    if not Path("good.yaml").exists():
        code, out, err = run(*BOTH, "--rounds", 1, "--refine", 2, "--work", "both", "--out", "good.yaml", "--json")
        assert code == 0, err
        assert json.loads(out)["profile"] == "good.yaml"
        for length in (256, 512):
            assert f"{length} tokens: a: measuring what heads do to each other" in err
        for keys in ("192 to 362 keys", "363 to 512 keys"):
            assert f"a, {keys}:\n" in err
        assert err.count("trials: 2 complete, 0 pruned, 0 failed") == 2
        Path("stderr").write_text(err)
    return here / "good.yaml"


def test_lengths_rounds_and_refinement(searched: Path, run: Run) -> None:
    profile = load_profile(searched)
    assert (profile.method.order, len(profile.length_bins)) == ("recent", 2)
    rounds = profile.point().rounds
    assert rounds is None or (len(rounds) == 2 and all(len(tried) <= 1 for tried in rounds))
    said = sum(line.startswith("a, bin ") for line in Path("stderr").read_text().splitlines())
    assert said == sum(len(tried) for tried in rounds or ())
    assert profile.point().heldout is not None and profile.point().verified
    left = sorted(path.name for path in Path("both").iterdir() if not path.is_dir() or any(path.iterdir()))
    assert left == ["curves", "refine.journal"]  # nothing of the rounds, nor of the held-out samples


def full(profile: Profile) -> Profile:
    """The profile as if every round and trial had been a success."""
    one = SearchRound(expected=0.01, measured=0.012, others=0.013, density=0.79, taken=True)
    refined = Refined(
        trials=9, seed=0, dimensions=3, samples=2, validation_samples=8, least="kl", ratio=0.9, interval=(0.8, 0.97),
        confidence=0.95,
    )  # fmt: skip
    rounds = ((one, one.model_copy(update={"taken": False})), (one,))
    point = profile.point().model_copy(update={"rounds": rounds, "refined": (None, refined), "bound": None})
    return make_profile(**{**dict(profile), "points": (point,)})


@pytest.fixture
def everything(searched: Path) -> Path:
    save_profile(full(load_profile(searched)), "full.yaml")
    return searched.with_name("full.yaml")


def test_show_validate_and_diff(searched: Path, everything: Path, run: Run) -> None:
    code, out, err = run("show", everything)
    assert code == 0, err
    assert ", 2 of 3 rounds taken, refined by 9 trials; verified" in " ".join(out.split())
    code, out, _ = run("show", everything, "--json")
    (point,) = json.loads(out)["points"]
    assert [len(tried) for tried in point["rounds"]] == [2, 1]
    assert (point["refined"][0], point["refined"][1]["trials"]) == (None, 9)
    assert run("validate", everything, searched)[0] == 0
    code, out, err = run("diff", searched, everything, "--json")
    assert code == 0, err
    settings = {one["setting"]: one["b"] for one in json.loads(out)["settings"]}
    assert settings["a.rounds"] == "2 of 3 taken"
    assert settings["a.refined"] == "not, by 9 trials"
    assert "a.refined" in err and "no head moved" in err


def test_evaluate(everything: Path, run: Run) -> None:
    code, out, err = run("evaluate", "tiny", "--profile", everything, "--num-samples", 1, "--json")
    assert code == 0, err
    assert [part["length_bin"] for part in json.loads(out)["by_length"]] == [[192, 363], [363, 513]]


def test_convert(everything: Path, run: Run) -> None:
    profile = load_profile(everything)
    code, out, err = run(
        "convert", everything, "--to", "table", "--length", 512, "--out", "t.json", "--force", "--json"
    )
    assert code == 0, err
    (table,) = json.loads(Path("t.json").read_text()).values()
    assert tuple(map(tuple, table)) == profile.point().thresholds[1]
    assert json.loads(out)["order"] == "recent" and "note: these hold for the order of preference 'recent'" in err
    code, _, err = run("convert", everything, "--to", "config", "--config", "tiny", "--out", "c.json", "--force")
    assert code == 0, err
    block = json.loads(Path("c.json").read_text())["sparse_attention_config"]
    assert (block["order"], len(block["length_bins"])) == ("recent", 2)


@pytest.mark.parametrize("key", ["rounds", "refined"])
def test_one_entry_for_each_bin(everything: Path, run: Run, key: str) -> None:
    data = json.loads(load_profile(everything).model_dump_json())
    data["points"][0][key] = data["points"][0][key][:1]
    Path("short.json").write_text(json.dumps(data))
    code, _, err = run("validate", "short.json")
    assert code == 2
    assert f"points[0].{key}: 1 length bins, the profile has 2" in " ".join(err.split())


def test_refine_one_of_several_bins(everything: Path, run: Run) -> None:
    options = ["--model", "tiny", "--samples", 1, "--validation-samples", 2, "--heldout-samples", 1, "--work", "both"]
    command = ["refine", everything, *options, "--storage", "journal:one", "--trials", 2]
    code, out, err = run(*command, "--bin", 0, "--out", "r.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["trials"] == {"complete": 2, "pruned": 0, "failed": 0}
    assert load_profile("r.yaml").point().thresholds[1] == load_profile(everything).point().thresholds[1]
    code, _, err = run(*command, "--bin", 2, "--out", "r2.yaml")
    assert (code, err) == (
        2,
        "error: Invalid value for --bin: is 2, the profile has 2 length bins, from 0 (see xcalib refine --help)\n",
    )


def test_a_gain_in_one_bin_changes_what_is_predicted_there(
    tiny_model: Any, random_samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CollectSettings(stride=8, block_size=64, grid=(0.0, 0.4, 0.6, 0.8, 1.0), gain_samples=1)
    sets = [random_samples([256]), random_samples([512], seed=1)]
    model = tiny_model()
    curves = collect_lengths(model, sets, tmp_path, settings=settings)
    start = build_profile(curves, parse_targets(["a:density=0.8"]))
    before = np.asarray(start.point().thresholds[1])

    def measure(self: Meter, index: int, thresholds: np.ndarray) -> tuple[float, float]:
        return (0.05 + 0.01 * index) * float(np.exp(-np.abs(thresholds - before).mean())), 0.5

    monkeypatch.setattr(Meter, "_measure", measure)
    samples, validation = random_samples([500, 510], seed=2), random_samples([512] * 4, seed=3)
    found = refine_point(model, start, curves[1], samples, validation, trials=6, bin_index=1, price_range=3.0)
    assert found.improved and found.validation is not None
    old, new = start.point().predicted, found.profile.point().predicted
    assert old is not None and new is not None and old.by_length is not None and new.by_length is not None
    assert new.by_length[0] == old.by_length[0]
    assert new.by_length[1].kl == pytest.approx(old.by_length[1].kl * found.validation.ratio)
    assert new.kl == pytest.approx((new.by_length[0].kl + 2 * new.by_length[1].kl) / 3)  # over 256 and 512 tokens
    assert new.density == pytest.approx(old.density)
    refined = found.profile.point().refined
    assert refined is not None and refined[0] is None and refined[1] is not None


KILLED = """
import os, signal
from xcalib.cli import main
from xcalib.collect.slopes import SlopeMeter

measure, calls = SlopeMeter.measure, []

def dying(self, *arguments):
    calls.append(1)
    if len(calls) == 2:  # of two samples
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(self, *arguments)

SlopeMeter.measure = dying
main()
"""


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    measure, calls = SlopeMeter.measure, []

    def counted(self: SlopeMeter, *arguments: Any) -> Any:
        calls.append(1)
        return measure(self, *arguments)

    monkeypatch.setattr(SlopeMeter, "measure", counted)
    return calls


def test_rounds_that_were_killed_resume(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counting(monkeypatch)
    code, _, err = run(*ONE, "--rounds", 2, "--work", "whole", "--out", "whole.yaml")
    assert code == 0, err
    whole = len(calls)
    again = [*ONE, "--rounds", "2", "--work", "killed", "--out", "p.yaml"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *again], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL and not Path("p.yaml").exists()
    assert list(Path("killed/rounds").rglob("slopes-*"))
    code, _, err = run(*again)
    assert (code, "go on with --resume" in err) == (2, True)
    calls.clear()
    code, _, err = run(*again, "--resume")
    assert code == 0, err
    assert len(calls) == whole - 1
    assert Path("p.yaml").read_bytes() == Path("whole.yaml").read_bytes()
    assert not Path("killed/rounds").exists()


def test_a_miss_keeps_the_rounds(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate refuses what is near its target here."""
    calls = counting(monkeypatch)
    monkeypatch.setattr("xcalib.search.gate.DENSITY_TOLERANCE", 0.5)
    command = [*ONE, "--rounds", 1, "--work", "missed", "--out", "m.yaml"]
    assert run(*command)[0] == 3
    assert calls and list(Path("missed/rounds").rglob("slopes-*"))
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("default", XcalibWarning)  # the command prints it
        code, _, err = run(*command, "--resume", "--force")
    assert code == 0, err
    assert "kept, marked unverified" in " ".join(err.split())
    assert not calls and load_profile("m.yaml").point().verified is False
    assert not Path("missed/rounds").exists()


def test_rounds_that_are_left_out_are_said(here: Path, run: Run) -> None:
    code, _, err = run("collect", "tiny", *DATA, "--max-length", "384", "--out", "curves")
    assert code == 0, err
    left_out = "no rounds after the first search: "
    on_curves = ["search", "--curves", "curves", "-t", "a:density=0.7", "--overwrite"]
    for options, why in (
        ([], "they run MODEL"),
        (
            ["tiny", *DATA, "--max-length", "384", "--seed", 3, "--heldout-samples", 0],
            "these samples are not those of the",
        ),
        (["tiny", *DATA, "--max-length", "384", "--heldout-samples", 0], None),
        (["--rounds", 0], None),
        (["--method", "paper"], None),
    ):
        code, _, err = run(*on_curves, *options)
        assert code == 0, err
        assert (left_out in err) == (why is not None) and (why or "") in err


def test_the_published_order(here: Path, run: Run) -> None:
    code, _, err = run(*ONE, "--order", "score", "--rounds", 1, "--work", "score", "--out", "score.yaml")
    assert code == 0, err
    assert load_profile("score.yaml").method.order == "score"
    assert "order score" in err
