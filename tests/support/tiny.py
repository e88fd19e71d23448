"""Tiny models, tokenizers and images for the fast tests: random weights, no network."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration

SIDE, PATCH = 56, 14
PATCHES = (SIDE // PATCH) ** 2
IMAGE_ID = 90
SEPARATOR_IDS = [91, 92, 93, 94]
VOCAB = 96

_TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TOWERS = {
    "clip": lambda: CLIPVisionConfig(intermediate_size=64, **_TOWER),
    "siglip": lambda: SiglipVisionConfig(intermediate_size=64, **_TOWER),
    "dinov2": lambda: Dinov2Config(mlp_ratio=2, **_TOWER),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=3, **_TOWER),
    # Training moves DINOv3's positions at random, unless it is told not to.
    "dinov3": lambda: DINOv3ViTConfig(
        intermediate_size=64, num_register_tokens=2, pos_embed_rescale=None, **_TOWER
    ),
}


PREFIX_TOKENS = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_with_registers": 4, "dinov3": 3}


def text_config(**changes) -> LlamaConfig:
    values = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**values, **changes})


def backdrop_config(tower: str = "clip", separators: bool = True, **changes) -> BackdropConfig:
    values = {
        "vision_config": TOWERS[tower](),
        "text_config": text_config(),
        "image_token_id": IMAGE_ID,
        "separator_token_ids": SEPARATOR_IDS if separators else None,
        "vision_feature_select_strategy": "full" if tower == "siglip" else "default",
        "trained_on_groups": True,
    }
    return BackdropConfig(**{**values, **changes})


def backdrop_model(seed: int = 0, **changes) -> BackdropForConditionalGeneration:
    torch.manual_seed(seed)
    model = BackdropForConditionalGeneration(backdrop_config(**changes)).eval()
    sharpen(model, seed)
    return model


def llava_model(seed: int = 0, **changes) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    values = {"vision_config": TOWERS["clip"](), "text_config": text_config(), "image_token_index": IMAGE_ID}
    config = LlavaConfig(**{**values, **changes})
    model = LlavaForConditionalGeneration(config).eval()
    sharpen(model, seed)
    return model


def sharpen(model, seed: int) -> None:
    """Larger weights, so that an image or a position that is lost changes the logits visibly."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not (parameter == 0).all() and "prefusion" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)


def random_groups(groups: int, seed: int = 0, share: float = 0.6, patches: int = PATCHES):
    """`pixel_values [G, 3, S, S]` zero outside the mask's patches, `patch_mask [G, P]`, `group_kind [G]` 0,1,0,1..."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(groups, patches, generator=generator) < share
    mask[:, 0] |= ~mask.any(-1)
    pixels = torch.randn(groups, 3, SIDE, SIDE, generator=generator)
    return pixels, mask, torch.arange(groups) % 2


def prompt_ids(
    rows: list[list[int]], patch_mask, group_kind, separators=True, texts=((3, 4, 5), (6, 7, 8, 9)), extra=0
):
    """Unpadded id lists: `texts[0]`, each group of the row expanded, `texts[1]`."""
    result = []
    counts = (patch_mask.sum(-1) + extra).tolist()
    for r, row in enumerate(rows):
        ids = [1, *texts[0]]
        for g in row:
            start, end = SEPARATOR_IDS[2 * int(group_kind[g]) :][:2]
            ids += [start] * separators + [IMAGE_ID] * counts[g] + [end] * separators
        result.append([*ids, *texts[1], 10 + r])
    return result


def pad_left(rows: list[list[int]]):
    """`input_ids [B, L]`, `attention_mask [B, L]`."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on a few words; no files, no network."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(
        ["USER: what is shown? ASSISTANT: a red bus start of the background object"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def photo(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """A smooth random colour image."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
