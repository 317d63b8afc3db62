"""What the rule for ``kl`` targets is worth, simulated: ``python ship_gate.py`` prints the table of docs/search.md.

Samples' mean KLs are log-normal (sigma 0.6) around the true one, all with as many tokens; no GPU, no model.
"""

import numpy as np

from xcalib.evaluation.bootstrap import ratio_interval
from xcalib.search.gate import KL_LIMIT

TRIALS, SIGMA = 1000, 0.6


def missed(samples: np.ndarray, target: float) -> bool:
    """The rule of :func:`xcalib.search.judge`, for equal token counts."""
    interval = ratio_interval(samples, np.ones(len(samples)))
    assert interval is not None
    mean = float(samples.mean())
    return mean > target and (interval[0] > target or mean > KL_LIMIT * target)


def rates(count: int) -> tuple[float, ...]:
    """Shares of trials: the interval holds the true mean; refused at 1, 1.5 and 2 times the target."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(TRIALS):
        samples = random.lognormal(-(SIGMA**2) / 2, SIGMA, count)  # of mean 1
        low, high = ratio_interval(samples, np.ones(count)) or (np.nan, np.nan)
        found.append((low <= 1 <= high, *(missed(samples * times, 1.0) for times in (1.0, 1.5, 2.0))))
    return tuple(np.mean(found, axis=0))


if __name__ == "__main__":
    for count in (2, 6, 20, 50):
        print(f"| {count} |", " | ".join(f"{rate:.0%}" for rate in rates(count)), "|")
