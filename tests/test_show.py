"""What ``render_profile`` prints, with and without colours, for few and for many heads."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from xcalib.cli.show import render_profile
from xcalib.errors import ProfileError
from xcalib.profile import Profile, make_profile, parse_profile, save_profile

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


def table(profile: Profile, width: int = 80) -> list[list[str]]:
    """Rows of the table by layer."""
    console = Console(record=True, width=width, file=io.StringIO(), color_system=None)
    render_profile(profile, console, by_layer=True)
    lines = console.export_text().splitlines()
    assert not any("100 x tau" in line or line.startswith("tau of") for line in lines)
    return [line.split() for line in lines if re.match(r" *\d+( +(\S*\d|-)){5}", line)]


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


def test_by_layer() -> None:
    rows = table(EXAMPLE)
    assert rows[:3] == [
        ["0", "1", "1", "1", "-", "4", "dense", "layer"],
        ["1", "0", "0.625", "0.900", "1", "-"],
        ["2", "1e-05", "0.825", "1", "-", "1"],
    ]
    assert rows[4:] == [["1", "0", "0.575", "0.800", "1", "-"], ["2", "0.100", "0.750", "1", "-", "1"]]
    assert [row[0] for row in table(shaped(80, 64))] == [str(layer) for layer in range(80)]


def test_by_layer_says_the_density_that_the_file_knows() -> None:
    def said(profile: Profile) -> list[str]:
        console = Console(record=True, width=80, file=io.StringIO(), color_system=None)
        render_profile(profile, console, by_layer=True)
        start = "density of all layers together: "
        return [line.strip().removeprefix(start) for line in console.export_text().splitlines() if start in line]

    assert said(EXAMPLE) == ["not known"] * 2  # its figures are means over both bins
    assert said(shaped(2, 4)) == ["predicted 0.251, held-out 0.262"]
    point = EXAMPLE.points[0].model_dump()
    parts = [{"min_length": 1024, "max_length": 8192, "density": 0.3, "kl": 0.01}]
    parts.append({"min_length": 8192, "max_length": None, "density": 0.2, "kl": 0.02})
    point["predicted"] |= {"by_length": parts}
    assert said(make_profile(**{**dict(EXAMPLE), "points": [point]})) == ["predicted 0.300", "predicted 0.200"]


@pytest.mark.parametrize("heads", [4, 32, 64, 128])
@pytest.mark.parametrize("by_layer", [False, True], ids=["drawn", "by layer"])
def test_80_columns_are_enough(heads: int, by_layer: bool) -> None:
    console = Console(record=True, width=80, file=io.StringIO(), color_system=None)
    render_profile(shaped(5, heads), console, by_layer=by_layer)
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert len(table(shaped(5, heads)) if by_layer else heatmap(lines)) == 5  # no line is broken


# --- as a process, with and without a terminal


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_profile(shaped(4, 40), tmp_path / "profile.yaml")
    return tmp_path / "profile.yaml"


def command(file: Path, *options: str) -> list[str]:
    return [sys.executable, "-P", "-m", "xcalib", "show", str(file), *options]


def environment(**more: str) -> dict[str, str]:
    taken = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in taken}
    return {**kept, "TERM": "xterm-256color", "COLORTERM": "truecolor", **more}


def on_a_terminal(file: Path, *options: str, **more: str) -> str:
    """What the command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(file, *options), stdout=theirs, stderr=theirs, stdin=theirs, env=environment(COLUMNS="80", **more)
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 65536):
                written += part
        except OSError:  # its other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    return written.decode().replace("\r\n", "\n")


def piped(file: Path, *options: str, **more: str) -> str:
    done = subprocess.run(command(file, *options), capture_output=True, check=True, env=environment(**more))
    return done.stdout.decode()


def test_a_terminal_gets_colours_and_whole_lines(file: Path) -> None:
    written = on_a_terminal(file)
    assert "\x1b[" in written and "48;2;" in written
    plain = re.sub(r"\x1b\[[\d;]*m", "", written).splitlines()
    assert max(len(line.rstrip()) for line in plain) <= 80
    assert [len(row) for row in heatmap(plain)] == [20] * 4  # two heads a cell


def test_a_pipe_gets_none_and_80_columns(file: Path) -> None:
    lines = piped(file).splitlines()
    assert "\x1b" not in "".join(lines)
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert len(heatmap(lines)) == 4
    assert "\x1b" not in piped(file, "--by-layer")


def test_no_color_means_no_escape_on_a_terminal_too(file: Path) -> None:
    assert "\x1b" not in on_a_terminal(file, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(file, NO_COLOR="1", FORCE_COLOR="1")
    assert "\x1b[" in on_a_terminal(file, NO_COLOR="")  # empty is unset


def test_force_color_colours_a_pipe(file: Path) -> None:
    assert "\x1b[" in piped(file, FORCE_COLOR="1")


def test_an_ascii_locale_gets_ascii(file: Path) -> None:
    written = piped(file, PYTHONIOENCODING="ascii")
    assert written.isascii() and "####" in written
