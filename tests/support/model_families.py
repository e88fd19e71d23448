"""Families of towers and decoders as tiny checkpoints in their published layouts, and the table of what became of them.

    python tests/support/model_families.py

prints the table of docs/guides/build.md; a test compares the two.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    DINOv3ViTImageProcessor,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

ROWS = 320
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SQUARE = {"height": tiny.SIDE, "width": tiny.SIDE}
_CROP = {"size": {"shortest_edge": tiny.SIDE}, "crop_size": _SQUARE}


@dataclass(frozen=True)
class Tower:
    """A family of towers: what stands for it, and how its checkpoint is written."""

    name: str
    example: str
    config: Callable
    image_processor: Callable
    whole: tuple | None = None  # model and configuration of the image-text pair that it is published in


@dataclass(frozen=True)
class Decoder:
    """A family of decoders: its `model_type`, a published example, and what a tiny one needs beyond the common values."""

    name: str
    model_type: str
    example: str
    values: dict = field(default_factory=dict)


TOWERS = [
    Tower(
        "CLIP",
        "openai/clip-vit-large-patch14-336",
        tiny.TOWERS["clip"],
        lambda: CLIPImageProcessor(**_CROP),
        (CLIPModel, CLIPConfig),
    ),
    Tower(
        "SigLIP, SigLIP 2 (fixed resolution)",
        "google/siglip2-so400m-patch14-384",
        tiny.TOWERS["siglip"],
        lambda: SiglipImageProcessorPil(size=_SQUARE),
        (SiglipModel, SiglipConfig),
    ),
    Tower(
        "DINOv2",
        "facebook/dinov2-small",
        lambda: _larger(tiny.TOWERS["dinov2"]()),
        lambda: BitImageProcessorPil(**_CROP),
    ),
    Tower(
        "DINOv2 with registers",
        "facebook/dinov2-with-registers-small",
        lambda: _larger(tiny.TOWERS["dinov2_with_registers"]()),
        lambda: BitImageProcessorPil(**_CROP),
    ),
    Tower(
        "DINOv3 ViT",
        "facebook/dinov3-vits16-pretrain-lvd1689m",
        tiny.TOWERS["dinov3"],
        lambda: DINOv3ViTImageProcessor(size=_SQUARE),
    ),
]
_HEAD = {"head_dim": 8}
DECODERS = [
    Decoder("Llama", "llama", "meta-llama/Llama-3.2-1B-Instruct"),
    Decoder("SmolLM2", "llama", "HuggingFaceTB/SmolLM2-360M-Instruct", {"tie_word_embeddings": True}),
    Decoder("SmolLM3", "smollm3", "HuggingFaceTB/SmolLM3-3B", {"tie_word_embeddings": True}),
    Decoder("Qwen2, Qwen2.5", "qwen2", "Qwen/Qwen2.5-0.5B-Instruct", {"tie_word_embeddings": True}),
    Decoder("Qwen3", "qwen3", "Qwen/Qwen3-4B-Instruct-2507", {**_HEAD, "tie_word_embeddings": True}),
    Decoder("Gemma", "gemma", "google/gemma-2b-it", _HEAD),
    Decoder("Gemma 3", "gemma3_text", "google/gemma-3-1b-it", {**_HEAD, "sliding_window": 512}),
    Decoder("Mistral", "mistral", "mistralai/Mistral-7B-Instruct-v0.3", {**_HEAD, "sliding_window": None}),
    Decoder("Mistral with a window", "mistral", "mistralai/Mistral-7B-Instruct-v0.1", _HEAD),
    Decoder("Phi-3, Phi-4 mini", "phi3", "microsoft/Phi-3-mini-4k-instruct", {"sliding_window": 2047}),
    Decoder("OLMo 2", "olmo2", "allenai/OLMo-2-0425-1B-Instruct"),
    Decoder(
        "Qwen3 MoE",
        "qwen3_moe",
        "Qwen/Qwen3-30B-A3B",
        {**_HEAD, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    Decoder("Gemma 2", "gemma2", "google/gemma-2-2b-it", _HEAD),
    Decoder("Granite", "granite", "ibm-granite/granite-3.3-2b-instruct", {"logits_scaling": 8.0}),
    Decoder("Cohere", "cohere", "CohereLabs/c4ai-command-r-v01", {}),
    Decoder("Phi-2", "phi", "microsoft/phi-2"),
    Decoder("GPT-2", "gpt2", "openai-community/gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
]


def _larger(config):
    """DINOv2's table is for 518 px, and its image processor gives 224: here 84 and 56."""
    config.image_size = 84
    return config


