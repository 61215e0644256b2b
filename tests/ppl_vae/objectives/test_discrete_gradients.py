"""Gradients of discrete latents: their means over many draws are those of sums over all values.

Each row has parameters of its own, so that its gradient is that of one draw: a batch of equal rows
is a sample of the gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn

from ppl_vae.discrete import Bits, Labels
from ppl_vae.distributions import BitVector, OneHotCategorical
from ppl_vae.guide import Factorized
from ppl_vae.model import GenerativeModel, own_parameters
from ppl_vae.nn import MLP
from ppl_vae.objectives import (
    VIMCO,
    EnumeratedELBO,
    LeaveOneOut,
    ReweightedWakeSleep,
    backward,
    plain_elbo,
)
from ppl_vae.sites import PairError

pytestmark = pytest.mark.usefixtures("float64")

DRAWS = 10_000
OBSERVED = 3
X = [1.0, 0.0, 1.0]
Z_LIMIT = 4.5  # of a standard normal: 1 of 150,000 beyond it


class RowLinear(nn.Module):
    """A linear map with parameters of its own for each row, all alike."""

    def __init__(self, inputs: int, outputs: int, rows: int, scale: float = 1.0) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        weight, bias = scale * torch.randn(inputs, outputs), scale * torch.randn(outputs)
        self.weight = nn.Parameter(weight.repeat(rows, 1, 1))
        self.bias = nn.Parameter(bias.repeat(rows, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-1) * self.weight).sum(-2) + self.bias


class Layers(GenerativeModel):
    """Bits above bits above x; without the top, labels or bits above x.

    The last entry of x does not depend on z. ``offset``, its logit, is about what it adds to
    log p(x | z) where it is far below 0.
    """

    def __init__(self, kind: str, rows: int, offset: Tensor | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.root = nn.Parameter(torch.randn(2).repeat(rows, 1))
        self.below = RowLinear(2, 2, rows)
        self.decoder = RowLinear(2, OBSERVED - 1, rows)
        self.offset = torch.zeros(rows) if offset is None else offset

    def forward(self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None):
        with self.rows(x, n=n, total=total):
            family = OneHotCategorical if self.kind == "labels" else BitVector
            z = pyro.sample("z2" if self.kind == "layers" else "z1", family(logits=self.root))
            if self.kind == "layers":
                z = pyro.sample("z1", BitVector(self.below(z)))
            return pyro.sample("x", self.x_dist(z), obs=x)

    def x_dist(self, z: Tensor) -> BitVector:
        logits = self.decoder(z)
        offset = self.offset.unsqueeze(-1).expand(*logits.shape[:-1], 1)
        return BitVector(torch.cat([logits, offset], -1))

    @classmethod
    def toy(cls) -> Any:
        raise NotImplementedError


def pair(kind: str, rows: int, offset: Tensor | None = None, **settings: Any) -> Any:
    """A model, a guide and x, all rows alike; the same parameters for any number of rows."""
    torch.manual_seed(1)
    head = Labels if kind == "labels" else Bits
    model = Layers(kind, rows, offset)
    sites: dict[str, Any] = {"z1": (head(RowLinear(OBSERVED, 2, rows), **settings), ["x"])}
    if kind == "layers":
        sites["z2"] = (head(RowLinear(2, 2, rows), **settings), ["z1"])
    return model, Factorized(**sites), torch.tensor(X).expand(rows, -1).contiguous()


def values(kind: str) -> list[dict[str, Tensor]]:
    """All values of the latents of a row."""
    vectors = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))
    if kind == "labels":
        return [{"z1": row} for row in torch.eye(2)]
    if kind == "bits":
        return [{"z1": row} for row in vectors]
    return [{"z1": one, "z2": two} for one in vectors for two in vectors]


def logs(model: Layers, guide: Any, x: Tensor, given: dict[str, Tensor]) -> Any:
    """log p(x, z) and log q(z | x), ``(rows,)``, written out."""
    family = OneHotCategorical if model.kind == "labels" else BitVector
    z1 = given["z1"]
    log_p = model.x_dist(z1).log_prob(x)
    log_q = family(logits=guide.conditionals["z1"].net(x)).log_prob(z1)
    if model.kind == "layers":
        z2 = given["z2"]
        log_p = log_p + BitVector(model.below(z2)).log_prob(z1)
        log_p = log_p + BitVector(model.root).log_prob(z2)
        return log_p, log_q + BitVector(guide.conditionals["z2"].net(z1)).log_prob(z2)
    return log_p + family(logits=model.root).log_prob(z1), log_q


def held(*programs: nn.Module) -> list[Tensor]:
    """Parameters with a row each, but for those of baselines."""
    return [
        parameter
        for program in programs
        for name, parameter in program.named_parameters()
        if "baseline" not in name
    ]


def sample(objective: Any, model: Layers, guide: Factorized, x: Tensor) -> list[Tensor]:
    """Gradients of one draw a row: ``(rows, ...)`` each."""
    leaves = held(model, guide)
    for leaf in leaves:
        leaf.grad = None
    with own_parameters(model, guide):
        backward(objective, model, guide, x)
    # What a row has no part in, such as what only another estimator would learn, has gradient 0.
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in leaves]


def exact(kind: str, loss: Callable[..., Tensor], model: Layers, guide: Factorized, x: Tensor):
    """Gradients of a loss of ``log p`` and ``log q`` of all values, ``(values, rows)``."""
    found = [logs(model, guide, x, given) for given in values(kind)]
    log_p, log_q = (torch.stack(part) for part in zip(*found, strict=True))
    gradients = torch.autograd.grad(
        loss(log_p, log_q).sum(), held(model, guide), allow_unused=True, materialize_grads=True
    )
    return [gradient[0] for gradient in gradients]


def elbo(log_p: Tensor, log_q: Tensor) -> Tensor:
    return -(log_q.exp() * (log_p - log_q)).sum(0)


def assert_means(draws: list[Tensor], expected: list[Tensor]) -> None:
    assert any(e.abs().max() > 1e-3 for e in expected)
    for drawn, mean in zip(draws, expected, strict=True):
        error = drawn.std(0) / len(drawn) ** 0.5
        z = (drawn.mean(0) - mean).abs() / error.clamp(min=1e-12)
        assert z.max() < Z_LIMIT


SETTINGS = {
    "none": {},
    "average": {"baseline": "average"},
    "net": {"baseline": "net"},
    "both": {"baseline": "both"},
}


@pytest.mark.parametrize("kind", ["bits", "labels", "layers"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_score_function_has_the_mean_of_the_exact_gradient(kind, name):
    model, guide, x = pair(kind, DRAWS, **SETTINGS[name])
    objective = plain_elbo(model, guide, x)
    assert isinstance(objective, TraceGraph_ELBO)
    for _ in range(3):  # a baseline that has learned something
        sample(objective, model, guide, x)
    expected = exact(kind, elbo, *pair(kind, 1, **SETTINGS[name]))
    assert_means(sample(objective, model, guide, x), expected)


@pytest.mark.parametrize("kind", ["bits", "labels", "layers"])
def test_enumeration_gives_the_exact_gradient(kind):
    model, guide, x = pair(kind, 1, estimator="enumerate")
    objective = plain_elbo(model, guide, x)
    assert isinstance(objective, EnumeratedELBO)
    found = sample(objective, model, guide, x)
    torch.testing.assert_close([g[0] for g in found], exact(kind, elbo, model, guide, x))


@pytest.mark.parametrize("kind", ["bits", "labels", "layers"])
def test_leave_one_out_has_the_mean_of_the_exact_gradient(kind):
    found = sample(LeaveOneOut(3), *pair(kind, DRAWS))
    assert_means(found, exact(kind, elbo, *pair(kind, 1)))


def several(log_p: Tensor, log_q: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p and log q of all tuples of draws, ``(tuples, draws, rows)``; and their probability."""
    tuples = torch.tensor(list(itertools.product(range(len(log_p)), repeat=draws)))
    log_p, log_q = log_p[tuples], log_q[tuples]
    return log_p, log_q, log_q.sum(1).exp()


