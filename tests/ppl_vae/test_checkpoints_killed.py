"""Kills at every moment of a save, and readers beside a writer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ppl_vae.checkpoints import Checkpoint, Checkpoints

# A child that has imported torch once and forks a process for every kill: forking takes
# milliseconds where starting Python with torch takes seconds.
CHILD = """
import builtins, json, os, signal, sys, time
from pathlib import Path
import torch
from ppl_vae.checkpoints import Checkpoints

torch.set_num_threads(1)  # threads do not survive a fork

def die_before(call):
    left = call
    def counted(real):
        def function(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return function
    builtins.open = counted(open)
    for name in ("open", "fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))

def write(folder, after, saves, call, acknowledge):
    checkpoints = Checkpoints(Path(folder))
    die_before(call)
    for step in range(after + 1, after + 1 + saves):
        tensors = {"w": torch.full((5000,), step)}
        checkpoints.save(tensors, {"step": step}, step=step)
        os.write(acknowledge, b"s")
        checkpoints.save_as("best", tensors, {"step": step})
        os.write(acknowledge, b"b")

for line in sys.stdin:
    *job, seconds = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write(*job, writing)
        finally:
            os._exit(0)
    os.close(writing)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with open(reading) as pipe:
        said = pipe.read()
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(json.dumps([said, killed]), flush=True)
"""


@pytest.fixture(scope="module")
def writer() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CHILD]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield process  # it ends when its input is closed


def start(writer: Any, run: Checkpoints, after: int, saves: int, *, call=0, seconds=0.0) -> None:
    """Save after step `after`; die before a system call, or be killed after some seconds."""
    print(json.dumps([str(run.folder), after, saves, call, seconds]), file=writer.stdin, flush=True)


def result(writer: Any) -> tuple[str, bool]:
    """What it said, "s" and "b" after each `save` and `save_as`, and whether it was killed."""
    said, killed = json.loads(writer.stdout.readline())
    return said, killed


@pytest.fixture
def run(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path)


def step_of(checkpoint: Checkpoint | None) -> int:
    """Which step all of `checkpoint`, tensors and state, is of; 0 if there is none."""
    if checkpoint is None:
        return 0
    step = checkpoint.state["step"]
    assert torch.equal(checkpoint.tensors["w"], torch.full((5000,), step))
    return step


def assert_survived(run: Checkpoints, step: int, best: int, said: str) -> tuple[int, int]:
    """Check what a process left behind that began after `step` with `best`; what they are now."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may look damaged
        found = step_of(run.latest()), step_of(run.load("best"))
        for path in run.folder.glob("*.json"):
            assert run.load(path.stem) is not None  # nor one that was being pruned
    saves, bests = said.count("s"), said.count("b")
    # A last one may have got through unsaid.
    assert found[0] in (step + saves, step + saves + 1)
    assert found[1] in (step + bests if bests else best, step + bests + 1)
    return found


def assert_tidy(run: Checkpoints) -> None:
    """Two numbered checkpoints and the best one, and nothing else."""
    ends = sorted(path.suffix for path in run.folder.iterdir())
    assert ends == [".json"] * 3 + [".safetensors"] * 3


def test_a_kill_before_every_single_system_call(run: Checkpoints, writer: Any) -> None:
    step = best = call = 0
    said, killed = "", True
    while killed:
        call += 1
        start(writer, run, step, 3, call=call)
        said, killed = result(writer)
        step, best = assert_survived(run, step, best, said)
    assert said == "sbsbsb"
    assert call > 72  # 3 × 2 checkpoints × 2 files × 6 calls: each was a moment to die
    assert_tidy(run)


def test_a_reader_beside_a_writer_sees_whole_checkpoints(run: Checkpoints, writer: Any) -> None:
    start(writer, run, 0, 10**6, seconds=1.5)
    latest, best = [0], [0]
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        latest.append(step_of(run.latest()))
        best.append(step_of(run.load("best")))
    said, killed = result(writer)
    assert killed
    assert_survived(run, 0, 0, said)
    for steps in (latest, best):
        assert len(set(steps)) > 5
        assert steps == sorted(steps)  # never back to an older one
