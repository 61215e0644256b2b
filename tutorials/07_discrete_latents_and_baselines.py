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
# # Latents that are bits
#
# Some things are discrete: a word, a label, whether a stroke is there. But a draw that is 0 or 1
# does not move a little when its probability does, so no gradient passes through it, and the trick
# that trains a VAE is gone. There are several ways around, and no best one: some are noisy, some
# are biased, some are slow. Here each is held against the exact gradient, and then they race.

# %%
# %matplotlib inline
import math
import os
import time

import torch
from matplotlib.figure import Figure

import ppl_vae
from ppl_vae import plots
from ppl_vae.model import own_parameters
from ppl_vae.objectives import backward, plain_elbo
from ppl_vae.recipes import build

SMOKE = bool(os.environ.get("PPL_VAE_SMOKE"))  # small, to see only whether all of it runs
APPROACH, LEARNING, REPEATS, EPOCHS = (1, 5, 5, 1) if SMOKE else (60, 300, 200, 60)
quiet = {"progress": False, "compile": False}

# %% [markdown]
# ## A sigmoid belief network
#
# The model is a layer of bits above the pixels of a digit, all maps being linear (Neal 1992):
#
# $$ z_d \sim \mathrm{Bernoulli}(\sigma(b_d)), \qquad
#    x \sim \mathrm{Binomial}(16, \sigma(W z + c)) $$
#
# The guide is its mirror image, $q(z_d = 1 \mid x) = \sigma((V x + a)_d)$. With eight bits there
# are 256 values of $z$, and the ELBO can be summed over all of them: `estimator="enumerate"`.

# %%
exact = build("sbn-digits", {"estimator": "enumerate", "latents": 8}, seed=0)
print(exact.guide)
fitted = ppl_vae.fit(exact.model, exact.guide, exact.data, epochs=APPROACH, seed=0, **quiet)
figures = ppl_vae.evaluate(fitted.model, fitted.guide, exact.data, samples=100)
print(f"ELBO {figures.elbo:.2f}, NLL {figures.nll:.2f} nats")

# %% [markdown]
# That is a fit without any noise from $z$. With fifty bits there are $10^{15}$ values, and it is
# out of the question. What else is there?
#
# - **The score function**: $\nabla \mathbb E f = \mathbb E f(z) \nabla \log q(z \mid x)$, with
#   $f = \log p(x, z) - \log q(z \mid x)$. It is right on average, whatever $f$ is. A *baseline*
#   $b(x)$ may be subtracted from $f$ without a change of that average: a running mean, or a net
#   that guesses from $x$ what $f$ will be, or both (Mnih & Gregor 2014).
# - **Leave-one-out**: $K$ draws for each digit, the mean $f$ of the others as the baseline of each.
# - **Relaxed**: draw $z$ between 0 and 1, by a sigmoid with noise, at some temperature (Maddison et
#   al. 2017, Jang et al. 2017). Then gradients pass through $z$, but of another model's ELBO.
# - **Straight-through**: draw a bit, and pretend in the backward pass that it was the relaxed one.
#
# We take the gradient of the guide's weights again and again, of the same 100 digits at the weights
# that were just fitted, and compare with the exact one.

# %%
WAYS = {
    "score": {"estimator": "score", "baseline": "none"},
    "score, mean": {"estimator": "score", "baseline": "average"},
    "score, net and mean": {"estimator": "score", "baseline": "both"},
    "leave-one-out (5)": {"estimator": "leave-one-out", "draws": 5},
    "relaxed": {"estimator": "relaxed"},
    "straight-through": {"estimator": "straight-through"},
}
x = exact.data.split("train").batch(slice(0, 100))["x"]


