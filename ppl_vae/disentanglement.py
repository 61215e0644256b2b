"""How well the coordinates of a code part the factors of data whose factors are known.

Every metric takes codes ``(rows, Z)`` and factors ``(rows, F)``, arrays or tensors: what stands in
a column of factors are classes, such as the positions of a sprite, whose numbers are names only.
All are near 1 for a code with one coordinate a factor, whatever their order and scale; what is
near 0, and what a code without information gets, each says. Figures from few rows are biased:
on independent codes, mutual information and accuracy are above chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor

from ppl_vae.codes import posterior_codes
from ppl_vae.data import as_dataset
from ppl_vae.data.arrays import Array
from ppl_vae.draws import held_out
from ppl_vae.model import GenerativeModel
from ppl_vae.sites import check_pair, evaluating

METRICS = ("mig", "sap", "dci", "beta_vae", "factor_vae")
"""Names of the metrics there are."""


def disentanglement_of(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    rows: int = 10_000,
    metrics: Iterable[str] = METRICS,
    seed: int = 0,
) -> dict[str, float]:
    """:func:`disentanglement` of a fitted pair on data with a column ``factors`` ``(rows, F)``.

    Codes are those of :func:`ppl_vae.codes.posterior_codes`. Factors that have one value in all
    rows are left out. Leaves torch's random state as it was.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes; "sprites" and "dsprites"
            have factors.
        split: figures of "train" are usual too, where that is all there is of a grid of factors.
        rows: how many rows are chosen at random; all of them where the split has fewer.
        metrics: some of :data:`METRICS`.
        seed: of rows, and of what metrics draw.

    Raises:
        ValueError: no column of factors; no local latent; a site in a plate besides that of the
            rows; whatever the metrics refuse.
        PairError: guide and model do not fit each other.
    """
    dataset = as_dataset(data)
    held = dataset.split(split)
    if "factors" not in held.columns:
        raise ValueError(
            f"{dataset.name} has columns {', '.join(held.columns)}, but none of 'factors', the "
            'known classes (rows, F) of each row: load_data("sprites") has one, and from_arrays '
            'takes one, {"x": x, "factors": factors}'
        )
    with evaluating(seed, model, guide):
        chosen, columns = held_out(model, dataset, split=split, rows=rows, seed=seed)
        check_pair(model, guide, **{name: column[:4] for name, column in columns.items()})
        codes = posterior_codes(model, guide, columns)
    factors = _numpy(held.stored["factors"])[chosen.numpy()]
    varied = (factors != factors[:1]).any(0)
    return disentanglement(codes, factors[:, varied], metrics=metrics, seed=seed)


def disentanglement(
    codes: Array, factors: Array, *, metrics: Iterable[str] = METRICS, seed: int = 0
) -> dict[str, float]:
    """Several metrics by name; of :func:`dci` its three figures, ``dci_disentanglement`` and so on.

    Args:
        codes: ``(rows, Z)``.
        factors: classes, ``(rows, F)``.
        metrics: some of :data:`METRICS`.
        seed: of what they draw.

    Raises:
        ValueError: an unknown metric; rows that differ in number, or too few; codes that are not
            finite; fewer than two factors, one with a single value, or one with hardly any value
            twice.
    """
    figures: dict[str, float] = {}
    for name in metrics:
        if name not in _FIGURES:
            raise ValueError(f"there is no metric {name!r}, only {', '.join(METRICS)}")
        figures |= _FIGURES[name](codes, factors, seed)
    return figures


def mig(codes: Array, factors: Array, *, bins: int = 20) -> float:
    """Mutual information gap: of the two coordinates that know most of a factor, the difference.

    ``1/F sum_k (I(z_j; v_k) - max_{i != j} I(z_i; v_k)) / H(v_k)``, j the coordinate that knows
    most of factor k (Chen et al. 2018, arXiv:1802.04942, eq. 6). Information is that between
    classes and codes in ``bins`` intervals of equal width between a coordinate's least and largest
    value, as in Locatello et al. 2019 (arXiv:1811.12359). 0 where none or two know the same.

    Raises: as :func:`disentanglement`.
    """
    z, v = _table(codes, factors)
    binned = np.stack([_binned(column, bins) for column in z.T])
    information = [[mutual_info_score(factor, code) for code in binned] for factor in v.T]
    entropy = np.array([scipy.stats.entropy(np.bincount(factor)) for factor in v.T])
    return float((_gap(np.array(information)) / entropy).mean())


def sap(codes: Array, factors: Array) -> float:
    """Separated attribute predictability: the gap in predicting a factor from one coordinate.

    The mean over factors of the difference between the two best coordinates' accuracies, each
    class weighing the same, by as many intervals of the coordinate as there are classes, found on
    these rows (Kumar et al. 2018, arXiv:1711.00848, section 3). Unlike there, accuracy is scaled so
    that guessing scores 0: otherwise the best code would get ``1 - 1/classes``.

    Raises: as :func:`disentanglement`.
    """
    z, v = _table(codes, factors)
    scores = np.empty((v.shape[1], z.shape[1]))
    for k, factor in enumerate(v.T):
        for j, code in enumerate(z.T):
            # A tree on one number is a set of thresholds.
            tree = DecisionTreeClassifier(
                max_leaf_nodes=int(factor.max()) + 1, class_weight="balanced", random_state=0
            )
            predicted = tree.fit(code[:, None], factor).predict(code[:, None])
            scores[k, j] = _accuracy(factor, predicted)
    return float(_gap(scores).mean())


class DCI(NamedTuple):
    """What :func:`dci` finds, each 1 at best."""

    disentanglement: float
    completeness: float
    informativeness: float


def dci(codes: Array, factors: Array, *, seed: int = 0, trees: int = 20) -> DCI:
    """Disentanglement, completeness, informativeness (Eastwood & Williams 2018, ICLR).

    A random forest predicts each factor from all coordinates; R_jk is the importance of coordinate
    j for factor k, the impurity that splits on it take away. Leaves have at least 10 rows: smaller
    ones fit noise, for which every coordinate is as good.

    - disentanglement: ``sum_j rho_j (1 - H_F(R_j. / sum_k R_jk))``, rho_j the share of coordinate j
      in all importance, H_F the entropy to the base F: 1 if each matters for one factor only;
    - completeness: ``1 - H_Z(R_.k / sum_j R_jk)``, mean over factors: 1 if each factor depends on
      one coordinate only;
    - informativeness: the forests' accuracy on a quarter of the rows, held out, each class weighing
      the same, scaled so that guessing scores 0; mean over factors. The paper has an error here.

    Args:
        seed: of the rows held out and of the forests.
        trees: number of trees a forest.

    Raises: as :func:`disentanglement`.
    """
    z, v = _table(codes, factors)
    order = np.random.default_rng(seed).permutation(len(z))
    held, kept = np.split(order, [len(z) // 4])
    importance, accuracy = np.empty((z.shape[1], v.shape[1])), np.empty(v.shape[1])
    for k, factor in enumerate(v.T):
        # Every split may choose among all coordinates: the best one is not left out by chance.
        forest = RandomForestClassifier(
            trees,
            max_features=None,  # pyright: ignore[reportArgumentType]
            min_samples_leaf=10,
            random_state=seed,
        )
        forest.fit(z[kept], factor[kept])
        importance[:, k] = forest.feature_importances_
        accuracy[k] = _accuracy(factor[held], forest.predict(z[held]))
    weights = importance.sum(1)
    weights = weights / max(weights.sum(), np.finfo(float).tiny)
    return DCI(
        float((weights * _concentration(importance)).sum()),
        float(_concentration(importance.T).mean()),
        float(accuracy.mean()),
    )


def beta_vae(
    codes: Array, factors: Array, *, seed: int = 0, votes: int = 5000, pairs: int = 64
) -> float:
    """The beta-VAE score: which factor do the rows of each pair have in common?

    One vote is the mean of ``|z - z'|`` over pairs of rows that share their value of one factor; a
    linear classifier, fitted to half of the votes, tells that factor from it, and the score is
    its accuracy on the other half (Higgins et al. 2017, ICLR). Chance is ``1 / F``, also for a code
    without information. A code that is rotated can have a score of 1.

    Args:
        seed: of rows and pairs; values come as often as they do in the rows.
        votes: of all factors together, as many of each.
        pairs: a vote.

    Raises: as :func:`disentanglement`.
    """
    z, v = _table(codes, factors)
    random, each = np.random.default_rng(seed), max(2, votes // v.shape[1])
    differences = []
    for factor in v.T:
        left, right = z[_alike(factor, random, each * pairs, 2)].swapaxes(0, 1)
        differences.append(abs(left - right).reshape(each, pairs, -1).mean(1))
    x, y = np.concatenate(differences), np.repeat(np.arange(v.shape[1]), each)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(classifier.fit(x[::2], y[::2]).score(x[1::2], y[1::2]))


def factor_vae(
    codes: Array, factors: Array, *, seed: int = 0, votes: int = 5000, rows: int = 64
) -> float:
    """The FactorVAE score: which coordinate varies least among rows that share a factor's value?

    One vote is the coordinate of least variance, in units of its variance over all rows, among
    rows that share their value of one factor; a coordinate stands for the factor that it is voted
    for most often in one half of the votes, and the score is the accuracy of that on the other half
    (Kim & Mnih 2018, arXiv:1802.05983, section 4). Chance is ``1 / F``. Coordinates that are
    constant are never voted for.

    Args:
        seed: of the rows; values come as often as they do in the rows.
        votes: of all factors together, as many of each.
        rows: a vote.

    Raises: as :func:`disentanglement`.
    """
    z, v = _table(codes, factors)
    random, each = np.random.default_rng(seed), max(2, votes // v.shape[1])
    total = z.var(0)
    voted = np.empty((v.shape[1], each), np.int64)
    for k, factor in enumerate(v.T):
        within = z[_alike(factor, random, each, rows)].var(1)  # (votes, Z)
        share = np.divide(within, total, out=np.full_like(within, np.inf), where=total > 0)
        voted[k] = share.argmin(1)
    counts = np.stack([np.bincount(half, minlength=z.shape[1]) for half in voted[:, ::2]])
    factor_of = counts.argmax(0)
    return float((factor_of[voted[:, 1::2]] == np.arange(v.shape[1])[:, None]).mean())


def _table(codes: Array, factors: Array) -> tuple[np.ndarray, np.ndarray]:
    """Codes in float64, and factors as class numbers 0, 1, ..., checked."""
    z, v = _numpy(codes).astype(np.float64), _numpy(factors)
    if z.ndim != 2 or v.ndim != 2 or len(z) != len(v) or not z.shape[1]:
        raise ValueError(
            f"codes of shape {z.shape} and factors of shape {v.shape}: expected (rows, Z) and "
            "(rows, F), of the same rows"
        )
    if not np.isfinite(z).all():
        row, column = np.argwhere(~np.isfinite(z))[0]
        raise ValueError(
            f"codes hold {z[row, column]} in row {row}, column {column}: expected finite numbers"
        )
    if v.shape[1] < 2:
        raise ValueError(
            f"factors of shape {v.shape}: expected at least 2 that vary, to tell apart"
        )
    classes = np.empty(v.shape, np.int64)
    for k, factor in enumerate(v.T):
        values, classes[:, k] = np.unique(factor, return_inverse=True)
        if len(values) < 2:
            raise ValueError(
                f"column {k} of factors is {values[0] if len(values) else 'empty'} in every row: "
                "leave it out"
            )
        if 2 * len(values) > len(factor):
            raise ValueError(
                f"column {k} of factors has {len(values)} values in {len(factor)} rows: expected "
                "classes, each in several rows; put numbers into classes first, or take more rows"
            )
    return z, classes


def _numpy(value: Array) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _binned(column: np.ndarray, bins: int) -> np.ndarray:
    inner_edges = np.linspace(column.min(), column.max(), bins + 1)[1:-1]
    return np.digitize(column, inner_edges)


def _gap(scores: np.ndarray) -> np.ndarray:
    """Of each row the largest less the second largest, which is 0 where there is only one."""
    ranked = np.sort(np.pad(scores, ((0, 0), (1, 0))), 1)
    return ranked[:, -1] - ranked[:, -2]


def _accuracy(classes: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over classes of the share that is predicted right, scaled so that guessing scores 0."""
    shares = [float((predicted[classes == k] == k).mean()) for k in np.unique(classes)]
    chance = 1 / max(len(shares), 2)
    return (float(np.mean(shares)) - chance) / (1 - chance)


