"""Can the model have emitted the data at all?"""

from __future__ import annotations

from typing import Any

import torch

from ppl_vae.batches import known_columns
from ppl_vae.checks.result import CheckResult, Progress, silent
from ppl_vae.data import as_dataset
from ppl_vae.draws import example
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import PairError, check_data, check_labels, evaluating


def support(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
) -> CheckResult:
    """Looks for data that the model gives no probability: wrong shapes, values off its support.

    Such are grey pixels under a Bernoulli: their log-"likelihood" is finite, and none. Every row
    of every split is looked at, and every label that is given. Chance plays no part, so that
    ``error_rate`` is 0.

    Each record has the split, its rows, and the error, empty where there is none.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        split, seed, level: not used; here since all checks have them.

    Raises:
        ValueError: a covariate is missing.
    """
    dataset = as_dataset(data)
    like = example(model)
    records: list[dict[str, Any]] = []
    with evaluating(seed, model, guide):
        for number, name in enumerate(dataset.splits):
            rows, error = dataset.split(name), ""
            batches = known_columns(rows, like.device, like.dtype)
            try:
                check_data(model, map(model.observed, batches))
                check_labels(model, dataset, name)
            except PairError as found:
                error = str(found)
            records.append({"split": name, "rows": len(rows), "error": error})
            progress((1 + number) / len(dataset.splits))
    wrong = [f"{record['split']}: {record['error']}" for record in records if record["error"]]
    return CheckResult(
        name="support",
        verdict="fail" if wrong else "pass",
        error_rate=0.0,
        p=None,
        statistics=tuple(records),
        meaning=" ".join(wrong) or "The model can emit every row of the data.",
        settings={"rows": sum(record["rows"] for record in records)},
        groups={},
        pictures={},
    )
