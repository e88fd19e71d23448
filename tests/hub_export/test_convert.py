"""LLaVA checkpoints in every layout, through processor, template and pipeline."""

import json

import pytest
import tiny
import torch
from chat_templates import FAMILIES, LLAVA_HF
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, pipeline
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from backdrop.hub_export.convert import convert
from backdrop.hub_export.export import export
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import SEPARATOR_TOKENS, BackdropProcessor


def llava_parts(rows: int):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tiny.TOWERS["clip"](),
        text_config=tiny.text_config(vocab_size=rows),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config).eval()
    tiny.sharpen(model, 0)
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    image_processor = LlavaImageProcessorPil(size={"shortest_edge": tiny.SIDE}, crop_size=side)
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=tiny.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, processor


def old_name(name: str) -> str:
    """Layout of llava-hf checkpoints before transformers 4.52."""
    for now, then in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(now):
            return then + name.removeprefix(now)
    raise AssertionError(name)


LAYOUTS = {
    "old": old_name,
    "new": lambda name: name.replace("model.vision_tower.", "model.vision_tower.vision_model."),
    "newest": lambda name: name,
    "as transformers saves it": None,
}


def write_llava(folder, layout: str, rows: int = 320, shards: int = 2):
    model, processor = llava_parts(rows)
    model.save_pretrained(folder, max_shard_size="60KB")
    processor.save_pretrained(folder)
    if LAYOUTS[layout] is not None:
        for path in folder.glob("model*"):
            path.unlink()
        state = {LAYOUTS[layout](name): value.clone() for name, value in model.state_dict().items()}
        if layout == "old":
            state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        names = sorted(state)
        parts = [names[i::shards] for i in range(shards)]
        index = {}
        for i, part in enumerate(parts):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
    return model, processor


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_checkpoint_computes_what_llava_computes(tmp_path, layout):
    llava, llava_processor = write_llava(tmp_path, layout)
    model, processor = convert(tmp_path, separators=False)
    text, image = "USER: <image>\nwhat is shown? ASSISTANT:", tiny.photo(90, 70)
    theirs = llava_processor(images=image, text=text, return_tensors="pt")
    ours = processor(images=image, text=text, split=False, return_tensors="pt")
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    with torch.no_grad():
        assert torch.equal(model.eval()(**ours).logits, llava(**theirs).logits)
    new = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**ours, **new), llava.generate(**theirs, **new))


