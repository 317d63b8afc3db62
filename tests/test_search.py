"""From curves to profiles: targets are read, met and refused; profiles say what was found."""

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xcalib
from xcalib.collect import CollectSettings, Curves
from xcalib.errors import TargetError
from xcalib.models.sparse import SparseAttention
from xcalib.profile import Profile, load_profile, save_profile
from xcalib.search import (
    DEFAULT_TARGETS,
    Tables,
    Target,
    build_profile,
    knapsack,
    parse_target,
    parse_targets,
    plan_point,
    uniform_thresholds,
)

Build = Callable[..., Any]
GRID = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
RATIO = 1.5  # of what layers lose together to the sum of what they lose alone


def make_curves(
    layers: tuple[int, ...] = (0, 2, 3), depth: int = 4, heads: int = 4, samples: int = 2, seed: int = 0
) -> Curves:
    """Curves of heads that differ: density from 0.1 to 1, error falling to 0, gains of several sizes."""
    rng = np.random.default_rng(seed)
    shape = (samples, len(layers), heads)
    visible = np.full(samples, 1000)
    shares = np.sort(rng.random((*shape, len(GRID))), axis=-1)
    kept = np.rint(100 + 900 * shares).astype(np.int64)
    kept[..., 0], kept[..., -1] = 100, 1000
    scale = np.exp(rng.normal(0, 1.5, (1, *shape[1:], 1)))
    error = np.sort(rng.random((*shape, len(GRID))), axis=-1)[..., ::-1] * scale
    error[..., -1] = 0
    energy = np.exp(rng.normal(2, 0.3, shape[:2]))
    gain = np.exp(rng.normal(-2, 1, len(layers)))
    gain_error = np.full((1, len(layers)), 0.1)
    joint_sum = np.array([[0.05, 0.01, 0.2]]).repeat(samples, axis=0)
    config = {"stride": 16, "block_size": 64, "grid": GRID, "gain_samples": 1, "joint_densities": (0.3, 0.45, 0.2)}
    return Curves(
        settings=CollectSettings(**config),
        model={
            "name": "synthetic",
            "commit": None,
            "model_type": "llama",
            "layers": depth,
            "query_heads": heads,
            "kv_heads": heads,
            "head_dim": 64,
            "config_sha256": "ab" * 32,
        },
        calibration={
            "sources": ["builtin"],
            "samples": samples,
            "min_length": 2048,
            "max_length": 2048,
            "seed": 0,
            "tokens_sha256": "cd" * 32,
            "documents": ["0123456789abcdef"],
            "gain_samples": 1,
            "dropped": {},
        },
        layers=layers,
        error=error,
        energy=energy,
        kept=kept,
        visible=visible,
        tokens=np.full(samples, 2048),
        gain=gain,
        gain_kl=gain * gain_error,
        gain_error=gain_error,
        joint_sum=joint_sum,
        joint_kl=joint_sum * RATIO,
    )


@pytest.fixture(scope="module")
def curves() -> Curves:
    return make_curves()


@pytest.fixture(scope="module")
def tables(curves: Curves) -> Tables:
    return Tables.of(curves)


