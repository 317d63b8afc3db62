"""``xcalib doctor``: versions, GPUs, extras, completion, the kernels' self-test, and what a model allows."""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table
from rich.text import Text

from xcalib.cli import options as opt
from xcalib.cli.completion import complete_config, installed
from xcalib.cli.inspect import how_many, inspected, print_layers, record
from xcalib.cli.output import print_json, report_console, status

if TYPE_CHECKING:
    from xcalib.doctor import Check
    from xcalib.models.inspection import Inspection

__all__ = ["doctor"]

REPORT = "give the output of `xcalib doctor --json` with your report"


class Finding(NamedTuple):
    """One line of the report: ``ok``, ``warning`` or ``FAILED``, what it is about, and what was found."""

    state: str
    subject: str
    text: str


_STYLES = {"ok": "green", "warning": "yellow", "FAILED": "bold red"}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help=opt.MODEL_HELP + " Or a config.json alone: what will be sparse in it, and why the rest will be dense.",
            autocompletion=complete_config,
        ),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Versions, GPU, extras, and the kernels tested against the truth on this machine; with MODEL, its layers too.

    Exit code 0 when all is well (warnings are), 1 when a check failed.
    """
    found = inspected(model) if model is not None else None  # a MODEL that is none ends it here
    console = report_console()
    findings, kernels = [*_machine(), *_packages(), *_shell()], []
    for finding, tested in _kernels():
        findings.append(finding)
        kernels.append(tested)
    if found is not None:
        findings.append(_model(found))
    failed = [finding for finding in findings if finding.state == "FAILED"]
    if as_json:
        print_json(_json(findings, kernels, None if found is None else record(found)))
    else:
        console.print(_table(findings))
        if found is not None:
            console.print()
            print_layers(console, found)
        said = (
            f"{len(failed)} FAILED: {', '.join(dict.fromkeys(one.subject for one in failed))}"
            if failed
            else "all is well"
            if found is None or not found.unknown_layers
            else "nothing failed; which of the model's layers can attend sparsely is not known"
        )
        console.print(said, style=_STYLES["FAILED" if failed else "ok"])
    if failed:
        raise typer.Exit(1)


def _table(findings: list[Finding]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for before, finding in zip([None, *findings], findings, strict=False):
        subject = finding.subject if before is None or before.subject != finding.subject else ""
        table.add_row(Text(finding.state, style=_STYLES[finding.state]), Text(subject), Text(finding.text))
    return table


def _machine() -> Iterator[Finding]:
    from xcalib.doctor import gpus, versions

    found = versions()
    text = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
    yield Finding("ok", "versions", text)
    there = gpus()
    for gpu in there:
        yield Finding("ok" if gpu.served else "warning", "GPU", gpu.text)
    if not there and found["cuda"]:
        hint = "see what nvidia-smi says" if found["driver"] else "no NVIDIA driver answers (nvidia-smi)"
        yield Finding("warning", "GPU", f"torch is built for CUDA {found['cuda']} and sees no GPU: {hint}")
    elif not there:
        text = "none, and torch is built without CUDA: calibration works, and sparse attention is not faster than dense"
        yield Finding("warning", "GPU", text)
    if os.environ.get("XCALIB_BACKEND"):
        yield Finding("warning", "GPU", f"XCALIB_BACKEND={os.environ['XCALIB_BACKEND']} decides which kernels serve")


def _packages() -> Iterator[Finding]:
    from xcalib.doctor import missing_extras, required_problems

    problems = required_problems()
    yield from (Finding("FAILED", "packages", problem) for problem in problems)
    if not problems:
        yield Finding("ok", "packages", "all that xcalib needs")
    missing = missing_extras()
    for extra in missing:
        text = f"{extra.name} ({extra.purpose}) lacks {', '.join(extra.missing)}: {extra.command}"
        yield Finding("ok", "extras", f"not installed, optional: {text}")
    if not missing:
        yield Finding("ok", "extras", "all installed")


def _shell() -> Iterator[Finding]:
    shell, there = installed()
    if shell is None:
        yield Finding("ok", "completion", "shell unknown ($SHELL); for bash, zsh and fish: xcalib --install-completion")
    elif there:
        yield Finding("ok", "completion", f"installed for {shell}")
    else:
        yield Finding("ok", "completion", f"not installed for {shell}: xcalib --install-completion")


def _kernels() -> Iterator[tuple[Finding, dict[str, Any]]]:
    """A finding for each backend and dtype, and its checks ready for JSON."""
    from xcalib.doctor import check_kernels, targets

    for target in targets():
        began = time.monotonic()
        with status(f"Testing the kernels: {target}"):
            checks = list(check_kernels(target))
        seconds = time.monotonic() - began
        broken = [check for check in checks if check.problem is not None]
        if broken:
            text = f"{target}: {broken[0].name}: {broken[0].problem}"
            text += f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            serves = "XCALIB_BACKEND=reference serves meanwhile, slowly; " if target.backend != "reference" else ""
            finding = Finding("FAILED", "kernels", f"{text}; {serves}{REPORT}")
        else:
            worst = max(checks, key=lambda check: check.error / check.bound)
            text = (
                f"{len(checks)} checks, nearest to its bound {worst.name}: error {worst.error:.1e} of {worst.bound:.1e}"
            )
            finding = Finding("ok", "kernels", f"{target}: {text}; {seconds:.1f} s")
        yield (
            finding,
            {"target": str(target), "seconds": round(seconds, 3), "checks": [_check(check) for check in checks]},
        )


def _check(check: "Check") -> dict[str, Any]:
    numbers = asdict(check)
    error = numbers["error"] if abs(numbers["error"]) < float("inf") else None  # JSON has neither NaN nor infinity
    return {**numbers, "error": error, "passed": check.problem is None}


def _model(found: "Inspection") -> Finding:
    if found.problem is not None:
        return Finding("FAILED", "model", f"{found.name}: {found.problem}")
    dense, unknown = sum(layer.reason is not None for layer in found.layers), len(found.unknown_layers)
    rest = f"; {dense} stay dense, for the reasons below" if dense else ""
    rest += f"; {unknown} are not known: the pass without weights did not come to them" if unknown else ""
    interface = f"its attention goes through transformers' interface ({found.implementation}, {found.seen} calls seen)"
    text = f"{found.name}: {interface}; {how_many(found)} layers can attend sparsely{rest}"
    return Finding("warning" if unknown else "ok", "model", text)


def _json(findings: list[Finding], kernels: list[dict[str, Any]], model: dict[str, Any] | None) -> dict[str, Any]:
    from xcalib.doctor import EXTRAS, gpus, versions

    shell, there = installed()
    return {
        "ok": not any(finding.state == "FAILED" for finding in findings),
        "findings": [finding._asdict() for finding in findings],
        "versions": versions(),
        "gpus": [asdict(gpu) for gpu in gpus()],
        "extras": [
            {"name": e.name, "purpose": e.purpose, "missing": list(e.missing), "install": e.command} for e in EXTRAS
        ],
        "completion": {"shell": shell, "installed": there},
        "kernels": kernels,
        "model": model,
    }
