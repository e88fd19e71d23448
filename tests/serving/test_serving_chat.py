"""Requests whose form is wrong: each is refused in one line that says why, and reaches no engine."""

import pytest
from fake_engine import red_scene
from running_gateway import PLAIN, asked, nested, question, refused, user

from backdrop.serving.chat import MAX_MESSAGES


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
    "part a text": (user("hi"), "messages[0].content[0] has the type None"),
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
    "an assistant's image": (
        {"messages": [{"role": "assistant", "content": question(red_scene())["messages"][0]["content"]}]},
        "is an image of the assistant; wanted the user's",
    ),
    "many messages": (
        {"messages": [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)},
        "1,025 messages",
    ),
    "n": (question(n=5), "n is 5; wanted 1 to 4"),
    "n zero": (question(n=0), "n is 0"),
    "n true": (question(n=True), "n is True"),
    "max_tokens": (question(max_tokens=4097), "max_tokens is 4097; wanted 1 to 4,096"),
    "max_tokens text": (question(max_tokens="5"), "max_tokens is '5'"),
    "max_completion_tokens": (question(max_completion_tokens=10**9), "max_completion_tokens is 1000000000"),
    "stream text": (question(stream="no"), "stream is 'no'; wanted true or false"),
    "stream number": (question(stream=1), "stream is 1"),
    "stream_options list": (question(stream=True, stream_options=[]), "stream_options is a list"),
    "stream_options text": (question(stream=True, stream_options="x"), "stream_options is a str"),
    "usage with each event": (
        question(stream=True, stream_options={"continuous_usage_stats": True}),
        "unknown field stream_options.continuous_usage_stats",
    ),
    "logit_bias list": (question(logit_bias=[]), "logit_bias is a list"),
    "logit_bias words": (question(logit_bias={"a": 1}), "logit_bias has the token 'a'"),
    "logit_bias space": (question(logit_bias={" 5": 1}), "logit_bias has the token ' 5'"),
    "logit_bias zero": (question(logit_bias={"05": 1}), "logit_bias has the token '05'"),
    "logit_bias digits": (question(logit_bias={"\u0665": 1}), "logit_bias has the token"),
    "logit_bias long": (question(logit_bias={"9" * 5000: 1}), "logit_bias has the token"),
    "not a number": (PLAIN + b'"temperature":NaN}', "the body holds what JSON does not"),
    "infinite": (PLAIN + b'"temperature":1e999}', "the body holds what JSON does not"),
    "half a character": (
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        "the body holds what JSON does not",
    ),
    "half a key": (PLAIN + b'"metadata":{"\\ud800":1}}', "the body holds what JSON does not"),
}


@pytest.mark.parametrize(("body", "message"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_a_400_that_says_why(refusing, body, message):
    refused(refusing.post(body), 400, message)


def test_placeholders_and_separators_in_a_text_are_refused(refusing):
    answer = refusing.ask(red_scene(), text="<image>" * 10_000)
    refused(answer, 400, "messages[0] has 10,000 times '<image>', which only the chat template may write")
    for token in ("<image>", "[BG_START]", "[OBJ_END]", "<s>", "</s>", "<pad>"):
        refused(refusing.ask(text=f"a{token}b"), 400, f"1 times '{token}'")
        messages = [{"role": "system", "content": token}, {"role": "user", "content": "hi"}]
        refused(refusing.post({"messages": messages}), 400, "messages[0] has 1 times")


def test_a_placeholder_in_two_pieces_is_refused(refusing, processor):
    """The chat template joins the texts of a message."""
    pieces = [{"type": "text", "text": text} for text in ("<ima", "ge>")]
    text = processor.apply_chat_template([{"role": "user", "content": pieces}])
    assert "<image>" in text, "the template does not join: the check is for nothing"
    refused(refusing.post(user(*pieces)), 400, "messages[0] has 1 times '<image>'")
    image = question(red_scene())["messages"][0]["content"][0]
    refused(refusing.post(user(pieces[0], image, pieces[1])), 400, "messages[0] has 1 times '<image>'")


def test_too_many_images(serve, engines):
    gateway = serve(limits={"images": 2})
    assert gateway.ask(red_scene(), red_scene()).status_code == 200
    refused(
        gateway.ask(red_scene(), red_scene(), red_scene()), 413, "the request has 3 images; wanted at most 2"
    )
    earlier = [question(red_scene())["messages"][0]] * 3  # in other turns
    refused(gateway.post({"messages": earlier}), 413, "3 images")
