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
# # Priors that learn
#
# The first tutorial ended with a check that failed, and half of the fault was the prior's: a
# standard normal puts $z$ where no digit is. Here we look at that fault, measure it, and mend it
# with priors that learn. One of them, the VampPrior, is made of the guide itself, and we look at it
# from near.
#
# It takes about two minutes on a laptop.

# %%
# %matplotlib inline
import math
import os
import time

import torch
from matplotlib.figure import Figure

import ppl_vae
from ppl_vae import plots
from ppl_vae.checks import population_predictive
from ppl_vae.flows import Coupling, MaskedAutoregressive, RationalQuadratic
from ppl_vae.mixtures import MixtureOfGaussians, VampPrior
from ppl_vae.objectives import plain_elbo
from ppl_vae.priors import Autoregressive, FlowPrior, StandardNormal
from ppl_vae.recipes import build
from ppl_vae.svi import parameters

SMOKE = bool(os.environ.get("PPL_VAE_SMOKE"))  # small, to see only whether all of it runs
FIRST, THEN = (1, 1) if SMOKE else (60, 40)  # epochs
SAMPLES = 10 if SMOKE else 200  # importance samples a digit

digits = ppl_vae.load_data("digits")
train, test = (digits.split(name).batch(slice(0, None)) for name in ("train", "test"))

# %% [markdown]
# ## Where the codes lie
#
# A *code* is a draw of $q(z \mid x)$: where the guide puts a digit. We take the VAE of the first
# tutorial, by the name of its recipe, but with two latents instead of ten, so that we can look. The
# dark disk holds half of the prior, the light one 90 %.

# %%
quiet = {"progress": False, "compile": False}


def first_fit(latents):
    """The recipe's pair, with its standard normal prior."""
    made = build("vae-digits", {"latents": latents}, seed=0)
    return ppl_vae.fit(made.model, made.guide, digits, **made.fit | {"epochs": FIRST, **quiet})


def codes(pair, x):
    """A draw of q(z | x) for each image, (rows, Z)."""
    torch.manual_seed(0)
    with torch.no_grad():
        return pair.guide.posterior(x).sample()


def prior_draws(pair, n):
    torch.manual_seed(0)
    with torch.no_grad():
        return pair.model.z_dist().sample((n,))


def panel(ax, pair, title):
    """The smallest regions that hold half and 90 % of the prior, over the codes of digits."""
    z, side = codes(pair, train["x"]), torch.linspace(-6.5, 6.5, 261)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    with torch.no_grad():
        prior = pair.model.z_dist()
        half, most = prior.log_prob(prior_draws(pair, 10_000)).quantile(torch.tensor([0.5, 0.1]))
        levels = [float(most), float(half), math.inf]
        ax.contourf(side, side, prior.log_prob(grid), levels=levels, colors=["0.87", "0.7"])
    points = ax.scatter(*z.T, c=train["y"], s=2, cmap="tab10", vmin=-0.5, vmax=9.5)
    ax.set(title=title, aspect="equal", xlim=(-6.5, 6.5), ylim=(-6.5, 6.5), xticks=(), yticks=())
    return points


plain = first_fit(latents=2)
figure = Figure(figsize=(5.6, 4.8), layout="constrained")
points = panel(figure.subplots(), plain, "Codes of the training digits, over the prior")
figure.colorbar(points, ticks=range(10), label="digit")
figure

# %% [markdown]
# The guide does not put its codes where the prior is. Digits stand in arms around a center, many of
# them outside of the disk, and between the arms the prior has mass where hardly a code is.
#
# How wrong is that? Averaged over the data, the posteriors make one distribution, the *aggregate
# posterior* $q(z) = \frac1N \sum_n q(z \mid x_n)$, and the KL of the ELBO falls into two parts
# (Hoffman & Johnson 2016):
#
# $$ \frac1N \sum_n \mathrm{KL}\big(q(z \mid x_n) \,\|\, p(z)\big) \;=\;
#    \underbrace{\mathbb E \log \frac{q(z \mid x)}{q(z)}}_{\text{information}} \;+\;
#    \underbrace{\mathrm{KL}\big(q(z) \,\|\, p(z)\big)}_{\text{distance}} $$
#
# The first is what $z$ tells about which digit it came from. The second buys nothing: it is paid
# because the prior is not $q(z)$. With 1,197 digits both can be computed, up to the noise of one
# draw a digit. Beside them stand two plain shares: of the test digits' codes outside of the region
# that holds 90 % of the prior, and of the prior's draws outside of the region, where $q(z)$ is
# densest, that holds 90 % of these codes. If the prior were $q(z)$, both would be near 10 %.