def at_the_point(arguments):
    """Another guide with the same weights; what it has of its own, its baseline, learns there."""
    made = build("sbn-digits", {**arguments, "latents": 8}, seed=0)
    made.model.load_state_dict(fitted.model.state_dict())
    made.guide.load_state_dict(fitted.guide.state_dict(), strict=False)
    made.fit["objective"] = made.fit.get("objective") or plain_elbo(made.model, made.guide, x)
    own = [p for name, p in made.guide.named_parameters() if "baseline" in name]
    optimizer = torch.optim.Adam(own, 0.03) if own else None
    for _ in range(LEARNING if arguments.get("baseline", "none") != "none" else 0):
        gradient(made)
        if optimizer is not None:
            optimizer.step()
    return made


def gradient(made):
    """Of the ELBO by the guide's weights, in nats a digit."""
    made.guide.zero_grad()
    made.model.zero_grad()
    with own_parameters(made.model, made.guide):
        backward(made.fit["objective"], made.model, made.guide, x)
    weights = (p for name, p in made.guide.named_parameters() if "baseline" not in name)
    return -torch.cat([p.grad.flatten() for p in weights]) / len(x)


truth = gradient(at_the_point({"estimator": "enumerate"}))
torch.manual_seed(0)
seen = {
    name: torch.stack([gradient(made) for _ in range(REPEATS)])
    for name, made in ((name, at_the_point(arguments)) for name, arguments in WAYS.items())
}


def noise_and_bias(gradients):
    """Lengths of standard deviation and of the mean's error, in lengths of the exact gradient; an
    error that may be chance is none."""
    noise = gradients.std(0).norm() / truth.norm()
    error = (gradients.mean(0) - truth).norm() / truth.norm()
    chance = noise / len(gradients) ** 0.5  # of the error, of so many gradients' mean
    bias = (error**2 - chance**2).clamp(min=0).sqrt()
    return float(noise), float(bias) if bias > chance else math.nan


print(f"{'':22}{'noise':>8}{'bias':>8}")
for name, gradients in seen.items():
    noise, bias = noise_and_bias(gradients)
    print(f"{name:22}{noise:8.2f}" + (f"{'–':>8}" if math.isnan(bias) else f"{bias:8.2f}"))

# %%
TEMPERATURES = (0.1, 0.2, 0.5, 1.0, 2.0)
found = {
    estimator: [
        noise_and_bias(torch.stack([gradient(made) for _ in range(REPEATS)]))
        for made in (
            at_the_point({"estimator": estimator, "temperature": temperature})
            for temperature in TEMPERATURES
        )
    ]
    for estimator in ("relaxed", "straight-through")
}

