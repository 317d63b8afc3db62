"""The report: figures, packing, refusals, escaping, size, PNGs, the card, and what the command says."""

import base64
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xcalib import profiles
from xcalib.errors import CurvesError, ReportError
from xcalib.profile import Evidence, Intervals, Profile, load_profile, make_profile, save_profile
from xcalib.search import build_profile
from xcalib.search.paper import paper_thresholds
from xcalib.search.plan import Tables
from xcalib.search.targets import parse_targets

pytest.importorskip("altair")
pytest.importorskip("jinja2")
pytest.importorskip("vl_convert")

from xcalib.report import Inputs, check_curves, front, published, read_evaluation, summarise, write_page, write_pngs
from xcalib.report.card import render_card
from xcalib.report.charts import front_chart, length_chart
from xcalib.report.evidence import headline, point_rows, unmeasured_lead
from xcalib.report.front import LINE_NAMES, OTHER, POINT, Mark, front_lines, groups_of, marks, method_name
from xcalib.report.heads import cells_of, colour_domains, packed_heads
from xcalib.report.page import MAX_BYTES, render_page, template_text
from xcalib.report.raster import indexed_png
from xcalib.report.summary import MISSING
from xcalib.report.theme import LIGHT, SERIES, in_light, series_look
from xcalib.report.words import interval, number, percent

Run = Callable[..., tuple[int, str, str]]
Make = Callable[..., Any]
DEMO_JSON = Path(__file__).parent.parent / "docs" / "benchmarks" / "demo-seed0.json"
MINUS = "\N{MINUS SIGN}"
HOSTILE = "</script><img src=x onerror=alert(1)>|`${x}"
POINTS = ("fidelity:density=0.5", "balanced:density=0.4", "fast:density=0.3")


def with_evidence(profile: Profile, **changes: Any) -> Profile:
    """Every point measured on 6 samples, a tenth above its prediction, within an interval of a quarter."""
    points = []
    for point in profile.points:
        assert point.predicted is not None
        kl = 1.1 * point.predicted.kl
        figures: dict[str, Any] = {"density": point.predicted.density, "kl": kl, "samples": 6, "tokens": 6000}
        figures |= {"intervals": Intervals(confidence=0.95, resamples=4000, kl=(0.75 * kl, 1.25 * kl))} | changes
        points.append(point.model_copy(update={"heldout": Evidence(**figures), "verified": True}))
    return make_profile(**{**dict(profile), "points": tuple(points)})


@pytest.fixture(scope="module")
def inputs(invented_curves: Make) -> Inputs:
    curves = invented_curves()
    return Inputs(with_evidence(build_profile(curves, parse_targets(POINTS))), (curves,))


def several_lengths(invented_curves: Make, **shape: Any) -> Inputs:
    sets = tuple(invented_curves(length=length, seed=length, **shape) for length in (1024, 2048))
    return Inputs(build_profile(sets, parse_targets(POINTS)), sets)


def renamed(profile: Profile, **changes: Any) -> Profile:
    model = {**profile.model.model_dump(), "name": HOSTILE}
    return make_profile(**{**dict(profile), "model": model, **changes})


# ---- words


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *[(0, "0"), (0.048, "0.0480"), (0.00977, "0.00977"), (3.6361, "3.64"), (100.04, "100"), (98765.4, "98,765")],
        *[(2.5e-6, f"2.5e{MINUS}6"), (-0.0123, f"{MINUS}0.0123")],
    ],
)
def test_three_digits(value: float, said: str) -> None:
    assert number(value) == said


def test_shares_and_intervals() -> None:
    assert percent(0.33406) == "33.4\u202f%"
    assert percent(None) == "\u2013"
    assert interval((0.0334, 0.0649)) == "0.0334 to 0.0649"
    assert interval((-0.02, 0.1), shares=True) == "\u22122.0\u202f% to 10.0\u202f%"


# ---- heads


def test_cells_are_read_off_the_curves(inputs: Inputs) -> None:
    profile, (curves,) = inputs.profile, inputs.curves
    cells = cells_of(inputs, 1, 0)
    assert cells.density is not None and cells.error is not None
    assert cells.tau.shape == (4, 4)
    for row, layer in enumerate(curves.layers):
        for head in range(4):
            tau = profile.points[1].thresholds[0][layer][head]
            assert cells.density[layer, head] == pytest.approx(np.interp(tau, curves.grid, curves.density[row, head]))
            error = np.interp(tau, curves.grid, curves.relative_error[row, head])
            assert cells.error[layer, head] == pytest.approx(error)
    assert (cells.density[1] == 1).all() and (cells.error[1] == 0).all()  # the layer that stays dense


def test_cells_between_levels(inputs: Inputs) -> None:
    point = inputs.profile.points[0]
    taus = [[[0.123 + 0.2 * head for head in range(4)] if layer != 1 else [1.0] * 4 for layer in range(4)]]
    moved = make_profile(
        **{
            **dict(inputs.profile),
            "points": (point.model_copy(update={"thresholds": taus}),),
            "default_point": point.name,
        }
    )
    cells, curves = cells_of(Inputs(moved, inputs.curves), 0, 0), inputs.curves[0]
    assert cells.density is not None
    expected = [np.interp(0.123 + 0.2 * head, curves.grid, curves.density[2, head]) for head in range(4)]
    assert cells.density[3].tolist() == pytest.approx(expected)


def unpacked(text: str, bits: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), f"<u{bits // 8}") / (2**bits - 1)


