"""Arguments of the processors: taken, or refused by name; images for each prompt, or one flat list dealt out in order."""

import pytest
import tiny
import torch
from red_square import scene
from transformers import pipeline
from transformers.utils import logging as transformers_logging

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.processing_backdrop import BackdropProcessor

CHAT = [{"role": "user", "content": [{"type": "image", "image": scene()}, {"type": "text", "text": "what?"}]}]
TOKENIZED = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


def calls(processor, folder):
    """Every public way in, as functions of keyword arguments."""
    images = processor.image_processor
    processor.save_pretrained(folder)
    model = processor.image_processor.model_images([scene()])
    return {
        "processor": lambda **k: processor(images=scene(), text="<image> is", **k),
        "images_kwargs": lambda **k: processor(images=scene(), text="<image> is", images_kwargs=k),
        "text_kwargs": lambda **k: processor(images=scene(), text="<image> is", text_kwargs=k),
        "text alone": lambda **k: processor(text="is", **k),
        "construction of the processor": lambda **k: BackdropProcessor(images, processor.tokenizer, **k),
        "template": lambda **k: processor.apply_chat_template(CHAT, **k),
        "template, tokenized": lambda **k: processor.apply_chat_template(CHAT, **TOKENIZED, **k),
        "template, for the processor": lambda **k: processor.apply_chat_template(
            CHAT, **TOKENIZED, processor_kwargs=k
        ),
        "image processor": lambda **k: images(scene(), **k),
        "preprocess": lambda **k: images.preprocess(scene(), **k),
        "groups": lambda **k: images.image_groups([scene()], **k),
        "model images": lambda **k: images.model_images([scene()], **k),
        "detections": lambda **k: images.detections(model, **k),
        "geometry": lambda **k: images.geometry(**k),
        "detector": lambda **k: images.load_detector(**k),
        "construction": lambda **k: BackdropImageProcessor(**k),
        "loading": lambda **k: BackdropImageProcessor.from_pretrained(folder, **k),
    }


def test_what_nobody_takes_is_refused_by_name_everywhere(processor, tmp_path):
    for name, call in calls(processor, tmp_path).items():
        with pytest.raises(TypeError, match="'margn'"):
            pytest.fail(f"{name}: {call(margn=2)}")


def test_an_option_is_taken_everywhere(processor, tmp_path):
    for name, call in calls(processor, tmp_path).items():
        if name not in ("text_kwargs", "construction of the processor"):
            call(margin=0)


@pytest.mark.parametrize("argument", ["videos", "audio", "videos_kwargs", "audio_kwargs"])
def test_other_modalities_are_refused(processor, argument):
    values = {"videos_kwargs": {"fps": 1}, "audio_kwargs": {"sampling_rate": 8}}
    with pytest.raises(TypeError, match=f"'{argument}'; it takes images and text"):
        processor(images=scene(), text="<image> is", **{argument: values.get(argument, [scene()])})
    processor(images=scene(), text="<image> is", **{argument: {} if argument in values else None})


