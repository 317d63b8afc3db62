"""Equal density, limits and verdicts, on figures whose answer is known."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xcalib.ablate.equal import AtDensity, at_density, draw_weights, interval_of
from xcalib.ablate.limits import candidates, limits_around
from xcalib.ablate.measure import Measured
from xcalib.ablate.paper import PAPER
from xcalib.ablate.variants import TABLES, Scoring, Setting, check_tables, variants_of
from xcalib.ablate.verdicts import Counts, judge_orders, sentences
from xcalib.errors import AblationError

SAMPLES = 8
MANY = Counts(8, 0)
FACTORS = np.linspace(0.6, 1.7, SAMPLES)  # samples differ in KL, as real ones do


def measured(density: float, scale: float = 1.0, slope: float = 9.0, accuracy: float | None = None) -> Measured:
    """Log KL a line in density: ``scale * exp(-slope * density)``, times a factor for each sample."""
    kl = scale * np.exp(-slope * density) * FACTORS
    visible = np.full(SAMPLES, 1000.0)
    scores = np.full(SAMPLES, np.nan if accuracy is None else accuracy)
    return Measured(kl * 100, np.full(SAMPLES, 100.0), density * visible, visible, scores)


def mean_kl(density: float, scale: float = 1.0, slope: float = 9.0) -> float:
    return float(scale * np.exp(-slope * density) * FACTORS.mean())


# ------------------------------------------------------------------------------------------------------- equal density


@settings(max_examples=50, deadline=None)
@given(low=st.floats(0.05, 0.3), high=st.floats(0.34, 0.9), slope=st.floats(1, 20))
def test_a_line_in_log_kl_is_read_off_exactly(low: float, high: float, slope: float) -> None:
    ends = [measured(high, slope=slope), measured(low, slope=slope)]  # in any order
    found = at_density(ends, [0.8, 0.5], 0.33, draw_weights(SAMPLES, 50))
    assert found is not None
    assert found.kl == pytest.approx(mean_kl(0.33, slope=slope), rel=1e-9)
    assert found.limit == pytest.approx(0.5 + 0.3 * (0.33 - low) / (high - low))
    assert found.around == pytest.approx((low, high))


def test_the_two_settings_next_to_the_density_are_used() -> None:
    far = measured(0.9, scale=100.0)  # off the line: must not matter
    found = at_density([far, measured(0.2), measured(0.4)], [0.99, 0.4, 0.7], 0.3, draw_weights(SAMPLES, 10))
    assert found is not None
    assert found.kl == pytest.approx(mean_kl(0.3))


def test_a_density_that_was_measured_needs_no_line() -> None:
    found = at_density([measured(0.2), measured(0.4)], [0.4, 0.7], 0.4, draw_weights(SAMPLES, 10))
    assert found is not None
    assert (found.kl, found.limit, found.around) == (pytest.approx(mean_kl(0.4)), 0.7, (0.4, 0.4))


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_nothing_is_extrapolated(density: float) -> None:
    assert at_density([measured(0.2), measured(0.4)], [0.4, 0.7], density, draw_weights(SAMPLES, 10)) is None


def test_differences_are_paired() -> None:
    """Samples differ by a factor of three, but one variant always has half the KL of the other: no doubt is left."""
    weights = draw_weights(SAMPLES)
    one = at_density([measured(0.2), measured(0.4)], [None, None], 0.3, weights)
    half = at_density([measured(0.25, scale=0.5), measured(0.45, scale=0.5)], [None, None], 0.3, weights)
    assert one is not None and half is not None
    alone = interval_of(np.exp(half.log_kl_draws))
    assert alone is not None and alone[1] / alone[0] > 1.2
    assert interval_of(np.exp(half.log_kl_draws - one.log_kl_draws)) == pytest.approx((0.5, 0.5))
    assert half.limit is None


def test_accuracy_is_read_off_too_and_samples_that_ask_nothing_are_left_out() -> None:
    low, high = measured(0.2, accuracy=0.5), measured(0.4, accuracy=0.9)
    for one in (low, high):
        one.accuracy[:3] = np.nan
    found = at_density([low, high], [0.4, 0.7], 0.3, draw_weights(SAMPLES, 100))
    assert found is not None
    assert found.accuracy == pytest.approx(0.7)
    assert low.mean_accuracy == pytest.approx(0.5)
    assert interval_of(found.accuracy_draws) == pytest.approx((0.7, 0.7))


def test_draws_take_as_many_samples_as_there_are() -> None:
    weights = draw_weights(5, 200)
    assert weights.shape == (200, 5)
    assert (weights.sum(axis=1) == 5).all()
    assert len({tuple(row) for row in weights}) > 50
    assert len(draw_weights(1)) == 0
    assert interval_of(np.zeros(0)) is None
    assert interval_of(np.full(3, np.nan)) is None


# ------------------------------------------------------------------------------------------------ limits and variants


@pytest.mark.parametrize("policy", ["threshold", "top-k", "ratio"])
@pytest.mark.parametrize("wanted", [0.2, 0.33])
def test_limits_lie_on_both_sides(policy: Any, wanted: float) -> None:
    limits = candidates(policy, 32)
    density = np.maximum(0.12, np.linspace(0.05, 1, len(limits)) ** 1.5)
    found = limits_around(Scoring(8, policy=policy), limits, density, wanted)
    low, high = np.interp(found, limits, density)
    assert low < 0.98 * wanted < 1.02 * wanted < high
    if policy == "top-k":
        assert all(limit in limits for limit in found)


def test_no_limits_where_what_is_always_kept_is_more() -> None:
    limits = candidates("threshold", 32)
    assert limits_around(Scoring(8), limits, np.linspace(0.25, 1, len(limits)), 0.2) == []


def test_limits_just_above_the_floor_still_enclose() -> None:
    limits = candidates("threshold", 32)
    density = np.linspace(0.19, 1, len(limits))
    low, high = np.interp(limits_around(Scoring(8), limits, density, 0.2), limits, density)
    assert 0.19 < low < 0.2 < high


def test_every_table_has_one_baseline_a_group_and_the_papers_lines() -> None:
    for table in PAPER:
        variants = variants_of(table, 8)
        for group in {variant.group for variant in variants}:
            assert sum(variant.baseline for variant in variants if variant.group == group) == 1
        assert {variant.figure for variant in variants} - {""} == set(PAPER[table].figures)
        assert len({variant.name for variant in variants}) == len(variants)
    assert [variant.scoring.stride for variant in variants_of("stride", 8)] == [4, 8, 16, 32, 64]


def test_unknown_tables_are_refused() -> None:
    check_tables(TABLES)
    with pytest.raises(AblationError, match="table 'patterns' is unknown, expected one of pattern, stride"):
        check_tables(("pattern", "patterns"))


def test_a_setting_is_named_by_what_it_does() -> None:
    flat = Setting(Scoring(8), np.full((2, 4), 0.9, dtype=np.float32))
    same = Setting(Scoring(8), np.full((2, 4), 0.9, dtype=np.float32))
    ragged = Setting(Scoring(8), np.array([[0.9, 0.8]], dtype=np.float32))
    assert flat.key == same.key
    assert (
        len(
            {
                flat.key,
                ragged.key,
                Setting(Scoring(16), flat.limits).key,
                Setting(Scoring(8, "diagonal"), flat.limits).key,
                Setting(Scoring(8, order="recent"), flat.limits).key,
            }
        )
        == 5
    )
    assert (flat.limit, ragged.limit) == (pytest.approx(0.9), None)


# ------------------------------------------------------------------------------------------------------------ verdicts


def one(kl: float, spread: float = 0.001, accuracy: float | None = None, seed: int = 0) -> AtDensity:
    rng = np.random.default_rng(seed)
    draws = np.log(kl) + rng.normal(0, spread, 500)
    scores = np.full(500, np.nan) if accuracy is None else accuracy + rng.normal(0, 0.001, 500)
    return AtDensity(kl, accuracy, 0.7, (0.2, 0.4), draws, scores)


def test_close_figures_of_the_paper_are_no_order() -> None:
    claims = {(better, worse) for better, worse, _ in PAPER["stride"].claims()}
    assert claims == {("S=4", "S=64"), ("S=8", "S=64"), ("S=16", "S=64")}
    assert PAPER["pattern"].claims()[0] == ("antidiagonal", "random", 5.99)


def test_a_disagreement_is_said() -> None:
    variants = variants_of("selection", 8)
    found = {"threshold": one(0.10, 1e-6), "top-k": one(0.05, 1e-6, seed=1), "ratio": one(0.2, seed=2)}
    orders = judge_orders("selection", variants, found, 0.2, MANY)
    verdicts = {(order["better"], order["worse"]): order["verdict"] for order in orders}
    assert verdicts == {
        ("threshold", "ratio"): "agrees",
        ("threshold", "top-k"): "disagrees",
        ("ratio", "top-k"): "disagrees",
    }
    lines = sentences(orders, MANY, None)
    assert lines[0].startswith(
        "DISAGREES with the paper, by KL at equal density: 1 of 3 orders confirmed, 2 contradicted"
    )
    assert "threshold has 2.00 times the KL of top-k (95%: 2.00 to 2.00)" in " ".join(lines)
    assert any(line.endswith("4.34 points ahead of top-k: DISAGREES.") for line in lines)
    assert lines[-1] == "Task accuracy was not measured: no held-out sample asks anything (--data ruler does)."


def test_agreement_and_doubt_are_said() -> None:
    variants = variants_of("threshold", 8)
    sure = {"single tau": one(0.2), "published DP": one(0.1, seed=1), "ours": one(0.05, seed=2)}
    lines = sentences(judge_orders("threshold", variants, sure, 0.33, MANY), MANY, None)
    assert lines[0].startswith("Agrees with the paper, by KL at equal density: 1 of 1 orders confirmed")
    assert any("ours has 0.50 times the KL of published DP" in line and "ours is better" in line for line in lines)
    unsure = {"single tau": one(0.11, 0.2), "published DP": one(0.1, 0.2, seed=1)}
    lines = sentences(judge_orders("threshold", variants, unsure, 0.33, MANY), MANY, None)
    assert lines[0].startswith("Neither confirms nor contradicts the paper")
    assert lines[1].endswith("not decided.")


def test_patterns_are_compared_at_one_stride_only() -> None:
    variants = variants_of("pattern", 8)
    found = {variant.name: one(0.1 + 0.01 * index, seed=index) for index, variant in enumerate(variants)}
    orders = judge_orders("pattern", variants, found, 0.2, MANY)
    assert len(orders) == 6
    assert all(order["better"].split("S=")[1] == order["worse"].split("S=")[1] for order in orders)


def test_accuracy_has_a_verdict_of_its_own() -> None:
    found = {"single tau": one(0.2, accuracy=0.9), "published DP": one(0.1, accuracy=0.7, seed=1)}
    orders = judge_orders("threshold", variants_of("threshold", 8), found, 0.33, Counts(8, 6))
    assert (orders[0]["verdict"], orders[0]["accuracy_verdict"]) == ("agrees", "disagrees")
    last = sentences(orders, Counts(8, 6), 0.95)[-1]
    assert last == (
        "By task accuracy at equal density (6 held-out samples ask something; dense 95.0%): "
        "0 orders confirmed, 1 contradicted, 0 not decided."
    )
    assert "the dense model answers none" in sentences(orders, Counts(8, 6), 0.0)[-1]


def test_few_samples_say_nothing() -> None:
    variants = variants_of("threshold", 8)
    found = {"single tau": one(0.2, accuracy=0.9), "published DP": one(0.1, accuracy=0.7, seed=1)}
    orders = judge_orders("threshold", variants, found, 0.33, Counts(4, 4))
    assert (orders[0]["verdict"], orders[0]["accuracy_verdict"]) == (None, None)
    assert sentences(orders, Counts(4, 4), 0.9) == [
        "Nothing is said about the paper: that takes 5 held-out samples, here are 4."
    ]
    assert sentences([], MANY, None)[0].startswith("Nothing is said about the paper")
    orders = judge_orders("threshold", variants, found, 0.33, Counts(8, 1))
    assert (orders[0]["verdict"], orders[0]["accuracy_verdict"]) == ("agrees", None)
    assert sentences(orders, Counts(8, 1), 0.9)[-1] == (
        "Task accuracy gives no verdict: 1 held-out sample asks something (dense 90.0%), and that takes 5."
    )


def test_without_an_interval_there_is_no_verdict() -> None:
    none = np.zeros(0)
    kls = {"single tau": 0.2, "published DP": 0.1}
    found = {name: AtDensity(kl, None, 0.5, (0.2, 0.4), none, none) for name, kl in kls.items()}
    (order,) = judge_orders("threshold", variants_of("threshold", 8), found, 0.33, Counts(1, 0))
    assert (order["verdict"], order["kl_ratio"], order["kl_ratio_interval"]) == (None, 0.5, None)
