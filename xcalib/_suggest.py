"""What somebody may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["nearest"]


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the known word that is nearest to ``word``, and nothing where none is near."""
    found = get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean '{found[0]}'?" if found else ""
