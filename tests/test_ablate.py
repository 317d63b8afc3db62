"""The ablations on a tiny model: what is measured, kept, drawn and refused."""

import copy
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xcalib import ablate
from xcalib.ablate import AblateSettings, breakdown, measure, searched
from xcalib.ablate import attention as ablate_attention
from xcalib.ablate import markdown as to_markdown
from xcalib.ablate.attention import VariantAttention
from xcalib.ablate.page import fill, load_results, main
from xcalib.ablate.report import sheets
from xcalib.ablate.variants import Scoring, Setting
from xcalib.collect import CollectSettings, collect
from xcalib.data import Sample
from xcalib.errors import AblationError, CurvesError, DataError, ModelError
from xcalib.models.logits import LogitHead

# Random weights spread their attention: high densities are what a tiny model has limits for.
SETTINGS = AblateSettings(densities=(0.76, 0.86), every=3, planning_samples=2, gain_samples=1, limit_seconds=0.0)
Ran = tuple[dict[str, dict[str, Any]], Path]


@pytest.fixture(scope="module")
def data(random_samples: Callable[..., Any]) -> tuple[Any, Any]:
    return random_samples([384, 384], seed=1), random_samples([384, 350, 384, 384, 370], seed=2, split="heldout")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def ran(model: Any, data: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """All tables, and the folder in which their JSON lies."""
    folder = tmp_path_factory.mktemp("ablations")
    found = dict(ablate.run_tables(ablate.TABLES, model, None, *data, SETTINGS, name="tiny", command="made here"))
    for name, result in found.items():
        (folder / f"{name}.json").write_text(json.dumps(result, allow_nan=False))
    return found, folder


def measured_with(model: Any, setting: Setting, tokens: Any, seed: int = 0) -> tuple[Any, VariantAttention]:
    with VariantAttention(model, setting, block_size=64, seed=seed) as sparse:
        return LogitHead(model).prefill(tokens).hidden, sparse


def setting(policy: Any, limit: float, pattern: Any = "antidiagonal") -> Setting:
    return Setting(Scoring(8, pattern, policy), np.full((2, 4), limit, dtype=np.float32))


# ------------------------------------------------------------------------------------------------------------ measuring


def test_variants_keep_what_they_say(model: Any, data: tuple[Any, Any]) -> None:
    import torch

    tokens = torch.tensor(data[1].samples[0].tokens)
    dense = LogitHead(model).prefill(tokens).hidden
    whole, sparse = measured_with(model, setting("threshold", 1.0), tokens)
    torch.testing.assert_close(whole, dense, rtol=1e-4, atol=1e-4)
    assert sparse.kept == sparse.visible == 2 * 4 * 21  # layers x heads x blocks of six rows
    _, sparse = measured_with(model, setting("top-k", 3), tokens)
    assert sparse.kept == 2 * 4 * (1 + 2 + 4 * 3)
    _, sparse = measured_with(model, setting("ratio", 0.5), tokens)
    assert sparse.kept == 2 * 4 * (1 + 2 + 2 + 2 + 3 + 3)
    assert model.config._attn_implementation == "sdpa"


def test_random_patterns_are_drawn_by_seed(model: Any, data: tuple[Any, Any]) -> None:
    import torch

    tokens = torch.tensor(data[1].samples[0].tokens)
    first, again, other = (
        measured_with(model, setting("threshold", 0.5, "random"), tokens, seed)[0] for seed in (0, 0, 7)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sliding_layers_stay_dense_and_are_left_out(tiny_model: Callable[..., Any], data: tuple[Any, Any]) -> None:
    gemma = tiny_model("gemma3_text")
    settings = AblateSettings(densities=(0.7,), every=3)
    result = ablate.run_table("selection", gemma, None, *data, settings)
    assert any("layers stay dense" in remark for remark in result["remarks"])
    top_k = next(variant for variant in result["variants"] if variant["name"] == "top-k")
    assert all(0 < one["density"] < 1 for one in top_k["settings"])


# -------------------------------------------------------------------------------------------------------------- results

KEYS = [
    *("format", "table", "command", "machine", "versions", "model", "settings", "data", "curves", "seconds"),
    *("paper", "agreement", "remarks"),
]
MEASURED_KEYS = ["variants", "equal_density", "orders", "dense_accuracy", "asking"]
ROW_KEYS = [
    *("density", "variant", "baseline", "reached", "limit", "measured_densities"),
    *("kl", "kl_interval", "kl_ratio", "kl_ratio_interval"),
    *("accuracy", "accuracy_interval", "accuracy_difference", "accuracy_difference_interval"),
]


@pytest.mark.parametrize("table", ablate.TABLES)
def test_the_json_holds_everything(table: str, ran: Ran) -> None:
    result = ran[0][table]
    timed = table == "breakdown"
    assert sorted(result) == sorted([*KEYS, *(("times", "tau", "backend", "comparable") if timed else MEASURED_KEYS)])
    assert (result["format"], result["table"], result["command"]) == (1, table, "made here")
    assert result["model"]["name"] == "tiny"
    assert result["data"]["heldout"]["samples"] == 5
    assert result["paper"]["source"] == "arXiv 2503.16428"
    assert (result["curves"] is not None) == (table == "threshold")
    for row in result.get("equal_density", ()):
        assert sorted(row) == sorted(ROW_KEYS)
        low, high = row["measured_densities"]
        assert low <= row["density"] <= high
        assert row["kl"] > 0
        assert row["kl_interval"][0] <= row["kl"] <= row["kl_interval"][1]


def test_pooled_figures_are_those_of_the_samples(ran: Ran) -> None:
    for variant in ran[0]["stride"]["variants"]:
        densities = [one["density"] for one in variant["settings"]]
        assert densities == sorted(densities)
        for one in variant["settings"]:
            assert min(one["kl_by_sample"]) <= one["kl"] <= max(one["kl_by_sample"])
            assert min(one["density_by_sample"]) <= one["density"] <= max(one["density_by_sample"])


def test_tables_share_their_measurements(ran: Ran) -> None:
    names = {"pattern": "antidiagonal S=8", "stride": "S=8", "selection": "threshold"}
    found = [
        next(variant["settings"] for variant in ran[0][table]["variants"] if variant["name"] == name)
        for table, name in names.items()
    ]
    assert all(one == found[0] for one in found)


def test_the_papers_tables_have_its_order_and_the_searches_that_of_their_curves(ran: Ran) -> None:
    orders = {
        table: {variant["order"] for variant in ran[0][table]["variants"]}
        for table in ("pattern", "stride", "selection", "threshold")
    }
    assert orders == {"pattern": {"score"}, "stride": {"score"}, "selection": {"score"}, "threshold": {"recent"}}
    said = [line for line in ran[0]["threshold"]["remarks"] if "order" in line]
    assert len(said) == 1
    assert said[0].startswith("all three lines prefer blocks in the order 'recent', which is ours")
    assert not any("order" in line for line in ran[0]["pattern"]["remarks"])


def test_curves_in_the_papers_order_compare_in_that(
    model: Any, data: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CollectSettings(stride=8, block_size=64, gain_samples=1, pattern="antidiagonal", order="score")
    curves = collect(model, data[0], tmp_path / "curves", settings=settings)
    used: list[Any] = []
    select = ablate_attention.select_blocks

    def record(*arguments: Any, **options: Any) -> Any:
        used.append(options["order"])
        return select(*arguments, **options)

    monkeypatch.setattr(ablate_attention, "select_blocks", record)
    result = ablate.run_table("threshold", model, None, *data, SETTINGS, curves=curves)
    assert {variant["order"] for variant in result["variants"]} == set(used) == {"score"}
    assert not any("order" in line for line in result["remarks"])


def test_searches_are_compared_at_one_density(ran: Ran) -> None:
    result = ran[0]["threshold"]
    rows = {row["variant"]: row for row in result["equal_density"] if row["density"] == 0.76}
    assert all(row["reached"] for row in rows.values())
    assert rows["single tau"]["limit"] is not None
    assert rows["ours"]["limit"] is None
    assert rows["ours"]["kl_ratio"] < 1  # thresholds by head beat one for all, even with random weights
    assert {variant["thresholds"] for variant in result["variants"]} == {"one", "paper", "knapsack"}


def test_cpu_times_come_as_ratios_and_with_a_warning(ran: Ran) -> None:
    result = ran[0]["breakdown"]
    assert not result["comparable"]
    assert result["agreement"] == ["Not compared with the paper: these are not a GPU's times."]
    assert [(row["length"], row["stride"]) for row in result["times"]] == [(384, 8), (384, 16)]
    for row in result["times"]:
        assert row["selection_ms"] is row["attention_ms"] is row["dense_prefill_ms"] is None
        parts = row["selection_over_dense"] + row["attention_over_dense"]
        assert row["selection_share"] == pytest.approx(row["selection_over_dense"] / parts)
        assert 0 < row["selection_share"] < 1
    assert breakdown.CPU_WARNING in to_markdown(result)


def test_gpu_times_are_held_against_the_paper() -> None:
    rows = [{"length": 4096, "stride": stride, "selection_share": share} for stride, share in ((8, 0.3), (16, 0.35))]
    (line,) = breakdown._agreement(rows)
    assert line == (
        "At 4,096 tokens selection takes 30% at S=8 (paper: 40%), 35% at S=16 (paper: 20%) of selection and attention; "
        "it does not fall from S=8 to S=16: DISAGREES."
    )
    rows[1]["selection_share"] = 0.2
    assert breakdown._agreement(rows)[0].endswith("it falls from S=8 to S=16: agrees.")


def test_random_figures_are_reported_as_undecided_or_worse_never_left_out(ran: Ran) -> None:
    orders = ran[0]["pattern"]["orders"]
    assert len(orders) == 2 * 2 * 3  # densities, strides, pairs
    assert len(ran[0]["pattern"]["agreement"]) == 1 + len(orders) + 1


def test_densities_out_of_reach_are_named(model: Any, data: tuple[Any, Any]) -> None:
    settings = AblateSettings(densities=(0.3, 0.8), every=3)  # the sink and the own block are 52 % of six rows
    result = ablate.run_table("selection", model, None, *data, settings)
    rows = {(row["variant"], row["density"]): row["reached"] for row in result["equal_density"]}
    assert all(sorted(row) == sorted(ROW_KEYS) for row in result["equal_density"])
    assert rows[("threshold", 0.8)] and not rows[("threshold", 0.3)]
    assert any("threshold is not compared at density 0.3: measured densities run from" in r for r in result["remarks"])
    assert "not reached" in to_markdown(result)


def test_one_heldout_sample_gives_no_verdict(model: Any, random_samples: Callable[..., Any]) -> None:
    heldout = random_samples([384], seed=3, split="heldout")
    settings = AblateSettings(densities=(0.7,), every=3)
    result = ablate.run_table("selection", model, None, random_samples([384], seed=1), heldout, settings)
    assert result["equal_density"][0]["kl_interval"] is None
    assert result["agreement"][0].startswith("Nothing is said about the paper: that takes 5")
    assert to_markdown(result)


def test_questions_are_scored(model: Any, data: tuple[Any, Any]) -> None:
    def asking(samples: Any) -> Any:
        asks = [Sample(one.tokens, one.source, one.documents, ("yes",), 2) for one in samples.samples[:-1]]
        return dataclasses.replace(samples, samples=(*asks, samples.samples[-1]))

    tokenizer = SimpleNamespace(decode=lambda _tokens, skip_special_tokens: "Yes." if skip_special_tokens else "")
    settings = AblateSettings(densities=(0.7,), every=3)
    result = ablate.run_table("selection", model, tokenizer, data[0], asking(data[1]), settings)
    assert (result["dense_accuracy"], result["asking"]) == (1.0, 4)
    for row in result["equal_density"]:
        assert (row["accuracy"], row["accuracy_interval"], row["accuracy_difference"]) == (1.0, (1.0, 1.0), 0.0)
    assert result["agreement"][-1].startswith("Task accuracy gives no verdict: 4 held-out samples ask something")


@pytest.mark.gpu
def test_a_gpu_gives_milliseconds_and_a_verdict(
    tiny_model: Callable[..., Any], random_samples: Callable[..., Any]
) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    heldout = random_samples([1024], seed=2, split="heldout")
    result = ablate.run_table("breakdown", tiny_model().cuda(), None, random_samples([1024]), heldout)
    assert (result["backend"], result["comparable"]) == ("triton", True)
    assert all(row[name] > 0 for row in result["times"] for name in row if name.endswith("_ms"))
    assert len(result["agreement"]) == len({row["length"] for row in result["times"]}) == 3
    assert breakdown.CPU_WARNING not in to_markdown(result)


# ----------------------------------------------------------------------------------------------------------- resumption


class Interrupted(VariantAttention):
    """Counts how many are made; stops at one."""

    made = 0
    stop = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        type(self).made += 1
        if type(self).made == type(self).stop:
            raise KeyboardInterrupt
        super().__init__(*arguments, **options)


def test_interrupted_work_goes_on(
    model: Any, data: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = AblateSettings(densities=(0.7,), every=3, planning_samples=2)

    def table(folder: Path, resume: bool) -> dict[str, Any]:
        return ablate.run_table("selection", model, None, *data, settings, folder=folder, resume=resume)

    monkeypatch.setattr(measure, "VariantAttention", Interrupted)
    Interrupted.made, Interrupted.stop = 0, 0
    whole = table(tmp_path / "whole", False)
    wanted = Interrupted.made
    Interrupted.made, Interrupted.stop = 0, 10
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path / "part", False)
    with pytest.raises(CurvesError, match="go on with --resume"):
        table(tmp_path / "part", False)
    Interrupted.made, Interrupted.stop = 0, 0
    resumed = table(tmp_path / "part", True)
    assert Interrupted.made == wanted - 9
    for key in ("variants", "equal_density", "orders", "agreement"):
        assert resumed[key] == whole[key]
    with pytest.raises(CurvesError, match="another settings"):
        ablate.run_table(
            "selection", model, None, *data, AblateSettings(every=5), folder=tmp_path / "part", resume=True
        )


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"densities": ()}, "densities are"),
        ({"densities": (0.2, 1.0)}, "expected numbers between 0 and 1"),
        ({"tau": 0.0}, "tau is 0"),
        ({"block_size": 32}, "block size is 32, allowed are 64, 128"),
        ({"stride": 7}, "stride is 7, allowed are 4, 8, 16, 32, 64"),
        ({"every": 2}, "every is 2, expected an odd number"),
        ({"planning_samples": 0}, "planning_samples is 0"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AblationError, match=message):
        AblateSettings(**options)


def test_samples_that_cannot_be_compared(model: Any, random_samples: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="a sample has 200 tokens, fewer than 256"):
        ablate.run_table("stride", model, None, random_samples([384]), random_samples([200], seed=5))
    with pytest.raises(DataError, match="were used to calibrate"):
        ablate.run_table("stride", model, None, random_samples([384]), random_samples([384]))
    with pytest.raises(AblationError, match=r"no variant comes down to density 0\.1"):
        settings = AblateSettings(densities=(0.1,))
        ablate.run_table("stride", model, None, random_samples([384]), random_samples([384], seed=5), settings)


@pytest.mark.parametrize(("length", "message"), [(512, "raise --max-length"), (128, "below 256, four blocks")])
def test_lengths_that_cannot_be_timed(length: int, message: str, model: Any, data: tuple[Any, Any]) -> None:
    with pytest.raises(AblationError, match=message):
        ablate.run_table("breakdown", model, None, *data, AblateSettings(lengths=(length,)))


def test_curves_of_another_method_or_model(
    model: Any, tiny_model: Callable[..., Any], data: tuple[Any, Any], tmp_path: Path
) -> None:
    settings = CollectSettings(stride=16, block_size=64, gain_samples=1)
    curves = collect(model, data[0], tmp_path / "curves", settings=settings)
    found = r"the curves have \(block size, stride, pattern\) \(64, 16, 'rows'\)"
    with pytest.raises(AblationError, match=found + r", this comparison has \(64, 8, 'antidiagonal'\)"):
        ablate.run_table("threshold", model, None, *data, SETTINGS, curves=curves)
    with pytest.raises(AblationError, match="the curves are of"):
        ablate.run_table("threshold", tiny_model("qwen3"), None, *data, SETTINGS, curves=curves)


def test_the_recurrence_has_no_state_above_its_start(
    model: Any, data: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CollectSettings(stride=8, block_size=64, gain_samples=1)
    curves = collect(model, data[0], tmp_path / "curves", settings=settings)
    monkeypatch.setattr(searched, "START", 0.3)
    found = searched.solve(curves, (0.9,), "paper", "published DP")
    assert len(found.thresholds) == 1  # both densities ask for more than the start gives
    assert found.thresholds[0] == pytest.approx(0.3)
    (remark,) = found.remarks
    assert remark.startswith("published DP: starts at tau 0.3 for every head, which keeps ")
    assert remark.endswith("it has no state at density 0.9")
    ours = searched.solve(curves, (0.8,), "knapsack", "ours")
    assert (len(ours.thresholds), ours.remarks) == (2, [])
    assert not searched.solve(curves, (0.2,), "knapsack", "ours").thresholds  # less than what is always kept


def test_a_model_that_cannot_be_sparse(tiny_model: Callable[..., Any], data: tuple[Any, Any]) -> None:
    with pytest.raises((AblationError, ModelError), match="no layer of this model can be sparse"):
        ablate.run_table("stride", tiny_model("gpt_oss"), None, *data, AblateSettings(densities=(0.7,)))


# ------------------------------------------------------------------------------------------------ terminal, page, picture


@pytest.mark.parametrize("table", ablate.TABLES)
def test_tables_fit_a_terminal(table: str, ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    result = copy.deepcopy(ran[0][table])
    for row in result.get("equal_density", ()):
        row["accuracy"] = 1.0  # the widest
    ablate.render(result, Console(width=80, highlight=False))
    shown = capsys.readouterr().out
    assert "…" not in shown
    for line in (*result["agreement"], *result["remarks"]):
        assert line in shown
    figures = [f"{figure['score']:.2f} at" for figure in result["paper"].get("figures", {}).values()]
    assert all(figure in shown for figure in figures)
    if table == "breakdown":
        assert breakdown.CPU_WARNING in shown


@pytest.mark.parametrize("table", ablate.TABLES)
def test_pictures(table: str, ran: Ran) -> None:
    pytest.importorskip("matplotlib")
    picture = ablate.draw(ran[0][table])
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) > 20_000


def test_without_matplotlib_the_extra_is_named(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AblationError, match=r"pip install 'xcalib\[bench\]'"):
        ablate.draw(ran[0]["stride"])


def test_sheets_have_cells_for_every_column(ran: Ran) -> None:
    for result in ran[0].values():
        for wide in (False, True):
            for sheet in sheets(result, wide=wide):
                assert all(len(row) == len(sheet.head) for row in sheet.rows)
                assert sheet.rows


def test_markdown_of_a_folder(ran: Ran, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found, folder = ran
    assert list(load_results(folder)) == list(ablate.TABLES)
    main([str(folder)])
    shown = capsys.readouterr().out
    assert shown.count("\n## ") + shown.startswith("## ") == len(ablate.TABLES)
    page = tmp_path / "page.md"
    marks = [f"Before.\n\n<!-- ablate tiny {table} -->\nstale figures\n<!-- end -->\n" for table in ablate.TABLES]
    page.write_text("\n".join([*marks, "<!-- ablate other stride -->\nkept\n<!-- end -->\n"]))
    (tmp_path / "figures").mkdir()
    for name in found:
        shutil.copy(folder / f"{name}.json", tmp_path / "figures")
    (tmp_path / "figures" / "stride.png").write_bytes(b"")
    for _ in range(2):  # the second time changes nothing
        main([str(tmp_path / "figures"), "--into", str(page), "--label", "tiny"])
    text = page.read_text()
    assert text.count("Before.") == len(ablate.TABLES)
    assert "stale figures" not in text and "kept" in text
    assert text.count(to_markdown(found["stride"])) == 1
    assert text.count("](figures/stride.png)") == text.count("![") == 1
    with pytest.raises(AblationError, match="has no '<!-- ablate new pattern -->'"):
        fill(text, "new", found, {}, "page.md")


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"table": "stride", "format": 99}', '{"table": "stride", "format": 1}']
)
def test_folders_without_results(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "stride.json").write_text(content)
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert str(caught.value.code).startswith("error: ")


# ------------------------------------------------------------------------------------------------------ the command line

QUICK = [
    "--data",
    "builtin:prose",
    "--max-length",
    "384",
    "--num-samples",
    "1",
    "--heldout-samples",
    "2",
    "--densities",
    "0.7",
]


def test_the_command(run: Callable[..., tuple[int, str, str]], tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "out"
    command = ["ablate", tiny_folder, "--table", "selection", "--out", out, *QUICK]
    code, shown, said = run(*command, "--md", tmp_path / "page.md", "--json")
    assert code == 0, said
    results = json.loads(shown)
    assert json.loads((out / "selection.json").read_bytes()) == results["selection"]
    assert results["selection"]["command"].startswith("xcalib ablate ")
    assert sorted(path.name for path in out.iterdir()) == ["selection.json", "selection.png"]
    assert (out / "selection.png").read_bytes().startswith(b"\x89PNG")
    assert "| top-k |" in (tmp_path / "page.md").read_text()
    assert "Nothing is said about the paper: that takes 5 held-out samples, here are 2." in said
    code, _, said = run(*command)
    assert (code, said.count("\n")) == (2, 1)
    assert "selection.json: exists already; choose another folder, or give --overwrite" in said
    code, _, said = run(*command, "--overwrite", "--no-png")
    assert code == 0, said


def test_help_has_an_example(run: Callable[..., tuple[int, str, str]]) -> None:
    code, shown, _ = run("ablate", "--help")
    assert code == 0
    assert "Example: " in shown and "xcalib ablate demo --table pattern" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "patterns"], "table 'patterns' is unknown, expected one of pattern, stride, selection, threshold"),
        ([], "give --table, one of pattern, stride"),
        (["--table", "stride", "--densities", "a,b"], "--densities is 'a,b', expected numbers"),
        (["--table", "stride", "--densities", "2"], "expected numbers between 0 and 1"),
        (["--table", "all", "--lengths", "x"], "--lengths is 'x'"),
        (["--table", "stride", "--stride", "5"], "'--stride': 5 is not one of 4, 8, 16, 32, 64"),
        (["--table", "stride", "--md", "missing/page.md"], "the folder missing does not exist"),
        (["--table", "stride", "--curves", "missing"], "missing: holds no curves.json"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, shown, said = run("ablate", "no-such-model", "--out", tmp_path / "out", *arguments)
    assert (code, shown, said.count("\n")) == (2, "", 1)
    assert said.startswith("error: ")
    assert message in said
