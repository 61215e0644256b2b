"""Which rows are unlike those that a pair was fitted to?"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.covariance import LedoitWolf
from torch import Tensor

from ppl_vae.data import Dataset, Rows, as_dataset
from ppl_vae.detection import Auroc, auroc, auroc_difference, histograms, roc
from ppl_vae.evaluation import inferred, score_rows
from ppl_vae.figures import empty
from ppl_vae.importance import parts
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import evaluating

Baseline = Literal["nearest", "gaussian", "mean"]

_SAID = {
    "evidence": "- log p(x), nats",
    "elbo": "- ELBO, nats",
    "reconstruction": "reconstruction error, nats",
    "kl": "KL(q(z | x) || p(z)), nats",
    "typicality": "|log p(x) - its training mean|, nats",
    "ratio": "- log p(x) / p_background(x), nats",
    "complexity": "- log p(x) - compressed size, nats",
    "gaussian": "Gaussian fitted to x: - log p + const, nats",
    "mean": "distance to the training mean",
    "nearest": "distance to the nearest training row",
}
_AT_ONCE = 500  # rows, of distances to all training rows


@dataclass(frozen=True, eq=False)
class AnomalyScores:
    """Scores of the rows of a split, ``(rows,)`` each in float64: a large one means an anomaly.

    Attributes:
        scores: those of the pair, by name; see :func:`anomaly_scores`.
        baselines: those that know no pair.
        compression: how x was compressed for "complexity": "png" or "zlib".
    """

    scores: Mapping[str, Tensor]
    baselines: Mapping[str, Tensor]
    compression: str

    @property
    def all(self) -> dict[str, np.ndarray]:
        """Both kinds, by name."""
        return {k: value.numpy() for k, value in {**self.scores, **self.baselines}.items()}


def anomaly_scores(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    samples: int = 100,
    seed: int = 0,
    reference: Any = None,
    reference_rows: int = 1000,
    background: tuple[GenerativeModel, torch.nn.Module] | None = None,
    baseline: Sequence[Baseline] = get_args(Baseline),
    site: str = "x",
    memory: int = 512,
) -> AnomalyScores:
    """Scores every row of a split by how unlike the training rows it is.

    In nats: "evidence", -log p(x) by importance sampling; "elbo"; its two parts "reconstruction",
    -E log p(x | z), and "kl"; "typicality", the distance of log p(x) from its mean over training
    rows, since a row can also be too probable (Nalisnick et al. 2019, arXiv:1906.02994, for sets of
    rows); "ratio", with a ``background``, -log p(x) + log p_background(x), so that what
    both models know of backgrounds cancels (Ren et al. 2019, arXiv:1906.02845);
    "complexity", -log p(x) less the size of x compressed, the likelihood ratio to a universal coder
    (Serrà et al. 2020, arXiv:1909.11480). Images of bytes are compressed as PNG, all else
    by zlib, as stored: of floats, that is mostly noise.

    Baselines, which use no model: "gaussian", half the squared Mahalanobis distance under a
    Gaussian fitted to training x, its covariance shrunk (Ledoit & Wolf 2004, J. Multivar. Anal. 88,
    365); "mean", the distance to the training mean; "nearest", to the nearest training row.
    Leaves torch's random state as it was.

    Args:
        data: rows to score; a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        samples: importance draws a row.
        reference: data whose training rows are normal; None: ``data`` itself. To score outliers
            against the inliers, give these.
        reference_rows: training rows, chosen at random, whose mean evidence "typicality" takes;
            they cost as much as rows to score do.
        background: a pair fitted to rows of which only the background is alike, such as training
            rows with some entries drawn at random (Ren et al.).
        baseline: which of them to compute.
        site: the observable that is compressed, and that baselines see.
        memory: MiB that intermediate tensors may take.

    Raises:
        ValueError: an unknown baseline, or no column of this site; and as :func:`ppl_vae.evaluate`.
        PairError: as :func:`ppl_vae.evaluate`.
    """
    if unknown := [name for name in baseline if name not in get_args(Baseline)]:
        raise ValueError(
            f"baseline {unknown[0]!r}: expected some of {', '.join(get_args(Baseline))}"
        )
    dataset = as_dataset(data)
    normal = dataset if reference is None else as_dataset(reference)
    rows = dataset.split(split)
    if site not in rows.columns:
        raise ValueError(f"the data have no column {site!r}, only {', '.join(rows.columns)}")
    hidden = inferred(model, normal, None)
    options: dict[str, Any] = {"samples": samples, "seed": seed, "memory": memory}
    options |= {"compile": "auto", "withheld": hidden}
    scored = score_rows(model, guide, dataset, split=split, **options).columns
    some = _some_training_rows(normal, reference_rows, seed)
    typical = score_rows(model, guide, some, split="train", **options).columns
    evidence, elbo = scored["log evidence", ""], scored["elbo", ""]
    reconstruction = scored["reconstruction", ""]
    size, compression = compressed(rows, site, dataset.image_shape)
    scores = {
        "evidence": -evidence,
        "elbo": -elbo,
        "reconstruction": -reconstruction,
        "kl": reconstruction - elbo,
        "typicality": (evidence - typical["log evidence", ""].mean()).abs(),
        "complexity": -evidence - size,
    }
    if background is not None:
        other = score_rows(*background, dataset, split=split, **options).columns
        scores["ratio"] = other["log evidence", ""] - evidence
    with evaluating(seed, model):  # bits may be drawn
        x, train = (
            own.batch(slice(None), dtype=torch.float64)[site].flatten(1).cpu()
            for own in (rows, normal.split("train"))
        )
    return AnomalyScores(
        scores=scores,
        baselines={name: _BASELINES[name](x, train) for name in baseline},
        compression=compression,
    )


def compressed(
    rows: Rows, site: str, image_shape: tuple[int, int, int] | None
) -> tuple[Tensor, str]:
    """The size of each row compressed, in nats, float64 ``(rows,)``; and how it was compressed."""
    stored = rows.stored[site].cpu().numpy()
    if site == "x" and stored.dtype == np.uint8 and image_shape and image_shape[0] in (1, 3):
        sizes, how = [_png(row.reshape(image_shape)) for row in stored], "png"
    else:
        sizes, how = [len(zlib.compress(row.tobytes(), 9)) for row in stored], "zlib"
    return 8 * math.log(2) * torch.tensor(sizes, dtype=torch.float64), how


def _png(image: np.ndarray) -> int:
    """Bytes of an image ``(channels, height, width)`` as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(
        file, "PNG", optimize=True
    )
    return file.tell()


