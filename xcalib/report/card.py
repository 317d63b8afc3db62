"""A Markdown card for a model page: what it is, its evidence, how to use it, how it was made and its limits."""

import re
from pathlib import Path

from xcalib._files import replace_file
from xcalib.errors import ReportError
from xcalib.report.evidence import facts, recipe_lines
from xcalib.report.page import environment
from xcalib.report.summary import Report
from xcalib.report.words import keys_in

__all__ = ["render_card", "write_card"]


def write_card(report: Report, out: Path, profile_name: str) -> None:
    """Write the card of a profile whose file is called ``profile_name``. Raises ReportError where it cannot be written."""
    try:
        replace_file(out, render_card(report, profile_name).encode())
    except OSError as error:
        raise ReportError(f"{out}: cannot be written: {error.strerror or error}") from error


def render_card(report: Report, profile_name: str) -> str:
    """The Markdown."""
    profile = report.inputs.profile
    made = environment()
    made.filters |= {"md": _escaped, "code": _code}
    text = made.get_template("card.md.j2").render(
        report=report,
        profile=profile,
        profile_name=profile_name,
        # The name is a Python string in an example: only what cannot end it.
        from_pretrained=profile.model.name != "demo" and not profile.model.name.endswith(".gguf"),
        quoted=repr(profile.model.name),
        point_quoted=repr(profile.default_point),
        file_quoted=repr(profile_name),
        facts=facts(profile),
        recipe=recipe_lines(profile),
        keys=[keys_in(length_bin) for length_bin in profile.length_bins],
        last=profile.length_bins[-1].max_length,
        rival=next((rival for rival in report.rivals if rival.point == profile.default_point), None),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _escaped(text: str) -> str:
    """Text of a profile as Markdown that shows just that: no markup, no link, no cell border."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]{}()#+!|~$])", r"\\\1", plain)


def _code(text: str) -> str:
    """Text as an inline code span, whatever backticks it holds; in a table its bars are escaped."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")
