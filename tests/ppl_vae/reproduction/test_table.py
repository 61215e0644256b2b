"""The page of the records: complete, with gaps where a record is missing."""

from __future__ import annotations

import copy
import json
import re

import pytest

from ppl_vae.cli import main
from ppl_vae.reproduction import table as table_module
from ppl_vae.reproduction.published import Group, Published, groups
from ppl_vae.reproduction.table import markdown, read_records

MADE = Published("vae-somewhere", "vae-digits", 88.56, seen=False, paper={"epochs": 9})
MISSING = Published("vamp-somewhere", "vamp-digits", 85.57, note="Half as wide as the paper's.")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    group = Group("Somewhere", "Somebody 2018", "All test rows.", [MADE, MISSING])
    monkeypatch.setattr(table_module, "groups", lambda: (group,))


def record(nll: float, seed: int = 0, protocol: str = "recipe") -> dict:
    return {
        "format": 1,
        "name": "vae-somewhere",
        "protocol": protocol,
        "seed": seed,
        "figures": {
            "nll": nll,
            "nll_se": 0.25,
            "negative_elbo": nll + 5,
            "negative_elbo_se": 0.26,
            "samples": 5000,
            "active_units": 23,
            "pareto_k": {"median": 1.1, "share_above_0.7": 0.94},
        },
        "leaks": {"test_rows_also_in": {"train": 3}, "values": [0.0, 1.0], "whole": True},
        "epochs_done": 110,
        "seconds": 420.0,
        "fit": {"device": "cpu"},
        "hardware": {"cpu": "A CPU", "cpus": 2, "cuda": []},
        "versions": {"torch": "2.14"},
    }


def row(page: str, name: str) -> list[str]:
    [line] = re.findall(rf"^\| {name} .*", page.partition("How far")[0], re.M)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_missing_record_stays_a_gap_with_the_command_that_fills_it():
    page = markdown([record(87.9)])
    gap = row(page, "vamp-somewhere")
    assert gap[1:4] == ["85.57", "–", "–"]
    assert gap[-1] == "`ppl-vae reproduce vamp-somewhere`"
    assert "Of 2 figures, 1 are recorded: 1 better." in page
    assert "- `vamp-somewhere`: Half as wide as the paper's." in page


def test_a_record_stands_beside_what_was_published():
    page = markdown([record(87.9)])
    assert row(page, "vae-somewhere")[1:] == [
        "~88.56",
        "87.90",
        "-0.66",
        "better",
        "1",
        "110",
        "7",
        "–",
        "",
    ]
    [believed] = re.findall(r"^\| vae-somewhere +\| 0 .*", page, re.M)
    for shown in ("5000", "87.90 ± 0.25", "92.90 ± 0.26", "1.10", "94 %", "23", "0 to 1, whole"):
        assert shown in believed
    assert "- A CPU, 2 CPUs; torch 2.14: `vae-somewhere`" in page


def test_seeds_are_averaged_and_the_paper_s_optimization_stands_apart():
    records = [record(88.0, 0), record(88.8, 1), record(88.9, 0, "paper")]
    cells = row(markdown(records), "vae-somewhere")
    assert cells[2] == "88.40 ± 0.40"
    # Within two standard errors, although 0.3 nats could not be told apart either.
    assert cells[4] == "reached"
    assert cells[5] == "2"
    assert cells[-2] == "88.90"


def test_a_figure_that_is_worse_is_called_so():
    assert row(markdown([record(89.0)]), "vae-somewhere")[4] == "worse"


def test_without_records_all_is_gaps():
    page = markdown([])
    assert "Of 2 figures, 0 are recorded: none." in page
    assert page.count("`ppl-vae reproduce v") == 2
    assert "Machines" not in page


def test_files_that_are_no_records_are_refused(tmp_path):
    (tmp_path / "records").mkdir()
    path = tmp_path / "records" / "a.json"
    path.write_text(json.dumps(record(88.0)))
    assert read_records(tmp_path) == [record(88.0)]
    other = copy.deepcopy(record(88.0))
    other["format"] = 0
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"a.json is no record of format 1: move it away"):
        read_records(tmp_path)


def test_the_command_makes_the_page_of_all_that_is_published(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table_module, "groups", groups)
    assert main(["reproduce", "--table", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "README.md")
    page = (tmp_path / "README.md").read_text()
    for group in groups():
        assert f"## {group.title}" in page
        for figure in group.figures:
            assert f"`ppl-vae reproduce {figure.name}`" in page


def test_an_unknown_name_names_the_nearest(tmp_path, capsys):
    assert main(["reproduce", "vae-static-mnits", "--out", str(tmp_path)]) == 1
    assert "did you mean 'vae-static-mnist'?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