# %%


def log_aggregate(q, z):
    """Log density of the aggregate posterior at z (rows, Z): of the mean of all q(z | x)."""
    each = [q.log_prob(part[:, None]).logsumexp(1) for part in z.split(500)]
    return torch.cat(each) - math.log(q.batch_shape[0])


def surgery(pair):
    """The two parts of the KL over the training digits, in nats."""
    z = codes(pair, train["x"])
    with torch.no_grad():
        q, p = pair.guide.posterior(train["x"]), pair.model.z_dist()
        own, everyone = q.log_prob(z), log_aggregate(q, z)
        return float((own - everyone).mean()), float((everyone - p.log_prob(z)).mean())


def misplaced(pair):
    """Shares: of codes outside the prior's 90 %, of its draws outside the codes' 90 %."""
    z, draws = codes(pair, test["x"]), prior_draws(pair, 2000)
    with torch.no_grad():
        prior, q = pair.model.z_dist(), pair.guide.posterior(train["x"])
        of_codes = prior.log_prob(z) < prior.log_prob(draws).quantile(0.1)
        of_draws = log_aggregate(q, draws) < log_aggregate(q, z).quantile(0.1)
    return float(of_codes.double().mean()), float(of_draws.double().mean())


def table(pairs):
    print(f"{'':16}{'information':>12}{'distance':>10}{'codes out':>11}{'draws out':>11}")
    for name, pair in pairs.items():
        information, distance = surgery(pair)
        codes_out, draws_out = misplaced(pair)
        print(f"{name:16}{information:12.2f}{distance:10.2f}{codes_out:11.0%}{draws_out:11.0%}")


table({"standard normal": plain})

# %% [markdown]
# More than a nat is paid for nothing, and two codes of five lie where the prior hardly looks.
#
# ## Priors that learn
#
# For a given guide, the best prior is $q(z)$ itself. But that is a mixture of 1,197 posteriors:
# dear to score, and it would know the training digits by heart. So we take families with
# parameters, and fit these together with all others:
#
# - a **mixture** of 50 normals;
# - a **VampPrior** (Tomczak & Welling 2018): a mixture too, but its components are the guide's own
#   posteriors, $\frac1K \sum_k q(z \mid u_k)$, at 50 *pseudo-inputs* $u_k$, images that are
#   learned;
# - **MADE**: each coordinate a mixture of five normals given those before it;
# - two **flows**, a normal moved by invertible maps: masked autoregressive (MAF), and coupled
#   splines.
#
# A prior is a part of the model, so it is changed by giving the model another one. Each goes on
# from the pair that we have, for 40 epochs; so does the standard normal, to be fair. (To begin anew
# with such a prior, there are recipes: `mixture-prior-digits`, `vamp-digits`, `flow-prior-digits`.)


# %%
def vamp(components):
    return lambda guide, size: VampPrior.from_data(
        guide.posterior, train["x"], components, noise=0.5, bounds=(0.0, 16.0)
    )


PRIORS = {
    "standard normal": lambda guide, size: StandardNormal(size),
    "mixture": lambda guide, size: MixtureOfGaussians(size, components=50),
    "VampPrior": vamp(components=50),
    "MADE": lambda guide, size: Autoregressive(size, components=5),
    "MAF": lambda guide, size: FlowPrior(MaskedAutoregressive(size)),
    "spline coupling": lambda guide, size: FlowPrior(
        Coupling(size, elementwise=RationalQuadratic())
    ),
}


def with_prior(make, pair, latents):
    """A copy of a fitted pair, with another prior."""
    made = build("vae-digits", {"latents": latents}, seed=0)
    made.model.load_state_dict(pair.model.state_dict())
    made.guide.load_state_dict(pair.guide.state_dict())
    torch.manual_seed(0)
    made.model.prior = make(made.guide, latents)
    return made