# --- targets


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("density=0.25", "density", 0.25),
        ("density=25%", "density", 0.25),
        ("density=1", "density", 1.0),
        ("kl=0.01", "kl", 0.01),
        ("kl=1e-3", "kl", 0.001),
        ("drop=1%", "drop", 0.01),
        ("drop=0", "drop", 0.0),
        ("drop=100%", "drop", 1.0),
        ("speedup=4", "speedup", 4.0),
        ("speedup=1", "speedup", 1.0),
    ],
)
def test_targets_are_read(text: str, kind: str, value: float) -> None:
    target = parse_target(text)
    assert (target.name, target.kind, target.value) == ("balanced", kind, pytest.approx(value))
    assert parse_target(f"my-point_2:{text}") == dataclasses.replace(target, name="my-point_2")
    assert parse_target(str(target)) == target


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected density=, kl=, drop= or speedup= and a number"),
        ("0.25", "expected density=, kl=, drop= or speedup= and a number"),
        ("density", "expected density=, kl=, drop= or speedup= and a number"),
        ("Density=0.2", "expected density=, kl=, drop= or speedup= and a number"),
        ("loss=0.2", "expected density=, kl=, drop= or speedup= and a number"),
        ("density=", "'' is no number; expected a number above 0 and at most 1, as density=0.25"),
        ("density=low", "'low' is no number"),
        ("density=0,2", "'0,2' is no number"),
        ("density=0.2%%", "'0.2%%' is no number"),
        ("density=0", "expected a number above 0 and at most 1"),
        ("density=-0.1", "expected a number above 0 and at most 1"),
        ("density=1.01", "expected a number above 0 and at most 1"),
        ("density=101%", "expected a number above 0 and at most 1"),
        ("density=nan", "expected a number above 0 and at most 1"),
        ("kl=0", "expected nats per token above 0, as kl=0.01"),
        ("kl=inf", "expected nats per token above 0, as kl=0.01"),
        ("drop=-1%", "expected a share of the dense accuracy from 0 to 100%, as drop=1%"),
        ("drop=1.5", "expected a share of the dense accuracy from 0 to 100%, as drop=1%"),
        ("speedup=0.5", "expected a factor of at least 1, as speedup=4"),
        ("speedup=inf", "expected a factor of at least 1, as speedup=4"),
        (":density=0.2", "target name ''"),
        ("Fast:density=0.2", "target name 'Fast'"),
        ("a b:density=0.2", "target name 'a b'"),
        ("2x:density=0.2", "target name '2x'"),
        (f"{'a' * 33}:density=0.2", "expected lower-case letters, digits"),
        ("fast\n:density=0.2", "target name 'fast\\n'"),
        ("a:b:density=0.2", "expected density=, kl=, drop= or speedup= and a number"),
    ],
)
def test_malformed_targets(text: str, said: str) -> None:
    for texts in ([text], [text, "kl=0.1"]):
        with pytest.raises(TargetError) as caught:
            parse_targets(texts)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_default_targets() -> None:
    assert parse_targets([]) == DEFAULT_TARGETS
    assert [(target.name, target.value) for target in DEFAULT_TARGETS] == [
        ("fidelity", 0.45),
        ("balanced", 0.33),
        ("fast", 0.22),
    ]


@pytest.mark.parametrize(
    "text", ["density=0.3", "density=0.9", "kl=0.01", "drop=2%", "drop=50%", "speedup=4", "speedup=1"]
)
def test_one_unnamed_target_makes_three_points(text: str) -> None:
    fidelity, balanced, fast = parse_targets([text])
    assert [point.name for point in (fidelity, balanced, fast)] == ["fidelity", "balanced", "fast"]
    assert balanced == parse_target(text)
    order = 1 if balanced.kind == "density" else -1  # more blocks is less speed-up and less loss
    assert order * fidelity.value >= order * balanced.value >= order * fast.value
    for point in (fidelity, fast):
        assert parse_target(str(point), point.name).value == pytest.approx(point.value, rel=1e-5)  # within its limits


def test_named_targets_are_taken_as_they_are() -> None:
    assert parse_targets(["only:kl=0.1"]) == (Target("only", "kl", 0.1),)
    found = parse_targets(["a:density=0.3", "kl=0.1", "b:speedup=2"])
    assert [(target.name, target.kind) for target in found] == [("a", "density"), ("point2", "kl"), ("b", "speedup")]


@pytest.mark.parametrize("texts", [["a:kl=1", "a:kl=2"], ["point2:kl=1", "kl=2"]], ids=str)
def test_two_targets_of_one_name(texts: list[str]) -> None:
    with pytest.raises(TargetError, match="two targets are named"):
        parse_targets(texts)


# --- tables and how losses combine


@pytest.mark.parametrize("objective", ["gain", "plain"])
def test_tables(curves: Curves, objective: Any) -> None:
    tables = Tables.of(curves, objective)
    assert tables.shape == (3, 4)
    assert tables.cost.sum(axis=0)[-1] == pytest.approx(1)
    np.testing.assert_allclose(tables.cost.sum(axis=0), curves.density.mean(axis=(0, 1)))
    kl = curves.gain[:, None, None] * curves.relative_error
    np.testing.assert_array_equal(tables.kl, kl.reshape(12, -1))
    np.testing.assert_array_equal(
        tables.loss, tables.kl if objective == "gain" else curves.relative_error.reshape(12, -1)
    )


def test_tables_between_levels(tables: Tables) -> None:
    thresholds = np.full(tables.shape, 0.6)
    assert tables.at(tables.cost, thresholds) == pytest.approx((tables.cost[:, 2] + tables.cost[:, 3]).sum() / 2)


