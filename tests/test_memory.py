"""The peak memory model against measurements, heads a few at a time against all at once, and memory that runs out."""

import dataclasses
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xcalib.collect import CollectSettings, budget, collect, collect_lengths, memory
from xcalib.collect import measure as measuring
from xcalib.collect.budget import _cgroup_limit, chunks_within, parse_memory, workload_of
from xcalib.collect.chunks import HeadChunks
from xcalib.collect.fisher import FisherMeter
from xcalib.collect.gains import GainMeter
from xcalib.collect.measure import Sweeper
from xcalib.collect.measures import Measures
from xcalib.collect.memory import largest_peak, most_heads, predict_peak
from xcalib.collect.ranks import Place, Ranks
from xcalib.collect.slopes import SlopeMeter
from xcalib.collect.workload import PHASES, Workload
from xcalib.errors import MemoryLimitError, XcalibWarning
from xcalib.evaluation import evaluate_plans
from xcalib.kernels import estimate_blocks, sweep_thresholds
from xcalib.models.logits import LogitHead, sampled_positions
from xcalib.models.sparse import SparsePlan

Build = Callable[..., Any]

SETTINGS = CollectSettings(stride=16, block_size=64, measures=("fisher", "mass"))
ARRAYS = ("error", "energy", "kept", "gain", "gain_kl", "joint_sum", "fisher", "mass")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist, a storage once, from the moment an operation makes it to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, tuple[Any, int]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = (weakref.ref(storage, partial(self._gone, key)), storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _gone(self, key: int, _reference: Any) -> None:
        self.live -= self._sizes.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


def test_live_bytes_counts_storages_once_and_forgets_them() -> None:
    with LiveBytes() as meter:
        first = torch.zeros(1000)
        second = first + 1
        view = second.view(10, 100)
        del first
        assert (meter.live, meter.peak) == (4000, 8000)
        many = [view * 2 for _ in range(3)]
        assert (meter.live, len(many)) == (16_000, 3)
        del many, second, view
    assert (meter.live, meter.peak) == (0, 16_000)


@pytest.fixture(scope="module")
def model(tiny_model: Build) -> Any:
    """Three key/value heads, a vocabulary and an MLP that are not small beside the rest."""
    return tiny_model(
        "llama",
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        hidden_size=192,
        intermediate_size=320,
        vocab_size=700,
        max_position_embeddings=4096,
    )


def work(
    model: Any, samples: Any, phase: str, chunks: HeadChunks, settings: CollectSettings = SETTINGS
) -> Callable[[], Any]:
    """One sample's work in one phase, made ready."""
    config, tokens = model.config, torch.tensor(samples.samples[0].tokens)
    layers, heads = tuple(range(config.num_hidden_layers)), config.num_attention_heads
    taus = np.full((len(layers), heads), 0.7)
    dense = LogitHead(model).prefill(tokens).hidden[sampled_positions(settings.gain_every)].float().clone()
    gains = GainMeter(model, settings, heads)
    thresholds = torch.full((1, len(layers), heads), 0.7)
    plans = {str(number): SparsePlan(16, 64, settings.pattern, ((0, None),), thresholds) for number in range(3)}

    def each(_what: str, _kind: str, measure: Callable[..., Any], steps: list[int]) -> list[Any]:
        return [measure(index, lambda _steps: None) for index in range(len(steps))]

    return {
        "sweep": partial(Sweeper(model, settings, heads, chunks).measure, tokens),
        "gains": partial(gains.alone, tokens, layers, taus),
        "joint": partial(gains.together, tokens, layers, np.stack([taus] * 3), dense.numpy()),
        "slopes": partial(
            SlopeMeter(model, settings, layers, chunks).measure, tokens, np.full((len(layers), heads), 10), dense
        ),
        "gradients": partial(FisherMeter(model, settings, chunks).gram, tokens, layers, 0),
        "mass": partial(Measures(model, [tokens], settings, each, chunks).mass, layers),
        "evaluate": partial(evaluate_plans, model, samples, plans),
    }[phase]


def measured_peak(model: Any, run: Callable[[], Any]) -> int:
    meter = LiveBytes()
    for tensor in (*model.parameters(), *model.buffers()):
        meter.add(tensor)
    with meter:
        run()
    return meter.peak


@pytest.mark.parametrize("heads", [None, 1], ids=["all-heads", "one-head"])
@pytest.mark.parametrize("length", [640, 1900])
@pytest.mark.parametrize("phase", PHASES)
def test_the_model_is_within_a_quarter_of_what_is_measured(
    model: Any, random_samples: Build, phase: str, length: int, heads: int | None
) -> None:
    samples = random_samples([length])
    load = dataclasses.replace(workload_of(model, (samples,), SETTINGS), samples=0)  # no hidden states of other samples
    measured = measured_peak(model, work(model, samples, phase, HeadChunks(heads)))
    predicted = predict_peak(load, phase, heads).total  # type: ignore[arg-type]
    which = f"{phase}, {length:,} tokens, {'all heads' if heads is None else 'one head'}"
    print(f"{which}: {predicted / 2**20:.1f} MiB predicted, {measured / 2**20:.1f} MiB measured")  # for -rP
    assert 0.75 < predicted / measured < 1.25


@pytest.mark.parametrize("phase", ["sweep", "joint", "slopes", "mass"])
def test_the_model_knows_the_antidiagonal(model: Any, random_samples: Build, phase: Any) -> None:
    samples, settings = random_samples([640]), dataclasses.replace(SETTINGS, pattern="antidiagonal")
    load = dataclasses.replace(workload_of(model, (samples,), settings), samples=0)
    assert (load.pattern, load.stride) == ("antidiagonal", 16)
    measured = measured_peak(model, work(model, samples, phase, HeadChunks(), settings))
    assert 0.75 < predict_peak(load, phase).total / measured < 1.25


def test_several_lengths_are_held_against_the_limit_once(
    tiny_model: Build, random_samples: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first length leaves in memory is no reason to refuse the second one in mid-work."""
    model, held = tiny_model(), iter([0, 1 << 50, 1 << 50])
    sets = tuple(random_samples([length], seed=length) for length in (320, 384))
    monkeypatch.setattr(budget, "_resident", lambda: next(held))
    curves = collect_lengths(model, sets, tmp_path / "c", settings=SETTINGS, max_memory=1 << 40)
    assert [one.calibration["lengths"] for one in curves] == [[320], [384]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("stride", "kv_heads"), [(4, 3), (16, 3), (16, 1), (64, 2)])
def test_what_scoring_by_rows_takes(stride: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Of 6 query heads; with the 44 bytes of ordering a block it would be out of sight in a whole sweep."""
    query, key = (torch.randn(1, heads, 1900, 32, dtype=dtype) for heads in (6, kv_heads))
    with LiveBytes() as meter:
        estimate_blocks(query, key, stride=stride, block_size=64, pattern="rows", backend="reference")
    load = dataclasses.replace(LOAD, triton=False, query_heads=6, kv_heads=kv_heads, head_dim=32, length=1900)
    load = dataclasses.replace(load, block_size=64, stride=stride, element=dtype.itemsize)
    measured = meter.peak - (key.nbytes if dtype == torch.float32 else 0)  # then a view of the keys that were given
    print(f"{memory._scoring(load, 6)} predicted, {measured} measured")
    assert 0.75 < memory._scoring(load, 6) / measured < 1.25


def test_finer_strides_take_more() -> None:
    """On a GPU too: a log-sum-exp for each sampled query and key block."""
    for load in (LOAD, dataclasses.replace(LOAD, triton=False)):
        fine, coarse = (dataclasses.replace(load, stride=stride) for stride in (4, 64))
        assert memory._scoring(fine, 32) > memory._scoring(coarse, 32)
    assert memory._scoring(dataclasses.replace(LOAD, stride=4), 32) == 4 * 32 * 1024**2 * (1 + 128 // 4)


LOAD = Workload(
    layers=32,
    query_heads=32,
    kv_heads=8,
    head_dim=128,
    hidden=4096,
    intermediate=14336,
    vocabulary=128256,
    weight_bytes=16 * 2**30,
    length=131072,
    element=2,
    samples=8,
    triton=True,
    host=False,
)


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])
@pytest.mark.parametrize("phase", PHASES)
def test_what_grows(phase: Any, triton: bool) -> None:
    """More tokens, layers or heads at a time never take less, and plain numbers are enough to tell."""
    load = dataclasses.replace(
        LOAD, triton=triton, host=True, intermediate=4096
    )  # a wide MLP takes more than any measuring
    total = predict_peak(load, phase).total
    for more in ({"length": 2 * load.length}, {"layers": 2 * load.layers}, {"vocabulary": 4 * load.vocabulary}):
        assert predict_peak(dataclasses.replace(load, **more), phase).total >= total
    assert predict_peak(dataclasses.replace(load, length=2 * load.length), phase).total > total
    one, all_heads = predict_peak(load, phase, 1), predict_peak(load, phase, 8)
    assert one.total <= all_heads.total == total
    if phase in ("sweep", "slopes", "mass") and not triton:
        assert one.total < total
    many = dataclasses.replace(load, samples=16)
    hidden = 8 * 4 * (131072 // 7) * 4096
    assert predict_peak(many, phase).total - total == (hidden if phase == "slopes" else 0)
    assert predict_peak(dataclasses.replace(many, host=False), phase).total == total - predict_peak(load, phase).host


@pytest.mark.parametrize(("phase", "heads"), [("sweep", 0), ("sweep", 9), ("sleep", 1)])
def test_wrong_questions(phase: Any, heads: int) -> None:
    with pytest.raises(ValueError, match=r"expected (1 to 8|one of)"):
        predict_peak(LOAD, phase, heads)


def test_a_round_has_its_kls() -> None:
    """Of all layers together, at one choice of levels; a flat model of many blocks shows them."""
    load = dataclasses.replace(
        LOAD, layers=1, triton=False, length=2**20, head_dim=32, intermediate=64, hidden=64, allocations=1
    )
    joint, round_ = predict_peak(load, "joint", 1), predict_peak(load, "slopes", 1)
    assert joint.working > predict_peak(load, "slopes", 8).activations
    assert round_.total >= joint.total


def test_most_heads_fill_what_is_allowed() -> None:
    load = dataclasses.replace(LOAD, triton=False, intermediate=4096)
    phases = ("sweep", "gains", "joint")
    for heads in range(1, 9):
        limit = largest_peak(load, phases, heads).total
        assert largest_peak(load, phases, most_heads(load, phases, limit)).total <= limit
    need = largest_peak(load, ("sweep",), 3).total
    assert most_heads(load, ("sweep",), need) == 3
    assert most_heads(load, ("sweep",), need - 1) == 2
    assert most_heads(load, ("sweep",), need + 10**9, beyond=10**9) == 3
    many = dataclasses.replace(load, host=True, samples=100)  # a round keeps hidden states of all of them
    with pytest.raises(
        MemoryLimitError, match=r"kept of all samples [\d.]+ GiB\): .* or lower --max-length or --num-samples"
    ):
        most_heads(many, ("slopes",), 2**30)
    least = largest_peak(load, phases, 1).total
    with pytest.raises(
        MemoryLimitError, match=r"131,072 tokens need [\d.]+ GiB even with one key/value head at a time"
    ):
        most_heads(load, phases, least - 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8G", 2**33), ("1.5 GiB", 3 * 2**29), ("600m", 600 * 2**20), ("123456", 123456), ("2KB", 2048), ("1T", 2**40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1G", "8 gigs", "nan", "1e9", "G", "0.0001"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(MemoryLimitError, match="expected a size such as 8G or 600M"):
        parse_memory(text)


GROUPS = {
    "version 2": ("0::/user/job\n", {"user/memory.max": "max\n", "user/job/memory.max": "5000\n"}, 5000),
    "a group above": ("0::/user/job\n", {"user/memory.max": "3000\n", "user/job/memory.max": "5000\n"}, 3000),
    "seen from inside": ("0::/user/job\n", {"memory.max": "4000\n"}, 4000),
    "outside of what is seen": ("0::/../other\n", {"memory.max": "4000\n"}, 4000),
    "version 1": (
        "3:cpu:/a\n2:hugetlb,memory:/a\n1:name=systemd:/\n",
        {"memory/a/memory.limit_in_bytes": "7000\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"},
        7000,
    ),
    "another controller": ("3:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "7000\n", "a/memory.max": "1\n"}, None),
    "no limit": ("0::/\n", {"memory.max": "max\n"}, None),
    "no files": ("0::/a\n", {}, None),
    "nonsense": ("nonsense\n\n", {"a/memory.max": "1\n"}, None),
}


@pytest.mark.parametrize("case", GROUPS)
def test_limits_of_control_groups(tmp_path: Path, case: str) -> None:
    lines, files, expected = GROUPS[case]
    assert _cgroup_limit(tmp_path) is None  # not Linux
    for name, text in {
        "proc/self/cgroup": lines,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _cgroup_limit(tmp_path) == expected


@pytest.mark.parametrize(
    ("installed", "grouped", "local", "limit", "said"),
    [
        (8000, None, 1, 8000, "are all that this machine has"),
        (8000, 6000, 1, 6000, "are all that the control group (cgroup) of this process allows"),
        (8000, 9000, 4, 2000, "are all that this machine has for each of 4 ranks"),
        (8000, 6000, 3, 2000, "are all that the control group (cgroup) of this process allows for each of 3 ranks"),
        (None, 6000, 2, 3000, "are all that the control group (cgroup) of this process allows for each of 2 ranks"),
    ],
)
def test_ranks_share_the_memory_of_their_host(
    monkeypatch: pytest.MonkeyPatch, installed: int | None, grouped: int | None, local: int, limit: int, said: str
) -> None:
    monkeypatch.setattr(budget, "host_memory", lambda: installed)
    monkeypatch.setattr(budget, "_cgroup_limit", lambda: grouped)
    assert budget._for_process(local) == (limit, said)


def test_the_share_of_a_rank_is_what_its_work_has_to_fit(
    model: Any, random_samples: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for all heads of one process is too little for four; a rank keeps the hidden states of its samples only."""
    samples = random_samples([640] * 4)
    load, alone = workload_of(model, (samples,), SETTINGS, ranks=4), workload_of(model, (samples,), SETTINGS)
    assert (load.samples, alone.samples) == (1, 4)
    monkeypatch.setattr(budget, "_resident", lambda: load.weight_bytes)
    monkeypatch.setattr(budget, "_cgroup_limit", lambda: None)
    need = largest_peak(load, ("sweep",), 2).total
    for installed, local in ((need, 1), (4 * need, 4), (2 * need, 2)):
        monkeypatch.setattr(budget, "host_memory", lambda size=installed: size)
        ranks = Ranks(Place(0, 4, 0, local_size=local))
        assert chunks_within(model, (samples,), SETTINGS, ("sweep",), None, ranks).heads == 2
    monkeypatch.setattr(budget, "host_memory", lambda: need)
    with pytest.raises(
        MemoryLimitError, match=r"are all that this machine has for each of 4 ranks, but samples of 640"
    ):
        chunks_within(model, (samples,), SETTINGS, ("sweep",), None, Ranks(Place(0, 4, 0, local_size=4)))
    given = chunks_within(model, (samples,), SETTINGS, ("sweep",), need, Ranks(Place(0, 4, 0, local_size=4)))
    assert given.heads == 2  # what is asked for is for each process


def test_nothing_is_known_of_the_machine(model: Any, samples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "host_memory", lambda: None)
    monkeypatch.setattr(budget, "_cgroup_limit", lambda: None)
    assert chunks_within(model, (samples,), SETTINGS, ("sweep",), None).heads is None


@pytest.fixture(scope="module")
def samples(random_samples: Build) -> Any:
    return random_samples([330, 401])


@pytest.fixture(scope="module")
def whole(model: Any, samples: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    collect(model, samples, folder, settings=SETTINGS)
    return folder


@pytest.mark.parametrize("heads", [1, 2])
def test_parts_give_the_same_bytes(
    model: Any, samples: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: int
) -> None:
    """One and two of three key/value heads at a time: the files are equal."""
    load = workload_of(model, (samples,), SETTINGS)
    phases = ("sweep", "gains", "joint", "gradients", "mass")
    monkeypatch.setattr("xcalib.collect.budget._resident", lambda: load.weight_bytes + 1000)
    monkeypatch.setattr("xcalib.collect.memory._gains", lambda *_: [(0, 0, 0, 0)])  # what no number of heads can lower
    monkeypatch.setattr("xcalib.collect.memory._gradients", lambda *_: [(0, 0, 0, 0)])
    limit = 1000 + largest_peak(load, phases, heads).total
    assert chunks_within(model, (samples,), SETTINGS, phases, limit).heads == heads
    seen = counted_heads(monkeypatch)
    collect(model, samples, tmp_path, settings=SETTINGS, max_memory=limit)
    assert max(seen) == heads
    for name in ("curves.safetensors", "curves.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def counted_heads(monkeypatch: pytest.MonkeyPatch, limit: int | None = None, error: type | None = None) -> list[int]:
    """Key heads of every call of the sweep; calls of more than ``limit`` run out of memory."""
    seen: list[int] = []

    def sweep(query: torch.Tensor, key: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(key.shape[1])
        if limit is not None and key.shape[1] > limit:
            if error is RuntimeError:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory")
            raise (error or torch.cuda.OutOfMemoryError)("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
        return sweep_thresholds(query, key, *arguments, **options)

    monkeypatch.setattr(measuring, "sweep_thresholds", sweep)
    return seen


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, RuntimeError, MemoryError], ids=["gpu", "cpu", "host"])
def test_out_of_memory_halves_the_heads_and_goes_on(
    model: Any, samples: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type
) -> None:
    seen = counted_heads(monkeypatch, 1, error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        collect(model, samples, tmp_path, settings=SETTINGS)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, XcalibWarning)]
    assert said == [
        "memory ran out at layer 0 of a sample of 330 tokens: from here on 1 of 3 key/value heads at a time, "
        "which gives the same figures"
    ]
    assert seen[0] == 3
    assert set(seen[1:]) == {1}  # half of three, and never more again, in any layer, sample or measurement
    assert (tmp_path / "curves.safetensors").read_bytes() == (whole / "curves.safetensors").read_bytes()


def test_heads_that_are_done_are_not_done_again(model: Any, samples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocation fails at the second part: the first part's result stays."""
    chunks, parts = HeadChunks(2), []
    call = next(calls(model, samples))

    def compute(part: Any, heads: slice) -> int:
        parts.append((heads.start, heads.stop))
        if len(parts) == 2:
            raise torch.OutOfMemoryError("no")
        return int(part.query.shape[1])

    with pytest.warns(XcalibWarning, match="memory ran out"):
        chunks.heads = 2
        wide = dataclasses.replace(
            call,
            query=torch.cat([call.query] * 2, 1),
            key=torch.cat([call.key] * 2, 1),
            value=torch.cat([call.value] * 2, 1),
        )
        assert chunks.map(wide, compute) == [4, 2, 2, 2, 2]
    assert parts == [(0, 4), (4, 8), (4, 6), (6, 8), (8, 10), (10, 12)]


def calls(model: Any, samples: Any) -> Any:
    from xcalib.models.attention import patch_attention

    found: list[Any] = []
    with torch.inference_mode(), patch_attention(model, found.append):
        model(torch.tensor(samples.samples[0].tokens)[None])
    return iter(found)


def test_one_head_that_does_not_fit(model: Any, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted_heads(monkeypatch, 0)
    with pytest.raises(MemoryLimitError) as caught:
        collect(model, samples, tmp_path, settings=SETTINGS)
    assert str(caught.value) == (
        "sample 0: layer 0 of a sample of 330 tokens: one key/value head at a time does not fit into memory: lower --max-length, "
        "choose a smaller --dtype, or use a device with more memory"
    )
    assert seen == [3, 1]


def test_memory_that_runs_out_elsewhere_is_one_line(
    model: Any, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_arguments: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", forward)
    with pytest.raises(MemoryLimitError) as caught:
        collect(model, samples, tmp_path, settings=SETTINGS)
    assert str(caught.value) == (
        "sample 0: memory ran out (CUDA out of memory. Tried to allocate 20.00 GiB.): lower --max-length or --num-samples, "
        "or choose a smaller --dtype"
    )


def test_other_runtime_errors_pass(model: Any, samples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(_part: Any, _heads: slice) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        HeadChunks().map(next(calls(model, samples)), compute)


@pytest.mark.parametrize("command", ["collect", "search"])
def test_too_little_is_refused_before_anything_runs(
    run: Callable[..., tuple[int, str, str]], tiny_folder: Path, tmp_path: Path, command: str
) -> None:
    out = {
        "collect": ("--out", tmp_path / "curves"),
        "search": ("--out", tmp_path / "p.yaml", "--work", tmp_path / "work"),
    }
    code, printed, said = run(
        command, tiny_folder, "--data", "builtin", "--max-length", "256", "--max-memory", "8M", *out[command]
    )
    assert (code, printed) == (2, "")
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: 8.0 MiB are allowed, but samples of 256 tokens need ")
    assert line.endswith("raise --max-memory or lower --max-length, or choose --dtype bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_is_none_is_one_line(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, said = run("collect", "nowhere", "--max-memory", "lots", "--out", tmp_path / "curves")
    assert (code, said) == (2, "error: max-memory is 'lots', expected a size such as 8G or 600M\n")


def test_memory_that_runs_out_anywhere_is_one_line(
    run: Callable[..., tuple[int, str, str]], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*_arguments: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("xcalib.collect.collect_lengths", out)
    code, _, said = run(
        "collect", tiny_folder, "--data", "builtin", "--max-length", "256", "--out", tmp_path / "curves"
    )
    assert code == 2
    assert said.splitlines()[-1] == (
        "error: memory ran out (CUDA out of memory. Tried to allocate 20.00 GiB.): lower --max-length or --num-samples, or "
        "choose a smaller --dtype"
    )


def test_slopes_in_parts_are_the_same(model: Any, random_samples: Build) -> None:
    data = random_samples([500])
    whole, parts = (work(model, data, "slopes", HeadChunks(heads))() for heads in (None, 1))
    assert whole.kl == parts.kl
    np.testing.assert_array_equal(whole.slope, parts.slope)


def test_memory_that_runs_out_in_a_backward_pass_begins_it_again(
    model: Any, random_samples: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed again in the backward pass cannot be halved there: the sample is, from its beginning."""
    from xcalib.collect import backward

    data = random_samples([500])
    expected = work(model, data, "slopes", HeadChunks())()
    chunk, seen = backward._chunk, []

    def fails(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(query.shape[1])
        if len(seen) > 3 and query.shape[1] > 2:  # three layers have gone forward
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return chunk(query, *arguments, **options)

    monkeypatch.setattr(backward, "_chunk", fails)
    with pytest.warns(
        XcalibWarning, match="memory ran out at the backward pass of a sample of 500 tokens: from here on 1 of 3"
    ):
        found = work(model, data, "slopes", HeadChunks())()
    assert seen[3:5] == [6, 2]
    assert found.kl == expected.kl
    np.testing.assert_array_equal(found.slope, expected.slope)


RETRIEVAL = Path(__file__).parent.parent / "docs" / "benchmarks" / "retrieval" / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("phase", ["sweep", "slopes", "evaluate"])
def test_the_model_holds_for_trained_weights(phase: str, dtype: str) -> None:
    """Rows whose kept blocks lie far below the peak are computed in fp64; trained attention has them."""
    from xcalib.data import load_samples
    from xcalib.models.loading import load_model

    loaded = load_model(str(RETRIEVAL), device="cpu", dtype=dtype)
    samples = load_samples(["builtin"], loaded.tokenizer, num_samples=1, max_length=1024)
    load = dataclasses.replace(workload_of(loaded.model, (samples,), SETTINGS), samples=0)
    measured = measured_peak(loaded.model, work(loaded.model, samples, phase, HeadChunks()))
    predicted = predict_peak(load, phase).total  # type: ignore[arg-type]
    print(f"{phase}, {dtype}: {predicted / 2**20:.1f} MiB predicted, {measured / 2**20:.1f} MiB measured")
    assert 0.75 < predicted / measured < 1.25


def test_one_head_that_needs_fp64_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The precision of a row is each key head's own: figures do not depend on which heads share a call."""
    from xcalib.kernels import reference

    used: list[torch.dtype] = []
    level_error = reference._level_error

    def spy(*arguments: Any) -> torch.Tensor:
        used.append(arguments[-1])
        return level_error(*arguments)

    monkeypatch.setattr(reference, "_level_error", spy)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 500, 32, generator=generator) for heads in (4, 2, 2))
    query[:, 2:] *= 30  # of the second key head: what is always kept lies far below the peaks
    projection, grid = (
        torch.randn(4, 32, 32, generator=generator),
        torch.tensor((0.0, 0.5, 0.8, 1.0), dtype=torch.float64),
    )
    whole = sweep_thresholds(query, key, value, grid, projection, block_size=64, backend="reference")
    assert set(used) == {torch.float32, torch.float64}
    for head in range(2):
        heads, one = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        part = sweep_thresholds(
            query[:, heads], key[:, one], value[:, one], grid, projection[heads], block_size=64, backend="reference"
        )
        assert torch.equal(part.error, whole.error[heads])
        assert torch.equal(part.kept, whole.kept[heads])