@pytest.mark.parametrize("kind", ["bits", "labels"])
@pytest.mark.parametrize("draws", [2, 3])
def test_vimco_has_the_mean_of_the_exact_gradient_of_the_bound(kind, draws):
    def loss(log_p, log_q):
        log_p, log_q, probability = several(log_p, log_q, draws)
        bound = (log_p - log_q).logsumexp(1) - torch.tensor(float(draws)).log()
        return -(probability * bound).sum(0)

    found = sample(VIMCO(draws), *pair(kind, DRAWS))
    assert_means(found, exact(kind, loss, *pair(kind, 1)))


@pytest.mark.parametrize("kind", ["bits", "labels", "layers"])
@pytest.mark.parametrize(("wake", "sleep"), [(1.0, 0.0), (0.5, 2.0), (0.0, 1.0)])
def test_reweighted_wake_sleep_has_the_means_of_its_gradients(kind, wake, sleep):
    draws = 2

    def awake(log_p, log_q):
        log_p, log_q, probability = several(log_p, log_q, draws)
        shares = (log_p - log_q).softmax(1).detach()
        learned = (shares * (log_p + wake * log_q)).sum(1)
        return -(probability.detach() * learned).sum(0)

    def asleep(model, guide):
        """Over all x too."""
        total = torch.zeros(1)
        for bits in itertools.product([0.0, 1.0], repeat=OBSERVED):
            for given in values(kind):
                log_p, log_q = logs(model, guide, torch.tensor([bits]), given)
                total = total - sleep * log_p.exp().detach() * log_q
        return total.sum()

    one = pair(kind, 1)
    expected = exact(kind, awake, *one)
    dreams = torch.autograd.grad(
        asleep(*one[:2]), held(*one[:2]), allow_unused=True, materialize_grads=True
    )
    expected = [e + dream[0] for e, dream in zip(expected, dreams, strict=True)]
    found = sample(ReweightedWakeSleep(draws, wake=wake, sleep=sleep), *pair(kind, DRAWS))
    assert_means(found, expected)


