"""Several workers: they train as one would, stop together, and none waits for a dead one.

Real processes, on CPU through gloo. Where a guide draws no noise, one process with the whole batch
is the oracle, up to rounding.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ppl_vae import recipes
from ppl_vae.models.ppca import PPCA
from ppl_vae.run import Run

# 50 training rows in batches of 7: workers have shares of 4 and 3 rows, and of the last batch,
# which has one row, the second worker has none.
PROGRAM = '''
import json
import sys

import pyro.distributions as dist
import torch
from safetensors.torch import save_file
from torch import nn

import ppl_vae
from ppl_vae.conditionals import Conditional
from ppl_vae.data import as_dataset
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.loop import weights
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP


class Point(Conditional):
    def distribution(self, parameters):
        return dist.Delta(parameters).to_event(1)


def linear(
    *, noise: bool = False, norm: bool = False, outlier: bool = False
) -> ppl_vae.Experiment:
    """Rows of two latents, with a guide that draws them or, without noise, points at them."""
    torch.manual_seed(0)
    x = PPCA(2, 5, scale=0.5).double().simulate(80)["x"]
    if outlier:
        x[30] = 1e200
    model = PPCA(2, 5)
    encoder = nn.Sequential(nn.BatchNorm1d(5) if norm else nn.Identity(), MLP(5, 8), nn.Tanh())
    if noise:
        guide = MeanField(model, encoder, x.float())
    else:
        guide = ppl_vae.Factorized(z=(Point(nn.Sequential(encoder, nn.Linear(8, 2))), ["x"]))
    data = as_dataset({"train": x[:50], "validation": x[50:]})
    fit = {"batch_size": 7, "precision": "64-true", "learning_rate": 1e-2, "compile": False}
    return ppl_vae.Experiment(model, guide, data, fit)


if __name__ == "__main__":
    arguments, options, out = map(json.loads, sys.argv[1:])
    made = linear(**arguments)
    fitted = ppl_vae.fit(made.model, made.guide, made.data, progress=False, **made.fit | options)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    save_file(weights(fitted.model, fitted.guide), f"{out}/worker-{rank}.safetensors")
'''

BATCHES = 8  # an epoch
WAIT = 120.0  # for what takes seconds

Process = subprocess.Popen[str]
Start = Callable[..., list[Process]]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return file


@pytest.fixture
def run() -> Iterator[Callable[..., Process]]:
    """Starts a command, in a process group of its own; what is left at the end is killed."""
    started: list[Process] = []

    def start(*command: object, **environment: object) -> Process:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | {name: str(value) for name, value in environment.items()},
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def start(run: Callable[..., Process]) -> Start:
    """Starts the workers of a ``ppl-vae fit``, each by hand."""

    def workers(count: int, *arguments: object) -> list[Process]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ("-m", "ppl_vae.cli", "fit", "--quiet", f"--devices={count}", *arguments)
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0}
        return [run(*command, **address, LOCAL_RANK=rank) for rank in range(count)]

    return workers


def ends(processes: Sequence[Process]) -> list[tuple[int, str]]:
    """Exit code and standard error of each, once it has ended."""
    said = [process.communicate(timeout=WAIT)[1] for process in processes]
    return [(p.returncode, text) for p, text in zip(processes, said, strict=True)]


def finish(processes: Sequence[Process]) -> None:
    for code, said in ends(processes):
        assert code == 0, said


def alone(program: Path, out: Path, arguments: Mapping[str, Any], **options: Any) -> Run:
    """The same training by this process."""
    fitted = recipes.run_recipe(
        f"{program}:linear", arguments, out=out, **{"progress": False, **options}
    )
    assert fitted.run is not None
    return fitted.run


def tensors(run: Run) -> dict[str, Tensor]:
    checkpoint = run.latest()
    assert checkpoint is not None
    return checkpoint.tensors


def assert_close_runs(one: Run, other: Run, *, relative: float = 1e-10) -> None:
    """The same curves and final weights, up to rounding."""
    for row, expected in zip(one.metrics(), other.metrics(), strict=True):
        ours, theirs = row | {"seconds": 0}, expected | {"seconds": 0}
        assert ours == pytest.approx(theirs, rel=relative)
    theirs = tensors(other)
    for name, tensor in tensors(one).items():
        if not name.startswith("worker."):
            torch.testing.assert_close(tensor, theirs[name], rtol=relative, atol=1e-12, msg=name)


def assert_same_runs(one: Run, other: Run) -> None:
    """The same bits, also of noise to come."""
    for row, expected in zip(one.metrics(), other.metrics(), strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def steps_taken(folder: Path) -> int:
    """The step of the newest checkpoint; -1 if there is none yet."""
    steps = [
        int(path.stem.removeprefix("step-")) for path in folder.glob("checkpoints/step-*.json")
    ]
    return max(steps, default=-1)


def wait_for_step(folder: Path, processes: Sequence[Process], step: int) -> None:
    """Wait until a checkpoint was written after so many steps."""
    end = time.monotonic() + WAIT
    while steps_taken(folder) < step:
        assert all(process.poll() is None for process in processes), ends(processes)
        assert time.monotonic() < end
        time.sleep(0.01)


# -- what they come to -------------------------------------------------------------------------


def test_two_workers_train_as_one_with_the_whole_batch(
    program: Path, tmp_path: Path, start: Start
) -> None:
    options = {"epochs": 4, "max_grad_norm": 0.3, "weight_decay": 0.01}
    listed = [f"--{name}={value}" for name, value in options.items()]
    finish(start(2, f"{program}:linear", "--out", tmp_path / "two", *listed))
    one = alone(program, tmp_path / "one", {}, **options)
    assert_close_runs(Run.open(tmp_path / "two"), one)
    unclipped = alone(program, tmp_path / "free", {}, **options | {"max_grad_norm": None})
    assert unclipped.metrics()[-1]["elbo"] != pytest.approx(one.metrics()[-1]["elbo"], rel=1e-3)


@pytest.mark.slow
def test_with_noise_two_workers_reach_the_maximum_likelihood(
    program: Path, tmp_path: Path, start: Start
) -> None:
    """Known in closed form (Tipping & Bishop 1999, eq. 7-8); each worker has noise of its own."""
    noisy = ("--noise=true", "--epochs=300", "--checkpoint-seconds=1000")
    finish(start(2, f"{program}:linear", *noisy, "--out", tmp_path / "run"))
    fitted = recipes.load(tmp_path / "run")
    x = fitted.data.split("train").batch(slice(0, 50), dtype=torch.float64)["x"]
    eigenvalues = torch.linalg.eigvalsh(x.T.cov(correction=0)).flip(0)
    noise = eigenvalues[2:].mean()
    log_det = eigenvalues[:2].log().sum() + 3 * noise.log()
    best = -0.5 * (5 * math.log(2 * math.pi) + log_det + 5).item()
    assert isinstance(fitted.model, PPCA)
    evidence = fitted.model.evidence(x).mean().item()
    assert best - 0.03 < evidence <= best
    start_of_run = Run.open(tmp_path / "run").load("step-000000000")
    assert start_of_run is not None
    noise = [start_of_run.tensors[f"worker.{rank}.random.cpu"] for rank in (0, 1)]
    assert not torch.equal(*noise)


@pytest.mark.slow
def test_compiled_steps_of_two_workers_come_to_the_same(
    program: Path, tmp_path: Path, start: Start
) -> None:
    for name, compiled in (("eager", "no"), ("compiled", "yes")):
        more = ("--noise=true", f"--compile={compiled}", "--epochs=3")
        finish(start(2, f"{program}:linear", "--out", tmp_path / name, *more))
    eager, compiled = Run.open(tmp_path / "eager"), Run.open(tmp_path / "compiled")
    assert compiled.record["compiled_batches"] == [7, 1]
    assert_close_runs(compiled, eager)
    random = "worker.1.random.cpu"
    assert torch.equal(tensors(compiled)[random], tensors(eager)[random])


@pytest.mark.slow
def test_batch_norm_keeps_the_statistics_of_the_first_workers_rows(
    program: Path, tmp_path: Path, run: Callable[..., Process]
) -> None:
    """The norm stands on the data, so that its running mean is known; all workers end with it.
    A script that calls fit is started again for the second worker."""
    options = {"epochs": 3, "batch_size": 11, "devices": 2, "out": str(tmp_path / "run")}
    words = ({"norm": True}, options, str(tmp_path))
    finish([run(program, *map(json.dumps, words))])
    first, second = (load_file(tmp_path / f"worker-{rank}.safetensors") for rank in (0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name

    x = recipes.find_recipe(f"{program}:linear")().data.split("train").stored["x"]
    orders = (torch.randperm(50, generator=torch.Generator().manual_seed(e)) for e in range(3))
    batches = [batch for order in orders for batch in order.split(11)]  # for seed 0
    shares = [batch[: math.ceil(len(batch) / 2)] for batch in batches]
    [name] = (name for name in first if name.endswith("running_mean"))
    # Looking a pair over, before it is fitted, runs it on the first rows.
    runs = int(first[name.replace("running_mean", "num_batches_tracked")])
    expected = torch.zeros(5, dtype=torch.float64)
    for rows in [torch.arange(11)] * (runs - len(shares)) + shares:
        expected = 0.9 * expected + 0.1 * x[rows].mean(0)
    torch.testing.assert_close(first[name], expected, rtol=1e-10, atol=0)
    assert torch.equal(tensors(Run.open(tmp_path / "run"))[name], first[name])


# -- stopping and going on ---------------------------------------------------------------------


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_worker_ends_the_run_with_a_sentence_and_a_checkpoint(
    program: Path, tmp_path: Path, start: Start, killed: int
) -> None:
    folder = tmp_path / "run"
    often = ("--epochs=100000", "--checkpoint-seconds=0.05")
    processes = start(2, f"{program}:linear", "--out", folder, *often)
    wait_for_step(folder, processes, 1)
    processes[killed].kill()
    began = time.monotonic()
    code, said = ends(processes)[1 - killed]
    assert time.monotonic() - began < 20
    assert code == 1
    sentence = f"worker {1 - killed} of 2 has lost another one, which ended or cannot be reached"
    assert f"ppl-vae fit: {sentence}" in said
    assert f"ppl-vae fit --resume {folder}" in said
    assert "Traceback" not in said
    # Of the first worker's end nobody could tell the folder.
    assert Run.open(folder).record["status"] == ("running" if killed == 0 else "failed")

    checkpoint = Run.open(folder).latest()
    assert checkpoint is not None
    epochs = checkpoint.state["epoch"] + 1
    resumed = recipes.resume(folder, epochs=epochs, progress=False)
    assert len(resumed.history) == epochs
    assert Run.open(folder).record["status"] == "finished"


@pytest.mark.slow
def test_ctrl_c_stops_all_and_the_run_goes_on_with_other_numbers_of_workers(
    program: Path, tmp_path: Path, start: Start
) -> None:
    """Two workers, stopped within an epoch, then one, then three: without noise, all as one."""
    folder, often = tmp_path / "run", "--checkpoint-seconds=0"
    processes = start(2, f"{program}:linear", "--out", folder, "--epochs=40", often)
    wait_for_step(folder, processes, 9)
    processes[1].send_signal(signal.SIGINT)
    (code, said), (other_code, silent) = ends(processes)
    assert code == other_code == 130
    assert f"interrupted; go on with: ppl-vae fit --resume {folder}" in said
    assert "interrupted" not in silent
    stopped = Run.open(folder)
    assert stopped.record["status"] == "interrupted"
    assert 9 <= steps_taken(folder) < 40 * BATCHES

    recipes.resume(folder, epochs=42, progress=False)
    finish(start(3, "--resume", folder, "--epochs=44"))
    assert_close_runs(stopped, alone(program, tmp_path / "whole", {}, epochs=44))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_as_many_workers_resume_to_the_same_bits(
    program: Path, tmp_path: Path, start: Start, number: signal.Signals
) -> None:
    noisy = (f"{program}:linear", "--noise=true", "--norm=true", "--batch-size=11", "--epochs=20")
    finish(start(2, *noisy, "--out", tmp_path / "whole"))
    processes = start(2, *noisy, "--out", tmp_path / "part", "--checkpoint-seconds=0")
    wait_for_step(tmp_path / "part", processes, 9)
    processes[0].send_signal(number)
    assert [code for code, _ in ends(processes)] == [130, 130]
    assert steps_taken(tmp_path / "part") < 20 * 5
    finish(start(2, "--resume", tmp_path / "part"))
    assert_same_runs(Run.open(tmp_path / "part"), Run.open(tmp_path / "whole"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_for_one_stops_all(
    program: Path, tmp_path: Path, start: Start
) -> None:
    outlier = (f"{program}:linear", "--outlier=true", "--out", tmp_path / "run")
    (code, said), (other_code, silent) = ends(start(2, *outlier))
    assert code == other_code == 1
    assert "site 'x' of the model has log-probability -inf" in said
    assert "ppl-vae fit:" not in silent
    assert Run.open(tmp_path / "run").record["status"] == "failed"


# -- how they are started ----------------------------------------------------------------------


@pytest.mark.slow
def test_one_command_starts_them_all_and_sees_one_killed(
    program: Path, tmp_path: Path, run: Callable[..., Process]
) -> None:
    command = ("-m", "ppl_vae.cli", "fit", f"{program}:linear", "--quiet", "--devices=2")
    finish([run(*command, "--out", tmp_path / "run", "--epochs=2")])
    assert Run.open(tmp_path / "run").record["status"] == "finished"
    assert Run.open(tmp_path / "run").record["workers"] == 2

    often = ("--epochs=100000", "--checkpoint-seconds=0.05")
    first = run(*command, "--out", tmp_path / "killed", *often)
    wait_for_step(tmp_path / "killed", [first], 1)
    [second] = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGKILL)
    [(code, said)] = ends([first])
    assert code == 1
    assert "worker 0 of 2 has lost another one" in said
    assert Run.open(tmp_path / "killed").record["status"] == "failed"


@pytest.mark.slow
def test_a_worker_that_fails_at_its_start_is_not_waited_for(
    tmp_path: Path, run: Callable[..., Process]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "if os.environ.get('LOCAL_RANK') == '1': sys.exit(3)\n"
        "from ppl_vae.cli import main\n"
        "sys.exit(main())\n"
    )
    [(code, said)] = ends([run(script, "fit", "vae-digits", "--devices=2")])
    assert code == 1
    assert "a worker ended before all had connected" in said


@pytest.mark.slow
def test_torchrun_starts_them(program: Path, tmp_path: Path, run: Callable[..., Process]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    command = (*torchrun, "ppl_vae.cli", "fit", f"{program}:linear", "--quiet")
    finish([run(*command, "--out", tmp_path / "two", "--epochs=3")])
    one = alone(program, tmp_path / "one", {}, epochs=3)
    assert_close_runs(Run.open(tmp_path / "two"), one)

    [(code, said)] = ends([run(*command, "--devices=3", "--out", tmp_path / "three")])
    assert code == 1
    assert "devices=3, num_nodes=1: torchrun has started 2 processes on each of 1" in said


@pytest.mark.slow
def test_slurm_starts_them(program: Path, tmp_path: Path, run: Callable[..., Process]) -> None:
    """As a job of two nodes with a task each sees itself; a real SLURM is not at hand."""
    srun = tmp_path / "srun"
    srun.touch(mode=0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    job |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NAME": "fit"}
    job |= {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1, "SLURM_NNODES": 2, "SLURM_LOCALID": 0}
    command = ("-m", "ppl_vae.cli", "fit", f"{program}:linear", "--quiet", "--epochs=3")
    command = (*command, "--num-nodes=2", "--out", tmp_path / "two")
    finish([run(*command, **job, SLURM_PROCID=rank, SLURM_NODEID=rank) for rank in (0, 1)])
    one = alone(program, tmp_path / "one", {}, epochs=3)
    assert_close_runs(Run.open(tmp_path / "two"), one)
