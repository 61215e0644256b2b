"""What the options of several commands have in common."""

from __future__ import annotations

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]


def parted(text: str | None) -> list[str] | None:
    """Words parted by commas."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def numbers(option: str, text: str | None) -> list[int] | None:
    words = parted(text)
    if words is not None and not (words and all(word.isdecimal() for word in words)):
        raise ValueError(f"--{option} {text}: expected whole numbers, parted by commas")
    return None if words is None else [int(word) for word in words]