@pytest.mark.parametrize(("limit", "bits"), [(400_000, 16), (2_500, 8)])
def test_packed_arrays_give_the_figures_back(inputs: Inputs, limit: int, bits: int) -> None:
    packed, (curves,) = packed_heads(inputs, limit), inputs.curves
    assert packed["bits"] == bits
    levels = [int(np.flatnonzero(curves.grid == tau)[0]) for tau in packed["levels"]]
    density = unpacked(packed["curves"][0]["density"], bits).reshape(4, 4, len(levels))
    assert np.abs(density[[0, 2, 3]] - curves.density[..., levels]).max() <= 0.5 / (2**bits - 1) + 1e-12
    low, high = packed["errors"]
    steps = 2**bits - 1
    codes = unpacked(packed["curves"][0]["error"], bits).reshape(4, 4, len(levels))[[0, 2, 3]]
    errors = np.where(codes > 0, low * (high / low) ** ((codes * steps - 1) / (steps - 1)), 0)
    truth = np.maximum(curves.relative_error[..., levels], low) * (curves.relative_error[..., levels] > 0)
    assert errors == pytest.approx(truth, rel=(high / low) ** (0.51 / (steps - 1)) - 1, abs=0)
    taus = unpacked(packed["cells"][1][0]["tau"], 16).reshape(4, 4)
    assert taus == pytest.approx(np.array(inputs.profile.points[1].thresholds[0]), abs=1e-5)


@pytest.mark.parametrize("tau", [0.99995, 1 - 1e-9])
def test_only_a_tau_of_one_is_packed_as_one(inputs: Inputs, tau: float) -> None:
    """The page takes 1, after rounding to four digits, for dense."""
    point = inputs.profile.points[0]
    taus = [[[tau, 1.0, 0.998, 0.5] if layer != 1 else [1.0] * 4 for layer in range(4)]]
    moved = point.model_copy(update={"thresholds": taus})
    profile = make_profile(**{**dict(inputs.profile), "points": (moved,), "default_point": point.name})
    packed = packed_heads(Inputs(profile, inputs.curves))
    shown = unpacked(packed["cells"][0][0]["tau"], 16).reshape(4, 4)
    assert (shown[0, :2].round(4) == (0.9999, 1)).all() and shown[0, 1] == 1
    assert shown[0, 2:].round(4).tolist() == [0.998, 0.5]


def test_colours_of_all_points_are_the_same(inputs: Inputs) -> None:
    domains = colour_domains(inputs)
    assert domains["tau"] == (0, 1)
    for point in range(3):
        cells = cells_of(inputs, point, 0)
        assert cells.density is not None and cells.error is not None
        sparse = cells.tau < 1
        assert cells.density[sparse].min() >= domains["density"][0]
        assert cells.density[sparse].max() <= domains["density"][1]
        assert cells.error.max() <= domains["error"][1]
    assert colour_domains(Inputs(inputs.profile)) == {"tau": (0, 1)}


# ---- density against KL


