"""What the Hub asks of the files of `processing/`: transformers finds each of them, and requires no optional package."""

import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from backdrop.processing import processing_backdrop

FOLDER = Path(processing_backdrop.__file__).parent
FILES = sorted(FOLDER.glob("*_backdrop.py"))


def test_each_file_is_found_from_the_processor():
    found = {Path(file).name for file in get_relative_import_files(FOLDER / "processing_backdrop.py")}
    assert found | {"processing_backdrop.py"} == {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_optional_package_is_required(file):
    required = {"PIL", "numpy", "safetensors", "torch", "transformers"}
    assert set(get_imports(file)) - set(sys.stdlib_module_names) <= required
