"""Conversion of the layouts in which LLaVAs were published beside transformers' own: equal to the model it came from."""

import json
import os

import llava_layouts as layouts
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from backdrop.hub_export.convert import convert

LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' }}"
    "{{ message['content'] | trim + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)


def chat_tokenizer():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = LLAMA3
    return tokenizer


def assert_same(llava, model, processor, pad: bool = True) -> None:
    """Logits of an image and a text, and the pixels: those of the stock model made from the same parts."""
    image, text = tiny.photo(90, 70), "USER: <image>\nwhat is shown? ASSISTANT:"
    ours = processor(images=image, text=text, split=False, return_tensors="pt")
    stock = LlavaImageProcessorPil(size={"shortest_edge": tiny.SIDE}, crop_size=layouts.SIDE, do_pad=pad)(
        image, return_tensors="pt"
    )
    assert torch.equal(ours["pixel_values"], stock["pixel_values"])
    assert model.config.image_token_id == llava.config.image_token_id
    with torch.no_grad():
        theirs = llava(input_ids=ours["input_ids"], pixel_values=stock["pixel_values"]).logits
        assert torch.equal(model(**ours).logits, theirs)
    new = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        model.generate(**ours, **new),
        llava.generate(input_ids=ours["input_ids"], pixel_values=stock["pixel_values"], **new),
    )


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2", "phi3"])  # mistral: BakLLaVA; phi3: LLaVA++
@pytest.mark.parametrize("with_tower", [False, True])
def test_a_whole_checkpoint(tmp_path, text, with_tower):
    llava = layouts.llava(text)
    # A tower that was trained lies in the checkpoint, and the one that the configuration names is another.
    other = layouts.llava(text, seed=1) if with_tower else llava
    tower = layouts.write_tower(tmp_path / "clip", other)
    source = layouts.write_original(tmp_path / "llava", llava, tower, with_tower)
    model, processor = convert(source, separators=False)
    assert_same(llava, model, processor)
    assert "'USER'" in processor.chat_template
    assert model.generation_config.max_length == 4096
    assert not [name for name, value in model.named_parameters() if value.is_meta]


def test_the_converted_model_is_saved_whole_and_loads_again(tmp_path):
    llava = layouts.llava()
    tower = layouts.write_tower(tmp_path / "clip", llava)
    source = layouts.write_original(tmp_path / "llava", llava, tower, image_aspect_ratio="square")
    model, processor = convert(source, num_prefusion_layers=1)
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [name for name in config["text_config"] if name.startswith("mm_")]
    plain, processor = convert(source, separators=False)
    assert_same(llava, plain, processor, pad=False)


def test_the_old_name_of_the_model_type_is_known_too(tmp_path):
    """Until 2024 the original's own type was `llava`, which is transformers' today."""
    llava = layouts.llava()
    tower = layouts.write_tower(tmp_path / "clip", llava)
    source = layouts.write_original(tmp_path / "llava", llava, tower, model_type="llava")
    assert_same(llava, *convert(source, separators=False))


def test_a_tower_can_be_named(tmp_path):
    llava = layouts.llava()
    tower = layouts.write_tower(tmp_path / "clip", llava)
    source = layouts.write_original(tmp_path / "llava", llava, "/mnt/somewhere/clip")
    assert_same(llava, *convert(source, tower=tower, separators=False))