def test_front_is_predicted_with_the_joint_correction(inputs: Inputs) -> None:
    rows = front_lines(inputs)
    assert {row["series"] for row in rows} == {"search", "single", "paper"}
    tables = Tables.of(inputs.curves[0])
    singles = [row for row in rows if row["series"] == "single"]
    for row in singles[:: len(singles) // 4]:
        taus = np.full(tables.shape, row["tau"])
        assert row["kl"] == pytest.approx(inputs.curves[0].joint(tables.at(tables.kl, taus)))
        assert row["density"] == pytest.approx(tables.at(tables.cost, taus))


def test_search_beats_its_rivals_where_both_are(inputs: Inputs) -> None:
    rows = front_lines(inputs)
    lines = {
        series: np.array(sorted((row["density"], row["kl"]) for row in rows if row["series"] == series))
        for series in ("search", "single", "paper")
    }
    search = lines.pop("search")
    for line in lines.values():
        inside = line[(line[:, 0] >= search[0, 0]) & (line[:, 0] <= search[-1, 0])]
        assert len(inside) >= 3
        best = np.exp(np.interp(inside[:, 0], search[:, 0], np.log(search[:, 1])))
        assert (np.log(best / inside[:, 1])).mean() < 0


def test_operating_points_lie_on_the_front(inputs: Inputs) -> None:
    line = np.array(sorted((row["density"], row["kl"]) for row in front_lines(inputs) if row["series"] == "search"))
    for point in inputs.profile.points:
        assert point.predicted is not None
        there = np.exp(np.interp(point.predicted.density, line[:, 0], np.log(line[:, 1])))
        assert there == pytest.approx(point.predicted.kl, rel=0.2)


def test_front_of_several_lengths_is_pooled(invented_curves: Make) -> None:
    inputs = several_lengths(invented_curves)
    assert all(row["tau"] is None for row in front_lines(inputs))
    point = inputs.profile.points[1]
    assert point.predicted is not None
    line = np.array(sorted((row["density"], row["kl"]) for row in front_lines(inputs) if row["series"] == "search"))
    there = np.exp(np.interp(point.predicted.density, line[:, 0], np.log(line[:, 1])))
    assert there == pytest.approx(point.predicted.kl, rel=0.2)


def test_the_published_recurrence_is_bounded_in_time(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few operations allowed its line ends early, and the others are as they were."""
    whole = front_lines(inputs)
    monkeypatch.setattr(front, "PAPER_OPERATIONS", 2e4)
    asked: list[int] = []

    def counted(*arguments: Any, max_steps: int, **how: Any) -> Any:
        asked.append(max_steps)
        return paper_thresholds(*arguments, max_steps=max_steps, **how)

    monkeypatch.setattr(front, "paper_thresholds", counted)
    cut = front_lines(inputs)
    assert asked and max(asked) <= 1000
    assert [row for row in cut if row["series"] != "paper"] == [row for row in whole if row["series"] != "paper"]


def test_marks_tell_measured_from_predicted(inputs: Inputs) -> None:
    found = marks(inputs)
    assert [(mark.name, mark.kind) for mark in found[:2]] == [("fidelity", "predicted"), ("fidelity", "measured")]
    assert len(found) == 6
    heldout = inputs.profile.points[0].heldout
    assert heldout is not None and heldout.intervals is not None
    assert (found[1].density, found[1].kl, found[1].interval) == (heldout.density, heldout.kl, heldout.intervals.kl)


# ---- evaluations


@pytest.fixture(scope="module")
def like_demo(invented_curves: Make) -> Inputs:
    """Of the demo's shape, with an evaluation that the real demo gave."""
    curves = invented_curves(range(30), layers=30, heads=9)
    profile = build_profile(curves, parse_targets(POINTS))
    return Inputs(profile, (curves,), (read_evaluation(DEMO_JSON, profile),))


def test_single_taus_of_another_method_say_so(like_demo: Inputs) -> None:
    report = summarise(like_demo)
    names = [group.name for group in report.groups]
    assert names == ["operating point", "single tau (published rule: antidiagonal, order score, S 16, B 64)"]
    page = render_page(report)
    assert f"{names[1]}, measured" in page
    assert "another pattern or order are another method" in page
    assert report.groups[1].look == front.PUBLISHED_LOOK != front.OWN_LOOK


def of_every_kind(inputs: Inputs, rules: int) -> list[Mark]:
    """A mark of each kind of group, with single taus by the profile's method, the published rule and some others."""
    own = inputs.profile.method
    others = [published(own).model_copy(update={"block_size": 128 << n}) for n in range(rules)]
    singles = [f"single tau ({method_name(method)})" for method in (own, published(own), *others)]
    return [Mark("x", "measured", group, 0.5, 0.1, None, "test") for group in (OTHER, *reversed(singles), POINT)]


def test_every_kind_of_group_has_a_look_of_its_own(inputs: Inputs) -> None:
    found = groups_of(inputs, of_every_kind(inputs, rules=8))
    looks = {group.name: group.look for group in found}
    assert len(looks) == len(set(looks.values())) == 12
    assert not {look.colour for look in looks.values()} & set(SERIES[:3])  # the lines have these
    kinds = [*found[:3], found[-1]]
    for rules in (0, 3):  # a kind looks alike whatever else is there
        fewer = groups_of(inputs, of_every_kind(inputs, rules))
        assert [*fewer[:3], fewer[-1]] == kinds and len(fewer) == 4 + rules
    assert groups_of(inputs, of_every_kind(inputs, 0)[:1]) == [found[0], found[-1]]
    antidiagonal = make_profile(**{**dict(inputs.profile), "method": published(inputs.profile.method)})
    (_, own) = groups_of(Inputs(antidiagonal), of_every_kind(Inputs(antidiagonal), 0)[1:])
    assert own.look == front.OWN_LOOK  # where the profile's own rule is the published one


def scales(node: Any, channel: str) -> Iterator[dict[str, str]]:
    """What the scales of a channel map names to, in all layers that have a legend."""
    if isinstance(node, dict):
        encoding = node.get("encoding", {}).get(channel, {})
        if encoding.get("legend") and "domain" in encoding.get("scale", {}):
            yield dict(zip(map(str, encoding["scale"]["domain"]), map(str, encoding["scale"]["range"]), strict=True))
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from scales(child, channel)


def test_no_two_entries_of_the_picture_s_legend_are_alike(inputs: Inputs) -> None:
    import vl_convert

    groups = groups_of(inputs, of_every_kind(inputs, rules=4))
    spec = front_chart(groups, summarise(inputs).line_names, 860)
    merged: dict[str, tuple[str, ...]] = {}
    for channel in ("color", "shape", "strokeDash"):
        found = list(scales(spec, channel))
        assert found and all(one == found[0] for one in found)
        for name, value in found[0].items():
            merged[name] = (*merged.get(name, ()), value)
    assert len(merged) == 11 == len(set(merged.values()))
    names = [group.name for group in groups]
    for lines in ([], list(LINE_NAMES.values())):
        vega = vl_convert.vegalite_to_vega(in_light(front_chart(groups, lines, 860)))
        (legend,) = vega["legends"]  # merged: colour, shape and dash in one
        assert {"stroke", "shape", "strokeDash"} <= set(legend) and legend["values"] == [*names, *lines]


def test_points_of_many_names_look_different(inputs: Inputs) -> None:
    names = [f"p{n}" for n in range(9)]
    spec = length_chart("kl", names, 860)
    (colours, *_), (shapes, *_) = list(scales(spec, "color")), list(scales(spec, "shape"))
    assert list(colours) == list(shapes) == names
    assert len({(colours[name], shapes[name]) for name in names}) == 9
    assert len({series_look(index) for index in range(16)}) == 16
    point = {"kind": "measured", "length": "1,000 tokens", "start": 1000, "density": 0.5, "kl": 0.1, "low": None}
    point |= {"high": None, "samples": 1, "source": "test"}
    profile = make_profile(
        **{**dict(inputs.profile), "points": [inputs.profile.points[0].model_copy(update={"name": n}) for n in names]}
        | {"default_point": "p0"}
    )
    report = dataclasses.replace(summarise(Inputs(profile)), lengths=[{**point, "name": name} for name in names])
    key = render_page(report).partition('id="lengths"')[2].partition("</ul>")[0]
    drawn = re.findall(r'class="(c\d)" aria-hidden="true"><path d="([^"]+)"/></svg>(p\d)', key)
    assert [name for _, _, name in drawn] == names
    assert [f"var(--{colour})" for colour, _, _ in drawn] == [colours[name] for name in names]
    assert len({(colour, path) for colour, path, _ in drawn}) == 9
    assert len({(path, shapes[name]) for _, path, name in drawn}) == 4  # a path for each of the chart's shapes


def test_rival_is_the_demos_comparison(like_demo: Inputs) -> None:
    (rival,) = [rival for rival in summarise(like_demo).rivals if rival.point == "balanced"]
    said = json.loads(DEMO_JSON.read_text("utf-8"))["comparison"]
    assert (rival.kl_point, rival.density) == (said["kl"], said["density"])
    assert rival.kl_single == pytest.approx(said["kl_uniform"])
    assert rival.tau == pytest.approx(said["tau_uniform"])
    assert "3.16 times the KL" not in render_page(summarise(like_demo))  # no held-out figures of its own: no sentence
    report = summarise(dataclasses.replace(like_demo, profile=with_evidence(like_demo.profile)))
    of_balanced = next(one for one in report.rivals if one.point == report.inputs.profile.default_point)
    assert of_balanced == rival
    method = "published rule: antidiagonal, order score, S 16, B 64"
    page = " ".join(render_page(report).split())
    assert (
        f"One tau for all heads that keeps as many blocks ({rival.tau:.3f}, between measured ones; {method}) costs "
        f"{number(rival.kl_single)} nats, 3.16 times the KL."
    ) in page
    assert (
        f"At {percent(rival.density)} of the blocks one tau for all heads ({rival.tau:.3f}, between measured ones; {method}) "
        f"has a KL of {number(rival.kl_single)}, 3.16 times the KL of `balanced` ({number(rival.kl_point)})."
    ) in render_card(report, "p.yaml")


def changed_demo(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    document = json.loads(DEMO_JSON.read_text("utf-8"))["evaluation"]
    document = change(document) or document
    (tmp_path / "changed.json").write_text(json.dumps(document), "utf-8")
    return tmp_path / "changed.json"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: [1], "the top level must be a mapping, got [1]"),
        (lambda d: {"a": 1}, "not what 'xcalib evaluate --json' prints: dense: is missing"),
        (lambda d: d["plans"][0].update(density=1.5), "density of 'fidelity' is 1.5"),
        (lambda d: d["plans"][0].update(kl=-1.0), "kl of 'fidelity' is -1.0"),
        (lambda d: d["plans"][3].update(name="tau=9"), "'tau=9' is no single tau between 0 and 1"),
        (lambda d: d["plans"][1].update(density_by_layer=[0.5] * 3), "of a model with 3 layers, the profile's has 30"),
        (lambda d: d.update(plans=[d["plans"][0] | {"name": "other"}]), "evaluates other, the profile has"),
        (lambda d: d["plans"][0].update(kl="x"), "plans.0.kl"),
    ],
)
def test_other_files_are_no_evaluations(like_demo: Inputs, tmp_path: Path, change: Any, said: str) -> None:
    path = changed_demo(tmp_path, change)
    with pytest.raises(ReportError, match=re.escape(said)) as caught:
        read_evaluation(path, like_demo.profile)
    assert "changed.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "nothing", '{"a": NaN}'])
