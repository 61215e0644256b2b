"""Importance sampling: no figure depends on how the work is split, or on compiling it."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from ppl_vae import importance
from ppl_vae.conditionals import Normal
from ppl_vae.data import Dataset, Rows
from ppl_vae.evaluation import Evaluation, evaluate
from ppl_vae.graphs import Graph, Untraceable
from ppl_vae.guide import Factorized
from ppl_vae.guides.full_rank import FullRank
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.importance import Budget, Figures, mean_figures
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.model import GenerativeModel, own_parameters
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.sites import evaluating

ROWS = 23


class TwoLevels(GenerativeModel):
    """z2 ~ Normal(0, I); z1 ~ Normal(f(z2)); x ~ Bernoulli(g(z1))."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.bottom = StandardNormal(2), Normal(MLP(2, 4, 6))
        self.likelihood = Bernoulli(MLP(3, 4, 5))

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        with self.rows(x, n=n, total=total):
            z2 = pyro.sample("z2", self.top())
            z1 = pyro.sample("z1", self.bottom(z2))
            return pyro.sample("x", self.likelihood(z1), obs=x)


class Branching(VAE):
    """Asks for the value of a tensor, which no flat graph can."""

    def x_dist(self, z: Tensor) -> Any:
        return self.likelihood(z if z.sum() > 0 else z + 0)


def vae(kind: type[VAE] = VAE) -> tuple[VAE, MeanField]:
    model = kind(StandardNormal(2), Bernoulli(MLP(2, 8, 6))).double()
    return model, MeanField(model, MLP(6, 8, 8).double(), model.simulate(4)["x"]).double()


def with_a_global_site() -> tuple[Template, MeanField]:
    model = Template.toy().double()
    return model, MeanField(model, MLP(4, 8, 8).double(), model.simulate(4)["x"]).double()


def two_levels() -> tuple[TwoLevels, MeanField]:
    model = TwoLevels().double()
    return model, MeanField(model, MLP(5, 8, 8).double(), model.simulate(4)["x"]).double()


def linear() -> tuple[PPCA, FullRank]:
    model = PPCA(2, 5, scale=0.7).double()
    return model, FullRank(model, MLP(5, 8, 8).double(), model.simulate(4)["x"]).double()


PAIRS = [vae, with_a_global_site, two_levels, linear]


def make(pair: Any) -> tuple[Any, Any, Tensor]:
    """A pair and data, the same at each call."""
    torch.manual_seed(0)
    model, guide = pair()
    return model, guide, model.simulate(ROWS)["x"]


def rows_of(x: Tensor) -> Rows:
    return Dataset("x", {"train": {"x": x}}).split("train")


def means(pair: Any, budget: Budget, samples: int = 10, **kwargs: Any) -> Figures:
    model, guide, x = make(pair)
    with evaluating(3, model, guide):
        return mean_figures(
            model, guide, rows_of(x), samples=samples, budget=budget, **{"compile": False} | kwargs
        )


def assert_same(figures: Figures, expected: Figures) -> None:
    assert figures.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            figures[key], value, rtol=1e-11, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}"
        )


def in_one_piece(pair: Any, samples: int) -> Figures:
    """The definition, from the same draws: the whole split scored at once, nothing expanded."""
    model, guide, x = make(pair)
    with evaluating(3, model, guide), own_parameters(model, guide):
        drawn, figures = importance.draw(guide, {"x": x}, samples)
        scores = importance.score(model, {"x": x}, drawn, samples)
        figures |= scores
    log_weights = scores["elbo", ""]
    result = {key: value.mean(0) for key, value in figures.items()}
    result["log evidence", ""] = log_weights.exp().mean(0).log()
    return {key: value.expand(ROWS, *value.shape[1:]) for key, value in result.items()}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("chunk", [1, 4, 10, 37, 10_000])
def test_no_figure_depends_on_the_chunks(pair: Any, chunk: int) -> None:
    assert_same(means(pair, Budget(10_000, chunk)), in_one_piece(pair, 10))


