"""``xcalib ablate``: the paper's ablations on a model of yours, at equal density, with the paper's figures beside."""

from xcalib.ablate.plot import check_matplotlib, draw
from xcalib.ablate.report import markdown, render
from xcalib.ablate.run import run_table, run_tables
from xcalib.ablate.settings import AblateSettings
from xcalib.ablate.variants import TABLES, check_tables

__all__ = [
    "TABLES",
    "AblateSettings",
    "check_matplotlib",
    "check_tables",
    "draw",
    "markdown",
    "render",
    "run_table",
    "run_tables",
]
