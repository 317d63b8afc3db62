"""What can attend sparsely in a model, layer by layer, and why the rest cannot; no weights are needed.

The layers are asked, not looked up: a pass without weights goes through the model's own code to its attention, and the
rules that decide in a served model (:mod:`xcalib.models.causality`) judge the calls.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from xcalib._yaml import one_line
from xcalib.errors import ModelError
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.causality import dense_reason
from xcalib.models.empty import NotCausalError, build_empty, empty_model
from xcalib.models.structure import AttentionLayer, attention_layers, decoder_blocks, decoder_of, describe_model

__all__ = ["Inspection", "LayerFacts", "inspect_config", "inspect_model"]

LONGEST = 131_072  # tokens of the pass, where the model allows as many
_KINDS = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked", "attention": "full"}


@dataclass(frozen=True)
class LayerFacts:
    """One layer of a decoder.

    Attributes:
        kind: ``full``, ``sliding``, ``chunked``, or what stands in the place of attention, such as ``linear_attention``.
        window: keys that a query sees at most, None for all.
        query_heads: 0 where there is no attention.
        kv_heads: of keys and values.
        head_dim: dimensions of a query.
        reason: None where prefill can be sparse, else why it stays dense.
        known: False where nothing that is known of the layer makes it dense, and its attention call was not seen.
    """

    kind: str
    window: int | None = None
    query_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    reason: str | None = None
    known: bool = True


@dataclass(frozen=True)
class Inspection:
    """A model as xcalib sees it.

    Attributes:
        name: what the user calls it.
        model: class that transformers builds for it.
        model_type: of its text configuration.
        parameters: of the whole model.
        max_positions: longest sequence that it was made for, None if it does not say.
        dtype: of the weights as the configuration names it, None if it does not.
        implementation: of attention, such as ``sdpa``.
        tokens: length of the sequence that ``layers`` were asked about.
        layers: all of the decoder's, in order.
        problem: why xcalib can do nothing with the model, None where it can.
        note: what else has to be known, empty if nothing.
        seen: attention layers whose call was seen; the others were judged by their attributes.
    """

    name: str
    model: str
    model_type: str
    parameters: int
    max_positions: int | None
    dtype: str | None
    implementation: str | None
    tokens: int
    layers: tuple[LayerFacts, ...]
    problem: str | None
    note: str
    seen: int

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers that can attend sparsely."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.reason is None and layer.known)

    @property
    def unknown_layers(self) -> tuple[int, ...]:
        """Layers that may attend sparsely or not: their attention calls were not seen."""
        return tuple(index for index, layer in enumerate(self.layers) if not layer.known)


def inspect_config(config: Any, name: str) -> Inspection:
    """Inspect the model of a transformers configuration.

    Args:
        config: from :func:`xcalib.models.empty.read_config`.
        name: what the user calls it.

    Raises:
        ModelError: transformers has no model for the configuration.
    """
    try:
        return inspect_model(empty_model(config, name), name)
    except NotCausalError as error:
        other = _other_model(config)
        if other is None:
            raise
        found = inspect_model(other, name)
        if found.problem is not None:
            return found
        return _of_another_kind(found, other, error)


def _of_another_kind(found: Inspection, model: Any, error: NotCausalError) -> Inspection:
    """A model that is no causal language model: xcalib patches its text decoder in Python, and its commands cannot load it."""
    if model.config.get_text_config() is model.config:
        return replace(found, layers=_all_dense(found.layers, "not causal"), problem=str(error))
    note = (
        "the layers are those of the text decoder. xcalib's commands load causal language models only: load this one in Python, "
        "and give it to xcalib.search and xcalib.apply_profile"
    )
    return replace(found, note=note)


def _all_dense(layers: tuple[LayerFacts, ...], reason: str) -> tuple[LayerFacts, ...]:
    return tuple(replace(layer, reason=layer.reason or reason, known=True) for layer in layers)


def _other_model(config: Any) -> Any:
    import transformers

    for name in ("AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel"):
        kind: Any = getattr(transformers, name, None)
        try:
            return build_empty(kind, config)
        except Exception:  # models' code raises anything
            continue
    return None


def inspect_model(model: Any, name: str) -> Inspection:
    """Inspect a transformers model, whose weights may be on the meta device; on any other nothing is computed with them.

    Args:
        model: a transformers model.
        name: what the user calls it.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) and positions > 1 else None
    tokens = min(LONGEST, positions or LONGEST)
    attention, problem = _attention_of(model)
    served: tuple[int, ...] = ()
    if problem is None:
        served, problem = _served(model)
    attention = [layer for layer in attention if layer.index in served]
    calls = _calls(model, attention, tokens) if problem is None and _is_empty(model) else {}
    layers = _layers(model, attention, calls, tokens)
    if problem is None and not any(layer.reason is None for layer in layers):
        reasons = dict.fromkeys(layer.reason for layer in layers if layer.query_heads)
        problem = (
            f"no layer can attend sparsely: {', '.join(str(reason) for reason in reasons) or 'none has attention'}"
        )
    dtype = getattr(config, "dtype", None) or getattr(model.config, "dtype", None)
    return Inspection(
        name=name,
        model=type(model).__name__,
        model_type=str(config.model_type),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_positions=positions,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        implementation=getattr(config, "_attn_implementation", None),
        tokens=tokens,
        layers=layers if problem is None else _all_dense(layers, problem),
        problem=problem,
        note="",
        seen=len(calls),
    )


