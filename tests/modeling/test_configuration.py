"""The configuration: what cannot work is refused, what works survives a round trip."""

import pytest
import tiny

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropModel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"separator_token_ids": [91, 92, 93, 96]},
            r"\[OBJ_END\] has the token id 96, but the embedding table has 96",
        ),
        ({"image_token_id": 200}, r"<image> has the token id 200"),
        ({"separator_token_ids": [91]}, r"separator_token_ids has 1 ids"),
        ({"vision_feature_layer": 9}, r"vision_feature_layer is 9; the tower has 3 layers"),
        ({"vision_feature_select_strategy": "cls"}, r"wanted 'default' or 'full'"),
        ({"num_prefusion_layers": -1}, r"num_prefusion_layers is -1"),
        ({"vision_config": {"model_type": "pixtral"}}, r"vision_config.model_type is 'pixtral'"),
        ({"text_config": {"model_type": "no_such"}}, r"text_config.model_type is 'no_such'"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.backdrop_config(**changes)
    with pytest.raises(ValueError, match="has none|does not have"):
        tiny.backdrop_config(tower="siglip", vision_feature_select_strategy="default")


def test_the_configuration_survives_a_round_trip(tmp_path):
    config = tiny.backdrop_config(num_prefusion_layers=2, separate_projectors=True)
    config.save_pretrained(tmp_path)
    assert BackdropConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "changes, named",
    [({"num_prefusion_layers": 1}, "--fold-prefusion"), ({"raster_order": True}, "raster_order")],
)
def test_what_vllm_cannot_run_is_refused_when_it_builds_the_model(changes, named):
    config = tiny.backdrop_config(separators=False, tower="siglip", **changes)
    config.text_config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=named):
        BackdropModel(config)