def test_every_draw_of_every_row_counts_once_whatever_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a density of 1 for every draw but a known weight, figures are known."""
    blocks: list[tuple[int, int]] = []
    chunks: list[tuple[int, int]] = []
    draw, score = importance.draw, importance.score

    def drawing(guide: Any, batch: Any, draws: int, values: Any) -> Any:
        blocks.append((draws, len(batch["x"])))
        return draw(guide, batch, draws, values)

    def scoring(model: Any, batch: Any, drawn: Any, draws: int) -> Any:
        chunks.append((draws, len(batch["x"])))
        return score(model, batch, drawn, draws)

    monkeypatch.setattr(importance, "draw", drawing)
    monkeypatch.setattr(importance, "score", scoring)
    means(vae, Budget(100, 40), samples=10)
    assert blocks == [(10, 8), (10, 8), (10, 7)]
    assert chunks == [(10, 4)] * 6  # of 7 rows, the last 4 overlap the first
    blocks.clear()
    chunks.clear()
    means(vae, Budget(60, 50), samples=100)
    assert blocks == [(50, 1), (50, 1)] * ROWS
    assert chunks == [(50, 1)] * 2 * ROWS
    blocks.clear()
    means(vae, Budget(60, 50), samples=101)
    assert blocks == [(51, 1), (50, 1)] * ROWS


def test_the_encoder_sees_each_row_once() -> None:
    model, guide, x = make(vae)
    seen: list[int] = []
    guide.encoder.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    with evaluating(0, model, guide):
        budget = Budget(block=5000, chunk=70)
        mean_figures(model, guide, rows_of(x), samples=500, budget=budget, compile=False)
    assert seen.pop(0) == 2  # by which sites are found
    assert sum(seen) == ROWS
    assert len(seen) == 3


def test_what_does_not_depend_on_draws_is_computed_once() -> None:
    for pair, draws_of_closed_kl in ((vae, {"z": 1}), (two_levels, {"z2": 1, "z1": 7})):
        model, guide, x = make(pair)
        with evaluating(0, model, guide):
            drawn, figures = importance.draw(guide, {"x": x}, 7)
            figures |= importance.score(model, {"x": x}, drawn, 7)
        for site, draws in draws_of_closed_kl.items():
            assert figures["posterior mean", site].shape[:2] == (1, ROWS)
            assert figures["kl per latent", site].shape[:2] == (draws, ROWS)
            assert figures["kl", site].shape == (7, ROWS)


def test_closed_kl_of_a_lower_level_is_the_mean_over_the_upper() -> None:
    figures = means(two_levels, Budget(10_000, 10_000), samples=4000)
    for site in ("z1", "z2"):
        closed = figures["kl per latent", site].sum(-1)
        torch.testing.assert_close(closed, figures["kl", site], rtol=0.1, atol=0.1)
        assert abs(closed.mean() - figures["kl", site].mean()) < 0.02


def test_draws_that_come_one_at_a_time_make_one_log_mean_exp() -> None:
    """Three draws with known weights, of the second of two rows."""
    arriving = importance._Means(rows=2, samples=3)
    for weight in torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64):
        arriving.add({("elbo", ""): weight.log().expand(1, 1)}, slice(1, 2), draws=1)
    result = arriving.result()
    torch.testing.assert_close(result["log evidence", ""].exp()[1].item(), 3.0)
    torch.testing.assert_close(result["elbo", ""][1].exp().item(), 12 ** (1 / 3))


def test_memory_and_the_cache_bound_what_is_made_at_once() -> None:
    model, guide, x = make(vae)
    some = {"x": x[:4]}
    with evaluating(0, model, guide):
        one, two, plenty = (
            importance.budget(model, guide, some, samples=50, memory=memory)
            for memory in (1, 2, 10**6)
        )
        drawn, _ = importance.draw(guide, some, 16)
        with importance.OutputBytes() as made:
            importance.score(model, some, drawn, 16)
    bytes_a_draw = made.bytes / 16 / 4
    assert one.chunk * bytes_a_draw == pytest.approx(2**20 / 2, rel=0.01)
    assert two.chunk == pytest.approx(2 * one.chunk, abs=1)
    assert plenty.chunk * bytes_a_draw == pytest.approx(importance.CACHED, rel=0.02)
    assert one.block > one.chunk


class Wide(VAE):
    """Makes a wide table once, whatever the rows, as a mixture of posteriors does."""

    def x_dist(self, z: Tensor) -> Any:
        return self.likelihood(z + 0 * torch.ones(200_000, dtype=z.dtype).mul(2).sum())


def test_what_is_made_once_for_all_rows_takes_no_share_of_the_chunk() -> None:
    found = []
    for kind in (VAE, Wide):
        model, guide = vae(kind)
        with evaluating(0, model, guide):
            some = {"x": model.simulate(4)["x"]}
            found.append(importance.budget(model, guide, some, samples=50, memory=512))
    plain, wide = found
    assert wide.block == plain.block
    assert wide.chunk == pytest.approx(plain.chunk, rel=0.05)  # a sum more


class Shared(VAE):
    """A global latent, drawn once a draw, whatever the rows."""

    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([20_000]).to_event(1))
        return super().forward(x, n=n, total=total)


def test_what_is_made_once_a_draw_is_bounded_too() -> None:
    """By no more draws than if each had but one row."""
    model, guide = vae(Shared)
    with evaluating(0, model, guide):
        some = {"x": model.simulate(4)["x"]}
        found = importance.budget(model, guide, some, samples=50, memory=512)
    assert 8 * 20_000 * found.chunk / 4 < importance.CACHED


@pytest.mark.parametrize(
    ("pair", "budget", "runs"),
    [
        (vae, Budget(60, 60), 3),  # and the last block, smaller, runs eagerly
        (with_a_global_site, Budget(80, 35), 9),
        pytest.param(two_levels, Budget(80, 35), 9, marks=pytest.mark.slow),
        pytest.param(linear, Budget(80, 35), 9, marks=pytest.mark.slow),
    ],
)
def test_compiled_figures_are_those_of_eager_scoring(
    pair: Any, budget: Budget, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    compiled = importance._compiled

    def counting(*args: Any) -> Any:
        program = compiled(*args)
        assert program is not None
        return lambda *leaves: ran.append(1) or program(*leaves)

    monkeypatch.setattr(importance, "_compiled", counting)
    figures = means(pair, budget, compile=True)
    assert len(ran) == runs
    assert_same(figures, means(pair, budget))


@pytest.mark.slow
def test_float32_loses_no_more_than_its_rounding() -> None:
    """Sums over 784 pixels in float32, of either order, against float64."""
    torch.manual_seed(0)
    model = VAE(StandardNormal(5), Bernoulli(MLP(5, 50, 784)))
    x = model.simulate(20)["x"]
    guide = MeanField(model, MLP(784, 20), x)
    data = {"train": x, "test": x}
    eager, compiled = (
        evaluate(model, guide, data, samples=200, compile=compile) for compile in (False, True)
    )
    assert compiled.nll == pytest.approx(eager.nll, rel=1e-7)
    # The same draws, in float64.
    with evaluating(0, model, guide):
        drawn, _ = importance.draw(guide, {"x": x}, 200)
        single = importance.score(model, {"x": x}, drawn, 200)
        values = {name: value.double() for name, value in drawn.values.items()}
        drawn = importance.Draws(values, drawn.log_q, {})
        double = importance.score(model.double(), {"x": x.double()}, drawn, 200)
    error = single["elbo", ""] - double["elbo", ""]
    assert error.abs().max() < 1e-6 * double["elbo", ""].abs().max()


def test_compiled_evidence_of_ppca_is_exact() -> None:
    """With the exact posterior every draw's weight is the evidence."""
    torch.manual_seed(0)
    model = PPCA(2, 5, scale=0.7).double()

    class Exact(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return model.posterior(x)

    x = model.simulate(ROWS)["x"]
    guide = Factorized(z=(Exact(), ["x"]))
    result = evaluate(model, guide, {"train": x, "test": x}, samples=3, compile=True)
    assert -result.nll == pytest.approx(model.evidence(x).mean().item(), rel=1e-12)


def evaluated(pair: Any, **kwargs: Any) -> Evaluation:
    model, guide, x = make(pair)
    return evaluate(model, guide, {"train": x, "test": x}, samples=20, **kwargs)


def test_a_program_that_cannot_be_recorded_runs_eagerly_with_one_warning() -> None:
    def branching() -> Any:
        return vae(Branching)

    with pytest.warns(RuntimeWarning, match=r"evaluation runs eagerly.*z.sum\(\) > 0") as caught:
        result = evaluated(branching, compile=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert result == evaluated(branching, compile=False)


def test_without_a_compiler_evaluation_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(self: Graph, *_: Tensor) -> Any:
        raise Untraceable("no C++ compiler")

    monkeypatch.setattr(Graph, "compile", compile)
    with pytest.warns(RuntimeWarning, match=r"evaluation runs eagerly.*no C\+\+ compiler"):
        result = evaluated(vae, compile=True)
    assert result == evaluated(vae, compile=False)


def test_compiling_waits_until_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(importance, "_compiled", lambda *_: asked.append(1))
    means(vae, Budget(80, 20), compile="auto")
    assert not asked  # a dozen chunks of milliseconds
    monkeypatch.setattr(importance, "COMPILING", 0.0)
    means(vae, Budget(80, 20), compile="auto")
    assert len(asked) == 1
    means(vae, Budget(80, 20), compile=False)
    assert len(asked) == 1


def test_auto_weighs_the_time_that_is_left() -> None:
    scorer = importance._Scorer(nn.Module(), "auto", chunks=1000)  # pyright: ignore
    scorer._seconds = [100.0]
    assert not scorer._pays()  # a first call may have warmed up
    scorer._seconds += [importance.COMPILING / importance.SAVED / 990]
    assert scorer._pays()
    scorer._left = 980
    assert not scorer._pays()
