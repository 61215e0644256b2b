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
# # Completing what is given
#
# Often a part of the data is known, and the rest is asked for: a label is given and an image is
# wanted, or the left half of an image and the right half is to be completed. That is a model of
# $p(x \mid c)$. There is no single right answer: of half a digit, several can be made, and a model
# should know all of them.
#
# Here one quarter of an image is given. We fit a net that guesses the rest, and a conditional VAE
# (Sohn et al. 2015), look at what they complete, and score both; the second half of the tutorial is
# about how not to.
#
# It takes about a minute on a laptop.

# %%
# %matplotlib inline
import os

import torch

import ppl_vae
from ppl_vae.conditionals import Normal
from ppl_vae.data.quadrants import quadrants, whole
from ppl_vae.figures import image_grid
from ppl_vae.guides import MeanField
from ppl_vae.likelihoods import Bernoulli, Binomial
from ppl_vae.models import BaselineNet, ConditionalVAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import Beta
from ppl_vae.recipes import build

SMOKE = bool(os.environ.get("PPL_VAE_SMOKE"))  # small, to see only whether all of it runs
EPOCHS = 1 if SMOKE else 100
NAME = "digits"  # or "static_mnist", where that is on the disk
HIDDEN = 3  # quadrants, of four
quiet = {"progress": False, "compile": False}

images = ppl_vae.load_data(NAME, labels=False)
data = quadrants(images, hidden=HIDDEN)
test = data.split("test").batch(slice(None))
print({name: tuple(column.shape) for name, column in test.items()})

# %% [markdown]
# The data set has two columns now: `c`, the lower left quarter, and `x`, the other three. Below are
# test digits, and what is given of them.

# %%
SHAPE = images.image_shape
LARGEST = 16.0 if NAME == "digits" else 1.0


def grid(lines, title, **labels):
    """Images ``(lines, columns, pixels)``, white where nothing is known."""
    cells = torch.stack(lines).unflatten(-1, SHAPE)
    return image_grid(cells, title=title, limits=(0.0, LARGEST), **labels)


some = torch.randperm(len(test["x"]), generator=torch.Generator().manual_seed(1))[:12]
x, c = test["x"][some], test["c"][some]
truth = whole(x, c, SHAPE, HIDDEN)
known = whole(torch.full_like(x, torch.nan), c, SHAPE, HIDDEN)
grid([truth, known], "Digits, and what is given of them", row_labels=["image", "given"])

# %% [markdown]
# ## A net, and a net with a latent
#
# The baseline is a net from $c$ to a probability for each pixel of $x$. Given $c$, it takes the
# pixels to be independent:
#
# $$ p(x \mid c) = \prod_d p(x_d \mid c) $$
#
# The conditional VAE has a latent for what $c$ leaves open. Its prior depends on $c$, and so may
# its decoder:
#
# $$ z \sim p(z \mid c), \qquad x \sim p(x \mid z, c) $$
#
# In the program, $c$ is a *covariate*: a keyword-only argument of the model. It is given, and no
# site. The guide $q(z \mid x, c)$ is told of both. A net without a latent leaves nothing to infer,
# and `Prior`, which draws from the model itself, stands in for a guide.

# %%
pixels, given = test["x"].shape[1], test["c"].shape[1]
LATENTS, WIDTH = 10, 128
example = data.split("train").batch(slice(0, 2))


def emit(net):
    return Binomial(net, total_count=16) if NAME == "digits" else Bernoulli(net)


def fitted(model, guide, objective=None):
    how = {"epochs": EPOCHS, "batch_size": 50, "learning_rate": 1e-3, "patience": 10, **quiet}
    ppl_vae.fit(model, guide, data, objective=objective, **how)
    return model, guide


def conditional_vae(objective=None):
    torch.manual_seed(0)
    prior = Normal(MLP(given, WIDTH, 2 * LATENTS))
    model = ConditionalVAE(prior, emit(MLP(LATENTS + given, WIDTH, WIDTH, pixels)))
    guide = MeanField(model, MLP(pixels + given, WIDTH, WIDTH), **example)
    return fitted(model, guide, objective)


torch.manual_seed(0)
net = BaselineNet(emit(MLP(given, WIDTH, WIDTH, pixels)))
fitted(net, ppl_vae.Prior(net))
cvae, recognition = conditional_vae()

# %% [markdown]
# Six completions of each: the means of $x$ for six draws of $z$ from $p(z \mid c)$. The net has one
# guess, its mean; the pixels that it is unsure of are grey, and drawing them one by one adds noise
# to the same guess.


# %%
with torch.no_grad():
    means = net.x_dist(c).mean
    torch.manual_seed(2)
    noisy = net.x_dist(c).sample()
    draws = cvae.z_dist(c).sample((6,))  # (6, rows, latents)
    completed = cvae.x_dist(draws, c).mean
