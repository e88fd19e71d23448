"""The reference pages say something of every field, option and command."""

import pytest
from doc_pages import load

hooks = load("hooks")


@pytest.mark.parametrize("name", sorted(hooks.PAGES))
def test_no_row_is_without_words(name):
    rows = [line for line in hooks.PAGES[name]().splitlines() if line.startswith("| `")]
    words = 2 if name in ("reference/command-line.md", "design/files.md") else 3  # the column of what it does
    bare = [row for row in rows if not row.split("|")[words].strip()]
    assert rows or "recipes" in name
    assert not bare


def test_every_field_of_the_configuration_is_there():
    from transformers.processing_utils import ImagesKwargs

    from backdrop.modeling.configuration_backdrop import BackdropConfig
    from backdrop.processing.image_options_backdrop import BackdropImagesKwargs

    page = hooks.configuration_page()
    inherited = {
        "model_type",
        "sub_configs",
        "projector_hidden_act",
        "multimodal_projector_bias",
        "tie_word_embeddings",
    }
    for name in (set(BackdropConfig.__annotations__) - inherited) | (
        set(BackdropImagesKwargs.__annotations__) - set(ImagesKwargs.__annotations__)
    ):
        assert f"| `{name}` |" in page, name


def test_every_setting_of_the_gateway_is_there():
    from backdrop.serving.settings import GatewaySettings, Limits, Matching

    page = hooks.gateway_page()
    for cls in (GatewaySettings, Limits, Matching):
        assert all(f"| `{name}` |" in page for name in cls.model_fields)


def test_every_request_field_is_there():
    from backdrop.serving.fields import ALIASES, GUIDED, PART_NOTES, REQUEST_FIELDS

    page = hooks.request_fields_page()
    assert all(f"| `{name}` |" in page for name in (*REQUEST_FIELDS, *ALIASES, *GUIDED))
    assert all(f"`{name}`" in page for name in PART_NOTES)


def test_every_recipe_begins_with_a_comment():
    for folder in hooks.FOLDERS_OF_RECIPES:
        for path in (hooks.ROOT / folder).glob("*.yaml"):
            assert hooks.split_head(path.read_text())[0].strip(), path


def test_a_head_of_commands_becomes_a_block():
    head, body = hooks.split_head("# Words.\n#   backdrop demo\nseed: 1\n")
    assert head == "Words.\n\n```text\nbackdrop demo\n```" and body == "seed: 1"


def test_every_file_of_every_room_has_a_line():
    page = hooks.files_page()
    for room in hooks.ROOMS:
        assert f"## `{room}/`" in page
    assert "| `patch_groups_backdrop.py` |" in page and page.count("`patch_groups_backdrop.py`") == 1
