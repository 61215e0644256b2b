"""The command line, as people use it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from ppl_vae.cli import main
from ppl_vae.run import Run

QUICK = ["--latents", "2", "--hidden=16", "--quiet"]

RECIPE = '''
import torch
from ppl_vae import Experiment
from ppl_vae.data import as_dataset
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.models.ppca import PPCA
from ppl_vae.nn import MLP

def linear(*, latents: int = 2) -> Experiment:
    """A user's own recipe."""
    model = PPCA(latents, 4)
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    return Experiment(model, MeanField(model, MLP(4, 8), x), as_dataset(x), {"epochs": 2})

def _helper() -> Experiment: ...
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert (
        main(["fit", "vae-digits", "--out", str(folder), "--epochs", "3", "--seed", "5", *QUICK])
        == 0
    )
    return folder


def test_help_answers_without_torch() -> None:
    script = (
        "import sys; from ppl_vae.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: print(done.code, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr == "0 False\n"
    for command in ("list", "show", "fit", "evaluate", "check", "sample", "experiment"):
        assert f"\n    {command} " in done.stdout


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json", "--quick"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {"VAE", "PPCA"} <= set(table["models"])
    assert {"MeanField", "FullRank"} <= set(table["guides"])
    assert {
        "vae-digits", "vae-mnist", "vae-static-mnist", "vae-fashion", "vae-omniglot",
        "conv-vae-mnist",
    } <= set(table["recipes"])  # fmt: skip
    assert "digits" in table["data"]
    assert all(table["recipes"].values()), "each has a line that says what it is"
    assert {"VampPrior", "StandardNormal"} <= set(table["priors"])
    assert {"Bernoulli", "Laplace"} <= set(table["likelihoods"])
    assert {"ELBO", "IWAE"} <= set(table["objectives"])
    assert table["refused"] is None
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "vae-digits" in printed
    assert "Hierarchy with BetaTC: BetaTC needs one latent site a row" in printed


def test_show_tells_the_story_and_draws_the_graph(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["show", "vae", "--graph", str(tmp_path / "vae.png")]) == 0
    told = capsys.readouterr().out
    assert "z_n ~ prior" in told
    assert "x     observable  data    (6,)         Bernoulli" in told
    assert (tmp_path / "vae.png").read_bytes()[:4] == b"\x89PNG"


def test_fit_leaves_a_run_with_figures(run: Path) -> None:
    record = Run.open(run).record
    assert record["recipe"] == "vae-digits"
    assert record["arguments"] == {"latents": 2, "hidden": 16}
    assert (record["seed"], record["status"], record["epochs_done"]) == (5, "finished", 3)
    assert {p.name for p in (run / "figures").iterdir()} >= {
        "curves.png", "samples.png", "reconstructions.png", "interpolation.png", "traversal.png",
        "manifold.png",
    }  # fmt: skip


def test_one_seed_gives_one_run(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    main(["fit", "vae-digits", "--out", str(again), "--epochs=3", "--seed=5", *QUICK])
    one, other = Run.open(run).latest(), Run.open(again).latest()
    assert one is not None
    assert other is not None
    assert all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())


def test_evaluate_prints_json_and_keeps_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--samples", "20", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"elbo", "nll", "bits_per_dim", "active_units", "samples", "split", "rows"} <= set(
        figures
    )
    assert (figures["split"], figures["rows"], figures["samples"]) == ("test", 300, 20)
    assert figures["elbo"] <= -figures["nll"]
    assert json.loads((run / "evaluation-test.json").read_text()) == figures
    assert main(["evaluate", str(run), "--split", "validation", "--samples=5"]) == 0
    assert "validation: 300 rows, 5 importance samples" in capsys.readouterr().out


