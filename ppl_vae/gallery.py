"""The pictures of a run, drawn after it was fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ppl_vae import plots
from ppl_vae.fitting import Fitted
from ppl_vae.sites import read_sites


def save_gallery(fitted: Fitted, folder: Path) -> dict[str, str]:
    """Draw every picture that the model allows into ``folder``, each as a PNG file.

    Returns:
        name -> reason, for the pictures that this model cannot have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left_out: dict[str, str] = {}
    for name, draw in _pictures(fitted):
        try:
            figure = draw()
        except ValueError as error:
            left_out[name] = str(error)
        else:
            figure.savefig(folder / f"{name}.png")
    return left_out


def _pictures(fitted: Fitted) -> Iterator[tuple[str, Callable[[], Figure]]]:
    model, guide, shape = fitted.model, fitted.guide, fitted.data.image_shape
    if fitted.history:
        yield "curves", partial(plots.curves, fitted.history)
    yield "samples", partial(plots.samples, model, shape)
    split = "test" if "test" in fitted.data.splits else "train"
    rows = fitted.data.split(split)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:16]
    x = model.observed(rows.batch(chosen)).get("x")
    if x is None:
        return
    yield "reconstructions", partial(plots.reconstructions, model, guide, x, shape)
    yield "interpolation", partial(plots.interpolation, model, guide, x, shape)
    yield "traversal", partial(plots.traversal, model, guide, x, shape)
    latents = [s for s in read_sites(model, n=2).values() if s.name not in model.observables]
    if len(latents) == 1 and latents[0].event_shape == (2,):
        yield "manifold", partial(plots.manifold, model, shape)
