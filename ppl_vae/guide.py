"""Guides: an explicit factorization, and what the families derived from a model build on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.conditionals import constrained, entrywise, join, unconstrain
from ppl_vae.discrete import Baseline, Bits, Estimator, Labels, check_estimator, infer_of
from ppl_vae.model import GenerativeModel, Program, by_name, own_parameters
from ppl_vae.nn import width_of
from ppl_vae.sites import PairError, Site, aside, read_sites


class Factorized(Program):
    """A guide written out: which conditional draws each site, and from what.

    ``Factorized(y=(q_y, ["x"]), z=(q_z, ["x", "y"]))`` is ``q(y | x) q(z | x, y)``, drawn in the
    order written. A site that is given when the guide runs is observed, and is not drawn; a keyword
    that no site is conditioned on is ignored, since the model may observe more than the guide.
    Positional arguments stand for the observables in the order in which contexts first name
    them (here x, then y).

    Args:
        sites: site name = (conditional, names it is conditioned on).

    Raises:
        ValueError: a site conditioned on itself or on one drawn later.
    """

    def __init__(self, **sites: tuple[nn.Module, Sequence[str]]) -> None:
        super().__init__()
        self.conditionals = nn.ModuleDict({name: q for name, (q, _) in sites.items()})
        self.contexts = {name: tuple(context) for name, (_, context) in sites.items()}
        self.names = tuple(dict.fromkeys(n for context in self.contexts.values() for n in context))
        drawn: list[str] = []
        for name, context in self.contexts.items():
            if late := [n for n in context if n in sites and n not in drawn]:
                raise ValueError(
                    f"Factorized: {name!r} is conditioned on {late[0]!r}, which is not drawn "
                    "before it; list sites in the order of drawing"
                )
            drawn.append(name)

    def forward(
        self,
        *args: Tensor | None,
        n: int | None = None,
        total: int | None = None,
        **kwargs: Tensor | None,
    ) -> dict[str, Tensor]:
        known = tuple(dict.fromkeys([*self.names, *self.contexts, *kwargs]))
        values = by_name(known, args, kwargs)
        with self.rows(*values.values(), n=n, total=total):
            for name, context in self.contexts.items():
                if name in values:
                    continue
                if missing := [c for c in context if c not in values]:
                    raise ValueError(
                        f"Factorized: site {name!r} is conditioned on {missing[0]!r}: give it"
                    )
                given = [values[c] for c in context]
                conditional = self.conditionals[name]
                infer = infer_of(conditional, *given)
                values[name] = pyro.sample(name, conditional(*given), infer=infer)
        return values

    def posterior(self, *context: Tensor) -> TorchDistribution:
        """q(z | x) of the one latent site, ``(rows,)`` of its event.

        Raises:
            TypeError: several sites, whose joint has no tractable marginal in general.
        """
        if len(self.contexts) != 1:
            raise TypeError(f"posterior: one site expected, found {', '.join(self.contexts)}")
        return next(iter(self.conditionals.values()))(*context)


class Prior(Program):
    """Draws every latent from the model itself: from p(z | c), what is observed left aside.

    It has no parameters, and its densities cancel the model's, so that a weight is the likelihood
    of what is observed. With it, :func:`ppl_vae.evaluate` estimates log p(x | c) by plain Monte
    Carlo, ``log 1/K sum_k p(x | z_k, c)`` with z_k ~ p(z | c), and :func:`ppl_vae.fit` maximizes
    E log p(x | z, c) over the prior: the Gaussian stochastic neural network of Sohn et al. 2015
    ("Learning structured output representation using deep conditional generative models", section
    4). A latent that comes after an observed site is drawn given it.

    Args:
        model: any; it is run once a call, x included.

    Raises:
        ValueError: when it is run, a covariate is missing.
        PairError: when it is run, the model enumerates a latent, which this would draw.
    """

    def __init__(self, model: GenerativeModel) -> None:
        super().__init__()
        self.model = (model,)  # a tuple, or its parameters would be the guide's too
        self.names = (*model.observables, *model.covariates)

    def forward(
        self,
        *args: Tensor | None,
        n: int | None = None,
        total: int | None = None,
        **kwargs: Tensor | None,
    ) -> None:
        (model,) = self.model
        given = by_name(self.names, args, kwargs)
        model.covariates_in(given)  # all are there

        def hidden(message: Any) -> bool:
            # Parameters are the model's own affair, and what is observed is no site of a guide.
            if message["type"] != "sample" or site_is_subsample(message):
                return message["type"] == "param"
            if not message["is_observed"] and message["infer"].get("enumerate"):
                raise PairError(
                    f"Prior: the model enumerates site {message['name']!r}, which this guide would "
                    "draw: observe it, or take a guide that leaves it out"
                )
            return bool(message["is_observed"])

        poutine.block(model, hide_fn=hidden)(n=n, total=total, **given)


class AmortizedGuide(Program):
    """A guide derived from a model: one family for every model.

    Reads the model's latent sites from one trace on an example batch. Local sites (those in the
    plate of rows) are drawn from the encoder's features; sites that the model enumerates are left
    out; global sites get an AutoNormal. Whichever observables the example gives are the
    encoder's context, with the model's covariates after them, joined on the last dim, and must be
    given at each call.

    To implement: ``build``, which makes the heads from ``self.local_sites`` (in the model's order)
    and ``self.features``, and ``sample_rows``, which draws the local sites, or ``draw_rows``.

    Args:
        model: the model whose sites are read; its parameters stay its own.
        encoder: net from the context to features, ``(..., context)`` to ``(..., features)``.
        args, kwargs: an example batch of observables, ``(rows, event)``, as the model takes it, and
            of its covariates, by name.

    Raises:
        PairError: a local site that this guide cannot cover: discrete, where it draws several sites
            together, or neither one-hot nor bits; in a further plate; an observable that is one
            number a row, which an encoder cannot join with others; a model without latents.
        ValueError: no example batch, or one without a covariate.

    Attributes:
        covers_discrete: whether the family draws one-hot vectors and vectors of bits too.
    """

    covers_discrete = False

    def __init__(
        self,
        model: GenerativeModel,
        encoder: nn.Module,
        *args: Tensor | None,
        **kwargs: Tensor | None,
    ) -> None:
        super().__init__()
        self.names = (*model.observables, *model.covariates)
        example = by_name(self.names, args, kwargs)
        if not example:
            raise ValueError(
                f"{type(self).__name__}: give an example batch of {', '.join(self.names)}"
            )
        model.covariates_in(example)  # all are there
        for name, value in example.items():
            if value.dim() < 2:
                raise PairError(
                    f"{type(self).__name__}: observable {name!r} has shape {tuple(value.shape)}; "
                    "an encoder's context needs vectors, (rows, K): one-hot labels, for instance"
                )
        unknown = [site for site in read_sites(model, **example).values() if not site.observed]
        if not unknown:
            raise PairError(
                f"{type(model).__name__} has no latent for a guide to draw: take "
                "ppl_vae.Prior(model), which then draws nothing"
            )
        latent = [site for site in unknown if not site.enumerated]
        self.context = tuple(example)
        self.local_sites = {site.name: site for site in latent if site.local}
        for site in self.local_sites.values():
            _check_coverable(type(self).__name__, site, discrete=self.covers_discrete)
        self.encoder = encoder
        self.features = width_of(encoder, join(*example.values()))
        self.global_sites = tuple(site.name for site in latent if not site.local)
        if self.global_sites:
            self.global_guide = AutoNormal(poutine.block(model, expose=list(self.global_sites)))
            # An autoguide makes its parameters when it first runs; an optimizer needs them before.
            with torch.no_grad(), aside(), own_parameters(self):
                self.global_guide(**example)
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Make the heads, when ``self.local_sites`` and ``self.features`` are known."""

    def forward(
        self,
        *args: Tensor | None,
        n: int | None = None,
        total: int | None = None,
        **kwargs: Tensor | None,
    ) -> None:
        given = by_name(self.names, args, kwargs)
        shared = self.global_guide(n=n, total=total, **given) if self.global_sites else {}
        self.draw_rows(given, shared, n=n, total=total)

    def draw_rows(
        self, given: Mapping[str, Tensor], shared: Mapping[str, Tensor], **sizes: Any
    ) -> None:
        """Draw the local sites in a plate of these ``sizes``, global ones (``shared``) being drawn.

        For guides that do more than to draw from the encoder's features.
        """
        with self.rows(*given.values(), **sizes):
            self.sample_rows(self.encode(given), given)

    def encode(self, given: Mapping[str, Tensor]) -> Tensor:
        """The encoder's features of the context: ``(rows, features)``."""
        if missing := [name for name in self.context if name not in given]:
            raise ValueError(
                f"{type(self).__name__} was built on {', '.join(self.context)}; "
                f"{missing[0]!r} is missing"
            )
        joined = join(*(given[name] for name in self.context))
        return self.encoder(joined).to(joined.dtype)

    def sample_rows(self, features: Tensor, given: Mapping[str, Tensor]) -> None:
        """Draw each local site that is not in ``given``, from features ``(rows, features)``."""
        raise NotImplementedError(f"{type(self).__name__} implements neither this nor draw_rows")

    def posterior(self, *args: Tensor, **kwargs: Tensor) -> TorchDistribution:
        """q(z | x) of the one local site, where the family has it in closed form.

        Raises:
            TypeError: the family has none, or the model several local sites.
        """
        raise TypeError(
            f"{type(self).__name__} has no tractable posterior q(z | x): take a guide that has "
            "one, such as MeanField"
        )

    def only_site(self) -> Site:
        """The one local site.

        Raises:
            TypeError: there are several, or none.
        """
        if len(self.local_sites) != 1:
            raise TypeError(
                f"{type(self).__name__}.posterior: one local site expected, "
                f"found {', '.join(self.local_sites) or 'none'}"
            )
        return next(iter(self.local_sites.values()))


class SiteBySite(AmortizedGuide):
    """A guide that draws each local site from a conditional of its own, one after the other.

        q(z1, z2, ... | x) = q(z1 | x) q(z2 | x, z1) ...

    To implement: ``head``. A conditional draws a site's unconstrained coordinates, which are moved
    onto its support. Its context is the encoder's features and, where ``autoregressive``, the
    coordinates of the sites before.

    One-hot vectors, ``(K,)`` or ``(N, K)``, and vectors of bits, ``(D,)``, are drawn by
    :class:`~ppl_vae.discrete.Labels` and :class:`~ppl_vae.discrete.Bits`, whatever the family. They
    are context as they are.

    Args:
        args, kwargs: as those of :class:`AmortizedGuide`.
        discrete: the estimator of discrete sites. None: "enumerate" for a one-hot vector, "score"
            for several, and for bits.
        baseline, temperature: of it, as :class:`~ppl_vae.discrete.Discrete` has them.

    Attributes:
        heads: the conditional of each site.
        autoregressive: whether sites are conditioned on those drawn before them.

    Raises:
        PairError: as :class:`AmortizedGuide`.
        ValueError: as :class:`~ppl_vae.discrete.Discrete`.
    """

    autoregressive = True
    covers_discrete = True

    def __init__(
        self,
        *args: Any,
        discrete: Estimator | None = None,
        baseline: Baseline | None = None,
        temperature: float = 0.5,
        **kwargs: Any,
    ) -> None:
        check_estimator(type(self).__name__, discrete or "score", baseline, temperature)
        # Before the base class builds the heads.
        self.discrete, self.baseline, self.temperature = discrete, baseline, temperature
        super().__init__(*args, **kwargs)

    @abstractmethod
    def head(self, size: int, context: int) -> nn.Module:
        """A conditional of ``(..., context)`` with event ``(size,)``.

        With several sites its context comes as several tensors, to be joined.
        """

    def net(self, outputs: int, context: int) -> nn.Module:
        """From a discrete site's context to its logits."""
        return nn.Linear(context, outputs)

    def build(self) -> None:
        self.heads = nn.ModuleDict()
        context = self.features
        for name, site in self.local_sites.items():
            if site.support.is_discrete:
                size = site.event_shape.numel()
                self.heads[name] = self._discrete_head(site, self.net(size, context))
            else:
                size = unconstrained_size(site)
                self.heads[name] = self.head(size, context)
            context += size if self.autoregressive else 0

    def sample_rows(self, features: Tensor, given: Mapping[str, Tensor]) -> None:
        context = [features]
        for name, site in self.local_sites.items():
            value = given.get(name)
            if value is None:
                infer = infer_of(self.heads[name], *context)
                value = pyro.sample(name, self._site_dist(site, *context), infer=infer)
            if self.autoregressive:
                if site.support.is_discrete:
                    context.append(value.flatten(value.dim() - len(site.event_shape)))
                else:
                    context.append(unconstrain(value, site.support, site.event_shape))

    def posterior(self, *args: Tensor, **kwargs: Tensor) -> TorchDistribution:
        """q(z | x) of the one local site, ``(rows,)`` of its event.

        Raises:
            TypeError: the model has several local sites.
        """
        site = self.only_site()
        return self._site_dist(site, self.encode(by_name(self.names, args, kwargs)))

    def _site_dist(self, site: Site, *context: Tensor) -> TorchDistribution:
        q = self.heads[site.name](*context)
        if site.support.is_discrete:
            return q
        return constrained(q, site.support, site.event_shape)

    def _discrete_head(self, site: Site, net: nn.Module) -> nn.Module:
        several = _is_bits(site) or len(site.event_shape) > 1
        estimator = self.discrete or ("score" if several else "enumerate")
        # A baseline is that of the sites that have a use for it.
        baseline = self.baseline if estimator == "score" else None
        settings = {
            "estimator": estimator,
            "baseline": baseline,
            "temperature": self.temperature,
        }
        if _is_bits(site):
            return Bits(net, **settings)
        variables = site.event_shape[0] if len(site.event_shape) > 1 else None
        return Labels(net, variables=variables, **settings)


def unconstrained_size(site: Site) -> int:
    """Number of unconstrained coordinates of one draw of a site."""
    transform: Any = torch.distributions.biject_to(site.support)
    return transform.inverse_shape(site.event_shape).numel()


def _is_bits(site: Site) -> bool:
    return isinstance(entrywise(site.support), type(constraints.boolean))


def _check_coverable(guide: str, site: Site, *, discrete: bool) -> None:
    if site.support.is_discrete and not discrete:
        raise PairError(
            f"{guide}: site {site.name!r} is discrete ({site.family}), this family continuous: "
            'mark it infer={"enumerate": "parallel"}, take a family that draws site by site, such '
            "as MeanField, or write the guide out with Factorized"
        )
    dims = len(site.event_shape)
    one_hot = isinstance(entrywise(site.support), type(constraints.one_hot)) and dims <= 2
    if site.support.is_discrete and not (one_hot or (_is_bits(site) and dims == 1)):
        raise PairError(
            f"{guide}: site {site.name!r} is discrete ({site.family}), of event shape "
            f"{tuple(site.event_shape)}; expected one-hot vectors, (K,) or (N, K), or a vector of "
            "bits, (D,): make the model draw these, mark the site "
            'infer={"enumerate": "parallel"}, or write the guide out with Factorized'
        )
    if len(site.plates) > 1:
        raise PairError(
            f"{guide}: site {site.name!r} stands in plates {site.plates}; expected only the rows': "
            "make the other dims event dims with .to_event"
        )