@pytest.mark.parametrize("losses", [1e-12, 1e-5, 0.01, 0.03, 0.05, 0.2, 1.0, 50.0])
def test_joint_and_alone_are_inverse(losses: float) -> None:
    curves = make_curves()
    assert curves.joint(losses) == pytest.approx(RATIO * losses)
    bent = dataclasses.replace(curves, joint_kl=curves.joint_sum * np.array([1.4, 1.1, 2.0]))
    assert bent.alone(bent.joint(losses)) == pytest.approx(losses, rel=1e-9)
    assert bent.joint(bent.alone(losses)) == pytest.approx(losses, rel=1e-9)


def test_joint_is_measured_at_its_own_points() -> None:
    curves = make_curves()
    ratio = np.array([1.4, 1.1, 2.0])
    bent = dataclasses.replace(curves, joint_kl=curves.joint_sum * ratio)
    for losses, factor in zip(curves.joint_sum[0], ratio, strict=True):
        assert bent.joint(losses) == pytest.approx(factor * losses)
    assert bent.joint(0.0) == 0
    assert bent.joint(1e-9) == pytest.approx(1.1e-9)
    assert bent.joint(10.0) == pytest.approx(20.0)


def test_joint_ignores_what_was_not_measured() -> None:
    """Beyond the gain samples only the first allocation has a KL: it moves the level of all."""
    curves = make_curves(samples=3)
    kl = curves.joint_sum * RATIO
    kl[1:, 1:] = np.nan
    kl[1:, 0] *= 2
    assert dataclasses.replace(curves, joint_kl=kl).joint(0.05) == pytest.approx(0.05 * RATIO * 5 / 3)


# --- operating points


def levels_of(planned: Any) -> np.ndarray:
    found = np.abs(planned.thresholds[..., None] - np.array(GRID)).argmin(-1)
    np.testing.assert_array_equal(np.array(GRID)[found], planned.thresholds)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("objective,power", [("gain", 1.0), ("tempered", 0.75)])
@pytest.mark.parametrize("density", [0.12, 0.2, 0.3, 0.5, 0.99, 1.0])
def test_density_is_kept(density: float, objective: Any, power: float, seed: int) -> None:
    curves = make_curves(seed=seed)
    tables = Tables.of(curves, objective)
    planned = plan_point(tables, Target("p", "density", density))
    levels = levels_of(planned)[..., None]
    assert planned.density == pytest.approx(np.take_along_axis(curves.density, levels, -1).mean())
    assert planned.density <= density * (1 + 1e-9)
    loss = curves.gain[:, None] * np.take_along_axis(curves.relative_error, levels, -1)[..., 0]
    assert planned.kl == pytest.approx(RATIO * loss.sum())
    assert planned.bound is not None
    assert planned.bound.cost == pytest.approx(planned.density)
    assert planned.bound.error == pytest.approx((loss**power).sum())
    assert planned.bound.lower_bound <= planned.bound.error
    tau = uniform_thresholds(tables, density)
    assert objective != "gain" or planned.kl <= 1.001 * tables.predicted_kl(
        np.full(tables.shape, GRID[np.searchsorted(GRID, tau, "right") - 1])
    )


@pytest.mark.parametrize("factor", [1.0, 2.0, 5.0, 9.0])
def test_speedup_is_the_inverse_of_density(tables: Tables, factor: float) -> None:
    fast = plan_point(tables, Target("p", "speedup", factor))
    same = plan_point(tables, Target("p", "density", 1 / factor))
    np.testing.assert_array_equal(fast.thresholds, same.thresholds)
    assert 1 / fast.density >= factor * (1 - 1e-9)


