"""One page about a profile, for whoever decides whether to ship it: HTML that works offline, PNGs of its charts, a Markdown card.

``inputs`` reads and checks what is given, ``heads``, ``front`` and ``evidence`` gather figures from it, ``charts`` turns figures
into Vega-Lite through Altair, ``page``, ``pictures`` and ``card`` write files. Needs the extra ``report``.
"""

from xcalib.report.attention import AttentionPicture, attention_pictures
from xcalib.report.card import write_card
from xcalib.report.inputs import Evaluated, Inputs, check_curves, published, read_evaluation, require_libraries
from xcalib.report.page import write_page
from xcalib.report.pngs import write_pngs
from xcalib.report.summary import Report, summarise

__all__ = [
    "AttentionPicture",
    "Evaluated",
    "Inputs",
    "Report",
    "attention_pictures",
    "check_curves",
    "published",
    "read_evaluation",
    "require_libraries",
    "summarise",
    "write_card",
    "write_page",
    "write_pngs",
]
