"""Every kind of adapter that the installed peft offers, on a tiny model, as rows for the matrix that holds contract 7.

A kind that is new in peft stands neither in `EXTRA` nor in `WITHOUT_MEANING` and is tried with its defaults.
"""

import inspect

import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

LAYERS = r".*language_model\.layers.*\.(q_proj|v_proj)"
# Options without which a kind does not fit layers of 32 features.
EXTRA = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 16},
    "WAVEFT": {"n_frequency": 50},
}
WITHOUT_MEANING = {
    "ADAMSS": "needs scikit-learn",
    "ADAPTION_PROMPT": "takes only model types that peft lists",
    "MULTITASK_PROMPT_TUNING": "needs task ids, which LLaVA's generate does not take",
    "POLY": "needs task ids, which LLaVA's generate does not take",
    "SHADOW": "takes only configurations of text models",
    "XLORA": "takes only configurations of text models",
}
KINDS = sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - set(WITHOUT_MEANING))


def with_adapter(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    """A peft model around `model` whose adapter changes its answers."""
    config_class = next(cls for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if name.value == kind)
    fields = inspect.signature(config_class).parameters
    defaults = {"task_type": "CAUSAL_LM", "target_modules": LAYERS, "num_virtual_tokens": 4}
    options = {name: value for name, value in defaults.items() if name in fields} | EXTRA.get(kind, {})
    torch.manual_seed(3)
    found = get_peft_model(model, config_class(**options)).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return found
