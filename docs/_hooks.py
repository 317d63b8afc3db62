"""What the site has beside the pages in docs/: made while it is built, so that it is never out of date.

The command line reference comes from the commands themselves, the changelog from CHANGELOG.md. Links to code or data outside
docs/, which are right in a checkout, get a page (Python, folders) or a copy (anything else) under ``source/`` on the site.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_OPTION = re.compile(r"^\* `(?P<name>[^`]+)`(?:: (?P<text>.*))?$")
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
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text("utf-8")))
    targets: set[Path] = set()
    for page in files.documentation_pages():
        links = _LINK.finditer(page.content_string)
        targets |= {found for link in links if (found := _source(page.src_uri, link[2])) is not None}
    for target in sorted(targets):
        files.append(_source_file(target, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ at what stands for them on the site."""
    del config, files
    here = page.file.src_uri

    def replace(link: re.Match[str]) -> str:
        target = _source(here, link[2])
        if target is None:
            return link[0]
        return f"{link[1]}{relpath(_source_uri(target), PurePosixPath(here).parent)}{link[3]}"

    return _LINK.sub(replace, markdown)


def command_line() -> str:
    """The command line reference in Markdown: a section for each command of the app."""
    command = [sys.executable, "-m", "typer", "xcalib.cli.app", "utils", "docs", "--name", "xcalib"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{made.stderr}")
    text = made.stdout.replace("# `xcalib`", "# Command line", 1)
    text = re.sub(r"\(docs/([\w/-]+\.md(?:#[\w-]+)?)\)", r"([more](\1))", text)  # as help texts point at pages
    text = re.sub(r"^Example: `(.+)`$", r"**Example**:\n\n```bash\n\1\n```", text, flags=re.MULTILINE)
    text = re.sub(r"^```console\n\$ ", "```text\n", text, flags=re.MULTILINE)
    whole = dict(re.findall(r"^## `xcalib (\w+)`\n\n(.+)$", text, flags=re.MULTILINE))
    text = re.sub(r"^\* `(\w+)`: .*\.\.\.$", lambda cut: f"* `{cut[1]}`: {whole[cut[1]]}", text, flags=re.MULTILINE)
    return "\n".join(_rows(text.splitlines())) + "\n"


def _rows(lines: list[str]) -> list[str]:
    """Lists of options, arguments and commands as tables; a command's name leads to its section."""
    result: list[str] = []
    kind, inside = "", False
    for line in lines:
        heading = re.match(r"\*\*(Option|Argument|Command)s\*\*:$", line)
        if heading:
            kind = heading[1]
            continue
        option = _OPTION.match(line)
        if option and not inside:
            result += [f"| {kind} | |", "|---|---|"]
        inside = option is not None
        if option is None:
            result.append(line if "`" in line else line.replace("][", "]\\["))
            continue
        name, text = (str(option[part] or "").replace("|", "\\|").replace("][", "]\\[") for part in ("name", "text"))
        result.append(f"| [`{name}`](#xcalib-{name}) | {text} |" if kind == "Command" else f"| `{name}` | {text} |")
    return result


def _source(page: str, link: str) -> Path | None:
    """The file or folder of the checkout that a page's link means, if the site has it under source/; relative to ROOT."""
    target = PurePosixPath(normpath(f"docs/{PurePosixPath(page).parent}/{link}"))
    if target.is_absolute() or ".." in target.parts or not (ROOT / target).exists():
        return None
    inside = target.parts[0] == "docs"
    if inside and target.suffix != ".py" and not (ROOT / target).is_dir():
        return None
    return Path(target)


def _source_uri(target: Path) -> str:
    """Where the site has it, as a source path of mkdocs."""
    is_page = target.suffix == ".py" or (ROOT / target).is_dir()
    return f"source/{target.as_posix()}.md" if is_page else f"source/{target.as_posix()}"


def _source_file(target: Path, config: MkDocsConfig) -> File:
    path, uri = ROOT / target, _source_uri(target)
    title = f"---\ntitle: {target.name}\nsearch:\n  exclude: true\n---\n\n# `{target.as_posix()}`\n\n"
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.is_file() and not file.name.startswith((".", "_")))
        base = relpath(target.as_posix().removeprefix("docs/"), PurePosixPath(uri).parent)
        content = title + "\n".join(f"- [{name}]({base}/{name})" for name in names) + "\n"
    elif target.suffix == ".py":
        content = f"{title}``````python\n{path.read_text('utf-8').rstrip()}\n``````\n"
    else:
        return File.generated(config, uri, abs_src_path=str(path))
    return File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)