@pytest.mark.parametrize("kl", [1e-6, 1e-3, 0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("objective", ["gain", "plain"])
def test_kl_is_kept_with_the_fewest_blocks(curves: Curves, kl: float, objective: Any) -> None:
    tables = Tables.of(curves, objective)
    planned = plan_point(tables, Target("p", "kl", kl))
    assert planned.kl <= kl * (1 + 1e-9)
    assert planned.bound is not None
    assert planned.bound.cost == pytest.approx(planned.density)
    assert planned.bound.lower_bound <= planned.bound.cost
    # one block less anywhere would break it, or there is none less
    cheapest = Tables.of(curves).cost.min(axis=1).sum()
    if planned.density > cheapest * 1.001:
        tighter = plan_point(Tables.of(curves), Target("p", "density", planned.density * 0.999))
        assert tighter.kl > kl * (1 - 1e-6) or tighter.density == pytest.approx(planned.density, rel=2e-3)


def test_plain_objective_minimises_output_error(curves: Curves) -> None:
    plain, gain = (Tables.of(curves, objective) for objective in ("plain", "gain"))
    by_error = plan_point(plain, Target("p", "density", 0.3))
    by_gain = plan_point(gain, Target("p", "density", 0.3))
    assert plain.at(plain.loss, by_error.thresholds) <= plain.at(plain.loss, by_gain.thresholds)
    assert by_gain.kl <= by_error.kl
    assert (by_error.thresholds != by_gain.thresholds).any()


@pytest.mark.parametrize("kind", ["density", "speedup", "kl"])
def test_paper_method(curves: Curves, kind: Any) -> None:
    tables = Tables.of(curves)
    value = {"density": 0.4, "speedup": 2.5, "kl": 1.0}[kind]
    planned = plan_point(tables, Target("p", kind, value), method="paper")
    assert planned.bound is None
    assert planned.thresholds.shape == (3, 4)
    steps = np.log(planned.thresholds / 0.9) / np.log(0.9)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-9)  # each tau is 0.9 times 0.9 ** steps
    if kind == "kl":
        assert planned.kl <= value
    else:
        assert planned.density <= 0.4 + 1e-9
    exact = plan_point(tables, Target("p", kind, value))
    assert exact.kl <= planned.kl * 1.05 or kind == "kl"
    higher = plan_point(tables, Target("p", kind, value), method="paper", start_threshold=1.0)
    assert higher.thresholds.max() <= 1


@pytest.mark.parametrize("method", ["knapsack", "paper"])
@pytest.mark.parametrize(("kind", "value"), [("density", 0.05), ("speedup", 11.0)])
def test_out_of_reach(tables: Tables, kind: Any, value: float, method: Any) -> None:
    with pytest.raises(TargetError, match=r"out of reach: the blocks that are always kept are already 0\.100 of all"):
        plan_point(tables, Target("p", kind, value), method=method)


def test_paper_cannot_keep_a_small_loss(tables: Tables) -> None:
    with pytest.raises(TargetError, match=r"cannot be kept: the least error is .*raise start_threshold"):
        plan_point(tables, Target("p", "kl", 1e-9), method="paper")


class Accuracy:
    """A model whose accuracy falls below a density: a drop for each candidate."""

    def __init__(self, tables: Tables, drop: Callable[[float], float]) -> None:
        self.tables, self.drop = tables, drop
        self.densities: list[float] = []

    def __call__(self, candidates: list[np.ndarray]) -> list[float]:
        self.densities += [self.tables.at(self.tables.cost, candidate) for candidate in candidates]
        return [self.drop(density) for density in self.densities]


@pytest.mark.parametrize("edge", [0.15, 0.3, 0.6, 0.85])
def test_drop_takes_the_sparsest_that_holds(tables: Tables, edge: float) -> None:
    accuracy = Accuracy(tables, lambda density: 0.0 if density > edge else 0.05)
    planned = plan_point(tables, Target("p", "drop", 0.01), accuracy_drop=accuracy)
    assert accuracy.densities == sorted(accuracy.densities, reverse=True)
    assert planned.density == min(density for density in accuracy.densities if density > edge)
    loose = plan_point(tables, Target("p", "drop", 0.05), accuracy_drop=Accuracy(tables, accuracy.drop))
    assert loose.density == min(accuracy.densities)


def test_drop_does_not_trust_what_lies_beyond_a_miss(tables: Tables) -> None:
    accuracy = Accuracy(tables, lambda density: 0.05 if 0.3 < density < 0.5 else -0.1)
    planned = plan_point(tables, Target("p", "drop", 0.01), accuracy_drop=accuracy)
    assert planned.density == min(density for density in accuracy.densities if density >= 0.5)


def test_drop_out_of_reach(tables: Tables) -> None:
    with pytest.raises(TargetError, match=r"out of reach: at density 0\.90 the accuracy drops by 20\.0% already"):
        plan_point(tables, Target("p", "drop", 0.01), accuracy_drop=Accuracy(tables, lambda _density: 0.2))


def test_drop_needs_a_model(curves: Curves, tables: Tables) -> None:
    with pytest.raises(TargetError, match=r"target drop=0\.01 needs the model and samples with answers"):
        plan_point(tables, Target("p", "drop", 0.01))
    with pytest.raises(TargetError, match="needs the model and samples with answers"):
        build_profile(curves, parse_targets(["drop=1%"]))


@pytest.mark.parametrize("density", [0.1, 0.25, 0.6, 1.0])
def test_uniform_threshold_has_the_density(tables: Tables, density: float) -> None:
    tau = uniform_thresholds(tables, density)
    assert 0 <= tau <= 1
    assert tables.at(tables.cost, np.full(tables.shape, tau)) == pytest.approx(density)


# --- profiles


def test_profile_with_the_default_points(curves: Curves, tmp_path: Path) -> None:
    profile = build_profile(curves, DEFAULT_TARGETS)
    save_profile(profile, tmp_path / "p.yaml")
    assert load_profile(tmp_path / "p.yaml") == profile
    assert [point.name for point in profile.points] == ["fidelity", "balanced", "fast"]
    assert profile.default_point == "balanced"
    assert profile.dense_layers == (1,)
    assert (profile.method.stride, profile.method.block_size, profile.method.pattern) == (16, 64, "rows")
    assert profile.method.order == curves.settings.order == "recent"
    assert [(found.min_length, found.max_length) for found in profile.length_bins] == [(256, 2049)]
    assert profile.calibration.documents == ("0123456789abcdef",)
    assert set(profile.versions) == {"xcalib", "torch", "transformers", "numpy", "python"}
    tables = Tables.of(curves)
    for point, target in zip(profile.points, DEFAULT_TARGETS, strict=True):
        planned = plan_point(tables, target)
        thresholds = np.array(point.thresholds[0])
        assert thresholds.shape == (4, 4)
        assert (thresholds[1] == 1.0).all()
        np.testing.assert_array_equal(thresholds[[0, 2, 3]], planned.thresholds)
        assert point.predicted.density == pytest.approx(planned.density)
        assert point.predicted.kl == pytest.approx(planned.kl)
        assert point.bound == planned.bound
        assert point.bound is not None and point.bound.gap is not None and point.bound.gap >= 0
        assert point.heldout is None
        assert (point.target, point.objective, point.method) == (str(target), "(gain x output error)^0.75", "knapsack")


def test_a_profile_has_the_order_of_its_curves(curves: Curves) -> None:
    settings = dataclasses.replace(curves.settings, order="score")
    published = build_profile(dataclasses.replace(curves, settings=settings), DEFAULT_TARGETS)
    assert published.method.order == "score"
    assert published.points == build_profile(curves, DEFAULT_TARGETS).points


def test_profile_of_the_other_choices(curves: Curves) -> None:
    profile = build_profile(curves, parse_targets(["a:density=0.4", "b:kl=2"]), method="paper", objective="plain")
    assert profile.default_point == "a"
    assert [(point.objective, point.method, point.bound) for point in profile.points] == [
        ("output error", "paper", None)
    ] * 2


def test_density_1_is_dense(curves: Curves) -> None:
    profile = build_profile(curves, parse_targets(["all:density=1"]))
    assert {tau for row in profile.points[0].thresholds[0] for tau in row} == {1.0}
    assert profile.points[0].predicted.kl == 0
    assert profile.points[0].predicted.density == 1


def test_the_same_curves_give_the_same_file(curves: Curves) -> None:
    assert (
        build_profile(curves, DEFAULT_TARGETS).content_sha256
        == build_profile(make_curves(), DEFAULT_TARGETS).content_sha256
    )


# --- the package that can be called


def test_search_is_callable_and_holds_knapsack() -> None:
    assert callable(xcalib.search)
    assert inspect.isfunction(xcalib.search.knapsack)
    assert xcalib.search.knapsack is knapsack
    choice = xcalib.search.knapsack([[1.0, 2.0]], [[1.0, 0.0]], 2.0)
    assert (choice.choice.tolist(), choice.error) == ([1], 0.0)


FRESH = """
import inspect
{imports}
import xcalib
assert callable(xcalib.search)
assert inspect.isfunction(xcalib.search.knapsack), xcalib.search.knapsack
"""


@pytest.mark.parametrize("imports", ["", "from xcalib.search.knapsack import knapsack", "import xcalib.search.paper"])
def test_whatever_is_imported_first(imports: str) -> None:
    command = [sys.executable, "-c", FRESH.format(imports=imports)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert result.returncode == 0, result.stderr


SETTINGS = CollectSettings(block_size=64, grid=(0.0, 0.4, 0.55, 0.65, 0.75, 1.0), gain_samples=1)


def test_search_from_samples(tiny_model: Build, random_samples: Build, tmp_path: Path) -> None:
    model, data = tiny_model(), random_samples([448, 420])
    target = ["a:density=0.6", "b:density=0.8"]
    heldout = random_samples([450], seed=1, split="heldout")
    profile: Profile = xcalib.search(
        model, data, target=target, heldout=heldout, settings=SETTINGS, folder=tmp_path, name="tiny"
    )
    assert profile.model.name == "tiny"
    assert profile.calibration.tokens_sha256 == data.tokens_sha256
    for point in profile.points:
        assert point.heldout is not None
        assert (point.heldout.samples, point.heldout.tokens) == (1, 450)
        assert point.heldout.density == pytest.approx(point.predicted.density, abs=0.08)
        assert point.heldout.accuracy is None
        assert point.heldout.kl > 0
        assert point.heldout.perplexity != point.heldout.perplexity_dense
    assert (tmp_path / "curves" / "curves.json").is_file()
    arguments: dict[str, Any] = {"target": target, "heldout": heldout, "settings": SETTINGS, "name": "tiny"}
    assert xcalib.search(model, data, folder=tmp_path, resume=True, **arguments) == profile
    assert xcalib.search(model, data, **arguments) == profile  # in a temporary folder


def test_search_without_heldout_samples(tiny_model: Build, random_samples: Build) -> None:
    profile = xcalib.search(tiny_model(), random_samples([448]), target="only:density=0.6", settings=SETTINGS)
    assert [point.heldout for point in profile.points] == [None]


def test_search_with_curves_measures_nothing_again(
    tiny_model: Build, random_samples: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny_model(), random_samples([448])
    first = xcalib.search(model, data, target="a:density=0.6", settings=SETTINGS, folder=tmp_path, rounds=0)
    curves = xcalib.collect.load_curves(tmp_path / "curves")
    monkeypatch.setattr(type(model), "forward", None)
    assert xcalib.search(model, data, target="a:density=0.6", curves=curves, rounds=0) == first


def test_specs_need_a_tokenizer(tiny_model: Build) -> None:
    with pytest.raises(TargetError, match="pass tokenizer= to read them, or pass a SampleSet"):
        xcalib.search(tiny_model(), ["builtin"])


def test_search_from_specs_keeps_heldout_apart(tiny_folder: Path) -> None:
    from xcalib.data import load_samples
    from xcalib.models.loading import load_model
    from xcalib.search import CalibrationData

    loaded = load_model(str(tiny_folder))
    amount = CalibrationData(num_samples=2, heldout_samples=1, max_length=448)
    profile = xcalib.search(
        loaded.model,
        "builtin:prose",
        target="a:density=0.6",
        tokenizer=loaded.tokenizer,
        amount=amount,
        settings=SETTINGS,
    )
    point = profile.points[0]
    assert profile.calibration.samples == 2
    assert point.heldout is not None and point.heldout.tokens == 448
    heldout = load_samples(["builtin:prose"], loaded.tokenizer, num_samples=1, max_length=448, split="heldout")
    assert not heldout.documents & set(profile.calibration.documents)


def test_search_for_a_drop_scores_answers(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Accuracy by a stub: right until fewer than half of the blocks are kept."""
    from xcalib.data import load_samples
    from xcalib.models.loading import load_model

    loaded = load_model(str(tiny_folder))
    data = load_samples(["ruler:single"], loaded.tokenizer, num_samples=1, max_length=512)
    settings = CollectSettings(block_size=64, grid=(0.0, 0.4, 0.55, 0.65, 0.75, 1.0), gain_samples=1)
    with pytest.raises(TargetError, match="the dense model answers none of the calibration questions"):
        xcalib.search(loaded.model, data, target="a:drop=1%", tokenizer=loaded.tokenizer, settings=settings)
    calls: list[str] = []
    monkeypatch.setattr("xcalib.evaluation.score", lambda _sample, text: calls.append(text) or float(len(calls) <= 4))
    orders: list[str] = []
    use = SparseAttention.use
    monkeypatch.setattr(SparseAttention, "use", lambda self, plan: (orders.append(plan.order), use(self, plan))[1])
    profile = xcalib.search(
        loaded.model, data, target="a:drop=1%", tokenizer=loaded.tokenizer, settings=settings, folder=tmp_path
    )
    assert set(orders) == {"recent"}  # of the gains and of the candidates alike
    assert len(calls) == 9  # dense and eight candidates
    assert 0.5 < profile.points[0].predicted.density < 0.9
