"""The command line reference of the site, made from the commands themselves."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_OPTION = re.compile(r"^\* `(?P<name>[^`]+)`(?:: (?P<text>.*))?$")


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
        shown = f"[`{name}`](#xcalib-{name})" if kind == "Command" else f"`{name}`{{ .option }}"
        result.append(f"| {shown} | {text} |")
    return result