def test_evaluation_that_is_not_json(like_demo: Inputs, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ReportError, match=r"bad\.json"):
        read_evaluation(tmp_path / "bad.json", like_demo.profile)


def test_published_single_taus_are_told_from_the_profiles_own(like_demo: Inputs, tmp_path: Path) -> None:
    def rename(data: dict[str, Any]) -> None:
        for plan in data["plans"][4:]:
            plan["name"] = f"published {plan['name']}"

    evaluated = read_evaluation(changed_demo(tmp_path, rename), like_demo.profile)
    assert evaluated.single_method == like_demo.profile.method
    assert evaluated.method_of("tau=0.5") == like_demo.profile.method
    assert evaluated.method_of("published tau=0.5") == published(like_demo.profile.method) != like_demo.profile.method
    assert evaluated.method_of("balanced") is None
    inputs = dataclasses.replace(like_demo, evaluations=(evaluated,))
    groups = {mark.name: mark.group for mark in marks(inputs)}
    (renamed,) = {group for name, group in groups.items() if name.startswith("published")}
    assert renamed == "single tau (published rule: antidiagonal, order score, S 16, B 64)"
    assert {group for name, group in groups.items() if name.startswith("tau=")} != {renamed}


def test_points_of_another_profile_are_called_so(like_demo: Inputs, tmp_path: Path) -> None:
    first = like_demo.evaluations[0].found.plans[0].name
    evaluated = read_evaluation(changed_demo(tmp_path, lambda d: d["plans"][0].update(name="other")), like_demo.profile)
    inputs = dataclasses.replace(like_demo, evaluations=(evaluated,))
    groups = {mark.name: mark.group for mark in marks(inputs)}
    assert groups["other"] == "another profile's point" and groups[first] == "operating point"


def test_evaluation_without_profile_used_the_published_rule(like_demo: Inputs, tmp_path: Path) -> None:
    alone = read_evaluation(changed_demo(tmp_path, lambda d: d.update(plans=d["plans"][3:])), like_demo.profile)
    assert alone.single_method == published(like_demo.profile.method.model_copy(update={"block_size": 128}))
    same = read_evaluation(changed_demo(tmp_path, lambda d: None), like_demo.profile)
    assert same.single_method == like_demo.profile.method


# ---- refusals


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"heads": 8}, "another model, 'invented': query_heads is 8 there and 4 in the profile"),
        ({"layers": 6}, "another model, 'invented': layers is 6 there and 4 in the profile"),
        ({"pattern": "antidiagonal"}, "measured with pattern antidiagonal, the profile has rows"),
        ({"order": "score"}, "measured with order score, the profile has recent"),
        ({"stride": 8}, "measured with stride 8, the profile has 16"),
        ({"measured": (0, 1, 2, 3)}, "curves of other layers"),
    ],
)
def test_wrong_curves_are_refused(inputs: Inputs, invented_curves: Make, how: dict[str, Any], said: str) -> None:
    with pytest.raises(CurvesError, match=re.escape(said)):
        check_curves(inputs.profile, (invented_curves(**how),))


def test_curves_of_another_config_or_number_of_lengths(inputs: Inputs, invented_curves: Make) -> None:
    other = invented_curves()
    other.model["config_sha256"] = "0" * 64
    with pytest.raises(CurvesError, match="another model, 'invented': config_sha256"):
        check_curves(inputs.profile, (other,))
    with pytest.raises(CurvesError, match="curves of 2 lengths, the profile has 1 length bins"):
        check_curves(inputs.profile, several_lengths(invented_curves).curves)
    assert check_curves(inputs.profile, inputs.curves) == inputs.curves


# ---- verdicts


