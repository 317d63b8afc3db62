"""``xcalib validate``."""

from pathlib import Path
from typing import Annotated

import typer

from xcalib.cli import options as opt
from xcalib.cli.completion import complete_profile
from xcalib.cli.output import console, print_json
from xcalib.cli.show import unverified_points
from xcalib.errors import XcalibError

__all__ = ["validate"]


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Profiles.", autocompletion=complete_profile)],
    as_json: opt.Json = False,
) -> None:
    """Check profiles: exit code 0 when all are valid, 2 with one line for each that is not; names unverified points."""
    from xcalib.profile import load_profile

    verdicts: dict[str, str | None] = {}
    for file in files:
        try:
            profile = load_profile(file)
            verdicts[str(file)] = None
            console.print(f"{file}: valid{unverified_points(profile)}", markup=False, soft_wrap=True)
        except XcalibError as error:
            verdicts[str(file)] = str(error)
            console.print(f"error: {error}", markup=False, soft_wrap=True)
    if as_json:
        print_json(verdicts)
    if any(verdict is not None for verdict in verdicts.values()):
        raise typer.Exit(2)
