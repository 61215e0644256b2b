"""The training loop: it finds the optimum, logs the truth, stops, resumes and fails well."""

from __future__ import annotations

import csv
import json
import math
import resource
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau

import ppl_vae
from ppl_vae.begin import _scheduler
from ppl_vae.evaluation import mean_elbo
from ppl_vae.fitting import Fitted, fit
from ppl_vae.guides.mean_field import MeanField
from ppl_vae.likelihoods import Bernoulli, ContinuousBernoulli, Gaussian
from ppl_vae.loop import weights
from ppl_vae.models._template import Template
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.nn import MLP
from ppl_vae.objectives import CyclicalWarmup
from ppl_vae.priors import StandardNormal
from ppl_vae.run import Run
from ppl_vae.sites import PairError
from ppl_vae.svi import NonFiniteLoss


@pytest.fixture
def data() -> dict[str, Tensor]:
    """Rows of a linear-Gaussian model: 200 for training, 50 each to validate and test."""
    torch.manual_seed(0)
    x = PPCA(2, 5, scale=0.5).simulate(300)["x"]
    return {"train": x[:200], "validation": x[200:250], "test": x[250:]}


def ppca(seed: int = 1) -> tuple[PPCA, MeanField]:
    torch.manual_seed(seed)
    model = PPCA(2, 5)
    return model, MeanField(model, MLP(5, 16), torch.zeros(2, 5))


def fitted(data: Any, pair: tuple[Any, Any] | None = None, **options: Any) -> Fitted:
    model, guide = pair or ppca()
    return fit(model, guide, data, **{"epochs": 3, "batch_size": 40, "progress": False, **options})


def two_steps(optimizer: torch.optim.Optimizer) -> MultiStepLR:
    return MultiStepLR(optimizer, [2], gamma=0.1)


def final_tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Run.open(folder).latest()
    assert checkpoint is not None
    return checkpoint.tensors


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# -- what is learned ---------------------------------------------------------------------------


def test_fit_reaches_the_maximum_likelihood_of_ppca(data: dict[str, Tensor]) -> None:
    """The optimum is known in closed form (Tipping & Bishop 1999, eq. 7-8), and a mean-field guide
    is exact at it, up to rotation."""
    x = data["train"].double()
    eigenvalues = torch.linalg.eigvalsh(x.T.cov(correction=0)).flip(0)
    noise = eigenvalues[2:].mean()
    log_det = eigenvalues[:2].log().sum() + 3 * noise.log()
    best = -0.5 * (5 * math.log(2 * math.pi) + log_det + 5).item()
    result = fitted({"train": x}, epochs=600, learning_rate=1e-2, precision="64-true")
    assert isinstance(result.model, PPCA)
    evidence = result.model.evidence(x).mean().item()
    assert best - 0.01 < evidence <= best
    assert result.history[-1]["elbo"] == pytest.approx(best, abs=0.1)


def test_global_latents_are_learned_from_the_whole_data_set() -> None:
    """More rows give a narrower posterior of a global site: `total` reaches it."""
    torch.manual_seed(0)
    x = Template(4).simulate(400)["x"]
    widths = []
    for rows in (20, 400):
        torch.manual_seed(1)
        model = Template(4)
        guide = MeanField(model, MLP(4, 8), x[:2])
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        fit(
            model,
            guide,
            {"train": x[:rows]},
            epochs=8000 // rows,
            batch_size=20,
            learning_rate=1e-2,
            progress=False,
        )
        widths.append(guide.global_guide.scales.w.mean().item())
    assert widths[1] < 0.6 * widths[0]


def test_a_bare_tensor_is_split_and_fitted(data: dict[str, Tensor]) -> None:
    result = ppl_vae.fit(*ppca(), data["train"].numpy(), epochs=1, progress=False)
    assert {k: len(result.data.split(k)) for k in result.data.splits} == {
        "train": 160,
        "validation": 20,
        "test": 20,
    }


# -- what is logged ----------------------------------------------------------------------------