figure = Figure(figsize=(9, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)
names = list(seen)
left.barh(names[::-1], [noise_and_bias(seen[name])[0] for name in names[::-1]], height=0.6)
left.axvline(1, color="0.5", linestyle=":")
left.set(xscale="log", xlabel="noise, in lengths of the gradient", title="One step's noise")
for color, (estimator, pairs) in enumerate(found.items()):
    noise, bias = zip(*pairs, strict=True)
    right.loglog(TEMPERATURES, noise, ".-", color=f"C{color}", label=f"noise, {estimator}")
    right.loglog(TEMPERATURES, bias, ".--", color=f"C{color}", label=f"bias, {estimator}")
right.set(xlabel="temperature", title="Smooth or right")
right.set_xticks(TEMPERATURES, [str(t) for t in TEMPERATURES])
right.minorticks_off()
right.legend(frameon=False, fontsize=8, loc="lower right")
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
figure

# %% [markdown]
# A step by the score function alone has 134 times as much noise as there is gradient. $f$ is about
# -250 nats whatever $z$ is, and all of that is multiplied into the step. The mean takes most of it
# away and leaves 26: some digits are harder than others by dozens of nats, and one number for all
# cannot know. The net reads it off $x$, and leaves 3.2. Leave-one-out knows it without a net, from
# four other draws of the same digit. None of these is biased (a dash: the mean of 200 gradients is
# no further off than chance would have it).
#
# Relaxed and straight-through draws are not noisy to begin with, but on average they point
# elsewhere: their mean is off by half and by 0.7 of the gradient's length, at temperature 0.5. On
# the right is the trade. A lower temperature is nearer to bits, so it has less bias; and more
# noise, since the sigmoid gets steeper.
#
# ## The race
#
# Now fifty bits, where nobody knows the exact gradient, and all start from the same weights. Two
# more take part, which have goals of their own:
#
# - **VIMCO** maximizes the tighter bound of five weighted draws by the score function (Mnih &
#   Rezende 2016): each draw is judged by what the bound would be without it.
# - **Reweighted wake-sleep** gives the guide another aim: to match draws that are weighted toward
#   the posterior (Bornschein & Bengio 2015). Nothing is multiplied by a noisy $f$.


# %%
RACE = {
    **WAYS,
    "VIMCO (5)": {"estimator": "vimco", "draws": 5},
    "wake-sleep (5)": {"estimator": "reweighted-wake-sleep", "draws": 5},
}


def race(arguments):
    made = build("sbn-digits", arguments, seed=0)
    started = time.perf_counter()
    how = made.fit | {"epochs": EPOCHS, "seed": 0, **quiet}
    return ppl_vae.fit(made.model, made.guide, made.data, **how), time.perf_counter() - started


fits = {name: race(arguments) for name, arguments in RACE.items()}
print(f"{'':22}{'ELBO':>9}{'NLL':>9}{'ms a step':>11}")
for name, (pair, seconds) in fits.items():
    figures = ppl_vae.evaluate(pair.model, pair.guide, pair.data, samples=20 if SMOKE else 500)
    steps = EPOCHS * -(-len(pair.data.split("train")) // 50)
    print(f"{name:22}{figures.elbo:9.2f}{figures.nll:9.2f}{1e3 * seconds / steps:11.1f}")

# %%
figure = Figure(figsize=(6.5, 3.6), layout="constrained")
ax = figure.subplots()
for name, (pair, _) in fits.items():
    epochs = range(1, len(pair.history) + 1)
    style = "--" if name in WAYS and "score" in name else "-"
    ax.plot(epochs, [row["validation_elbo"] for row in pair.history], style, label=name)
ax.set(xlabel="epoch", ylabel="ELBO, nats a digit", title="Validation digits", ylim=(-260, None))
ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
ax.spines[["top", "right"]].set_visible(False)
figure

# %% [markdown]
# ELBO and NLL, in nats: -178 and 159 by the score function alone; -133 and 116 with a mean; -129
# and 114 with a net, too; and -120 and 107 by leave-one-out. The net was good when it had 300 steps
# for itself; here it has to follow a guide and a model that change, and most of its lead is gone.
# Leave-one-out needs no time to learn. It has the best ELBO of all, unbiased, for five passes of
# the decoder instead of one.
#
# Relaxed draws come second by the ELBO (-121) and first by the NLL (105), with one draw a digit; in
# spite of their bias, as it seems, but a bias that is the same in each step can be adapted to, and
# noise cannot. Straight-through is one or two nats behind. VIMCO and wake-sleep look worse by the
# ELBO than they are, since it is not what they maximize: by the NLL they are at 108 and 106.
# Differences of a nat may be another seed's the other way round.
#
# What the best of them by NLL dreams of:

# %%
best, _ = fits["relaxed"]
plots.samples(best.model, best.data.image_shape)

# %% [markdown]
# The bits are independent of one another before they meet the decoder, and strokes do not always
# fit together: that is what a second layer is for (`layers=2`).
#
# ## Which one?
#
# - Where the values can be counted, **enumerate**: labels, or ten bits. It is exact.
# - For bits or labels whose decoder can be run on something in between, **relaxed**, at some 0.5,
#   and then look whether a lower temperature is better. What is evaluated is the discrete model, in
#   any case.
# - Where draws have to be discrete, or the gradient has to be right: **leave-one-out**, with as
#   many draws as there is time for; for the tighter bound **VIMCO**, or **reweighted wake-sleep**.
# - The **score function with a net and a mean** is the cheapest that is unbiased: one draw, one
#   pass. Never take it without a baseline.
# - **Straight-through** if a decoder must see bits and the gradient may be wrong.