@pytest.mark.parametrize(("rows", "exact"), [(320, True), (301, False)])
def test_with_separators_the_shared_logits_stay(tmp_path, rows, exact):
    llava, llava_processor = write_llava(tmp_path, "old", rows=rows)
    model, processor = convert(tmp_path, num_prefusion_layers=2, separate_vision_towers=True)
    inputs = llava_processor(images=tiny.photo(), text="<image> is", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = model.eval()(**inputs).logits, llava(**inputs).logits
    kept = min(rows, 301)
    torch.testing.assert_close(ours[..., :kept], theirs[..., :kept], atol=0 if exact else 1e-5, rtol=0)
    assert len(processor.tokenizer) <= model.get_input_embeddings().weight.shape[0]


def test_separators_start_from_the_words_that_describe_them(tmp_path):
    write_llava(tmp_path, "old", rows=301)
    model, processor = convert(tmp_path)
    words = processor.tokenizer("start of the background", add_special_tokens=False).input_ids
    row = processor.tokenizer.convert_tokens_to_ids(SEPARATOR_TOKENS[0])
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        torch.testing.assert_close(table[row], table[words].mean(0))


def test_converted_and_saved_it_loads_again_bit_for_bit(tmp_path):
    write_llava(tmp_path / "llava", "old") if (tmp_path / "llava").mkdir() is None else None
    model, processor = convert(tmp_path / "llava", num_prefusion_layers=1)
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    again = BackdropForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())
    assert any("model.language_model" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert BackdropProcessor.from_pretrained(tmp_path / "out").chat_template == processor.chat_template


def test_missing_and_left_over_weights_are_named(tmp_path):
    write_llava(tmp_path, "old", shards=1)
    path = next(tmp_path.glob("model-*.safetensors"))
    state = load_file(path)
    del state["language_model.model.layers.1.mlp.up_proj.weight"]
    state["image_newline"] = torch.zeros(3)
    save_file(state, path, metadata={"format": "pt"})
    index = dict.fromkeys(state, path.name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight.*image_newline"):
        convert(tmp_path)


def test_other_architectures_are_refused_by_name(tmp_path):
    config = {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a 'llava_next' model; wanted 'llava'"):
        convert(tmp_path)
    _, processor = write_llava(tmp_path, "old")
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"] = {"model_type": "pixtral"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vision_config.model_type is 'pixtral'"):
        convert(tmp_path)


def test_an_image_processor_of_another_size_is_refused(tmp_path):
    write_llava(tmp_path, "old")
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["crop_size"] = {"height": 70, "width": 70}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="gives 70 x 70 images, but its tower takes 56 x 56"):
        convert(tmp_path)


def test_the_pipeline_gives_the_same_for_an_image_and_its_groups(processor, chat_model):
    from red_square import groups_of, scene

    pipe = pipeline("image-text-to-text", model=chat_model, processor=processor)

    def ask(images):
        content = [{"type": "image", "image": image} for image in images] + [
            {"type": "text", "text": "what?"}
        ]
        return pipe(
            text=[{"role": "user", "content": content}],
            max_new_tokens=5,
            generate_kwargs={"do_sample": False},
        )[0]

    image = scene(14, 14)
    one, two = ask([image]), ask(groups_of(processor.image_processor, image))
    assert one["generated_text"][-1] == two["generated_text"][-1]


@pytest.mark.parametrize(
    "own", [{}, {"do_pad": True}, {"size": {"height": 56, "width": 56}, "do_center_crop": False}]
)
@pytest.mark.parametrize("fit", [None, "crop", "pad", "stretch"])
def test_the_fit_is_the_checkpoints_own_or_the_one_asked_for(tmp_path, own, fit):
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    theirs = {"size": {"shortest_edge": tiny.SIDE}, "crop_size": side, **own}
    write_llava(tmp_path / "llava", "newest")
    image_processor = LlavaImageProcessorPil(**theirs)
    loaded = LlavaProcessor.from_pretrained(tmp_path / "llava")
    loaded.image_processor = image_processor
    loaded.save_pretrained(tmp_path / "llava")
    model, processor = convert(tmp_path / "llava", fit=fit)
    checkpoints = "pad" if own.get("do_pad") else "stretch" if own else "crop"
    assert processor.image_processor.fit == (fit or checkpoints)
    image = tiny.photo(90, 50)
    if fit in (None, checkpoints):
        wanted = image_processor(image, return_tensors="pt")["pixel_values"]
        found = processor.image_processor(image, split=False, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, wanted)
    processor.image_processor.own_padding = False
    export(model, processor, tmp_path / "out")
    again = BackdropProcessor.from_pretrained(tmp_path / "out").image_processor
    assert (again.fit, again.own_padding) == (fit or checkpoints, False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`fit='{fit or checkpoints}'`" in card
    assert ("own_padding=False" in card) == (again.fit == "pad")


def write_with_template(folder, template, tokens=()):
    model, processor = llava_parts(340)
    processor.tokenizer.add_tokens(list(tokens), special_tokens=True)
    processor.chat_template = template
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def prompt_of(processor, images=1):
    content = [{"type": "image"}] * images + [{"type": "text", "text": "what?"}]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def test_the_checkpoints_chat_template_is_kept(tmp_path):
    source, tokens, _, _ = FAMILIES["llama 3"]
    write_with_template(tmp_path / "llava", source, tokens)
    _, processor = convert(tmp_path / "llava")
    assert prompt_of(processor, 2).endswith(
        "<|start_header_id|>user<|end_header_id|>\n\n<image><image>\nwhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    _, processor = convert(tmp_path / "llava", system_prompt="Be brief.")
    assert "December 2023\n\nBe brief.<|eot_id|>" in prompt_of(processor)
    _, processor = convert(tmp_path / "llava", template=FAMILIES["mistral"][0])
    assert prompt_of(processor) == "<s>[INST] <image>\nwhat? [/INST]"


def test_llavas_own_template_gets_the_system_prompt_it_was_trained_with(tmp_path):
    write_with_template(tmp_path / "llava", LLAVA_HF)
    _, processor = convert(tmp_path / "llava")
    assert prompt_of(processor).startswith(
        "<s>A chat between a curious user"
    ) and "USER: <image>\nwhat? ASSISTANT:" in prompt_of(processor)


def test_a_template_without_marks_is_named(tmp_path, caplog):
    write_with_template(
        tmp_path / "llava", "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    convert(tmp_path / "llava")
    assert "assistant_only_loss is off" in caplog.text
