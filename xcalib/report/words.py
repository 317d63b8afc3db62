"""Figures in words: one form for the page and the card."""

from xcalib.profile import LengthBin

__all__ = ["count", "interval", "keys_in", "kl", "number", "percent"]

NOTHING, MINUS = "\u2013", "\u2212"


def percent(value: float | None, digits: int = 1) -> str:
    """``33.4 %``, with a space that does not break."""
    return NOTHING if value is None else f"{100 * value:.{digits}f}\u202f%".replace("-", MINUS)


def kl(value: float | None) -> str:
    """Nats per token to three digits."""
    return NOTHING if value is None else number(value)


def number(value: float) -> str:
    """Three significant digits, without an exponent where that stays short."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif abs(value) < 1e-4:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:#.3g}".rstrip(".")
    return text.replace("-", MINUS)


def interval(ends: tuple[float, float] | None, *, shares: bool = False) -> str:
    """``0.031 to 0.066``; empty without one."""
    if ends is None:
        return ""
    low, high = ((percent if shares else number)(end) for end in ends)
    return f"{low} to {high}"


def keys_in(length_bin: LengthBin) -> str:
    """``512 to 1,447 keys`` or ``512 keys and more``."""
    if length_bin.max_length is None:
        return f"{length_bin.min_length:,} keys and more"
    return f"{length_bin.min_length:,} to {length_bin.max_length - 1:,} keys"


def count(number_of: int, noun: str) -> str:
    """``1 sample`` or ``6 samples``."""
    return f"{number_of:,} {noun}{'' if number_of == 1 else 's'}"