def test_what_templates_trainers_and_pipelines_send_is_taken(processor):
    processor.chat_template += "{%- if loud %}{{- '!' }}{%- endif %}"
    assert processor.apply_chat_template(CHAT, loud=True).endswith("!")
    processor.apply_chat_template(CHAT, tools=None, documents=None, **TOKENIZED)
    processor.apply_chat_template(
        CHAT, padding=True, processor_kwargs={"return_tensors": "pt"}, tokenize=True
    )
    other = "{{- messages[0]['content'][1]['text'] + quiet }}"
    assert processor.apply_chat_template(CHAT, chat_template=other, quiet="...") == "what?..."
    for options in (
        {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"},
        {"truncation": True, "max_length": 99, "pad_to_multiple_of": 8, "return_offsets_mapping": True},
        {
            "return_mm_token_type_ids": True,
            "text_kwargs": {"padding": True},
            "images_kwargs": {"split": False},
        },
        {"common_kwargs": {"return_tensors": "pt"}},
    ):
        processor(images=[scene()], text=["<image> is"], **options)


def test_loading_passes_each_argument_to_its_part(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    found = BackdropProcessor.from_pretrained(
        tmp_path, margin=2, padding_side="right", use_separators=False, revision="main", local_files_only=True
    )
    assert (found.image_processor.margin, found.tokenizer.padding_side) == (2, "right")
    assert not found.use_separators


def test_a_pipeline_refuses_by_name_too(processor):
    torch.manual_seed(0)
    config = tiny.backdrop_config(
        image_token_id=processor.image_token_id,
        separator_token_ids=processor.separator_token_ids,
        text_config=tiny.text_config(vocab_size=len(processor.tokenizer)),
    )
    model = BackdropForConditionalGeneration(config).eval()
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    assert pipe(text=CHAT, max_new_tokens=2, margin=0)
    for name in ("margn", "tempreature"):
        with pytest.raises(TypeError, match=f"'{name}'"):
            pipe(text=CHAT, max_new_tokens=2, **{name: 1})
        with pytest.raises(TypeError, match=f"'{name}'"):
            pipe(images=scene(), text="<image> is", max_new_tokens=2, **{name: 1})
    with pytest.raises(ValueError, match="tempreature"):
        pipe(text=CHAT, generate_kwargs={"tempreature": 1})
    banned = list(range(3, 250))
    answer = pipe(
        text=CHAT, max_new_tokens=4, generate_kwargs={"suppress_tokens": banned}, return_tensors=True
    )
    new = answer[0]["generated_token_ids"][-4:]
    assert not set(new) & {*banned, *processor.separator_token_ids}


def test_options_of_generate_and_variables_of_other_templates_are_told_of(processor, caplog):
    """With LLaVA such calls answer; they are no misspellings."""
    transformers_logging.warning_once.cache_clear()
    transformers_logging.enable_propagation()
    try:
        plain = processor.apply_chat_template(CHAT, **TOKENIZED)
        found = processor.apply_chat_template(CHAT, **TOKENIZED, do_sample=False, enable_thinking=True)
        assert torch.equal(found["input_ids"], plain["input_ids"])
        processor(images=scene(), text="<image> is", temperature=0.5)
        said = "\n".join(record.message for record in caplog.records)
    finally:
        transformers_logging.disable_propagation()
    assert "do_sample is an option of generate" in said and "temperature is an option of generate" in said
    assert "no variable enable_thinking" in said


# ---- images and prompts


def rows_of(processor, images, texts):
    out = processor(images=images, text=texts, padding=True, return_tensors="pt", split=False)
    return (out["input_ids"] == processor.image_token_id).sum(-1).tolist(), out["pixel_values"]


def test_a_flat_list_is_dealt_out_by_placeholders(processor):
    pictures = [scene(0, 0), scene(14, 0), scene(28, 14)]
    texts = ["<image><image> two", "none", "<image> one"]
    counts, pixels = rows_of(processor, pictures, texts)
    nested_counts, nested = rows_of(processor, [pictures[:2], [], pictures[2:]], texts)
    assert counts == nested_counts == [32, 0, 16]
    assert torch.equal(pixels, nested)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 2), "Prompt 0 has 2 <image> placeholders, and its list has 1 images"),
        ((2, 0), "Prompt 1 has 1 <image> placeholders, and its list has 0 images"),
        ((3, 0), "Prompt 0 has 2 <image> placeholders, and its list has 3 images"),
        ((3,), "images are 1 lists for 2 prompts"),
        ((2, 1, 0), "images are 3 lists for 2 prompts"),
    ],
    ids=str,
)
def test_lists_that_do_not_fit_their_prompts_name_the_prompt(processor, sizes, message):
    pictures = iter([scene()] * 9)
    images = [[next(pictures) for _ in range(size)] for size in sizes]
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=["<image><image> two", "<image> one"])


def test_a_flat_list_of_another_length_names_the_prompts(processor):
    with pytest.raises(
        ValueError, match=r"3 <image> placeholders for 2 images; wanted one each \(2, 1 by prompt\)"
    ):
        processor(images=[scene()] * 2, text=["<image><image> two", "<image> one"])
