"""A checkpoint's own chat template: its words stay, images and marks come in, BOS is there once."""

import pytest
import tiny
from chat_templates import CHATML, FAMILIES, GEMMA, LLAMA_3, LLAVA_HF, VICUNA
from red_square import groups_of, scene
from tokenizers.processors import TemplateProcessing

from backdrop.hub_export.source_template import is_vicuna, keep_template, with_image_position
from backdrop.processing.processing_backdrop import BackdropProcessor

CHAT = [("user", "what is shown?"), ("assistant", "a red bus"), ("user", "is it?"), ("assistant", "a bus")]


def tokenizer_with(tokens=(), bos=False):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    BackdropProcessor.add_tokens(tokenizer)
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer


def as_text(turns):
    return [{"role": role, "content": text} for role, text in turns]


def as_parts(turns):
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "tokenizer adds bos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_template_gives_its_authors_prompts_with_marks(family, bos):
    source, tokens, end, system = FAMILIES[family]
    tokenizer = tokenizer_with(tokens, bos)
    kept = keep_template(source, tokenizer)
    assert kept.marked
    for turns in (CHAT, CHAT[:3], CHAT[:1], *([[("system", "Be brief. "), *CHAT]] if system else [])):
        for prompt in (False, True):
            wanted = tokenizer.apply_chat_template(
                as_text(turns), chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
            wanted = "<s>" * (bos and not wanted.startswith("<s>")) + wanted
            for form in (as_text, as_parts):
                found = tokenizer.apply_chat_template(
                    form(turns), chat_template=kept.text, tokenize=False, add_generation_prompt=prompt
                )
                assert found == wanted
    encoded = tokenizer.apply_chat_template(
        as_parts(CHAT),
        chat_template=kept.text,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = [
        token for token, mine in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mine
    ]
    answers = "".join(text + end for role, text in CHAT if role == "assistant")
    assert tokenizer.decode(marked).replace(" ", "") == answers.replace(" ", "")


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "tokenizer adds bos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_come_where_the_processor_needs_them(family, bos, image_processor):
    """An image and its groups in its place give equal ids; templating first gives the ids of doing both at once."""
    source, tokens, _, _ = FAMILIES[family]
    tokenizer = tokenizer_with(tokens, bos)
    processor = BackdropProcessor(
        image_processor, tokenizer, chat_template=keep_template(source, tokenizer).text
    )
    picture = scene(14, 14)

    def chat(images):
        parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "is it?"}]
        return [{"role": "user", "content": parts}]

    def ids(images):
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return processor.apply_chat_template(chat(images), **options)["input_ids"][0]

    one = ids([picture])
    assert one == ids(groups_of(image_processor, picture))
    assert one.count(tokenizer.bos_token_id) <= 1
    text = processor.apply_chat_template(chat([picture]), add_generation_prompt=True, tokenize=False)
    assert text.count("<image>") == 1 and "<image>\nis it?" in text
    add = not text.startswith("<s>")
    assert one == processor(images=[picture], text=text, add_special_tokens=add)["input_ids"][0]


def test_white_space_of_answers_is_the_templates_affair():
    for source in (CHATML, LLAMA_3, VICUNA):
        tokenizer = tokenizer_with(["<|im_end|>", "<|eot_id|>"])
        turns = [("user", " q "), ("assistant", "\n a \n")]
        wanted = tokenizer.apply_chat_template(as_text(turns), chat_template=source, tokenize=False)
        kept = keep_template(source, tokenizer).text
        assert tokenizer.apply_chat_template(as_text(turns), chat_template=kept, tokenize=False) == wanted


def test_a_default_system_prompt_is_put_in_and_a_given_one_wins():
    tokenizer = tokenizer_with(["<|im_end|>"])
    kept = keep_template(CHATML, tokenizer, system_prompt="It's brief.").text
    shown = tokenizer.apply_chat_template(as_text(CHAT[:1]), chat_template=kept, tokenize=False)
    assert (
        shown.startswith("<|im_start|>system\nIt's brief.<|im_end|>\n<|im_start|>user")
        and "helpful" not in shown
    )
    given = [("system", "Be long."), *CHAT[:1]]
    shown = tokenizer.apply_chat_template(as_text(given), chat_template=kept, tokenize=False)
    assert "Be long." in shown and "brief" not in shown
    with pytest.raises(ValueError, match="takes no system message .*System role not supported"):
        keep_template(GEMMA, tokenizer, system_prompt="Be brief.")


def test_a_template_whose_answers_end_in_no_token_is_kept_without_marks():
    source = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    kept = keep_template(source, tokenizer_with())
    assert not kept.marked and "generation" not in kept.text


def test_a_template_that_shows_no_chat_is_refused():
    with pytest.raises(ValueError, match="cannot show a conversation .* --chat-template FILE"):
        keep_template("{{ messages[0]['content'] }}", tokenizer_with())


def test_images_can_stay_in_place():
    tokenizer = tokenizer_with(["<|im_end|>"])
    kept = keep_template(CHATML, tokenizer).text
    parts = [{"type": "text", "text": "is"}, {"type": "image"}]
    chat = [{"role": "user", "content": parts}]
    assert "<image>\nis<" in tokenizer.apply_chat_template(chat, chat_template=kept, tokenize=False)
    in_place = with_image_position(kept, images_first=False)
    assert "is\n<image><" in tokenizer.apply_chat_template(chat, chat_template=in_place, tokenize=False)
    assert with_image_position(in_place, images_first=True) == kept
    assert with_image_position(CHATML, images_first=False) is None


def test_llava_hfs_template_is_known_as_llavas_prompt():
    assert is_vicuna(LLAVA_HF, tokenizer_with())
    assert not any(is_vicuna(source, tokenizer_with(tokens)) for source, tokens, _, _ in FAMILIES.values())