def go_on(pair):
    how = {"epochs": THEN, "batch_size": 50, "learning_rate": 1e-3, **quiet}
    return ppl_vae.fit(pair.model, pair.guide, digits, **how)


flat = {name: go_on(with_prior(make, plain, latents=2)) for name, make in PRIORS.items()}
figure = Figure(figsize=(9, 6.3), layout="constrained")
for ax, (name, pair) in zip(figure.subplots(2, 3).flat, flat.items(), strict=True):
    panel(ax, pair, name)
figure

# %% [markdown]
# All of them went to where the codes are. The VampPrior and the splines follow the arms; the MAF
# made one wide blob. In numbers:

# %%
table(flat)

# %% [markdown]
# The information is about the same with all of them, 5.9 nats (the further epochs have raised it
# from 5.3). The distance falls from 1.42 nats to 0.64 with the VampPrior, and to about 0.8 with the
# others. Of the draws, only the VampPrior's and the splines' are placed as they should be. The blob
# of the MAF costs no more nats than the others, but a fifth of its draws lie where few codes are,
# no fewer than of the standard normal's.
#
# ## What it is worth
#
# Two latents are for looking. With ten, as in the first tutorial, what do we gain? The last column
# is the NLL of the standard normal less that of the prior at hand, for each test digit, then
# averaged. Its standard error is much smaller than that of an NLL: most of the latter is that some
# digits are hard, and they are hard for every pair.

# %%
roomy = first_fit(latents=10)
begun = {name: with_prior(make, roomy, latents=10) for name, make in PRIORS.items()}
pseudo_before = begun["VampPrior"].model.prior.pseudo_inputs.detach().clone()
at_start = ppl_vae.evaluate(
    begun["VampPrior"].model, begun["VampPrior"].guide, digits, samples=SAMPLES
)
fitted = {name: go_on(pair) for name, pair in begun.items()}


def nats(pair):
    """NLL of each test digit, (rows,)."""
    torch.manual_seed(0)
    with torch.no_grad():
        q = pair.guide.posterior(test["x"])
        z = q.sample((SAMPLES,))
        log_p = pair.model.z_dist().log_prob(z) + pair.model.x_dist(z).log_prob(test["x"])
        return math.log(SAMPLES) - (log_p - q.log_prob(z)).logsumexp(0)


def compare(pairs):
    normal = nats(pairs["standard normal"])
    print(f"{'':16}{'ELBO':>8}{'NLL':>15}{'gain':>14}")
    for name, pair in pairs.items():
        figures = ppl_vae.evaluate(pair.model, pair.guide, digits, samples=SAMPLES)
        gain = normal - nats(pair)
        error = gain.std() / math.sqrt(len(gain))
        print(
            f"{name:16}{figures.elbo:8.2f}{figures.nll:8.2f} ± {figures.nll_se:.2f}"
            f"{gain.mean():8.2f} ± {error:.2f}"
        )


compare(fitted)

# %% [markdown]
# Every learned prior is better, by 1.4 to 2.3 nats a digit, many times the standard error. Among
# themselves they differ by less than a nat, and that comes from one seed: it is no ranking.
#
# In ten dimensions the aggregate posterior is another thing than in two:

# %%
table(fitted)

# %% [markdown]
# The information has reached its limit, $\log 1197 = 7.09$ nats: a code tells from exactly which
# training digit it came. So $q(z)$ is a cloud of islands that do not touch, and the ten nats of
# distance that remain cannot be had: a prior that sat on these islands would be wrong about every
# new digit. What could be had is what the NLL of *test* digits gained. The draws tell it too: 70 %
# of the standard normal's lie outside of where the test digits' codes are dense, 31 % of the
# VampPrior's, and about half of the others'.
#
# Does the model now make digits? We ask the check of the first tutorial: could the test digits be a
# data set of the model's?

# %%
sizes = {"replicates": 280, "rows": 20} if SMOKE else {}
results = {
    name: population_predictive(pair.model, pair.guide, digits, **sizes)
    for name, pair in fitted.items()
}
for name, result in results.items():
    records = result.statistics
    failed = [record["statistic"] for record in records if record["verdict"] == "fail"]
    print(f"{name:16}{len(failed)} of {len(records)} fail: {', '.join(failed)}")

