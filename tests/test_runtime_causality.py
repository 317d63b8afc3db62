"""Which attention calls are plain causal prefill."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xcalib.models.causality import dense_reason, is_lower_right_causal


def causal_mask(q_len: int, k_len: int, kind: str = "bool") -> torch.Tensor:
    """``(1, 1, q_len, k_len)``, as transformers makes it."""
    seen = torch.arange(k_len) <= torch.arange(q_len)[:, None] + k_len - q_len
    if kind == "bool":
        return seen[None, None]
    dtype = getattr(torch, kind)
    return torch.zeros(1, 1, q_len, k_len, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lengths", [(1, 1), (2, 2), (7, 7), (33, 50), (100, 101), (50, 117)], ids=str)
def test_causal_masks_are_recognised(lengths: tuple[int, int], kind: str) -> None:
    mask = causal_mask(*lengths, kind=kind)
    assert is_lower_right_causal(mask)
    assert is_lower_right_causal(mask.expand(3, 4, -1, -1))
    assert is_lower_right_causal(mask.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
def test_every_single_difference_is_found(kind: str) -> None:
    mask = causal_mask(9, 13, kind).repeat(2, 2, 1, 1)
    seen = causal_mask(9, 13).expand_as(mask)
    for index in range(mask.numel()):
        changed = mask.clone()
        hidden = False if kind == "bool" else torch.finfo(mask.dtype).min
        changed.view(-1)[index] = hidden if seen.reshape(-1)[index] else kind == "bool"
        assert not is_lower_right_causal(changed), index


def test_soft_biases_and_other_alignments_are_not_causal() -> None:
    mask = causal_mask(20, 20, "float32")
    assert is_lower_right_causal(mask.masked_fill(mask < 0, -torch.inf))
    assert not is_lower_right_causal(mask + 0.01)
    assert not is_lower_right_causal(mask.masked_fill(mask < 0, -1000.0))
    assert not is_lower_right_causal(mask.masked_fill(mask < 0, torch.nan))
    assert not is_lower_right_causal(causal_mask(20, 20)[:, :, :10])  # upper left: queries 0 to 9 of 20 keys
    assert not is_lower_right_causal(causal_mask(20, 20).long())


def reason(
    q_len: int = 64, k_len: int = 64, mask: Any = None, no_mask: str = "upper-left", **kwargs: Any
) -> str | None:
    """The verdict on a call of 4 query and 2 KV heads; names ending in ``_`` go to the module."""
    settings = {"head_dim": 32, "dtype": torch.float32, "batch": 1}
    settings |= {name: kwargs.pop(name) for name in settings if name in kwargs}
    fields = {name[:-1]: kwargs.pop(name) for name in list(kwargs) if name.endswith("_")}
    config = SimpleNamespace(**fields.pop("config", {}))
    module: Any = SimpleNamespace(config=config, **{"layer_idx": 0, **fields})
    shape = (settings["batch"], 2, k_len, settings["head_dim"])
    key = torch.zeros(shape, dtype=settings["dtype"])
    query = torch.zeros((settings["batch"], 4, q_len, settings["head_dim"]), dtype=settings["dtype"])
    return dense_reason(module, query, key, key, mask=mask, kwargs=kwargs, no_mask=no_mask)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"scaling": 0.1, "dropout": 0.0, "sliding_window": None, "softcap": None, "s_aux": None}, None),
        ({"position_ids": torch.zeros(1, 64)}, None),
        ({"q_len": 1}, "decode (one query token)"),
        ({"is_causal": False}, "not causal"),
        ({"is_causal_": False}, "not causal"),
        ({"config_": {"is_causal": False}}, "not causal"),
        ({"is_causal": True, "is_causal_": False}, None),  # as sdpa and flash attention: the argument wins
        ({"softcap": 50.0}, "logit softcapping"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"sinks_": torch.zeros(4)}, "attention sinks"),
        ({"cache": object()}, "paged cache"),
        ({"cu_seq_lens_q": torch.tensor([0, 10, 64])}, "packed sequences"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"output_attentions": True}, "attention weights wanted"),
        ({"indices": torch.zeros(1)}, "attention argument indices"),
        ({"head_dim": 16}, "unsupported head_dim 16"),
        ({"head_dim": 288}, "unsupported head_dim 288"),
        ({"dtype": torch.float64}, "unsupported or mixed dtypes"),
        ({"q_len": 65}, "more queries than keys"),
        ({"sliding_window": 64}, None),
        ({"sliding_window": 63}, "sliding window"),
        ({"sliding_window_": 63}, "sliding window"),
        ({"is_sliding_": True, "config_": {"sliding_window": 32}}, "sliding window"),
        ({"is_sliding_": True}, "sliding window"),
        ({"config_": {"sliding_window": 32, "layer_types": ["sliding_attention"]}}, "sliding window"),
        ({"config_": {"sliding_window": 32, "layer_types": ["full_attention"]}}, None),
        ({"config_": {"layer_types": ["chunked_attention"]}}, "chunked attention"),
    ],
    ids=lambda value: ",".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_arguments(given: dict[str, Any], expected: str | None) -> None:
    assert reason(**given) == expected


OTHER = "mask that is not plain causal (padding, packing or a static cache)"


@pytest.mark.parametrize("no_mask", ["upper-left", "lower-right", "full"])
def test_masks(no_mask: str) -> None:
    assert reason(64, 80, causal_mask(64, 80), no_mask) is None
    assert reason(64, 80, causal_mask(64, 80).expand(2, 1, -1, -1), no_mask, batch=2) is None
    assert reason(64, 80, causal_mask(80, 80)[:, :, :64], no_mask) == OTHER
    assert reason(64, 80, causal_mask(64, 96), no_mask) == OTHER
    assert reason(64, 80, torch.ones(1, 80, dtype=torch.bool), no_mask) == OTHER
    assert reason(64, 80, object(), no_mask) == "mask of type object"


def test_no_mask_means_what_the_implementation_makes_of_it() -> None:
    assert reason(64, 64, None, "upper-left") is None
    assert reason(64, 80, None, "upper-left") == "static cache"
    assert reason(64, 64, None, "full") == "not causal"
    assert reason(64, 80, None, "lower-right") is None


def test_flash_attention_finds_packed_sequences_in_positions() -> None:
    packed = torch.cat([torch.arange(30), torch.arange(34)])[None]
    assert reason(64, 64, None, "lower-right", position_ids=packed) == "packed sequences"
    assert reason(64, 64, None, "lower-right", position_ids=torch.arange(5, 69)[None]) is None
    assert reason(64, 64, None, "upper-left", position_ids=packed) is None  # sdpa's mask would have said so


def test_a_verdict_is_kept_until_the_mask_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from xcalib.models import causality

    seen = []
    real = causality.is_lower_right_causal
    monkeypatch.setattr(causality, "is_lower_right_causal", lambda mask: seen.append(1) or real(mask))
    mask = causal_mask(64, 80).clone()
    assert reason(64, 80, mask) is reason(64, 80, mask) is None
    assert len(seen) == 1
    mask[..., 0] = False
    assert reason(64, 80, mask) == OTHER
    with torch.inference_mode():
        assert reason(64, 80, causal_mask(64, 80)) is None


def test_wanted_gradients_stay_dense() -> None:
    query = torch.zeros(1, 4, 64, 32, requires_grad=True)
    key = torch.zeros(1, 2, 64, 32)
    module: Any = SimpleNamespace(config=SimpleNamespace(), layer_idx=0)
    arguments: dict[str, Any] = {"mask": None, "kwargs": {}, "no_mask": "upper-left"}
    assert dense_reason(module, query, key, key, **arguments) == "gradients wanted"
    with torch.no_grad():
        assert dense_reason(module, query, key, key, **arguments) is None
