"""The pictures of a run, drawn after it was fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ppl_vae import plots
from ppl_vae.draws import some_covariates, unobserved_sites
from ppl_vae.fitting import Fitted


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
    given = some_covariates(model, fitted.data, 64, seed=0)
    yield "samples", partial(plots.samples, model, shape, covariates=given)
    split = "test" if "test" in fitted.data.splits else "train"
    rows = fitted.data.split(split)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:16]
    columns = model.observed(rows.batch(chosen))
    if (x := columns.get("x")) is None:
        return
    given = model.covariates_in(columns)
    for draw in (plots.reconstructions, plots.interpolation, plots.traversal):
        yield draw.__name__, partial(draw, model, guide, x, shape, covariates=given)
    sites = unobserved_sites(model, columns).values()
    latents = [s for s in sites if s.name not in model.observables]
    if len(latents) == 1 and latents[0].event_shape == (2,):
        yield "manifold", partial(plots.manifold, model, shape, covariates=given)
