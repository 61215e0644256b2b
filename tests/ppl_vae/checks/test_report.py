from __future__ import annotations

import base64
from html.parser import HTMLParser
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from benchmarks.conjugate import exact
from ppl_vae.checks import CHECKS, EXACT, check, support
from ppl_vae.data import as_dataset
from ppl_vae.model import GenerativeModel
from ppl_vae.models.ppca import PPCA

QUICK: dict[str, Any] = {
    "only": ["support", "prior_predictive", "population_predictive"],
    "population_predictive": {"replicates": 100, "rows": 100},
    "to_arviz": {"rows": 5, "draws": 4},
}


class Page(HTMLParser):
    """What a page holds, and whether its tags are closed in order."""

    EMPTY = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "img":
            self.images.append(found["src"])
        self.links += [value for name, value in attrs if name == "href"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model = PPCA(latents=2, observed=4, scale=0.7)
    return model, exact(model)


@pytest.fixture(scope="module")
def rows(pair):
    torch.manual_seed(1)
    x = pair[0].simulate(400)["x"]
    return {"train": x[:200], "test": x[200:]}


def test_the_page_needs_nothing_else(pair, rows, tmp_path):
    wrong = rows | {"test": 2 * rows["test"]}
    report = check(*pair, as_dataset(wrong), out=tmp_path, **QUICK)
    html = (tmp_path / "index.html").read_text("utf-8")
    page = Page(html)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert "http://" not in html
    assert "https://" not in html
    files = sorted(path.read_bytes() for path in (tmp_path / "figures").iterdir())
    prefix = "data:image/png;base64,"
    assert all(image.startswith(prefix) for image in page.images)
    assert sorted(base64.b64decode(image[len(prefix) :]) for image in page.images) == files
    assert len(files) == 2
    text = " ".join("".join(page.text).split())
    failed = next(r for r in report.results if r.name == "population_predictive")
    assert failed.meaning in text
    assert "1 of 2 checks found a fault: population predictive." in text
    # Verdicts stand before pictures, what failed before what passed.
    assert html.index("population predictive</a>") < html.index("support</a>") < html.index("<img")
    assert "Does not apply: the model has no global latent" in text
    for picture in failed.pictures.values():
        assert picture.caption in text
    for record in failed.statistics:
        assert record["statistic"] in text


def test_names_cannot_become_markup(pair, rows, tmp_path):
    options = QUICK | {
        "only": ["population_predictive"],
        "population_predictive": {"replicates": 100, "statistics": {"<b>&bold": torch.mean}},
    }
    check(*pair, as_dataset(rows), out=tmp_path, **options)
    html = (tmp_path / "index.html").read_text("utf-8")
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;bold" in html


def test_the_error_rate_is_shared(pair, rows):
    report = check(*pair, as_dataset(rows), level=0.1, **QUICK)
    # Three checks, of which chance enters two; one of these does not apply, and keeps its share.
    assert [r.error_rate for r in report.results] == pytest.approx([0.0, 0.05])
    assert report.settings["level"] == 0.1
    assert set(report.questions) == set(QUICK["only"])
    with pytest.raises(ValueError, match=r"level=1\.5"):
        check(*pair, as_dataset(rows), level=1.5)


def test_every_check_says_what_it_looks_for():
    assert set(CHECKS) >= EXACT
    for function in CHECKS.values():
        first = (function.__doc__ or "").splitlines()[0]
        assert first.endswith((".", "?"))
        assert len(first) > 20


class Grey(GenerativeModel):
    """Bits whose logits are a latent; it does not look at what it is given."""

    def forward(self, x=None, *, n=None, total=None):
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            likelihood = dist.Bernoulli(logits=z, validate_args=False).to_event(1)
            return pyro.sample("x", likelihood, obs=x)


class Wide(GenerativeModel):
    """Its own prior as guide."""

    def forward(self, x=None, *, n=None, total=None):
        with self.rows(x, n=n, total=total):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def test_grey_pixels_under_a_bernoulli_are_found_and_nothing_else_is_said():
    grey = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    data = as_dataset({"train": grey.round(), "test": grey})
    result = support(Grey(), Wide(), data)
    assert [record["error"] == "" for record in result.statistics] == [True, False]
    assert "row 0, hold 0.4962" in result.meaning
    assert "Binarize the data" in result.meaning
    assert (result.verdict, result.error_rate, result.p) == ("fail", 0.0, None)
    report = check(Grey(), Wide(), data)
    assert [r.name for r in report.results] == ["support"]
    assert set(report.skipped) == set(CHECKS) - {"support"}
    assert not report.passed
    bits = as_dataset({"train": grey.round(), "test": grey.round()})
    assert support(Grey(), Wide(), bits).verdict == "pass"


def test_progress_names_the_checks_and_how_far_they_are(pair, rows, capsys):
    check(*pair, as_dataset(rows), progress=True, **QUICK)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"checking {name}" for name in QUICK["only"]]
    told: list[float] = []
    options = QUICK["population_predictive"]
    CHECKS["population_predictive"](*pair, as_dataset(rows), progress=told.append, **options)
    assert told == sorted(told)
    assert told[-1] == 1.0
