"""Names that a user may write and what is taken where none is given, for the command line to offer without importing torch.

The modules that act on a name import it from here, so that there is one list of each.
"""

from typing import Literal

__all__ = [
    "ABLATIONS",
    "BLOCK_SIZES",
    "DEFAULT_GROUPS",
    "DEFAULT_RANGE",
    "DEFAULT_ROUNDS",
    "DEFAULT_TRIALS",
    "DTYPE_NAMES",
    "PROFILE_SUFFIXES",
    "STRIDES",
    "TABLE_BLOCK_SIZE",
    "Measure",
    "Objective",
    "Order",
    "Pattern",
    "SearchMethod",
    "Sharding",
    "TargetKind",
]

Pattern = Literal["antidiagonal", "diagonal", "random", "rows"]
Order = Literal["score", "recent"]
STRIDES = (4, 8, 16, 32, 64)
BLOCK_SIZES = (64, 128)
TABLE_BLOCK_SIZE = 128  # tokens; the only one that the public implementation is called with
DTYPE_NAMES = ("float32", "float16", "bfloat16")

Measure = Literal["fisher", "mass"]  # what is measured only when asked for; each is an array of the curves
Objective = Literal["tempered", "gain", "plain", "fisher", "mass"]
SearchMethod = Literal["knapsack", "paper"]
PROFILE_SUFFIXES = (".yaml", ".yml", ".json")
TargetKind = Literal["density", "kl", "drop", "speedup"]
DEFAULT_ROUNDS = 2

DEFAULT_TRIALS = 40
DEFAULT_GROUPS = 8  # 19 trials know the slope along every direction; with more groups than that they know it along some
DEFAULT_RANGE = 1.0  # a block costs between 1/e and e times as much

Sharding = Literal["auto", "layers", "heads"]
ABLATIONS = ("pattern", "stride", "selection", "threshold", "breakdown")