def test_verdicts_in_words(inputs: Inputs) -> None:
    rows = point_rows(inputs.profile)
    assert [row.word for row in rows] == ["verified"] * 3
    assert headline(rows) == ("met", "All 3 operating points meet their targets on data that the search never saw.")
    missed = point_rows(with_evidence(inputs.profile, density=0.6))
    assert headline(missed)[0] == "missed"
    assert headline(missed)[1].startswith("Held-out data say that fidelity, balanced and fast miss")
    without = [point.model_copy(update={"heldout": None, "verified": False}) for point in inputs.profile.points]
    bare = point_rows(make_profile(**{**dict(inputs.profile), "points": tuple(without)}))
    assert {row.outcome for row in bare} == {"unmeasured"}
    assert headline(bare)[1] == "None of the 3 operating points is verified on held-out data."
    mixed = make_profile(**{**dict(inputs.profile), "points": (inputs.profile.points[0], *without[1:])})
    assert "fidelity verified; balanced and fast not verified" in headline(point_rows(mixed))[1]


def test_a_point_within_its_interval_is_called_verified_everywhere(inputs: Inputs, tmp_path: Path, run: Run) -> None:
    points = []
    for point in with_evidence(inputs.profile).points:
        assert point.heldout is not None
        points.append(point.model_copy(update={"target": f"kl={point.heldout.kl / 1.1}"}))
    profile = make_profile(**{**dict(inputs.profile), "points": tuple(points)})
    rows = point_rows(profile)
    assert {(row.outcome, row.word) for row in rows} == {("uncertain", "verified, within the interval")}
    within = "above target by less than the samples can tell"
    assert headline(rows) == ("uncertain", f"All 3 operating points are verified on held-out data, {within}.")
    assert headline(rows[:1])[1] == f"The operating point is verified on held-out data, {within}."
    met = point_rows(inputs.profile)[1:]
    assert headline([rows[0], *met])[1] == f"On held-out data: balanced and fast verified; fidelity verified, {within}."
    report = summarise(Inputs(profile))
    for text in (render_page(report), render_card(report, "p.yaml")):
        assert text.count("verified, within the interval") == 3 and "passed" not in text
    save_profile(profile, tmp_path / "p.yaml")
    code, out, _ = run("show", str(tmp_path / "p.yaml"))
    assert code == 0 and " ".join(out.split()).count("; verified") == 3


def without_figures(profile: Profile, **lacking: Sequence[str]) -> Profile:
    """The profile with ``heldout`` or ``predicted`` taken from the named points."""
    points = []
    for point in profile.points:
        changes: dict[str, Any] = {key: None for key, names in lacking.items() if point.name in names}
        points.append(point.model_copy(update=changes | ({"verified": False} if "heldout" in changes else {})))
    return make_profile(**{**dict(profile), "points": tuple(points)})


ALL = ("fidelity", "balanced", "fast")


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ({"heldout": ALL}, "No operating point has held-out figures: what stands here is predicted from calibration samples."),
        (
            {"heldout": ALL, "predicted": ["fast"]},
            "No operating point has held-out figures: what stands here of fidelity and balanced is predicted from "
            "calibration samples.",
        ),
        ({"heldout": ALL, "predicted": ALL}, "No operating point has held-out figures, and nothing was predicted."),
        (
            {"heldout": ["balanced"]},
            "The default point, balanced, has no held-out figures; fidelity and fast have them, its own are predicted from "
            "calibration samples.",
        ),
        (
            {"heldout": ["balanced", "fast"], "predicted": ["balanced"]},
            "The default point, balanced, has no held-out figures; fidelity has them, nothing was predicted for it either.",
        ),
    ],
)  # fmt: skip
def test_the_lead_says_what_there_is(inputs: Inputs, lacking: dict[str, Sequence[str]], said: str) -> None:
    profile = without_figures(inputs.profile, **lacking)
    assert unmeasured_lead(point_rows(profile)) == said
    assert f'<p class="lead">{said}</p>' in render_page(summarise(Inputs(profile)))
    alone = [row for row in point_rows(profile) if row.is_default]
    predicted = "predicted" not in lacking or "balanced" not in lacking["predicted"]
    ends = ": what stands here is predicted from calibration samples." if predicted else ", and nothing was predicted."
    assert unmeasured_lead(alone) == f"The operating point has no held-out figures{ends}"


def test_a_point_is_not_called_verified_where_its_profile_does_not(inputs: Inputs) -> None:
    points = [point.model_copy(update={"verified": False}) for point in inputs.profile.points]
    rows = point_rows(make_profile(**{**dict(inputs.profile), "points": tuple(points)}))
    assert {(row.outcome, row.word) for row in rows} == {("unmeasured", "not verified")}
    assert all("the profile marks it as not verified" in row.text for row in rows)


# ---- the page


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> _Elements:
    elements = _Elements()
    elements.feed(page)
    return elements


def test_hostile_text_stays_text(inputs: Inputs) -> None:
    recipe = {"target": HOSTILE, "data": (HOSTILE, "builtin")}
    calibration = inputs.profile.calibration.model_copy(update={"sources": (HOSTILE,)})
    profile = renamed(inputs.profile, recipe=recipe, calibration=calibration)
    page = render_page(summarise(Inputs(profile, inputs.curves)))
    elements = parsed(page)
    assert not [tag for tag, _ in elements.found if tag == "img"]
    assert "onerror=alert(1)>" not in page
    assert page.count("<script") == page.count("</script>") == 3
    assert any(HOSTILE in text for text in elements.text)
    for marker in re.findall(r'<script type="text/plain" id="\w+">([^<]*)</script>', page):
        assert re.fullmatch(r"[A-Za-z0-9+/=]+", marker)
    # a curves' file name and an evaluation's reach the page too, both through the same templates
    card = render_card(summarise(Inputs(profile, inputs.curves)), "profile.yaml")
    assert "<img" not in card.replace("'" + HOSTILE.replace("'", "\\'") + "'", "")
    (line,) = [line for line in card.splitlines() if line.startswith("loaded = ")]
    assert eval(line.removeprefix("loaded = xcalib.load_model(").removesuffix(")")) == HOSTILE


