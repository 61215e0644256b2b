"""Seconds of training to an NLL: ``python -m benchmarks.time_to_target [--targets 95,92,90]``.

``ppl_vae.fit`` beside ``pyro.infer.SVI`` as Pyro's tutorials write it, from the same start, on the
same batches, by the same estimator of the ELBO, with the same warm-up and learning rates. Both
draw the same noise, so they differ by rounding and by time; also by a last batch that is smaller,
where there is one, since Pyro's loss is a sum over the batch. Before a fit the losses are found
equal.

On the clock: all that ``fit`` does, compiling and the validation ELBO at the end of each epoch
included; of Pyro, its steps, and that same validation ELBO by the same function. Off it: the looks
at the NLL of every tenth validation row, or with ``--split test`` of every tenth test row, for a
target that was published for those: nothing is chosen by what is seen.

"ours averaged" is the same fit with running means of the weights over ten epochs, at which it is
looked; Pyro's SVI has none.

One contender runs after the other, so nothing else should run meanwhile; ``load`` tells.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import record
from benchmarks.fits import ELBOS, SHARED, Settings, by_pyro, check, ours, settings_of
from benchmarks.looks import THIN, Watch, first_within, thinned
from ppl_vae.begin import described
from ppl_vae.recipes import build

CONTENDERS: dict[str, tuple[Callable[..., dict[str, float]], dict[str, Any]]] = {
    "ours": (ours, {}),
    "ours bf16": (ours, {"precision": "bf16-mixed"}),
    "ours averaged": (ours, {"average": 10}),
    "pyro": (by_pyro, {}),
    "pyro unvalidated": (by_pyro, {"validated": False}),
}


def measure(
    name: str,
    recipe: str,
    chosen: Settings,
    *,
    elbo: str,
    targets: Sequence[float],
    due: Callable[[int], bool],
    draws: int,
    split: str = "validation",
) -> dict[str, Any]:
    """One contender's figures, in JSON types; it looks at the end of the last epoch too."""
    made = build(recipe, {}, record.SEED)
    settings = settings_of(made, chosen)
    check(made, settings, elbo)
    epochs = settings["epochs"]
    load, (contender, options) = os.getloadavg()[0], CONTENDERS[name]
    rows = thinned(made.data)
    watch = Watch(made, rows, lambda epoch: due(epoch) or epoch == epochs, draws, split)
    found = contender(made, settings, elbo, watch, **options)
    batches = math.ceil(len(made.data.split("train")) / settings["batch_size"])
    reached = {f"{target:g}": first_within(watch.curve, target) for target in targets}
    return {
        "seconds": watch.curve[-1].seconds,
        "compile_seconds": found["compile_seconds"],
        "ms_a_step": 1e3 * found["step_seconds"] / (epochs * batches),
        "steps": epochs * batches,
        "reached": {target: look and look._asdict() for target, look in reached.items()},
        "curve": [look._asdict() for look in watch.curve],
        "test": watch.figures("test"),
        "load": load,
    }


def show(result: dict[str, Any]) -> str:
    """Times to each target, and the curves."""
    found = result["contenders"]
    rows: list[tuple[str, ...]] = []
    for name, figures in found.items():
        for target, look in figures["reached"].items():
            first = found.get("ours", {}).get("reached", {}).get(target)
            rows.append(
                (
                    name,
                    target,
                    "not reached" if look is None else f"{look['seconds']:.1f}",
                    f"{look['seconds'] / first['seconds']:.2f}" if look and first else "",
                    "" if look is None else str(look["epoch"]),
                    f"{figures['compile_seconds']:.1f}",
                    f"{figures['ms_a_step']:.2f}",
                    f"{figures['ms_a_step'] / found['ours']['ms_a_step']:.2f}" * ("ours" in found),
                    f"{figures['test']['nll']:.2f}",
                )
            )
    header = (
        "contender",
        "NLL",
        "seconds",
        "x ours",
        "epochs",
        "of it compiling",
        "ms a step",
        "x ours",
        "test NLL at the end",
    )
    epochs = [look["epoch"] for look in next(iter(found.values()))["curve"]]
    curves = [
        (
            str(epoch),
            *(
                f"{figures['curve'][i][what]:.{digits}f}"
                for figures in found.values()
                for what, digits in (("seconds", 1), ("nll", 2))
            ),
        )
        for i, epoch in enumerate(epochs)
    ]
    columns = ("epoch", *(f"{name}, {what}" for name in found for what in ("s", "NLL")))
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    said = (
        f"{result['recipe']}: {settings}, {result['elbo']}. NLL: {result['draws']} draws, every "
        f"{THIN}th row of {result['split']}, at the end of test. The validation ELBO is on the "
        "clock."
    )
    tables = record.table(header, rows), record.table(columns, curves)
    return "\n\n".join([record.heading(result), said, *tables])


def _at_least_1(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def _nats(text: str) -> list[float]:
    try:
        return [float(target) for target in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected nats, such as 95,92,90") from None


@contextmanager
def _empty_caches() -> Iterator[None]:
    """Compiling takes as long as it does the first time."""
    before = os.environ.get(_CACHES)
    with tempfile.TemporaryDirectory() as caches:
        os.environ[_CACHES] = caches
        try:
            yield
        finally:
            del os.environ[_CACHES]
            if before is not None:
                os.environ[_CACHES] = before


_CACHES = "TORCHINDUCTOR_CACHE_DIR"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_target", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--recipe", default="vae-static-mnist")
    parser.add_argument("--targets", type=_nats, default=[90.0], help="NLLs, parted by commas")
    parser.add_argument(
        "--contenders",
        type=record.some_of(CONTENDERS),
        default=["ours", "pyro"],
        help=f"of {', '.join(CONTENDERS)}",
    )
    parser.add_argument("--every", type=_at_least_1, default=5, help="epochs from look to look")
    parser.add_argument(
        "--from", type=_at_least_1, default=1, dest="first", help="the first epoch to look"
    )
    parser.add_argument("--draws", type=_at_least_1, default=500, help="importance draws a row")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--elbo", choices=list(ELBOS), default="Trace_ELBO")
    parser.add_argument("--threads", type=_at_least_1, default=os.cpu_count())
    own = parser.add_argument_group("instead of the recipe's")
    own.add_argument("--epochs", type=_at_least_1)
    own.add_argument("--batch_size", type=_at_least_1)
    own.add_argument("--learning_rate", type=float)
    own.add_argument("--warmup", type=float, help="epochs")
    own.add_argument("--schedule", choices=("cosine", "none"))
    record.add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chosen = {name: getattr(options, name) for name in SHARED}
    settings = settings_of(build(options.recipe, {}, record.SEED), chosen)
    result = record.record(
        "time_to_target",
        "cpu",
        recipe=options.recipe,
        settings={name: described(value) for name, value in settings.items()},
        elbo=options.elbo,
        draws=options.draws,
        split=options.split,
        contenders={},
    )
    with _empty_caches():
        for name in options.contenders:
            print(f"{name} …", file=sys.stderr, flush=True)
            result["contenders"][name] = measure(
                name,
                options.recipe,
                chosen,
                elbo=options.elbo,
                targets=options.targets,
                due=lambda epoch: epoch >= options.first and epoch % options.every == 0,
                draws=options.draws,
                split=options.split,
            )
    record.output(result, show, options)


if __name__ == "__main__":
    main()
