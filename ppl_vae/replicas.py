"""Replicas: trainings of one pair from several seeds, step by step as one program."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ppl_vae.calibration import LabelScores
from ppl_vae.evaluation import Evaluation, evaluate
from ppl_vae.graphs import Untraceable
from ppl_vae.loop import TrainingLoop
from ppl_vae.model import GenerativeModel
from ppl_vae.recorded import RecordedStep
from ppl_vae.signature import Signature
from ppl_vae.trial import trial
from ppl_vae.vectorized import vectorize

if TYPE_CHECKING:
    from ppl_vae.fitting import Fitted

Pair = tuple[GenerativeModel, nn.Module]


class Together:
    """The steps of replicas, of which each has a loop: all at once, where they are compiled.

    Eager steps, and those of programs that cannot be compiled together, are taken one by one.
    """

    def __init__(self, loops: Sequence[TrainingLoop]) -> None:
        self._loops = loops
        self._steps: dict[Any, tuple[list[RecordedStep], Callable[..., Any]]] = {}

    def prepare(self, compiled: Collection[int] | None = None) -> list[int]:
        """Settle which steps are compiled: see :meth:`TrainingLoop.prepare`."""
        settled = []
        kinds = zip(*(loop.kinds() for loop in self._loops), strict=True)
        for kind in kinds:
            batches = [
                next(loop.feed.batches([numbers]))
                for loop, (numbers, _) in zip(self._loops, kind, strict=True)
            ]
            size, steps = len(kind[0][0]), sum(steps for _, steps in kind)
            pays = (
                self._loops[0].svi.pays(batches[0], steps=steps)
                if compiled is None
                else size in compiled
            )
            if pays and self._compile([Signature((batch,), {}) for batch in batches]):
                settled.append(size)
        return settled

    def take(self, batches: Sequence[Any]) -> list[Any]:
        """A step of each replica on its batch. Returns the losses."""
        signatures = [Signature((batch,), {}) for batch in batches]
        key = signatures[0].key
        if key in self._steps and self._loops[0].batch == 0:
            # Between epochs, learning rates may change, which this takes over.
            recorded, _ = self._steps[key]
            changed = [one.changed(own) for one, own in zip(recorded, signatures, strict=True)]
            if any(changed):
                del self._steps[key]
                self._compile(signatures)
        if key not in self._steps:
            return [
                loop.svi.eager_step(batch) for loop, batch in zip(self._loops, batches, strict=True)
            ]
        _, program = self._steps[key]
        return list(program(*_stacked(signatures))[0])

    def _compile(self, signatures: Sequence[Signature]) -> bool:
        recorded = []
        try:
            for loop, signature in zip(self._loops, signatures, strict=True):
                args, kwargs = signature.arguments(*signature.tensors)
                with trial(loop.svi):
                    loop.svi.eager_step(*args, **kwargs)  # makes the optimizer's moments
                recorded.append(RecordedStep(loop.svi, signature, varying=False))
            program = vectorize([one.graph() for one in recorded], *_stacked(signatures))
        except Untraceable as error:
            warnings.warn(
                f"replicas are trained one by one, since they cannot be compiled as one: {error}",
                RuntimeWarning,
                stacklevel=4,
            )
            return False
        self._steps[signatures[0].key] = recorded, program
        return True


def start(loops: Sequence[TrainingLoop], resume: bool) -> None:
    """Take up replicas at the last step of which all have a checkpoint, or begin them."""
    step = None
    if resume:
        runs = [loop.run for loop in loops if loop.run is not None]
        common = set.intersection(*(set(run.steps()) for run in runs))
        step = max(common, default=None)
        if step is None:
            raise ValueError(
                f"the replicas in {runs[0].folder.parent} have no checkpoint of a common step: go "
                "on with each alone, by its own folder"
            )
    for loop in loops:
        loop.start(resume, step)


def pairs(
    model: GenerativeModel | Sequence[GenerativeModel],
    guide: nn.Module | Sequence[nn.Module],
    seeds: int | None,
) -> list[Pair]:
    """The model and guide of each replica: those given, or copies of the one pair.

    A guide that shares modules with its model, or the other way about, shares them in the copies.

    Raises:
        ValueError: another number of models or guides than of seeds.
    """
    if isinstance(model, GenerativeModel) and isinstance(guide, nn.Module):
        return (
            [(model, guide)]
            if seeds is None
            else [copy.deepcopy((model, guide)) for _ in range(seeds)]
        )
    models = [model] if isinstance(model, GenerativeModel) else list(model)
    guides = [guide] if isinstance(guide, nn.Module) else list(guide)
    if not len(models) == len(guides) == seeds:
        raise ValueError(
            f"{len(models)} models and {len(guides)} guides for seeds={seeds}: expected one of "
            "each, to be copied, or as many as seeds"
        )
    return list(zip(models, guides, strict=True))


def folders(out: Path | None, seed: int, seeds: int | None) -> list[Path | None]:
    """The folder of each replica's run."""
    if seeds is None or out is None:
        return [out] * (seeds or 1)
    return [out / f"seed-{seed + number}" for number in range(seeds)]


def run_folders(folder: str | Path) -> list[Path]:
    """The folders of the runs in a folder: itself, or those of its replicas, by seed."""
    folder = Path(folder)
    found = sorted(folder.glob("seed-*/run.json"), key=lambda path: int(path.parent.name[5:]))
    if (folder / "run.json").exists() or not found:
        return [folder]
    return [path.parent for path in found]


_FIGURES = ("elbo", "reconstruction", "kl", "nll", "bits_per_dim", "active_units")
_OF_LABELS = ("accuracy", "log_loss", "brier", "calibration_error")


@dataclass(frozen=True)
class Spread:
    """Figures of replicas: mean and standard error over them, by the names that
    :class:`~ppl_vae.evaluation.Evaluation` gives them, those of ``labels`` within; and each
    replica's."""

    mean: dict[str, Any]
    standard_error: dict[str, Any]
    each: list[Evaluation]

    @classmethod
    def of(cls, each: list[Evaluation]) -> Spread:
        return cls(*spread([averaged(one) for one in each]), each=each)


def spread(each: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean and standard error, entry by entry, of mappings of numbers, or of such mappings, that
    have the same names. Of a single one, the standard error is nan."""
    means: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for name, first in each[0].items():
        values = [one[name] for one in each]
        if isinstance(first, Mapping):
            means[name], errors[name] = spread(values)
            continue
        numbers = torch.tensor(values, dtype=torch.float64)
        means[name] = numbers.mean().item()
        error = numbers.std() / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
        errors[name] = float(error)
    return means, errors


def averaged(one: Evaluation) -> dict[str, Any]:
    """The figures of an evaluation of which a mean over seeds is told."""
    figures: dict[str, Any] = {name: float(getattr(one, name)) for name in _FIGURES}
    if one.labels is not None:
        figures["labels"] = {source: averaged_labels(own) for source, own in one.labels.items()}
    return figures


def averaged_labels(scores: LabelScores) -> dict[str, float]:
    """The same of labels."""
    return {name: float(getattr(scores, name)) for name in _OF_LABELS}


def evaluate_replicas(replicas: Sequence[Fitted], **options: Any) -> Spread:
    """Evaluate the replicas of a fit of several seeds, ``fitted.replicas``.

    Args:
        options: arguments of :func:`ppl_vae.evaluate`.
    """
    return Spread.of([evaluate(one.model, one.guide, one.data, **options) for one in replicas])


def _stacked(signatures: Sequence[Signature]) -> list[torch.Tensor]:
    return [torch.stack(own) for own in zip(*(s.tensors for s in signatures), strict=True)]