def _is_empty(model: Any) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def _attention_of(model: Any) -> tuple[list[AttentionLayer], str | None]:
    """The attention layers, and why there are none."""
    try:
        describe_model(model)
        return attention_layers(model), None
    except ModelError as error:
        return [], str(error)
    except Exception as error:  # configurations whose layers differ raise their own kinds
        return [], one_line(f"{type(model).__name__}: its configuration is not one of plain decoders ({error})", 200)


def _served(model: Any) -> tuple[tuple[int, ...], str | None]:
    """The layers whose attention can be replaced, and why there are none."""
    try:
        with patch_attention(model, lambda _call: None) as patch:
            return patch.layers, None
    except ModelError as error:
        return (), str(error)


class _Seen(Exception):
    """An attention call is known: nothing else of its block is of interest."""


def _calls(model: Any, attention: Sequence[AttentionLayer], tokens: int) -> dict[int, AttentionCall]:
    """Every layer's attention call in a pass of ``tokens`` tokens, as far as the pass comes without weights."""
    found: dict[int, AttentionCall] = {}

    def compute(call: AttentionCall) -> torch.Tensor:
        found.setdefault(call.layer, call)
        raise _Seen

    try:
        blocks = list(decoder_blocks(model)[1])
        with patch_attention(model, compute), torch.no_grad(), _passing_on(blocks, {one.block for one in attention}):
            # With a cache, for without one the values of position_ids are looked at, in search of packed sequences.
            decoder_of(model)(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=True)
    except Exception:  # what depends on values cannot run without them; what was seen until then is known
        return found
    return found


@contextmanager
def _passing_on(blocks: Sequence[nn.Module], asked: Collection[nn.Module]) -> Iterator[None]:
    """Let blocks hand on the hidden states that they get: after their attention, or at once where they are not ``asked``."""

    def forward(own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        if own is not None:
            with suppress(Exception):  # models' code raises anything
                own(*args, **kwargs)
        return args[0] if args else kwargs["hidden_states"]

    for block in blocks:
        block.forward = partial(forward, block.forward if block in asked else None)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _layers(
    model: Any, attention: Sequence[AttentionLayer], calls: dict[int, AttentionCall], tokens: int
) -> tuple[LayerFacts, ...]:
    config = model.config.get_text_config()
    by_index = {layer.index: layer for layer in attention}
    count = max([int(getattr(config, "num_hidden_layers", 0) or 0), *(index + 1 for index in by_index)])
    kinds = getattr(config, "layer_types", None) or ()
    found = []
    for index in range(count):
        kind = str(kinds[index]) if index < len(kinds) else None
        if index in by_index:
            call = calls.get(index) or _assumed_call(by_index[index], config, tokens)
            facts = _facts(by_index[index], kind, call, int(config.num_attention_heads), config)
            found.append(replace(facts, known=index in calls or facts.reason is not None))
        else:
            found.append(LayerFacts(kind or "other", reason="no attention that could be replaced"))
    return tuple(found)


def _facts(layer: AttentionLayer, kind: str | None, call: AttentionCall, heads: int, config: Any) -> LayerFacts:
    _, q_heads, _, head_dim = call.query.shape
    reason = call.dense_reason or ("layer with another number of heads" if q_heads != heads else None)
    name, window = _KINDS.get(kind or "", kind or "full"), _window(layer.attention, kind, reason, config)
    if window is not None and name == "full":
        name = "sliding"
    return LayerFacts(name, window, q_heads, call.key.shape[1], head_dim, reason)


def _window(attention: nn.Module, kind: str | None, reason: str | None, config: Any) -> int | None:
    """Keys that a query sees; some configurations name layers full whose modules have a window."""
    if kind == "chunked_attention":
        window = getattr(config, "attention_chunk_size", None)
    else:
        local = kind == "sliding_attention" or reason == "sliding window"
        window = getattr(attention, "sliding_window", None) if local or kind is None else None
        window = getattr(config, "sliding_window", None) if window is None and local else window
    return window if isinstance(window, int) and not isinstance(window, bool) else None


def _assumed_call(layer: AttentionLayer, config: Any, tokens: int) -> AttentionCall:
    """The call of a layer that the pass did not reach, by its attributes."""
    module: Any = layer.attention
    q_heads = int(config.num_attention_heads)
    k_heads = int(getattr(config, "num_key_value_heads", None) or q_heads)
    query = torch.empty(1, q_heads, tokens, int(module.head_dim), device="meta")
    key = query.new_empty(1, k_heads, tokens, int(module.head_dim))
    reason = dense_reason(module, query, key, key, mask=None, kwargs={}, no_mask="upper-left")
    if _is_cross_attention(layer):
        reason = "cross-attention"
    return AttentionCall(layer.index, module, query, key, key, 1.0, reason)


def _is_cross_attention(layer: AttentionLayer) -> bool:
    """Whether its class or its name says that the keys are not those of the text."""
    names = [name for name, module in layer.block.named_modules() if module is layer.attention]
    names.append(type(layer.attention).__name__)
    return any(re.search("cross_?att", name, re.IGNORECASE) for name in names)
