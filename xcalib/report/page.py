"""The page: one HTML file with its data, its style, its script and Vega in it; nothing is ever loaded from elsewhere."""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xcalib
from xcalib._files import replace_file
from xcalib.errors import ReportError
from xcalib.report.evidence import data_notes, facts, recipe_lines, unmeasured_lead
from xcalib.report.front import LINE_NAMES, front_objective
from xcalib.report.heads import colour_domains, packed_heads
from xcalib.report.summary import Report
from xcalib.report.tables import tables
from xcalib.report.theme import series_look
from xcalib.report.words import count, interval, keys_in, kl, number, percent
from xcalib.search.objectives import OBJECTIVE_NAMES

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["MAX_BYTES", "environment", "render_page", "template_text", "write_page"]

MAX_BYTES = 1_000_000
SVG_CELLS = 2500  # heatmaps of more cells are drawn on a canvas


def write_page(report: Report, out: Path) -> int:
    """Write the page, whole or not at all, and return its bytes.

    Raises:
        ReportError: the file cannot be written, or the page would be larger than MAX_BYTES.
    """
    data = render_page(report).encode()
    if len(data) > MAX_BYTES:
        raise ReportError(
            f"{out}: the page has {len(data):,} bytes, more than {MAX_BYTES:,}: give fewer --evaluation files"
        )
    try:
        replace_file(out, data)
    except OSError as error:
        raise ReportError(f"{out}: cannot be written: {error.strerror or error}") from error
    return len(data)


def render_page(report: Report) -> str:
    """The HTML."""
    from markupsafe import Markup

    inputs = report.inputs
    heads = packed_heads(inputs)
    specs, rows = _specs(report), _rows(report)
    default = inputs.profile.point()
    place = inputs.profile.points.index(default)
    return environment().get_template("report.html.j2").render(
        # of the package's own files and of base64, never of what is reported on
        style=Markup(template_text("report.css")),
        script=Markup(template_text("report.js")),
        vega=Markup(_vega()),
        data=Markup(_packed({"heads": heads, "specs": specs, "rows": rows, "cells": SVG_CELLS})),
        report=report,
        profile=inputs.profile,
        default=next(row for row in report.points if row.name == default.name),
        heldout=default.heldout,
        unmeasured_lead=unmeasured_lead(report.points),
        rival=next((rival for rival in report.rivals if rival.point == default.name), None),
        facts=facts(inputs.profile),
        notes=data_notes(inputs),
        recipe=recipe_lines(inputs.profile),
        heads=heads,
        **tables(report, place),
        objective=OBJECTIVE_NAMES[front_objective(inputs)] if inputs.curves else "",
        line_names=LINE_NAMES,
        keys=[keys_in(length_bin) for length_bin in inputs.profile.length_bins],
        notices=template_text("vega-notices.txt"),
        version=xcalib.__version__,
        day=datetime.now(UTC).strftime("%Y-%m-%d"),
    )  # fmt: skip


def _specs(report: Report) -> dict[str, Any]:
    from xcalib.report import charts

    model = report.inputs.profile.model
    specs: dict[str, Any] = {
        value: charts.heatmap(value, model.layers, model.query_heads, domain)
        for value, domain in colour_domains(report.inputs).items()
    }
    if "front" not in report.missing:
        specs["front"] = charts.front_chart(report.groups, report.line_names)
    if "curves" not in report.missing:
        specs |= {f"curve-{value}": charts.curve_chart(value) for value in ("density", "error")}
    if "lengths" not in report.missing:
        specs |= {f"length-{value}": charts.length_chart(value, report.length_names) for value in ("density", "kl")}
    if "held" not in report.missing:
        specs["held"] = charts.held_chart(len(report.held))
    return specs


def _rows(report: Report) -> dict[str, dict[str, list[Any]]]:
    return {
        "lines": _columns(report.line_rows),
        "marks": _columns(report.mark_rows),
        "held": _columns(report.held),
        "lengths": _columns(report.length_marks),
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A list for each key, which compresses better than rows; six digits of a figure."""
    keys = list(rows[0]) if rows else []
    return {key: [_short(row[key]) for row in rows] for key in keys}


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _packed(data: Any) -> str:
    """JSON, gzip and base64: no character of it can end a script element."""
    return base64.b64encode(gzip.compress(json.dumps(data, allow_nan=False).encode(), 9, mtime=0)).decode()


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets ``window.vegaEmbed``; its notices stand in the page's footer."""
    import vl_convert

    return base64.b64encode(
        gzip.compress(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").encode(), 9, mtime=0)
    ).decode()


def template_text(name: str) -> str:
    """A file of the package's templates."""
    return files("xcalib.report").joinpath("templates", name).read_text("utf-8")


@cache
def environment() -> "Environment":
    """Templates, with every value escaped unless its template ends in .md.j2."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    made = Environment(
        loader=FunctionLoader(template_text),
        autoescape=lambda name: not (name or "").endswith(".md.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "kl": kl, "number": number, "interval": interval}
    made.globals |= {"count": count, "series_look": series_look}
    return made
