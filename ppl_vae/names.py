"""What may have been meant by a name that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint to what may have been meant.

    >>> nearest("vae-digit", ["vae-digits", "vae-mnist"])
    "did you mean 'vae-digits'?"
    """
    by_lower = {k.lower(): k for k in known}
    if close := difflib.get_close_matches(name.lower(), by_lower, n=1):
        return f"did you mean {by_lower[close[0]]!r}?"
    return f"known: {', '.join(sorted(by_lower.values())) or 'none'}"
