"""The charts as Vega-Lite, through Altair; their data come by name, from the page's script or from :mod:`xcalib.report.pngs`."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from xcalib.report.front import LINE_NAMES, POINT, Group
from xcalib.report.theme import SERIES, config, series_look

__all__ = ["curve_chart", "front_chart", "heatmap", "held_chart", "length_chart"]

Spec = dict[str, Any]
DIAMOND = "diamond"
DASHES = ([1, 0], [7, 4], [2, 3])  # of the lines of the front
_TITLES = {"tau": "tau", "density": "density", "error": "output error"}
# Of a log axis: the powers of ten in full, what lies between faint.
_POWER = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 1e-6"
_FORMATS = {"tau": ".2f", "density": ".0%", "error": ".0e"}


def _finished(chart: alt.LayerChart | alt.FacetChart, height: int, description: str, width: int | None = None) -> Spec:
    sized = chart.properties(width=width or "container", height=height, description=description)
    spec = sized.configure_view(stroke=None).to_dict()
    spec.pop("$schema", None)
    autosize = {"type": "fit-x", "contains": "padding"} if width is None else None
    return {**spec, "config": config(), **({"autosize": autosize} if autosize else {})}


def heatmap(value: str, layers: int, heads: int, domain: tuple[float, float], width: int | None = None) -> Spec:
    """Layers x heads of ``tau``, ``density`` or ``error``; data ``heads``, params ``layer`` and ``head`` are the chosen cell.

    Heads that run dense stand apart in grey. Canvas or SVG is the page's choice.
    """
    base = alt.Chart(alt.NamedData(name="heads")).encode(
        x=alt.X("head:O", title="head", axis=_ordinal(heads, 12)),
        y=alt.Y("layer:O", title="layer", axis=_ordinal(layers, 16)),
    )
    scale = alt.Scale(scheme="cividis", domain=list(domain), type="log" if value == "error" else "linear", clamp=True)
    legend = alt.Legend(
        orient="top", direction="horizontal", gradientLength=170, gradientThickness=9, title=None, format=_FORMATS[value],
        tickCount=4 if value == "error" else 3,
    )  # fmt: skip
    tooltip = [
        alt.Tooltip("layer:O", title="layer"),
        alt.Tooltip("head:O", title="head"),
        alt.Tooltip("tau:Q", title="tau", format=".4f"),
        alt.Tooltip("density:Q", title="density", format=".1%"),
        alt.Tooltip("error:Q", title="output error", format=".2e"),
        alt.Tooltip("alone:Q", title="KL alone", format=".2e"),
    ]
    cells = base.transform_filter("!datum.dense").mark_rect(aria=False).encode(
        color=alt.Color(f"{value}:Q", scale=scale, legend=legend), tooltip=tooltip
    )  # fmt: skip
    dense = base.transform_filter("datum.dense").mark_rect(fill="var(--dense)", aria=False).encode(tooltip=tooltip)
    chosen = base.transform_filter("datum.layer == layer && datum.head == head").mark_rect(
        fillOpacity=0, stroke="var(--pick)", strokeWidth=2.5, aria=False, tooltip=None
    )
    chart = alt.layer(cells, dense, chosen).add_params(
        alt.param(name="layer", value=-1), alt.param(name="head", value=-1)
    )
    height = max(4 * layers, min(16 * layers, 480), 96)
    return _finished(chart, height, f"Heatmap of {_TITLES[value]} by layer and head", width)


def _ordinal(count: int, most: int) -> alt.Axis:
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 100, 1000) if count / step <= most)
    return alt.Axis(
        values=list(range(0, count, step)), labelAngle=0, ticks=False, domain=False, labelOverlap=False, grid=False
    )


def front_chart(groups: Sequence[Group], line_names: Sequence[str], width: int | None = None) -> Spec:
    """Density against KL: data ``lines`` (predicted) and ``marks`` (predicted hollow, measured filled, with intervals)."""
    axis = _log_axis("KL from dense, nats per token (log)")
    x = alt.X(
        "density:Q",
        title="density: blocks computed over visible blocks",
        axis=alt.Axis(format=".0%", tickCount=8),
        scale=alt.Scale(zero=False, nice=False, padding=24),
    )
    y = alt.Y("kl:Q", scale=alt.Scale(type="log", nice=False, padding=18), axis=axis)
    shown = [group.name for group in groups] + list(line_names)
    legend = None if width is None else alt.Legend(orient="bottom", title=None, columns=2, labelLimit=700, values=shown)
    marks = alt.Chart(alt.NamedData(name="marks"))
    whiskers = marks.transform_filter("datum.low > 0").mark_rule(strokeWidth=1.5, aria=False)
    hollow = marks.transform_filter("datum.kind == 'predicted'").mark_point(
        size=230, strokeWidth=1.8, opacity=1, fill="var(--page)", aria=False
    )
    filled = marks.transform_filter("datum.kind == 'measured'").mark_point(size=100, filled=True, opacity=1, aria=False)
    points = f"datum.group == '{POINT}'"
    named = marks.transform_filter(f"datum.label && {points}").encode(x=x, y=y, text="label:N")
    taus = marks.transform_filter(f"datum.label && !({points})").encode(x=x, y=y, text="label:N")
    label: dict[str, Any] = {"align": "left", "dx": 12, "dy": -10, "fontWeight": 600, "aria": False}
    looks = {"x": x, "y": y, "shape": _front_shape(groups, "group", legend), "tooltip": _mark_tooltip()}
    color = _front_color(groups, "group", legend)
    chart = alt.layer(
        *_front_lines(x, y, groups, legend),
        # Behind names, over lines but under marks.
        named.mark_text(**label, stroke="var(--page)", strokeWidth=4, strokeJoin="round", opacity=0.9),
        whiskers.encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=color),
        hollow.encode(color=color, **looks),
        filled.encode(color=color, **looks),
        named.mark_text(**label),
        taus.mark_text(align="left", dx=9, dy=-1, fontSize=10, color="var(--muted)", aria=False),
    )
    return _finished(chart, 420, "Density against KL on a log scale", width)


def _front_lines(x: alt.X, y: alt.Y, groups: Sequence[Group], legend: alt.Legend | None) -> list[alt.Chart]:
    lines = alt.Chart(alt.NamedData(name="lines"))
    marked = [group.name for group in groups]
    dashes = alt.Scale(domain=[*LINE_NAMES.values(), *marked], range=[*DASHES, *([DASHES[0]] * len(marked))])
    drawn = lines.mark_line(strokeWidth=2, interpolate="monotone", clip=True, aria=False).encode(
        x=x,
        y=y,
        color=_front_color(groups, "label", legend),
        strokeDash=alt.StrokeDash("label:N", scale=dashes, legend=legend),
    )
    near = lines.mark_point(size=90, opacity=0, aria=False).encode(x=x, y=y, tooltip=_line_tooltip())
    return [drawn, near]


def _front_color(groups: Sequence[Group], field: str, legend: alt.Legend | None) -> alt.Color:
    """One scale for lines and marks: charts of one axis share their scales, and scales of one domain their legend."""
    colours = dict(zip(LINE_NAMES.values(), SERIES, strict=False)) | {g.name: g.look.colour for g in groups}
    scale = alt.Scale(domain=list(colours), range=[f"var(--{colour})" for colour in colours.values()])
    return alt.Color(f"{field}:N", scale=scale, legend=legend)


def _front_shape(groups: Sequence[Group], field: str, legend: alt.Legend | None) -> alt.Shape:
    shapes = dict.fromkeys(LINE_NAMES.values(), "stroke") | {group.name: group.look.shape for group in groups}
    return alt.Shape(f"{field}:N", scale=alt.Scale(domain=list(shapes), range=list(shapes.values())), legend=legend)


def _log_axis(title: str, form: str = "~g") -> alt.Axis:
    faint = alt.condition(_POWER, alt.value(1), alt.value(0.4))
    return alt.Axis(title=title, format=form, tickCount=6, gridOpacity=faint, ticks=False)


def _mark_tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("name:N", title="what"),
        alt.Tooltip("kind:N", title="figure"),
        alt.Tooltip("density:Q", format=".2%"),
        alt.Tooltip("kl:Q", title="KL", format=".4g"),
        alt.Tooltip("low:Q", title="interval from", format=".4g"),
        alt.Tooltip("high:Q", title="interval to", format=".4g"),
        alt.Tooltip("source:N", title="from"),
    ]


def _line_tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("label:N", title="predicted"),
        alt.Tooltip("density:Q", format=".2%"),
        alt.Tooltip("kl:Q", title="KL", format=".4g"),
        alt.Tooltip("tau:Q", title="tau", format=".4f"),
    ]


def curve_chart(value: str, width: int | None = None) -> Spec:
    """One head's ``density`` or ``error`` by tau: data ``curve``, the middle of all heads ``spread``, chosen taus ``chosen``."""
    is_error = value == "error"
    title = "output error (log)" if is_error else "density"
    axis = _log_axis(title, ".0e") if is_error else alt.Axis(format=".0%", tickCount=5)
    scale = alt.Scale(type="log") if is_error else alt.Scale(domain=[0, 1])
    x = alt.X("tau:Q", title="tau", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=6, format="~g"))
    positive = "isValid(datum.y) && datum.y > 0" if is_error else "isValid(datum.y)"
    y = alt.Y("y:Q", title=title, scale=scale, axis=axis)
    both = "datum.low > 0 && datum.high > 0" if is_error else "isValid(datum.low)"
    band = alt.Chart(alt.NamedData(name="spread")).transform_filter(both)
    around = band.mark_area(fill="var(--band)", clip=True, aria=False).encode(
        x=x, y=alt.Y("low:Q", title=title, scale=scale, axis=axis), y2="high:Q"
    )
    line = alt.Chart(alt.NamedData(name="curve")).transform_filter(positive)
    drawn = line.mark_line(color="var(--c1)", strokeWidth=2.2, clip=True, aria=False).encode(x=x, y=y)
    tooltip = [alt.Tooltip("tau:Q", format=".4f"), alt.Tooltip("y:Q", title=title, format=".3g" if is_error else ".1%")]
    dots = line.mark_circle(color="var(--c1)", size=26, opacity=1, aria=False).encode(x=x, y=y, tooltip=tooltip)
    chosen = alt.Chart(alt.NamedData(name="chosen"))
    rules = chosen.mark_rule(color="var(--pick)", strokeDash=[4, 3], aria=False).encode(
        x=x, opacity=alt.condition("datum.shown", alt.value(1), alt.value(0.35))
    )
    said = [alt.Tooltip("name:N", title="point"), *tooltip]
    points = chosen.transform_filter(positive).mark_point(
        shape=DIAMOND, filled=True, size=110, color="var(--pick)", aria=False
    )
    ends = points.encode(x=x, y=y, opacity=alt.condition("datum.shown", alt.value(1), alt.value(0.35)), tooltip=said)
    said_by: dict[str, Any] = {
        "angle": 270,
        "align": "right",
        "dx": -4,
        "fontSize": 11,
        "aria": False,
    }
    texts: dict[str, Any] = {
        "x": x,
        "y": alt.value(0),
        "text": "name:N",
        "color": alt.condition("datum.shown", alt.value("var(--ink)"), alt.value("var(--muted)")),
    }
    left = chosen.transform_filter("datum.tau >= 0.06").mark_text(**said_by, baseline="bottom", dy=-3)
    # of a tau at the axis, whose labels are on its left
    right = chosen.transform_filter("datum.tau < 0.06").mark_text(**said_by, baseline="top", dy=3)
    names = [part.encode(**texts) for part in (left, right)]
    return _finished(alt.layer(around, drawn, dots, rules, ends, *names), 250, f"{title} of one head by tau", width)


