"""Slopes with all layers sparse, and the search that goes on from them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xcalib.collect import CollectSettings, Curves, collect
from xcalib.collect.gains import GainMeter
from xcalib.collect.shares import Shares
from xcalib.collect.slopes import SlopeMeter
from xcalib.collect.units import Units
from xcalib.errors import TargetError
from xcalib.kernels import block_sparse_attention, estimate_blocks
from xcalib.kernels.geometry import Geometry
from xcalib.kernels.reference import block_levels
from xcalib.kernels.slopes import sweep_slopes
from xcalib.models.attention import AttentionCall, patch_attention
from xcalib.models.logits import LogitHead, sampled_positions
from xcalib.profile import Profile, SearchRound, make_profile
from xcalib.search import Tables, build_profile, parse_target, parse_targets, plan_point, refine_point
from xcalib.search import search as search_model
from xcalib.search._space import price_space
from xcalib.search.sequential import Sequential

SETTINGS = CollectSettings(block_size=64, gain_samples=1, gain_every=3, grid=(0.0, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0))
LENGTHS = [400, 420, 390]


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 200), st.integers(0, 150)),
    group=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([32, 40]),
    seed=st.integers(0, 99),
)
def test_slopes_are_inner_products_with_every_levels_output(
    lengths: tuple[int, int], group: int, head_dim: int, seed: int
) -> None:
    q_len, k_len = lengths[0], sum(lengths)
    random = torch.Generator().manual_seed(seed)
    query, gradient = torch.randn(2, 2, 2 * group, q_len, head_dim, generator=random)
    key, value = torch.randn(2, 2, 2, k_len, head_dim, generator=random)
    grid = torch.tensor([0.0, 0.2, 0.6, 0.9, 1.0], dtype=torch.float64)
    scores = estimate_blocks(query, key, block_size=64)
    level = block_levels(scores, grid, Geometry(q_len, k_len, 64, True))
    found = sweep_slopes(query, key, value, gradient, level, 5, block_size=64, scale=head_dim**-0.5)
    for index in range(5):
        output = block_sparse_attention(query, key, value, level <= index, block_size=64)
        expected = (output * gradient).double().sum((0, 2, 3))
        torch.testing.assert_close(found[:, index], expected, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def samples(random_samples: Callable[..., Any]) -> Any:
    return random_samples(LENGTHS)


@pytest.fixture(scope="module")
def curves(model: Any, samples: Any, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    return collect(model, samples, tmp_path_factory.mktemp("curves") / "c", settings=SETTINGS)


@pytest.fixture
def levels(curves: Curves) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 6, size=curves.error.shape[1:3])


def dense_hidden(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return LogitHead(model).prefill(tokens).hidden[sampled_positions(SETTINGS.gain_every)].clone()


def kl_with_a_head_between(
    model: Any,
    tokens: torch.Tensor,
    levels: np.ndarray,
    head: tuple[int, int],
    other: int,
    share: float,
    chosen: dict[int, Any],
) -> float:
    """KL when one head's output lies ``share`` of the way from its level's to another level's.

    ``chosen`` keeps each layer's blocks by level from the first call, for a slope knows nothing of blocks that change places.
    """
    grid = torch.tensor(SETTINGS.grid, dtype=torch.float64)

    def compute(call: AttentionCall) -> torch.Tensor:
        geometry = Geometry(call.query.shape[2], call.key.shape[2], 64, True)
        scores = estimate_blocks(call.query, call.key, block_size=64, scale=call.scale, pattern=SETTINGS.pattern)
        level = chosen.setdefault(call.layer, block_levels(scores, grid, geometry, SETTINGS.order))

        def at(taken: torch.Tensor) -> torch.Tensor:
            mask = level <= taken[:, None, None]
            return block_sparse_attention(call.query, call.key, call.value, mask, block_size=64, scale=call.scale)

        own = torch.tensor(levels[call.layer])
        output = at(own)
        if call.layer == head[0]:
            changed = own.clone()
            changed[head[1]] = other
            output = output + share * (at(changed) - output)
        return output

    with torch.no_grad(), patch_attention(model, compute):
        hidden = LogitHead(model).prefill(tokens).hidden[sampled_positions(SETTINGS.gain_every)].clone()
    return float(LogitHead(model).kl(dense_hidden(model, tokens), [hidden]).double().mean())


def test_slopes_are_the_derivative_of_the_kl(model: Any, samples: Any, curves: Curves, levels: np.ndarray) -> None:
    tokens = torch.tensor(samples.samples[0].tokens)
    found = SlopeMeter(model, SETTINGS, curves.layers).measure(tokens, levels, dense_hidden(model, tokens))
    assert found.slope.shape == (*levels.shape, len(SETTINGS.grid))
    thresholds = curves.grid[levels][None]
    dense = dense_hidden(model, tokens).numpy()
    together = GainMeter(model, SETTINGS, levels.shape[1]).together(tokens, curves.layers, thresholds, dense)
    assert found.kl == pytest.approx(float(together[0]), rel=1e-3)
    chosen: dict[int, Any] = {}
    unchanged = kl_with_a_head_between(model, tokens, levels, (0, 0), 0, 0.0, chosen)
    assert unchanged == pytest.approx(found.kl, rel=1e-3)
    for layer, head, other in [(0, 1, 6), (1, 0, 0), (2, 3, 3)]:
        ends = [
            kl_with_a_head_between(model, tokens, levels, (layer, head), other, share, chosen) for share in (-0.1, 0.1)
        ]
        slope = found.slope[layer, head, other] - found.slope[layer, head, levels[layer, head]]
        assert slope == pytest.approx((ends[1] - ends[0]) / 0.2, rel=0.05, abs=2e-6)


def test_the_model_is_left_as_it_was(model: Any, samples: Any, curves: Curves, levels: np.ndarray) -> None:
    tokens = torch.tensor(samples.samples[0].tokens)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    dense = dense_hidden(model, tokens)
    SlopeMeter(model, SETTINGS, curves.layers).measure(tokens, levels, dense)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(dense_hidden(model, tokens), dense)


def planned(curves: Curves, text: str) -> Any:
    return plan_point(Tables.of(curves), parse_target(text))


def test_a_step_is_taken_only_if_other_samples_confirm_it(model: Any, samples: Any, curves: Curves) -> None:
    first = planned(curves, "density=0.6")
    found = Sequential(model, samples, Tables.of(curves)).improve(parse_target("density=0.6"), first, rounds=3)
    assert len(found.rounds) <= 3
    assert found.density <= 0.6 * (1 + 1e-9)
    start = float(np.mean([_kl(model, samples, curves, first.thresholds, i) for i in range(3)]))
    end = float(np.mean([_kl(model, samples, curves, found.thresholds, i) for i in range(3)]))
    taken = [one for one in found.rounds if one.taken]
    if taken:
        assert end < start
        assert taken[-1].measured == pytest.approx(end, rel=1e-6)
        assert found.bound is None
    else:
        assert np.array_equal(found.thresholds, first.thresholds)
        assert (found.kl, found.bound) == (first.kl, first.bound)
    assert all(one.others < start for one in taken)


def _kl(model: Any, samples: Any, curves: Curves, thresholds: np.ndarray, index: int) -> float:
    tokens = torch.tensor(samples.samples[index].tokens)
    dense = dense_hidden(model, tokens).numpy()
    meter = GainMeter(model, SETTINGS, thresholds.shape[1])
    return float(meter.together(tokens, curves.layers, thresholds[None], dense)[0])


class Quadratic(Sequential):
    """A model of two heads whose errors cancel: the KL is (a - b)^2, with a and b the heads' errors by level."""

    amplitude = np.array([1.2, 1.0, 0.8, 0.5, 0.3, 0.1, 0.0])

    def __init__(self, curves: Curves, cost: np.ndarray) -> None:
        error = np.stack([self.amplitude**2] * 2)[None]
        fake = dataclasses.replace(
            curves,
            error=error[None],
            energy=np.ones((1, 1)),
            gain=np.ones(1),
            layers=(0,),
            kept=np.zeros((1, 1, 2, 7), int),
        )
        loss = error.reshape(2, 7)
        super().__init__(None, None, Tables(fake.grid, cost, loss, loss, (1, 2), fake))  # type: ignore[arg-type]

    @property
    def _count(self) -> int:
        return 2

    def _kl(self, what: str, levels: Any) -> np.ndarray:
        return np.array([self._value(own) for own in levels])

    def _value(self, levels: np.ndarray) -> float:
        first, second = self.amplitude[levels[0]]
        return float((first - second) ** 2 + 1e-4)

    def _slopes(self, levels: np.ndarray) -> np.ndarray:
        first, second = self.amplitude[levels[0]]
        slope = 2 * (first - second)
        one = np.stack([slope * self.amplitude, -slope * self.amplitude])[None]  # (layers, heads, levels)
        return np.stack([one, one])