def lora_of(llava, folder, base):
    """What LLaVA's training with LoRA leaves: an adapter as .bin, the projector beside it, the configuration."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    language = AutoModelForCausalLM.from_pretrained(base)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(language, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return adapted.merge_and_unload()


def lora_checkpoint(tmp_path):
    llava = layouts.llava()
    tower = layouts.write_tower(tmp_path / "clip", llava)
    base = layouts.write_language_model(tmp_path / "vicuna", llava)
    source = tmp_path / "lora"
    merged = lora_of(llava, source, base)
    llava.model.language_model.load_state_dict(merged.model.state_dict())
    torch.save(
        layouts.projector_state(llava, "base_model.model.model.mm_projector."),
        source / "non_lora_trainables.bin",
    )
    layouts.write_json(
        source / "config.json", layouts.original_config(llava, tower, architectures=["LlamaForCausalLM"])
    )
    return llava, base, source


def test_a_lora_checkpoint(tmp_path):
    llava, base, source = lora_checkpoint(tmp_path)
    assert_same(llava, *convert(source, base=base, separators=False))
    with pytest.raises(ValueError, match=r"is an adapter; wanted the language model .* as base \(--base\)"):
        convert(source)


def test_what_lora_leaves_over_is_named(tmp_path):
    _, base, source = lora_checkpoint(tmp_path)
    adapter = torch.load(source / "adapter_model.bin", weights_only=True)
    name = next(name for name in adapter if "layers.1.mlp.up_proj.lora_A" in name)
    torch.save({n: v for n, v in adapter.items() if n != name}, source / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"missing \(base_model\.model\.model\.layers\.1\.mlp\.up_proj\.lora_A"
    ):
        convert(source, base=base)
    torch.save(adapter, source / "adapter_model.bin")
    beside = torch.load(source / "non_lora_trainables.bin", weights_only=True)
    torch.save({**beside, "base_model.model.model.extra": torch.ones(2)}, source / "non_lora_trainables.bin")
    with pytest.raises(ValueError, match=r"1 left over \(model\.extra\)"):
        convert(source, base=base)


def test_a_projector_alone(tmp_path):
    llava = layouts.llava()
    tower = layouts.write_tower(tmp_path / "clip", llava)
    base = layouts.write_language_model(tmp_path / "vicuna", llava)
    source = tmp_path / "pretrain"
    layouts.write_json(source / "config.json", layouts.original_config(llava, tower))
    torch.save(layouts.projector_state(llava, "model.mm_projector."), source / "mm_projector.bin")
    assert_same(llava, *convert(source, base=base, separators=False))
    with pytest.raises(ValueError, match=r"is a projector alone; wanted the language model"):
        convert(source)


class Trap:
    """Runs a command where a pickle of it is loaded without care."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin"])
def test_pickles_are_not_run(tmp_path, name):
    llava, base, source = lora_checkpoint(tmp_path)
    if name == "mm_projector.bin":
        (source / "adapter_config.json").unlink()
    torch.save({"model.mm_projector.0.weight": Trap(tmp_path / "trapped")}, source / name)
    with pytest.raises(Exception, match=r"(?i)weights_only|weights only"):
        convert(source, base=base)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("text", ["llama", "phi3"])  # llava-llama-3 and llava-phi-3
def test_xtuners_layout(tmp_path, text):
    llava = layouts.llava(text)
    source = layouts.write_xtuner(tmp_path / "xtuner", llava, chat_tokenizer())
    model, processor = convert(source, separators=False)
    assert_same(llava, model, processor)
    # The language model's template is kept.
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "<s><|start|>user<|end|>\n\n<image>\nwhat?</s><|start|>assistant<|end|>\n\n"


@pytest.mark.parametrize("text", ["llama", "phi3"])
def test_xtuners_model_in_the_originals_layout(tmp_path, text):
    """`llava-llama-3-8b-v1_1-hf`, `llava-phi-3-mini-hf`'s sources: one checkpoint with the tuned tower in it."""
    llava = layouts.llava(text)
    tower = layouts.write_tower(tmp_path / "clip", layouts.llava(text, seed=3))
    source = layouts.write_original(
        tmp_path / "hf",
        llava,
        tower,
        True,
        chat_tokenizer(),
        model_type="llava",
        unfreeze_mm_vision_tower=True,
    )
    model, processor = convert(source, separators=False)
    assert_same(llava, model, processor)
    assert "<|start|>" in processor.chat_template


def test_xtuners_parts_that_lie_elsewhere(tmp_path):
    llava = layouts.llava()
    tower = layouts.write_tower(tmp_path / "clip", llava)
    source = layouts.write_xtuner(tmp_path / "xtuner", llava, with_tower=False)
    with pytest.raises(ValueError, match=r"holds no visual_encoder.*\(--tower\)"):
        convert(source)
    assert_same(llava, *convert(source, tower=tower, separators=False))
    base = layouts.write_language_model(tmp_path / "llama", llava)
    adapters = tmp_path / "adapters"
    layouts.write_xtuner(adapters, llava)
    (adapters / "config.json").unlink()
    (adapters / "model.safetensors").unlink()
    merged = lora_of(llava, adapters / "llm_adapter", base)
    llava.model.language_model.load_state_dict(merged.model.state_dict())
    with pytest.raises(ValueError, match=r"holds no language model; wanted the one .* \(--base\)"):
        convert(adapters)
    assert_same(llava, *convert(adapters, base=base, separators=False))


