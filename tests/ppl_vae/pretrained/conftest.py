"""What tests of trained models share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of data sets."""
    home = tmp_path / "data"
    home.mkdir()
    monkeypatch.setenv("PPL_VAE_DATA", str(home))
    return home