def test_metrics_say_what_happened(data: dict[str, Tensor], tmp_path: Path) -> None:
    result = fitted(data, epochs=4, warmup=2, out=tmp_path / "run", tensorboard=True)
    assert result.run is not None
    with (result.run.folder / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == result.history
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    # The weight at the last batch of each epoch: five batches, two epochs of warm-up.
    assert [row["weight"] for row in rows] == pytest.approx([0.4, 0.9, 1.0, 1.0])
    for row in rows:
        for kind in ("", "validation_"):
            assert row[f"{kind}elbo"] == pytest.approx(
                row[f"{kind}reconstruction"] - row[f"{kind}kl"], rel=1e-6
            )
    record = json.loads((result.run.folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["epochs_done"] == 4
    assert record["model"] == "PPCA"
    assert record["seed"] == 0
    assert {"torch", "pyro-ppl", "python"} <= set(record["versions"])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.run.folder / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("elbo")] == pytest.approx(
        [row["elbo"] for row in rows], rel=1e-6
    )


def test_training_and_validation_elbo_are_those_of_the_model(data: dict[str, Tensor]) -> None:
    """With a learning rate that moves nothing, both estimate one fixed number."""
    pair = ppca()
    result = fitted(data, pair, epochs=60, learning_rate=1e-12, batch_size=37)
    for split, name in (("train", "elbo"), ("validation", "validation_elbo")):
        exact = ppl_vae.evaluate(*pair, data, split=split, samples=2000).elbo
        logged = torch.tensor([row[name] for row in result.history])
        if split == "train":
            error = logged.std().item() / math.sqrt(60)
            assert abs(logged.mean().item() - exact) < 4 * error
        else:
            assert len(set(logged.tolist())) == 1, "one seed for every epoch"
            assert logged[0].item() == pytest.approx(exact, abs=0.5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [1.0, 0.75, 0.25]),
        (two_steps, [1.0, 1.0, 0.1]),
        ("plateau", [1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_follows_its_schedule(
    data: dict[str, Tensor], schedule: Any, expected: list[float]
) -> None:
    result = fitted(data, schedule=schedule, learning_rate=1e-3)
    rates = [row["learning_rate"] / 1e-3 for row in result.history]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_plateau_drops_the_rate_of_an_elbo_that_stands_still() -> None:
    """Also of a negative one, of which a relative threshold would take a worse for a better."""
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], 1e-3)
    scheduler = _scheduler("plateau", optimizer, 50)
    assert isinstance(scheduler, ReduceLROnPlateau)
    for epoch in range(12):
        scheduler.step(-100.0 - 0.001 * epoch)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


# -- stopping ----------------------------------------------------------------------------------


def test_early_stopping_waits_for_the_warm_up(data: dict[str, Tensor]) -> None:
    """Nothing ever improves: it stops ``patience`` epochs after the warm-up's end, not before."""
    result = fitted(data, epochs=50, learning_rate=1e-12, warmup=5, patience=3)
    assert len(result.history) == 8
    cyclical = fitted(data, epochs=50, learning_rate=1e-12, warmup=CyclicalWarmup(10), patience=3)
    assert len(cyclical.history) == 13


def test_early_stopping_keeps_the_best_weights(data: dict[str, Tensor], tmp_path: Path) -> None:
    """A learning rate so high that later epochs are worse."""
    result = fitted(
        data, epochs=40, learning_rate=0.3, patience=4, batch_size=10, out=tmp_path / "run"
    )
    validation = [row["validation_elbo"] for row in result.history]
    best = max(validation)
    assert validation[-1] < best
    assert len(validation) == validation.index(best) + 1 + 4
    rows = result.data.split("validation")
    assert mean_elbo(result.model, result.guide, rows, seed=0).elbo.item() == best
    loaded = ppl_vae.load(tmp_path / "run", *ppca(), data)
    assert_same_tensors(weights(loaded.model, loaded.guide), weights(result.model, result.guide))


def test_a_loss_that_is_not_finite_names_the_site_and_keeps_the_checkpoint(
    data: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = VAE(StandardNormal(2), Gaussian(MLP(2, 5), scale=1e-3))
    guide = MeanField(model, nn.Sequential(MLP(5, 8), nn.Tanh()), data["train"])
    data["train"][130] = 1e30
    before = {k: v.clone() for k, v in weights(model, guide).items()}
    with pytest.raises(NonFiniteLoss, match=r"site 'x' of the model has log-probability -inf"):
        fitted(data, (model, guide), batch_size=200, out=tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.record["status"] == "failed"
    checkpoint = run.latest()
    assert checkpoint is not None
    for name, tensor in before.items():
        assert torch.equal(checkpoint.tensors[name], tensor), "no step was taken"


def test_the_random_state_of_the_caller_is_left_alone(data: dict[str, Tensor]) -> None:
    pair = ppca()
    state = torch.get_rng_state()
    fitted(data, pair)
    assert torch.equal(torch.get_rng_state(), state)


# -- bad input: a clear error, and nothing lost ------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"epochs": 0}, "epochs=0: expected a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected"),
        ({"devices": 0}, "devices=0: expected a whole number of at least 1"),
        ({"num_nodes": 0.5}, "num_nodes=0.5: expected a whole number of at least 1"),
        ({"patience": 0}, "patience=0: expected at least 1"),
        ({"average": 0}, "average=0: expected a whole number of epochs, at least 1, or None"),
        ({"average": 2.5}, "average=2.5: expected a whole number of epochs"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: expected a positive number"),
        ({"optimizer": "sgd"}, "optimizer='sgd': expected one of adam, adamw, adamax"),
        ({"schedule": "cosin"}, "schedule='cosin': expected cosine, plateau"),
        ({"warmup": -1}, "warmup=-1: expected epochs, at least 0"),
        ({"precision": "16"}, "precision='16': expected one of"),
        ({"device": "tpu"}, "device='tpu': expected auto, cpu or cuda"),
        ({"resume": True}, "resume=True: give out="),
        ({"objective": RenyiELBO(num_particles=2)}, "objective=RenyiELBO: it is not linear"),
        ({"seed": None}, "seed=None: expected a whole number"),
        ({"learning_rate": "a"}, "learning_rate='a': expected a positive number"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0: expected a positive number"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: expected a number of at least 0"),
        ({"tensorboard": True}, "tensorboard=True: expected out="),
    ],
)
def test_wrong_arguments_are_refused(
    data: dict[str, Tensor], wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        fitted(data, **wrong)


def test_cuda_is_refused_where_there_is_none(
    data: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device here; take 'cpu' or 'auto'"):
        fitted(data, device="cuda")


def test_data_that_the_model_cannot_emit_are_refused(data: dict[str, Tensor]) -> None:
    grey = torch.rand(30, 5)
    torch.manual_seed(0)
    for likelihood, x, sentence in (
        (Bernoulli, grey, r"row \d+, hold 0\.\d+, which Bernoulli cannot emit.*Binarize the data"),
        (ContinuousBernoulli, grey * 255, r"divide by the largest value"),
        (Bernoulli, grey.round()[:, :4], r"rows of shape \(4,\), but VAE emits \(5,\)"),
    ):
        model = VAE(StandardNormal(2), likelihood(MLP(2, 5)))
        guide = MeanField(model, MLP(5, 8), grey.round())
        with pytest.raises(PairError, match=sentence):
            fitted(x, (model, guide))
    for bad, sentence in ((torch.nan, "NaN"), (torch.inf, "infinit")):
        x = data["train"].clone()
        x[3, 1] = bad
        with pytest.raises(ValueError, match=sentence):
            fitted({"train": x})


class Coin(ppl_vae.GenerativeModel):
    def forward(
        self, x: Tensor | None = None, *, n: int | None = None, total: int | None = None
    ) -> Tensor:
        with self.rows(x, n=n, total=total):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor([0.5])).to_event(1))
            loc = y.expand(*y.shape[:-1], 5)
            return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def test_nothing_to_learn_is_refused(data: dict[str, Tensor]) -> None:
    model, guide = ppca()
    for parameter in nn.ModuleList([model, guide]).parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to learn"):
        fitted(data, (model, guide))


def test_patience_needs_validation_rows(data: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="need a validation split"):
        fitted({"train": data["train"]}, patience=2)


def test_a_folder_that_holds_another_run_is_left_alone(
    data: dict[str, Tensor], tmp_path: Path
) -> None:
    fitted(data, out=tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match=r"already holds a run.*another --out"):
        fitted(data, out=tmp_path / "run")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_resuming_with_other_data_or_seed_is_refused(
    data: dict[str, Tensor], tmp_path: Path
) -> None:
    fitted(data, out=tmp_path / "run")
    with pytest.raises(ValueError, match="was fitted to other data"):
        fitted(data | {"train": data["train"] + 1}, out=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="begun with seed=0: going on with seed=4"):
        fitted(data, out=tmp_path / "run", resume=True, seed=4)
    model = PPCA(3, 5)
    with pytest.raises(ValueError, match="the checkpoint is not one of this model, PPCA"):
        fitted(
            data, (model, MeanField(model, MLP(5, 16), data["test"])),
            out=tmp_path / "run", resume=True, epochs=9,
        )  # fmt: skip


def test_a_full_disk_keeps_what_was_saved(data: dict[str, Tensor], tmp_path: Path) -> None:
    """A real refusal by the kernel: no file may grow beyond half a checkpoint."""
    fitted(data, epochs=4, out=tmp_path / "whole")
    fitted(data, epochs=2, out=tmp_path / "run")
    size = max(p.stat().st_size for p in (tmp_path / "run" / "checkpoints").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
        with pytest.raises(OSError, match=r"what was saved before is intact.*--resume"):
            fitted(data, ppca(seed=9), epochs=4, out=tmp_path / "run", resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fitted(data, ppca(seed=9), epochs=4, out=tmp_path / "run", resume=True)
    assert_same_tensors(final_tensors(tmp_path / "run"), final_tensors(tmp_path / "whole"))


def test_a_run_without_recipe_needs_its_pair_to_be_loaded(
    data: dict[str, Tensor], tmp_path: Path
) -> None:
    result = fitted(data, out=tmp_path / "run")
    with pytest.raises(ValueError, match="fitted from Python, not by a recipe"):
        ppl_vae.load(tmp_path / "run")
    loaded = ppl_vae.load(tmp_path / "run", *ppca(seed=9), data)
    assert_same_tensors(weights(loaded.model, loaded.guide), weights(result.model, result.guide))
    assert loaded.history == result.history


@pytest.mark.parametrize(
    ("was", "now", "sentence"),
    [
        ({}, {"batch_size": 7}, "begun with batch_size=40: going on with batch_size=7"),
        ({}, {"optimizer": "adamax"}, "begun with optimizer=adam"),
        ({"warmup": CyclicalWarmup(9)}, {"warmup": 9}, r"warmup=CyclicalWarmup\(epochs=9"),
        ({"schedule": "cosine"}, {"schedule": "cosine", "epochs": 9}, "begun with epochs=3"),
        ({}, {"epochs": 2}, "has 3 epochs already: epochs=2 would take some of them back"),
        ({}, {"precision": "64-true"}, "begun with precision=32-true"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    data: dict[str, Tensor], tmp_path: Path, was: Any, now: Any, sentence: str
) -> None:
    fitted(data, out=tmp_path / "run", **was)
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ValueError, match=sentence):
        fitted(data, out=tmp_path / "run", resume=True, **now)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_the_record_holds_the_settings_as_resolved(data: dict[str, Tensor], tmp_path: Path) -> None:
    fitted(data, out=tmp_path / "run", max_grad_norm=2.0, schedule=two_steps)
    settings = Run.open(tmp_path / "run").record["fit"]
    assert settings == {
        "epochs": 3, "batch_size": 40, "labeled_batch": None, "objective": None,
        "optimizer": "adam",
        "learning_rate": 1e-3, "weight_decay": 0.0, "schedule": "two_steps",
        "max_grad_norm": 2.0, "warmup": 0, "patience": None, "average": None, "augment": None,
        "precision": "32-true",
            "accumulate": 1, "matmul_precision": None,
        "device": "cpu",
    }  # fmt: skip


def test_a_run_in_double_precision_is_loaded_in_double(
    data: dict[str, Tensor], tmp_path: Path
) -> None:
    result = fitted(data, out=tmp_path / "run", precision="64-true")
    loaded = ppl_vae.load(tmp_path / "run", *ppca(seed=9), data)
    assert_same_tensors(weights(loaded.model, loaded.guide), weights(result.model, result.guide))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float64}
    with pytest.raises(ValueError, match="give the data"):
        ppl_vae.load(tmp_path / "run", *ppca(seed=9))


def test_damaged_best_weights_fall_back_to_the_last(
    data: dict[str, Tensor], tmp_path: Path
) -> None:
    fitted(data, epochs=6, patience=9, out=tmp_path / "run")
    last = final_tensors(tmp_path / "run")
    best = next((tmp_path / "run" / "checkpoints").glob("best*.safetensors"))
    best.write_bytes(best.read_bytes()[:-3])
    with pytest.warns(RuntimeWarning, match="falling back to the last weights"):
        loaded = ppl_vae.load(tmp_path / "run", *ppca(seed=9), data)
    assert torch.equal(loaded.model.likelihood.net.weight, last["model.likelihood.net.weight"])
    with pytest.warns(RuntimeWarning, match="the search for the best weights begins anew"):
        result = fitted(data, epochs=8, patience=9, out=tmp_path / "run", resume=True)
    assert len(result.history) == 8


def test_two_processes_do_not_train_one_run(data: dict[str, Tensor], tmp_path: Path) -> None:
    fitted(data, out=tmp_path / "run")
    with (
        Run.open(tmp_path / "run").lock(),
        pytest.raises(BlockingIOError, match="another process is training this run"),
    ):
        fitted(data, out=tmp_path / "run", resume=True, epochs=5)


def test_a_model_without_parameters_can_have_a_learned_guide(data: dict[str, Tensor]) -> None:
    frozen = VAE(StandardNormal(5), Gaussian(nn.Identity(), 1.0))
    result = fitted(data, (frozen, MeanField(frozen, MLP(5, 8), data["test"])), epochs=5)
    assert result.history[-1]["elbo"] > result.history[0]["elbo"]


def test_dropout_is_on_in_training_even_if_the_caller_left_it_off(
    data: dict[str, Tensor],
) -> None:
    model, guide = ppca()
    model.eval()
    guide.eval()
    fitted(data, (model, guide))
    assert model.training
    assert guide.training


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fit_on_a_gpu_resumes_to_the_same_bits(data: dict[str, Tensor], tmp_path: Path) -> None:
    fitted(data, epochs=4, out=tmp_path / "whole", device="cuda")
    fitted(data, epochs=2, out=tmp_path / "part", device="cuda")
    fitted(data, ppca(9), epochs=4, out=tmp_path / "part", resume=True, device="cuda")
    assert_same_tensors(final_tensors(tmp_path / "part"), final_tensors(tmp_path / "whole"))