# %% [markdown]
# The standard normal fails in nine statistics, and four of the five learned priors in five. That is
# what we hoped for. The first tutorial found that two faults were mixed up in this check: the
# prior's, which moved the mean and the totals, and the likelihood's, which makes blank pixels too
# rare, and so the spread of pixels wrong. The first one is mended; of the second, a prior knows
# nothing, and what is learned from training digits (their distance, and a classifier's opinion)
# sees it too. The mixture mends less than its NLL suggests.

# %%
results["VampPrior"].plot()

# %% [markdown]
# And the samples, which are the plainest check of all: fewer of them are nothing.

# %%
with torch.no_grad():
    rows = [
        pair.model.x_dist(prior_draws(pair, 32)).mean.reshape(2, 16, *digits.image_shape)
        for pair in (fitted["standard normal"], fitted["VampPrior"], fitted["MADE"])
    ]
plots.image_grid(
    torch.cat(rows),
    title="Means of x given latents drawn from the prior",
    row_labels=["normal", "", "VampPrior", "", "MADE", ""],
)

# %% [markdown]
# ## The VampPrior from near
#
# The 50 pseudo-inputs began at training digits, with some noise added. Here are sixteen of them,
# before and after, and what the model makes of the mean of each component.

# %%
chosen = fitted["VampPrior"]
pseudo_after = chosen.model.prior.pseudo_inputs.detach()
with torch.no_grad():
    component = chosen.guide.posterior(pseudo_after)
    decoded = chosen.model.x_dist(component.mean).mean
lines = [u[:16].reshape(16, *digits.image_shape) for u in (pseudo_before, pseudo_after, decoded)]
plots.image_grid(
    torch.stack(lines),
    title="Sixteen pseudo-inputs, and the digits that their components stand for",
    row_labels=["begun at", "learned", "decoded"],
)


# %% [markdown]
# That is a surprise: to the eye, nothing was learned. Adam moves a number by about the learning
# rate at a step, so 960 steps of 0.001 take a pixel one count of sixteen at most. Yet before the
# first step the prior was poor, and afterwards it was good. What has changed?


# %%
def width(guide, x):
    """Geometric mean of the scales of q(z | x), over images and coordinates."""
    with torch.no_grad():
        return float(guide.posterior(x).variance.log().mean().div(2).exp())


print(f"NLL before the first step: {at_start.nll:.2f}")
print(f"pixels have moved by {(pseudo_after - pseudo_before).square().mean().sqrt():.2f} counts")
print(f"width of q(z | x) for digits:                     {width(chosen.guide, train['x']):.2f}")
print(f"width of q(z | u) where the pseudo-inputs began:  {width(roomy.guide, pseudo_before):.2f}")
print(f"the same images, the guide of today:              {width(chosen.guide, pseudo_before):.2f}")
print(f"the pseudo-inputs of today:                       {width(chosen.guide, pseudo_after):.2f}")

# %% [markdown]
# A digit's posterior is narrow, 0.20 on average: fifty islands of that width are no prior for ten
# dimensions, and the NLL began at 134 nats, far above the standard normal's 92. A *pseudo-input's*
# posterior has become more than three times as wide as a digit's. At the images where the
# pseudo-inputs began, it has become wide too, 0.51 where it was 0.20: so it is mostly the guide
# that has learned. It tells pseudo-inputs from digits (their noise gives them away: no digit has
# half a count of ink) and answers them with wide normals. A component is therefore better judged by
# what it decodes to than by the looks of its pseudo-input.
#
# ## How the prior's gradient reaches the guide
#
# The score $\log p(z)$ of a code depends on the guide twice: by way of $z$, as with any prior, and
# because each component *is* the guide, applied to $u_k$. Hold the codes fixed, and only the second
# way is left:

# %%
for name in ("mixture", "VampPrior"):
    pair = fitted[name]
    z = codes(pair, train["x"])  # numbers: nothing flows back through the draws
    log_p = pair.model.z_dist().log_prob(z).mean()
    for of, module in (("the prior's", pair.model.prior), ("the guide's", pair.guide)):
        found = torch.autograd.grad(
            log_p, list(module.parameters()), retain_graph=True, allow_unused=True
        )
        squares = [float(gradient.square().sum()) for gradient in found if gradient is not None]
        print(f"{name:10} gradient of log p(z) by {of} parameters: {math.sqrt(sum(squares)):.3f}")

