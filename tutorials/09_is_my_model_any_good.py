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
# # Is my model any good?
#
# A fitted VAE always makes plausible pictures, and its ELBO has no scale on which it could be
# called good. But a generative model makes a strong claim: *data like yours come about like this*.
# So let it make data, and compare. That is a predictive check. Here we mend a model of digits by
# what its checks say, line by line, and then look at the checks themselves: what each one sees,
# what it cannot see, and how often it is wrong.
#
# It takes about two minutes on a laptop.

# %%
# %matplotlib inline
import os

import arviz_plots
import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import ppl_vae
from ppl_vae import plots
from ppl_vae.checks import (
    generalization,
    population_predictive,
    posterior_predictive,
    prior_predictive,
    row_order,
    support,
)
from ppl_vae.checks.statistics import p_value
from ppl_vae.conditionals import Conditional
from ppl_vae.guides import MeanField
from ppl_vae.likelihoods import Bernoulli, Binomial, Gaussian
from ppl_vae.mixtures import VampPrior
from ppl_vae.models import PPCA, VAE
from ppl_vae.nn import MLP
from ppl_vae.priors import StandardNormal

SMOKE = bool(os.environ.get("PPL_VAE_SMOKE"))  # small, to see only whether all of it runs
EPOCHS, REPLICATES, TIMES = (1, 39, 2) if SMOKE else (60, 500, 200)

digits = ppl_vae.load_data("digits", labels=False)
train, validation = (digits.split(n).batch(slice(None))["x"] for n in ("train", "validation"))

# %% [markdown]
# ## A model, and its report
#
# The digits are counts: of the 16 cells of a finer scan that make a pixel, how many had ink? The
# VAE of the first tutorial says ten normal numbers, a net, and a Binomial for each pixel. We write
# it so that prior and likelihood can be exchanged, since that is what we shall do.


# %%
def fitted(likelihood, vamp=False, data=digits, epochs=EPOCHS):
    """A pair, fitted; with a VampPrior of 100 training rows, or a standard normal."""
    torch.manual_seed(0)
    x = data["train"] if isinstance(data, dict) else train
    model = VAE(StandardNormal(10), likelihood())
    guide = MeanField(model, MLP(64, 128, 128), x=x)
    if vamp:
        rows = {"noise": 0.5, "bounds": (0.0, 16.0)}
        model.prior = VampPrior.from_data(guide.posterior, x, 100, **rows)
    how = {"batch_size": 50, "learning_rate": 2e-3, "warmup": 10, "progress": False}
    ppl_vae.fit(model, guide, data, epochs=epochs, compile=False, **how)
    return model, guide


def binomial():
    return Binomial(MLP(10, 128, 128, 64), total_count=16)


plain = fitted(binomial)
plots.samples(plain[0], digits.image_shape, n=36)

# %% [markdown]
# Some are digits, some are nothing. How bad is that? We ask. `check` runs the checks that apply;
# here we want two, and ask them of the *validation* rows. We are going to choose a model by what
# they say, and rows that have helped to choose are no longer a fair judge. The test rows wait.

# %%
sizes = {"replicates": REPLICATES}
predictive = {"population_predictive": sizes, "posterior_predictive": sizes}
how = {"split": "validation", "only": [*predictive], "to_arviz": {"rows": 300}, **predictive}
report = ppl_vae.check(*plain, digits, **how)
print(report)

# %%
report.results[0].plot()

# %% [markdown]
# The *population predictive* check draws 500 data sets of 300 digits from the story's start, and
# computes a few plain numbers of each. The outline is what the model makes, the line what was held
# out. A line amidst the outline means nothing; a line off to the side is a way in which no data set
# of this model looks like ours. Two of the numbers are learned, from the training rows: how
# far a digit lies from the nearest of them, and what a classifier says that tells real from made.
#
# ## Three checks, three questions
#
# They differ in where the latents come from.

# %%
results = {
    "population": report.results[0],
    "posterior": report.results[1],
}


