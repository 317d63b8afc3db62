"""The figures that the paper prints in its ablations (XAttention, arXiv 2503.16428), as data.

Scores are averages over the RULER lengths 4k to 128k of Llama-3.1-8B, in percent; densities are shares of blocks, of the
32k column. The paper compares variants as they fall out, each at a density of its own.
"""

from dataclasses import dataclass

__all__ = ["PAPER", "SELECTION_SHARES", "Figure", "PaperTable"]

LEAST_GAP = 1.0  # points; what lies closer together in one run of RULER is not taken as an order


@dataclass(frozen=True)
class Figure:
    """One line of a table: RULER average in percent, and the share of blocks kept in [0, 1]."""

    score: float
    density: float


@dataclass(frozen=True)
class PaperTable:
    """One ablation.

    Attributes:
        title: which ablation of the paper this is.
        setting: what the figures were measured with.
        figures: by variant, as :class:`xcalib.ablate.variants.Variant` names it in ``figure``.
    """

    title: str
    setting: str
    figures: dict[str, Figure]

    def claims(self) -> list[tuple[str, str, float]]:
        """(better, worse, points between them) for every pair that lies at least ``LEAST_GAP`` apart."""
        ordered = sorted(self.figures.items(), key=lambda item: -item[1].score)
        pairs = [(first, second) for index, first in enumerate(ordered) for second in ordered[index + 1 :]]
        found = [(a[0], b[0], round(a[1].score - b[1].score, 2)) for a, b in pairs]
        return [claim for claim in found if claim[2] >= LEAST_GAP]


_FULL = Figure(88.47, 0.2097)  # S = 8, antidiagonal, minimum thresholds: the line that every table shares

PAPER = {
    "pattern": PaperTable(
        "Ablation: antidiagonal pattern",
        "Llama-3.1-8B, RULER, S = 8",
        {"antidiagonal": _FULL, "diagonal": Figure(81.06, 0.2447), "random": Figure(82.48, 0.2757)},
    ),
    "stride": PaperTable(
        "Ablation: stride sizes",
        "Llama-3.1-8B, RULER, antidiagonal",
        {"S=4": Figure(88.89, 0.2109), "S=8": _FULL, "S=16": Figure(88.08, 0.2793), "S=64": Figure(81.21, 0.3988)},
    ),
    "selection": PaperTable(
        "Ablation: block selection (Top-K, Top-Ratio, dynamic sparsity)",
        "Llama-3.1-8B, RULER, S = 8",
        {"threshold": _FULL, "top-k": Figure(84.13, 0.1992), "ratio": Figure(85.42, 0.21)},
    ),
    "threshold": PaperTable(
        "Ablation: minimum threshold prediction",
        "Llama-3.1-8B, RULER, S = 8; the fixed tau is 0.9",
        {"single tau": Figure(84.96, 0.2613), "published DP": _FULL},
    ),
}

# Selection over selection + attention, by stride: 9.3 of 9.3 + 13.9 ms and 3.6 of 3.6 + 14.3 ms.
SELECTION_SHARES = {8: 9.3 / (9.3 + 13.9), 16: 3.6 / (3.6 + 14.3)}
BREAKDOWN_TITLE = "Breakdown of prefill attention time"