lines = [truth, known, *(whole(part, c, SHAPE, HIDDEN) for part in (means, noisy, *completed))]
grid(
    lines,
    "Completions by the net, and by the conditional VAE",
    row_labels=["image", "given", "net: mean", "net: draw", *["CVAE"] * 6],
)

# %% [markdown]
# The CVAE makes up its mind. Most of its completions are digits, and they differ where the quarter
# leaves it open which: of the seventh it makes threes, fives and nines, where the net lays them on
# top of each other. Of the last but one, whose quarter leaves no choice, all six are alike.
#
# ## What the conditional likelihood is
#
# The figure to compare is $\log p(x \mid c)$ of test images, in nats. That of the net is a sum over
# pixels. That of the CVAE is an integral,
#
# $$ p(x \mid c) = \int p(x \mid z, c)\, p(z \mid c)\, dz, $$
#
# which can be estimated from draws of $p(z \mid c)$, the *prior*, by their mean likelihood; or from
# draws of any other distribution, if each is weighted by the ratio of the densities. The guide
# $q(z \mid x, c)$ knows where in the integral the mass is, so that fewer draws do:
#
# $$ \log p(x \mid c) \;\approx\; \log \frac1K \sum_{k=1}^K
# \frac{p(x \mid z_k, c)\, p(z_k \mid c)}{q(z_k \mid x, c)} $$
#
# `evaluate` computes this with whichever guide it is given. On average, log-likelihoods are too low
# by both, and the less so the more draws are made: of two figures for one model, the lower NLL is
# nearer the truth.

# %%
DRAWS = (1, 10) if SMOKE else (1, 10, 100, 1000)
proposals = {"prior p(z | c)": ppl_vae.Prior(cvae), "guide q(z | x, c)": recognition}
exact = ppl_vae.evaluate(net, ppl_vae.Prior(net), data, samples=1)
print(f"NLL of the net, exactly: {exact.nll:.2f} nats, standard error {exact.nll_se:.2f}\n")
print(f"{'NLL of the CVAE':20}" + "".join(f"{f'K = {k}':>10}" for k in DRAWS))
for name, proposal in proposals.items():
    values = [ppl_vae.evaluate(cvae, proposal, data, samples=k).nll for k in DRAWS]
    print(f"{name:20}" + "".join(f"{value:10.2f}" for value in values))

# %% [markdown]
# The latent is worth more than 50 nats: pixels are anything but independent given a quarter of the
# image. A thousand draws of the prior are still 5 nats short of a thousand of the guide, and say
# less than ten of them.
#
# ## What it is not
#
# It is tempting to score the CVAE by what training computes: draw $z$ from the recognition net, and
# report $\log p(x \mid z, c)$. It is a part of the ELBO, the reconstruction, and looks very good:

# %%
print(f"{'':12}{'- log p(x | z, c), z ~ q':>26}{'KL':>8}{'NLL':>9}")
scored = {"CVAE": (cvae, recognition), "at a tenth": conditional_vae(Beta(0.1))}
for name, pair in scored.items():
    found = ppl_vae.evaluate(*pair, data, samples=DRAWS[-1])
    print(f"{name:12}{-found.reconstruction:26.2f}{found.kl:8.2f}{found.nll:9.2f}")

# %% [markdown]
# But the recognition net has seen $x$. Its $z$ may carry as much of the answer as fits into it, and
# what that costs is the KL, which this score leaves out: without its weight, a draw of
# $q(z \mid x, c)$ says nothing of $p(x \mid c)$. To see that it is no matter of taste, the second
# line is of a CVAE fitted by an objective that charges a tenth of the KL. By that score it is ten
# nats better, and as a model it is more than six nats worse.
#
# So a published figure needs a look at how it was computed: that of Pyro's tutorial on conditional
# VAEs is the score of this section.
#
# ## Labels are given too
#
# A covariate can be anything that the nets can read. In the recipe `cvae-digits` it is a one-hot
# label, and the model draws digits to order. The check, `ppl-vae check`, draws its replicates given
# the covariates of the held-out rows, and `simulate` takes them by name:

# %%
made = build("cvae-digits", {}, seed=0)
ppl_vae.fit(made.model, made.guide, made.data, **{**made.fit, "epochs": EPOCHS, **quiet})
labels = torch.eye(10).repeat_interleave(12, 0)
torch.manual_seed(0)
with torch.no_grad():
    z = made.model.simulate(len(labels), c=labels)["z"]
    drawn = made.model.x_dist(z, labels).mean.unflatten(0, (10, 12))
image_grid(
    drawn.unflatten(-1, made.data.image_shape),
    title="Digits drawn given their label",
    limits=(0.0, 16.0),
    row_labels=[str(label) for label in range(10)],
)

# %% [markdown]
# `ppl-vae fit cvae-mnist-quadrants --given 1` does the first part with MNIST, and
# `baseline-mnist-quadrants` is its net. `guess=True` there builds the decoder on a net of $c$: see
# `ppl_vae.models.conditional.OnGuess`.
