"""Store a finished run as a model that comes with the package.

python -m ppl_vae.pretrained keep RUN RECORD NAME
"""

from __future__ import annotations

import argparse
import sys

from ppl_vae.pretrained.cards import card
from ppl_vae.pretrained.keeping import keep


def main() -> int:
    """Returns the exit code: 0; 1 with a sentence that says why nothing was stored."""
    said = "Store a finished run, with what its record says, as a model of the package."
    parser = argparse.ArgumentParser(prog="python -m ppl_vae.pretrained", description=said)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("keep", help=said, description=said)
    command.add_argument("run", help="folder of the finished run")
    command.add_argument("record", help="JSON file of its reproduction")
    command.add_argument("name", help="of the model")
    given = parser.parse_args()
    try:
        keep(given.run, given.record, given.name)
    except (ValueError, OSError) as error:
        print(f"keep: {error}", file=sys.stderr)
        return 1
    print(card(given.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
