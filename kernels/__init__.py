"""Scoring, selection, block sparse attention and the threshold sweep: tensors in, tensors out, nothing about models.

Layout is that of torch's SDPA, ``(batch, heads, seq, head_dim)``; key and value may have fewer heads than the query
(grouped-query attention). The method is XAttention's (arXiv 2503.16428).
"""

if __name__ != "xcalib.kernels":
    raise ImportError(
        f"this folder is imported as 'xcalib.kernels', not as {__name__!r}: install xcalib (pip install -e .) and "
        "run tools from outside the checkout or through their own command (pytest, not python -m pytest)"
    )

from xcalib.kernels.api import (
    block_density,
    block_sparse_attention,
    estimate_blocks,
    select_blocks,
    sweep_thresholds,
    visible_blocks,
    xattention,
)
from xcalib.kernels.reference import SweepResult
from xcalib.kernels.varlen import xattention_varlen

__all__ = [
    "SweepResult",
    "block_density",
    "block_sparse_attention",
    "estimate_blocks",
    "select_blocks",
    "sweep_thresholds",
    "visible_blocks",
    "xattention",
    "xattention_varlen",
]
