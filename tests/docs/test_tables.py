"""The tables of the results pages are what their JSON says."""

import json

import pytest
from paths import ROOT

from backdrop import results

PAGES = ROOT / "docs" / "results"


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_the_tables_of_a_page_are_fresh(page):
    text = page.read_text(encoding="utf-8")
    assert results.with_tables(text, PAGES) == text, "run backdrop results"


def test_every_table_stands_on_one_page():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))
    assert {name: text.count(f"<!-- table {name} -->") for name in results.TABLES} == dict.fromkeys(
        results.TABLES, 1
    )


def test_a_table_holds_every_row_of_its_json():
    for name, (file, render) in results.TABLES.items():
        table = render(json.loads((PAGES / "data" / file).read_text(encoding="utf-8")))
        assert table.count("\n| ") >= 2, name


def test_a_stale_table_is_found_and_rewritten(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "matching.json").write_text((PAGES / "data" / "matching.json").read_text())
    page = tmp_path / "matching.md"
    page.write_text("Words.\n\n<!-- table matching -->\nold\n<!-- end -->\n")
    assert results.refresh(check=True, folder=tmp_path) == [page] and "old" in page.read_text()
    assert results.refresh(folder=tmp_path) == [page] and "old" not in page.read_text()
    assert "Words." in page.read_text() and results.refresh(check=True, folder=tmp_path) == []