def _concentration(importance: np.ndarray) -> np.ndarray:
    """1 - entropy of each row's shares, to the base of their number; 0 for a row of zeros."""
    shares = importance + np.where(importance.sum(1, keepdims=True) > 0, 0, 1)
    return 1 - scipy.stats.entropy(shares, axis=1) / np.log(max(importance.shape[1], 2))


def _alike(factor: np.ndarray, random: np.random.Generator, groups: int, size: int) -> np.ndarray:
    """Numbers of rows ``(groups, size)``, drawn with replacement; a group's share their class."""
    order, counts = np.argsort(factor, kind="stable"), np.bincount(factor)
    starts = np.cumsum(counts) - counts
    shared = factor[random.integers(len(factor), size=(groups, 1))]
    return order[starts[shared] + (random.random((groups, size)) * counts[shared]).astype(np.int64)]


_FIGURES: Mapping[str, Callable[[Array, Array, int], dict[str, float]]] = {
    "mig": lambda z, v, seed: {"mig": mig(z, v)},
    "sap": lambda z, v, seed: {"sap": sap(z, v)},
    "dci": lambda z, v, seed: {f"dci_{k}": x for k, x in dci(z, v, seed=seed)._asdict().items()},
    "beta_vae": lambda z, v, seed: {"beta_vae": beta_vae(z, v, seed=seed)},
    "factor_vae": lambda z, v, seed: {"factor_vae": factor_vae(z, v, seed=seed)},
}
