"""What was published: that recipes can make it, and that it is what was published."""

from __future__ import annotations

import inspect
import re
from collections import Counter

import pytest

from ppl_vae.data.sources import DataNotFoundError, data_home
from ppl_vae.fitting import fit
from ppl_vae.recipes import build, recipes
from ppl_vae.reproduction.figure import Group, Published
from ppl_vae.reproduction.published import each_figure, find_published, groups, published

FIGURES = {figure.name: (group, figure) for group, figure in each_figure()}
RECIPES = recipes()

each = pytest.mark.parametrize(("group", "figure"), FIGURES.values(), ids=FIGURES)


def test_names_are_unique_and_can_be_typed() -> None:
    names = Counter(figure.name for _, figure in each_figure())
    assert names.most_common(1)[0][1] == 1
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name) for name in names)
    assert list(published()) == list(names)


def test_a_name_that_is_not_there_is_refused() -> None:
    assert find_published("iwae-mnist-k5").value == 85.54
    with pytest.raises(ValueError, match=r"'iwae-mnist-k6'; did you mean 'iwae-mnist-k5'"):
        find_published("iwae-mnist-k6")


@each
def test_the_recipe_takes_its_arguments(group: Group, figure: Published) -> None:
    assert figure.arguments.keys() <= inspect.signature(RECIPES[figure.recipe]).parameters.keys()


@each
def test_the_papers_settings_are_those_of_a_fit(group: Group, figure: Published) -> None:
    settings = figure.paper or {}
    assert settings.keys() <= inspect.signature(fit).parameters.keys() - {"model", "guide", "data"}
    assert None not in settings.values(), "None stands for the recipe's own"


@each
def test_the_value_is_the_one_that_is_documented(group: Group, figure: Published) -> None:
    if figure.value is None:
        assert "none" in group.source
        return
    said = f"{inspect.getdoc(RECIPES[figure.recipe])} {figure.note}"
    assert re.search(rf"(?<![\d.]){re.escape(f'{figure.value:g}')}0*(?![\d.]\d)", said)


@pytest.mark.parametrize("group", groups(), ids=lambda group: group.title)
def test_a_table_has_one_measure(group: Group) -> None:
    assert len({figure.measure for figure in group.figures}) == 1
    assert "NLL" in group.protocol or group.figures[0].measure != "nll"


@each
def test_values_are_plausible(group: Group, figure: Published) -> None:
    if figure.value is None:
        return
    if figure.measure == "error":
        assert 0.5 < figure.value < 15
        assert 0 <= (figure.error or 0) < figure.value / 2
    elif "mnist" in figure.name:
        assert 78 < figure.value < 120
    else:
        assert 100 < figure.value < 2000


@pytest.mark.parametrize("name", [name for name in FIGURES if "vamp-" in name])
def test_a_vamp_prior_is_better_than_none(name: str) -> None:
    known = published()
    plain = known.get(name.replace("vamp-", "", 1)) or known[name.replace("vamp-", "vae-", 1)]
    vamp = known[name]
    assert vamp.paper == plain.paper
    if vamp.value is not None:
        assert plain.value is not None
        assert plain.value - 10 < vamp.value < plain.value


@pytest.mark.parametrize("pattern", ["iwae-mnist-k{}", "iwae2-mnist-k{}", "iwae-mnist-k{}-dreg"])
def test_more_draws_are_better(pattern: str) -> None:
    one, five, fifty = (published()[pattern.format(draws)].value for draws in (1, 5, 50))
    assert one is not None
    assert five is not None
    assert fifty is not None
    assert one > five > fifty > one - 3


@pytest.mark.parametrize(
    ("group", "figure"),
    [
        pytest.param(*known, marks=[] if "static" in name else pytest.mark.slow, id=name)
        for name, known in FIGURES.items()
    ],
)
def test_the_recipe_builds_where_its_data_are(group: Group, figure: Published) -> None:
    if not figure.recipe.endswith("digits") and not data_home().is_dir():
        pytest.skip(f"needs data in {data_home()}; set PPL_VAE_DATA")
    try:
        made = build(figure.recipe, figure.arguments, seed=0)
    except DataNotFoundError as error:
        pytest.skip(str(error))
    assert {"train", "test"} <= made.data.splits.keys()
    if figure.paper is not None:
        left = made.fit.keys() - figure.paper.keys() - {"objective"}
        assert not left, "the recipe's own, which the authors may not have had"
