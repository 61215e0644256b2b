"""What the check of evidence found: as a table, in words, and as groups of a DataTree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xarray import Dataset

from ppl_vae.annealing import Annealed, Bracket
from ppl_vae.weights import RELIABLE, Smoothed, bound


@dataclass(frozen=True, eq=False)
class Sampled:
    """What importance sampling says of some rows; ``rows`` are their numbers."""

    rows: Tensor
    weights: Tensor
    smoothed: Smoothed
    effective: Tensor


@dataclass(frozen=True, eq=False)
class Compared:
    """Both methods on the same rows; ``at`` says which of the others these are."""

    at: Tensor
    rows: Tensor
    weights: Tensor
    annealed: Annealed

    @property
    def differences(self) -> Tensor:
        """Annealing less importance sampling, ``(rows,)``."""
        return self.annealed.log_evidence - bound(self.weights, len(self.weights))


def standard_error(values: Tensor) -> float:
    """Of the mean of ``(rows,)``."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def draws_shown(samples: int) -> list[int]:
    """1, 10, 100, ... below ``samples``, and that."""
    return [10**e for e in range(len(str(samples))) if 10**e < samples] + [samples]


def records(
    sampled: Sampled,
    compared: Compared | None,
    bracket: Bracket | None,
    p: float | None,
    verdict: str,
) -> list[dict[str, Any]]:
    samples = len(sampled.weights)
    k = sampled.smoothed.pareto_k
    found = [
        _record(
            f"bound of {n} draw{'s' * (n > 1)}{' (ELBO)' * (n == 1)}", bound(sampled.weights, n)
        )
        for n in draws_shown(samples)
    ]
    found += [
        _record("NLL by importance sampling", -bound(sampled.weights, samples)),
        _record("NLL, Pareto-smoothed", -sampled.smoothed.log_evidence),
        _record(f"rows with Pareto-k above {RELIABLE}", (k > RELIABLE).double(), unit="share"),
        _record("Pareto-k, median", k, median=True, unit=""),
        _record("effective draws, median", sampled.effective, median=True, unit="draws"),
    ]
    if compared is not None:
        annealed = compared.annealed
        both = compared.weights
        found += [
            _record("log p(x) by annealing", annealed.log_evidence),
            _record("log p(x) by importance sampling, same rows", bound(both, len(both))),
            _record("annealing less importance sampling", compared.differences)
            | {"p": p, "verdict": verdict},
            _record("acceptance of annealing", annealed.acceptance.double(), unit="share"),
        ]
    if bracket is not None:
        found += [
            _record("simulated rows: annealing, lower", bracket.lower.log_evidence),
            _record("simulated rows: annealing, upper", bracket.upper.log_evidence),
            _record("simulated rows: upper less lower", bracket.gap),
        ]
    return found


def _record(
    figure: str, values: Tensor, *, median: bool = False, unit: str = "nats"
) -> dict[str, Any]:
    return {
        "figure": figure,
        "rows": len(values),
        "value": float(values.median() if median else values.mean()),
        "standard_error": None if median else standard_error(values),
        "unit": unit,
        "p": None,
        "verdict": None,
    }


def _shown(values: Tensor) -> str:
    return f"{float(values.mean()):.2f} +- {standard_error(values):.2f}"


def meaning(
    sampled: Sampled,
    compared: Compared | None,
    bracket: Bracket | None,
    verdict: str,
    tolerance: float,
    note: str,
) -> str:
    k = sampled.smoothed.pareto_k
    samples = len(sampled.weights)
    share = float((k > RELIABLE).double().mean())
    found = [
        f"log p(x) is {_shown(bound(sampled.weights, samples))} nats by importance sampling with "
        f"{samples} draws; Pareto-k is above {RELIABLE} in {share:.0%} of {len(k)} rows"
        + (", where the weights are too uneven to be believed." if share > 0 else ".")
    ]
    if k.isnan().any():
        found.append("Too few draws to tell Pareto-k: at least 25 are needed.")
    if compared is not None:
        found.append(_verdict_said(compared, verdict, tolerance, share))
        if compared.annealed.given:
            found.append(
                f"Both are given one draw of {', '.join(compared.annealed.given)} from the guide."
            )
    if bracket is not None:
        found.append(
            f"On rows that the model emits, annealing from both sides leaves "
            f"{_shown(bracket.gap)} nats between them: in expectation, at least as much as "
            "annealing is off there."
        )
    if note:
        found.append(f"Annealing does not apply, so that nothing was tested: {note}.")
    return " ".join(found)


def _verdict_said(compared: Compared, verdict: str, tolerance: float, share: float) -> str:
    differences = compared.differences
    apart = f"annealing less importance sampling is {_shown(differences)} nats"
    count = f"on {len(differences)} rows"
    if verdict == "pass":
        held = (
            f"within the {tolerance:g} nats allowed"
            if float(differences.mean().abs()) <= tolerance
            else f"beyond the {tolerance:g} nats allowed by no more than chance explains; take "
            "more rows to tell"
        )
        return f"{apart[0].upper()}{apart[1:]} {count}: {held}."
    both = "Both are lower bounds in expectation, so that the higher one is nearer"
    if verdict == "fail":
        believed = " as Pareto-k says too," if share > 0.1 else ""
        return (
            f"Importance sampling gives too low a log p(x): {apart} {count}. {both}: trust "
            f"annealing;{believed} the guide misses much of the posterior. Try a richer guide "
            "(flow, mixture, semi-amortized), one that overfits less, or more draws, before NLLs "
            "are compared."
        )
    return (
        f"Annealing gives too low a log p(x): {apart} {count}. {both}: trust importance sampling, "
        "as far as its Pareto-k allows. Try more temperatures, or start='guide'."
    )


def groups(
    sampled: Sampled, compared: Compared | None, bracket: Bracket | None
) -> dict[str, Dataset]:
    def of(rows: Tensor | None, **variables: tuple[tuple[str, ...], Tensor]) -> Dataset:
        coords = {} if rows is None else {"row": rows.numpy()}
        named = {name: (dims, value.numpy()) for name, (dims, value) in variables.items()}
        return Dataset(named, coords=coords)

    samples = len(sampled.weights)
    found = {
        "evidence": of(
            sampled.rows,
            log_evidence=(("row",), bound(sampled.weights, samples)),
            log_evidence_smoothed=(("row",), sampled.smoothed.log_evidence),
            pareto_k=(("row",), sampled.smoothed.pareto_k),
            effective_draws=(("row",), sampled.effective),
        )
    }
    if compared is not None:
        draws = draws_shown(samples)
        bounds = torch.stack([bound(compared.weights, n) for n in draws])
        found["evidence_annealed"] = of(
            compared.rows,
            annealed=(("chain", "row"), compared.annealed.estimates),
            log_evidence=(("row",), compared.annealed.log_evidence),
            bound=(("draws", "row"), bounds),
        ).assign_coords(draws=np.array(draws))
    if bracket is not None:
        found["evidence_simulated"] = of(
            None,
            lower=(("chain", "row"), bracket.lower.estimates),
            upper=(("chain", "row"), bracket.upper.estimates),
            gap=(("row",), bracket.gap),
        )
    return found
