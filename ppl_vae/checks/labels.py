"""Labels that are latent: are their probabilities right, and what of classes never seen?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from xarray import Dataset

from ppl_vae.calibration import LabelPosterior, calibrated_accuracy, reliability
from ppl_vae.checks import label_figures
from ppl_vae.checks.result import CheckResult, NotApplicable, Picture, Progress, silent
from ppl_vae.checks.statistics import check_level, check_replicates, holm
from ppl_vae.data import as_dataset
from ppl_vae.detection import auroc
from ppl_vae.evaluation import NotMeasurable, inferred, score_rows
from ppl_vae.model import GenerativeModel


def label_posterior(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    samples: int = 100,
    seed: int = 0,
    withheld: Sequence[str] | None = None,
    memory: int = 512,
) -> LabelPosterior:
    """Probabilities of every class for each row of a split, its label being withheld.

    Of the guide, q(y | x); and of the model, p(y | x) by importance sampling of the other latents
    h, every class being tried: ``p(x, y) ~ 1/S sum_s p(x, y, h_s) / q(h_s | x, y)``, divided by its
    sum over classes. Leaves torch's random state as it was.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes; it need not have labels.
        samples: importance draws a row and value.
        seed: of the draws.
        withheld: observables that are inferred; None: the label ``y``.
        memory: MiB that intermediate tensors may take.

    Raises:
        ValueError: no withheld site has finitely many values; and as :func:`ppl_vae.evaluate`.
        PairError: as :func:`ppl_vae.evaluate`.
    """
    hidden = ("y",) if withheld is None else tuple(withheld)
    found = score_rows(
        model,
        guide,
        as_dataset(data),
        samples=samples,
        split=split,
        seed=seed,
        memory=memory,
        compile="auto",
        withheld=hidden,
    ).label_posterior()
    if found is None:
        raise ValueError(
            f"label_posterior: {type(model).__name__} infers no site of {', '.join(hidden)} that "
            "has finitely many values: withhold a label, such as withheld=['y']"
        )
    return found


def label_calibration(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
    samples: int = 100,
    replicates: int = 999,
    bins: int = 15,
) -> CheckResult:
    """Tests whether the probabilities of labels are right, for classifier and importance sampling.

    Labels are withheld from the pair, which predicts them (:func:`label_posterior`). The statistic
    is the expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3), the distance of
    accuracy from confidence. Bins have few rows, so that it is above 0 for right probabilities too:
    it is compared with that of labels drawn from the probabilities (consistency resampling, Bröcker
    & Smith 2007, "Increasing the reliability of reliability diagrams"; Vaicenavicius et al. 2019,
    arXiv:1902.06977, section 5): ``p = (1 + count of as large ones) / (1 + replicates)``, valid
    whatever their number (Phipson & Smyth 2010). Holm's correction is over both kinds of
    probabilities, so that a pair whose probabilities are both right fails with probability
    ``level`` at most, the rows being independent. Leaves torch's random state as it was.

    Each record has the source of the probabilities, accuracy and its standard error, mean
    confidence, log loss, Brier score, calibration error, its mean and standard deviation over
    replicates, p, p adjusted by Holm, and the verdict.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes, with labels ``y`` that are
            withheld from some training rows.
        seed: of the draws.
        level: family-wise error rate of the verdict.
        progress: told the fraction that is done.
        samples: importance draws a row; of too few, p(y | x) is noise, and surer than it should be.
        replicates: number of replicated sets of labels.
        bins: of confidence, of equal width.

    Raises:
        NotApplicable: no label is withheld from a training row, or the model infers none; labels
            are withheld from rows of the split; a site stands in a plate besides that of the rows.
        ValueError: no labels to compare with; too few replicates for any p-value to be below
            ``level`` after correction; a level outside (0, 1); and as :func:`label_posterior`.
        PairError: guide or data do not fit the model.
    """
    check_level(level)
    check_replicates("replicates", replicates, level, tests=2)
    dataset = as_dataset(data)
    if not inferred(model, dataset, None):
        raise NotApplicable("no label that the model infers is withheld from a training row")
    if dataset.split(split).labeled is not None:
        raise NotApplicable(f"labels are withheld from rows of {split!r}: none to compare with")
    try:
        posterior = label_posterior(model, guide, dataset, split=split, samples=samples, seed=seed)
    except NotMeasurable as error:
        raise NotApplicable(str(error)) from None
    progress(0.9)
    labels = posterior.known()
    records, drawn = calibration_test(
        posterior, level=level, replicates=replicates, bins=bins, seed=seed
    )
    failed = [record for record in records if record["verdict"] == "fail"]
    return CheckResult(
        name="label_calibration",
        verdict="fail" if failed else "pass",
        error_rate=level,
        p=min(record["p_adjusted"] for record in records),
        statistics=tuple(records),
        meaning=_meaning(failed, records, len(labels), split),
        settings={
            "split": split,
            "seed": seed,
            "rows": len(labels),
            "samples": samples,
            "replicates": replicates,
            "bins": bins,
            "correction": "Holm",
        },
        groups=_groups(posterior, drawn),
        pictures={
            "label_calibration": Picture(
                partial(label_figures.reliability_diagram, posterior),
                "Accuracy of the labels by the confidence they are given: points above the grey "
                "bars are under-confident, points below over-confident; with over-confidence, try "
                "more labels or less weight on classification.",
            ),
            "confusion": Picture(
                partial(label_figures.confusion, posterior),
                "Which class is taken for which; two classes that are confused both ways want more "
                "labels of their own.",
            ),
            "pava": Picture(
                partial(label_figures.pava, posterior),
                "Observed frequency of each class by its probability; a line that leaves the band "
                "shows where probabilities are too high or too low.",
            ),
        },
    )


def calibration_test(
    posterior: LabelPosterior, *, level: float, replicates: int, bins: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The records of :func:`label_calibration`, and the calibration errors of the replicates
    ``(replicates,)`` by the source of the probabilities."""
    labels, scores = posterior.known(), posterior.scores()
    records, drawn = list[dict[str, Any]](), dict[str, np.ndarray]()
    for name, p in posterior.probabilities.items():
        found = reliability(p, labels, bins)
        share = found.rows / found.rows.sum()
        accuracy = calibrated_accuracy(p, bins, replicates=replicates, seed=seed)
        drawn[name] = np.abs(accuracy - found.confidence) @ share
        error = float(np.abs(found.accuracy - found.confidence) @ share)
        # Rounding must not part what is equal.
        as_large = int((drawn[name] >= error - 1e-12).sum())
        records.append(
            {
                "source": name,
                "accuracy": scores[name].accuracy,
                "accuracy_se": scores[name].accuracy_se,
                "confidence": float(found.confidence @ share),
                "log_loss": scores[name].log_loss,
                "brier": scores[name].brier,
                "calibration_error": error,
                "replicated_mean": float(drawn[name].mean()),
                "replicated_sd": float(drawn[name].std(ddof=1)),
                "p": (1 + as_large) / (1 + replicates),
            }
        )
    for record, adjusted in zip(records, holm([r["p"] for r in records]), strict=True):
        record |= {"p_adjusted": adjusted, "verdict": "fail" if adjusted <= level else "pass"}
    return records, drawn


