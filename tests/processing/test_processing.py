"""Images and text to the model's inputs: placeholders, separators, chat template, saving."""

import sys

import pytest
import tiny
import torch
from red_square import groups_of, scene

from backdrop.processing.patch_groups_backdrop import BACKGROUND, OBJECT
from backdrop.processing.processing_backdrop import SEPARATOR_TOKENS, BackdropProcessor


def test_inside_vllm_an_ordinary_image_is_one_group(processor, monkeypatch):
    text = "<image>\nwhat is shown?"
    assert len(processor(scene(), text, return_tensors="pt")["group_kind"]) == 2
    monkeypatch.setitem(sys.modules, "vllm", object())
    assert processor(scene(), text, return_tensors="pt")["group_kind"].tolist() == [BACKGROUND]
    assert len(processor(scene(), text, split=True, return_tensors="pt")["group_kind"]) == 2
    groups = groups_of(processor.image_processor, scene())  # taken as they stand
    assert processor(groups, "<image><image>", return_tensors="pt")["group_kind"].tolist() == [
        BACKGROUND,
        OBJECT,
    ]
    assert "pixel_values" not in processor(text="what is shown?")


def test_through_processor_template_and_collator_too(processor):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    image = scene(14, 14)
    groups = groups_of(processor.image_processor, image)

    def messages(images):
        user = [{"type": "image", "image": i} for i in images] + [{"type": "text", "text": "what?"}]
        return [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": "a bus"}]},
        ]

    def templated(images):
        return processor.apply_chat_template(
            messages(images), tokenize=True, return_dict=True, return_tensors="pt"
        )

    def collated(images):
        collator = DataCollatorForVisionLanguageModeling(processor)
        plain = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a bus"}]
        return collator([{"images": images, "messages": plain}])

    def called(images):
        text = "USER: " + "<image>" * len(images) + "\nwhat? ASSISTANT:"
        return processor(images=images, text=text, return_tensors="pt")

    for make in (templated, collated, called):
        ordinary, ready = make([image]), make(groups)
        assert ordinary.keys() == ready.keys()
        for name in ordinary:
            assert torch.equal(torch.as_tensor(ordinary[name]), torch.as_tensor(ready[name])), (
                make.__name__,
                name,
            )
    collated_labels = collated([image])["labels"]
    assert (collated_labels == -100).sum() == 0 or (collated_labels != -100).any()


def test_a_placeholder_expands_to_exactly_the_groups_there_are(processor):
    def text_of(image):
        ids = processor(images=image, text="<image> is", return_tensors="pt")["input_ids"][0]
        return processor.tokenizer.decode(ids)

    assert text_of(scene(0, 0)) == f"[BG_START]{'<image>' * 15}[BG_END][OBJ_START]<image>[OBJ_END] is"
    assert text_of(scene(width=0)) == f"[BG_START]{'<image>' * 16}[BG_END] is"
    assert text_of(scene(width=56)) == f"[OBJ_START]{'<image>' * 16}[OBJ_END] is"


def test_batches_with_different_images_and_text_only_prompts(processor):
    texts = ["<image><image> two", "none", "<image> one"]
    out = processor(
        images=[[scene(0, 0), scene(14, 0)], [], [scene(width=0)]],
        text=texts,
        padding=True,
        return_tensors="pt",
    )
    assert out["pixel_values"].shape[0] == 5
    counts = (out["input_ids"] == processor.image_token_id).sum(-1)
    assert counts.tolist() == [32, 0, 16]
    assert (out["attention_mask"].sum(-1) < out["input_ids"].shape[1]).any()
    assert "pixel_values" not in processor(text="hello", return_tensors="pt")


@pytest.mark.parametrize(
    ("text", "images"), [("<image><image>", 1), ("no placeholder", 1), ("<image>", 2), ("<image>", 0)]
)
def test_placeholders_and_images_must_agree(processor, text, images):
    with pytest.raises(ValueError, match="<image>"):
        processor(images=[scene()] * images if images else None, text=text)


def test_the_template_is_llavas_with_bos_and_marks(processor):
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "what?"}, {"type": "image"}, {"type": "image"}],
        },
        {"role": "assistant", "content": "a bus"},
        {"role": "user", "content": "and now?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<s>USER: <image><image>\nwhat? ASSISTANT: a bus</s>USER: and now? ASSISTANT:"
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert processor.apply_chat_template(messages[:2]).startswith(prompt)


def test_assistant_marks_lie_on_the_answer_and_its_end(processor):
    from transformers.processing_utils import ProcessorMixin

    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": scene(0, 0)}, {"type": "text", "text": "what?"}],
        },
        {"role": "assistant", "content": "a bus"},
    ]
    arguments = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    if not hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"):
        with pytest.raises(ValueError, match="assistant masks at wrong tokens"):
            processor.apply_chat_template(messages, **arguments)
        return
    out = processor.apply_chat_template(messages, return_tensors="pt", **arguments)
    marked = out["input_ids"][0][torch.as_tensor(out["assistant_masks"][0]).bool()]
    assert processor.tokenizer.decode(marked) == " a bus</s>"


def test_separators_are_special_tokens_of_the_saved_tokenizer(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = BackdropProcessor.from_pretrained(tmp_path)
    for token in ("<image>", *SEPARATOR_TOKENS):
        token_id = again.tokenizer.convert_tokens_to_ids(token)
        assert again.tokenizer.tokenize(f"a{token}b")[1] == token
        assert again.tokenizer.decode([token_id], skip_special_tokens=True) == ""
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.chat_template == processor.chat_template


def test_a_tokenizer_without_the_tokens_is_refused(image_processor):
    with pytest.raises(ValueError, match="no token '<image>'"):
        BackdropProcessor(image_processor, tiny.tokenizer())
    tokenizer = tiny.tokenizer()
    BackdropProcessor.add_tokens(tokenizer, use_separators=False)
    with pytest.raises(ValueError, match=r"no token '\[BG_START\]'"):
        BackdropProcessor(image_processor, tokenizer)
    assert BackdropProcessor(image_processor, tokenizer, use_separators=False).separator_token_ids is None


def test_objects_first_turns_the_groups_around(processor):
    image = scene(14, 14)
    one, two = (
        processor(images=[image], text=["<image>"], return_tensors="pt", background_first=first)
        for first in (True, False)
    )
    assert one["group_kind"].tolist() == [0, 1] and two["group_kind"].tolist() == [1, 0]
    assert torch.equal(one["pixel_values"], two["pixel_values"].flip(0))
    text = processor.tokenizer.decode(two["input_ids"][0])
    assert text.index("[OBJ_START]") < text.index("[BG_START]")
