"""A Markdown card for a model page: what it is, its evidence, how to use it, how it was made and its limits."""

import re
from pathlib import Path
from typing import Any

from xcalib._files import replace_file
from xcalib.errors import ReportError
from xcalib.profile import Profile
from xcalib.report.evidence import facts, recipe_lines
from xcalib.report.page import environment
from xcalib.report.summary import Report
from xcalib.report.words import keys_in

__all__ = ["render_card", "write_card"]

HUB_ID = r"(?!.*(--|\.\.))\w[\w.-]{0,95}(?<![.-])/\w[\w.-]{0,95}(?<![.-])"
# Makes a link or a mention of bare text, even where an entity or a backslash stands for it; not of text parted by an element.
LINKED = r"://|(?i:(?<=\bwww)\.)|(?<!\w)@(?=\w)|@(?=[\w-]+\\?[._-])"


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
        **_model_to_load(profile),
        # Python strings in an example: nothing in them can end them.
        point_quoted=repr(profile.default_point),
        file_quoted=repr(profile_name),
        facts=facts(profile),
        recipe=recipe_lines(profile),
        keys=[keys_in(length_bin) for length_bin in profile.length_bins],
        last=profile.length_bins[-1].max_length,
        rival=next((rival for rival in report.rivals if rival.point == profile.default_point), None),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _model_to_load(profile: Profile) -> dict[str, Any]:
    """With what the example loads the model: transformers where its name is an id of the hub, else as xcalib does."""
    name, recipe = profile.model.name, profile.recipe or {}
    on_hub = bool(re.fullmatch(HUB_ID, name, re.ASCII)) and not name.endswith((".git", ".gguf"))
    commit = profile.model.commit
    return {
        "on_hub": on_hub,
        "quoted": repr(name if on_hub else str(recipe.get("model") or name)),
        "revision": f", revision={commit!r}" if commit else "",
    }


def _escaped(text: str) -> str:
    """Text of a profile as Markdown that shows just that: no markup, no link, no mention, no cell border."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = re.sub(r"([\\`*_\[\]{}()#+!|~$])", r"\\\1", plain)
    return re.sub(LINKED, lambda found: f"<span>{found[0]}</span>", escaped)


def _code(text: str) -> str:
    """Text as an inline code span, whatever backticks it holds; in a table its bars are escaped."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")
