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
# # A first variational autoencoder
#
# A variational autoencoder is two programs. The *model* says how data come about; the *guide* says,
# for one datum, which latent values may have made it. Here we write the first, derive the second,
# fit both to small images of digits, and then spend as much time on a harder question: **what may
# we believe of the result?**
#
# It takes about half a minute on a laptop. Open it as a notebook with jupytext, or run it as a
# plain script.

# %%
# %matplotlib inline
import os

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import ppl_vae
from ppl_vae import plots
from ppl_vae.checks.statistics import OF_ROWS, STATISTICS
from ppl_vae.guides import MeanField
from ppl_vae.models import PPCA
from ppl_vae.nn import MLP
from ppl_vae.show import graph

EPOCHS = 2 if os.environ.get("PPL_VAE_SMOKE") else 60  # few, to see only whether all of it runs

# %% [markdown]
# ## The data
#
# 1,797 handwritten digits come with scikit-learn. Each is 8 × 8 pixels, and a pixel is a *count*:
# of the 4 × 4 cells of a finer scan, how many had ink? So it is a whole number from 0 to 16. That
# will matter.

# %%
digits = ppl_vae.load_data("digits", labels=False)
x = digits.split("train").batch(slice(0, 32))["x"]  # (32, 64)
print({name: len(digits.split(name)) for name in digits.splits})
plots.image_grid(x.reshape(2, 16, *digits.image_shape), title="Digits")

# %% [markdown]
# ## The story
#
# We imagine that a digit comes about in two steps. First ten numbers are drawn, without looking at
# anything: $z_n \sim \mathrm{Normal}(0, I)$. Then a neural network $f$ turns them into 64 chances
# of ink, and each pixel counts the cells that were hit:
# $x_n \sim \mathrm{Binomial}(16, \mathrm{sigmoid}\, f(z_n))$.
#
# As a Pyro program it reads the same. A random variable is a `pyro.sample` statement with a name; a
# value that we know is given as `obs`; digits are independent of each other, so they stand in a
# *plate*, which `self.rows` makes. Each conditional distribution has a method of its own. No
# log-probability is written down anywhere: Pyro finds it from the program.


# %%
class DigitVAE(ppl_vae.GenerativeModel):
    """A digit from ten numbers.

    z_n ~ Normal(0, I)                    # latent     data | Z
    x_n ~ Binomial(16, sigmoid(f(z_n)))   # image      data | D
    """

    def __init__(self, latents: int, pixels: int) -> None:
        super().__init__()
        self.decoder = MLP(latents, 128, 128, pixels)
        self.register_buffer("zero", torch.zeros(latents))

    def z_dist(self):
        return dist.Normal(self.zero, 1.0).to_event(1)

    def x_dist(self, z):
        return dist.Binomial(16, logits=self.decoder(z)).to_event(1)

    def forward(self, x=None, *, n=None, total=None):
        with self.rows(x, n=n, total=total):
            z = pyro.sample("z", self.z_dist())
            return pyro.sample("x", self.x_dist(z), obs=x)


torch.manual_seed(0)
model = DigitVAE(latents=10, pixels=64)
graph(model)

# %% [markdown]
# The program runs as it stands, with weights that nobody has fitted. `simulate` tells the story
# from its start, and gives a draw of every site.

# %%
{name: tuple(value.shape) for name, value in model.simulate(3).items()}

# %% [markdown]
# ## The guide
#
# Given an image, which $z$ made it? That posterior $p(z \mid x)$ has no formula here. So we take a
# family that we can handle, normals with independent coordinates, and let a second network, the
# encoder, say for each image where the normal stands and how wide it is: $q(z \mid x)$.
#
# Nothing of this needs to be written: `MeanField` runs the model once, sees that `z` is latent, how
# large it is and on which values it lives, and makes what is needed. `check_pair` makes sure that
# the two programs mean the same thing; it is silent where they do.

# %%
guide = MeanField(model, MLP(64, 128, 128), x=x)
ppl_vae.check_pair(model, guide, x=x)