def length_chart(value: str, names: list[str], width: int | None = None) -> Spec:
    """``density`` or ``kl`` of each point by length; data ``lengths``, predicted hollow and dashed, measured filled."""
    is_kl = value == "kl"
    title = "KL, nats per token (log)" if is_kl else "density"
    y = alt.Y(
        f"{value}:Q",
        title=title,
        scale=alt.Scale(type="log") if is_kl else alt.Scale(zero=True),
        axis=_log_axis(title) if is_kl else alt.Axis(format=".0%", tickCount=5),
    )
    x = alt.X("length:N", title=None, sort=alt.EncodingSortField("start"), axis=alt.Axis(labelAngle=-25))
    legend = None if width is None else alt.Legend(orient="bottom", title=None)
    looks = [series_look(index) for index in range(len(names))]
    colours = alt.Scale(domain=names, range=[f"var(--{look.colour})" for look in looks])
    color = alt.Color("name:N", scale=colours, legend=legend)
    shapes = alt.Scale(domain=names, range=[look.shape for look in looks])
    shape = alt.Shape("name:N", scale=shapes, legend=legend)
    dash = alt.StrokeDash(
        "kind:N", scale=alt.Scale(domain=["measured", "predicted"], range=[[1, 0], [5, 4]]), legend=None
    )
    tooltip = [
        alt.Tooltip("name:N", title="point"),
        alt.Tooltip("kind:N", title="figure"),
        alt.Tooltip("length:N"),
        alt.Tooltip("density:Q", format=".2%"),
        alt.Tooltip("kl:Q", title="KL", format=".4g"),
        alt.Tooltip("samples:Q"),
        alt.Tooltip("source:N", title="from"),
    ]
    base = alt.Chart(alt.NamedData(name="lengths")).transform_filter(f"datum.{value} > 0")
    lines = base.mark_line(strokeWidth=1.5, aria=False).encode(
        x=x, y=y, color=color, strokeDash=dash, detail="source:N"
    )
    hollow = base.transform_filter("datum.kind == 'predicted'").mark_point(
        size=80, opacity=1, fill="var(--page)", aria=False
    )
    filled = base.transform_filter("datum.kind == 'measured'").mark_point(size=80, filled=True, opacity=1, aria=False)
    layers = [lines, *(part.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip) for part in (hollow, filled))]
    if is_kl:
        ends = base.transform_filter("datum.low > 0").mark_rule(aria=False)
        layers.insert(1, ends.encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=color))
    return _finished(alt.layer(*layers), 260, f"{title} by length", width)


