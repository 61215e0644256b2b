"""The whole report on pairs of every kind: each is made, saved, and can be read back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from ppl_vae import zoo
from ppl_vae.checks import CHECKS, check
from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset, as_dataset
from ppl_vae.discrete import Labels
from ppl_vae.draws import observed
from ppl_vae.guide import Factorized, Prior
from ppl_vae.model import GenerativeModel, own_parameters
from ppl_vae.models._template import Template
from ppl_vae.models.mixture_vae import MixtureVAE
from ppl_vae.models.semi_supervised import M2
from ppl_vae.nn import MLP
from ppl_vae.sites import check_pair, read_sites

ROWS = 120  # of each split
SIZES: dict[str, dict[str, Any]] = {
    "structure": {"rows": 8},
    "row_order": {"rows": 30, "samples": 2, "permutations": 240},
    "prior_predictive": {"rows": 30, "replicates": 240},
    "population_predictive": {"rows": 30, "replicates": 240},
    "posterior_predictive": {"rows": 30, "replicates": 240},
    "generalization": {"rows": 30, "samples": 2},
    "simulation_based_calibration": {"rows": 100, "draws": 4},
    "local_calibration": {"rows": 200, "draws": 4},
    "latent_use": {"rows": 20, "samples": 2},
    "aggregate_posterior": {"rows": 40},
    "evidence": {
        "rows": 4,
        "samples": 30,
        "annealed_rows": 2,
        "simulated_rows": 2,
        "temperatures": 4,
        "chains": 2,
        "leapfrog": 1,
        "compile": False,
    },
    "gaps": {"rows": 4, "steps": 2, "draws": 2, "samples": 8, "compile": False},
    "label_calibration": {"samples": 4, "replicates": 480},
    "to_arviz": {"rows": 6, "draws": 4},
}
GROUPS = {
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
    "log_likelihood",
    "sample_stats",
}

Case = tuple[GenerativeModel, nn.Module, Dataset]


class Scalar(GenerativeModel):
    """A latent without event dims: z ~ Normal(0, 1), x ~ Normal(z, 1), of three columns."""

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            return pyro.sample(
                "x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x
            )


class OfScalar(Scalar):
    """Its posterior."""

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        assert x is not None
        with self.rows(x, n=n, total=total):
            return pyro.sample("z", dist.Normal(x.sum(-1) / 4, 0.5))


class Pictures(GenerativeModel):
    """Two event dims of latents and of data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 6)

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
            mean = self.net(z.flatten(-2)).unflatten(-1, (2, 3))
            return pyro.sample("x", dist.Normal(mean, 1.0).to_event(2), obs=x)


class OfPictures(GenerativeModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 4)

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        assert x is not None
        with self.rows(x, n=n, total=total):
            mean = self.net(x.flatten(-2)).unflatten(-1, (2, 2))
            return pyro.sample("z", dist.Normal(mean, 0.8).to_event(2))


class Parts(GenerativeModel):
    """A further plate beside that of the rows."""

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        with self.rows(x, n=n, total=total):
            with pyro.plate("parts", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z.sum(-3), 1.0).to_event(1), obs=x)


class OfParts(GenerativeModel):
    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        assert x is not None
        with self.rows(x, n=n, total=total), pyro.plate("parts", 3, dim=-2):
            return pyro.sample("z", dist.Normal(x.unsqueeze(-3) / 4, 0.9).to_event(1))


class Levels(GenerativeModel):
    """Global latents and a local one, with and without event dims."""

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(torch.zeros(()), 0.3))
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            x_dist = dist.Normal(w + z.unsqueeze(-1), s.unsqueeze(-1)).to_event(1)
            return pyro.sample("x", x_dist, obs=x)


class OfLevels(GenerativeModel):
    """As a user would write it: an AutoNormal for what all rows share."""

    def __init__(self, model: Levels) -> None:
        super().__init__()
        self.shared = AutoNormal(poutine.block(model, expose=["w", "s"]))
        self.net = nn.Linear(3, 1)

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        assert x is not None
        self.shared(x, n=n, total=total)
        with self.rows(x, n=n, total=total):
            return pyro.sample("z", dist.Normal(self.net(x).squeeze(-1), 0.7))


class Shared(GenerativeModel):
    """A global latent, and no other."""

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with self.rows(x, n=n, total=total):
            return pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)


def rows_of(model: GenerativeModel, labels: str = "all") -> Dataset:
    """What the model emits, with all labels, some of them, or none."""
    drawn = model.observed(model.simulate(2 * ROWS, **model.example_covariates(2 * ROWS)))
    if "y" in drawn and model.classes is not None:
        drawn["y"] = drawn["y"].argmax(1)
    if labels == "none":
        del drawn["y"]
    data = as_dataset(
        {
            name: {column: values[part] for column, values in drawn.items()}
            for name, part in (("train", slice(ROWS)), ("test", slice(ROWS, None)))
        }
    )
    return data.labeled(30) if labels == "some" else data


def derived(model: type[GenerativeModel], guide: str, dtype: torch.dtype = torch.float32) -> Case:
    toy = model.toy().to(dtype)
    example = toy.observed(toy.simulate(4, **toy.example_covariates(4)))
    if all(site.observed for site in read_sites(toy, **example).values()):
        return toy, Prior(toy), rows_of(toy)
    net = MLP(sum(x.shape[-1] for x in example.values()), 8, 7).to(dtype)
    return toy, zoo.guides()[guide](toy, net, **example).to(dtype), rows_of(toy)


