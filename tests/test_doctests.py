"""Examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import ppl_vae


def modules():
    # The zoo's folders are packaged under ppl_vae, but need not lie in its folder.
    packages = [ppl_vae, *map(importlib.import_module, ("ppl_vae.models", "ppl_vae.guides"))]
    found = {
        module.name
        for package in packages
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    }
    return sorted(found | {package.__name__ for package in packages})


@pytest.mark.parametrize("name", modules())
def test_examples_of_a_module_hold(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_zoo_is_among_the_modules():
    assert {"ppl_vae.cli", "ppl_vae.models.vae", "ppl_vae.guides.mean_field"} <= set(modules())


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    tests = [test for name in modules() for test in finder.find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in tests) > 0
