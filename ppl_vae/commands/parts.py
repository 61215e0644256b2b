"""Commands that tell what the zoo holds."""

from __future__ import annotations

import itertools
import json as json_
from dataclasses import asdict
from pathlib import Path


def list_command(json: bool = False, quick: bool = False) -> None:
    """List the parts of the zoo, which of them do not go together and why, recipes, checks, data.

    Args:
        json: print JSON.
        quick: leave out which parts do not go together: every two are tried, in some seconds.
    """
    from ppl_vae import grid, zoo
    from ppl_vae.checks import CHECKS
    from ppl_vae.data import known_names
    from ppl_vae.recipes import recipes

    table = grid.axes()
    for kind, members in {"recipes": recipes(), "checks": CHECKS}.items():
        table[kind] = {name: zoo.first_line(member) for name, member in members.items()}
    if json:
        refused = [asdict(refusal) for refusal in grid.refusals()] if not quick else None
        print(json_.dumps({**table, "data": list(known_names()), "refused": refused}, indent=2))
        return
    for kind, lines in table.items():
        print(f"{kind}:")
        for name, line in lines.items():
            print(f"  {name:<26} {line}")
    print(f"data:\n  {', '.join(known_names())}")
    if not quick:
        print("a model, a guide, a prior, a likelihood and an objective go together, but not:")
        for (one, why), same in itertools.groupby(grid.refusals(), lambda r: (r.one, r.why)):
            print(f"  {one} with {', '.join(r.other for r in same)}: {why}", flush=True)


def show_command(model: str, graph: Path | None = None) -> None:
    """Show a model: its story, with sites, plates, shapes and supports.

    Args:
        model: name, as ``ppl-vae list`` gives it.
        graph: write the graph to this picture file (.png, .svg or .pdf).
    """
    from ppl_vae import zoo
    from ppl_vae.show import graph as draw
    from ppl_vae.show import story

    instance = zoo.find("model", model, zoo.models()).toy()
    print(story(instance))
    if graph is not None:
        draw(instance).savefig(graph, bbox_inches="tight", dpi=150)