def compare(results):
    """Statistics of the data, and their means over replicates; a star where a check fails."""
    tables = {
        name: {r["statistic"]: r for r in result.statistics if r["verdict"] != "not applicable"}
        for name, result in results.items()
    }
    observed = {k: r["observed"] for table in tables.values() for k, r in table.items()}
    print(f"{'':28}{'data':>9}" + "".join(f"{name:>14}" for name in tables))
    for statistic, value in observed.items():
        # Each model has a classifier of its own, and so another figure of the data.
        learned = statistic == "log-odds of being real"
        line = f"{statistic:28}" + (f"{'':9}" if learned else f"{value:9.2f}")
        for table in tables.values():
            record = table.get(statistic)
            shown = ""
            if record:
                star = "*" if record["verdict"] == "fail" else " "
                less = record["observed"] if learned else 0.0
                shown = f"{record['replicated_mean'] - less:.2f}{star}"
            line += f"{shown:>14}"
        print(line)


compare(results)

# %% [markdown]
# *Population*: latents come from the prior. All of the story is on trial. (The last line is the
# classifier's: how much more real it finds the data than what the model makes, in log-odds, with a
# minus.)
#
# *Posterior*: latents come from the guide, once for each held-out row, and only the rows are made
# anew. The prior has no say in that, so what still fails is the likelihood, or the guide. Here the
# mean comes right: that was the prior's fault. Zeros and standard deviation come nearer and stay
# wrong: that rest is the likelihood's. And totals spread too *much* with the prior's latents (not
# enough for a star), and too *little* with the digits' own: two faults that were hiding each other.
#
# *Prior*: global latents come from their priors too. This model has none, so that it would be the
# population check once more, and says so. It is also the check to run *before* a fit: would the
# story, as it stands, make such data? Nobody expects a pass; the direction is of use.

# %%
try:
    prior_predictive(*plain, digits)
except ppl_vae.checks.NotApplicable as reason:
    print("after the fit:", reason)

torch.manual_seed(0)
before = VAE(StandardNormal(10), binomial())
print("before it:", prior_predictive(before, None, digits, replicates=REPLICATES).meaning)

# %% [markdown]
# ## Rewriting the story's first line
#
# The report advised a learned prior. A VampPrior is a mixture of the guide's posteriors at a
# hundred pseudo-digits, so that latents are drawn where digits are.

# %%
vamp = fitted(binomial, vamp=True)
results = {"plain": report.results[0]}
results["VampPrior"] = population_predictive(*vamp, digits, split="validation", **sizes)
compare(results)
plots.samples(vamp[0], digits.image_shape, n=36)

# %% [markdown]
# Mean and dependence are right now, the distance to real digits nearly so, and the classifier has
# a much harder time. What stays is what the posterior check had put down to the likelihood: too few
# zeros, and totals that spread too little, now that no prior hides it.
#
# ## Rewriting the second line
#
# Is it the kind of noise at all? Single entries say more here than totals do. A *rootogram* has a
# point for each count: how often it occurs in the data, and in the model's replicates of the same
# rows, on a scale of square roots, so that rare counts are seen too. It is ArviZ's, and it is drawn
# from draws that every report keeps in `idata` (or `ppl_vae.to_arviz`, without a check). Here is
# one pixel, near the middle.

# %%
print(report.idata["posterior_predictive"]["x"].sizes)


def rootogram(idata, pixel=27):
    shown = arviz_plots.plot_ppc_rootogram(idata.isel(x_dim=pixel), backend="matplotlib")
    figure = shown.viz["figure"].item()
    plt.close(figure)  # so that a notebook shows it once
    return figure


rootogram(report.idata)

# %% [markdown]
# And here a pixel of each digit at random, which is what the check itself shows: entries of
# different rows are independent given the latents, so that bands mean what they say. (For a
# density, ArviZ's `plot_ppc_pit` takes its place, for bits `plot_ppc_pava`; a report chooses by the
# observable.)

