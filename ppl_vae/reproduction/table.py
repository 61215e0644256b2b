"""The records as a page: what was published, what ours came to, and what is not there yet."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ppl_vae.markdown import table
from ppl_vae.reproduction.published import Group, Published, groups
from ppl_vae.reproduction.record import FORMAT, MARGIN, Protocol, verdict

Record = dict[str, Any]


def read_records(out: Path) -> list[Record]:
    """All records in a folder, by name, protocol and seed.

    Raises:
        ValueError: a file that is no record of this version.
    """
    found = []
    for path in sorted((out / "records").glob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{path} is no record of format {FORMAT}: move it away")
        found.append(record)
    return sorted(found, key=lambda one: (one["name"], one["protocol"], one["seed"]))


def markdown(records: Sequence[Record]) -> str:
    """The page. Every published figure has its row, with the command where a record is missing."""
    sections = [_section(group, records) for group in groups()]
    figures = [figure for group in groups() for figure in group.figures]
    verdicts = [ours.verdict for f in figures if (ours := Ours.of(f, "recipe", records))]
    counted = ", ".join(
        f"{verdicts.count(kind)} {kind}"
        for kind in ("better", "reached", "worse", "none published")
        if kind in verdicts
    )
    return "\n".join(
        [
            "# Published figures, reproduced",
            "",
            "Made by `ppl-vae reproduce --table` from the records in `records/`, and from nothing "
            "else: one JSON file a run, with the recipe as resolved, the data's checksum, seed, "
            "versions, hardware, the curve of the fit, and all figures of the test rows.",
            "",
            f"Of {len(figures)} figures, {len(verdicts)} are recorded: {counted or 'none'}. "
            "A row without ours is a gap, and the command fills it.",
            "",
            "- *published*: lower is better; ~ stands before a figure that is recalled, not read.",
            "- *ours*: data, split and evaluation as published, but for what a note says; the "
            "optimization is the recipe's, which gets there in fewer epochs. Mean over seeds, and "
            "its standard error where there are several.",
            f"- *verdict*: reached within {MARGIN:g} nats, or within two standard errors over "
            "seeds (of errors in percent: over test rows) and of the published ±, where there is "
            "one; better or worse beyond.",
            "- *as they did*: the same with the authors' optimization, "
            "`ppl-vae reproduce NAME --protocol paper`.",
            "",
            *sections,
            *_machines(records),
            "",
        ]
    )


class Ours:
    """What the seeds of one figure came to."""

    def __init__(self, figure: Published, records: Sequence[Record]) -> None:
        self.figure, self.records = figure, records
        values = [one["figures"][figure.measure] for one in records]
        self.value = statistics.fmean(values)
        self.error = (
            statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        )
        within = records[0]["figures"].get("error_se") or 0.0
        self.verdict = verdict(self.value, figure, within if math.isnan(self.error) else self.error)

    @classmethod
    def of(cls, figure: Published, protocol: Protocol, records: Iterable[Record]) -> Ours | None:
        """None where nothing is recorded."""
        own = [r for r in records if (r["name"], r["protocol"]) == (figure.name, protocol)]
        return cls(figure, own) if own else None

    def __str__(self) -> str:
        shown = f"{self.value:.2f}"
        return shown if math.isnan(self.error) else f"{shown} ± {self.error:.2f}"

    def mean(self, *names: str) -> float:
        """Of an entry of the records, over seeds."""
        found: list[float] = []
        for value in self.records:
            for name in names:
                value = value[name]
            found.append(float(value))  # pyright: ignore[reportArgumentType]
        return statistics.fmean(found)


def _section(group: Group, records: Sequence[Record]) -> str:
    head = (
        "name",
        _MEASURED[group.figures[0].measure],
        "ours",
        "difference",
        "verdict",
        "seeds",
        "epochs",
        "fit, min",
        "as they did",
        "to fill the gap",
    )
    lines = [f"## {group.title}", "", f"{group.source}. {group.protocol}"]
    if group.missing:
        lines += ["", f"**Not at hand:** {group.missing}"]
    lines += ["", table(head, [_row(figure, records) for figure in group.figures])]
    if believed := list(_believed(group, records)):
        lines += ["", "How far the estimates can be believed, run by run:", ""]
        lines.append(table(_BELIEVED, believed))
    said: dict[str, list[str]] = {}
    for figure in group.figures:
        if figure.note:
            said.setdefault(figure.note, []).append(f"`{figure.name}`")
    notes = [f"- {', '.join(names)}: {note}" for note, names in said.items()]
    return "\n".join([*lines, "", *notes, *([""] if notes else [])])


_MEASURED = {
    "nll": "published NLL",
    "negative_elbo": "published negative ELBO",
    "error": "published error, %",
}


def _row(figure: Published, records: Sequence[Record]) -> tuple[str, ...]:
    ours, theirs = (Ours.of(figure, p, records) for p in ("recipe", "paper"))
    value = "–" if figure.value is None else f"{'' if figure.seen else '~'}{figure.value:.2f}"
    if figure.error is not None:
        value += f" ± {figure.error:.2f}"
    way = "the recipe's" if figure.paper is None else "–" if theirs is None else str(theirs)
    if ours is None:
        return (figure.name, value, *["–"] * 6, way, f"`ppl-vae reproduce {figure.name}`")
    return (
        figure.name,
        value,
        str(ours),
        "–" if figure.value is None else f"{ours.value - figure.value:+.2f}",
        ours.verdict,
        str(len(ours.records)),
        f"{ours.mean('epochs_done'):.0f}",
        f"{ours.mean('seconds') / 60:.0f}",
        way,
        "",
    )


_BELIEVED = (
    "name",
    "seed",
    "draws",
    "NLL",
    "negative ELBO",
    "Pareto-k, median",
    "above 0.7",
    "active units",
    "test rows also in training",
    "values",
)


def _believed(group: Group, records: Sequence[Record]) -> Iterable[tuple[str, ...]]:
    for figure in group.figures:
        for one in records:
            if one["name"] != figure.name:
                continue
            found, k = one["figures"], one["figures"].get("pareto_k")
            leaked = one["leaks"]["test_rows_also_in"].get("train", 0)
            least, greatest = one["leaks"]["values"]
            yield (
                figure.name + ("" if one["protocol"] == "recipe" else ", as they did"),
                str(one["seed"]),
                str(found["samples"]),
                f"{found['nll']:.2f} ± {found['nll_se']:.2f}",
                f"{found['negative_elbo']:.2f} ± {found['negative_elbo_se']:.2f}",
                "–" if k is None or k["median"] is None else f"{k['median']:.2f}",
                "–" if k is None or k["median"] is None else f"{100 * k['share_above_0.7']:.0f} %",
                str(found.get("active_units", "–")),
                str(leaked),
                f"{least:g} to {greatest:g}, {'whole' if one['leaks']['whole'] else 'broken'}",
            )


def _machines(records: Sequence[Record]) -> Iterable[str]:
    """On what the runs were made, each machine and set of versions once."""

    def machine(one: Record) -> str:
        hardware, device = one["hardware"], one["fit"]["device"]
        where = ", ".join(hardware["cuda"]) if device == "cuda" else hardware["cpu"]
        packages = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        return f"{where}, {hardware['cpus']} CPUs; {packages}"

    if not records:
        return
    yield "## Machines"
    yield ""
    for where, some in groupby(sorted(records, key=machine), key=machine):
        names = sorted({one["name"] for one in some})
        yield f"- {where}: {', '.join(f'`{name}`' for name in names)}"