# %% [markdown]
# ## Fitting
#
# Both are fitted at once, to maximize the evidence lower bound (ELBO):
#
# $$ \log p(x) \;\ge\;
#    \underbrace{\mathbb E_{q(z \mid x)} \log p(x \mid z)}_{\text{reconstruction}}
#    \;-\; \underbrace{\mathrm{KL}\big(q(z \mid x) \,\|\, p(z)\big)}_{\text{nats spent on } z} $$
#
# The first term wants $z$ to say much about the image; the second counts what saying it costs. We
# let the cost rise from 0 over ten epochs (`warmup`), so that the model first learns to use $z$.
# The curves show the ELBO without that trick, always, and its two parts.

# %%
fitted = ppl_vae.fit(
    model,
    guide,
    digits,
    epochs=EPOCHS,
    batch_size=50,
    learning_rate=2e-3,
    warmup=10,
    progress=False,
)
plots.curves(fitted.history)

# %% [markdown]
# The two panels on the right tell more than their sum: a model whose KL falls to 0 has stopped
# using its latents, however good its ELBO looks. Toward the end the training curve goes on rising
# while the other one stays: more epochs would begin to learn these 1,197 digits by heart.
#
# ## Looking
#
# Reconstructions ask the guide and the model together: encode, then decode. Digits that neither
# has seen come back a little smoother than they went in.

# %%
test = digits.split("test").batch(slice(0, None))["x"]
plots.reconstructions(model, guide, test[:16], digits.image_shape)

# %% [markdown]
# Samples ask the model alone: $z$ from its prior, then decode. This is the harder question. Many
# are digits; some are nothing.

# %%
plots.samples(model, digits.image_shape, n=36)

# %% [markdown]
# And what does one coordinate mean? Each line moves one of them from its 2 % to its 98 % quantile
# and leaves the others at the values of one test image. Coordinates that vary most over the data
# stand first. Some bend a stroke, some turn one digit into another, and none does one thing only:
# nothing in the story asks for coordinates with a meaning.

# %%
plots.traversal(model, guide, test[:16], digits.image_shape, units=5)

# %% [markdown]
# ## How good is it? A number
#
# The ELBO is only a bound. With $K$ draws from the guide, weighted by how much better the model
# likes them than the guide does, the bound tightens,
#
# $$ \log p(x) \;\approx\; \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)}, $$
#
# and reaches $\log p(x)$ as $K$ grows. What is reported is the negative of it: nats needed per
# digit (NLL).

# %%
for samples in (1, 10, 100, 500):
    figures = ppl_vae.evaluate(model, guide, digits, samples=samples)
    print(f"K = {samples:3d}   NLL {figures.nll:6.2f} ± {figures.nll_se:.2f} nats")
print(f"ELBO {figures.elbo:.2f}, {figures.active_units} of 10 latents in use")

# %% [markdown]
# The ELBO was loose by about nine nats: a normal with independent coordinates, from one encoder for
# all images, is a poor likeness of the true posterior. The last step, from K = 100 to 500, is still
# a nat: the NLL would sink a little further yet.
#
# ## Is it right? A check
#
# A likelihood compares models with each other. Whether a model is any good by itself is another
# question, and it has a direct answer: let it make data sets as large as the test set, and see
# whether the real one could be among them. We compare a few plain numbers, with a p-value each,
# corrected so that a *true* model would fail in 5 % of all cases at most.

# %%
report = ppl_vae.check(model, guide, digits, only=["population_predictive"])
print(report)
report.results[0].plot()

# %% [markdown]
# It fails, clearly, although the samples looked passable. Where is the fault: in the story's first
# line, or in its second? Take the first one out: instead of the prior, draw $z$ from the guide's
# posteriors of training digits, then emit as before.

# %%
train = digits.split("train").batch(slice(0, None))["x"]
torch.manual_seed(0)
with torch.no_grad():
    rows = torch.randint(len(train), (20, len(test)))
    by_prior = [model.simulate(len(test))["x"] for _ in rows]
    by_data = [model.x_dist(guide.posterior(train[row]).sample()).sample() for row in rows]
print(f"{'':27}{'digits':>9}{'z: prior':>10}{'z: guide':>10}")
for name, statistic in {**STATISTICS, **OF_ROWS}.items():
    means = [
        sum(float(statistic(drawn.double())) for drawn in drawns) / len(drawns)
        for drawns in ([test], by_prior, by_data)
    ]
    print(f"{name:27}{means[0]:9.3f}{means[1]:10.3f}{means[2]:10.3f}")