# %%
report.results[1].plot("x-rootogram")

# %% [markdown]
# The data have more 0 and more 16 than the replicates, and less of what is next to them; at the one
# pixel, twice as many 16. Ink in neighboring cells goes together. Were 16 cells hit independently,
# a pixel would seldom be all blank or all black. A *Beta-Binomial* has one more parameter a pixel:
# how much cells go together.
# It is no part of the zoo, and need not be: a likelihood is a class with one method.


# %%
class BetaBinomial(Conditional):
    """Counts of 16 cells that go together: their common chance is drawn from a Beta."""

    def distribution(self, parameters):
        logits, size = parameters.chunk(2, -1)
        mean, size = logits.sigmoid(), nn.functional.softplus(size) + 0.01
        return dist.BetaBinomial(mean * size + 1e-3, (1 - mean) * size + 1e-3, 16).to_event(1)


def beta_binomial():
    return BetaBinomial(MLP(10, 128, 128, 2 * 64))


better = fitted(beta_binomial, vamp=True)
on_validation = {"split": "validation", **sizes}
results["and Beta-B."] = population_predictive(*better, digits, **on_validation)
results["given latents"] = posterior_predictive(*better, digits, **on_validation)
compare(results)
for name, pair in {"plain": plain, "VampPrior": vamp, "and Beta-Binomial": better}.items():
    figures = ppl_vae.evaluate(*pair, digits, split="validation", samples=100, compile=False)
    print(f"{name:18} NLL {figures.nll:6.2f} ± {figures.nll_se:.2f} nats")

# %%
rootogram(ppl_vae.to_arviz(*better, digits, split="validation", rows=300))

# %% [markdown]
# Given the digits' latents, zeros are right over all pixels; this one has its 16 now, and zeros a
# few too many; and the NLL is better by seven nats. And the check fails still, with something new:
# neighboring pixels agree too little, with latents from the prior and with the digits' own alike.
# The Binomial had that right. Totals spread less than ever, and the classifier tells the samples
# more easily than before.
#
# All this has one cause. Given $z$, pixels are independent in all of these stories. The Binomial
# has little noise, so that its net has to draw every stroke itself. The Beta-Binomial explains by
# noise what the net does not draw, and does so pixel by pixel: speckles, that cancel in a total.
# Pictures of samples mostly show means, from which speckles are gone. Here are *draws*.

# %%
torch.manual_seed(0)
rows = [validation[:12], vamp[0].simulate(12)["x"], better[0].simulate(12)["x"]]
plots.image_grid(
    torch.stack(rows).unflatten(-1, digits.image_shape),
    row_labels=["digits", "Binomial", "Beta-Binomial"],
    title="Draws, both with a VampPrior",
)

# %% [markdown]
# So a better NLL went with samples that are easier to tell from digits: these are two questions.
# The next line to rewrite would be the independence, by a decoder in which pixels see their
# neighbors. We stop here. A model need not pass all there is; we know now *what* is wrong with it,
# and whether that matters is for its use to say.
#
# ## What the wrong likelihood looks like
#
# Three that are often taken for such data. A Bernoulli gives a count of 7 no probability at all,
# though its formula returns a number: `support` says so, and a report would end there.

# %%
print(support(VAE(StandardNormal(10), Bernoulli(MLP(10, 128, 64))), plain[1], digits).meaning)


class Poisson(Conditional):
    def distribution(self, parameters):
        return dist.Poisson(nn.functional.softplus(parameters) + 1e-3).to_event(1)


likelihoods = {
    "Gaussian": lambda: Gaussian(MLP(10, 128, 128, 64), 3.0, learned=True),
    "Poisson": lambda: Poisson(MLP(10, 128, 128, 64)),
}
results = {}
for name, likelihood in likelihoods.items():
    results[name] = posterior_predictive(*fitted(likelihood), digits, **on_validation)
compare(results)