def test_seeds_make_replicas_that_are_evaluated_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "replicas"
    fit = ["fit", "vae-digits", "--out", str(folder), "--seeds", "2", "--seed", "5", *QUICK]
    assert main([*fit, "--epochs", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    assert main(["fit", "--resume", str(folder), "--epochs", "2", "--quiet"]) == 0
    for seed in (5, 6):
        own = folder / f"seed-{seed}"
        assert len(Run.open(own).metrics()) == 2
        assert (own / "figures" / "samples.png").exists()
    start = [Run.open(folder / f"seed-{seed}").metrics()[0]["elbo"] for seed in (5, 6)]
    assert start[0] != start[1]
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--samples", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    alone = [
        json.loads((folder / f"seed-{seed}" / "evaluation-test.json").read_text())["nll"]
        for seed in (5, 6)
    ]
    assert figures["seeds"] == 2
    assert figures["mean"]["nll"] == pytest.approx(sum(alone) / 2)
    assert figures["standard_error"]["nll"] == pytest.approx(abs(alone[0] - alone[1]) / 2)
    assert main(["evaluate", str(folder), "--samples", "3"]) == 0
    assert "standard error over 2 seeds" in capsys.readouterr().out


def test_labels_that_were_withheld_are_evaluated_and_checked(
    labeled_recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "replicas"
    words = ["fit", f"{labeled_recipes}:bits", "--out", str(folder), "--seeds", "2", "--quiet"]
    assert main(words) == 0
    each = []
    for seed in (0, 1):
        capsys.readouterr()
        run = str(folder / f"seed-{seed}")
        assert main(["evaluate", run, "--samples=3", "--json"]) == 0
        each.append(json.loads(capsys.readouterr().out)["labels"])
        assert main(["evaluate", run, "--samples=3"]) == 0
        said = capsys.readouterr().out
        for source, of in (("classifier", "the classifier q"), ("importance", "importance sam")):
            scores = each[-1][source]
            block = said.partition(f"labels, by {of}")[2]
            assert f"{scores['accuracy']:.4f} +- {scores['accuracy_se']:.4f}\n  log loss" in block
            for name in ("log_loss", "brier", "calibration_error"):
                assert f"  {name.replace('_', ' '):<18}{scores[name]:10.4f}\n" in block
    assert main(["evaluate", str(folder), "--samples=3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    for source in ("classifier", "importance"):
        one, other = (own[source]["log_loss"] for own in each)
        mean, error = (figures[k]["labels"][source] for k in ("mean", "standard_error"))
        assert mean["log_loss"] == pytest.approx((one + other) / 2)
        assert error["log_loss"] == pytest.approx(abs(one - other) / 2)
    assert main(["evaluate", str(folder), "--samples=3"]) == 0
    said = capsys.readouterr().out
    shown = figures["mean"]["labels"]["importance"]["brier"]
    error = figures["standard_error"]["labels"]["importance"]["brier"]
    assert f"{shown:.4f} +- {error:.4f}" in said
    assert main(["check", str(folder / "seed-0"), "--only=label_calibration"]) == 0
    assert "label_calibration: " in capsys.readouterr().out
    assert (folder / "seed-0" / "report" / "figures" / "label_calibration-pava.png").exists()


def test_an_experiment_prints_its_table_and_goes_on(
    labeled_recipes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ppl_vae import experiments, supervised

    monkeypatch.setattr(supervised, "MOST", 20)
    out = tmp_path / "out"
    words = ["experiment", "semi-supervised", "--models", f"{labeled_recipes}:bits", "--seeds=1"]
    words += ["--labels", "6,9", "--epochs=1", "--samples=3", "--out", str(out)]
    assert main([*words, "--estimators", "enumerate"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"\| bits +\| enumerate +\| 9 +\| 1 +\|", printed.out)
    assert "4 of 4: bits-enumerate-9-0" in printed.err
    assert main([*words, "--estimators", "enumerate", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((out / "table.json").read_text())
    assert not printed.err

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt(out / "runs")

    monkeypatch.setattr(experiments, "_fit", interrupt)
    assert main([*words, "--estimators", "enumerate,score", "--quiet"]) == 130
    said = capsys.readouterr().err
    assert "the same command goes on with it" in said
    assert "fit --resume" not in said
    assert main([*words[:-4], "--labels", "many"]) == 1
    assert "--labels many: expected whole numbers, parted by commas" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["experiment", "semi"])


def test_check_reports_p_values_and_saves_the_draws(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import xarray

    words = ["--only", "support, row_order", "--options", '{"row_order": {"rows": 50}}', "--json"]
    assert main(["check", str(run), "--level=0.1", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((run / "report" / "check.json").read_text()) == printed
    assert [one["name"] for one in printed["checks"]] == ["support", "row_order"]
    assert printed["checks"][1]["error_rate"] == 0.1
    assert printed["checks"][1]["settings"]["rows"] == 50
    with xarray.open_datatree(run / "report" / "idata.nc", engine="h5netcdf") as tree:
        groups = {"posterior", "posterior_predictive", "prior", "observed_data", "sample_stats"}
        assert groups <= set(tree.children)
    assert main(["check", str(run), "--only=support"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == str(run / "report" / "index.html")
    assert "support: pass" in said.out
    assert "checking support" in said.err


@pytest.mark.parametrize("options", ["{", "[1]", '{"evidence": 3}'])
def test_options_that_are_no_arguments_of_checks_are_refused(
    run: Path, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(run), "--options", options]) != 0
    assert 'expected JSON such as {"evidence": {"rows": 1000}}' in capsys.readouterr().err


def test_sample_draws_rows(run: Path) -> None:
    assert main(["sample", str(run), "--n", "9"]) == 0
    with np.load(run / "samples.npz", allow_pickle=False) as draws:
        assert draws["x"].shape == (9, 64)
        assert draws["z"].shape == (9, 2)
        assert set(np.unique(draws["x"])) <= set(range(17))


def test_a_recipe_of_ones_own_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    out = tmp_path / "run"
    assert main(["fit", f"{file}:linear", "--latents=3", "--out", str(out), "--quiet"]) == 0
    assert main(["evaluate", str(out), "--samples", "3"]) == 0
    assert Run.open(out).record["arguments"] == {"latents": 3}
    with pytest.raises(SystemExit):
        main(["fit", f"{file}:lineal", "--out", str(tmp_path / "other")])
    assert "did you mean 'linear'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fit", f"{tmp_path}/none.py:linear"])
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--quiet", "vae-digits", "--latents", "3", "--hidden=8"],
        ["--latents", "3", "--hidden=8", "--quiet", "vae-digits"],
    ],
)
def test_the_recipe_may_stand_anywhere(tmp_path: Path, words: list[str]) -> None:
    assert main(["fit", *words, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert Run.open(tmp_path / "run").record["arguments"] == {"latents": 3, "hidden": 8}


def test_an_overridden_setting_is_kept_on_resuming(tmp_path: Path) -> None:
    """Also one that is text in the recipe, as a schedule is."""
    (tmp_path / "mine.py").write_text(RECIPE.replace('{"epochs": 2}', '{"optimizer": "adam"}'))
    out = str(tmp_path / "run")
    words = [f"{tmp_path / 'mine.py'}:linear", "--optimizer", "adamax", "--epochs", "1"]
    assert main(["fit", *words, "--out", out, "--quiet"]) == 0
    assert main(["fit", "--resume", out, "--epochs", "2", "--quiet"]) == 0
    assert Run.open(out).record["fit"]["optimizer"] == "adamax"


def test_a_recipe_with_a_path_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RECIPE.replace("*, latents: int = 2", "*, where: Path = Path('x.npy')")
    source = source.replace("import torch\n", "import numpy, torch\nfrom pathlib import Path\n", 1)
    source = source.replace("    x = torch.randn", "    x = torch.tensor(numpy.load(where))  #")
    source = source.replace("PPCA(latents, 4)", "PPCA(2, 4)")
    (tmp_path / "mine.py").write_text(source)
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(60, 4)).astype("float32"))
    monkeypatch.chdir(tmp_path)
    where = str(tmp_path / "rows.npy")
    assert main(["fit", "mine.py:linear", "--where", where, "--out", "run", "--quiet"]) == 0
    monkeypatch.chdir("/")
    assert main(["evaluate", str(tmp_path / "run"), "--samples", "2"]) == 0
    assert main(["fit", "--resume", str(tmp_path / "run"), "--epochs", "3", "--quiet"]) == 0
    assert Run.open(tmp_path / "run").record["epochs_done"] == 3


@pytest.mark.parametrize(
    ("change", "exits", "sentence"),
    [
        (("x = torch.randn", "x = = torch.randn"), True, "line 12 of {file}: SyntaxError"),
        (
            ("import torch\n", "import no_such_module\n"),
            True,
            "line 2 of {file}: ModuleNotFoundError",
        ),
        (("PPCA(latents, 4)", "PPCA(latents, {}['four'])"), False, "line 11 of {file}: KeyError"),
        (("return Experiment(", "return ("), False, "returned tuple, not an Experiment"),
        (("*, latents", "*, seed: int = 0, latents"), True, "argument 'seed', which fit has"),
    ],
)
def test_a_faulty_recipe_of_ones_own_is_explained(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    exits: bool,
    sentence: str,
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE.replace(*change))
    words = ["fit", f"{file}:linear", "--out", str(tmp_path / "run"), "--quiet"]
    with pytest.raises(SystemExit) if exits else nullcontext():
        assert main(words) == 1
    said = capsys.readouterr().err
    assert sentence.format(file=file) in said
    assert "Traceback" not in said


# -- resuming ----------------------------------------------------------------------------------


def test_ctrl_c_exits_130_and_resume_gives_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from ppl_vae.cli import main; sys.exit(main())"]
    options = ["--latents=2", "--hidden=16", "--epochs=40", "--optimizer=adamax"]
    part = subprocess.Popen(
        [*command, "fit", "vae-digits", "--out", str(tmp_path / "part"), *options],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "part" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not metrics.exists() and part.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    part.send_signal(signal.SIGINT)
    _, said = part.communicate(timeout=120)
    assert part.returncode == 130, said
    assert f"ppl-vae fit --resume {tmp_path / 'part'}" in said
    record = Run.open(tmp_path / "part").record
    assert record["status"] == "interrupted"
    assert record["epochs_done"] < 40
    assert main(["fit", "--resume", str(tmp_path / "part"), "--quiet"]) == 0
    assert main(["fit", "vae-digits", "--out", str(tmp_path / "whole"), "--quiet", *options]) == 0
    one, other = (Run.open(tmp_path / name).latest() for name in ("part", "whole"))
    assert one is not None
    assert other is not None
    assert all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())


def test_resume_refuses_what_would_make_another_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value in (("--learning-rate", "0.5"), ("--seed", "9")):
        assert main(["fit", "--resume", str(run), option, value]) == 1
        assert "was begun with" in capsys.readouterr().err
    # What it was begun with may be said again.
    same = ["--learning-rate", "0.002", "--seed=5", "--device", "cpu", "--epochs=3"]
    assert main(["fit", "--resume", str(run), "--quiet", *same]) == 0
    capsys.readouterr()
    assert main(["fit", "vae-digits", "--resume", str(run)]) == 1
    assert "give no RECIPE, no --out and no --seeds" in capsys.readouterr().err


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fit", "vae-digit"], "unknown recipe 'vae-digit'; did you mean 'vae-digits'?"),
        (["fit", "vae-digits", "--hiden", "3"], "--hiden 3; did you mean '--hidden'?"),
        (["fit", "vae-digits", "--latent", "3"], "--latent 3; did you mean '--latents'?"),
        (["fit", "vae-digits", "--epochs", "many"], "many"),
        (["evaluate", "run", "--split", "tset"], "tset"),
        (["fti"], "fti"),
        ([], "subcommand"),
    ],
)
def test_a_command_that_makes_no_sense_exits_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["show", "VAEE"], "unknown model 'VAEE'; did you mean 'VAE'?"),
        (["fit"], "give a RECIPE"),
        (["evaluate", "nowhere"], "nowhere holds no run"),
        (["fit", "vae-digits", "--epochs", "0"], "epochs=0: expected a whole number"),
        (["sample", "nowhere", "--n", "0"], "--n 0: expected at least 1"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert sentence in capsys.readouterr().err


def test_missing_data_say_where_they_were_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path / "data"))
    assert main(["fit", "vae-static-mnist", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "data") in said
    assert "PPL_VAE_DATA" in said
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_left_alone(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "metrics.csv").read_bytes()
    assert main(["fit", "vae-digits", "--out", str(run), *QUICK]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert (run / "metrics.csv").read_bytes() == before


def test_a_damaged_run_is_evaluated_from_the_checkpoint_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    main(["fit", "vae-digits", "--out", str(folder), "--epochs=2", *QUICK])
    *_, newest = sorted((folder / "checkpoints").glob("step-*.safetensors"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="falling back to"):
        assert main(["evaluate", str(folder), "--samples=2"]) == 0
    for mark in (folder / "checkpoints").glob("*.json"):
        os.truncate(mark, 20)
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--samples=2"]) == 1
    assert "no checkpoint is intact" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["fit", "vae-digits", "--device", "cuda", "--out", str(tmp_path / "run")],
        ["evaluate", str(run), "--device", "cuda"],
    ):
        assert main(words) == 1
        assert "no CUDA device here" in capsys.readouterr().err
