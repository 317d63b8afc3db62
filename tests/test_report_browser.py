"""The report in a real browser, opened from disk: nothing asked of the network, no error, every head within reach."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xcalib.evaluation import Evaluation
from xcalib.evaluation.results import DenseResult, PlanResult
from xcalib.profile import Evidence, Intervals, make_profile
from xcalib.search import build_profile
from xcalib.search.targets import parse_targets

pytest.importorskip("altair")
pytest.importorskip("jinja2")
pytest.importorskip("vl_convert")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
HOSTILE = "</script><img src=x onerror=alert(1)>"
READY = "document.documentElement.dataset.ready === '1'"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; without it the tests are skipped, and fail where XCALIB_REQUIRE_BROWSER is 1."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if CHROMIUM is None or sync_playwright is None:
        reason = "needs a chromium (Debian's package chromium) and playwright"
        (pytest.fail if os.environ.get("XCALIB_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking"]
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def pages(invented_curves: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of two lengths with a hostile name, and one of a model so large that its heatmaps are drawn on a canvas."""
    from xcalib.report import Evaluated, Inputs, summarise, write_page

    folder, written = tmp_path_factory.mktemp("report-browser"), {}
    for name, shape in (("small", {}), ("large", {"measured": range(1, 60), "layers": 60, "heads": 48})):
        lengths = (1024, 2048) if name == "small" else (2048,)
        sets = tuple(invented_curves(length=length, seed=length, **shape) for length in lengths)
        profile = build_profile(sets, parse_targets(["balanced:density=0.4", "fast:density=0.3"]))
        ends = Intervals(confidence=0.95, resamples=4000, kl=(0.01, 0.9))
        heldout = Evidence(density=0.4, kl=0.1, samples=6, tokens=6000, intervals=ends)
        first = profile.points[0].model_copy(update={"heldout": heldout, "verified": True})
        model = {**profile.model.model_dump(), "name": HOSTILE}
        points = (first, *profile.points[1:])
        profile = make_profile(**{**dict(profile), "model": model, "points": points})
        written[name] = folder / f"{name}.html"
        evaluated = Evaluated(f"{HOSTILE}.json", hostile_evaluation(profile.model.layers), profile.method)
        evaluations = (evaluated,) if name == "small" else ()
        write_page(summarise(Inputs(profile, sets, evaluations)), written[name])
    return written


def hostile_evaluation(layers: int) -> Evaluation:
    """Of a plan whose name would be a picture, and of a single tau."""
    figures: dict[str, Any] = {"density_by_layer": (0.5,) * layers, "kl_p99": 0.1, "kl_by_sample": (0.1,)}
    figures |= {"perplexity": 10.0, "accuracy": None, "seconds": 1.0}
    plans = (
        PlanResult(name=HOSTILE, density=0.6, kl=0.02, **figures),
        PlanResult(name="tau=0.8", density=0.5, kl=0.3, **figures),
    )
    return Evaluation(DenseResult(9.0, None, 1.0), plans, (HOSTILE,), 1, 1000, 0)


class Opened:
    """A page from disk; what its console and the network were asked is kept."""

    def __init__(self, browser: Any, path: Path, **how: Any) -> None:
        self.context = browser.new_context(viewport=how.pop("viewport", WIDE), **how)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.path = path

    def ready(self) -> Any:
        """The page once its charts are drawn."""
        self.page.wait_for_function(READY, timeout=60_000)
        return self.page

    def check(self) -> None:
        """Nothing was said, and nothing but the file itself was asked for."""
        assert self.said == []
        outside = [url for url in self.asked if url != self.path.as_uri() and not url.startswith("data:")]
        assert outside == []
        self.context.close()


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Callable[..., Opened]:
    return lambda name="small", **how: Opened(browser, pages[name], **how)


def curve(page: Any) -> list[str]:
    """The chosen head's curve as its table shows it."""
    return page.locator("#table-curve tbody tr").all_text_contents()


def line(page: Any) -> str:
    """The path that the chart draws for it."""
    path = page.locator("#chart-curve-density .mark-line path").first.get_attribute("d")
    assert path
    return str(path)


def chosen(page: Any) -> tuple[str, str]:
    return page.input_value("#layer"), page.input_value("#head")


