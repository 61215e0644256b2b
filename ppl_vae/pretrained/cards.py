"""Cards of trained models: what they are, what came of them, and what they are not for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppl_vae.markdown import table
from ppl_vae.pretrained.files import FOLDER, Facts, names, read_facts
from ppl_vae.recipes import find_recipe
from ppl_vae.zoo import first_line


def card(name: str, *, folder: Path = FOLDER) -> str:
    """The card of a trained model, in Markdown, made from what was recorded of it.

    Raises:
        ValueError: there is no model of that name.
        CorruptCheckpoint: its file is damaged.
    """
    facts = read_facts(name, folder)
    sections = {
        "Figures": _figures(facts),
        "Data": _data(facts),
        "Training": _training(facts),
        "Storage": _storage(facts),
        "Loading": _loading(facts),
        "Limits": "\n".join(f"- {limit}" for limit in _limits(facts)),
    }
    head = f"# {name}\n\n{_model(facts)}"
    return "\n\n".join([head, *(f"## {title}\n\n{text}" for title, text in sections.items())])


def summaries(folder: Path = FOLDER) -> dict[str, str]:
    """A line for each trained model."""
    return {name: _summary(read_facts(name, folder)) for name in names(folder)}


_MEASURED = {
    "nll": "NLL, nats",
    "negative_elbo": "negative ELBO, nats",
    "error": "classification error, %",
}


def _summary(facts: Facts) -> str:
    measure, value = facts["published"]["measure"], facts["published"]["value"]
    beside = "" if value is None else f" (published {_published(facts)})"
    ours = f"{facts['figures'][measure]:.2f}"
    data, label = facts["data"]["name"], _MEASURED[measure]
    return f"{facts['model']} of {data}, {facts['parameters']:,} weights; {label}: {ours}{beside}"


def _model(facts: Facts) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in facts["arguments"].items())
    what = first_line(find_recipe(facts["recipe"]))
    return (
        f"{what} `{facts['model']}` with the guide `{facts['guide']}`, {facts['parameters']:,} "
        f"trained weights, by the recipe `{facts['recipe']}` with {given or 'its own arguments'}."
    )


def _figures(facts: Facts) -> str:
    figures, published = facts["figures"], facts["published"]
    measure = published["measure"]
    rows = [
        (
            _MEASURED[one],
            f"{figures[one]:.2f} ± {figures[f'{one}_se']:.2f}",
            _published(facts) if one == measure else "–",
        )
        for one in _MEASURED
        if one in figures
    ]
    against = f"Published: {published['source']}."
    if published["value"] is not None:
        known = "" if published["seen"] else " It is recalled, not read."
        against += f"{known} Verdict on ours: {facts['verdict']}."
    paragraphs = [
        table(("test rows", "ours", "published"), rows),
        f"All {figures['rows']:,} test rows, {figures['samples']:,} importance draws a row; ± is "
        "the standard error over rows. Lower is better.",
        f"{against} Protocol: {published['protocol']}",
        published["note"],
    ]
    return "\n\n".join(filter(None, paragraphs))


def _published(facts: Facts) -> str:
    """The published figure as text."""
    value, error = facts["published"]["value"], facts["published"]["error"]
    if value is None:
        return "–"
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def _data(facts: Facts) -> str:
    data = facts["data"]
    rows = " / ".join(f"{count:,}" for count in data["rows"].values())
    columns = ", ".join(
        f"`{name}` {tuple(column['shape'])} {column['dtype']}"
        for name, column in data["columns"].items()
    )
    return (
        f"`{data['name']}`, {rows} rows ({', '.join(data['rows'])}); a row has {columns}; divided "
        f"by {data['unit']:g}; binarization: {data['binarization']}. SHA-256 over all that is "
        f"stored: `{data['sha256']}`."
    )


def _training(facts: Facts) -> str:
    fit = facts["fit"]
    chosen = ", ".join(
        f"{name} {fit[name]}" for name in _FIT if name in fit and fit[name] is not None
    )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    whose = {"recipe": "the recipe's", "paper": "the paper's"}[facts["protocol"]]
    return (
        f"One run, seed {facts['seed']}, {facts['epochs_done']} epochs; weights of epoch "
        f"{facts['best_epoch']}. Optimization: {whose} ({chosen}). {versions}; "
        f"{facts['created'][:10]}. `ppl-vae reproduce {facts['reproduction']}` makes it anew."
    )


_FIT = (
    "optimizer",
    "learning_rate",
    "batch_size",
    "schedule",
    "warmup",
    "patience",
    "average",
    "objective",
    "precision",
)


def _storage(facts: Facts) -> str:
    stored = facts["stored"]
    how = {
        16: "float16",
        8: "int8 with a step for each row of a matrix, vectors in float16",
    }[stored["bits"]]
    return (
        f"{stored['bytes']:,} bytes, {how}; in float32 once loaded. That changed the NLL by "
        f"{stored['difference']:+.4f} ± {stored['difference_se']:.4f} nats, of {stored['rows']} "
        f"test rows, {stored['samples']:,} importance draws a row, the same before and after "
        f"({stored['nll_before']:.3f} and {stored['nll_after']:.3f})."
    )


def _loading(facts: Facts) -> str:
    name = facts["name"]
    return (
        f'```python\nfrom ppl_vae import pretrained\n\nfitted = pretrained.load("{name}")\n```\n\n'
        f"`ppl-vae load {name}` makes a run's folder of it, runs/{name}, for `ppl-vae evaluate`, "
        "`check` and `sample`."
    )


def _limits(facts: Facts) -> Iterator[str]:
    data, published = facts["data"], facts["published"]
    yield (
        "Compare its figures only with others of the same protocol: the same split and bits, the "
        "same way to estimate. Grey values, bits drawn otherwise, images resampled otherwise, and "
        "estimates from fewer draws have other figures."
        if published["measure"] != "error"
        else "Compare its error only with others of as many labels and the same test rows."
    )
    yield (
        f"It knows `{data['name']}` and nothing else. Its likelihood of other data is no test of "
        "whether they are of the same kind: models such as this give some of them more (Nalisnick "
        "et al. 2019, arXiv:1810.09136)."
    )
    yield "One run: other seeds have other figures; the standard error above is over rows alone."
    yield from _doubts(facts["figures"])
    if data["binarization"] == "dynamic":
        yield "It models bits, drawn from grey values, and not the grey values."
    yield "Weights alone: the state of the optimizer is not kept, so that the fit cannot go on."
    yield (
        "Its draws and reconstructions are not observations: no measurement, identification or "
        "decision should rest on them."
    )


def _doubts(figures: dict[str, Any]) -> Iterator[str]:
    """How far the NLL can be believed."""
    share = (figures.get("pareto_k") or {}).get("share_above_0.7")
    if share is None:
        return
    yield (
        f"The estimated NLL is too high on average, the more so the worse the guide: for "
        f"{100 * share:.0f} % of the rows, Pareto-k is above 0.7, where importance sampling is not "
        "to be relied on (Vehtari et al. 2024, arXiv:1507.02646)."
    )
