"""How ``xcalib search`` ends: the profile in the terminal and in its file, or the miss and no file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from xcalib.cli.output import console, print_json
from xcalib.cli.show import render_profile
from xcalib.errors import TargetMissedError

if TYPE_CHECKING:
    from xcalib.profile import Profile, SearchRound

__all__ = ["TARGET_MISSED", "report_profile", "reporting_misses"]

TARGET_MISSED = 3  # exit code; 2 is bad input


def report_profile(profile: "Profile", out: Path, as_json: bool) -> None:
    """Say what is known about a profile that was found and saved."""
    from xcalib.search import judge

    render_profile(profile, console)
    for point in profile.points:
        if point.bound and point.bound.gap is not None:
            console.print(f"{point.name}: within {point.bound.gap:.3%} of the best choice of levels for these curves")
    for point in profile.points:
        for number, length_bin in enumerate(point.rounds or ()):
            for line in round_lines(length_bin):
                where = f", bin {number}" if len(profile.length_bins) > 1 else ""
                console.print(f"{point.name}{where}: {line}", markup=False, soft_wrap=True)
    for point in profile.points:
        verdict = judge(point)
        if verdict.outcome == "met" or point.heldout is None:  # the others were warnings of the search
            console.print(verdict.text, markup=False, soft_wrap=True)
    console.print(f"wrote {out}; a page about it: xcalib report {out}", markup=False, soft_wrap=True)
    if as_json:
        print_json({"profile": str(out), **profile.model_dump(mode="json")})


def round_lines(rounds: "Sequence[SearchRound]") -> list[str]:
    """What each step after the first search expected, and what came of it."""
    lines = []
    for number, one in enumerate(rounds, start=1):
        off = f" ({one.expected / one.measured - 1:+.0%})" if one.measured > 0 else ""
        lines.append(
            f"round {number}: KL {one.expected:.4f} expected, {one.measured:.4f} measured{off}, {one.others:.4f} on samples that "
            f"had no say; {'taken' if one.taken else 'not taken'}"
        )
    return lines


@contextmanager
def reporting_misses(out: Path, as_json: bool) -> Iterator[None]:
    """A target missed on held-out data ends the command with exit code 3; ``out`` stays as it is."""
    try:
        yield
    except TargetMissedError as error:
        from xcalib.search import missed

        render_profile(error.profile, console)
        kept = f"{out} stays as it was" if out.exists() else f"{out} is not written"
        console.print(
            f"error: {missed(error.verdicts)}; {kept}: calibrate on more samples (--num-samples) or on data like the held-out, "
            "choose a looser --target, or keep the profile unverified with --resume --force",
            markup=False,
            soft_wrap=True,
        )
        if as_json:
            verdicts = {verdict.point: {"outcome": verdict.outcome, "text": verdict.text} for verdict in error.verdicts}
            print_json({"profile": None, "verdicts": verdicts, **error.profile.model_dump(mode="json")})
        raise typer.Exit(TARGET_MISSED) from None
