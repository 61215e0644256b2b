"""Top-down: the model's own conditionals, each merged with what the data say about its site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ppl_vae.guide import AmortizedGuide, unconstrained_size
from ppl_vae.merging import MERGES, entries, run_as_guide
from ppl_vae.model import GenerativeModel, by_name, own_parameters, sample_nodes
from ppl_vae.residual import reader
from ppl_vae.sites import PairError, aside


class TopDown(AmortizedGuide):
    """Top-down inference, which shares the model's conditionals, as in a ladder VAE.

        q(z2, z1 | x) = q(z2 | x) q(z1 | z2, x),  q(z_l | ...) = merge(p(z_l | ...), evidence_l(x))

    The guide runs the model's own program, in which each local latent's normal p is replaced by q,
    and stops when the last of them is drawn: the likelihood is never computed. A site's evidence
    is what a linear head reads of the encoder's features: a location m and a scale s. With
    ``merge="precision"``, q is the normalized product of p and Normal(m, s) (Sønderby et al. 2016,
    arXiv:1602.02282, eq. 17-19; here at the top too). With ``"residual"`` it has location
    ``p.loc + m`` and scale ``p.scale * s`` (Vahdat & Kautz 2020, arXiv:2007.03898, section 3.2).

    Each site reads all features, unless the encoder states ``feature_shapes``, as the ladders of
    :mod:`ppl_vae.residual` do: then they are features of one level after the other, and each site
    reads those of one, in the order of drawing.

    Train it with a warm-up of the KL, as the first paper does: since q follows p, no KL keeps noise
    from being trained away before the encoder says anything, and then all levels collapse at once.

    Args:
        model: its local latents are normals without covariances, ``Normal(...).to_event()``. The
            guide runs it, but its parameters stay its own.
        encoder, args, kwargs: as :class:`~ppl_vae.guide.AmortizedGuide`.
        merge: "precision" or "residual".

    Raises:
        PairError: a site of another family; one that is enumerated before others are drawn; an
            encoder with another number of levels than the model has local latents.
        ValueError: ``merge`` is neither of the two.
    """

    def __init__(
        self,
        model: GenerativeModel,
        encoder: nn.Module,
        *args: Tensor | None,
        merge: str = "precision",
        **kwargs: Tensor | None,
    ) -> None:
        if merge not in MERGES:
            raise ValueError(f"TopDown(merge={merge!r}): expected one of {', '.join(MERGES)}")
        super().__init__(model, encoder, *args, **kwargs)
        self.merge = merge
        self.model = (model,)  # in a tuple: an attribute would register its parameters twice
        with torch.no_grad(), aside(), own_parameters(model):
            trace = poutine.trace(model).get_trace(**by_name(self.names, args, kwargs))
        waiting = dict(self.local_sites)
        for name, node in sample_nodes(trace):
            if waiting.pop(name, None):
                _normal(name, node["fn"])
            elif waiting and node["infer"].get("enumerate") and not node["is_observed"]:
                raise PairError(
                    f"TopDown: site {name!r} is enumerated, but {', '.join(waiting)} may depend on "
                    f"it: give {name!r}, or take a guide that reads the data alone, as MeanField"
                )

    def build(self) -> None:
        count = len(self.local_sites)
        stated = getattr(self.encoder, "feature_shapes", None)
        shapes: tuple[tuple[int, ...], ...] = stated or ((self.features,),) * count
        if len(shapes) != count:
            raise PairError(
                f"TopDown: the encoder has features of {len(shapes)} levels, the model {count} "
                f"local latents ({', '.join(self.local_sites)}): expected a level for each"
            )
        self.splits = [math.prod(shape) for shape in shapes] if stated else None
        self.heads = nn.ModuleDict(
            {
                name: reader(shape, 2, unconstrained_size(site))
                for (name, site), shape in zip(self.local_sites.items(), shapes, strict=True)
            }
        )

    def draw_rows(
        self, given: Mapping[str, Tensor], shared: Mapping[str, Tensor], **sizes: Any
    ) -> None:
        features, count = self.encode(given), len(self.local_sites)
        parts = [features] * count if self.splits is None else features.split(self.splits, -1)
        replace = {
            name: partial(self._merged, name, self.heads[name](part).to(part.dtype))
            for name, part in zip(self.local_sites, parts, strict=True)
            if name not in given
        }
        run_as_guide(self.model[0], replace, shared, **given, **sizes)

    def _merged(self, name: str, evidence: Tensor, p: TorchDistribution) -> TorchDistribution:
        loc, raw = (e.reshape(*e.shape[:-1], *p.event_shape) for e in evidence.chunk(2, -1))
        return MERGES[self.merge](_normal(name, p), loc, raw).to_event(p.event_dim)


def _normal(name: str, p: TorchDistribution) -> dist.Normal:
    """The entries of a site's distribution, if they are normal: a prior may be changed later."""
    if not isinstance(family := entries(p), dist.Normal):
        raise PairError(
            f"TopDown: site {name!r} is {type(family).__name__}, which does not merge with "
            "evidence: expected Normal(...).to_event(); take another guide, such as MeanField"
        )
    return family