def write_tower(folder: Path, tower: Tower) -> torch.nn.Module:
    """Writes a tiny tower as it is published, and gives the stock model of it."""
    torch.manual_seed(0)
    config = tower.config()
    if tower.whole is None:
        model = AutoModel.from_config(config).eval()
        tiny.sharpen(model, 0)
        model.save_pretrained(folder)
    else:
        whole, config_class = tower.whole
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        pair = whole(
            config_class(text_config={**text, "vocab_size": 40}, vision_config=config.to_dict())
        ).eval()
        tiny.sharpen(pair, 0)
        pair.save_pretrained(folder)
        model = pair.vision_model
    tower.image_processor().save_pretrained(folder)
    return model


def write_decoder(folder: Path, decoder: Decoder, template: str | None = CHATML) -> torch.nn.Module:
    """Writes a tiny decoder with its tokenizer, and gives the stock model of it."""
    torch.manual_seed(0)
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": ROWS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(decoder.model_type, **{**common, **decoder.values})
    model = AutoModelForCausalLM.from_config(config).eval()
    tiny.sharpen(model, 0)
    model.save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return model


def built(folder: Path, tower: Tower, decoder: Decoder, **options):
    """Stock tower, stock decoder, and the model and processor that `build` makes of their checkpoints."""
    from backdrop.hub_export.build import build

    stock = write_tower(folder / "tower", tower), write_decoder(folder / "decoder", decoder)
    return *stock, *build(folder / "tower", folder / "decoder", **options)


def decoder_row(folder: Path, decoder: Decoder) -> str:
    """A line of the table: what became of a decoder behind CLIP."""
    try:
        _, stock, model, _ = built(folder, TOWERS[0], decoder)
    except ValueError as error:
        result, reuse = "refused: " + str(error).partition("; wanted")[0], "-"
    else:
        result = f"text logits equal to its own: {same_text(stock, model)}"
        reuse = "yes" if model.enable_background_cache(max_bytes=2**20).prefixes else "vision tokens only"
    return f"| {decoder.name} | `{decoder.model_type}` | `{decoder.example}` | {result} | {reuse} |"


@torch.no_grad()
def same_text(stock, model) -> str:
    """How near the logits of a text are to those of the decoder alone, for all tokens but the new ones."""
    ids = torch.tensor([[1, 5, 9, 200, 31, 77]])
    new = set(model.config.special_token_ids.values())
    kept = [i for i in range(stock.config.vocab_size) if i not in new]
    ours, theirs = model(input_ids=ids).logits[..., kept], stock(input_ids=ids).logits[..., kept]
    return "bit for bit" if torch.equal(ours, theirs) else f"within {(ours - theirs).abs().max():.1e}"


@torch.no_grad()
def same_features(stock, model, side: int = tiny.SIDE) -> bool:
    """Whether the vision tokens of a whole image are those of the tower alone, projected."""
    from backdrop.modeling.configuration_backdrop import tower_prefix_tokens

    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    hidden = stock(pixels, output_hidden_states=True).hidden_states[-2]
    theirs = model.model.multi_modal_projector(hidden[:, tower_prefix_tokens(model.config.vision_config) :])
    return torch.equal(torch.stack(list(model.get_image_features(pixels).pooler_output)), theirs)


def tower_row(folder: Path, tower: Tower) -> str:
    """A line of the table: a tower in front of Llama, at its own resolution and at another."""
    from backdrop.modeling.configuration_backdrop import tower_prefix_tokens

    stock, _, model, _ = built(folder, tower, DECODERS[0])
    config = model.config.vision_config
    equal = "bit for bit" if same_features(stock, model) else "no"
    try:
        side = tiny.SIDE + 2 * tiny.PATCH
        stock, _, model, _ = built(folder / "other", tower, DECODERS[0], image_side=side)
        sides = f"any; features equal there: {'bit for bit' if same_features(stock, model, side) else 'no'}"
    except ValueError:
        sides = "its own"
    return (
        f"| {tower.name} | `{config.model_type}` | `{tower.example}` | features equal to its own: {equal} | "
        f"{tower_prefix_tokens(config)} | {sides} |"
    )


def table() -> str:
    """The table of docs/guides/build.md."""
    lines = [
        "| Tower | `model_type` | For example | Result | Prefix tokens dropped (tiny) | Image side |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        lines += [tower_row(Path(folder, f"t{i}"), tower) for i, tower in enumerate(TOWERS)]
        lines += [
            "",
            "| Decoder | `model_type` | For example | Result | Prefix reuse |",
            "|---|---|---|---|---|",
        ]
        lines += [decoder_row(Path(folder, f"d{i}"), decoder) for i, decoder in enumerate(DECODERS)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
