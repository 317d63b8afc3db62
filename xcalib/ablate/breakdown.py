"""Selection time against attention time, on the queries and keys of a real prefill.

Inside one forward pass every layer's own tensors go through the kernels as a served model runs them: scoring and selection in one
call, then attention; and dense attention beside them. Each is timed by itself, the layers are added up, and both are set against
the whole prefill. On CUDA the times are those of events; on a CPU only ratios are given: there the reference kernels run, and
what they cost says nothing about a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from xcalib.ablate.paper import BREAKDOWN_TITLE, SELECTION_SHARES
from xcalib.bench.data import Inputs
from xcalib.bench.parts import Parts
from xcalib.bench.timing import measure
from xcalib.collect.units import Units
from xcalib.data import SampleSet
from xcalib.errors import AblationError
from xcalib.kernels import backends
from xcalib.kernels.geometry import Geometry
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.logits import LogitHead
from xcalib.models.placement import input_device
from xcalib.models.sparse import SparseAttention, SparsePlan
from xcalib.progress import Progress

__all__ = ["CPU_WARNING", "PARTS", "TimingSettings", "measure_breakdown"]

PARTS = ("scoring", "choosing", "attention", "dense")
CPU_WARNING = (
    "THESE ARE CPU TIMES OF THE REFERENCE KERNELS: they say nothing about a GPU, so only ratios are given and none is held "
    "against the paper. Run this table on a CUDA machine."
)

Record = dict[str, Any]


@dataclass(frozen=True)
class TimingSettings:
    """What is timed.

    Attributes:
        lengths: tokens, ascending.
        strides: S of the scoring.
        block_size: tokens per block (B).
        tau: of all heads.
        limit_seconds: about so long for the repetitions of one call of one layer; at least three are made.
    """

    lengths: tuple[int, ...]
    strides: tuple[int, ...]
    block_size: int
    tau: float
    limit_seconds: float


class _Clock:
    """Sees every attention call of one dense forward pass and times the parts on its tensors, for every stride."""

    def __init__(self, settings: TimingSettings, advance: Callable[[int], None]) -> None:
        self._settings = settings
        self._advance = advance
        self.milliseconds = {stride: dict.fromkeys(PARTS, 0.0) for stride in settings.strides}
        self.density: dict[int, list[float]] = {stride: [] for stride in settings.strides}
        self.layers = 0
        self.backend = ""

    def __call__(self, call: AttentionCall) -> None:
        self._advance(1)
        if call.dense_reason is not None:
            return
        self.layers += 1
        inputs = Inputs(call.query.contiguous(), call.key.contiguous(), call.value.contiguous())
        tensors = (inputs.query, inputs.key, inputs.value)
        self.backend = backends.resolve(None, *tensors)
        length, dim = call.query.shape[2:]
        parts = Parts(self.backend, Geometry(length, call.key.shape[2], self._settings.block_size, True), dim)
        options: Record = {
            "is_causal": True,
            "enable_gqa": call.query.shape[1] != call.key.shape[1],
            "scale": call.scale,
        }
        dense = self._time(lambda: functional.scaled_dot_product_attention(*tensors, **options), call)
        thresholds = torch.full((call.query.shape[1],), self._settings.tau)
        for stride, spent in self.milliseconds.items():
            choose = parts.choose(inputs, thresholds, stride, "native")
            selected = parts.selected(choose())
            self.density[stride].append(selected.density(parts.geometry))
            spent["scoring"] += self._time(parts.scoring(inputs, stride), call)
            spent["choosing"] += self._time(choose, call)
            spent["attention"] += self._time(parts.attention(inputs, selected), call)
            spent["dense"] += dense

    def _time(self, run: Callable[[], object], call: AttentionCall) -> float:
        return measure([run], call.query.device, self._settings.limit_seconds).median_ms


def measure_breakdown(
    model: Any, heldout: SampleSet, settings: TimingSettings, units: Units, progress: Progress
) -> Record:
    """The breakdown table, as JSON values.

    Raises:
        AblationError: no sample is as long as a length, or a length is shorter than four blocks, or no layer can be sparse.
    """
    tokens = max((sample.tokens for sample in heldout.samples), key=len)
    _check(settings, len(tokens))
    device = input_device(model)
    depth = int(model.config.get_text_config().num_hidden_layers)
    rows: list[Record] = []
    backend = ""
    with progress(f"Timing {len(settings.lengths)} lengths", len(settings.lengths) * (depth + 1)) as advance:
        for length in settings.lengths:
            unit = units.load(f"timed-{length}")
            if unit is None:
                unit = _time_length(model, torch.tensor(tokens[:length], device=device), settings, advance)
                units.save(f"timed-{length}", unit)
            else:
                advance(depth + 1)
            backend = bytes(unit["backend"]).decode()
            rows += [_row(length, stride, unit, device) for stride in settings.strides]
    return _table(rows, device, backend, settings)


def _check(settings: TimingSettings, longest: int) -> None:
    for length in settings.lengths:
        if length > longest:
            raise AblationError(
                f"length {length} is more than the longest sample's {longest} tokens: raise --max-length"
            )
        if length < 4 * settings.block_size:
            least = 4 * settings.block_size
            raise AblationError(f"length {length} is below {least}, four blocks: nearly every block is always kept")


def _time_length(
    model: Any, tokens: torch.Tensor, settings: TimingSettings, advance: Callable[[int], None]
) -> dict[str, np.ndarray]:
    head = LogitHead(model)
    clock = _Clock(settings, advance)
    with patch_attention(model, clock):
        head.prefill(tokens)
    if not clock.layers:
        raise AblationError("no layer of this model can be sparse: there is nothing to time")
    seconds = settings.limit_seconds * clock.layers
    unit = {
        "prefill_dense": np.array(measure([lambda: head.prefill(tokens)], tokens.device, seconds).median_ms),
        "layers": np.array(clock.layers),
        "backend": np.frombuffer(clock.backend.encode(), dtype=np.uint8),
    }
    config = model.config.get_text_config()
    shape = (1, config.num_hidden_layers, config.num_attention_heads)
    for stride, spent in clock.milliseconds.items():
        plan = SparsePlan(stride, settings.block_size, "antidiagonal", ((0, None),), torch.full(shape, settings.tau))
        with SparseAttention(model, plan):
            whole = measure([lambda: head.prefill(tokens)], tokens.device, seconds).median_ms
        unit |= {f"{part}-{stride}": np.array(value) for part, value in spent.items()}
        unit |= {f"prefill-{stride}": np.array(whole), f"density-{stride}": np.array(np.mean(clock.density[stride]))}
    advance(1)
    return unit


def _row(length: int, stride: int, unit: dict[str, np.ndarray], device: torch.device) -> Record:
    scoring, choosing, attention, dense = (float(unit[f"{part}-{stride}"]) for part in PARTS)
    whole, prefill_dense = float(unit[f"prefill-{stride}"]), float(unit["prefill_dense"])
    milliseconds: dict[str, float | None] = {
        "selection_ms": choosing,
        "scoring_ms": scoring,
        "attention_ms": attention,
        "dense_attention_ms": dense,
        "prefill_ms": whole,
        "dense_prefill_ms": prefill_dense,
    }
    if device.type != "cuda":
        milliseconds = dict.fromkeys(milliseconds)
    return {
        "length": length,
        "stride": stride,
        "layers": int(unit["layers"]),
        "density": float(unit[f"density-{stride}"]),
        **milliseconds,
        "selection_share": choosing / (choosing + attention),
        "selection_over_dense": choosing / dense,
        "scoring_over_dense": scoring / dense,
        "attention_over_dense": attention / dense,
        "selection_of_prefill": choosing / whole,
        "attention_of_prefill": attention / whole,
        "dense_attention_of_dense_prefill": dense / prefill_dense,
        "prefill_over_dense_prefill": whole / prefill_dense,
    }


def _table(rows: list[Record], device: torch.device, backend: str, settings: TimingSettings) -> Record:
    on_gpu = device.type == "cuda" and backend == "triton"
    remarks = [
        f"one tau of {settings.tau:g} in all heads; medians; selection is scoring and selecting, in one call as served",
        "a call's tensors may stay in the processor's cache between its repetitions; long inputs do not fit there",
    ]
    return {
        "paper": {
            "title": BREAKDOWN_TITLE,
            "setting": "Llama-3.1-8B; selection 9.3 ms + attention 13.9 ms at S = 8, 3.6 ms + 14.3 ms at S = 16",
            "source": "arXiv 2503.16428",
            "selection_shares": {str(stride): share for stride, share in SELECTION_SHARES.items()},
        },
        "times": rows,
        "tau": settings.tau,
        "backend": backend,
        "comparable": on_gpu,
        "agreement": _agreement(rows) if on_gpu else ["Not compared with the paper: these are not a GPU's times."],
        "remarks": remarks,
    }


def _agreement(rows: Sequence[Record]) -> list[str]:
    lines = []
    for length in sorted({row["length"] for row in rows}):
        shares = {row["stride"]: row["selection_share"] for row in rows if row["length"] == length}
        both = [stride for stride in SELECTION_SHARES if stride in shares]
        parts = [f"{shares[s]:.0%} at S={s} (paper: {SELECTION_SHARES[s]:.0%})" for s in both]
        text = f"At {length:,} tokens selection takes " + ", ".join(parts) + " of selection and attention"
        if len(both) == 2:
            agrees = shares[16] < shares[8]
            text += (
                "; it falls from S=8 to S=16: agrees" if agrees else "; it does not fall from S=8 to S=16: DISAGREES"
            )
        lines.append(f"{text}.")
    return lines
