"""A report as one web page that needs nothing else: verdicts first, then pictures and figures."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ppl_vae.checks.result import CheckResult

if TYPE_CHECKING:
    from ppl_vae.checks.report import Report

_ORDER = ("fail", "pass", "measured")
_STYLE = """
:root { color-scheme: light; --line: #d8dee4; --soft: #f6f8fa; --ink: #1f2328; --dim: #57606a }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0 auto; padding: 1rem;
  max-width: 64rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line);
  padding-top: 1.25rem }
p { margin: .5rem 0; overflow-wrap: anywhere }
.dim, figcaption { color: var(--dim) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem;
  border-bottom: 1px solid var(--line) }
th { background: var(--soft); white-space: nowrap }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.verdict { display: inline-block; padding: 0 .55rem; border-radius: 1rem; font-weight: 600;
  white-space: nowrap }
.fail { background: #ffebe9; color: #a40e26 }
.pass { background: #dafbe1; color: #116329 }
.measured { background: #ddf4ff; color: #0550ae }
.skipped { background: var(--soft); color: var(--dim) }
figure { margin: 1rem 0 }
img { max-width: 100%; height: auto; display: block }
figcaption { font-size: .9rem; max-width: 46rem; margin-top: .25rem }
summary { cursor: pointer; margin: .5rem 0 }
code { background: var(--soft); padding: 0 .25rem; border-radius: .25rem; overflow-wrap: anywhere }
@media (max-width: 40rem) {
  .verdicts thead { display: none }
  .verdicts tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0 }
  .verdicts td { display: block; border: 0; padding: .15rem 0; text-align: left }
  .verdicts td[data-label]::before { content: attr(data-label) " "; color: var(--dim) }
  .verdicts td:empty { display: none }
}
"""


def page(report: Report, pictures: Mapping[str, Mapping[str, bytes]]) -> str:
    """The report as HTML, its pictures within it.

    Args:
        pictures: PNG files by check and picture.
    """
    title = f"{report.settings['model']} with {report.settings['guide']}"
    body = [
        f"<h1>Checks of {escape(title)}</h1>",
        f"<p>{escape(_summary(report))}</p>",
        f'<p class="dim">{escape(_provenance(report))}</p>',
        _verdicts(report),
        *(_section(report, result, pictures.get(result.name, {})) for result in _sorted(report)),
        '<h2 id="files">Beside this page</h2><p><code>idata.nc</code>: draws, log-likelihoods, '
        "importance weights and what the checks drew, as ArviZ's DataTree "
        '(<code>xarray.open_datatree("idata.nc")</code>). <code>check.json</code>: all figures. '
        "<code>figures/</code>: the pictures.</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Checks of {escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _sorted(report: Report) -> list[CheckResult]:
    """What failed comes first."""
    return sorted(report.results, key=lambda result: _ORDER.index(result.verdict))


def _summary(report: Report) -> str:
    failed = [result.name for result in report.results if not result.passed]
    tested = sum(result.error_rate > 0 for result in report.results)
    total = sum(result.error_rate for result in report.results)
    chance = (
        f" Chance enters {tested} of them: together they fail a pair without a fault with "
        f"probability {total:.2g} at most."
        if tested
        else ""
    )
    if failed:
        found = f"{len(failed)} of {len(report.results)} checks found a fault: {_listed(failed)}."
    else:
        found = f"None of {len(report.results)} checks found a fault; other faults may remain."
    return found + chance


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names)


def _provenance(report: Report) -> str:
    known = report.settings
    versions = ", ".join(f"{name} {number}" for name, number in known["versions"].items())
    return f"Data: {known['data']}, split {known['split']}. Seed {known['seed']}. {versions}."


def _verdicts(report: Report) -> str:
    lines = [
        _line(
            f'<a href="#{result.name}">{escape(_listed([result.name]))}</a>',
            result.verdict,
            "" if result.p is None else _p(result.p),
            f"{result.error_rate:.2g}" if result.error_rate else "",
            report.questions.get(result.name, ""),
        )
        for result in _sorted(report)
    ]
    lines += [
        _line(escape(_listed([name])), "skipped", "", "", f"Does not apply: {reason}")
        for name, reason in report.skipped.items()
    ]
    return (
        '<table class="verdicts"><thead><tr><th>check</th><th>verdict</th><th>p</th>'
        "<th>fails a right pair</th><th>what it looks for</th></tr></thead>\n<tbody>"
        + "\n".join(lines)
        + "</tbody></table>"
    )


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-99 else "&lt; 1e-99"


def _line(name: str, verdict: str, p: str, rate: str, text: str) -> str:
    shown = [
        f"<td>{name}</td>",
        f'<td><span class="verdict {verdict}">{verdict}</span></td>',
        f'<td class="number" data-label="p">{p}</td>' if p else "<td></td>",
        f'<td class="number" data-label="fails a right pair:">{rate}</td>' if rate else "<td></td>",
        f"<td>{escape(text)}</td>",
    ]
    return f"<tr>{''.join(shown)}</tr>"


def _section(report: Report, result: CheckResult, pictures: Mapping[str, bytes]) -> str:
    name = _listed([result.name])
    figures = [
        f'<figure><img alt="{escape(name)}: {escape(picture)}" loading="lazy" '
        f'src="data:image/png;base64,{b64encode(pictures[picture]).decode()}">'
        f"<figcaption>{escape(made.caption)}</figcaption></figure>"
        for picture, made in result.pictures.items()
        if picture in pictures
    ]
    settings = ", ".join(f"{key} {_text(value)}" for key, value in result.settings.items())
    return "\n".join(
        [
            f'<h2 id="{result.name}">{escape(name[0].upper() + name[1:])} '
            f'<span class="verdict {result.verdict}">{result.verdict}</span></h2>',
            f'<p class="dim">{escape(report.questions.get(result.name, ""))}</p>',
            f"<p>{escape(result.meaning)}</p>",
            *figures,
            _table(result.statistics),
            f'<p class="dim">{escape(settings)}</p>' if settings else "",
        ]
    )


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return ""
    keys = list(records[0])
    head = "".join(f"<th>{escape(key.replace('_', ' '))}</th>" for key in keys)
    lines = [
        "<tr>"
        + "".join(
            f'<td class="number">{_text(record[key])}</td>'
            if isinstance(record[key], float | int) and not isinstance(record[key], bool)
            else f"<td>{_text(record[key])}</td>"
            for key in keys
        )
        + "</tr>"
        for record in records
    ]
    count = len(records)
    return (
        f"<details><summary>All figures ({count} line{'s' if count > 1 else ''})</summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>'
        + "\n".join(lines)
        + "</tbody></table></div></details>"
    )


def _text(value: Any) -> str:
    """A figure, for people; escaped."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(entry) for entry in value)
    return escape(str(value))