def test_a_tower_that_xtuner_trained_with_lora(tmp_path):
    """The adapter's names are from before transformers 5, when towers were one module deeper."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionModel

    llava = layouts.llava()
    tower = layouts.write_tower(tmp_path / "clip", llava)
    source = layouts.write_xtuner(tmp_path / "xtuner", llava)
    folder = source / "visual_encoder_adapter"
    names = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    adapted = get_peft_model(
        CLIPVisionModel.from_pretrained(source / "visual_encoder"),
        LoraConfig(r=4, lora_alpha=8, target_modules=names),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    start = "base_model.model."
    state = {
        f"{start}vision_model.{name.removeprefix(start).removeprefix('vision_model.')}": value
        for name, value in load_file(path).items()
    }
    save_file(state, path)
    llava.model.vision_tower.load_state_dict(adapted.merge_and_unload().state_dict())
    (source / "visual_encoder" / "config.json").unlink()
    assert_same(llava, *convert(source, tower=tower, separators=False))


@pytest.mark.parametrize(
    ("text", "tower"), [("llama", "clip"), ("mistral", "clip"), ("phi3", "clip"), ("qwen2", "siglip")]
)
def test_transformers_layout_of_every_family(tmp_path, text, tower):
    """llava-hf's and xtuner's: BakLLaVA, llava-llama-3, llava-phi-3, llava-interleave-qwen (SigLIP, last layer)."""
    llava = layouts.llava(text, tower=tower)
    llava.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    old = {
        f"vision_tower.vision_model.{n.removeprefix('model.vision_tower.vision_model.').removeprefix('model.vision_tower.')}"
        if "vision_tower" in n
        else n.replace("model.language_model.", "language_model.model.")
        .replace("model.multi_modal_projector.", "multi_modal_projector.")
        .replace("lm_head.", "language_model.lm_head."): v
        for n, v in (
            (n if n.startswith(("model.", "lm_head")) else f"model.{n}", v)
            for n, v in llava.state_dict().items()
        )
    }
    assert len(old) == len(state)
    save_file({n: v.contiguous() for n, v in old.items()}, path, metadata={"format": "pt"})
    layouts.write_tower(tmp_path / "tower", llava)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    stock = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": tiny.SIDE}, crop_size=layouts.SIDE, do_pad=True),
        tokenizer,
    )
    stock.save_pretrained(tmp_path)
    model, processor = convert(tmp_path, separators=False)
    assert_same(llava, model, processor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio 'anyres_max_9'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'spatial_unpad'"),
        ({"s2": True}, "s2 True"),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type 'perceiver'"),
        ({"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_mpt"}, "LlavaMptForCausalLM"),
        ({"mm_vision_tower": None}, "no mm_vision_tower"),
    ],
)
def test_what_has_no_form_here_is_refused_by_name(tmp_path, changes, message):
    llava = layouts.llava()
    source = layouts.write_original(tmp_path / "llava", llava, tmp_path / "clip", **changes)
    with pytest.raises(ValueError, match=message):
        convert(source)


def test_missing_and_left_over_weights_are_named(tmp_path):
    llava = layouts.llava()
    tower = layouts.write_tower(tmp_path / "clip", llava)
    source = layouts.write_original(tmp_path / "llava", llava, tower)
    state = layouts.language_state(llava) | layouts.projector_state(llava, "model.mm_projector.")
    for change, message in (
        ({"model.layers.1.mlp.up_proj.weight": None}, r"missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
        ({"model.mm_projector.2.bias": None}, r"the projector.*missing \(linear_2\.bias\)"),
        ({"model.image_newline": torch.ones(3)}, r"left over \(model\.image_newline\)"),
        ({"model.mm_projector.4.bias": torch.ones(3)}, r"left over \(4\.bias\)"),
    ):
        layouts.write_pickled(source, {n: v for n, v in (state | change).items() if v is not None})
        with pytest.raises(ValueError, match=message):
            convert(source)
    layouts.write_pickled(source, state)
    weights = load_file(tower / "model.safetensors")
    del weights["vision_model.encoder.layers.1.layer_norm2.bias"]
    weights["vision_model.encoder.extra"] = torch.ones(2)
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"missing \(.*layers\.1\.layer_norm2\.bias\); 1 left over \(.*extra\)"
    ):
        convert(source)


def test_a_base_is_refused_where_it_has_no_place(tmp_path):
    llava = layouts.llava()
    tower = layouts.write_tower(tmp_path / "clip", llava)
    source = layouts.write_original(tmp_path / "llava", llava, tower)
    with pytest.raises(ValueError, match=r"is a whole checkpoint; wanted no base model"):
        convert(source, base=tower)
