"""What the site has beside the pages in docs/: made while it is built, so that it is never out of date.

The command line reference comes from the commands themselves, the changelog from CHANGELOG.md. Links to code or data outside
docs/, and to Python inside it, are right in a checkout; on the site they get a page (Python, folders) or a copy (anything else)
under ``source/``.
"""

import re
import sys
import tempfile
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _cli import ROOT, command_line

_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
# D[h][m] outside code is text and no reference
_INDICES = re.compile(r"(^```.*?^```|^ {4}.*?$|`[^`\n]+`)|(?<=\w)(\[[^\]\s]+\])\[", re.MULTILINE | re.DOTALL)
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "docs": "index.md"}  # what is a page already
_LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
_links: list[tempfile.TemporaryDirectory[str]] = []


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """kernels/ and profiles/ lie beside xcalib/ and are imported as parts of it: show the package as it is installed."""
    _links.append(tempfile.TemporaryDirectory(prefix="xcalib-docs-"))
    package = Path(_links[-1].name) / "xcalib"
    package.mkdir()
    parts = [*(ROOT / "xcalib").iterdir(), ROOT / "kernels", ROOT / "profiles"]
    for part in parts:
        (package / part.name).symlink_to(part)
    plugin: Any = config.plugins["mkdocstrings"]
    plugin.config.handlers.setdefault("python", {})["paths"] = [_links[-1].name]
    return config


def on_shutdown() -> None:
    """Remove the links."""
    while _links:
        _links.pop().cleanup()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and whatever outside docs/ the pages link to."""
    files.append(File.generated(config, "cli.md", content=command_line()))
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changes))
    targets: set[Path] = set()
    for page in files.documentation_pages():
        links = _LINK.finditer(page.content_string)
        targets |= {found for link in links if (found := _source(page.src_uri, link[2])) is not None}
    for folder in [target for target in targets if (ROOT / target).is_dir()]:
        targets |= {file.relative_to(ROOT) for file in _listed(ROOT / folder) if file.suffix == ".py"}
    for target in sorted(target for target in targets if target.as_posix() not in _PAGES):
        files.append(_source_file(target, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ at what stands for them on the site."""
    del config, files
    here = page.file.src_uri
    if here.startswith("source/") and here.endswith(".py.md"):
        return markdown
    if here == "profile-format.md":
        markdown = f"{markdown}\n\n## JSON Schema\n\n{_folded('profile.schema.json')}"

    markdown = _INDICES.sub(lambda found: found[1] or f"{found[2]}\\[", markdown)

    def replace(link: re.Match[str]) -> str:
        target = _source(here, link[2])
        return link[0] if target is None else f"{link[1]}{relpath(_uri(target), PurePosixPath(here).parent)}{link[3]}"

    return _LINK.sub(replace, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would load something from elsewhere."""
    del config
    if outside := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri}: loads from outside: {outside[0]}")
    return output


def _source(page: str, link: str) -> Path | None:
    """The file or folder of the checkout that a page's link means, if the site has it under source/; relative to ROOT."""
    target = PurePosixPath(normpath(f"docs/{PurePosixPath(page).parent}/{link}"))
    if target.is_absolute() or ".." in target.parts or not (ROOT / target).exists():
        return None
    inside = target.parts[0] == "docs"
    if inside and target.suffix != ".py" and not (ROOT / target).is_dir():
        return None
    return Path(target)


def _uri(target: Path) -> str:
    """Where the site has it, as a source path of mkdocs."""
    if target.as_posix() in _PAGES:
        return _PAGES[target.as_posix()]
    if target.suffix == ".py" or (ROOT / target).is_dir():
        return f"source/{target.as_posix()}.md"
    return f"source/{target.as_posix()}{'.txt' if target.suffix == '.md' else ''}"


def _listed(folder: Path) -> list[Path]:
    """Its files, those of its folders too."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith((".", "_")))


def _folded(name: str) -> str:
    """A JSON file of docs/, folded up."""
    lines = (ROOT / "docs" / name).read_text("utf-8").rstrip().splitlines()
    body = "\n".join(f"    {line}" for line in lines)
    return f'??? note "{name}, {len(lines):,} lines"\n    ```json\n{body}\n    ```\n'


def _source_file(target: Path, config: MkDocsConfig) -> File:
    path, uri = ROOT / target, _uri(target)
    title = f"---\ntitle: {target.name}\nsearch:\n  exclude: true\n---\n\n# `{target.as_posix()}`\n\n"
    if path.is_dir():
        base = relpath(target.as_posix().removeprefix("docs/"), PurePosixPath(uri).parent)
        content = (
            title
            + "\n".join(f"- [{file.relative_to(path)}]({base}/{file.relative_to(path)})" for file in _listed(path))
            + "\n"
        )
    elif target.suffix == ".py":
        content = f"{title}``````python\n{path.read_text('utf-8').rstrip()}\n``````\n"
    else:
        return File.generated(config, uri, abs_src_path=str(path))
    return File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)
