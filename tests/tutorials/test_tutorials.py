"""Tutorials: each runs as a plain script and as a notebook, quickly where PPL_VAE_SMOKE is set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[2] / "tutorials").glob("[0-9]*.py"))
SMOKE = {**os.environ, "PPL_VAE_SMOKE": "1", "OMP_NUM_THREADS": "1"}

# In a process of its own: Jupyter's libraries warn of each other, and a kernel needs a parent.
AS_NOTEBOOK = """
import sys, jupytext, nbclient, nbformat
notebook = jupytext.read(sys.argv[1])
nbformat.validate(notebook)
assert {cell.cell_type for cell in notebook.cells} == {"markdown", "code"}
nbclient.NotebookClient(notebook, timeout=120).execute()
pictures = sum(
    "image/png" in output.get("data", {})
    for cell in notebook.cells
    for output in cell.get("outputs", [])
)
print("pictures:", pictures)
"""


def run(arguments, folder):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=SMOKE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_there_is_a_tutorial():
    assert TUTORIALS


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_runs_as_a_script_without_warnings_and_leaves_nothing_behind(tutorial, tmp_path):
    assert run(["-W", "error", str(tutorial)], tmp_path)
    assert not list(tmp_path.iterdir())


# The same code as the script's: of all but the first it is a matter of make test-slow.
@pytest.mark.parametrize(
    "tutorial",
    [TUTORIALS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in TUTORIALS[1:])],
    ids=[path.stem for path in TUTORIALS],
)
def test_runs_as_a_notebook_that_shows_its_pictures(tutorial, tmp_path):
    printed = run(["-c", AS_NOTEBOOK, str(tutorial)], tmp_path)
    assert int(printed.rpartition("pictures:")[2]) > 0