# %% [markdown]
# The Gaussian emits no zeros and no whole numbers, and values from below 0 to above 16. The Poisson
# has whole numbers, but no bound: its largest entry is twice as large as there can be. Its noise
# grows with the mean, where that of a bounded count has to shrink. Each is plain in one line of the
# table. In an ELBO neither is: the Gaussian's, a density, cannot even be compared.
#
# ## A question of your own
#
# The statistics that are ready know nothing of images. One of yours is a function of a data set,
# `(rows, 64)`, that returns a number. Take one for the speckles (how much a pixel differs from
# the one below it) and one for shape (how far up the ink is).


# %%
def roughness(x):
    image = x.unflatten(1, (8, 8))
    return (image[:, 1:] - image[:, :-1]).abs().mean()


def height(x):
    rows = x.unflatten(1, (8, 8)).sum(2)
    return (rows @ torch.arange(7.0, -1, -1, dtype=x.dtype) / rows.sum(1)).mean()


own = {"roughness": roughness, "height of the ink": height}
pairs = {"plain": plain, "VampPrior": vamp, "and Beta-B.": better}
compare(
    {
        name: population_predictive(*pair, digits, statistics=own, **on_validation)
        for name, pair in pairs.items()
    }
)

# %% [markdown]
# ## Why many questions are not many chances to fail
#
# A dozen statistics at level 0.05 each would fail a perfect model a third of the time. So the check
# corrects: a deviation counts if it is larger than the *largest* among all statistics of a
# replicate, in 95 % of them. Statistics may hang together in any way, and one more costs little.
#
# To see that it works we need a model that is true. PPCA makes data, and is then compared with
# them, two hundred times.

# %%
torch.manual_seed(0)
ppca = PPCA(latents=2, observed=6, scale=0.7)

false_alarms, some_below = 0, 0
for seed in range(TIMES):
    torch.manual_seed(seed)
    x = ppca.simulate(100)["x"]
    result = population_predictive(
        ppca, MeanField(ppca, MLP(6, 4), x=x), {"train": x, "test": x}, seed=seed, replicates=199
    )
    false_alarms += not result.passed
    some_below += any(record["p"] <= 0.05 for record in result.statistics)
print(f"some p-value below 0.05, uncorrected: {some_below / TIMES:.1%}")
print(f"the check fails, at level 0.05:       {false_alarms / TIMES:.1%}")

# %% [markdown]
# `check` goes one step further: its checks share one level, so that 5 % is the rate of false alarms
# of the *report*, however long it is.
#
# ## Why the latents are drawn once
#
# A posterior predictive check is mostly done otherwise: latents anew for each replicate. Here are
# p-values of both kinds, of the mean of the data, with the exact posterior of a true model, PPCA
# with as many latents as columns. A p-value that means something is uniform: below 0.05 in 5 % of
# all cases, and twenty bars of equal height.

# %%
torch.manual_seed(0)
flexible = PPCA(latents=6, observed=6, scale=0.7)
p = {"drawn once": [], "drawn anew": []}
for seed in range(TIMES):
    torch.manual_seed(seed)
    with torch.no_grad():
        x = flexible.simulate(100)["x"]
        q = flexible.posterior(x)
        latents = {"drawn once": q.sample().expand(199, -1, -1), "drawn anew": q.sample((199,))}
        for kind, z in latents.items():
            means = flexible.x_dist(z).sample().mean((1, 2))
            p[kind].append(p_value(float(x.mean()), means.numpy())[0])

figure = Figure(figsize=(7, 2.6), layout="constrained")
for ax, (kind, values) in zip(figure.subplots(1, 2, sharey=True), p.items(), strict=True):
    ax.hist(values, bins=20, range=(0, 1), color="0.6")
    ax.axhline(TIMES / 20, color="black", linewidth=1)
    below = sum(value <= 0.05 for value in values) / TIMES
    ax.set(title=f"latents {kind}: {below:.1%} below 0.05", xlabel="two-sided p-value")
figure

