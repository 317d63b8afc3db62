"""The documentation site: what can be checked without building it. `make docs` builds it, warnings are errors."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from xcalib.cli.app import app
from xcalib.profile import json_schema

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = {"cli.md", "changelog.md"}  # by docs/_hooks.py
WRITTEN = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
OUTSIDE = re.compile(r"""(?:@import\s|url\(|<script|<link|<iframe)[^>;)]*//""")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / ".mkdocs.yml").read_text("utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def reference() -> str:
    """The command line reference, made anew."""
    spec = importlib.util.spec_from_file_location("site_cli", DOCS / "_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.command_line()
    assert isinstance(text, str)
    return text


def _pages(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from _pages(part)


def test_every_page_is_in_the_navigation_once(config: dict[str, Any]) -> None:
    pages = list(_pages(config["nav"]))
    assert len(pages) == len(set(pages))
    assert sorted(set(pages) - GENERATED) == WRITTEN


def test_warnings_are_errors(config: dict[str, Any]) -> None:
    assert config["strict"] is True
    assert set(config["validation"]["links"].values()) == {"warn"}
    assert set(config["validation"]["nav"].values()) == {"warn"}


def test_nothing_is_loaded_from_elsewhere(config: dict[str, Any]) -> None:
    assert config["theme"]["font"] is False
    assert "analytics" not in config["extra"]
    loaded = [*config.get("extra_css", []), *config.get("extra_javascript", [])]
    for name in [*loaded, config["theme"]["logo"], config["theme"]["favicon"]]:
        assert (DOCS / name).is_file(), name
    for path in (DOCS / "images").iterdir():
        if path.suffix in (".css", ".svg"):
            assert not OUTSIDE.search(path.read_text("utf-8")), path.name


def test_a_style_from_elsewhere_would_be_seen() -> None:
    assert OUTSIDE.search('@import url("https://fonts.example/css");')
    assert OUTSIDE.search('<script src="//cdn.example/x.js">')


@pytest.mark.parametrize("page", WRITTEN)
def test_pictures_exist_and_are_small(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    for link in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text):
        picture = (DOCS / page).parent / link
        assert picture.is_file(), f"{page}: {link}"
        assert picture.stat().st_size < 300_000, f"{page}: {link}"


def test_every_picture_is_shown() -> None:
    texts = "".join((DOCS / page).read_text("utf-8") for page in WRITTEN)
    for path in (DOCS / "images").glob("*.svg"):
        assert path.stat().st_size < 150_000, path.name
        assert path.stem == "logo" or f"images/{path.name}" in texts, path.name


def test_reference_has_every_command_with_its_options(reference: str) -> None:
    group: Any = typer.main.get_command(app)
    context = typer.Context(group)
    sections = dict(re.findall(r"^## `xcalib (\w+)`\n(.*?)(?=^## |\Z)", reference, flags=re.MULTILINE | re.DOTALL))
    assert sorted(sections) == sorted(group.list_commands(context))
    for name, section in sections.items():
        for parameter in group.get_command(context, name).params:
            if parameter.param_type_name == "option" and not getattr(parameter, "hidden", False):
                assert re.search(rf"(?:`|, ){re.escape(parameter.opts[0])}(?![\w-])", section), (
                    name,
                    parameter.opts[0],
                )
        assert "**Example**:\n\n```bash\nxcalib" in section, name
        assert f"[`{name}`](#xcalib-{name})" in reference


def test_reference_links_to_pages_that_exist(reference: str) -> None:
    links = re.findall(r"\]\(([\w/-]+\.md)[)#]", reference)
    assert links
    for link in links:
        assert (DOCS / link).is_file(), link


def test_published_schema_is_the_readers() -> None:
    assert json.loads((DOCS / "profile.schema.json").read_text("utf-8")) == json_schema()


@pytest.mark.parametrize("pattern", ["antidiagonal", "rows"])
def test_pictures_of_patterns_come_from_the_kernels(pattern: str) -> None:
    """One product in S, where the documentation says: along antidiagonals, or in the last row of each group."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    probe: Callable[[str], Any] = module.probe
    seen = probe(pattern)
    assert seen.shape == (64, 64)
    assert seen.sum() == 64 * 64 // module.STRIDE
    rows, keys = seen.nonzero()
    if pattern == "rows":
        assert set(rows % 8) == {7}
    else:
        assert set((rows % 8) + (keys % 8)) == {7}
