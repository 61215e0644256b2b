"""The commands of ``ppl-vae``, each a function whose signature and docstring make its options.

Nothing here imports torch before a command needs it. They are not named like the functions of
``ppl_vae``: jsonargparse would look those up by name, and load them.
"""

from __future__ import annotations

from collections.abc import Callable

from ppl_vae.commands.fits import fit_command
from ppl_vae.commands.parts import list_command, show_command
from ppl_vae.commands.runs import check_command, evaluate_command, sample_command
from ppl_vae.commands.studies import experiment_command, load_command, reproduce_command

COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_command,
    "show": show_command,
    "fit": fit_command,
    "evaluate": evaluate_command,
    "check": check_command,
    "sample": sample_command,
    "experiment": experiment_command,
    "reproduce": reproduce_command,
    "load": load_command,
}
