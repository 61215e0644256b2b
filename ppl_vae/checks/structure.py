"""Do model and guide treat rows, batches and inputs as programs over independent rows must?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_vae.checks.chosen import given, numbers_of_rows
from ppl_vae.checks.fixed_latents import Coordinate, FixedLatents, differ
from ppl_vae.checks.result import CheckResult, NotApplicable, Progress, silent
from ppl_vae.data import as_dataset
from ppl_vae.guide import Prior
from ppl_vae.model import ROWS, GenerativeModel, own_parameters
from ppl_vae.objectives import backward, plain_elbo
from ppl_vae.sites import PairError, check_data, check_pair, evaluating

_TOTAL = 3  # times the rows, where a batch stands for more of them
_NAMED = 8  # coordinates or parameters that are named in a sentence
_PASSES = 3  # of gradients, from different draws

Record = dict[str, str]


def structure(
    model: GenerativeModel,
    guide: torch.nn.Module,
    data: Any,
    *,
    split: str = "test",
    seed: int = 0,
    level: float = 0.05,
    progress: Progress = silent,
    rows: int = 32,
) -> CheckResult:
    """Looks for rows that are wrongly scaled or not independent, and for what is never used.

    A few held-out rows with latents drawn once and then fixed, so that no noise enters and
    ``error_rate`` is 0; equality is up to rounding, ``eps ** 0.45`` of the largest term. For model
    and guide each, one record:

    - *scale*: a batch that stands for ``total`` rows counts ``total / rows`` times, and what is
      shared by all rows once;
    - *subsets*: the terms of two halves of a batch add up to those of the whole;
    - *rows*: a row's terms are the same in another order, and in other company (batch
      normalization by a batch's statistics, attention or sums over rows break this);
    - *gradients*: the ELBO has a gradient by every parameter that is not frozen, in some of a few
      passes, by the estimator that :func:`ppl_vae.objectives.plain_elbo` chooses.

    And for the guide *inputs*: its density at fixed latents depends on every coordinate that
    varies among the rows. One that it ignores is a fault if the likelihood emits it and ties it to
    a latent: if the change of ``log p(x | z)`` by that coordinate depends on z. The guide
    :class:`~ppl_vae.guide.Prior` ignores all on purpose. Gradients of the caller stay as they are.

    Each record has the part checked, its verdict ("pass", "fail", "not applicable"), and detail.

    Args:
        data: a Dataset, or what :func:`ppl_vae.data.as_dataset` takes.
        seed: of rows and draws.
        level: not used; here since all checks have it.
        rows: held-out rows, chosen at random; all of them where the split has fewer.

    Raises:
        NotApplicable: fewer than four rows.
        PairError: guide or data do not fit the model.
    """
    records: list[Record] = []
    with evaluating(seed, model, guide):
        dataset = as_dataset(data)
        chosen = numbers_of_rows(len(dataset.split(split)), rows, seed)
        columns = given(model, dataset, chosen, split=split)
        held = len(next(iter(columns.values())))
        if held < 4:
            raise NotApplicable(f"{held} rows of {split!r}; halves to compare need at least 4")
        check_data(model, [columns])
        check_pair(model, guide, **columns)
        pair = FixedLatents(model, guide, columns, held, seed)
        records += [_scale(pair, "model"), *_rows(pair, "model")]
        try:
            records += [_scale(pair, "guide"), *_rows(pair, "guide"), _inputs(pair)]
        except NotImplementedError as error:  # it can score what it has drawn only
            names = [f"{what} of the guide" for what in ("scale", "subsets", "rows", "inputs")]
            records += [_record(name, "", str(error)) for name in names]
        progress(0.7)
        records += _gradients(pair)
    failed = [record for record in records if record["verdict"] == "fail"]
    return CheckResult(
        name="structure",
        verdict="fail" if failed else "pass",
        error_rate=0.0,
        p=None,
        statistics=tuple(records),
        meaning=" ".join(f"{r['check'].capitalize()}: {r['detail']}" for r in failed)
        or f"Rows are scaled by total, add up and are independent; inputs and parameters are used. "
        f"{_said(records, 'inputs of the guide')}",
        settings={"split": split, "seed": seed, "rows": held},
        groups={},
        pictures={},
    )


def _scale(pair: FixedLatents, who: str) -> Record:
    check = f"scale of the {who}"
    once = pair.terms(who)
    try:
        scaled = pair.terms(who, total=_TOTAL * pair.rows)
    except TypeError as error:
        return _record(check, f"it takes no total=, the rows that a batch stands for: {error}")
    wrong: list[str] = []
    for name, terms in once.items():
        if name in pair.unplated:
            wrong.append(f"{name!r} stands in no plate {ROWS!r}")
            continue
        factor = _TOTAL if terms.dim() else 1
        if differ(scaled[name], factor * terms):
            found = scaled[name].sum().item() / terms.sum().item()
            wrong.append(f"{name!r} counts {found:.3g} times instead of {factor}")
    said = f"with total = {_TOTAL} x rows, {_listed(wrong)}: enter self.rows(x, n=n, total=total)"
    return _record(check, said if wrong else "")


def _rows(pair: FixedLatents, who: str) -> list[Record]:
    """The records of subsets and of rows."""
    whole = {name: terms for name, terms in pair.terms(who).items() if terms.dim()}
    if not whole or pair.unplated:
        nothing = f"no site in the plate {ROWS!r} of rows"
        return [_record(f"{what} of the {who}", "", nothing) for what in ("subsets", "rows")]
    every = pair.every_row
    parts = [pair.terms(who, *pair.permuted(part)) for part in every.chunk(2)]
    order = torch.randperm(pair.rows).to(every)
    moved = pair.terms(who, *pair.permuted(order))
    sums, alone, turned = list[str](), list[str](), list[str]()
    for name, terms in whole.items():
        halves = torch.cat([part[name].reshape(-1) for part in parts])
        if gap := differ(halves.sum(), terms.sum()):
            sums.append(f"{name!r} by {gap:.3g} nats")
        if halves.shape != terms.shape or differ(halves, terms):
            alone.append(repr(name))
        if differ(moved[name], terms[order]):
            turned.append(repr(name))
    said = [f"terms of {_listed(alone)} depend on the other rows of a batch"] if alone else []
    said += [f"terms of {_listed(turned)} do not move with their rows"] if turned else []
    remedy = ": take no statistics or sums over rows" if said else ""
    return [
        _record(
            f"subsets of the {who}",
            f"two halves do not add up to the whole: {_listed(sums)}" if sums else "",
        ),
        _record(f"rows of the {who}", " and ".join(said) + remedy),
    ]


def _inputs(pair: FixedLatents) -> Record:
    check = "inputs of the guide"
    local = [name for name in pair.terms("guide") if name in pair.row_dims]
    if not local:
        return _record(check, "", "it draws nothing for each row")
    if isinstance(pair.guide, Prior):
        return _record(check, "", "it draws from the prior, on purpose")
    varying = [
        (name, int(k))
        for name, column in pair.columns.items()
        for k in (column != column[:1]).reshape(pair.rows, -1).any(0).nonzero()
    ]
    if not varying:
        return _record(check, "", "no coordinate varies among the rows")
    still = _without_gradient(pair, local, varying)
    unread = _unread(pair, local, still)
    share = f"the guide reads all but {len(unread)} of {len(varying)} varying coordinates"
    if not unread:
        return {"check": check, "verdict": "pass", "detail": share.replace("all but 0 of", "all")}
    share += f" (ignored: {_coordinates(unread)})"
    emitted = [c for c in unread if c[0] in pair.model.observables]
    if emitted and _tied(pair, emitted):
        named = [c for c in emitted[: 4 * _NAMED] if _tied(pair, [c])]
        tied = f", although the model ties {_coordinates(named)} to a latent" if named else ""
        return _record(check, f"{share}{tied}: give the encoder all that the model emits")
    return {"check": check, "verdict": "pass", "detail": f"{share}, which tell nothing of latents"}


def _without_gradient(
    pair: FixedLatents, local: list[str], coordinates: list[Coordinate]
) -> list[Coordinate]:
    """Those by which log q has no gradient in any row."""
    floats = {
        n: c.clone().requires_grad_() for n, c in pair.columns.items() if c.is_floating_point()
    }
    with torch.enable_grad():
        terms = pair.terms("guide", pair.columns | floats)
        total = torch.stack([terms[name].sum() for name in local]).sum()
        if not total.requires_grad:
            return coordinates
        slopes = torch.autograd.grad(total, list(floats.values()), allow_unused=True)
    moves = {
        name: slope.reshape(pair.rows, -1).ne(0).any(0)
        for name, slope in zip(floats, slopes, strict=True)
        if slope is not None
    }
    return [(name, k) for name, k in coordinates if name not in moves or not moves[name][k]]


def _unread(
    pair: FixedLatents, local: list[str], coordinates: list[Coordinate]
) -> list[Coordinate]:
    """Those that, set to other rows' values, leave log q as it is.

    A gradient may be 0 although a value counts, as behind a threshold. Coordinates are tried
    together, and halved where they count.
    """
    if not coordinates:
        return []
    before, after = pair.terms("guide"), pair.terms("guide", pair.swapped(coordinates))
    if all(torch.equal(before[name], after[name]) for name in local):
        return coordinates
    if len(coordinates) == 1:
        return []
    half = len(coordinates) // 2
    return [
        c for part in (coordinates[:half], coordinates[half:]) for c in _unread(pair, local, part)
    ]


def _tied(pair: FixedLatents, coordinates: list[Coordinate]) -> bool:
    """Whether what these coordinates change of log p(x, z) depends on the rows' latents."""
    turned = pair.chosen(pair.every_row.roll(1))

    def change(latents: Mapping[str, Tensor]) -> Tensor:
        with_own, with_others = (
            torch.stack([t for t in pair.terms("model", columns, latents).values() if t.dim()])
            for columns in (pair.columns, pair.swapped(coordinates))
        )
        return (with_others - with_own).sum(0).nan_to_num()

    return differ(change(pair.latents), change(turned)) > 0


