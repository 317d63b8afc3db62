"""``xcalib profiles``: the profiles that ship with xcalib."""

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from xcalib import profiles as shipped
from xcalib.cli import options as opt
from xcalib.cli.output import print_json, report_console

if TYPE_CHECKING:
    from xcalib.profile import OperatingPoint, Profile

__all__ = ["profiles"]


def profiles(as_json: opt.Json = False) -> None:
    """The profiles that ship with xcalib, with what was measured held out; every command takes their names for a file."""
    from xcalib.profile import load_profile

    found = {name: load_profile(name) for name in shipped.names()}
    if as_json:
        print_json([_record(name, profile) for name, profile in found.items()])
        return
    console = report_console()
    for name, profile in found.items():
        console.print(Text.assemble((name, "bold"), f"  {_what(profile)}"), soft_wrap=True)
        console.print(_points(profile))
    for line in (
        "* default; KL in nats per token, with its interval over held-out samples",
        "look at one:  xcalib show NAME",
        "serve it:     xcalib.apply_profile(model, xcalib.load_profile(NAME))",
        "make it anew: xcalib search --recipe NAME --out again.yaml (data that are a function are named again: --data)",
    ):
        console.print(Text(line), soft_wrap=True)


def _what(profile: "Profile") -> str:
    model, lengths = profile.model, profile.calibration.lengths or (profile.calibration.max_length,)
    tokens = ", ".join(f"{length:,}" for length in lengths)
    return f"{model.name}: {model.layers} layers x {model.query_heads} heads, {tokens} tokens"


def _points(profile: "Profile") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("point", no_wrap=True)
    table.add_column("target")
    for column in ("density", "KL", "from", "to", "samples"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in profile.points:
        default = "*" if point.name == profile.default_point else ""
        table.add_row(*map(Text, (point.name + default, point.target, *_evidence(point))))
    return table


def _evidence(point: "OperatingPoint") -> tuple[str, str, str, str, str]:
    heldout = point.heldout
    if heldout is None:
        return "-", "-", "-", "-", "0"
    ends = ("-", "-") if heldout.intervals is None else tuple(f"{end:.3g}" for end in heldout.intervals.kl)
    return f"{heldout.density:.1%}", f"{heldout.kl:.3g}", ends[0], ends[1], str(heldout.samples)


def _record(name: str, profile: "Profile") -> dict[str, Any]:
    kept = {"method", "model", "length_bins", "default_point", "recipe", "versions", "content_sha256"}
    points = [point.model_dump(mode="json", exclude={"thresholds"}) for point in profile.points]
    return {"name": name, **profile.model_dump(mode="json", include=kept), "points": points}
