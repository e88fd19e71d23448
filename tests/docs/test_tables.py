"""The tables of the results pages are what their JSON says."""

import importlib.util
import json
import sys

import pytest
from paths import ROOT


def load(name: str):
    """A script of `docs/`, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tables = load("tables")


@pytest.mark.parametrize("page", sorted(tables.RESULTS.glob("*.md")), ids=lambda page: page.stem)
def test_the_tables_of_a_page_are_fresh(page):
    text = page.read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, "run backdrop results"


def test_every_table_stands_on_one_page():
    text = "\n".join(page.read_text(encoding="utf-8") for page in tables.RESULTS.glob("*.md"))
    assert {name: text.count(f"<!-- table {name} -->") for name in tables.TABLES} == dict.fromkeys(
        tables.TABLES, 1
    )


def test_a_table_holds_every_row_of_its_json():
    for name, (file, render) in tables.TABLES.items():
        table = render(json.loads((tables.RESULTS / "data" / file).read_text(encoding="utf-8")))
        assert table.count("\n| ") >= 2, name


def test_a_stale_table_is_found_and_rewritten(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "matching.json").write_text((tables.RESULTS / "data" / "matching.json").read_text())
    page = tmp_path / "matching.md"
    page.write_text("Words.\n\n<!-- table matching -->\nold\n<!-- end -->\n")
    assert tables.refresh(check=True, folder=tmp_path) == [page] and "old" in page.read_text()
    assert tables.refresh(folder=tmp_path) == [page] and "old" not in page.read_text()
    assert "Words." in page.read_text() and tables.refresh(check=True, folder=tmp_path) == []
