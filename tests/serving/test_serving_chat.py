"""Requests whose form is wrong: each is refused in one line that says why, and reaches no engine."""

import json
import re

import pytest
from fake_engine import red_scene
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_gateway import PLAIN, asked, nested, question, refused, user

from backdrop.serving.chat import MAX_MESSAGES
from backdrop.serving.problems import ApiError
from backdrop.serving.special_tokens import SpecialTokens


def test_another_model_is_not_there(gateway, engines):
    error = refused(gateway.ask(model="gpt"), 404, "'gpt' is not served; wanted 'backdrop'")
    assert error["code"] == "model_not_found"
    refused(gateway.ask(model=["backdrop"]), 404, "is not served")
    assert gateway.ask(model=None).status_code == 200 and len(asked(*engines)) == 1


BAD_BODIES = {
    "empty": (b"", "no JSON"),
    "text": (b"hello", "no JSON"),
    "cut": (b'{"messages": [', "no JSON"),
    "no UTF-8": (b'{"messages": "\xff"}', "no JSON"),
    "a huge number": (PLAIN + b'"seed":' + b"9" * 5000 + b"}", "no JSON"),
    "nested": (nested(100_000), "no JSON"),
    "nested in a field": (PLAIN + b'"metadata":' + nested(100_000) + b"}", "no JSON"),
    "list": (b"[]", "the body is a list; wanted a JSON object"),
    "null": (b"null", "the body is a NoneType"),
    "string": (b'"hi"', "the body is a str"),
    "no messages": ({}, "messages is missing"),
    "messages an object": ({"messages": {}}, "messages is missing"),
    "no message": ({"messages": []}, "messages is missing or empty"),
    "message a text": ({"messages": ["hi"]}, "messages[0] has no role"),
    "no role": ({"messages": [{"content": "hi"}]}, "messages[0] has no role"),
    "another role": ({"messages": [{"role": "root", "content": "hi"}]}, "messages[0] has no role"),
    "role a list": ({"messages": [{"role": [], "content": "hi"}]}, "messages[0] has no role"),
    "content a number": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content is a int"),
    "part a number": (user(5), "messages[0].content[0] has the type None"),
    "no type": (user({"image_url": "http://a/"}), "has the type None"),
    "type a list": (user({"type": []}), "has the type []"),
    "video": (user({"type": "video_url", "video_url": {"url": "http://a/"}}), "has the type 'video_url'"),
    "audio": (user({"type": "input_audio"}), "has the type 'input_audio'"),
    "embeddings": (user({"type": "image_embeds", "image_embeds": "x"}), "has the type 'image_embeds'"),
    "no text": (user({"type": "text"}), "messages[0].content[0].text is missing"),
    "text a number": (user({"type": "text", "text": 5}), "messages[0].content[0].text is missing"),
    "no image": (user({"type": "image_url"}), "image_url has no url"),
    "url a number": (user({"type": "image_url", "image_url": {"url": 5}}), "image_url has no url"),
    "empty url": (user({"type": "image_url", "image_url": {"url": ""}}), "image_url has no url"),
    "reasoning a list": (
        {"messages": [{"role": "assistant", "content": "a", "reasoning": ["b"]}]},
        "messages[0].reasoning is a list; wanted text",
    ),
    "calls of the user": (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]},
        "messages[0] has tool calls of the user; wanted the assistant's",
    ),
    "calls a text": (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": "f"}]},
        "messages[0].tool_calls is a str",
    ),
    "a call without a name": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {}}]}]},
        "messages[0].tool_calls[0] is no call of a function",
    ),
    "tools an object": (question(tools={}), "tools is a dict; wanted a list"),
    "a tool of another kind": (question(tools=[{"type": "web_search"}]), "tools[0] is no function"),
    "a custom tool": (
        question(tools=[{"type": "custom", "function": {"name": "f"}}]),
        "tools[0].type is 'custom'",
    ),
    "a stored file": (
        user({"type": "input_image", "file_id": "file-1"}),
        "unknown field messages[0].content[0].file_id",
    ),
    "a document": (
        user({"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}),
        "is a file 'data:application/pdf",
    ),
    "many messages": (
        {"messages": [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)},
        "1,025 messages",
    ),
    "n": (question(n=5), "n is 5; wanted 1 to 4"),
    "n zero": (question(n=0), "n is 0"),
    "n true": (question(n=True), "n is True"),
    "max_tokens": (question(max_tokens=0), "max_tokens is 0; wanted a whole number, 1 or more"),
    "max_tokens text": (question(max_tokens="5"), "max_tokens is '5'"),
    "max_tokens half": (question(max_tokens=5.5), "max_tokens is 5.5"),
    "max_completion_tokens": (question(max_completion_tokens=-2), "max_completion_tokens is -2"),
    "stream text": (question(stream="no"), "stream is 'no'; wanted true or false"),
    "stream number": (question(stream=1), "stream is 1"),
    "stream_options list": (question(stream=True, stream_options=[]), "stream_options is a list"),
    "stream_options text": (question(stream=True, stream_options="x"), "stream_options is a str"),
    "logit_bias list": (question(logit_bias=[]), "logit_bias is a list"),
    "logit_bias words": (question(logit_bias={"a": 1}), "logit_bias has the token 'a'"),
    "logit_bias space": (question(logit_bias={" 5": 1}), "logit_bias has the token ' 5'"),
    "logit_bias zero": (question(logit_bias={"05": 1}), "logit_bias has the token '05'"),
    "logit_bias digits": (question(logit_bias={"\u0665": 1}), "logit_bias has the token"),
    "logit_bias long": (question(logit_bias={"9" * 5000: 1}), "logit_bias has the token"),
    "not a number": (PLAIN + b'"temperature":NaN}', "temperature is nan; wanted a number from 0"),
    "infinite": (PLAIN + b'"temperature":1e999}', "temperature is inf; wanted a number from 0"),
    "half a character": (
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        "the body holds what JSON does not",
    ),
    "half a stop": (PLAIN + b'"stop":["\\ud800"]}', "the body holds what JSON does not"),
    "half a key": (
        PLAIN + b'"tools":[{"function":{"name":"f","\\ud800":1}}]}',
        "the body holds what JSON does not",
    ),
}


@pytest.mark.parametrize(("body", "message"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_a_400_that_says_why(refusing, body, message):
    refused(refusing.post(body), 400, message)


SPECIAL = ("<image>", "[BG_START]", "[OBJ_END]", "<s>", "</s>", "<pad>")


def ids_of(prompt: str, processor) -> list[int]:
    return processor.tokenizer(prompt, add_special_tokens=False).input_ids


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_what_clients_write_are_read_as_text(gateway, engines, processor, token):
    """In a text, in two pieces of one, in calls, results and tools: nowhere does the tokenizer see the token."""

    def bodies(text, first, second):
        call = {"id": "c", "function": {"name": "f", "arguments": json.dumps({text: [text]})}}
        spoken = [
            {"role": "system", "content": text},
            {"role": "user", "content": [{"type": "text", "text": first}, {"type": "text", "text": second}]},
            {"role": "assistant", "content": f"a{text}b", "reasoning": text, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "name": text, "content": text * 3},
            question(red_scene(), text=f"{text}\nwhat?")["messages"][0],
        ]
        function = {"name": "f", "description": text, "parameters": {"properties": {text: {}}}}
        return {"messages": spoken, "tools": [{"type": "function", "function": function}]}

    prompts = []
    for written in ((token, token[:3], token[3:]), ("x", "x", "x")):
        assert gateway.post(bodies(*written)).status_code == 200
        prompts += [prompt for engine in engines for prompt in engine.prompts]
        for engine in engines:
            engine.prompts.clear()
    number = processor.tokenizer.convert_tokens_to_ids(token)
    written, plain = (ids_of(prompt, processor).count(number) for prompt in prompts)
    assert written == plain, "the tokenizer takes a client's text for the token"
    assert (
        prompts[0].count(f"{token[0]} {token[1:]}") >= 9 and prompts[0].count("<image>") == 2
    )  # one for each group


def test_neither_are_they_where_a_template_glues_the_texts_of_a_message(processor):
    special = SpecialTokens(processor.tokenizer)
    for pieces in (["<ima", "ge>"], ["a<", "image>b"], ["<", "i", "mage", ">"], ["<im", "", "age><", "s>"]):
        glued = "".join(special.texts(pieces))
        assert all(token not in glued for token in SPECIAL) and glued.replace(" ", "") == "".join(pieces)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(alphabet="<>/simagepdBOJ_START[] ", max_size=12) | st.sampled_from(SPECIAL), max_size=6)
)
def test_no_text_keeps_a_special_token(processor, pieces):
    found = SpecialTokens(processor.tokenizer).texts(pieces)
    assert len(found) == len(pieces)
    assert not any(token in "".join(found) for token in SPECIAL)
    # Nothing but spaces is added, and none where there was nothing to take apart.
    assert [text.replace(" ", "") for text in found] == [text.replace(" ", "") for text in pieces]
    if not any(token in "".join(pieces) for token in SPECIAL):
        assert found == pieces


def test_a_special_token_of_one_character_is_refused(processor):
    special = SpecialTokens(processor.tokenizer)
    special._pattern = re.compile("\u2603")
    with pytest.raises(ApiError, match="which only the chat template may write"):
        special.text("a\u2603b")


def test_too_many_images(serve, engines):
    gateway = serve(limits={"images": 2})
    assert gateway.ask(red_scene(), red_scene()).status_code == 200
    refused(
        gateway.ask(red_scene(), red_scene(), red_scene()), 413, "the request has 3 images; wanted at most 2"
    )
    earlier = [question(red_scene())["messages"][0]] * 3  # in other turns
    refused(gateway.post({"messages": earlier}), 413, "3 images")
