"""Switches of a recipe reach the model and the processor."""

import torch
from trl import ModelConfig

from backdrop.hub_export.chat_template import chat_template
from backdrop.train.assemble import ModelArguments, assemble


def test_switches_reach_model_and_processor(base):
    def made(**switches):
        return assemble(ModelArguments(model=str(base / "model"), **switches), ModelConfig())

    model, processor = made(split=False, separators="none", margin=2, background_first=False)
    assert model.config.separator_token_ids is None and not processor.use_separators
    images = processor.image_processor
    assert (images.split, images.margin, images.background_first) == (False, 2, False)
    rows = made()[0].config.separator_token_ids
    tables = [
        made(separators=start)[0].get_input_embeddings().weight[rows].detach()
        for start in ("keep", "meaning", "random")
    ]
    assert not any(torch.equal(a, b) for a, b in zip(tables, tables[1:] + tables[:1], strict=True))
    model, processor = made(separators="none", raster_order=True, masked_attention=False)
    assert model.config.raster_order and not model.config.masked_attention


def test_images_in_place(processor):
    processor.chat_template = chat_template(system_prompt="", images_first=False)
    image, text = {"type": "image"}, {"type": "text", "text": "what is it?"}

    def prompt(*parts):
        return processor.apply_chat_template([{"role": "user", "content": list(parts)}], tokenize=False)

    assert "USER: what is it?\n<image> " in prompt(text, image)
    assert "USER: <image>\nwhat is it? " in prompt(image, text)
    assert "USER: <image><image>\nwhat is it?\n<image> " in prompt(image, image, text, image)
    processor.chat_template = chat_template(system_prompt="")
    assert "USER: <image>\nwhat is it? " in prompt(text, image)