def test_no_text_of_a_profile_becomes_a_link_in_the_card(inputs: Inputs) -> None:
    sources = (
        "see https://example.com/a_b",
        "ftp://example.com",
        "WWW.example.com",
        "@octocat",
        "me@example.com",
        "builtin@2",
    )
    calibration = inputs.profile.calibration.model_copy(update={"sources": sources})
    profile = renamed(inputs.profile, calibration=calibration, recipe={"data": sources})
    card = render_card(summarise(Inputs(profile)), "profile.yaml")
    text = re.sub(r"^```python$.*?^```$", "", card, flags=re.MULTILINE | re.DOTALL)
    text = text.replace("(https://arxiv.org/abs/2503.16428)", "")  # the card's own
    assert not re.search(r"://\w|\bwww\.|(?<!\w)@\w|@[\w-]+\.", text, re.IGNORECASE)
    assert text.count("builtin@2") == 2  # no mention: the text stays as it is
    seen = re.sub(r"\\(.)", r"\1", re.sub(r"</?span>", "", text))
    assert seen.count(", ".join(sources)) == 2


def test_nothing_is_loaded_from_elsewhere(inputs: Inputs) -> None:
    page = render_page(summarise(inputs))
    for tag, attributes in parsed(page).found:
        for key in ("src", "href"):
            target = attributes.get(key)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
    assert not re.search(r"https?://|@import|url\(", page)
    assert (
        "Copyright (c) 2015-2023, University of Washington Interactive Data Lab" in page
    )  # Vega's, which is in the file
    (policy,) = [a["content"] for t, a in parsed(page).found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'")


def test_structure(inputs: Inputs) -> None:
    elements = parsed(render_page(summarise(inputs))).found
    tags = [tag for tag, _ in elements]
    assert tags.count("h1") == tags.count("main") == tags.count("header") == tags.count("footer") == 1
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements:
        for key in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(key) is None or attributes[key] in ids
    targets = {a["href"] for t, a in elements if t == "a" and a.get("href")}
    assert targets <= {f"#{name}" for name in ids}
    charts = [a for _, a in elements if (a.get("class") or "").startswith("chart")]
    assert len(charts) == 7 and all(a.get("aria-label") and a.get("role") for a in charts)
    maps = [a for a in charts if "map" in (a["class"] or "").split()]
    assert len(maps) == 3 and {a["role"] for a in maps} == {"application"}
    assert all("Arrow keys choose a head" in (a["aria-label"] or "") for a in maps)
    (status,) = [a for _, a in elements if a.get("id") == "no-charts"]
    assert status["role"] == "status"


def test_sections_without_data_say_what_to_pass(inputs: Inputs) -> None:
    without = [
        point.model_copy(update={"heldout": None, "predicted": None, "verified": None})
        for point in inputs.profile.points
    ]
    bare = summarise(Inputs(make_profile(**{**dict(inputs.profile), "points": tuple(without)})))
    assert set(bare.missing) == set(MISSING)
    page = " ".join(parsed(render_page(bare)).text)
    for text in MISSING.values():
        assert text in page
    full = summarise(inputs)
    assert set(full.missing) == {"lengths", "attention"}


def test_points_without_predictions_get_the_curves(inputs: Inputs) -> None:
    point = inputs.profile.points[0]
    imported = point.model_copy(update={"predicted": None, "heldout": None, "verified": None, "method": "imported"})
    profile = make_profile(**{**dict(inputs.profile), "points": (imported,), "default_point": point.name})
    (mark,) = marks(Inputs(profile, inputs.curves))
    assert point.predicted is not None
    assert (mark.kind, mark.source) == ("predicted", "curves")
    assert (mark.density, mark.kl) == pytest.approx((point.predicted.density, point.predicted.kl))


def test_curves_of_other_data_are_pointed_out(inputs: Inputs) -> None:
    said = "measured on other tokens than the profile"
    assert said not in render_page(summarise(inputs))
    calibration = inputs.profile.calibration.model_copy(update={"tokens_sha256": "0" * 64})
    other = make_profile(**{**dict(inputs.profile), "calibration": calibration})
    assert said in render_page(summarise(Inputs(other, inputs.curves)))


@pytest.mark.parametrize("lengths", [1, 2])
def test_a_large_model_stays_below_a_megabyte(
    invented_curves: Make, lengths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "PAPER_BUDGETS", ())  # takes the time, not the bytes
    shape = {"measured": range(1, 80), "layers": 80, "heads": 64}
    sets = tuple(invented_curves(length=1024 * (1 + n), seed=n, **shape) for n in range(lengths))
    inputs = Inputs(build_profile(sets, parse_targets(POINTS)), sets)
    report = summarise(inputs)
    size = write_page(report, tmp_path / "large.html")
    assert size == (tmp_path / "large.html").stat().st_size < MAX_BYTES
    packed = packed_heads(inputs)
    page = " ".join(" ".join(parsed((tmp_path / "large.html").read_text("utf-8")).text).split())
    thinned = f"{len(packed['levels'])} of the 27 measured levels are kept"
    assert (thinned in page) == (len(packed["levels"]) < 27)
    assert ("kept in 255 steps" in page) == (packed["bits"] == 8)
    assert (lengths == 1) == (len(packed["levels"]) == 27)


def test_too_many_heatmaps_are_refused(inputs: Inputs) -> None:
    with pytest.raises(ReportError, match=r"3 heatmaps of 16 heads .* do not fit one page"):
        packed_heads(inputs, limit=200)


# ---- colours


def _variables(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", block))


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_every_theme() -> None:
    style = template_text("report.css")
    light, system_dark, dark, printed = (
        _variables(part)
        for part in (
            style.partition(":root {")[2].partition("}")[0],
            style.partition("prefers-color-scheme: dark)")[2].partition("} }")[0],
            style.partition(':root[data-theme="dark"] {')[2].partition("}")[0],
            style.partition("@media print {")[2].partition("}")[0],
        )
    )
    assert system_dark == dark and printed == light
    assert {name: light[name] for name in LIGHT} == LIGHT
    for theme in (light, dark):
        for text in ("ink", "muted", "good", "unsure", "bad", "link"):
            for behind in ("page", "raised"):
                assert _contrast(theme[text], theme[behind]) >= 4.5, (text, behind)
        for series in ("c1", "c2", "c3", "c4", "c5", "pick"):
            assert _contrast(theme[series], theme["page"]) >= 3, series


# ---- pictures


def pixels(path: Path) -> np.ndarray:
    from matplotlib import image

    return np.asarray(image.imread(path))


def test_pngs(inputs: Inputs, tmp_path: Path) -> None:
    paths = write_pngs(summarise(inputs), tmp_path / "png")
    names = [path.name for path in paths]
    assert names == ["tau.png", "density.png", "error.png", "pareto.png", "predicted-and-held-out.png"]
    for path in paths:
        picture = pixels(path)
        assert (picture[0, 0, :3] == 1).all()  # white behind
        assert min(picture.shape[:2]) > 150
        assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 30


def test_indexed_png(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(
        indexed_png(np.array([[0, 1, 1]], dtype=np.uint8), [(0, 0, 0, 0), (255, 0, 51, 255)])
    )
    assert pixels(tmp_path / "a.png").tolist() == pytest.approx(
        np.array([[[0, 0, 0, 0], [1, 0, 0.2, 1], [1, 0, 0.2, 1]]])
    )


# ---- the card


def test_card(inputs: Inputs) -> None:
    card = render_card(summarise(inputs), "my profile.yaml")
    assert card.startswith("# Block sparse attention profile for invented\n")
    heldout = inputs.profile.point("balanced").heldout
    assert heldout is not None and heldout.intervals is not None
    (row,) = [line for line in card.splitlines() if line.startswith("| balanced (default) ")]
    assert number(heldout.kl) in row and interval(heldout.intervals.kl) in row and "verified" in row
    table = [line for line in card.splitlines() if line.startswith("| ")]
    assert {line.count("|") - line.count("\\|") for line in table[:4]} == {10}
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert code.count("\n") <= 12 and "load_profile('my profile.yaml')" in code
    assert "keeps no recipe" in card and "not verified" not in card
    assert inputs.profile.content_sha256 in card


def example(profile: Profile) -> str:
    code = render_card(summarise(Inputs(profile)), "p.yaml").partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert "max_new_tokens=32" in code
    return code


@pytest.mark.parametrize("name", profiles.names())
def test_the_cards_example_loads_the_model_of_a_shipped_profile(name: str) -> None:
    profile = load_profile(name)
    assert profile.recipe is not None
    code = example(profile)
    assert f"xcalib.load_model({profile.recipe['model']!r})" in code and "from_pretrained" not in code


@pytest.mark.parametrize(
    ("name", "on_hub"),
    [
        *[("Qwen/Qwen3-0.6B", True), ("a/b", True), ("org_1/my.model-v2_x", True), ("a/" + "b" * 96, True)],
        *[("demo", False), ("models/a/b", False), ("./model", False), ("/srv/model", False), ("../model", False)],
        *[("model.gguf", False), ("org/model.gguf", False), ("org/model.git", False), ("org/a b", False)],
        *[("org/a--b", False), ("org/a..b", False), ("-org/a", False), ("org/a-", False), ("org/\u00e9", False)],
        *[("org/", False), ("org/.a", False), ("a/" + "b" * 97, False), ("Some name (Q4_1)", False)],
    ],
)
def test_the_cards_example_takes_ids_of_the_hub_from_there(inputs: Inputs, name: str, on_hub: bool) -> None:
    def named(**model: Any) -> Profile:
        model = {**inputs.profile.model.model_dump(), "name": name, **model}
        return make_profile(**{**dict(inputs.profile), "model": model, "recipe": None})

    code = example(named())
    assert ("AutoModelForCausalLM.from_pretrained(name).eval()" in code) == on_hub
    assert (f"xcalib.load_model({name!r})" in code) != on_hub
    pinned = example(named(commit="0123abc"))
    assert pinned.count("from_pretrained(name, revision='0123abc')") == (2 if on_hub else 0)


def test_card_is_honest_about_points_without_evidence(inputs: Inputs) -> None:
    without = [point.model_copy(update={"heldout": None, "verified": False}) for point in inputs.profile.points]
    profile = make_profile(
        **{**dict(inputs.profile), "points": tuple(without), "recipe": {"target": ("a|b",), "force": True}}
    )
    card = render_card(summarise(Inputs(profile)), "p.yaml")
    assert card.count("**not verified**") == 3
    for name in ("fidelity", "balanced", "fast"):
        assert f"- **{name} is not verified**" in card
    assert "| `target` | a\\|b |" in card and "| `force` | yes |" in card


# ---- the command, on a real tiny model


@pytest.fixture(scope="module")
def workplace(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report-cli")
    (folder / "tiny").symlink_to(tiny_folder)
    return folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Path:
    """Holds good.yaml of two lengths, its curves and an evaluation of it, made once."""
    monkeypatch.chdir(workplace)
    if not Path("evaluation.json").exists():
        method = [
            "--block-size",
            "64",
            "--gain-samples",
            "1",
            "--rounds",
            "0",
            "--lengths",
            "512,256",
            "--work",
            "work",
        ]
        data = ["--data", "builtin:prose", "--num-samples", "1"]
        code, _, err = run(
            *("search", "tiny", *data, *method, "--heldout-samples", "2", "-t", "one:density=0.8", "--out", "good.yaml")
        )
        assert code == 0, err
        code, out, err = run(*("evaluate", "tiny", "--profile", "good.yaml", "--uniform", "0.9", *data, "--json"))
        assert code == 0, err
        Path("evaluation.json").write_text(out)
    return workplace


def test_report_of_a_real_profile(here: Path, run: Run) -> None:
    given = ["--curves", "work/curves", "--evaluation", "evaluation.json", "--model", "tiny"]
    code, out, err = run("report", "good.yaml", *given, "--png", "png", "--card", "CARD.md", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["report"] == "report.html" and said["bytes"] == Path("report.html").stat().st_size
    assert said["missing"] == {} and said["card"] == "CARD.md"
    assert "png/density-by-length.png" in said["png"] and all(Path(path).stat().st_size > 5000 for path in said["png"])
    assert said["front"] and said["points"] == {"one": "met"}
    elements = parsed(Path("report.html").read_text("utf-8"))
    pictures = [attributes["alt"] for tag, attributes in elements.found if tag == "img"]
    assert len(pictures) == 12 and pictures[0] is not None and pictures[0].startswith("Block scores of layer ")
    text = " ".join(elements.text)
    assert "single tau (rows, order recent, S 16, B 64), measured" in text
    lengths = [row for row in re.findall(r"tau=0\.9\s+(\S[^\n]*?)\s+measured", text) if "keys" in row]
    assert lengths == ["192 to 362 keys", "363 to 512 keys"]  # of the bins that served the evaluation's samples
    assert "wrote report.html (" in err and "wrote CARD.md" in err


def test_attention_pictures_show_what_the_runtime_keeps(tiny_folder: Path, here: Path) -> None:
    from xcalib.data import load_samples
    from xcalib.models.loading import load_model
    from xcalib.profile import load_profile
    from xcalib.report import attention, attention_pictures

    loaded, profile = load_model(str(tiny_folder)), load_profile("good.yaml")
    (sample,) = load_samples(["builtin:prose"], loaded.tokenizer, num_samples=1, max_length=500).samples
    found = attention_pictures(loaded.model, profile, sample)
    assert len(found) == 6 and [one.density for one in found] == sorted(one.density for one in found)
    assert (found[0].place, found[-1].place, found[0].blocks) == ("lowest density", "highest density", 8)
    for one in found:
        png = base64.b64decode(one.kept.partition(",")[2])
        Path("kept.png").write_bytes(png)
        picture = pixels(Path("kept.png"))
        seen, kept = picture[..., 3] > 0, picture[..., 3] == 1
        assert seen.sum() == 36 and kept.sum() / 36 == pytest.approx(one.density)
        assert one.tau == pytest.approx(profile.point().thresholds[1][one.layer][one.head])
    one_pass, attention.KEPT_BLOCKS = attention.KEPT_BLOCKS, 0
    try:
        assert attention_pictures(loaded.model, profile, sample) == found
    finally:
        attention.KEPT_BLOCKS = one_pass
    (short,) = load_samples(["builtin:prose"], loaded.tokenizer, num_samples=1, max_length=100).samples
    assert attention_pictures(loaded.model, profile, short) == ()


def test_demo_writes_the_report_or_says_how(
    tiny_folder: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, inputs: Inputs
) -> None:
    from xcalib.cli import demo
    from xcalib.collect import load_curve_sets
    from xcalib.data import load_samples
    from xcalib.models.loading import load_model
    from xcalib.profile import load_profile
    from xcalib.report import inputs as report_inputs

    loaded, profile = load_model(str(tiny_folder)), load_profile("good.yaml")
    found = read_evaluation(Path("evaluation.json"), profile).found
    sample = load_samples(["builtin:prose"], loaded.tokenizer, num_samples=1, max_length=300).samples[0]
    sets = load_curve_sets("work/curves")
    demo._write_page(loaded, profile, sets[0], found, sample, Path("demo.html"))
    assert "no report: the curves: curves of 1 length, the profile has 2 length bins" in capsys.readouterr().err
    single = build_profile(sets[0], parse_targets(["one:density=0.8"]))
    demo._write_page(loaded, single, sets[0], found, sample, Path("demo.html"))
    assert "wrote demo.html: open it in a browser" in capsys.readouterr().err
    assert "published rule: antidiagonal" in Path("demo.html").read_text("utf-8")
    monkeypatch.setattr(report_inputs, "find_spec", lambda name: None)
    demo._write_page(loaded, single, sets[0], found, sample, Path("other.html"))
    said = capsys.readouterr().err
    assert "no report: a report needs altair, jinja2, vl_convert: pip install 'xcalib[report]'" in " ".join(
        said.split()
    )
    assert not Path("other.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["good.yaml", "--out", "good.yaml"], "good.yaml: expected a name that ends in .html"),
        (["good.yaml", "--card", "good.yaml"], "good.yaml: expected a name that ends in .md"),
        (["good.yaml", "--out", "no/report.html"], "no/report.html: the folder no does not exist"),
        (["good.yaml", "--png", "good.yaml"], "good.yaml: is not a folder"),
        (["good.yaml", "--curves", "tiny"], "tiny: holds no curves.json"),
        (["good.yaml", "--curves", "work/curves/256"], "curves of 1 length, the profile has 2 length bins"),
        (["good.yaml", "--evaluation", "good.yaml"], "good.yaml"),
        (["nothing.yaml"], "nothing.yaml"),
    ],
)
def test_bad_input_is_one_line(here: Path, run: Run, arguments: list[str], said: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in here.iterdir()}
    code, out, err = run("report", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert {path: path.stat().st_mtime_ns for path in here.iterdir()} == before


def test_model_of_another_profile_is_refused(here: Path, run: Run, inputs: Inputs) -> None:
    save_profile(inputs.profile, "invented.yaml")
    code, _, err = run("report", "invented.yaml", "--model", "tiny", "--out", "not.html")
    assert code == 2 and "the profile is for another model" in err and not Path("not.html").exists()


def test_libraries_that_are_missing_are_named(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from xcalib.report import inputs as report_inputs

    monkeypatch.setattr(report_inputs, "find_spec", lambda name: None if name == "altair" else object())
    code, _, err = run("report", "good.yaml", "--out", "not.html")
    assert (code, err) == (2, "error: a report needs altair: pip install 'xcalib[report]'\n")
