"""Accuracy by task: grouped as the samples say, with intervals of their own, in the JSON and in the command's table."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xcalib.cli.by_task import task_table
from xcalib.cli.output import Console
from xcalib.data import RULER_TASKS, Sample, SampleSet, load_samples
from xcalib.evaluation.bootstrap import ratio_interval
from xcalib.evaluation.by_task import accuracy_by_task
from xcalib.evaluation.results import Evaluation, SampleResult, summarise
from xcalib.models.loading import load_model

Run = Callable[..., tuple[int, str, str]]


def sample(source: str, metric: str = "recall", asks: bool = True) -> Sample:
    answers = ("x",) if asks else ()
    return Sample(np.arange(4), source, (source,), answers, 8 if asks else 0, metric)  # type: ignore[arg-type]


def evaluation(samples: list[Sample], scores: list[list[float]], names: list[str]) -> Evaluation:
    """Of made-up measurements, but for the scores."""
    results = [
        SampleResult(
            kl=np.zeros((len(names), 3), dtype=np.float32),
            loss=np.ones(1 + len(names)),
            targets=np.array(3),
            density=np.full((len(names), 1, 1), 0.5),
            blocks=np.ones(len(names)),
            accuracy=np.array(row),
            seconds=np.ones(1 + len(names)),
        )
        for row in scores
    ]
    return summarise(names, results, SampleSet(tuple(samples), {}, ("given",), "heldout", 0))


NONE = float("nan")
SAMPLES = [sample("b"), sample("a"), sample("plain", asks=False), sample("b"), sample("b", "f1"), sample("b")]
SCORES = [[1.0, 0.0], [0.5, 0.25], [NONE, NONE], [1.0, 1.0], [0.3, 0.1], [0.0, 0.0]]


def test_samples_are_grouped_by_source_and_metric() -> None:
    found = evaluation(SAMPLES, SCORES, ["fast"]).tasks
    assert [(task.task, task.metric, task.samples) for task in found] == [
        ("b", "recall", 3),
        ("b", "f1", 1),
        ("a", "recall", 1),
    ]
    b, f1, a = found
    assert [(item.attention, item.accuracy) for item in b.accuracy] == [("dense", 2 / 3), ("fast", 1 / 3)]
    assert b.accuracy[1].interval == ratio_interval([0.0, 1.0, 0.0], [1, 1, 1])
    assert [(item.accuracy, item.interval) for item in a.accuracy] == [(0.5, None), (0.25, None)]
    assert [item.accuracy for item in f1.accuracy] == [0.3, 0.1]


def test_the_mean_over_tasks_weighted_by_samples_is_the_accuracy() -> None:
    found = evaluation(SAMPLES, SCORES, ["fast"])
    for place, accuracy in ((0, found.dense.accuracy), (1, found.plan("fast").accuracy)):
        pooled = sum(task.accuracy[place].accuracy * task.samples for task in found.tasks)
        assert pooled / sum(task.samples for task in found.tasks) == pytest.approx(accuracy)
    assert sum(task.samples for task in found.tasks) == found.asking


def test_no_question_no_task() -> None:
    assert accuracy_by_task(["fast"], np.array([[NONE, NONE]]), [sample("plain", asks=False)]) == ()
    assert evaluation([sample("plain", asks=False)], [[NONE]], []).to_dict()["tasks"] == ()


def test_json_has_the_tasks() -> None:
    printed = json.loads(json.dumps(evaluation(SAMPLES, SCORES, ["fast"]).to_dict(), allow_nan=False))
    assert printed["tasks"][2] == {
        "task": "a",
        "metric": "recall",
        "samples": 1,
        "accuracy": [
            {"attention": "dense", "accuracy": 0.5, "interval": None},
            {"attention": "fast", "accuracy": 0.25, "interval": None},
        ],
    }


def drawn(found: Evaluation, width: int = 100) -> str:
    console = Console(width=width, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(task_table(found))
    return console.export_text()


def test_table() -> None:
    text = drawn(evaluation(SAMPLES, SCORES, ["fast"]))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["b", "3", "66.7%", "33.3%"],
        ["", "", "0-100", "0-100"],
        ["b (f1)", "1", "30.0%", "10.0%"],
        ["a", "1", "50.0%", "25.0%"],
    ]
    assert "95% interval" in text
    alone = drawn(evaluation(SAMPLES[:2], SCORES[:2], ["fast"]))
    assert "no interval from 1 sample" in alone and "-100" not in alone


def test_table_fits_80_columns_with_three_points() -> None:
    names = ["fidelity", "balanced", "fast"]
    found = evaluation([sample("ruler:niah_multikey_3")] * 2, [[1.0] * 4, [0.5] * 4], names)
    text = drawn(found, width=80)
    assert all(name in text for name in (*names, "ruler:niah_multikey_3", "50-100"))


def test_many_plans_stand_below_each_other() -> None:
    names = ["fidelity", "balanced", *(f"published tau={tau}" for tau in (0.5, 0.6, 0.7, 0.8, 0.9))]
    text = drawn(evaluation([sample("ruler:vt")] * 2, [[1.0] * 8, [0.5] * 8], names), width=80)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows if row[0]] == ["dense", *names]
    assert rows[2:4] == [["fidelity", "75.0%"], ["", "50-100"]]
    assert "ruler:vt, 2" in text and "beside each task its samples" in text


# --- on the tiny model, from the command line


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def test_a_real_tokenizer_makes_all_13(tiny_folder: Path) -> None:
    tokenizer = load_model(str(tiny_folder)).tokenizer
    for split in ("calibration", "heldout"):
        made = load_samples(["ruler:all"], tokenizer, max_length=1_024, limit=1, split=split).samples  # type: ignore[arg-type]
        assert [sample.source for sample in made] == [f"ruler:{task}" for task in RULER_TASKS]
        for asked in made:
            assert 0.9 * 1_024 <= len(asked.tokens) + asked.max_new_tokens <= 1_024
            text = tokenizer.decode(asked.tokens, skip_special_tokens=True)
            assert re.search(r"\nAnswer: The [\w ,-]+ (is|are)$", text)
            assert all(answer in text for answer in asked.answers)


def test_evaluate_limit(here: Path, run: Run) -> None:
    code, out, err = run(
        "evaluate", "tiny", "--uniform", "0.5", "--max-length", "400", "-d", "ruler:single", "-d", "builtin:prose",
        "--limit", "2", "--json",
    )  # fmt: skip
    assert code == 0, err
    printed = json.loads(out)
    assert (printed["samples"], printed["asking"]) == (4, 2)
    assert [(task["task"], task["metric"], task["samples"]) for task in printed["tasks"]] == [
        ("ruler:single", "recall", 2),
    ]
    assert [item["attention"] for item in printed["tasks"][0]["accuracy"]] == ["dense", "tau=0.5"]
    assert "accuracy by task" in err and re.search(r"ruler:single +│ +2 │", err)


def test_without_a_question_there_is_no_table(here: Path, run: Run) -> None:
    code, out, err = run(
        "evaluate",
        "tiny",
        "--uniform",
        "0.5",
        "--max-length",
        "384",
        "-d",
        "builtin:prose",
        "--num-samples",
        "1",
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["tasks"] == [] and "accuracy by task" not in err


def test_evaluate_rows_with_metrics(here: Path, run: Run) -> None:
    """Every metric, from a file; with --resume another metric is another evaluation."""
    rows = [
        {
            "context": f"Number {n} is here. " * 12,
            "input": f"Which number {n}?",
            "answers": [f"{n}"],
            "dataset": dataset,
        }
        for n, dataset in enumerate(["hotpotqa", "samsum", "trec", "mine"] * 4)
    ]
    Path("qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "tiny", "--uniform", "0.5", "--max-length", "400", "-d", "jsonl:qa.jsonl", "--work", "work"]
    code, out, err = run(*command, "--limit", "1", "--json")
    assert code == 0, err
    found = {task["task"].partition("#")[2]: task["metric"] for task in json.loads(out)["tasks"]}
    assert found.items() <= {"hotpotqa": "f1", "samsum": "rouge-l", "trec": "recall", "mine": "recall"}.items()
    assert len(found) >= 2
    again = run(*command, "--limit", "1", "--json", "--resume")
    assert (again[0], again[1]) == (0, out)
    Path("qa.jsonl").write_text("".join(json.dumps(row | {"metric": "exact"}) + "\n" for row in rows))
    code, _, err = run(*command, "--limit", "1", "--resume")
    assert code == 2 and "was started with another questions" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--limit", "0"], "limit"),
        (["--limit", "few"], "limit"),
        (["-d", "ruler:niah"], "unknown task 'niah'"),
        (["-d", "jsonl:bad.jsonl", "--limit", "2"], "unknown metric 'bleu'"),
    ],
)
def test_bad_input_is_one_line(here: Path, run: Run, options: list[str], said: str) -> None:
    Path("bad.jsonl").write_text(json.dumps({"text": "words", "answers": ["x"], "metric": "bleu"}) + "\n")
    code, out, err = run("evaluate", "tiny", "--uniform", "0.5", *options)
    assert code == 2 and out == ""
    assert said in err and "Traceback" not in err
