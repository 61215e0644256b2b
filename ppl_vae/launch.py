"""The processes of a run: started here, or found where torchrun or SLURM has started them."""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import distributed

TIMEOUT = timedelta(minutes=30)
"""How long a worker waits for another. One whose process ends is noticed at once, by its closed
connections; this is for a machine that vanishes, and must be longer than what the others wait for
while the first worker validates or writes a checkpoint."""


def launch(*, accelerator: str, devices: int, num_nodes: int, precision: Any) -> Fabric:
    """Fabric, connected to all processes of the run. With one process there is nothing to connect.

    Where no launcher has started them, the first process of a machine starts the others, as
    copies of its own command.

    Raises:
        ValueError: more devices than there are, or numbers that contradict those of torchrun or
            SLURM.
        RuntimeError: several processes in an interactive session.
    """
    if TorchElasticEnvironment.detect():
        devices, num_nodes = _given_to_torchrun(devices, num_nodes)
    if accelerator == "cuda" and devices > (there := torch.cuda.device_count()):
        raise ValueError(f"devices={devices}: torch finds {there} CUDA devices on this machine")
    if devices * num_nodes == 1:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    strategy = DDPStrategy(timeout=TIMEOUT)
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        precision=precision,
        strategy=strategy,
    )
    environment = strategy.cluster_environment
    assert environment is not None
    started: list[subprocess.Popen[bytes]] = []
    if not environment.creates_processes_externally:
        # Not by Fabric's launcher: it kills this process within seconds of another's end, when
        # this one is about to say what happened, or is writing the last checkpoint.
        os.environ |= {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(environment.node_rank()),
            "LOCAL_RANK": "0",
        }
        started = _start_others(devices)
    with _watched(started):
        fabric.launch()
    return fabric


def is_first() -> bool:
    """Whether this process, once launched, is the first of its run or the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _given_to_torchrun(devices: int, num_nodes: int) -> tuple[int, int]:
    """Devices of each machine, and machines, by torchrun's own options."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    started = local, int(os.environ["WORLD_SIZE"]) // local
    if (devices, num_nodes) not in ((1, 1), started):
        raise ValueError(
            f"devices={devices}, num_nodes={num_nodes}: torchrun has started {local} processes on "
            f"each of {started[1]} machines; leave the numbers to torchrun"
        )
    return started


def _start_others(devices: int) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, *sys.orig_argv[1:]]
    others = [
        subprocess.Popen(command, env=os.environ | {"LOCAL_RANK": str(rank)})
        for rank in range(1, devices)
    ]
    atexit.register(_await, others)
    return others


def _await(others: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let the others end, so that nothing of the command is left when it returns."""
    for other in others:
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.wait(10)


@contextlib.contextmanager
def _watched(others: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """While the processes connect: end this one if another has ended, for which it would wait."""
    connected = threading.Event()

    def watch() -> None:
        while not connected.wait(0.2):
            if any(other.poll() is not None for other in others):
                print("a worker ended before all had connected", file=sys.stderr, flush=True)
                for other in others:
                    other.kill()
                os._exit(1)  # the main thread waits outside of Python, where no exception gets

    if others:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        connected.set()