@pytest.mark.parametrize("objective", [VIMCO(3), LeaveOneOut(3), ReweightedWakeSleep(3)], ids=repr)
def test_losses_are_bounds_of_the_same_draws(objective):
    model, guide, x = pair("layers", 5)
    torch.manual_seed(2)
    with own_parameters(model, guide):
        _, guide_trace = objective._get_trace(model, guide, (x,), {})
    sites = ("z1", "z2")
    given = {name: guide_trace.nodes[name]["value"] for name in sites}
    log_p, log_q = logs(model, guide, x, given)
    log_w = log_p - log_q
    if isinstance(objective, LeaveOneOut):
        expected = -log_w.mean(0).sum()
    else:
        expected = -(log_w.exp().mean(0).log()).sum()
    torch.manual_seed(2)
    with own_parameters(model, guide):
        torch.testing.assert_close(objective.loss(model, guide, x), expected)


def variance(draws: list[Tensor]) -> float:
    """Of the guide's gradient, summed over its entries."""
    return sum(float(g.var(0).sum()) for g in draws[-2:])


def test_an_average_takes_away_what_all_rows_have_in_common():
    """x of 60 nats besides those that z explains: a tenth of the variance at most is left."""
    found = {}
    for name in ("none", "average"):
        model, guide, x = pair("bits", 2000, torch.full((2000,), -60.0), **SETTINGS[name])
        draws: list[Tensor] = []
        for _ in range(40):  # until the average is what draws bring
            draws = sample(TraceGraph_ELBO(), model, guide, x)
        found[name] = variance(draws)
    assert found["none"] > 10 * found["average"]


def test_a_net_takes_away_what_the_context_tells():
    """Rows of two kinds, 60 nats apart, which the second entry of x tells: a net predicts which."""
    found = {}
    for name in ("average", "net", "both"):
        kinds = torch.arange(500) % 2
        settings: dict[str, Any] = dict(SETTINGS[name])
        if name != "average":
            settings["baseline_net"] = MLP(OBSERVED, 1)
        model, guide, x = pair("bits", 500, -60.0 * kinds, **settings)
        x[:, 1] = kinds.double()
        learned = [p for n, p in guide.named_parameters() if "baseline" in n]
        optimizer = torch.optim.Adam(learned, 3.0) if learned else None
        draws: list[Tensor] = []
        for _ in range(80):
            for parameter in learned:
                parameter.grad = None
            draws = sample(TraceGraph_ELBO(), model, guide, x)
            if optimizer is not None:
                optimizer.step()
        # Within a kind, since kinds differ in their mean gradient.
        found[name] = sum(variance([g[kinds == kind] for g in draws]) for kind in (0, 1))
    assert found["average"] > 10 * found["net"]
    assert found["average"] > 10 * found["both"]


