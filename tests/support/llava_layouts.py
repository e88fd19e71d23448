"""Tiny LLaVAs, and checkpoints of them in the layouts in which real ones were published."""

import json
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

TEXTS = {
    "llama": tiny.text_config,
    "mistral": lambda **changes: _text(MistralConfig, head_dim=8, sliding_window=4096, **changes),
    "qwen2": lambda **changes: _text(Qwen2Config, **changes),
    "phi3": lambda **changes: _text(
        Phi3Config, sliding_window=2047, original_max_position_embeddings=512, **changes
    ),
}
ARCHITECTURES = {
    "llama": ("LlavaLlamaForCausalLM", "llava_llama"),
    "mistral": ("LlavaMistralForCausalLM", "llava_mistral"),
    "qwen2": ("LlavaQwenForCausalLM", "llava_qwen"),
    "phi3": ("LlavaPhiForCausalLM", "llava_phi"),
}
SIDE = {"height": tiny.SIDE, "width": tiny.SIDE}


def _text(cls, **changes):
    values = tiny.text_config().to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += (
        "num_key_value_heads",
        "max_position_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    return cls(**{**{name: values[name] for name in names}, **changes})


def llava(text: str = "llama", rows: int = 320, tower: str = "clip", seed: int = 0, **changes):
    """A stock LLaVA of tiny parts, fp32, and the id of its placeholder (the last row but ten)."""
    torch.manual_seed(seed)
    strategy = (
        {} if tower == "clip" else {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    )
    config = LlavaConfig(
        vision_config=tiny.TOWERS[tower](),
        text_config=TEXTS[text](vocab_size=rows),
        image_token_index=300,
        **{**strategy, **changes},
    )
    model = LlavaForConditionalGeneration(config).eval()
    tiny.sharpen(model, seed)
    return model


def write_tower(folder: Path, model: LlavaForConditionalGeneration) -> Path:
    """The model's tower as OpenAI's CLIP or Google's SigLIP was published: with the text model, in one file."""
    folder.mkdir(parents=True)
    kind = model.config.vision_config.model_type
    whole, config_class = (
        (CLIPModel, CLIPConfig) if kind == "clip_vision_model" else (SiglipModel, SiglipConfig)
    )
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = config_class(
        text_config={**text, "vocab_size": 40}, vision_config=model.config.vision_config.to_dict()
    )
    pair = whole(config)
    pair.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    state = {name: value.clone().contiguous() for name, value in pair.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(tiny.PATCHES + 1)[None]
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in state
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [whole.__name__]
    config.save_pretrained(folder)
    if kind == "clip_vision_model":
        CLIPImageProcessor(size={"shortest_edge": tiny.SIDE}, crop_size=SIDE).save_pretrained(folder)
    else:
        SiglipImageProcessorPil(size=SIDE).save_pretrained(folder)
    return folder


def language_state(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The language model's weights as a checkpoint of it alone names them."""
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("model.language_model."):
            state["model." + name.removeprefix("model.language_model.")] = value.clone()
        elif name == "lm_head.weight":
            state[name] = value.clone()
    return state


def projector_state(model: LlavaForConditionalGeneration, prefix: str) -> dict[str, torch.Tensor]:
    """The projector as an `nn.Sequential`: 0 and 2 are linear."""
    found = model.model.multi_modal_projector.state_dict()
    layers = {"linear_1": "0", "linear_2": "2"}
    return {f"{prefix}{layers[n.split('.')[0]]}.{n.split('.')[1]}": v.clone() for n, v in found.items()}


def tower_state(model: LlavaForConditionalGeneration, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}vision_model.{n}": v.clone() for n, v in model.model.vision_tower.state_dict().items()}


def original_config(model: LlavaForConditionalGeneration, tower: Path | str, **changes) -> dict:
    """`config.json` as LLaVA's own training wrote it."""
    text = model.config.text_config
    architecture, model_type = ARCHITECTURES[text.model_type]
    values = {
        "_name_or_path": "llava-v1.5-7b",
        "architectures": [architecture],
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "model_type": model_type,
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "use_mm_proj": True,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
    }
    names = (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
        "tie_word_embeddings",
        "head_dim",
        "sliding_window",
        "original_max_position_embeddings",
    )
    own = {name: getattr(text, name) for name in names if hasattr(text, name)}
    return {**own, "rope_theta": 10000.0, "rope_scaling": None, **values, **changes}


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def write_pickled(folder: Path, state: dict[str, torch.Tensor], shards: int = 2) -> None:
    """`pytorch_model-0000i-of-0000n.bin` with their index."""
    names = sorted(state)
    index = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = names[i::shards]
        torch.save({name: state[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": index})


def write_original(
    folder: Path,
    model: LlavaForConditionalGeneration,
    tower: Path | str,
    with_tower: bool = False,
    tokenizer=None,
    **changes,
) -> Path:
    """A whole checkpoint in LLaVA's own layout, as `.bin` shards."""
    folder.mkdir(parents=True)
    state = language_state(model) | projector_state(model, "model.mm_projector.")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if with_tower:
        state |= tower_state(model, "model.vision_tower.vision_tower.")
    write_pickled(folder, state)
    write_json(folder / "config.json", original_config(model, tower, **changes))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096})
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return folder


def write_language_model(folder: Path, model: LlavaForConditionalGeneration, tokenizer=None) -> Path:
    """The language model alone, such as Vicuna, in one safetensors file."""
    folder.mkdir(parents=True)
    save_file(language_state(model), folder / "model.safetensors", metadata={"format": "pt"})
    values = model.config.text_config.to_dict()
    write_json(
        folder / "config.json",
        {**values, "architectures": [f"{values['model_type'].title()}ForCausalLM"], "dtype": "float32"},
    )
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return folder


def write_xtuner(
    folder: Path, model: LlavaForConditionalGeneration, tokenizer=None, with_tower: bool = True
) -> Path:
    """XTuner's layout: the language model, `visual_encoder/` and `projector/`."""
    write_language_model(folder, model, tokenizer)
    vision, text = model.config.vision_config, model.config.text_config
    if with_tower:
        (folder / "visual_encoder").mkdir()
        save_file(
            tower_state(model, ""),
            folder / "visual_encoder" / "model.safetensors",
            metadata={"format": "pt"},
        )
        write_json(
            folder / "visual_encoder" / "config.json",
            {**vision.to_dict(), "architectures": ["CLIPVisionModel"]},
        )
        CLIPImageProcessor(size={"shortest_edge": tiny.SIDE}, crop_size=SIDE).save_pretrained(
            folder / "visual_encoder"
        )
    (folder / "projector").mkdir()
    save_file(
        projector_state(model, "model."),
        folder / "projector" / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(
        folder / "projector" / "config.json",
        {
            "architectures": ["ProjectorModel"],
            "auto_map": {"AutoModel": "modeling_projector.ProjectorModel"},
            "bias": True,
            "depth": 2,
            "hidden_act": "gelu",
            "llm_hidden_size": text.hidden_size,
            "model_type": "projector",
            "visual_hidden_size": vision.hidden_size,
        },
    )
    return folder
