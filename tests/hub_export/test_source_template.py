"""A language model's own chat template with images and answer marks: the source's text, and the right tokens marked."""

import itertools

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from backdrop.hub_export.source_template import answer_bounds, has_answer_marks, template_with_images

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's habit: an empty thought in front of the last answer only.
THINKING = CHATML.replace(
    "+ message['content']",
    "+ ('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' else '') + message['content']",
)
LLAMA3 = (
    "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + '</s>' }}{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
FAMILIES = {
    "ChatML": (CHATML, "<|im_end|>"),
    "Qwen3": (THINKING, "<|im_end|>"),
    "Llama 3": (LLAMA3, "<|eot_id|>"),
    "Mistral": (MISTRAL, "</s>"),
    "Gemma": (GEMMA, "<end_of_turn>"),
    "Phi-3": (PHI3, "<|end|>"),
}


def tokenizer_of(template: str):
    tokenizer = tiny.tokenizer()
    specials = [
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<start_of_turn>",
        "<|end|>",
        "<image>",
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = template
    return tokenizer


def turns(texts: list[str]) -> list[dict]:
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


words = st.lists(
    st.sampled_from(["a", "assistant", "what is it?", "A thing.", "model", " x "]), min_size=1, max_size=5
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(texts=words, prompt=st.booleans())
def test_what_it_writes_for_text_stays_character_for_character(family, texts, prompt):
    template, end = FAMILIES[family]
    tokenizer = tokenizer_of(template)
    ours, messages = template_with_images(tokenizer), turns(texts)
    options = {"tokenize": False, "add_generation_prompt": prompt}
    wanted = tokenizer.apply_chat_template(messages, **options)
    assert tokenizer.apply_chat_template(messages, chat_template=ours, **options) == wanted
    assert has_answer_marks(ours) and not has_answer_marks(template)
    tokens = tokenizer.apply_chat_template(
        messages, chat_template=ours, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    marked = [i for i, on in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if on]
    answers = [text for text in texts[1::2]]
    spoken = tokenizer.decode(marked).split(end)
    assert spoken.pop() == "" and len(spoken) == len(answers)
    for said, text in zip(spoken, answers, strict=True):
        assert said.strip().endswith(text.strip())
        assert said.removeprefix("<think>\n\n</think>\n\n").strip() == text.strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_stand_where_they_are_each_run_on_its_own_line(family):
    tokenizer = tokenizer_of(FAMILIES[family][0])
    image, text = {"type": "image"}, {"type": "text", "text": "what?"}
    for parts, wanted in (
        ([image, text], "<image>\nwhat?"),
        ([image, image, text], "<image><image>\nwhat?"),
        ([text, image, "then"], "what?\n<image>\nthen"),
        ([text], "what?"),
        ([{"type": "image_url", "image_url": "x"}], "<image>"),
    ):
        flat = tokenizer.apply_chat_template([{"role": "user", "content": wanted}], tokenize=False)
        found = tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}],
            chat_template=template_with_images(tokenizer),
            tokenize=False,
        )
        assert found == flat
    with pytest.raises(Exception, match="a part has the type video; wanted text or image"):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}]}],
            chat_template=template_with_images(tokenizer),
            tokenize=False,
        )


def test_a_template_with_marks_of_its_own_keeps_them():
    own = CHATML.replace(
        "message['content'] +", "message['content'] }}{% generation %}{{ 'x' }}{% endgeneration %}{{"
    )
    assert template_with_images(tokenizer_of(own)).endswith(own)


def test_without_a_special_token_behind_answers_nothing_is_marked():
    plain = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    )
    tokenizer = tokenizer_of(plain)
    assert answer_bounds(tokenizer) is None
    ours = template_with_images(tokenizer)
    assert not has_answer_marks(ours)
    messages = turns(["a", "b"])
    assert (
        tokenizer.apply_chat_template(messages, chat_template=ours, tokenize=False)
        == "user: a\nassistant: b\n"
    )


def test_no_template_and_several_are_refused():
    tokenizer = tiny.tokenizer()
    with pytest.raises(ValueError, match="chat template is none; wanted one"):
        template_with_images(tokenizer)
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML}
    with pytest.raises(ValueError, match=r"several \(default, tool_use\)"):
        template_with_images(tokenizer)
