# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ladders, and how levels collapse
#
# One vector of latents has to say everything about an image at once. With *levels* the story can
# be told from the top down: what is it, then how is it written. But a level that nobody needs
# goes silent, and the ELBO does not tell. Here we fit the same two-level model with guides that
# read it in different ways, and listen to each level.

# %%
# %matplotlib inline
import os

import matplotlib.pyplot as plt
import torch

import ppl_vae
from ppl_vae import plots
from ppl_vae.conditionals import Normal
from ppl_vae.guides import TopDown
from ppl_vae.likelihoods import Binomial
from ppl_vae.models import VAE, Hierarchy
from ppl_vae.nn import MLP
from ppl_vae.objectives import FreeBits
from ppl_vae.priors import StandardNormal
from ppl_vae.residual import MLPLadder

SMOKE = bool(os.environ.get("PPL_VAE_SMOKE"))  # to see only whether all of it runs
EPOCHS, WARMUP, SAMPLES = (2, 1, 5) if SMOKE else (60, 15, 200)

digits = ppl_vae.load_data("digits", labels=False)
x = digits.split("train").batch(slice(0, 2))["x"]

# %% [markdown]
# ## One model, three readers
#
# $z_2 \sim \mathrm{Normal}(0, I)$, then $z_1 \mid z_2$ from a net, then the image from *both*
# (`skip=True`). Which guide? From the bottom up, $q(z_1 \mid x)\, q(z_2 \mid z_1)$, as one would
# stack VAEs; the other way round, $q(z_2 \mid x)\, q(z_1 \mid x, z_2)$; or the ladder: run the
# *model* from the top down, and at each level merge its normal with what the data say about that
# level. The ladder shares the model's nets, and its $q$ is the model's $p$ wherever the data are
# silent.


# %%
def two_levels():
    torch.manual_seed(0)
    return Hierarchy(
        StandardNormal(10),
        [Normal(MLP(10, 128, 20))],
        Binomial(MLP(20, 128, 128, 64), total_count=16),
        skip=True,
    )


def bottom_up(model):
    z1, z2 = Normal(MLP(64, 128, 128, 20)), Normal(MLP(10, 128, 20))
    return ppl_vae.Factorized(z1=(z1, ["x"]), z2=(z2, ["z1"]))


def from_the_top(model):
    z2, z1 = Normal(MLP(64, 128, 128, 20)), Normal(MLP(64 + 10, 128, 128, 20))
    return ppl_vae.Factorized(z2=(z2, ["x"]), z1=(z1, ["x", "z2"]))


def ladder(model):
    return TopDown(model, MLPLadder(64, 128, 128), x=x)


def fitted(model, guide, **options):
    settings = {"epochs": EPOCHS, "batch_size": 50, "learning_rate": 2e-3, "warmup": WARMUP}
    how = {"compile": False, "progress": False}
    ppl_vae.fit(model, guide, digits, **settings | options, **how)
    return ppl_vae.evaluate(model, guide, digits, samples=SAMPLES, compile=False)


def report(name, figures):
    levels = "  ".join(f"{site} {kl:5.2f}" for site, kl in sorted(figures.kl_per_site.items()))
    print(f"{name:24} NLL {figures.nll:6.2f}   ELBO {figures.elbo:7.2f}   KL: {levels}")


# %%
figures, pairs = {}, {}
torch.manual_seed(0)
plain = VAE(StandardNormal(10), Binomial(MLP(10, 128, 128, 64), total_count=16))
plain_guide = ppl_vae.Factorized(z=(Normal(MLP(64, 128, 128, 20)), ["x"]))
figures["one level"] = fitted(plain, plain_guide)
for name, make in {
    "bottom up": bottom_up,
    "from the top": from_the_top,
    "ladder": ladder,
}.items():
    model = two_levels()
    pairs[name] = model, make(model)
    figures[name] = fitted(*pairs[name])
for name, found in figures.items():
    report(name, found)

# %% [markdown]
# Three guides of one model, and three different models come out. Bottom up, and on the ladder,
# $z_1$ carries 14 nats and the top 4 and 3: the second level is there and says little, and the
# NLL is that of one level, within a nat. The guide that decides about $z_2$ from the data first
# uses both levels alike, 11 and 10 nats, and needs 3.4 nats less for a digit than one level does.
# (It has
# 20 latents in all, the one level 10: part of the gain is their number. One seed each: nothing is
# to be read into less than a nat.)

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 2.6), sharey=True)
for ax, name in zip(axes, pairs, strict=True):
    shown = figures[name].kl_per_latent
    for offset, site in enumerate(("z2", "z1")):
        kl = sorted(shown.get(site, []), reverse=True)
        at = [k + 0.4 * offset for k in range(len(kl))]
        ax.bar(at, kl, width=0.4, label=site)
    ax.set(title=name, xlabel="coordinate, most used first")
axes[0].set_ylabel("KL, nats")
axes[0].legend()
fig.tight_layout()
fig

# %% [markdown]
# ## Collapse, and what helps
#
# At the start of a fit nothing has been learned, so a latent costs its KL and brings nothing: the
# quickest way up is to switch it off. A ladder is quick at that, since its $q$ begins at $p$. The
# warm-up above lets KL be free at first. Without it, and with a floor under each level's KL
# instead (`FreeBits`):

# %%
for name, options in {
    "ladder, no warm-up": {"warmup": 0},
    "ladder, free bits": {"warmup": 0, "objective": FreeBits(4.0, per="site")},
}.items():
    model = two_levels()
    pairs[name] = model, ladder(model)
    report(name, fitted(*pairs[name], **options))

# %% [markdown]
# Without the warm-up the ladder ends 11 nats worse, and with less KL in all: 12 nats in place of
# 17. The floor wins back most of that. The top now carries 4.4 nats, little more than the floor
# asks for: a floor keeps a level from silence, but does not give it something to say. Here the
# order in which the guide asks did more than either trick.
#
# ## What does each level say?
#
# Fix the top and draw the level below anew: rows share $z_2$, columns differ in $z_1$ and in the
# ink. What changes along a row is what $z_1$ adds.

# %%
model, _ = pairs["ladder"]
torch.manual_seed(1)
with torch.no_grad():
    z2 = model.z_dist(2).expand([6]).sample().repeat_interleave(8, 0)
    z1 = model.z_dist(1, z2).sample()
    drawn = model.x_dist(z2, z1).mean
plots.image_grid(drawn.reshape(6, 8, *digits.image_shape), title="One top level a row")

# %% [markdown]
# Rows are hardly more alike than columns: that is what 2.6 nats look like. Nearly all that makes
# a digit this digit was left to $z_1$.
#
# Deeper ladders are made of the same two parts: `ppl_vae.models.DeepLadder` is a residual
# convolutional net whose depth is an argument, `ppl_vae.residual.ConvLadder` reads the data on
# the way up, and `TopDown` puts them together: `ppl-vae fit deep-ladder-mnist`. Nets against
# collapse, decoder dropout and skips from the latent to every layer, are `MLP(..., dropout=)` and
# `SkipMLP` in `ppl_vae.nn`.
