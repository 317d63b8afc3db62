"""Recipes: every option of a command can stand in one, each mistake is a line of its own, and a profile keeps its own."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main

from xcalib.cli.app import app
from xcalib.cli.recipes import NOT_KEPT, options_of
from xcalib.cli.refine import refine
from xcalib.cli.search import search
from xcalib.errors import ProfileError, RecipeError
from xcalib.interop import compare_profiles
from xcalib.profile import load_profile, make_profile, parse_profile, save_profile
from xcalib.recipe import Option, parse_recipe, read_recipe, recipe_text

Run = Callable[..., tuple[int, str, str]]
OPTIONS = options_of(search)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def flags_of(command: str) -> dict[str, Any]:
    """Long name -> parameter, as the command line itself knows them."""
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {}
    for parameter in commands[command].params:
        long = next((flag for flag in parameter.opts if flag.startswith("--")), parameter.name)
        found[long.removeprefix("--").replace("-", "_")] = parameter
    return {name: found[name] for name in found if name not in ("help", "recipe", "write_recipe")}


@pytest.mark.parametrize("name", ["search", "collect", "refine"])
def test_a_recipe_takes_exactly_what_the_command_takes(name: str) -> None:
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(options_of(commands[name].callback)) == set(flags_of(name))


OTHER: dict[str, Any] = {
    "model": "tiny",
    "out": "other.yaml",
    "target": ["chat:kl=0.5", "fast:density=0.2"],
    "data": ["builtin:prose@2", "ruler"],
    "heldout_data": ["text:*.md"],
    "lengths": "128,256",
    "method": "paper",
    "objective": "plain",
    "start_threshold": 0.5,
    "stride": 8,
    "block_size": 64,
    "pattern": "random",
    "order": "score",
    "curves": "some/curves",
    "work": "some/work",
    "device": "cpu",
    "device_map": "auto",
    "max_memory": "8G",
    "dtype": "bfloat16",
}


def another(name: str, option: Option) -> Any:
    """A value that the option takes and that is not its default."""
    if name in OTHER:
        return OTHER[name]
    return True if option.kind is bool else 77


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("hyphens", [False, True], ids=["_", "-"])
def test_every_option_of_search_can_be_given(name: str, hyphens: bool, run: Run) -> None:
    value = another(name, OPTIONS[name])
    key = name.replace("_", "-") if hyphens else name
    Path("r.yaml").write_text(recipe_text({key: value}, "one option"))
    code, _, err = run("search", "--recipe", "r.yaml", "--write-recipe", "all.yaml")
    assert code == 0, err
    values = read_recipe("all.yaml", OPTIONS)
    assert values[name] == value
    assert run("search", "--write-recipe", "default.yaml")[0] == 0
    assert read_recipe("default.yaml", OPTIONS).get(name) != value


def test_all_options_at_once_come_back(run: Run) -> None:
    everything = {name: another(name, option) for name, option in OPTIONS.items()}
    assert set(everything) == set(flags_of("search"))
    Path("r.yaml").write_text(recipe_text(everything, "all"))
    assert run("search", "--recipe", "r.yaml", "--write-recipe", "all.yaml")[0] == 0
    assert read_recipe("all.yaml", OPTIONS) == everything


def test_flags_override(run: Run) -> None:
    Path("r.yaml").write_text("model: one\nnum_samples: 3\ndata: [builtin, ruler]\nseed: 5\nmethod: paper\n")
    code, out, err = run(
        *("search", "two", "--recipe", "r.yaml", "--num-samples", 4, "-d", "builtin:code", "--method", "knapsack"),
        *("--json", "--write-recipe", "w.yaml"),
    )
    assert code == 0, err
    assert json.loads(out) == {"recipe": "w.yaml"}
    assert "wrote w.yaml, ran nothing; run it: xcalib search --recipe w.yaml" in err
    values = read_recipe("w.yaml", OPTIONS)
    assert (values["model"], values["num_samples"], values["data"]) == ("two", 4, ["builtin:code"])
    assert (values["seed"], values["method"]) == (5, "knapsack")


def test_an_empty_list_is_nothing_given(run: Run) -> None:
    Path("r.yaml").write_text("data: []\ntarget: []\nseed: 3\n")
    values = read_recipe("r.yaml", OPTIONS)
    assert values == {"seed": 3}
    assert parse_recipe(recipe_text(values, "again"), OPTIONS) == values
    assert run("search", "--recipe", "r.yaml", "--write-recipe", "w.yaml")[0] == 0


@pytest.mark.parametrize(
    ("recipe", "flags", "gone"),
    [
        ("max_length: 512\nmin_length: 100\n", ("--lengths", "1k,512"), {"max_length", "min_length"}),
        ("lengths: 1k,512\n", ("--max-length=600",), {"lengths"}),
        ("device: cpu\n", ("--device-map", "auto"), {"device"}),
        ("device_map: auto\n", ("--device", "cpu"), {"device_map"}),
    ],
)
def test_flags_take_the_place_of_what_they_go_without(
    recipe: str, flags: tuple[str, ...], gone: set[str], run: Run
) -> None:
    Path("r.yaml").write_text(recipe)
    assert run("search", "--recipe", "r.yaml", "--write-recipe", "kept.yaml")[0] == 0
    assert gone <= set(read_recipe("kept.yaml", OPTIONS))
    code, _, err = run("search", "--recipe", "r.yaml", *flags, "--write-recipe", "w.yaml")
    assert code == 0, err
    values = read_recipe("w.yaml", OPTIONS)
    assert not gone & set(values)
    assert flags[0].partition("=")[0].removeprefix("--").replace("-", "_") in values


def test_a_recipe_of_collect_and_of_refine(run: Run) -> None:
    Path("c.yaml").write_text("model: tiny\nout: curves\nmeasure: [mass]\n")
    assert run("collect", "--recipe", "c.yaml", "--write-recipe", "w.yaml")[0] == 0
    assert "measure:\n  - mass\n" in Path("w.yaml").read_text()
    assert run("collect", "--recipe", "w.yaml", "--out", "elsewhere", "--write-recipe", "v.yaml")[0] == 0
    assert "out: elsewhere\n" in Path("v.yaml").read_text()
    Path("f.yaml").write_text("profile: p.yaml\nrange: 0.5\nbin: 1\ntrials: 9\n")
    assert run("refine", "--recipe", "f.yaml", "--write-recipe", "u.yaml")[0] == 0
    assert read_recipe("u.yaml", options_of(refine))["range"] == 0.5
    code, _, err = run("collect", "--recipe", "f.yaml", "--out", "x", "tiny")
    assert code == 2
    assert err.startswith("error: f.yaml: line 1: profile: unknown key; ")


WRONG = {
    "num_sample: 3": "line 2: num_sample: unknown key; did you mean 'num_samples'?",
    "targets: kl=1": "line 2: targets: unknown key; did you mean 'target'?",
    "zzzzqqqq: 1": "line 2: zzzzqqqq: unknown key; known are model, out, target",
    "recipe: other.yaml": "line 2: recipe: unknown key",
    "num_samples: 0": "line 2: num_samples: must be greater than or equal to 1, got 0",
    "num_samples: many": "line 2: num_samples: must be a valid integer, got 'many'",
    "num_samples: 2.0": "line 2: num_samples: must be a valid integer, got 2.0",
    "num_samples: true": "line 2: num_samples: must be a valid integer, got True",
    "num_samples: [3]": "line 2: num_samples: must be a valid integer, got [3]",
    "start_threshold: 1.5": "line 2: start_threshold: must be less than or equal to 1, got 1.5",
    "start_threshold: 1e999": "line 2: start_threshold: must be a finite number, got inf",
    "resume: yes": "line 2: resume: must be a valid boolean, got 'yes'",
    "stride: 5": "line 2: stride: 5 is not one of 4, 8, 16, 32, 64",
    "method: greedy": "line 2: method: must be 'knapsack' or 'paper', got 'greedy'",
    "data: {a: 1}": "line 2: data: must be a valid list, got {'a': 1}",
    "data: nothing": "line 2: data: unknown data spec 'nothing'",
    "target: kl": "line 2: target: ",
    "lengths: 12": "line 2: lengths: must be a valid string, got 12",
    "lengths: 1k,x": "line 2: lengths: lengths '1k,x': expected token counts",
    "dtype: int8": "line 2: dtype: 'int8' is not one of auto, float32, float16, bfloat16",
    "seed: 3\nseed: 4": "line 3: duplicate key 'seed'",
    "num_samples: 3\nnum-samples: 4": "line 3: duplicate key num-samples: given as num_samples before",
    "data:\n  - builtin\n  - 3": "line 4: data[1]: must be a valid string, got 3",
    'out: "a\\0b"': "line 2: out: must be printable text",
    "device: ''": "line 2: device: must be printable text of 1 to 4,096 characters, got ''",
    "out: null": "line 2: out: must be a valid string, got None",
    "seed: &a 3": "line 2: anchors are not allowed",
    "seed: !!int 3": "line 2: tags are not allowed",
    "? [a]\n: 1": "line 2: a key must be text",
    "- 1": "line 2: not YAML",
}


@pytest.mark.parametrize("text", WRONG, ids=list(WRONG))
def test_mistakes_name_file_line_and_key(text: str, run: Run) -> None:
    Path("r.yaml").write_text(f"model: tiny\n{text}\n")
    code, out, err = run("search", "--recipe", "r.yaml")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: r.yaml: {WRONG[text]}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in OPTIONS if OPTIONS[name].low is not None])
def test_ranges_are_the_options_own(name: str) -> None:
    low: Any = OPTIONS[name].low
    kind = next((kind for kind in (get_args(OPTIONS[name].kind) or (OPTIONS[name].kind,)) if kind in (int, float)), int)
    assert parse_recipe(f"{name}: {kind(low)}", OPTIONS) == {name: low}
    with pytest.raises(RecipeError, match=f"line 1: {name}: must be greater than or equal to"):
        parse_recipe(f"{name}: {kind(low) - 1}", OPTIONS)


def test_files_that_are_no_recipe(run: Run) -> None:
    Path("empty.yaml").touch()
    for name, said in (("gone.yaml", "cannot be read: No such file"), (".", "not a file"), ("empty.yaml", "is empty")):
        code, _, err = run("search", "--recipe", name)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err


def test_a_recipe_may_be_json_and_null_leaves_an_option_out(run: Run) -> None:
    Path("r.json").write_text('{\n\t"model": "tiny",\n\t"max-length": null, "data": "ruler"}')
    assert read_recipe("r.json", OPTIONS) == {"model": "tiny", "data": ["ruler"]}


def test_nothing_is_overwritten(run: Run) -> None:
    Path("r.yaml").write_text("mine")
    assert "r.yaml: exists already" in run("search", "--write-recipe", "r.yaml")[2]
    assert Path("r.yaml").read_text() == "mine"
    assert "the folder no does not exist" in run("search", "--write-recipe", "no/r.yaml")[2]


# --- the profile's own recipe


def test_what_a_profile_keeps() -> None:
    assert NOT_KEPT & set(OPTIONS) == {name for name, option in OPTIONS.items() if not option.kept}
    kept = {name for name, option in OPTIONS.items() if option.kept}
    assert {"model", "target", "data", "seed", "rounds", "refine", "dtype"} <= kept
    assert not {"out", "work", "curves", "device", "json", "resume", "trust_remote_code"} & kept


SMALL = ["--data", "builtin:prose", "--num-samples", "2", "--block-size", "64", "--gain-samples", "1", "--rounds", "0"]


def test_a_search_is_repeated_from_its_profile(tiny_folder: Path, run: Run) -> None:
    Path("tiny").symlink_to(tiny_folder)
    arguments = ["search", "tiny", *SMALL, "--max-length", "256", "--heldout-samples", "1", "-t", "a:density=0.8"]
    code, _, err = run(*arguments, "--out", "first.yaml", "--work", "one")
    assert code == 0, err
    first = load_profile("first.yaml")
    assert first.recipe is not None
    assert {key: first.recipe[key] for key in ("model", "data", "target", "num_samples", "max_length")} == {
        "model": "tiny",
        "data": ("builtin:prose",),
        "target": ("a:density=0.8",),
        "num_samples": 2,
        "max_length": 256,
    }
    assert set(first.recipe) == {name for name, option in OPTIONS.items() if option.kept} - {
        "heldout_data",
        "lengths",
        "min_length",
    }
    code, _, err = run("search", "--recipe", "first.yaml", "--out", "again.yaml", "--work", "two")
    assert code == 0, err
    assert Path("again.yaml").read_bytes() == Path("first.yaml").read_bytes()
    assert compare_profiles(first, load_profile("again.yaml")).identical
    from_the_curves_of(first, run)


def from_the_curves_of(first: Any, run: Run) -> None:
    """With --curves the recipe says what they were measured with, not what else the options would."""
    code, _, err = run("search", "--curves", "one/curves", "-t", "a:density=0.8", "--out", "third.yaml")
    assert code == 0, err
    third = load_profile("third.yaml")
    assert third.recipe is not None
    same = ("model", "data", "num_samples", "seed", "gain_samples", "block_size", "stride", "max_length", "target")
    assert [third.recipe[key] for key in same] == [first.recipe[key] for key in same]
    assert "recipe.rounds" in [key for key, _, _ in compare_profiles(first, third).settings]


EXAMPLE = re.findall(
    r"```yaml\n(.*?)```", (Path(__file__).parent.parent / "docs" / "profile-format.md").read_text("utf-8"), re.DOTALL
)[0]


def with_recipe_of(recipe: dict[str, Any] | None) -> Path:
    """The documented example of a profile, with this recipe."""
    save_profile(make_profile(**{**dict(parse_profile(EXAMPLE)), "recipe": recipe}), "p.yaml")
    return Path("p.yaml")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (None, "is a profile that holds no recipe"),
        ({"model": "m", "trust_remote_code": True}, "trust_remote_code: unknown key"),
        ({"model": "m", "out": "/etc/x.yaml"}, "out: unknown key"),
        ({"model": "m", "data": ["os.path:join"]}, "data: 'os.path:join' is a function"),
        ({"model": "m", "heldout_data": ["evil:run"]}, "heldout_data: 'evil:run' is a function"),
        ({"model": "m", "num_samples": 0}, "num_samples: must be greater than or equal to 1"),
    ],
    ids=["none", "remote code", "out", "function", "held-out function", "range"],
)
def test_a_strangers_profile_cannot_ask_for_more(recipe: dict[str, Any] | None, said: str, run: Run) -> None:
    with_recipe_of(recipe)
    code, _, err = run("search", "--recipe", "p.yaml", "--write-recipe", "w.yaml")
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not Path("w.yaml").exists()


def test_a_recipe_does_not_change_older_files() -> None:
    path = with_recipe_of(None)
    assert "recipe" not in path.read_text()
    assert "recipe" not in load_profile(path).model_dump()


@pytest.mark.parametrize(
    "value", ["null", "[1]", "{a: 1}", "[[a]]", '"\\e[31m"', "''", "1e999", f"[{', '.join(65 * ['a'])}]", "-1"]
)
def test_a_profile_keeps_plain_values_only(value: str) -> None:
    text = EXAMPLE.replace("\ncontent_sha256", f"\nrecipe:\n  data: {value}\ncontent_sha256")
    with pytest.raises(
        ProfileError, match=r"line \d+: (recipe\.data: must|content_sha256: the content does not match)"
    ):
        parse_profile(text)


def test_a_recipe_is_part_of_the_content() -> None:
    recipe = {"model": "m", "data": ["a", "b"], "seed": 3, "start_threshold": 0.9, "flag": True}
    profile = load_profile(with_recipe_of(recipe))
    assert profile.recipe == recipe | {"data": ("a", "b")}
    assert profile.content_sha256 != parse_profile(EXAMPLE).content_sha256
    assert hash(profile) == hash(load_profile("p.yaml"))
    with pytest.raises(TypeError, match="immutable"):
        profile.recipe["seed"] = 4  # type: ignore[index]


def test_reading_recipes_needs_no_terminal_library() -> None:
    code = "import sys, xcalib.recipe; sys.exit(any(m in sys.modules for m in ('typer', 'rich', 'torch', 'optuna')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