def _gradients(pair: FixedLatents) -> list[Record]:
    programs = {"model": pair.model, "guide": pair.guide}
    parameters = {
        (who, name): p
        for who, program in programs.items()
        for name, p in program.named_parameters()
    }
    before = {key: p.grad for key, p in parameters.items()}
    reached, broken = set[tuple[str, str]](), set[tuple[str, str]]()
    try:
        for columns in _variants(pair):
            for _ in range(_PASSES):
                for p in parameters.values():
                    p.grad = None
                with torch.enable_grad(), own_parameters(*programs.values()):
                    objective = plain_elbo(*programs.values(), **columns)
                    backward(objective, *programs.values(), **columns)
                for key, p in parameters.items():
                    if p.grad is not None:
                        reached |= {key} if p.grad.any() else set()
                        broken |= set() if p.grad.isfinite().all() else {key}
    finally:
        for key, p in parameters.items():
            p.grad = before[key]
    records: list[Record] = []
    for who in programs:
        own = {name: p for (whose, name), p in parameters.items() if whose == who}
        frozen = [name for name, p in own.items() if not p.requires_grad]
        lost = [n for n in own if n not in frozen and (who, n) not in reached]
        wrong = [name for name in own if (who, name) in broken]
        said = [f"no gradient reaches {_listed(lost)}: use it, or take it out"] if lost else []
        said += [f"the gradient of {_listed(wrong)} is not finite"] if wrong else []
        fine = f"frozen: {_listed(frozen)}" if frozen else ""
        record = _record(
            f"gradients of the {who}", " and ".join(said), "" if own else "no parameters"
        )
        records.append(record | ({"detail": fine} if not said and fine else {}))
    return records


def _variants(pair: FixedLatents) -> list[dict[str, Tensor]]:
    """What a fit may be given: the columns, and where labels are among others, all but those."""
    rest = {name: column for name, column in pair.columns.items() if name != "y"}
    seen = [name for name in rest if name in pair.model.observables]
    if "y" not in pair.columns or "y" not in pair.model.observables or not seen:
        return [pair.columns]
    try:
        check_pair(pair.model, pair.guide, **rest)
    except (PairError, ValueError):
        return [pair.columns]
    return [pair.columns, rest]


def _record(check: str, fault: str, inapplicable: str = "") -> Record:
    verdict = "fail" if fault else "not applicable" if inapplicable else "pass"
    return {"check": check, "verdict": verdict, "detail": fault or inapplicable}


def _said(records: list[Record], check: str) -> str:
    detail = next(record["detail"] for record in records if record["check"] == check)
    return f"{detail[:1].upper()}{detail[1:]}." if detail else ""


def _coordinates(coordinates: list[Coordinate]) -> str:
    return _listed([f"{name}[{k}]" for name, k in coordinates])


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