def test_errors_that_cancel_are_found(curves: Curves) -> None:
    cost = np.tile(np.linspace(0.1, 0.5, 7), (2, 1))
    work = Quadratic(curves, cost)
    start = np.array([[0.0, 0.95]])  # one head at its largest error, the other nearly exact
    first = dataclasses.replace(planned(curves, "density=0.6"), thresholds=start, kl=1.21)
    found = work.improve(parse_target("density=0.65"), first, rounds=4)
    assert any(one.taken for one in found.rounds)
    assert work._value(work._levels_of(found.thresholds)) < 0.5 * work._value(work._levels_of(start))
    assert work._cost(work._levels_of(found.thresholds)) <= 0.65 * (1 + 1e-9)


def test_a_kl_target_saves_blocks_or_stays(model: Any, samples: Any, curves: Curves) -> None:
    target = parse_target(f"kl={planned(curves, 'density=0.6').kl}")
    first = plan_point(Tables.of(curves), target)
    found = Sequential(model, samples, Tables.of(curves)).improve(target, first, rounds=2)
    if any(one.taken for one in found.rounds):
        assert found.density < first.density or found.kl < first.kl
    else:
        assert np.array_equal(found.thresholds, first.thresholds)


def test_accuracy_has_no_slope_and_no_rounds_are_none(model: Any, samples: Any, curves: Curves) -> None:
    first = planned(curves, "density=0.6")
    work = Sequential(model, samples, Tables.of(curves))
    assert work.improve(parse_target("drop=1%"), first, rounds=3) is first
    assert work.improve(parse_target("density=0.6"), first, rounds=0) is first


