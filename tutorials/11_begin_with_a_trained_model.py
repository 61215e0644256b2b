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
# # Begin with a trained model
#
# Not every question needs a fit. Some models of static MNIST come with the package: a VAE, one with
# a VampPrior, and one with two levels of latents. Here we load them, look into them, ask how far
# their likelihoods can be believed, and let them complete images.
#
# It takes about a minute on a laptop.

# %%
# %matplotlib inline
import os
import warnings

import numpy as np
import torch
from matplotlib.figure import Figure

from ppl_vae import plots, pretrained
from ppl_vae.reproduction import score
from ppl_vae.uses import impute

SMOKE = bool(os.environ.get("PPL_VAE_SMOKE"))  # small, to see only whether all of it runs

for name, line in pretrained.summaries().items():
    print(f"{name}: {line}")

# %% [markdown]
# Each has a card: `pretrained.card(name)`, or `ppl-vae load NAME`, which makes a run's folder too,
# for `ppl-vae check` and `sample`. It says of the figures how they were made, against which
# published one they stand, and what they are not.

# %%
card = pretrained.card("hvae-static-mnist")
print(card.partition("## Data")[0])

# %% [markdown]
# A model loads with the data that it was fitted to. Those of static MNIST are not in the package;
# where they are not on the disk either, a model comes with rows that it has drawn itself, and a
# warning says so and where the files belong. All below runs either way; what the text says of it
# was seen with the real ones.

