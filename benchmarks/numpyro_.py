"""The contender in NumPyro: the same nets and programs in JAX, ``SVI.update`` jitted."""

from __future__ import annotations

import os
from typing import Any

# JAX would otherwise take most of a GPU's memory, which contenders share.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from torch import Tensor

from benchmarks.contender import LEARNING_RATE, Absent, Contender, Task
from benchmarks.sizes import Weights

Layers = list[tuple[jax.Array, jax.Array]]
"""Weights ``(inputs, outputs)`` and biases of each layer of a net."""


class Programs:
    """A model and a guide whose nets are parameters: each a list of layers."""

    def __init__(self, layers: dict[str, Layers], gated: bool) -> None:
        self.layers = layers
        self.gated = gated

    def model(self, x: jax.Array) -> None:
        raise NotImplementedError

    def guide(self, x: jax.Array) -> None:
        raise NotImplementedError

    def net(self, name: str, h: jax.Array) -> jax.Array:
        *hidden, (last, bias) = numpyro.param(name, self.layers[name])
        for w, b in hidden:
            h = h @ w + b
            h = jax.nn.glu(h) if self.gated else jax.nn.relu(h)
        return h @ last + bias

    def normal(self, name: str, h: jax.Array) -> dist.Distribution:
        loc, scale = jnp.split(self.net(name, h), 2, -1)
        return dist.Normal(loc, jax.nn.softplus(scale)).to_event(1)

    def standard_normal(self, name: str) -> dist.Distribution:
        """Over what the net ``name`` takes."""
        return dist.Normal(jnp.zeros(self.layers[name][0][0].shape[0]), 1.0).to_event(1)

    def observe(self, z: jax.Array, x: jax.Array) -> None:
        numpyro.sample("x", dist.BernoulliLogits(self.net("decoder", z)).to_event(1), obs=x)


class VAE(Programs):
    def model(self, x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            self.observe(numpyro.sample("z", self.standard_normal("decoder")), x)

    def guide(self, x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", self.normal("encoder", x))


class TwoLevels(Programs):
    def model(self, x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z2 = numpyro.sample("z2", self.standard_normal("p_z1"))
            self.observe(numpyro.sample("z1", self.normal("p_z1", z2)), x)

    def guide(self, x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z1 = numpyro.sample("z1", self.normal("q_z1", x))
            numpyro.sample("z2", self.normal("q_z2", z1))


PROGRAMS: dict[str, type[Programs]] = {"vae": VAE, "two-level": TwoLevels}

WITHOUT = {
    "m2": "its enumeration needs funsor, and none is written here",
    "belief-net": "its TraceGraph_ELBO takes no neural baseline",
}


def jitted(task: Task) -> Contender:
    """``SVI.update`` under ``jax.jit``, its old state donated."""
    size = task.size
    if size.program not in PROGRAMS:
        raise Absent(f"NumPyro has no such program: {WITHOUT[size.program]}")
    device = _device(task.device.type)

    def put(x: Tensor, *, transposed: bool = False) -> jax.Array:
        # Copied: a state that is donated must not be a view of PyTorch's memory.
        values = x.cpu().numpy()
        return jax.device_put(np.array(values.T if transposed else values, order="C"), device)

    def layers(weights: Weights) -> dict[str, Layers]:
        found: dict[str, Layers] = {net: [] for net in size.nets}
        for name, weight in weights.items():
            layer, kind = name.rsplit(".", 1)
            if kind == "weight":
                bias = put(weights[f"{layer}.bias"])
                found[layer.split(".")[0]].append((put(weight, transposed=True), bias))
        return found

    batches = [put(x) for x in task.batches]
    programs = PROGRAMS[size.program](layers(task.weights), size.gated)
    adam = numpyro.optim.Adam(LEARNING_RATE)
    svi = SVI(programs.model, programs.guide, adam, Trace_ELBO())
    update = jax.jit(svi.update, donate_argnums=0)
    state = svi.init(jax.random.key(0), batches[0])

    def step(x: jax.Array) -> jax.Array:
        nonlocal state
        state, loss = update(state, x)
        return loss

    def load(weights: Weights) -> None:
        nonlocal state
        state = state._replace(optim_state=adam.init(layers(weights)))

    def read(loss: Any) -> float:
        return float(loss.block_until_ready()) / size.batch

    return Contender(step=step, load=load, batches=batches, read=read)


def _device(kind: str) -> jax.Device:
    try:
        return jax.devices({"cuda": "gpu"}.get(kind, kind))[0]
    except RuntimeError as error:
        raise Absent(f"JAX has no {kind} device") from error