# %% [markdown]
# A mixture's score teaches the mixture; that of a VampPrior teaches the guide, and the
# pseudo-inputs only a little. There is a use in that. Where the guide moves its codes, the prior
# moves along. Push all codes of both pairs by 1 in each direction, before the prior has had a
# chance to learn:


# %%
def mean_kl(pair):
    z = codes(pair, test["x"])
    with torch.no_grad():
        log_q = pair.guide.posterior(test["x"]).log_prob(z)
        return float((log_q - pair.model.z_dist().log_prob(z)).mean())


for name in ("mixture", "VampPrior"):
    locations = fitted[name].guide.heads["z"].net.bias[:10]
    here = mean_kl(fitted[name])
    with torch.no_grad():
        locations += 1
        there = mean_kl(fitted[name])
        locations -= 1
    print(f"{name:10} KL {here:.2f}, and {there:.2f} with all codes moved by 1 in each direction")

# %% [markdown]
# The mixture pays for it until it has caught up. The VampPrior has moved with the codes, to the
# last digit. So it never lags behind its guide, and it needs few parameters of its own.
#
# The guide's parameters are nevertheless the guide's: `VampPrior` does not register them a second
# time, so that the optimizer has each of them once.
#
# ## The price
#
# What does an uncompiled step cost, in processor time? We take the least of 40, taken in turn.


# %%
def stepping(make):
    pair = with_prior(make, roomy, latents=10)
    optimizer = torch.optim.Adam(parameters(pair.model, pair.guide))
    x = train["x"][:50]
    svi = ppl_vae.SVI(
        pair.model, pair.guide, optimizer, plain_elbo(pair.model, pair.guide, x=x), compile=False
    )
    size = sum(p.numel() for p in pair.model.prior.parameters())
    return size, lambda: svi.step(x=x, total=len(train["x"]))


steppers = {name: stepping(make) for name, make in PRIORS.items()}
for components in (10, 250, 1000):
    steppers[f"VampPrior {components}"] = stepping(vamp(components))
seconds = {name: [] for name in steppers}
for _ in range(3 if SMOKE else 40):  # taken in turn, so that a busy moment hits all
    for name, (_, step) in steppers.items():
        started = time.process_time()
        step()
        seconds[name].append(time.process_time() - started)
for name, (size, _) in steppers.items():
    print(f"{name:16}{size:8,} parameters{1000 * min(seconds[name]):8.1f} ms a step")

# %% [markdown]
# Beside what all pairs pay, a mixture, fifty pseudo-inputs or MADE cost almost nothing here. MAF
# takes about a half more, coupled splines more than twice the time, a thousand pseudo-inputs three
# times. (These are the figures of one machine, in which a tenth more or less means nothing.) So how
# many pseudo-inputs does it take?

# %%
sizes = {"standard normal": fitted["standard normal"]}
for components in (10, 250):
    sizes[f"VampPrior {components}"] = go_on(with_prior(vamp(components), roomy, latents=10))
compare(sizes)

# %% [markdown]
# Ten are too few: they are no better than the standard normal. With 50 the gain was 1.84, with 250
# it is a little more.
#
# ## Which one?
#
# - Begin with the **standard normal**: it costs nothing, and it is what the others are measured
#   against.
# - If the check fails on totals and means, or samples look worse than reconstructions, let the
#   prior learn. **MADE** was good here, and cheap; to draw from it takes a pass a latent, which
#   only simulation pays.
# - The **VampPrior** came nearest to the codes, and moves with the guide. It needs a guide whose
#   posterior can score any value (mean field can, a planar flow cannot) and a single latent site;
#   each step costs a pass of the encoder over all pseudo-inputs, which is dear for large images.
# - **Flows** need no number of components. MAF is quick to score, coupled splines are quick both
#   ways, but cost most.
# - A **mixture** is the simplest. Here it gained least.
#
# These are small images, one seed, and 40 epochs. What will hold elsewhere is the way of looking:
# the aggregate posterior against the prior, the gain for each datum, and the check.
