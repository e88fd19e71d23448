"""Estimates for LLaVA-1.5-7B: which finetuning runs fit GPUs of 24, 40 and 80 GB."""

import sys
import tempfile
from collections.abc import Iterable

from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig
from trl import ModelConfig, SFTConfig

from backdrop.modeling.configuration_backdrop import BackdropConfig

from .peak import estimate, meta_model
from .result import CARDS, PARTS


def llava_config() -> BackdropConfig:
    """LLaVA-1.5-7B's shapes: CLIP ViT-L/14 at 336 px and Llama-2-7B with 32,064 tokens."""
    return BackdropConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(vocab_size=32064),
        image_token_id=32000,
        separator_token_ids=[32002, 32003, 32004, 32005],
    )


LORA = ModelConfig(dtype="bfloat16", use_peft=True, lora_r=128, lora_alpha=256, lora_dropout=0.05)
QLORA = ModelConfig(
    dtype="bfloat16",
    use_peft=True,
    lora_r=128,
    lora_alpha=256,
    lora_dropout=0.05,
    load_in_4bit=True,
    use_bnb_nested_quant=True,
)
FULL = ModelConfig(dtype="bfloat16")
IMAGE_TOKENS, TEXT_TOKENS = 576, (200, 1472)
LLAVA_CASES: list[dict] = [
    *(
        {"method": method, "rows": rows, "length": IMAGE_TOKENS + text, "processes": 1, "sharding": "ddp"}
        for method in ("LoRA r=128, bf16", "QLoRA r=128, NF4")
        for text in TEXT_TOKENS
        for rows in (1, 4, 8, 16)
    ),
    *(
        {"method": "full, bf16", "rows": rows, "length": 2048, "processes": n, "sharding": sharding}
        for rows, n, sharding in ((1, 4, "zero2"), (1, 8, "zero2"), (16, 8, "zero3"))
    ),
]
LLAVA_COLUMNS = ["method", "rows", "tokens", *PARTS, "overhead", "total GiB", *(f"{gb} GB" for gb in CARDS)]


def llava_estimates(cases: Iterable[dict] = tuple(LLAVA_CASES)) -> list[dict]:
    """Estimates of LLaVA-1.5-7B finetuning with gradient checkpointing: GiB by part, and the devices that they fit."""
    models: dict[str, tuple[nn.Module, ModelConfig]] = {}
    estimates = []
    for case in cases:
        if case["method"] not in models:
            options = {"Q": QLORA, "L": LORA, "f": FULL}[case["method"][0]]
            trains = ["language_model", "lm_head", "multi_modal_projector"]
            models = {
                case["method"]: (
                    meta_model(llava_config(), options, trains, ["multi_modal_projector"]),
                    options,
                )
            }
        model, options = models[case["method"]]
        with tempfile.TemporaryDirectory() as folder:
            training = SFTConfig(
                output_dir=folder,
                use_cpu=True,  # transformers refuses bf16 without a GPU otherwise; the estimate is for a GPU
                bf16=True,
                per_device_train_batch_size=case["rows"],
                max_length=None,
                report_to="none",
            )
            found = estimate(
                model,
                training,
                options,
                sequence_length=case["length"],
                processes=case["processes"],
                sharding=case["sharding"],
            )
        sizes = {part["part"]: round(part["gib"], 2) for part in found.table()}
        fits = {f"{gb} GB": found.fits(gib) for gb, gib in CARDS.items()}
        estimates.append({**case, **sizes, "phase": found.phase, "fits": fits})
        print(*llava_cells(estimates[-1]), sep="  ", file=sys.stderr, flush=True)
    return estimates


def llava_cells(found: dict) -> list[str]:
    """One result of `llava_estimates` as the cells of a table (`LLAVA_COLUMNS`)."""
    sharing = f" ({found['processes']} x {found['sharding']})" if found["processes"] > 1 else ""
    sizes = [f"{found[part]:.1f}" for part in (*PARTS, "overhead", "total")]
    fits = ["yes" if ok else "no" for ok in found["fits"].values()]
    return [found["method"] + sharing, str(found["rows"]), str(found["length"]), *sizes, *fits]
