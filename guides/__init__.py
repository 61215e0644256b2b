"""The zoo's guides: one file a family."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """A guide by its class name, whichever file it stands in."""
    from ppl_vae import zoo

    return zoo.attribute(__name__, name, zoo.guides)
