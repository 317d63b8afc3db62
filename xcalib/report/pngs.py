"""The charts as PNG files, through vl_convert: no browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xcalib import _yaml
from xcalib._files import replace_file
from xcalib.errors import ReportError
from xcalib.report.heads import colour_domains, head_rows
from xcalib.report.summary import Report
from xcalib.report.theme import in_light
from xcalib.report.words import keys_in

__all__ = ["write_pngs"]

SCALE = 2.0
WIDE, NARROW = 860, 340


def write_pngs(report: Report, folder: Path) -> list[Path]:
    """One file for each chart that has data, white behind, twice the pixels of its size; the default point and first bin.

    Raises:
        ReportError: the folder cannot be written.
    """
    import vl_convert

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, spec, data in _charts(report):
            spec |= {"title": _title(name, report), "background": "white", "padding": 14, "datasets": data}
            filled = in_light(spec)
            path = folder / f"{name}.png"
            replace_file(path, vl_convert.vegalite_to_png(filled, scale=SCALE))
            written.append(path)
    except OSError as error:
        raise ReportError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return written


def _title(name: str, report: Report) -> dict[str, Any]:
    """What a picture shows, for where it stands alone."""
    default, keys = report.inputs.profile.default_point, keys_in(report.inputs.profile.length_bins[0])
    heads = f"{default}, {keys}; grey heads run dense"
    marks = "filled marks: measured, with intervals; hollow marks and lines: predicted"
    titles = {
        "tau": ("tau of every head", heads),
        "density": ("density of every head", heads),
        "error": ("output error of every head (log)", heads),
        "pareto": ("density against KL", marks),
        "predicted-and-held-out": (
            "predicted and held-out KL",
            "diamond: predicted; filled: held out, with its interval",
        ),
        "density-by-length": ("density by length", "filled: measured; hollow and dashed: predicted"),
        "kl-by-length": ("KL by length", "filled: measured; hollow and dashed: predicted"),
    }
    what, how = titles[name]
    title = {
        "text": f"{_yaml.one_line(report.inputs.profile.model.name, 60)}: {what}",
        "subtitle": how,
        "anchor": "start",
    }
    look = {
        "color": "var(--ink)",
        "subtitleColor": "var(--muted)",
        "fontSize": 15,
        "fontWeight": 600,
        "subtitleFontSize": 12,
    }
    return {**title, **look, "subtitlePadding": 5, "offset": 14}


def _charts(report: Report) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    from xcalib.report import charts

    inputs = report.inputs
    layers, heads = inputs.profile.model.layers, inputs.profile.model.query_heads
    point = next(i for i, p in enumerate(inputs.profile.points) if p.name == inputs.profile.default_point)
    rows = head_rows(inputs, point, 0)
    width = max(NARROW, min(WIDE, heads * 12))
    for value, domain in colour_domains(inputs).items():
        yield value, charts.heatmap(value, layers, heads, domain, width), {"heads": rows}
    if report.lines or report.marks:
        data: dict[str, Any] = {"lines": report.line_rows, "marks": report.mark_rows}
        yield "pareto", charts.front_chart(report.groups, report.line_names, WIDE), data
    if report.held:
        yield "predicted-and-held-out", charts.held_chart(len(report.held), WIDE), {"held": report.held}
    if report.length_marks:
        for value, name in (("density", "density-by-length"), ("kl", "kl-by-length")):
            yield name, charts.length_chart(value, report.length_names, WIDE), {"lengths": report.length_marks}
