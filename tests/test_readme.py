"""The README does what it says: examples run, the table is current, links lead somewhere."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from ppl_vae.zoo import TABLE_BEGIN, TABLE_END, models, table, with_table

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")


def test_examples_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A fence would be taken for output of the example above it.
    unfenced = re.sub(r"^```.*$", "", TEXT, flags=re.MULTILINE)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    examples = doctest.DocTestParser().get_doctest(unfenced, {}, "README.md", "README.md", 0)
    assert len(examples.examples) > 10
    assert doctest.DocTestRunner(optionflags=flags).run(examples).failed == 0
    assert not list(tmp_path.iterdir())


def test_the_zoo_is_up_to_date():
    assert with_table(TEXT) == TEXT, "run: make readme"
    assert all(f"`{name}`" in table() for name in models())


@pytest.mark.parametrize(
    "text", ["", TABLE_BEGIN, TABLE_END + TABLE_BEGIN, 2 * (TABLE_BEGIN + TABLE_END)]
)
def test_a_text_without_one_pair_of_markers_is_refused(text):
    with pytest.raises(ValueError, match="expected one"):
        with_table(text)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    targets = re.findall(r'\]\(([^)#]+)|src="([^"]+)"', text)
    local = {a or b for a, b in targets if not (a or b).startswith("http")}
    assert not [target for target in local if not (ROOT / target).exists()]


def test_pictures_are_small_and_used():
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 150_000, picture.name
        assert f"docs/images/{picture.name}" in TEXT
