"""The chat template: LLaVA-1.5's prompt for a plain chat, and nothing of any other conversation left out."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tiny import photo
from tokenizers.processors import TemplateProcessing

from backdrop.hub_export.chat_template import VICUNA_SYSTEM_PROMPT, chat_template

IMAGE = {"type": "image"}
VICUNA = f"<s>{VICUNA_SYSTEM_PROMPT} "


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts, **fields) -> dict:
    return {"role": "user", "content": list(parts), **fields}


@pytest.fixture
def prompt(processor):
    """The text of a conversation, under Vicuna's template or another."""

    def render(messages, template=None, **options):
        processor.chat_template = template or chat_template()
        return processor.apply_chat_template(
            messages, tokenize=False, **{"add_generation_prompt": True, **options}
        )

    return render


def test_a_plain_chat_is_llavas_byte_for_byte(prompt):
    assert prompt([user(IMAGE, text("What is it?"))]) == f"{VICUNA}USER: <image>\nWhat is it? ASSISTANT:"
    assert prompt([user(text("What is it?"), IMAGE)]) == f"{VICUNA}USER: <image>\nWhat is it? ASSISTANT:"
    turns = [
        {"role": "system", "content": "Be brief."},
        user(IMAGE, text("a")),
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert prompt(turns) == "<s>Be brief. USER: <image>\na ASSISTANT: b</s>USER: c ASSISTANT:"
    silent = [{"role": "system", "content": ""}, {"role": "user", "content": "c"}]
    assert prompt(silent) == "<s>USER: c ASSISTANT:"


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ([text("a"), text("b")], "a\nb"),
        ([IMAGE, text("a"), text("b")], "<image>\na\nb"),
        ([text("a"), text("b"), IMAGE, IMAGE], "<image><image>\na\nb"),
        ([text("Image 1:"), IMAGE, text("Image 2:"), IMAGE], "Image 1:\n<image>\nImage 2:\n<image>"),
        ([text("Image 1:"), IMAGE, text("Compare.")], "Image 1:\n<image>\nCompare."),
        ([IMAGE, text("and"), IMAGE, IMAGE], "<image>\nand\n<image><image>"),
        ([IMAGE, text(""), IMAGE, text("q")], "<image><image>\nq"),
        ([text("Person Anna:"), IMAGE], "<image>\nPerson Anna:"),
        (["a", IMAGE, {"type": "image_url"}, "b"], "a\n<image><image>\nb"),
        ([], ""),
    ],
)
def test_labels_keep_their_place_and_texts_are_not_glued(prompt, parts, shown):
    assert prompt([user(*parts)]) == f"{VICUNA}USER: {shown} ASSISTANT:"


