"""Commands for a run that is there."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import Any, Literal

from ppl_vae.commands.options import Device, parted


def evaluate_command(
    run: Path,
    samples: int = 100,
    split: Literal["train", "validation", "test"] = "test",
    seed: int = 0,
    memory: int = 512,
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Evaluate a run: ELBO, NLL, KL, active units, withheld labels, on every row of a split.

    Args:
        run: folder of the run, or of replicas: then mean and standard error over the seeds.
        samples: importance draws a row.
        split: which rows.
        seed: of the draws.
        memory: MiB that intermediate tensors may take.
        device: where to compute.
        json: print JSON.
    """
    from ppl_vae.atomic import write_atomically
    from ppl_vae.evaluation import evaluate, finite_or_none
    from ppl_vae.recipes import load
    from ppl_vae.replicas import Spread, run_folders

    folders, each = run_folders(run), []
    for folder in folders:
        fitted = load(folder, device=device)
        each.append(
            evaluate(
                fitted.model,
                fitted.guide,
                fitted.data,
                samples=samples,
                split=split,
                seed=seed,
                memory=memory,
            )
        )
        own = json_.dumps(each[-1].to_json(), indent=2)
        write_atomically(folder / f"evaluation-{split}.json", own.encode() + b"\n")
    figures = each[0].to_json()
    text = json_.dumps(figures, indent=2)
    errors: dict[str, Any] = {"elbo": each[0].elbo_se, "nll": each[0].nll_se}
    errors["labels"] = {
        source: {"accuracy": scores["accuracy_se"]}
        for source, scores in figures.get("labels", {}).items()
    }
    title = f"{split}: {figures['rows']} rows, {samples} importance samples a row, nats per datum"
    if len(each) > 1:
        spread = Spread.of(each)
        figures, errors = finite_or_none(spread.mean), finite_or_none(spread.standard_error)
        over = {"mean": figures, "standard_error": errors, "seeds": len(each)}
        text = json_.dumps(over | {"each": [one.to_json() for one in each]}, indent=2)
        write_atomically(run / f"evaluation-{split}.json", text.encode() + b"\n")
        title += f"; mean and standard error over {len(each)} seeds"
    if json:
        print(text)
        return

    def show(label: str, digits: int, value: float | None, error: float | None) -> None:
        shown = "-" if value is None else f"{value:.{digits}f}"
        print(f"  {label:<18}{shown:>10}" + ("" if error is None else f" +- {error:.{digits}f}"))

    print(title)
    for name, label, digits in (
        ("elbo", "ELBO", 3),
        ("reconstruction", "reconstruction", 3),
        ("kl", "KL", 3),
        ("nll", "NLL", 3),
        ("bits_per_dim", "bits per dim", 4),
        ("active_units", "active units", 0 if len(each) == 1 else 1),
    ):
        show(label, digits, figures[name], errors.get(name))
    for source, scores in figures.get("labels", {}).items():
        of = {"classifier": "the classifier q(y | x)", "importance": "importance sampling p(y | x)"}
        print(f"labels, by {of[source]}")
        for name in ("accuracy", "log_loss", "brier", "calibration_error"):
            show(name.replace("_", " "), 4, scores[name], errors["labels"][source].get(name))


def check_command(
    run: Path,
    only: str | None = None,
    split: Literal["train", "validation", "test"] = "test",
    level: float = 0.05,
    options: str | None = None,
    seed: int = 0,
    device: Device = "auto",
    json: bool = False,
) -> None:
    """Check a run: does the model fit, can the guide be believed, how large is the evidence?

    Writes report/index.html, one page with verdicts first; report/idata.nc, draws and importance
    weights as ArviZ's DataTree; report/check.json, all figures; and report/figures.

    Args:
        run: folder of the run; the report goes to its folder ``report``.
        only: names of checks, parted by commas. Default: all that apply.
        split: the rows to check against.
        level: probability that the report as a whole fails a pair without a fault.
        options: further arguments of checks, in JSON: {"evidence": {"rows": 1000}}.
        seed: of the draws.
        device: where to compute.
        json: print JSON.
    """
    from ppl_vae.checks import check
    from ppl_vae.recipes import load

    given = _arguments(options)
    fitted = load(run, device=device)
    report = check(
        fitted.model,
        fitted.guide,
        fitted.data,
        only=parted(only),
        split=split,
        level=level,
        seed=seed,
        progress=not json,
        out=run / "report",
        **given,
    )
    if json:
        print(json_.dumps(report.to_json(), indent=2))
    else:
        print(report)
        print(run / "report" / "index.html")


def _arguments(options: str | None) -> dict[str, dict[str, Any]]:
    """Arguments by check, from JSON."""
    expected = 'expected JSON such as {"evidence": {"rows": 1000}}'
    try:
        given = json_.loads(options or "{}")
    except json_.JSONDecodeError as error:
        raise ValueError(f"--options {options}: {error}; {expected}") from None
    if not isinstance(given, dict) or not all(isinstance(own, dict) for own in given.values()):
        raise ValueError(f"--options {options}: {expected}")
    return given


def sample_command(run: Path, n: int = 64, seed: int = 0, device: Device = "auto") -> None:
    """Draw new rows from a run's model, as a picture and as numbers.

    A conditional model is given the covariates of test rows, chosen at random.

    Args:
        run: folder of the run; writes figures/samples.png and samples.npz, every site's draws, and
            what they were given.
        n: number of rows.
        seed: of the draws.
        device: where to compute.
    """
    import numpy as np
    import torch

    from ppl_vae import plots
    from ppl_vae.draws import some_covariates
    from ppl_vae.recipes import load
    from ppl_vae.sites import aside

    if n < 1:
        raise ValueError(f"--n {n}: expected at least 1")
    fitted = load(run, device=device)
    given = some_covariates(fitted.model, fitted.data, n, seed=seed)
    with aside():
        torch.manual_seed(seed)
        drawn = fitted.model.simulate(n, **given)
    draws = {name: value.cpu().numpy() for name, value in drawn.items()}
    np.savez_compressed(run / "samples.npz", **draws)  # pyright: ignore[reportArgumentType]
    shape = fitted.data.image_shape
    figure = plots.samples(fitted.model, shape, n=n, seed=seed, covariates=given)
    figure.savefig(run / "figures" / "samples.png")
    print(run / "samples.npz")
    print(run / "figures" / "samples.png")