def test_every_chart_is_drawn(opened: Callable[..., Opened]) -> None:
    page = (one := opened()).ready()
    assert page.title() == f"{HOSTILE}: sparse attention profile"
    for name in (
        "front",
        "held",
        "tau",
        "density",
        "error",
        "curve-density",
        "curve-error",
        "length-density",
        "length-kl",
    ):
        drawn = page.locator(f"#chart-{name} svg")
        assert drawn.count() == 1 and drawn.bounding_box()["width"] > 200, name
    for name in ("tau", "density", "error"):
        assert page.locator(f"#chart-{name} .mark-rect path").count() >= 16
    assert page.locator("img").count() == 0
    assert page.locator("#no-charts").is_hidden()
    one.check()


def test_measured_and_predicted_marks_differ(opened: Callable[..., Opened]) -> None:
    page = (one := opened()).ready()
    fills = page.eval_on_selector_all(
        "#chart-front .mark-symbol path", "all => all.map(one => one.getAttribute('fill'))"
    )
    assert {"var(--page)", "var(--ink)"} <= set(fills)
    assert page.locator("#chart-front .mark-line path").count() == 3
    one.check()


def test_hover_tells_the_head(opened: Callable[..., Opened]) -> None:
    page = (one := opened()).ready()
    page.locator("#chart-tau .mark-rect path").nth(2).hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.locator("#vg-tooltip-element").inner_text()
    for word in ("layer", "head", "tau", "density", "output error", "KL alone"):
        assert word in told
    one.check()


def test_hostile_names_in_tooltips_are_text(opened: Callable[..., Opened]) -> None:
    page = (one := opened()).ready()
    told = []
    filled = "#chart-front .mark-symbol path:is([fill='var(--ink)'], [fill='var(--muted)'])"  # the point, and another profile's
    for mark in page.locator(filled).all():
        mark.scroll_into_view_if_needed()
        box = mark.bounding_box()
        for step in (4, 5):  # the first move may only end the tooltip before
            page.mouse.move(box["x"] + step, box["y"] + step)
        page.wait_for_selector("#vg-tooltip-element.visible")
        told.append(page.locator("#vg-tooltip-element").inner_text())
    assert len(told) == 2 and "null" not in "".join(told)
    assert any(HOSTILE in text for text in told)
    assert page.locator("img").count() == 0
    one.check()


def test_click_chooses_a_head(opened: Callable[..., Opened]) -> None:
    page = (one := opened()).ready()
    before, drawn = curve(page), line(page)
    page.locator("#chart-density").scroll_into_view_if_needed()
    box = page.locator("#chart-density .mark-rect.role-mark").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.95)
    page.wait_for_function("document.getElementById('layer').value === '3'")
    assert chosen(page) == ("3", "3")
    assert curve(page) != before
    page.wait_for_function(
        "old => document.querySelector('#chart-curve-density .mark-line path').getAttribute('d') !== old", arg=drawn
    )
    assert page.locator("#chosen").inner_text().startswith("Layer 3, head 3 at balanced: tau ")
    one.check()


def test_keyboard_chooses_a_head(opened: Callable[..., Opened]) -> None:
    page = (one := opened()).ready()
    assert chosen(page) == ("0", "0")
    before = curve(page)
    for _ in range(60):  # by the Tab key alone
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "chart-tau":
            break
    assert page.evaluate("document.activeElement.id") == "chart-tau"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    assert chosen(page) == ("2", "1")
    after = curve(page)
    assert after != before
    for key in ("ArrowUp", "ArrowUp", "ArrowUp"):  # ends at the first layer
        page.keyboard.press(key)
    assert chosen(page) == ("0", "1")
    page.select_option("#layer", "2")
    assert curve(page) == after
    one.check()


def test_point_and_length_change_the_cells(opened: Callable[..., Opened]) -> None:
    page = (one := opened()).ready()
    page.locator("#table-layers").evaluate("table => table.closest('details').open = true")
    rows = page.locator("#table-layers tbody tr")
    seen = {tuple(rows.all_text_contents())}
    page.select_option("#point", "1")
    seen.add(tuple(rows.all_text_contents()))
    curves = {tuple(curve(page))}
    page.select_option("#bin", "1")
    seen.add(tuple(rows.all_text_contents()))
    curves.add(tuple(curve(page)))
    assert len(seen) == 3 and len(curves) == 2
    assert "at fast" in page.locator("#chosen").inner_text()
    page.select_option("#layer", "1")
    assert page.locator("#chosen").inner_text().endswith("which runs dense.")
    one.check()


