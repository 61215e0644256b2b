"""The contender in pythae: its VAE over the same nets, stepped as its ``BaseTrainer`` does."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from pythae.data.datasets import BaseDataset, DatasetOutput
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contender import LEARNING_RATE, Absent, Contender, Task, loader
from benchmarks.sizes import PIXELS, inputs_of

logging.getLogger("pythae.trainers.base_trainer.base_trainer").setLevel(logging.WARNING)


class Encoder(BaseEncoder):
    """A net of locations and pre-softplus scales, as pythae wants it: log-variances."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        loc, scale = self.net(x).chunk(2, -1)
        # Three operations that pythae's own encoders lack: without them the same weights would
        # mean another posterior.
        return ModelOutput(embedding=loc, log_covariance=2 * F.softplus(scale).log())


class Decoder(BaseDecoder):
    """A net of logits, as pythae wants it: probabilities."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor) -> Any:
        return ModelOutput(reconstruction=self.net(z).sigmoid())


def vae(nets: nn.ModuleDict) -> VAE:
    """pythae's VAE over an ``encoder`` and a ``decoder``, of bits."""
    config = VAEConfig(
        input_dim=(PIXELS,),
        latent_dim=inputs_of(nets["decoder"]),
        reconstruction_loss="bce",
        uses_default_encoder=False,
        uses_default_decoder=False,
    )
    return VAE(config, Encoder(nets["encoder"]), Decoder(nets["decoder"]))


def trainer(task: Task) -> Contender:
    """Forward, ``_optimizers_step`` and reading the loss: the body of ``BaseTrainer.train_step``,
    without its data loader and callbacks."""
    size = task.size
    if size.program != "vae":
        raise Absent(f"pythae has no such program: {size.program}")
    nets = task.nets()
    rows = BaseDataset(torch.cat(task.batches), torch.zeros(size.batch * len(task.batches)))
    config = BaseTrainerConfig(
        per_device_train_batch_size=size.batch,
        learning_rate=LEARNING_RATE,
        no_cuda=task.device.type == "cpu",
    )
    trainer = BaseTrainer(vae(nets), rows, training_config=config)
    trainer.set_optimizer()
    trainer.model.train()

    def step(x: DatasetOutput) -> float:
        inputs = trainer._set_inputs_to_device(x)
        with trainer.amp_context:
            output = trainer.model(
                inputs, epoch=1, dataset_size=len(rows), uses_ddp=trainer.distributed
            )
        trainer._optimizers_step(output)
        loss = output.loss.item()
        if math.isnan(loss):
            raise ArithmeticError("NaN detected in train loss")
        return loss

    return Contender(
        step=step,
        load=loader(nets, [trainer.optimizer]),
        batches=[DatasetOutput(data=x) for x in task.batches],
        read=float,  # pythae's loss is a mean over rows
    )
