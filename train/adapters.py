"""LoRA on the language model: which modules it adapts, and what trains whole beside it."""

import re

from peft import LoraConfig
from torch import nn
from trl import ModelConfig

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration

# The language model's layers only: bare names such as q_proj would match in the tower and in prefusion too.
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
# Modules that a model may lack: naming one in `lora_also_trains` is no mistake.
OPTIONAL_MODULES = {"prefusion", "object_vision_tower", "object_multi_modal_projector"}


def checked_lora_config(
    model: BackdropForConditionalGeneration, options: ModelConfig, also_trains: list[str]
) -> LoraConfig:
    """`lora_config`, after a check that the model has the modules which the recipe names.

    Raises:
        ValueError: a target or a module to train that the model does not have.
    """
    missing = [name for name in also_trains if not hasattr(model.model, name)]
    unknown = sorted(set(missing) - OPTIONAL_MODULES)
    if unknown:
        raise ValueError(f"lora_also_trains: the model has no module {unknown}.")
    check_lora_targets(model, options.lora_target_modules)
    return lora_config(model, options, [name for name in also_trains if name not in missing])


def lora_config(
    model: BackdropForConditionalGeneration, options: ModelConfig, also_trains: list[str]
) -> LoraConfig:
    """LoRA on the language model; the separators' embedding rows and the modules in `also_trains` train beside it."""
    separators = model.config.separator_token_ids
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        target_modules=options.lora_target_modules or LORA_TARGETS,
        modules_to_save=also_trains or None,
        trainable_token_indices={"embed_tokens": separators} if separators else None,
        task_type="CAUSAL_LM",
    )


def check_lora_targets(model: BackdropForConditionalGeneration, targets: list[str] | str | None) -> None:
    """Refuses targets that match no module, of which peft passes over one as long as another matches.

    Args:
        targets: names that module names end in, or a regular expression over whole names; None and "all-linear" pass.
    """
    names = [name for name, _ in model.named_modules()]
    if targets is None or targets == "all-linear":
        return
    if isinstance(targets, str):
        matched = any(re.fullmatch(targets, name) or name.endswith(f".{targets}") for name in names)
        unmatched = [] if matched else [targets]
    else:
        unmatched = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    if unmatched:
        raise ValueError(
            f"lora_target_modules: {unmatched} matches no module; wanted names such as q_proj or a regular expression."
        )


def give_head_a_bias(model: nn.Module) -> None:
    """Sets the head's bias to None where it has no such attribute; TRL's loss reads it.

    Where some embedding rows train and the head is tied to them, peft wraps the head and passes on its weight but not its
    bias.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None
