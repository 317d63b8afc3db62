"""``xcalib bench``: times the kernels and their peers on this machine, and says from which length sparse attention wins."""

from xcalib.bench.plot import draw
from xcalib.bench.report import markdown, render
from xcalib.bench.run import run_bench
from xcalib.bench.suites import SUITES, Suite, suite_of
from xcalib.bench.summary import summarise

__all__ = ["SUITES", "Suite", "draw", "markdown", "render", "run_bench", "suite_of", "summarise"]