# %% [markdown]
# The mean and the smallest total (of the ink in a digit) come right as soon as $z$ comes from the
# digits' posteriors: there the *prior* was at fault. It puts $z$ where no digit is, and a learned
# prior would not. Zeros stay too few either way, and the spread of totals goes from too wide to
# too narrow: that is the *likelihood*. Ink in neighboring cells goes together, so a pixel is all
# blank or all black more often, and totals vary more, than if 16 cells were hit independently.
#
# So a failed check is a beginning. It said that something is wrong, at a stated error rate, and
# with one more look it said which line of the story to rewrite.
#
# ## Can we trust the numbers themselves?
#
# All of the above came out of code: traces, replays, importance weights. How would we know if it
# were wrong by half a nat? By running the same code on a model whose answer is known.
#
# Probabilistic PCA is a VAE with a linear decoder and normal noise. Its posterior and its evidence
# $\log p(x)$ have formulas, and so has its best fit, from eigenvalues of the covariance (Tipping
# & Bishop 1999). We fit it to the same digits, as if they were real numbers, in double precision,
# and start at their mean.

# %%
torch.manual_seed(0)
ppca = PPCA(latents=10, observed=64, scale=3.0)
ppca.likelihood.net.bias.data = train.mean(0)
normal_guide = MeanField(ppca, MLP(64, 32), x=x)
how = {"batch_size": 50, "learning_rate": 2e-2, "schedule": "cosine", "precision": "64-true"}
ppl_vae.fit(ppca, normal_guide, digits, epochs=EPOCHS, **how, progress=False)
with torch.no_grad():
    evidence = float(ppca.evidence(test.double()).mean())

values, vectors = torch.linalg.eigh(train.double().T.cov(correction=0))  # in ascending order
noise = values[:-10].mean()
w = vectors[:, -10:] * (values[-10:] - noise).sqrt()
best = dist.MultivariateNormal(train.double().mean(0), w @ w.T + noise * torch.eye(64))
print(f"log p(x) of the fit, by formula: {evidence:.4f} nats per digit")
print(f"log p(x) of the best fit:        {best.log_prob(test.double()).mean():.4f}")

# %% [markdown]
# Now the identity that carries the weight. For the *exact* posterior,
# $p(x, z) / p(z \mid x) = p(x)$ whatever $z$ is: there is nothing left to average. So the ELBO from
# a single draw must be the evidence, whatever the seed, to the last digits of double precision:
# reconstruction and KL move from draw to draw, their difference does not. The guide is written out
# this time: `Factorized` says which conditional draws each site, and from what.


# %%
class Exact(nn.Module):
    def __init__(self, model: PPCA) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.posterior(x)


exact_guide = ppl_vae.Factorized(z=(Exact(ppca), ["x"]))
for seed in range(3):
    one_draw = ppl_vae.evaluate(ppca, exact_guide, digits, samples=1, seed=seed)
    print(f"{one_draw.reconstruction:.4f} - {one_draw.kl:.4f} = {one_draw.elbo:.4f}")
    assert abs(one_draw.elbo - evidence) < 1e-8

# %% [markdown]
# The fitted guide is not exact, so its ELBO must lie below the evidence, by its KL from the true
# posterior; and importance sampling must close the gap.

# %%
figures = ppl_vae.evaluate(ppca, normal_guide, digits, samples=500)
print(f"log p(x), by formula: {evidence:.4f}")
print(f"ELBO, fitted guide:   {figures.elbo:.4f}")
print(f"-NLL, K = 500:        {-figures.nll:.4f}")

# %% [markdown]
# The same lines of code gave the numbers of the first model, where no formula could tell. That is
# the reason to believe them, and it is a better one than a picture.
#
# One warning to end with. The evidence of PPCA must not be compared with that of the first model:
# one is the *density* of real numbers, the other the *probability* of counts. And that we know the
# evidence of PPCA exactly does not make PPCA right:

# %%
print(ppl_vae.check(ppca, normal_guide, digits, only=["population_predictive"]))