def held_chart(rows: int, width: int | None = None) -> Spec:
    """Predicted (hollow) and held-out KL (filled, with its interval) of each point; data ``held``."""
    base = alt.Chart(alt.NamedData(name="held"))
    y = alt.Y(
        "name:N",
        title=None,
        sort=None,
        axis=alt.Axis(ticks=False, domain=False, labelFontSize=12, labelColor="var(--ink)"),
    )
    axis = _log_axis("KL, nats per token (log)")
    scale = alt.Scale(type="log", nice=False, padding=24)

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title="KL, nats per token (log)", scale=scale, axis=axis)

    tooltip = [
        alt.Tooltip("name:N", title="point"),
        alt.Tooltip("predicted:Q", format=".4g"),
        alt.Tooltip("measured:Q", title="held out", format=".4g"),
        alt.Tooltip("low:Q", title="interval from", format=".4g"),
        alt.Tooltip("high:Q", title="interval to", format=".4g"),
        alt.Tooltip("off:Q", title="predicted against held out", format="+.1%"),
    ]
    ends = base.transform_filter("datum.low > 0").mark_rule(
        strokeWidth=7, opacity=0.22, strokeCap="round", color="var(--c1)", aria=False
    )
    between = base.mark_rule(strokeWidth=1.5, color="var(--ink)", aria=False)
    filled = base.mark_point(size=130, filled=True, opacity=1, color="var(--c1)", aria=False)
    hollow = base.mark_point(
        shape=DIAMOND, size=110, strokeWidth=2, opacity=1, fill="var(--page)", color="var(--ink)", aria=False
    )
    chart = alt.layer(
        ends.encode(y=y, x=x("low"), x2="high:Q", tooltip=tooltip),
        between.encode(y=y, x=x("predicted"), x2="measured:Q"),
        filled.encode(y=y, x=x("measured"), tooltip=tooltip),
        hollow.encode(y=y, x=x("predicted"), tooltip=tooltip),
    )
    return _finished(chart, 44 * max(rows, 1) + 16, "Predicted against held-out KL", width)
