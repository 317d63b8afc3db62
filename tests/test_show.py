"""What ``render_profile`` prints, with and without colours, for few and for many heads."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from xcalib.cli.show import render_profile
from xcalib.errors import ProfileError
from xcalib.profile import Profile, make_profile, parse_profile

DOC = (Path(__file__).parent.parent / "docs" / "profile-format.md").read_text("utf-8")
EXAMPLE = parse_profile(re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)[0])


def shaped(layers: int, heads: int, **fields: Any) -> Profile:
    """A profile with tau = (layer + head) / (layers + heads - 2): 0 at the first head, 1 at the last."""
    rows = [[(layer + head) / (layers + heads - 2) for head in range(heads)] for layer in range(layers)]
    point = {**EXAMPLE.points[0].model_dump(), "thresholds": [rows]}
    other = {
        **point,
        "name": "other",
        "heldout": None,
        "bound": None,
        "verified": None,
        "thresholds": [[[0.5] * heads] * layers],
    }
    model = {**EXAMPLE.model.model_dump(), "layers": layers, "query_heads": heads, "kv_heads": 1}
    shape = {"model": model, "points": [point, other], "dense_layers": (), "length_bins": EXAMPLE.length_bins[:1]}
    return make_profile(**{**dict(EXAMPLE), **shape, **fields})


def printed(profile: Profile, point: str | None = None, width: int = 100) -> list[str]:
    console = Console(record=True, width=width, file=io.StringIO(), color_system=None)
    render_profile(profile, console, point)
    return console.export_text().splitlines()


def heatmap(lines: list[str]) -> list[list[str]]:
    return [line.split()[1:] for line in lines if re.fullmatch(r" *\d+( (\d\d|##))+ *", line)]


def test_summary_and_points() -> None:
    text = "\n".join(printed(EXAMPLE))
    for part in (
        "tiny/llama",
        "3 layers, 4 query / 2 KV heads",
        "antidiagonal, stride 8, block 64, order score",
        "wiki",
    ):
        assert part in text
    assert re.search(r"balanced\* +predicted +0\.251 +0\.0123 +- +1\.65%", text)
    assert "balanced: density=0.25" in text
    assert re.search(r" held-out +0\.262 +0\.0141 +0\.11 +90\.0% +92\.0%", text)
    assert "balanced: thresholds for 1,024 to 8,191 keys" in text
    assert "balanced: thresholds for 8,192 keys and more" in text


def test_heatmap_of_the_example() -> None:
    cells = heatmap(printed(EXAMPLE))
    assert cells[:3] == [["##"] * 4, ["90", "85", "40", "00"], ["95", "70", "##", "00"]]
    assert len(cells) == 6  # two length bins of three layers


def test_32_heads_fit_in_100_columns() -> None:
    lines = printed(shaped(5, 32))
    assert max(len(line.rstrip()) for line in lines) <= 100
    cells = heatmap(lines)
    assert [len(row) for row in cells] == [32] * 5
    assert (cells[0][0], cells[-1][-1]) == ("00", "##")
    assert not any("mean of" in line for line in lines)


@pytest.mark.parametrize("width", [40, 80, 100, 200])
@pytest.mark.parametrize("heads", [33, 75, 800])
def test_many_heads_are_averaged_with_a_note(heads: int, width: int) -> None:
    lines = printed(shaped(3, heads), width=width)
    cells = heatmap(lines)
    group = -(-heads // len(cells[0]))
    assert max(len(line.rstrip()) for line in lines) <= width
    assert len(cells) == 3
    if group > 1:
        assert f"a cell is the mean of {group} neighbouring heads" in re.sub(r"\s+", " ", " ".join(lines))


def test_near_one_is_not_shown_as_dense() -> None:
    rows = [[0.999, 1.0, 0.001, 0.5]]
    point = {**EXAMPLE.points[0].model_dump(), "thresholds": [rows]}
    model = {**EXAMPLE.model.model_dump(), "layers": 1}
    assert heatmap(printed(shaped(1, 4, points=[point], model=model))) == [["99", "##", "00", "50"]]


def test_histogram_counts_every_searched_head() -> None:
    counts = [
        int(m[1].replace(",", ""))
        for line in printed(shaped(5, 32))
        if (m := re.match(r" +(?:[\d.]+-[\d.]+|1) +([\d,]+) ", line)) and "█" in line
    ]
    assert sum(counts) == 160
    assert "tau of 8 heads (dense layers left out: 1)" in "\n".join(printed(EXAMPLE))


def test_other_point_and_unknown_point() -> None:
    assert heatmap(printed(shaped(2, 4), "other")) == [["50"] * 4] * 2
    with pytest.raises(ProfileError, match="no operating point 'none'; this profile has: balanced, other"):
        printed(shaped(2, 4), "none")


def test_all_layers_dense() -> None:
    point = {**EXAMPLE.points[0].model_dump(), "thresholds": [[[1.0] * 4] * 2]}
    text = "\n".join(printed(shaped(2, 4, points=[point], dense_layers=(0, 1))))
    assert "tau of 0 heads (dense layers left out: 2)" in text


def test_markup_in_names_is_printed_as_it_is() -> None:
    model = {**EXAMPLE.model.model_dump(), "name": "[red]x[/red][/]"}
    assert "[red]x[/red][/]" in "\n".join(printed(make_profile(**{**dict(EXAMPLE), "model": model})))


def test_colours_on_a_terminal_and_none_when_piped() -> None:
    file = io.StringIO()
    render_profile(EXAMPLE, Console(file=file, width=100, force_terminal=True, color_system="truecolor"))
    assert "48;2;254;232;56" in file.getvalue()  # tau = 1 is the scale's bright end
    piped = io.StringIO()
    render_profile(EXAMPLE, Console(file=piped, width=100))
    assert "\x1b" not in piped.getvalue()


def test_ascii_only_output() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    render_profile(EXAMPLE, Console(file=file, width=100))
    file.flush()
    assert b"####" in raw.getvalue()