@dataclass(frozen=True, eq=False)
class UnknownClasses:
    """How a pair answers to rows of classes that it knows, and of classes that it does not.

    Attributes:
        known, unknown: the posteriors of both kinds of rows.
        auroc: how well a score tells that a row's class is unknown, the area under the ROC curve,
            from 0 to 1, 1/2 by chance: "classifier" and "importance" by a small largest
            probability, "evidence" by a small log p(x).
    """

    known: LabelPosterior
    unknown: LabelPosterior
    auroc: Mapping[str, float]

    def plot(self) -> Figure:
        """The distributions of each score."""
        return label_figures.unknown(_scores(self.known), _scores(self.unknown), self.auroc)


def unknown_classes(
    model: GenerativeModel,
    guide: torch.nn.Module,
    known: Any,
    unknown: Any,
    *,
    split: str = "test",
    samples: int = 100,
    seed: int = 0,
) -> UnknownClasses:
    """Compares answers to rows of known classes with those to rows of classes never seen.

    A classifier must choose among the classes that it knows, and may be sure of its choice (Nguyen
    et al. 2015, arXiv:1412.1897); the largest probability (Hendrycks & Gimpel 2017,
    arXiv:1610.02136) and log p(x) are two ways to notice. A model may give the unknown more density
    than what it was fitted to (Nalisnick et al. 2019, arXiv:1810.09136): its AUROC is then
    below 1/2. Leaves torch's random state as it was.

    Args:
        known, unknown: each a Dataset, or what :func:`ppl_vae.data.as_dataset` takes. Labels are
            withheld, and may be there or not.
        split: rows of both.
        samples: importance draws a row.
        seed: of the draws.

    Raises:
        ValueError, PairError: as :func:`label_posterior`.
    """
    one, other = (
        label_posterior(model, guide, rows, split=split, samples=samples, seed=seed)
        for rows in (known, as_dataset(unknown).without_labels())
    )
    inside, outside = _scores(one), _scores(other)
    areas = {name: auroc(-inside[name], -outside[name]).value for name in inside}
    return UnknownClasses(one, other, areas)


def _scores(posterior: LabelPosterior) -> dict[str, np.ndarray]:
    """What is small where a class is unknown, by its name in ``auroc``."""
    scores: dict[str, Tensor] = {n: p.max(1).values for n, p in posterior.probabilities.items()}
    scores["evidence"] = posterior.log_evidence
    return {name: value.numpy() for name, value in scores.items()}


def _meaning(
    failed: list[dict[str, Any]], records: list[dict[str, Any]], rows: int, split: str
) -> str:
    said = "; ".join(
        f"{r['source']}: calibration error {r['calibration_error']:.3f}, "
        f"{r['replicated_mean']:.3f} by chance, accuracy {r['accuracy']:.3f} with a mean "
        f"confidence of {r['confidence']:.3f}"
        for r in failed or records
    )
    if not failed:
        return (
            f"Labels of {rows} held-out rows ({split}) could have been drawn from the "
            f"probabilities that they are given ({said}); other faults may remain."
        )
    sure = {
        "over-confident" if r["confidence"] > r["accuracy"] else "under-confident": 0
        for r in failed
    }
    return (
        f"Probabilities of labels are not right on {rows} held-out rows ({split}), mostly "
        f"{' and '.join(sure)} ({said}). Where a classifier is at fault and importance sampling is "
        "not, the guide is: give classification less weight, or fit longer. Where both are, so is "
        "the model: try more labels, or another likelihood."
    )


def _groups(posterior: LabelPosterior, drawn: Mapping[str, np.ndarray]) -> dict[str, Dataset]:
    replicates = len(next(iter(drawn.values())))
    rows = {name: (("row", "class"), p.numpy()) for name, p in posterior.probabilities.items()}
    return {
        "label_posterior": Dataset(
            {
                **rows,
                "log_evidence": ("row", posterior.log_evidence.numpy()),
                "label": ("row", posterior.known().numpy()),
            }
        ),
        "label_calibration": Dataset(
            {name: (("chain", "draw"), values[None]) for name, values in drawn.items()},
            coords={"chain": [0], "draw": np.arange(replicates)},
        ),
    }