def test_interrupted_rounds_go_on_and_give_the_same(
    model: Any, samples: Any, curves: Curves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, first = parse_target("density=0.6"), planned(curves, "density=0.6")
    whole = Sequential(model, samples, Tables.of(curves)).improve(target, first, rounds=2)
    measure, calls = SlopeMeter.measure, []

    def stopping(self: SlopeMeter, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(SlopeMeter, "measure", stopping)
    units = Units(tmp_path / "u", {"a": 1}, resume=False)
    with pytest.raises(KeyboardInterrupt):
        Sequential(model, samples, Tables.of(curves), Shares(units)).improve(target, first, rounds=2)
    again = Units(tmp_path / "u", {"a": 1}, resume=True)
    found = Sequential(model, samples, Tables.of(curves), Shares(again)).improve(target, first, rounds=2)
    assert np.array_equal(found.thresholds, whole.thresholds)
    assert found.rounds == whole.rounds
    assert len(calls) < 2 * len(LENGTHS) * 2  # the first sample was not measured again


def test_one_sample_has_no_others(model: Any, random_samples: Any, tmp_path: Path) -> None:
    samples = random_samples([400])
    curves = collect(model, samples, tmp_path / "c", settings=SETTINGS)
    found = Sequential(model, samples, Tables.of(curves)).improve(
        parse_target("density=0.6"), planned(curves, "density=0.6"), rounds=1
    )
    assert all(one.others == one.measured for one in found.rounds)


def test_search_records_rounds(model: Any, samples: Any, curves: Curves, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xcalib.search.sequential.DOUBT", 0.0)  # heads of a random model do little to each other
    monkeypatch.setattr("xcalib.search.sequential.DAMPING", 0.1)
    profile = search_model(model, samples, target="a:density=0.6", curves=curves, rounds=1)
    (point,) = profile.points
    assert point.rounds is not None
    assert len(point.rounds) == 1
    text = json.loads(profile.model_dump_json())
    assert set(text["points"][0]["rounds"][0][0]) == {"expected", "measured", "others", "density", "taken"}
    plain = search_model(model, samples, target="a:density=0.6", curves=curves, rounds=0)
    assert plain.points[0].rounds is None
    assert "rounds" not in json.loads(plain.model_dump_json())["points"][0]
    assert plain == build_profile(curves, parse_targets(["a:density=0.6"]))


def test_fewer_than_no_rounds(model: Any, samples: Any) -> None:
    with pytest.raises(TargetError, match="rounds is -1, expected at least 0"):
        search_model(model, samples, rounds=-1)


def test_other_samples_than_the_curves_give_no_rounds(model: Any, random_samples: Any, curves: Curves) -> None:
    profile = search_model(model, random_samples([400], seed=5), target="a:density=0.6", curves=curves, rounds=2)
    assert profile.points[0].rounds is None


def searched_again(curves: Curves, seed: int) -> Profile:
    """A profile as if a round had been taken, to thresholds on the grid that no knapsack gives."""
    profile = build_profile(curves, parse_targets(["a:density=0.6"]))
    levels = np.random.default_rng(seed).integers(1, 6, size=curves.error.shape[1:3])
    taken = SearchRound(expected=0.01, measured=0.012, others=0.013, density=0.6, taken=True)
    thresholds = (tuple(map(tuple, curves.grid[levels].tolist())),)
    point = profile.point().model_copy(update={"thresholds": thresholds, "rounds": ((taken,),), "bound": None})
    return make_profile(**{**dict(profile), "points": (point,)})


@pytest.mark.parametrize("seed", range(5))
def test_a_point_searched_again_is_where_a_refinement_starts(curves: Curves, seed: int) -> None:
    profile = searched_again(curves, seed)
    space = price_space(profile, profile.point(), curves, groups=2, bin_index=0)
    start = np.array(profile.point().thresholds[0])
    assert np.array_equal(space.thresholds([0.0, 0.0]), start)
    levels = np.abs(start.reshape(-1, 1, 1) - curves.grid).argmin(-1)
    priced = space.tables.loss + space.tables.cost
    own = np.take_along_axis(priced, levels, axis=1)
    assert (own <= priced.min(axis=1, keepdims=True) + 1e-9).all()
    assert (space.tables.loss >= 0).all()
    assert np.array_equal(plan_point(space.tables, space.target).thresholds, start)  # so small shifts move little
    cheaper, dearer = space.thresholds([1.0, -1.0]), space.thresholds([-1.0, 1.0])
    assert cheaper[0].sum() <= dearer[0].sum()
    assert not np.array_equal(cheaper, dearer)
    for shifted in (cheaper, dearer):
        assert space.tables.at(space.tables.cost, shifted) <= space.target.value * (1 + 1e-9)


def test_a_point_searched_again_can_be_refined(model: Any, samples: Any, curves: Curves, random_samples: Any) -> None:
    profile = searched_again(curves, 0)
    validation = random_samples([400, 410], seed=9)
    found = refine_point(model, profile, curves, samples, validation, trials=3, groups=2, every=3)
    assert found.trials["complete"] + found.trials["pruned"] == 3
    assert found.profile.point().rounds == profile.point().rounds
