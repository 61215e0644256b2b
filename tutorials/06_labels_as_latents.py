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
# # A label is a latent that is sometimes observed
#
# In a Pyro program a site is observed where its value is given, and latent where it is not. So
# there are no supervised, semi-supervised and unsupervised models: there is one story of how images
# come about, told with more or fewer of its labels given. Here we tell it
# with fewer and fewer of them, and look at what is lost.
#
# It takes some minutes on a laptop.

# %%
# %matplotlib inline
import os

import torch
from matplotlib.figure import Figure

import ppl_vae
from ppl_vae.conditionals import Normal
from ppl_vae.discrete import Labels
from ppl_vae.guide import Factorized
from ppl_vae.likelihoods import Binomial
from ppl_vae.models import M2
from ppl_vae.nn import MLP
from ppl_vae.objectives import MutualInformation, SemiSupervised, VirtualAdversarial
from ppl_vae.priors import StandardNormal

SMOKE = bool(os.environ.get("PPL_VAE_SMOKE"))  # small, to see only whether all of it runs
EPOCHS = 1 if SMOKE else 60
quiet = {"progress": False, "compile": False}

digits = ppl_vae.load_data("digits")
print(M2.__doc__)

# %% [markdown]
# ## The pair
#
# The guide is written out: $q(y \mid x)\, q(z \mid x, y)$. Its first part is a classifier. A
# gradient cannot pass through the draw of a class, but with ten of them none has to be drawn:
# `estimator="enumerate"` lets the objective sum over all.


# %%
def pair(latents: int = 10) -> tuple[M2, Factorized]:
    torch.manual_seed(0)
    likelihood = Binomial(MLP(10 + latents, 128, 128, 64), total_count=16)
    guide = Factorized(
        y=(Labels(MLP(64, 128, 128, 10), estimator="enumerate"), ["x"]),
        z=(Normal(MLP(64 + 10, 128, 128, 2 * latents)), ["x", "y"]),
    )
    return M2(StandardNormal(latents), likelihood, classes=10), guide


# %% [markdown]
# ## Labels, withheld
#
# `digits.labeled(50)` keeps the labels of fifty training images, five of each digit, and puts -1 in
# place of the others: the data set that `fit` gets does not hold them. Each batch has rows of both
# kinds, and the labeled ones count as the fifty that they are, whatever their share of the batch:
#
# $$\sum_{\text{labeled}} \mathcal L(x, y) + \sum_{\text{unlabeled}} \mathcal U(x)
#   + \alpha N \operatorname{mean}_{\text{labeled}} \log q(y \mid x)$$
#
# The last term is there because the first two do not train the classifier on a single label: of a
# row whose label is given, $q(y \mid x)$ is not asked.


# %%
def fitted(labels: int, objective: SemiSupervised | None) -> dict[str, float]:
    data = digits.labeled(labels)
    model, guide = pair()
    # An epoch is a pass over the rows without labels, of which few may be left.
    rows = len(data.split("train"))
    ppl_vae.fit(
        model,
        guide,
        data,
        epochs=max(1, EPOCHS * rows // (rows - labels) if not SMOKE else 1),
        batch_size=125,
        labeled_batch=min(25, labels),
        schedule="cosine",
        objective=objective,
        **quiet,
    )
    scored = ppl_vae.evaluate(model, guide, data, samples=20)
    assert scored.labels is not None
    return {
        "classifier": scored.labels["classifier"].accuracy,
        "p(y | x)": scored.labels["importance"].accuracy,
        "calibration error": scored.labels["classifier"].calibration_error,
        "NLL": scored.nll,
    }


recipes = {
    "ELBO alone": None,
    "and a classification term": SemiSupervised(100.0),
    "and penalties": SemiSupervised(
        100.0, penalties=[VirtualAdversarial(8.0, 100.0, rise=EPOCHS / 4), MutualInformation(100.0)]
    ),
}
for name, objective in recipes.items():
    figures = fitted(50, objective)
    print(f"{name:<27}", {k: round(v, 3) for k, v in figures.items()})

# %% [markdown]
# The ELBO alone does not know which of its ten classes we call a three: little ties the classifier
# to the labels, and it does no better than chance, however good the images are. With the
# classification term it learns the fifty labels, but what the other images say reaches it through
# the decoder alone, and a decoder of ten continuous latents has little need of a class.
#
# The two penalties ask something of the classifier at images without labels: not to change its
# answer near by (`VirtualAdversarial`), and to commit itself (`MutualInformation`). They are no
# part of the model, so the table has the NLL too.
#
# ## Fewer and fewer labels
#
# The same program and the same objective, from a thousand labels down to one of each digit.

# %%
counts = [20] if SMOKE else [10, 20, 50, 200, 1000]
errors = []
for labels in counts:
    objective = SemiSupervised(
        100.0, penalties=[VirtualAdversarial(8.0, 100.0, rise=EPOCHS / 4), MutualInformation(100.0)]
    )
    figures = fitted(labels, objective)
    errors.append(100 * (1 - figures["classifier"]))
    print(f"{labels:5} labels", {k: round(v, 3) for k, v in figures.items()})


# %%
def supervised(labels: int) -> float:
    """Test error, in percent, of the classifier's net fitted to the labeled rows alone."""
    data = digits.labeled(labels)
    known = data.split("train").labeled
    batch = data.split("train").batch(known)
    torch.manual_seed(0)
    net = MLP(64, 128, 128, 10)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(10 if SMOKE else 500):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(batch["x"]), batch["y"]).backward()
        optimizer.step()
    test = data.split("test").batch(slice(None))
    return 100 * float((net(test["x"]).argmax(1) != test["y"]).double().mean())


