"""Shapes of LLaVA that benchmarks build with random weights, and the prompt they are asked.

`S` image side, `p` patch side, `P` patches.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from backdrop.hub_export.chat_template import VICUNA_SYSTEM_PROMPT
from backdrop.processing.processing_backdrop import IMAGE_TOKEN, BackdropProcessor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUESTION = "How many people are waiting near the entrance, and what is the closest one holding right now?"
PROMPT = f"<s>{VICUNA_SYSTEM_PROMPT} USER: {IMAGE_TOKEN}\n{QUESTION} ASSISTANT:"


@lru_cache(maxsize=1)
def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the prompt: about one token a word, as a real tokenizer gives. No file, no network."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([PROMPT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    BackdropProcessor.add_tokens(tokenizer)
    return tokenizer


@dataclass(frozen=True)
class Shape:
    """Sizes of tower and language model, and the source images `(width, height)` that they are fed."""

    vision: dict
    text: dict
    source: tuple[int, int]

    def llava_config(self, attention: str | None = None) -> LlavaConfig:
        """LLaVA's configuration; the placeholder's id is the benchmark tokenizer's."""
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**self.vision),
            text_config=LlamaConfig(
                max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, **self.text
            ),
            image_token_index=build_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN),
            tie_word_embeddings=self.text.get("tie_word_embeddings", False),
            attn_implementation=attention,
        )

    @property
    def grid(self) -> int:
        """Patches along a side; `P` is its square."""
        return self.vision["image_size"] // self.vision["patch_size"]


_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# Every source is 1 / 0.7 of the model's side high, so that resizing is paid and patches map to whole pixels.
SHAPES = {
    "tiny": Shape(
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        text={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
        },
        source=(100, 80),
    ),
    "clip-l+135m": Shape(
        vision=_CLIP_L,
        text={  # SmolLM2-135M
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        source=(640, 480),
    ),
    # The layers of LLaVA-1.5-7B at a width that costs nothing: what is left is what surrounds them.
    "host-7b": Shape(
        vision={**_CLIP_L, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4},
        text={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 512,
        },
        source=(640, 480),
    ),
    "llava-1.5-7b": Shape(
        vision=_CLIP_L,
        text={
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
        },
        source=(640, 480),
    ),
}


def needed_bytes(shape: Shape, dtype: torch.dtype, batch: int) -> int:
    """Bytes that a run needs, roughly: the weights, and a batch's keys and values three times (cached, joined, in use)."""
    with torch.device("meta"):
        parameters = LlavaForConditionalGeneration(shape.llava_config()).num_parameters()
    text = LlamaConfig(**shape.text)
    positions = 2 * shape.grid**2 + 100  # at most: background and fresh patches, and the text
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * positions * batch
    return round((1.1 * parameters + 3 * cache) * dtype.itemsize)
