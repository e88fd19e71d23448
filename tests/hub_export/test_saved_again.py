"""What was loaded from an exported folder after the package was imported is saved with the code that it names."""

import json

import pytest
from test_export import put_into_hub_cache, tiny_pair
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from backdrop.hub_export.export import export
from backdrop.hub_export.verify import load_failures

AUTO = (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoImageProcessor)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(*tiny_pair(), folder)
    return folder


def named_code(folder) -> set[str]:
    """The files that the folder's auto maps name."""
    found = set()
    for path in folder.glob("*.json"):
        values = json.loads(path.read_text())
        for part in (values, values.get("image_processor") or {}):
            found |= {name.partition(".")[0] + ".py" for name in (part.get("auto_map") or {}).values()}
    return found


def present(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("auto", AUTO, ids=lambda auto: auto.__name__)
def test_the_code_that_is_named_goes_along(exported, tmp_path, auto):
    auto.from_pretrained(exported, trust_remote_code=True).save_pretrained(tmp_path / "again")
    named = named_code(tmp_path / "again")
    assert named
    assert named <= present(tmp_path / "again")


@pytest.mark.parametrize("source", ["folder", "repository"])
def test_it_loads_by_itself(exported, tmp_path, source):
    again, name = tmp_path / "again", str(exported)
    options = {"trust_remote_code": True}
    if source == "repository":
        put_into_hub_cache(exported, tmp_path)
        name = "owner/tiny"
        options |= {"cache_dir": tmp_path / "huggingface" / "hub"}
        from test_export import REPO

        name = REPO
    AutoModelForImageTextToText.from_pretrained(name, **options).save_pretrained(again)
    AutoProcessor.from_pretrained(name, **options).save_pretrained(again)
    assert not any("--" in file for file in named_code(again))
    assert load_failures([again]) == [None]


def test_what_names_no_code_is_saved_without(tmp_path):
    for part in tiny_pair():
        part.save_pretrained(tmp_path)
    assert not named_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))
