"""Some rows of a split: which, what a pair is given of them, and their figures."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ppl_vae.checks.result import NotApplicable
from ppl_vae.data import Dataset
from ppl_vae.draws import observed
from ppl_vae.evaluation import NotMeasurable, Scored, inferred, score_rows
from ppl_vae.model import GenerativeModel

_MEMORY = 512  # MiB


def score_chosen(
    model: GenerativeModel,
    guide: torch.nn.Module,
    dataset: Dataset,
    chosen: Tensor,
    *,
    split: str,
    samples: int,
    seed: int,
) -> Scored:
    """Figures of the rows with these numbers, in this order, from ``samples`` draws a row.

    Labels that are withheld from some training rows are inferred, whichever rows are chosen.

    Args:
        chosen: ``(rows,)``, numbers of rows of the split.

    Raises:
        NotApplicable: a site stands in a plate besides that of the rows.
        ValueError, PairError: as :func:`ppl_vae.evaluate`.
    """
    stored = {name: column[chosen] for name, column in dataset.splits[split].items()}
    try:
        return score_rows(
            model,
            guide,
            replace(dataset, splits={**dataset.splits, split: stored}),
            samples=samples,
            split=split,
            seed=seed,
            memory=_MEMORY,
            compile="auto",
            withheld=inferred(model, dataset, None),
        )
    except NotMeasurable as error:
        raise NotApplicable(str(error)) from None


def given(
    model: GenerativeModel, dataset: Dataset, chosen: Tensor, *, split: str
) -> dict[str, Tensor]:
    """What the pair is given of these rows, on its device; labels that it infers are left out.

    Raises:
        ValueError: no column that the model observes, or a covariate is missing.
    """
    columns = observed(model, dataset.split(split), chosen, inferred(model, dataset, None))
    if not columns.keys() & set(model.observables):
        raise ValueError(
            f"{type(model).__name__} observes {', '.join(model.observables)}, but the data have "
            f"columns {', '.join(dataset.columns)}"
        )
    model.covariates_in(columns)  # all are there
    return columns


def numbers_of_rows(total: int, rows: int, seed: int) -> Tensor:
    """``rows`` of ``total`` numbers at random, in random order; all of them if there are fewer."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:rows]