# %% [markdown]
# Drawn anew, the latents follow the very data that are to be judged, and replicates vary more than
# such data would: small p-values are too rare, and a fault would have to be gross to be found.
# Drawn once, latents and rows are together a draw of the story if model and guide are right, and
# the rows and their replicates are alike. It costs some power, since a row's draw is noisy, and the
# guide is on trial too.
#
# ## Learned by heart
#
# Now a model that is good at the wrong thing: a wide decoder, fitted for long to 200 digits, under
# a VampPrior of a hundred of them.

# %%
few = {"train": train[:200], "test": validation}


def wide():
    return Binomial(MLP(10, 512, 512, 64), total_count=16)


heart = fitted(wide, vamp=True, data=few, epochs=5 * EPOCHS)
learned = population_predictive(*heart, few, **sizes)
compare({"by heart": learned})
plots.samples(heart[0], digits.image_shape, n=36)

# %% [markdown]
# Mean, spread, zeros and neighbors are as right as those of the honest models, or more so, since
# they are those of real digits. What gives it away is the distance: its digits are half as far from
# a training digit as other real digits are. (Many of the pictures are two digits at once.) The
# direct question is whether training rows get more probability than others:

# %%
overfitted = generalization(*heart, few)
print(overfitted.meaning)
overfitted.plot()

# %% [markdown]
# They do, by 85 nats. A gap as such is no fault, every fit has one; the check tolerates a tenth of
# the standard deviation of log p(x) over digits. Our other models are over that too, by far less,
# and the one with the most fitting noise is hardly so:

# %%
for name, pair in pairs.items():
    record = generalization(*pair, digits, split="validation").statistics[0]
    print(
        f"{name:10}  gap of log p(x) {record['gap']:5.2f} ± {record['gap_se']:.2f} nats, ", end=""
    )
    print(f"tolerated {record['tolerated']:.2f}, p {record['p_adjusted']:.1g}: {record['verdict']}")

# %% [markdown]
# ## The order of the rows
#
# All of this takes rows for independent draws. Files often are not shuffled: by class, by time,
# by who wrote them. `row_order` looks for that by permuting rows, exactly. Its level holds whatever
# the model; the model serves only to see more. These are the same digits as they stand in the file,
# then sorted by what they show.

# %%
raw = load_digits()
x, y = torch.tensor(raw.data, dtype=torch.float32), torch.tensor(raw.target)
torch.manual_seed(0)
orders = {"shuffled": torch.randperm(len(x)), "file": slice(None), "sorted": y.argsort()}
for name, order in orders.items():
    print(f"{name}:", row_order(*better, {"train": x[order], "test": x[order]}).meaning)

# %% [markdown]
# Of the file, it is a correlation of 0.1 in one latent, which no eye would see: digits stand there
# in runs, writer by writer. To split such a file in the middle is to test on writers that were
# never seen. That may be the right thing to do, but one should know.
#
# ## The error rate of a whole report, and what it finds
#
# Is all of it true? It is measured: `python -m benchmarks.power` makes pairs that are exactly
# right, of several kinds, and others with one planted fault each, many data sets of each, and
# counts which checks fail. The README has the table. It is worth a look for its small numbers too:
# what a check does not find in half of the cases, it has not excluded in yours.
#
# ## What no check can see
#
# *What was not asked.* A statistic that is right says nothing of the others. `height` above was no
# statistic until we wrote it down.
#
# *What is smaller than chance.* With 300 rows, the mean of a data set varies by itself. A pass says
# that the fault, if there is one, is smaller than that. With enough rows, every model fails: take
# sizes, not stars, to decide what to mend.
#
# *What is wrong with the data.* Rows that were held out come from the same file as the others. If
# no one in it writes a seven with a bar, the model will not either, and all checks pass.
#
# *What it means.* A model may emit perfect data with latents that mean nothing, or with a guide
# that is wrong. That is another question, and the next tutorial's.
#
# And last, once, the rows that we kept:

# %%
final = ppl_vae.check(*better, digits, only=[*predictive], **predictive)
print(final)
