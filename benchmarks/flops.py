"""FLOPs of LLaVA's parts at a shape, counted on the meta device, and the least that a mode cannot do without.

`flop_ideal_ratio` of a mode is what FLOPs alone would allow: those of all that LLaVA runs for the first token, over those
that the mode cannot do without. No implementation gets above it by saving work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlavaForConditionalGeneration

from backdrop.processing.patch_groups_backdrop import OBJECT
from backdrop.processing.processing_backdrop import IMAGE_TOKEN, SEPARATOR_TOKENS

from .shapes import SHAPES, build_tokenizer


@lru_cache(maxsize=1)
def _meta_llava(name: str) -> LlavaForConditionalGeneration:
    with torch.device("meta"):  # eager: its attention is made of counted matrix products
        return LlavaForConditionalGeneration(SHAPES[name].llava_config("eager")).eval()


@torch.no_grad()
def _counted(run: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


@lru_cache
def stock_vision_flops(name: str) -> int:
    """FLOPs of LLaVA's whole tower (all its layers, as it runs them) and projector on one image."""
    model, side = _meta_llava(name).model, SHAPES[name].vision["image_size"]
    pixels = torch.empty(1, 3, side, side, device="meta")
    return _counted(lambda: model.get_image_features(pixel_values=pixels))


@lru_cache
def group_flops(name: str, patches: int) -> int:
    """FLOPs of one group: its own patches' embeddings, the layers up to the feature layer, and the projector."""
    model, shape = _meta_llava(name).model, SHAPES[name]
    tower, side = model.vision_tower, shape.vision["image_size"]
    pixels = torch.empty(1, 3, side, side, device="meta")
    embedding = _counted(lambda: tower.embeddings(pixels)) * patches // shape.grid**2
    depth = shape.vision["num_hidden_layers"] + 1 + model.config.vision_feature_layer
    hidden = torch.empty(1, 1 + patches, shape.vision["hidden_size"], device="meta")

    def encode() -> None:
        states = hidden
        for layer in tower.encoder.layers[:depth]:
            states = layer(states, None)
        model.multi_modal_projector(states[:, 1:])

    return embedding + _counted(encode)


@lru_cache
def text_flops(name: str, seen: int, new: int) -> int:
    """FLOPs of the language model on `new` positions behind `seen` cached ones, and of its head on the last position."""
    model, width = _meta_llava(name), SHAPES[name].text["hidden_size"]
    embeds = torch.empty(1, seen + new, width, device="meta")
    cache = DynamicCache()

    def run(part: torch.Tensor) -> None:
        states = model.model.language_model(inputs_embeds=part, past_key_values=cache, use_cache=True)
        model.lm_head(states.last_hidden_state[:, -1:])

    with torch.no_grad():
        if seen:
            run(embeds[:, :seen])
    return _counted(lambda: run(embeds[:, seen:]))


@dataclass(frozen=True)
class Prompt:
    """One prompt of a call of Backdrop's processor, as counts.

    Attributes:
        length: positions.
        prefix_length: positions up to the background's end; 0 where there is no background.
        group_patches: patches that each group owns.
        object_patches: patches that its object groups own together.
    """

    length: int
    prefix_length: int
    group_patches: tuple[int, ...]
    object_patches: int


def read_prompts(inputs: dict) -> list[Prompt]:
    """The prompts of a call of Backdrop's processor, one for each row of the batch."""
    image_id, *_, bg_end = build_tokenizer().convert_tokens_to_ids([IMAGE_TOKEN, *SEPARATOR_TOKENS[:2]])
    patches, kinds = inputs["patch_mask"].sum(-1).tolist(), inputs["group_kind"].tolist()
    prompts, g = [], 0
    for ids, attended in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[attended.bool()].tolist()
        first, left = g, ids.count(image_id)
        while left:
            left -= patches[g]
            g += 1
        objects = sum(patches[i] for i in range(first, g) if kinds[i] == OBJECT)
        prefix = ids.index(bg_end) + 1 if bg_end in ids else 0
        prompts.append(Prompt(len(ids), prefix, tuple(patches[first:g]), objects))
    return prompts


def needed_flops(name: str, mode: str, prompts: Sequence[Prompt]) -> int:
    """The least that a mode of Backdrop has to compute for these prompts, on a known background unless it is `cold`."""
    total = 0
    for prompt in prompts:
        if mode == "cold":
            total += sum(group_flops(name, patches) for patches in prompt.group_patches)
        elif prompt.object_patches:
            total += group_flops(name, prompt.object_patches)
        seen = prompt.prefix_length if mode == "tokens+prefix" else 0
        total += text_flops(name, seen, prompt.length - seen)
    return total


def flop_ideals(name: str, inputs: dict[str, dict]) -> dict[str, float]:
    """LLaVA's FLOPs over the least that each mode needs.

    Args:
        inputs: mode -> what its processor made of one and the same call; "llava" among them.
    """
    lengths = inputs["llava"]["attention_mask"].sum(-1).tolist()
    llava = sum(stock_vision_flops(name) + text_flops(name, 0, length) for length in lengths)
    return {"llava": 1.0} | {
        mode: llava / needed_flops(name, mode, read_prompts(inputs[mode]))
        for mode in inputs
        if mode != "llava"
    }
