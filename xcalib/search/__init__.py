"""Curves and targets to a profile. The package can be called: ``xcalib.search(model, data, target="density=0.25")``."""

import sys
import types
from typing import Any

from xcalib.search.evidence import add_evidence
from xcalib.search.gate import Verdict, judge, missed

# the submodule first: from here on xcalib.search.knapsack is the function
from xcalib.search.knapsack import Choice, knapsack, knapsack_min_cost
from xcalib.search.objectives import Objective, require_measured
from xcalib.search.paper import PaperResult, paper_thresholds
from xcalib.search.plan import Planned, SearchMethod, Tables, plan_point, uniform_thresholds
from xcalib.search.profiles import DEFAULT_CALIBRATION, CalibrationData, build_profile, search
from xcalib.search.refine import Refinement, refine_point
from xcalib.search.sequential import DEFAULT_ROUNDS
from xcalib.search.targets import DEFAULT_TARGETS, Target, parse_target, parse_targets

__all__ = [
    "DEFAULT_CALIBRATION",
    "DEFAULT_ROUNDS",
    "DEFAULT_TARGETS",
    "CalibrationData",
    "Choice",
    "Objective",
    "PaperResult",
    "Planned",
    "Refinement",
    "SearchMethod",
    "Tables",
    "Target",
    "Verdict",
    "add_evidence",
    "build_profile",
    "judge",
    "knapsack",
    "knapsack_min_cost",
    "missed",
    "paper_thresholds",
    "parse_target",
    "parse_targets",
    "plan_point",
    "refine_point",
    "require_measured",
    "search",
    "uniform_thresholds",
]


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
