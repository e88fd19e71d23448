"""LLaVA and Backdrop with the same weights, everything off, and inputs that both take."""

import tiny
import torch

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration


def llava_and_backdrop(prefusion: int = 0, **changes):
    """(stock LLaVA, Backdrop with its weights, unsplit and without separators)."""
    llava = tiny.llava_model(**changes)
    config = tiny.backdrop_config(separators=False, **changes)
    model = BackdropForConditionalGeneration(config).eval()
    model.load_state_dict(llava.state_dict())
    return llava, model


def whole_images(rows, seed: int = 0, extra: int = 0, texts=((3, 4, 5), (6, 7, 8, 9))) -> dict:
    """Left-padded prompts for `rows` of image indices, each image whole: no masks, so that stock LLaVA takes them."""
    images = max((g for row in rows for g in row), default=-1) + 1
    mask = torch.ones(images, tiny.PATCHES, dtype=torch.bool)
    ids = tiny.prompt_ids(rows, mask, [0] * images, separators=False, extra=extra, texts=texts)
    input_ids, attention_mask = tiny.pad_left(ids)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, tiny.SIDE, tiny.SIDE, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixels}
