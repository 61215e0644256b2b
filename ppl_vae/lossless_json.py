"""JSON that gives back the values it was given, or refuses them.

JSON knows no infinities and no NaN: they are written as ``{"$float": "inf"}`` and read back as
floats (a NaN comes back as *the* NaN, without its payload). Tuples come back as lists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_plain(value: Any, where: str) -> Any:
    """``value`` in types that ``json`` writes without loss.

    Args:
        value: anything made of mappings, lists, tuples, strings, numbers and None.
        where: what to call ``value`` in messages, such as "state".

    Raises:
        TypeError, ValueError: JSON cannot hold it; says what stands where.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            return {"$pairs": [to_plain(list(pair), where) for pair in value.items()]}
        if taken := value.keys() & {"$float", "$pairs"}:
            raise ValueError(f"{where} has the key {taken.pop()!r}, which has a meaning here")
        return {key: to_plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    kind = type(value).__name__
    raise TypeError(f"{where} is a {kind}, which JSON cannot hold; tensors go with the tensors")


def loads(data: bytes) -> Any:
    """The value that was made plain and written.

    Raises:
        ValueError: not valid JSON.
    """
    return json.loads(data, object_hook=_restored)


def _restored(value: dict[str, Any]) -> Any:
    if value.keys() == {"$float"}:
        return float(value["$float"])
    return dict(value["$pairs"]) if value.keys() == {"$pairs"} else value