def test_the_others_of_a_row_are_a_baseline_of_its_own():
    """Rows of any height: 60 nats of a row's own have no part in the gradient at all."""
    found = []
    for height in (0.0, -60.0):
        model, guide, x = pair("bits", 200, torch.full((200,), height))
        torch.manual_seed(2)
        found.append(sample(LeaveOneOut(3), model, guide, x))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ["bits", "labels"])
def test_relaxed_gradients_near_the_exact_ones_as_the_temperature_falls(kind):
    expected = exact(kind, elbo, *pair(kind, 1))
    errors = []
    for temperature in (2.0, 0.5, 0.1):
        model, guide, x = pair(kind, 100_000, estimator="relaxed", temperature=temperature)
        objective = plain_elbo(model, guide, x)
        assert isinstance(objective, TraceMeanField_ELBO)
        found = sample(objective, model, guide, x)
        gaps = [g.mean(0) - e for g, e in zip(found, expected, strict=True)]
        errors.append(float(torch.cat([gap.flatten() for gap in gaps]).norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_the_running_mean_follows_what_draws_bring_in_batches_of_any_size():
    model, guide, _ = pair("bits", 8, baseline="average")
    baseline = guide.conditionals["z1"].baseline
    baseline.decay = 0.6
    mean = 0.0
    for step, rows in enumerate((8, 8, 3, 3)):
        model, _, x = pair("bits", rows)
        for name in ("weight", "bias"):
            value = getattr(guide.conditionals["z1"].net, name)
            setattr(guide.conditionals["z1"].net, name, nn.Parameter(value[:rows].detach()))
        torch.manual_seed(2)
        with own_parameters(model, guide):
            traces: Any = TraceGraph_ELBO(max_plate_nesting=1)._get_trace(model, guide, (x,), {})
        z = detach_provenance(traces[1].nodes["z1"]["value"])
        with torch.no_grad():
            log_p, log_q = logs(model, guide, x, {"z1": z})
        torch.manual_seed(2)
        sample(TraceGraph_ELBO(), model, guide, x)
        share = max(0.4, 1 / (step + 1))
        mean = (1 - share) * mean + share * float((log_p - log_q).mean())
        assert float(baseline.mean) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: VIMCO(1), r"VIMCO\(draws=1\): expected at least 2"),
        (lambda: LeaveOneOut(1), r"LeaveOneOut\(draws=1\): expected at least 2"),
        (lambda: ReweightedWakeSleep(1), r"ReweightedWakeSleep\(draws=1\): expected at least 2"),
        (lambda: ReweightedWakeSleep(wake=-1.0), r"wake=-1\.0, sleep=0\.0.*at least 0"),
        (lambda: ReweightedWakeSleep(wake=0.0), r"wake=0\.0, sleep=0\.0.*one of them above"),
        (lambda: ReweightedWakeSleep(sleep=torch.inf), r"sleep=inf"),
    ],
)
def test_settings_out_of_range_are_refused(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


OF_DRAWS = [VIMCO(2), LeaveOneOut(2), ReweightedWakeSleep(2)]


@pytest.mark.parametrize("objective", OF_DRAWS, ids=repr)
def test_enumerated_sites_have_no_draws_to_be_scored(objective):
    with pytest.raises(PairError, match=r"scores draws, and 'z1' is enumerated.*score"):
        sample(objective, *pair("bits", 3, estimator="enumerate"))


def test_a_model_that_observes_another_tensor_cannot_dream():
    class Halved(Layers):
        def forward(self, x=None, **sizes):
            return super().forward(None if x is None else x / 2, **sizes)

    model, guide, x = pair("bits", 3)
    model.__class__ = Halved
    sample(ReweightedWakeSleep(2), model, guide, x)
    with pytest.raises(PairError, match=r"observes 'x' as another tensor than it was given"):
        sample(ReweightedWakeSleep(2, sleep=1.0), model, guide, x)


@pytest.mark.parametrize("objective", OF_DRAWS, ids=repr)
def test_rows_count_by_total(objective):
    model, guide, x = pair("bits", 4)
    losses = []
    for total in (4, 12):
        torch.manual_seed(3)
        with own_parameters(model, guide):
            losses.append(float(objective.loss(model, guide, x, total=total)))
    assert losses[1] == pytest.approx(3 * losses[0])