def test_figures_of_the_page_are_those_of_the_curves(opened: Callable[..., Opened], invented_curves: Any) -> None:
    page = (one := opened()).ready()
    page.select_option("#layer", "3")
    page.select_option("#head", "2")
    curves = invented_curves(length=1024, seed=1024)
    rows = [row.locator("td").all_text_contents() for row in page.locator("#table-curve tbody tr").all()]
    assert len(rows) == 27
    for level, (tau, density, error, alone) in enumerate(rows):
        assert float(tau) == curves.grid[level]
        assert density.endswith("\u202f%")
        assert float(density[:-2]) == pytest.approx(100 * curves.density[2, 2, level], abs=0.051)
        truth = curves.relative_error[2, 2, level]
        assert float(error) == pytest.approx(truth, rel=6e-3)
        assert float(alone) == pytest.approx(curves.gain[2] * truth, rel=6e-3)
    one.check()


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_themes_and_widths(opened: Callable[..., Opened], name: str, viewport: dict[str, int]) -> None:
    page = (one := opened(name, viewport=viewport, color_scheme="dark")).ready()
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(20, 23, 26)"
    seen = [page.evaluate("document.documentElement.scrollWidth")]
    button = page.get_by_role("button", name="Colours")
    for wanted, colour in (
        ("light", "rgb(255, 255, 255)"),
        ("dark", "rgb(20, 23, 26)"),
        ("system", "rgb(20, 23, 26)"),
    ):
        button.click()
        assert page.get_by_role("button", name=f"Colours: {wanted}", exact=True).count() == 1
        assert button.inner_text() == f"Colours: {wanted}"
        assert page.evaluate(background) == colour
        seen.append(page.evaluate("document.documentElement.scrollWidth"))
    for details in page.locator("details").all():
        details.evaluate("one => one.open = true")
    seen.append(page.evaluate("document.documentElement.scrollWidth"))
    assert set(seen) == {viewport["width"]}
    for chart in page.locator(".chart").all():
        box = chart.locator("svg, canvas").first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"]
    one.check()


def test_large_heatmaps_are_a_canvas_that_follows_the_theme(opened: Callable[..., Opened]) -> None:
    page = (one := opened("large", color_scheme="light")).ready()
    assert page.locator("#chart-tau canvas").count() == 1
    light = page.locator("#chart-tau").screenshot()
    page.get_by_role("button", name="Colours").click()
    assert page.locator("#chart-tau").screenshot() == light  # still light
    page.get_by_role("button", name="Colours").click()
    assert page.locator("#chart-tau").screenshot() != light
    page.locator("#chart-tau").focus()
    before = chosen(page)
    page.keyboard.press("ArrowDown")
    assert chosen(page) == (str(int(before[0]) + 1), before[1])
    box = page.locator("#chart-tau canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6)
    layer, head = map(int, chosen(page))
    assert 20 < layer < 50 and 15 < head < 40
    one.check()


def test_print(opened: Callable[..., Opened], tmp_path: Path) -> None:
    page = (one := opened(color_scheme="dark")).ready()
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("details:not([open])").count() == 0
    assert not page.locator("nav").is_visible() and not page.locator("#theme").is_visible()
    assert page.locator("#table-lines tbody tr").first.is_visible()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    page.emulate_media(media="screen")
    pdf = page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert len(pdf) > 50_000
    one.check()


@pytest.mark.parametrize("lacking", ["scripts", "DecompressionStream"])
def test_without_charts_the_figures_stay(browser: Any, pages: dict[str, Path], lacking: str) -> None:
    context = browser.new_context(java_script_enabled=lacking != "scripts", viewport=WIDE)
    if lacking != "scripts":
        context.add_init_script("delete window.DecompressionStream")
    page = context.new_page()
    page.goto(pages["small"].as_uri())
    where = "#no-charts" if lacking != "scripts" else "noscript p"
    page.wait_for_selector(where, state="visible")
    text = page.locator("main").inner_text()
    assert "On held-out data: balanced" in text and "fast not verified" in text
    page.locator("#front summary").first.click()
    assert page.locator("#table-marks tbody tr").count() == 5
    assert page.locator("#table-marks tbody tr").first.is_visible()
    context.close()
