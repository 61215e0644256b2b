"""The files of a trained model: NAME.safetensors, its weights, and NAME.json, what is known of it.

The JSON is the commit mark: it has the weights' SHA-256, and is written after them.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ppl_vae.atomic import write_atomically
from ppl_vae.checkpoints import CorruptCheckpoint
from ppl_vae.names import nearest
from ppl_vae.pretrained.storing import unpack
from ppl_vae.reproduction.record import as_json

FORMAT = 1

FOLDER = Path(__file__).parent
"""Where the models that come with the package lie."""

Facts = dict[str, Any]
"""What is known of a trained model, in JSON types."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def names(folder: Path = FOLDER) -> tuple[str, ...]:
    """The names of the trained models, sorted."""
    return tuple(sorted(path.stem for path in folder.glob("*.json")))


def read_facts(name: str, folder: Path = FOLDER) -> Facts:
    """What is known of a trained model.

    Raises:
        ValueError: there is none of that name, and names the nearest; or its file is of another
            format.
        CorruptCheckpoint: its file is damaged.
    """
    if name not in (known := names(folder)):
        raise ValueError(f"there is no trained model {name!r}; {nearest(name, known)}")
    path = folder / f"{name}.json"
    try:
        facts = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CorruptCheckpoint(f"{path} is damaged, {error}: {_AGAIN}") from error
    found = facts.get("format") if isinstance(facts, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}; this version reads format {FORMAT}")
    return facts


def read_weights(facts: Facts, folder: Path = FOLDER) -> dict[str, Tensor]:
    """The weights of a trained model, in float32, by the names that a checkpoint has for them.

    Raises:
        CorruptCheckpoint: they are not those that were stored.
    """
    path = folder / f"{facts['name']}.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read, {error.strerror}: {_AGAIN}") from error
    found, expected = hashlib.sha256(data).hexdigest(), facts["stored"]["sha256"]
    if found != expected:
        raise CorruptCheckpoint(
            f"{path} is damaged: its SHA-256 is {found[:12]}…, and {facts['name']}.json says "
            f"{expected[:12]}…: {_AGAIN}"
        )
    try:
        return unpack(safetensors.torch.load(data))
    except (ValueError, safetensors.SafetensorError) as error:
        raise CorruptCheckpoint(f"{path} holds no weights: {error}") from error


def write(facts: Facts, data: bytes, folder: Path) -> None:
    """Write both files of a trained model, in place of those that were there.

    Args:
        facts: without the format and the weights' digest, which are added.
        data: the weights, as :func:`~ppl_vae.pretrained.storing.packed_bytes` makes them.

    Raises:
        ValueError: a name that cannot be one of files.
        OSError: they cannot be written.
    """
    if not _NAME.fullmatch(facts["name"]):
        raise ValueError(f"{facts['name']!r} is no name: use small letters, digits and '-'")
    stored = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        **facts["stored"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{facts['name']}.safetensors", data)
    whole = {"format": FORMAT, **facts, "stored": stored}
    write_atomically(folder / f"{facts['name']}.json", as_json(whole))


_AGAIN = "install the package again"
