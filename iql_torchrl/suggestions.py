"""Nearest match for a misspelt name."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name where one is near, else all of them."""
    known = sorted(map(str, known))
    if not known:
        return "."
    matches = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known are {', '.join(known)}." if len(known) <= 20 else "."
