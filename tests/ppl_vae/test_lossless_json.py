from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch

from ppl_vae.lossless_json import loads, to_plain


def test_values_come_back_exactly() -> None:
    generator = random.Random(0)
    floats = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, math.inf, -math.inf, math.nan]
    floats += [math.ldexp(generator.random(), generator.randrange(-1000, 1000)) for _ in range(200)]
    value = {
        "floats": floats,
        "int": 2**70,
        "": [None, True, {"b": "\ud800 é\n"}],
        "tuple": (1, 2),
        "keys": {2: 0.5},
    }
    text = json.dumps(to_plain(value, "value"), allow_nan=False)
    # By `repr`, which tells -0.0 from 0.0, 1 from 1.0 and True.
    assert repr(loads(text.encode())) == repr({**value, "tuple": [1, 2]})


@pytest.mark.parametrize(
    ("value", "kind", "match"),
    [
        ({"a": [0, {1, 2}]}, TypeError, r"state\['a'\]\[1\] is a set"),
        ({"a": torch.zeros(1)}, TypeError, r"state\['a'\] is a Tensor.*go with the tensors"),
        ({"$float": "nan"}, ValueError, r"\$float"),
        ({"a": {"$pairs": 1}}, ValueError, r"state\['a'\] has the key '\$pairs'"),
    ],
)
def test_what_would_not_come_back_is_refused(value: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        to_plain(value, "state")