# %%
warnings.filterwarnings("default", message=".*rows drawn from the model")
NAMES = ("vae", "vamp", "hvae")
pairs = {name: pretrained.load(f"{name}-static-mnist") for name in NAMES}
data = pairs["vae"].data
held = data.split("test")
spread = range(0, len(held), len(held) // 100)  # the rows are sorted by digit
test = held.batch(torch.tensor(spread))["x"]
print(data.name)

# %% [markdown]
# ## What they make up
#
# Means of x given latents from the prior, so that no pixel's coin is tossed. A pair of rows each.


# %%
def made_up(pair, n):
    """Means of x for latents drawn from the prior, (n, 1, 28, 28)."""
    model = pair.model
    torch.manual_seed(0)
    with torch.no_grad():
        if hasattr(model, "levels"):
            z2 = model.z_dist(2).expand([n]).sample()
            mean = model.x_dist(z2, model.z_dist(1, z2).sample()).mean
        else:
            mean = model.x_dist(model.z_dist().expand([n]).sample()).mean
    return mean.unflatten(-1, data.image_shape)


plots.image_grid(
    torch.stack([row for pair in pairs.values() for row in made_up(pair, 32).split(16)]),
    row_labels=[label for name in pairs for label in (name, "")],
)

# %% [markdown]
# ## What stands on which level
#
# Of the two levels, hold the upper one, and draw the lower one anew. Each row has one z2, and its
# twelve digits a z1 each.

# %%
model = pairs["hvae"].model
torch.manual_seed(2)
with torch.no_grad():
    z2 = model.z_dist(2).expand([6]).sample().repeat_interleave(12, 0)
    drawn = model.x_dist(z2, model.z_dist(1, z2).sample()).mean
plots.image_grid(drawn.reshape(6, 12, *data.image_shape), title="One z2 a row, twelve z1")

# %% [markdown]
# The upper level says which digit, how thick and how slanted; the lower one how it is drawn, and
# whether a loop closes. Where the upper one stands between digits, as in the first and the fourth
# row, the lower one has to decide, and sometimes cannot.

# %% [markdown]
# ## What the prior is made of
#
# The VampPrior's 500 components are the guide's answers to 500 images that were learned. Here are
# sixteen of them, and what the model makes of each component's mean.

# %%
model, guide = pairs["vamp"].model, pairs["vamp"].guide
with torch.no_grad():
    u = model.prior.pseudo_inputs[:16].clamp(0, 1)
    decoded = model.x_dist(guide.posterior(u).mean).mean
plots.image_grid(
    torch.stack([u, decoded]).unflatten(-1, data.image_shape), row_labels=["learned", "decoded"]
)

# %% [markdown]
# What was learned is faint, and decodes to clean digits all the same: a pseudo-input is a name for
# a place among the codes, not a picture of what is there.

# %% [markdown]
# ## How many draws does a likelihood take?
#
# Papers quote NLLs by 5,000 importance draws an image. That is an upper bound on average, which
# falls as draws are added; how fast depends on how good the guide is. `score` gives it row by row.
# Here are a hundred test digits.

# %%
DRAWS = (1, 10, 50) if SMOKE else (1, 10, 100, 1000)
some = list(spread)[:10] if SMOKE else list(spread)
nll = {}
for name, pair in pairs.items():
    found = [score(pair, samples=draws, rows=some) for draws in DRAWS]
    nll[name] = np.array([-one["log_evidence"].mean() for one in found])
    effective = np.median(found[-1]["effective_samples"])
    by_draws = "".join(f"{value:9.2f}" for value in nll[name])
    print(f"{name:10}{by_draws}   effective draws of {DRAWS[-1]}: {effective:.1f}")

# %%
figure = Figure(figsize=(5.5, 3.4), layout="constrained")
ax = figure.subplots()
for name, values in nll.items():
    ax.plot(DRAWS, values, marker="o", label=name)
ax.set(xscale="log", xlabel="importance draws a digit", ylabel="NLL, nats")
ax.legend()
figure

# %% [markdown]
# With one draw the number is the negative ELBO, and by it the two levels are behind the VampPrior,
# 86.2 to 86.0. With a thousand they are ahead, 82.1 to 82.2. The curves fall by 3.8 to 5.1 nats,
# and how far depends on the guide. So two NLLs can be compared only if they took as many draws, and
# ELBOs may rank models in another way. A tenth of a nat of a hundred digits says nothing, though:
# of all test digits, by 5,000 draws, the two levels have 84.68 and the VampPrior 84.51. No curve is
# flat yet: of a thousand draws, 11 to 17 do all the work (the median over digits), and `pareto_k`
# in what `score` returns says of which rows the estimate is not to be relied on.
#
# ## What is missing
#
# The lower half of a digit, drawn from the model given the upper half: latents proposed by the
# guide and accepted by Metropolis' rule, then the missing pixels. Below the digits and what is
# given of them stands the last image of each of four chains.

# %%
missing = torch.zeros(28, 28, dtype=torch.bool)
missing[14:] = True
missing = missing.flatten()
digits = test[::10]
length = {"draws": 8, "warmup": 2} if SMOKE else {"draws": 400, "warmup": 400}
for name in ("vae", "hvae"):
    drawn = impute(pairs[name].model, pairs[name].guide, digits, missing, **length)
    print(f"{name:10} accepted {float(drawn.acceptance.median()):.2f}", end="  ")
    print(f"R-hat {float(drawn.r_hat.median()):.2f}")
given = digits.masked_fill(missing, torch.nan)
each = drawn.draws.unflatten(0, (4, -1))[:, -1]
plots.image_grid(
    torch.stack([digits, given, *each]).unflatten(-1, data.image_shape),
    row_labels=["digit", "given", *(f"chain {k}" for k in range(1, 5))],
)

# %% [markdown]
# Where the upper half leaves a choice, the chains choose differently: a thick 9 becomes a 0 in one
# of them and a 4 in another, and a 2 is round below or has a foot. Most are digits that the model
# can believe, but the shares of such choices cannot be read off: seven proposals in a hundred are
# accepted, and an R-hat of 1.4 says that the chains have not met.
# [Tutorial 10](10_can_i_believe_my_guide.py) goes on from there.
#
# ## Going on
#
# - `ppl-vae load NAME` makes a run's folder, which `ppl-vae check` reports on; the state of the
#   optimizer is not kept, so that the *same* fit cannot go on.
# - A new one can: `ppl_vae.fit(pair.model, pair.guide, data, ...)` begins with these weights.
# - `ppl-vae reproduce hvae-static-mnist` makes such a model anew, with its record;
#   `results/README.md` has all of them.