@settings(deadline=None)  # the first example compiles the template
@given(st.lists(st.one_of(st.just(IMAGE), st.integers(0, 99).map(lambda n: text(f"w{n}w"))), max_size=8))
def test_in_place_is_the_order_of_the_parts(parts):
    """Whatever the order: first only where all text is on one side; else as the message has it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    shown = {}
    for first in (True, False):
        template = chat_template("", images_first=first)
        [rendered], _ = render_jinja_template(
            conversations=[[user(*parts)]], chat_template=template, bos_token="", eos_token=""
        )
        shown[first] = rendered.removeprefix("USER: ").split()
    pieces = [piece for line in shown[True] for piece in line.replace("<image>", " <image> ").split()]
    kinds = ["<image>" if part == IMAGE else part["text"] for part in parts]
    words = [kind for kind in kinds if kind != "<image>"]
    ordered = [*["<image>"] * (len(kinds) - len(words)), *words]
    one_side = "<image>" not in kinds or kinds in (
        ordered,
        [*words, *["<image>"] * (len(kinds) - len(words))],
    )
    assert pieces == (ordered if one_side else kinds)
    assert [p for line in shown[False] for p in line.replace("<image>", " <image> ").split()] == kinds


def test_every_system_and_developer_message_is_kept(prompt):
    messages = [
        {"role": "system", "content": "ONE"},
        {"role": "developer", "content": [text("TWO")]},
        {"role": "system", "content": "THREE"},
        user(text("q")),
        {"role": "system", "content": "FOUR"},
        user(text("r"), name="Ann"),
    ]
    assert prompt(messages) == "<s>ONE\nTWO\nTHREE USER: q SYSTEM: FOUR USER (Ann): r ASSISTANT:"


CALL = {"id": "c1", "type": "function", "function": {"name": "alarm", "arguments": {"zone": "gate é"}}}


def test_tool_calls_and_results_are_shown(prompt):
    messages = [
        user(text("q")),
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "RESULT"},
        {"role": "tool", "tool_call_id": "c1", "name": "alarm", "content": [text("snapshot"), IMAGE]},
    ]
    call = '<tool_call>\n{"name": "alarm", "arguments": {"zone": "gate é"}}\n</tool_call>'
    shown = f"{VICUNA}USER: q ASSISTANT: {call}\n{call}</s>TOOL: RESULT TOOL (alarm): <image>\nsnapshot ASSISTANT:"
    assert prompt(messages) == shown
    written = [{**CALL, "function": {"name": "alarm", "arguments": '{"zone": "gate é"}'}}] * 2
    assert prompt([messages[0], messages[1] | {"tool_calls": written}, *messages[2:]]) == shown
    both = {"role": "assistant", "content": "So:", "tool_calls": [CALL]}
    assert f"ASSISTANT: So:\n{call}</s>" in prompt([user(text("q")), both])
    absent = {"role": "assistant", "tool_calls": [CALL]}  # no content at all
    assert f"ASSISTANT: {call}</s>" in prompt([user(text("q")), absent])


def test_tools_are_listed_after_the_system_prompt(prompt):
    function = {"name": "alarm", "description": "raises it", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    shown = prompt([user(IMAGE, text("q"))], tools=tools)
    assert shown.startswith(f"{VICUNA[:-1]}\nYou may call") and shown.endswith(" USER: <image>\nq ASSISTANT:")
    assert json.dumps(function) in shown
    # An engine's copy of a tool has further fields, which are null: the prompt must be the same.
    dumped = [{"type": "function", "function": function | {"strict": None}, "defer_loading": None}]
    assert prompt([user(IMAGE, text("q"))], tools=dumped) == shown
    assert "raises it" not in prompt([user(text("q"))], tools=[])


def test_reasoning_is_part_of_the_answer(prompt):
    for name in ("reasoning", "reasoning_content"):
        turn = {"role": "assistant", "content": "a", name: "because"}
        assert "ASSISTANT: <think>\nbecause\n</think>\na</s>" in prompt([user(text("q")), turn])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "root", "content": "a"}, "the role root"),
        ({"content": "a"}, "the role"),
        (user({"type": "video"}), "the type video"),
        (user({"type": "audio"}), "the type audio"),
        ({"role": "user", "content": 5}, "neither text nor a list"),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, "neither text nor a list"),
    ],
)
def test_what_cannot_be_shown_is_an_error(prompt, message, words):
    with pytest.raises(TemplateError, match=words):
        prompt([message])


def test_a_system_prompt_is_taken_literally(prompt):
    awkward = 'It\'s {{ 1 }}\n\\n "x"'
    assert prompt([user(text("q"))], chat_template(awkward)) == f"<s>{awkward} USER: q ASSISTANT:"


def test_two_steps_give_the_ids_of_one_with_a_tokenizer_that_adds_bos(processor):
    """Llama's tokenizers add BOS; the template has written it already."""
    bos = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    messages = [user({"type": "image", "image": photo()}, text("q"))]
    options = {"add_generation_prompt": True}
    one = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
    written = processor.apply_chat_template(messages, **options)
    for texts in (written, [written]):
        two = processor(images=[photo()], text=texts)["input_ids"]
        assert list(two[0]) == list(one[0]) and list(two[0]).count(bos) == 1
    assert processor(text="q")["input_ids"][0][0] == bos, "a text without BOS gets it as before"
    assert list(processor(text=written.replace("<image>", ""), add_special_tokens=True)["input_ids"][0])[
        :2
    ] == [bos, bos]