figure = Figure(figsize=(5, 3.2), layout="constrained")
axes = figure.subplots()
axes.semilogx(counts, [supervised(labels) for labels in counts], "o--", label="labels alone")
axes.semilogx(counts, errors, "o-", label="M2, all images")
axes.set_xlabel("labels")
axes.set_ylabel("test error, %")
axes.set_ylim(bottom=0)
axes.legend(frameon=False)
figure

# %% [markdown]
# With a thousand labels the other hundred images add nothing. With ten, one of each digit, they are
# nearly all there is: what the penalties find are clusters, and a single label names each of them,
# rightly or not.
#
# ## What is left when the label is taken out
#
# Given its label, an image is encoded in $z$ alone, so $z$ is what the label does not say: slant,
# width, boldness. We fit the pair once more, to all labels, by the ELBO alone, and with four
# latents instead of ten, which have no room for the label. Then we keep $z$ and change the label.

# %%
model, guide = pair(latents=4)
ppl_vae.fit(model, guide, digits, epochs=2 * EPOCHS, **quiet)
test = digits.split("test").batch(slice(None))
shown = [int((test["y"] == label).nonzero()[0]) for label in (3, 4, 7, 9)]
every = torch.eye(10)
with torch.no_grad():
    x = test["x"][shown]
    z = guide.conditionals["z"](x, every[test["y"][shown]]).mean
    grid = model.x_dist(every.repeat(len(shown), 1), z.repeat_interleave(10, 0)).mean

figure = Figure(figsize=(7, 2.8), layout="constrained")
for row, panels in enumerate(figure.subplots(len(shown), 11)):
    images = [x[row], *grid[10 * row : 10 * row + 10]]
    for panel, image in zip(panels, images, strict=True):
        panel.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=16)
        panel.set_axis_off()
figure

# %% [markdown]
# On the left is the image that was encoded, then ten digits in its hand.
#
# ## Two label posteriors
#
# $q(y \mid x)$ is the guide's, and as good as it was trained. $p(y \mid x)$ is the model's: it
# follows from the story by Bayes' rule, and `evaluate` computes it by importance sampling over $z$.
# They need not agree. In this last fit every label was given, so nothing ever asked the classifier.

# %%
scored = ppl_vae.evaluate(model, guide, digits, samples=100, withheld=["y"])
assert scored.labels is not None
for name, scores in scored.labels.items():
    print(f"{name:<11} accuracy {scores.accuracy:.3f}  log loss {scores.log_loss:.3f} nats")

# %% [markdown]
# The classifier guesses, and still the model knows its digits: it is right about 97 of 100, by the
# story alone. With fifty labels it was the other way round, 95 of 100 by the classifier and 69 by
# the model: ten latents can draw a three under another label, and fifty labels do not keep them
# from it. A label posterior that is to be *believed* comes from a story in which the label has
# something to do.
