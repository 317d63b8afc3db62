"""Prompts from rows in the form of LongBench (arXiv 2308.14508): a long ``context``, a short ``input``, and ``answers``.

LongBench has one prompt for each of its data sets. These are shorter ones of the same purpose; what follows the context
depends on the row's ``dataset``, and so does the metric unless the row names one.
"""

from collections.abc import Mapping
from typing import Any

from xcalib.data._metrics import Metric

__all__ = ["context_of", "known_metric", "prompt"]

_QUESTION = "\n\nQuestion: {input}\nAnswer:"
_SUMMARY = "\n\nSummary:"
_ABOUT = "\n\nQuestion: {input}\nSummary:"
_EXAMPLES = "\n\n{input}"  # the context holds solved examples, the input is the next one
_CODE = "{input}"
_PARAGRAPH = "\n\nQuestion: Which of these paragraphs does the following text sum up? {input}\nAnswer:"
_COUNT = "\n\nQuestion: How many different paragraphs are there, repeated ones counted once?\nAnswer:"

_DATASETS: dict[str, tuple[str, Metric]] = {
    "narrativeqa": (_QUESTION, "f1"),
    "qasper": (_QUESTION, "f1"),
    "multifieldqa_en": (_QUESTION, "f1"),
    "multifieldqa_zh": (_QUESTION, "f1"),
    "hotpotqa": (_QUESTION, "f1"),
    "2wikimqa": (_QUESTION, "f1"),
    "musique": (_QUESTION, "f1"),
    "dureader": (_QUESTION, "rouge-l"),
    "gov_report": (_SUMMARY, "rouge-l"),
    "qmsum": (_ABOUT, "rouge-l"),
    "multi_news": (_SUMMARY, "rouge-l"),
    "vcsum": (_SUMMARY, "rouge-l"),
    "trec": (_EXAMPLES, "recall"),
    "triviaqa": (_EXAMPLES, "f1"),
    "samsum": (_EXAMPLES, "rouge-l"),
    "lsht": (_EXAMPLES, "recall"),
    "passage_count": (_COUNT, "recall"),
    "passage_retrieval_en": (_PARAGRAPH, "recall"),
    "passage_retrieval_zh": (_PARAGRAPH, "recall"),
    "lcc": (_CODE, "exact"),
    "repobench-p": (_CODE, "exact"),
}


def context_of(row: Mapping[str, Any]) -> str | None:
    """The long text of a row in this form, or None for any other row.

    Raises:
        ValueError: ``context`` or ``input`` is there and not a string.
    """
    if "context" not in row:
        return None
    for field in ("context", "input"):
        if not isinstance(row.get(field, ""), str):
            raise ValueError(f"field '{field}' is not a string")
    return str(row["context"])


def prompt(row: Mapping[str, Any]) -> str:
    """The context followed by what is asked; for data sets of other names ``input`` is a question if there is one."""
    question = str(row.get("input", "")).strip()
    ending, _ = _DATASETS.get(_dataset(row), (_QUESTION if question else "", None))
    if ending == _CODE:
        return f"{row['context']}{row.get('input', '')}"
    return f"{str(row['context']).rstrip()}{ending.format(input=question)}"


def known_metric(row: Mapping[str, Any]) -> Metric | None:
    """The one that stands for LongBench's metric of the row's data set; None for other data sets."""
    found = _DATASETS.get(_dataset(row))
    return found[1] if found else None


def _dataset(row: Mapping[str, Any]) -> str:
    # LongBench-E marks the same sets with an _e
    return str(row.get("dataset", "")).removesuffix("_e")