def m2(labels: str) -> Case:
    model = M2.toy()
    sites: dict[str, Any] = {
        "y": (Labels(MLP(6, 8, 3), estimator="enumerate"), ["x"]),
        "z": (Normal(MLP(6 + 3, 8, 4)), ["x", "y"]),
    }
    return model, Factorized(**sites), rows_of(model, labels)


def mixture(labels: str) -> Case:
    model = MixtureVAE.toy()
    sites: dict[str, Any] = {"z": (Normal(MLP(6, 8, 4)), ["x"])}
    return model, Factorized(**sites), rows_of(model, labels)


def with_shared(model: GenerativeModel, guide: nn.Module) -> Case:
    """An autoguide makes its parameters when it is first run."""
    data = rows_of(model)
    with own_parameters(model, guide):
        guide(data.splits["train"]["x"][:8])
    return model, guide, data


def own(model: GenerativeModel, guide: nn.Module) -> Case:
    return model, guide, rows_of(model)


FEW: Mapping[str, Callable[[], Case]] = {
    "some labels": lambda: m2("some"),
    "levels": lambda: with_shared(model := Levels(), OfLevels(model)),
}
MORE: Mapping[str, Callable[[], Case]] = {
    **{
        f"{name} with MeanField": lambda model=model: derived(model, "MeanField")
        for name, model in zoo.models().items()
    },
    **{
        f"VAE with {name}": lambda name=name: derived(zoo.models()["VAE"], name)
        for name in zoo.guides()
    },
    "covariates, float64": lambda: derived(
        zoo.models()["ConditionalVAE"], "MeanField", torch.float64
    ),
    "Template": lambda: derived(Template, "MeanField"),
    "Template, float64": lambda: derived(Template, "NormalizingFlow", torch.float64),
    "M2, all labels": lambda: m2("all"),
    "M2, no labels": lambda: m2("none"),
    "MixtureVAE, no labels": lambda: mixture("none"),
    "MixtureVAE, some labels": lambda: mixture("some"),
    "scalar": lambda: own(Scalar(), OfScalar()),
    "pictures": lambda: own(Pictures(), OfPictures()),
    "parts": lambda: own(Parts(), OfParts()),
    "shared": lambda: with_shared(model := Shared(), AutoNormal(model)),
}


def whole_report(case: Callable[[], Case], folder: Path) -> None:
    torch.manual_seed(0)
    model, guide, data = case()
    before = torch.get_rng_state()
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", message=".* was not registered in the param store")
        report = check(model, guide, data, out=folder, **SIZES)
    assert torch.equal(before, torch.get_rng_state())
    assert {*report.skipped, *(result.name for result in report.results)} == set(CHECKS)
    assert report.results[0].passed, "the model's own data"
    page = (folder / "index.html").read_text("utf-8")
    pictures = [(r.name, name) for r in report.results for name in r.pictures]
    assert page.count("data:image/png;base64,") == len(pictures)
    assert len(list((folder / "figures").iterdir())) == len(pictures)
    found = json.loads((folder / "check.json").read_text("utf-8"))
    for result in found["checks"]:
        assert len({tuple(record) for record in result["statistics"]}) == 1, result["name"]
        assert result["meaning"] in report.results[found["checks"].index(result)].meaning
    sites = read_sites(model, **observed(model, data.split("test"), slice(2)))
    expected = set(GROUPS)
    if any(len(site.plates) > 1 for site in sites.values()):
        expected -= {"log_likelihood", "sample_stats"}
    if all(site.observed for site in sites.values()):
        expected -= {"posterior", "prior"}
    with xarray.open_datatree(folder / "idata.nc") as tree:
        assert {name for name in GROUPS if name in tree.children} == expected
        for result in report.results:
            assert set(result.groups) <= set(tree.children)


@pytest.mark.parametrize("name", FEW)
def test_the_whole_report_is_made(name: str, tmp_path: Path) -> None:
    whole_report(FEW[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_the_whole_report_is_made_of_every_pair(name: str, tmp_path: Path) -> None:
    whole_report(MORE[name], tmp_path)


def skipped(case: Case, *names: str, split: str = "test") -> Mapping[str, str]:
    sizes = {name: SIZES[name] for name in (*names, "to_arviz")}
    return check(*case, only=names, split=split, **sizes).skipped


def test_labels_that_are_withheld_from_the_split_are_no_data() -> None:
    names = ("population_predictive", "posterior_predictive", "label_calibration")
    why = skipped(m2("some"), *names, split="train")
    assert why == {
        "label_calibration": "labels are withheld from rows of 'train': none to compare with"
    }


def test_a_further_plate_is_no_error() -> None:
    why = skipped(own(Parts(), OfParts()), "row_order", "generalization", "latent_use")
    assert set(why) == {"row_order", "generalization", "latent_use"}
    assert all("'z' stands in plates data, parts" in reason for reason in why.values())


def test_one_row_is_too_few_and_no_error() -> None:
    model = Scalar()
    x = model.simulate(50)["x"]
    data = as_dataset({"train": x, "test": x[:1]})
    names = ("population_predictive", "posterior_predictive", "row_order")
    assert set(skipped((model, OfScalar(), data), *names)) == set(names)


def test_an_autoguide_is_a_guide() -> None:
    shared = Shared()
    model, guide, data = with_shared(shared, AutoNormal(shared))
    check_pair(model, guide, x=data.splits["test"]["x"])
