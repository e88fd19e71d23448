"""The files that go to the Hub: each is found from the one that `auto_map` names, and holds one concept."""

from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from backdrop import modeling

FOLDER = Path(modeling.__file__).parent
SOURCES = sorted(FOLDER.glob("*_backdrop.py"))


def test_every_file_is_found_from_the_model():
    """transformers finds the files of custom code by a regular expression, from import to import."""
    found = {Path(path).name for path in get_relative_import_files(str(FOLDER / "modeling_backdrop.py"))}
    assert found | {"modeling_backdrop.py"} == {source.name for source in SOURCES}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_file_holds_one_concept_in_at_most_400_lines(source):
    assert len(source.read_text().splitlines()) <= 400
