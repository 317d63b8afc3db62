"""Colours of the charts: CSS variables in the page, whose style sheet has light and dark values, and the light ones in PNGs.

Series are Okabe and Ito's, maps are cividis: both can be told apart with every kind of colour blindness.
"""

import re
from typing import Any, NamedTuple

__all__ = ["LIGHT", "SERIES", "Look", "config", "in_light", "series_look"]

# The same names and values as in templates/report.css (a test compares them).
LIGHT = {
    "ink": "#1b1f24",
    "muted": "#59636e",
    "line": "#d9dee3",
    "grid": "#e8ebee",
    "page": "#ffffff",
    "dense": "#c3c9cf",
    "pick": "#d55e00",
    "c1": "#0072b2",
    "c2": "#d55e00",
    "c3": "#009e73",
    "c4": "#8c5a7a",
    "c5": "#7d6a00",
    "band": "#dfe6ec",
}
SERIES = ("c1", "c2", "c3", "c4")
SHAPES = ("circle", "square", "triangle-up", "diamond")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class Look(NamedTuple):
    """Of a mark: its shape in Vega's words, and the name of a CSS variable."""

    shape: str
    colour: str


def series_look(index: int) -> Look:
    """Of one of several series in a chart and in its key; the first 16 differ."""
    turn, place = divmod(index, len(SERIES))
    return Look(SHAPES[(place + turn) % len(SHAPES)], SERIES[place])


def config() -> dict[str, Any]:
    """Vega-Lite's config for every chart."""
    axis = {
        "labelColor": "var(--muted)",
        "titleColor": "var(--ink)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "gridColor": "var(--grid)",
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": 500,
        "labelPadding": 4,
        "titlePadding": 8,
        "tickSize": 4,
    }
    legend = {"labelColor": "var(--muted)", "titleColor": "var(--ink)", "labelFontSize": 11, "titleFontSize": 11}
    return {
        "font": FONT,
        "background": "transparent",
        "view": {"stroke": None},
        "axis": axis,
        "legend": {**legend, "titleFontWeight": 500},
        "text": {"color": "var(--ink)", "fontSize": 12},
    }


def in_light(spec: Any) -> Any:
    """The same chart with every colour variable replaced by its light value."""
    if isinstance(spec, dict):
        return {key: in_light(value) for key, value in spec.items()}
    if isinstance(spec, list | tuple):
        return [in_light(value) for value in spec]
    if isinstance(spec, str):
        return re.sub(r"var\(--([a-z0-9]+)\)", lambda found: LIGHT[found[1]], spec)
    return spec