@dataclass(frozen=True, eq=False)
class Detection:
    """How well each score tells outliers from inliers.

    Attributes:
        auroc: area under the ROC curve by the score's name, with its standard error.
        gain: of the pair's scores, how much larger it is than that of ``baseline``, with the
            standard error of the difference on the same rows.
        baseline: the name of the baseline that scores are held against.
        inliers, outliers: the scores.
    """

    auroc: Mapping[str, Auroc]
    gain: Mapping[str, Auroc]
    baseline: str
    inliers: AnomalyScores
    outliers: AnomalyScores

    def __str__(self) -> str:
        lines = [f"{'score':16}{'AUROC':>16}{'above ' + self.baseline:>20}"]
        for name, area in self.auroc.items():
            line = f"{name:16}{area.value:9.3f} ± {area.se:.3f}"
            if name in self.gain:
                line += f"{self.gain[name].value:+12.3f} ± {self.gain[name].se:.3f}"
            lines.append(line)
        return "\n".join(lines)

    def plot(self) -> Figure:
        """ROC curves; dashed ones are of baselines, which use no model."""
        inside, outside = self.inliers.all, self.outliers.all
        figure = empty(6.6, 4.6)
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        for number, (name, area) in enumerate(self.auroc.items()):
            plain = name in self.inliers.baselines
            ax.plot(
                *roc(inside[name], outside[name]),
                color=f"C{number % 10}",
                linestyle="--" if plain else "-",
                label=f"{name}: {area.value:.3f} ± {area.se:.3f}",
            )
        ax.set(xlabel="inliers flagged", ylabel="outliers flagged", xlim=(0, 1), ylim=(0, 1.01))
        ax.spines[["top", "right"]].set_visible(False)
        figure.legend(
            loc="outside right center", frameon=False, fontsize=8, title="AUROC (--: no model)"
        )
        return figure

    def histograms(self) -> Figure:
        """The distribution of each score over inliers and outliers."""
        return histograms(
            self.inliers.all,
            self.outliers.all,
            titles={n: f"AUROC {a.value:.3f} ± {a.se:.3f}" for n, a in self.auroc.items()},
            labels=_SAID,
            kinds=("inliers", "outliers"),
        )


def detection(
    inliers: AnomalyScores, outliers: AnomalyScores, *, baseline: Baseline | None = None
) -> Detection:
    """Compares the scores of rows that are normal with those of rows that are not.

    Args:
        inliers, outliers: scored by the same pair, against the same ``reference``.
        baseline: what the pair's scores are held against; the first one that was computed if
            None. Choose it before seeing the outliers: the best of three in hindsight is better
            than it will be again.

    Raises:
        ValueError: the two do not have the same scores, no such baseline was computed, fewer than
            2 rows of a kind, or a score that is nan.
    """
    inside, outside = inliers.all, outliers.all
    if inside.keys() != outside.keys():
        raise ValueError(
            f"inliers have scores {', '.join(inside)}, outliers {', '.join(outside)}: score both "
            "in the same way"
        )
    held = baseline or next(iter(inliers.baselines), "")
    if held not in inliers.baselines:
        raise ValueError(
            f"baseline {held!r} was not computed, only {', '.join(inliers.baselines) or 'none'}"
        )
    other = inside[held], outside[held]
    return Detection(
        auroc={name: auroc(inside[name], outside[name]) for name in inside},
        gain={
            name: auroc_difference((inside[name], outside[name]), other) for name in inliers.scores
        },
        baseline=held,
        inliers=inliers,
        outliers=outliers,
    )


def _some_training_rows(dataset: Dataset, rows: int, seed: int) -> Dataset:
    train = dataset.split("train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:rows]
    return replace(dataset, splits={"train": train.gather(order)})


def _gaussian(x: Tensor, train: Tensor) -> Tensor:
    fitted = LedoitWolf().fit(train.numpy())
    return torch.from_numpy(fitted.mahalanobis(x.numpy())) / 2


def _mean(x: Tensor, train: Tensor) -> Tensor:
    return (x - train.mean(0)).norm(dim=1)


def _nearest(x: Tensor, train: Tensor) -> Tensor:
    blocks = (torch.cdist(x[part], train).min(1).values for part in parts(len(x), _AT_ONCE))
    return torch.cat(list(blocks))


_BASELINES = {"nearest": _nearest, "gaussian": _gaussian, "mean": _mean}
