"""What an engine receives in the place of a client's request."""

import base64
import copy
from io import BytesIO

import numpy as np
import pytest
from fake_engine import data_url, group_of, image_parts, red_scene
from PIL import Image
from running_gateway import asked, question, refused

from backdrop.processing.patch_groups_backdrop import group_to_image, save_group
from backdrop.serving.frames import FrameSplitter


def test_images_stay_where_they_are_in_the_conversation(gateway, engines):
    messages = [
        {"role": "system", "content": "be brief"},
        question(red_scene(0, 0), red_scene(14, 14), text="first")["messages"][0],
        {"role": "assistant", "content": "yes"},
        question(text="no image")["messages"][0],
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "before"},
                *question(red_scene(width=0, shade=9), text="last")["messages"][0]["content"],
            ],
        },
    ]
    assert gateway.post({"messages": messages}).status_code == 200
    (body,) = asked(*engines)
    kinds = [
        [part["type"] for part in message["content"]]
        if isinstance(message["content"], list)
        else message["content"]
        for message in body["messages"]
    ]
    assert kinds == [
        "be brief",
        ["image_url"] * 4 + ["text"],
        "yes",
        ["text"],
        ["text", "image_url", "text"],
    ]
    assert [message["role"] for message in body["messages"]] == [message["role"] for message in messages]


def test_an_image_url_may_be_a_string(gateway, engines):
    body = question(red_scene())
    body["messages"][0]["content"][0]["image_url"] = data_url(red_scene())
    assert gateway.post(body).status_code == 200 and len(image_parts(asked(*engines)[0]["messages"])) == 2


def test_bounds_of_the_answer_are_made_to_fit(serve, engines):
    for engine in engines:
        engine.context = 64
    gateway = serve()
    free = 64 - gateway.ask(text="q").json()["usage"]["prompt_tokens"]
    for wanted in (1, free - 1, free, free + 1, 16384, 10**9):
        assert gateway.ask(text="q", max_tokens=wanted, min_tokens=wanted).status_code == 200
        sent = [b for b in asked(*engines) if b.get("min_tokens") is not None]
        assert {b["max_tokens"] for b in sent} == {b["min_tokens"] for b in sent}
        assert max(b["max_tokens"] for b in sent) == min(wanted, free)
    assert "max_tokens" not in asked(*engines)[0], "without a bound the engine fills its context"
    gateway.ask(text="q", max_tokens=-1)
    assert [b.get("max_tokens") for b in asked(*engines)].count(None) == 2, "-1 is as many as fit"
    gateway.ask(text="q", max_tokens=5, max_completion_tokens=7)
    assert 7 in [b.get("max_tokens") for b in asked(*engines)]
    error = refused(gateway.ask(text="q" * 5000), 400, "wanted fewer than the model's context, 64")
    assert error["code"] == "context_length_exceeded"
    refused(gateway.ask(*[red_scene(width=0)] * 4), 400, "with 4 image(s); wanted fewer than")


def test_images_are_bounded_by_their_tokens(serve, engines):
    """Sixteen patches a frame, and twenty frames: what does not fit is not even split."""
    for engine in engines:
        engine.context = 600
    gateway = serve()
    assert gateway.ask(*[red_scene(width=0)] * 20).status_code == 200
    before = gateway.metric("images_total", background="known")
    refused(gateway.ask(*[red_scene(width=0)] * 200), 400, "the prompt has 6", "with 200 image(s)")
    assert gateway.metric("images_total", background="known") == before


def test_a_template_that_leaves_a_message_out_is_no_silence(serve, engines, processor):
    deaf = copy.copy(processor)
    deaf.chat_template = "{% for m in messages if m['role'] == 'user' %}USER: {{ m['content'] }} {% endfor %}"
    gateway = serve({"processor": deaf}, health_seconds=60)
    for (
        replica
    ) in gateway.gateway.replicas.replicas:  # the engines' own template is another: the probe says so
        replica.up, replica.model = True, "backdrop"
    gateway.gateway.model = "backdrop"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    refused(gateway.post({"messages": messages}), 400, "leaves out messages[0], of the system")
    deaf.chat_template = "{{ raise_exception('alternate!') }}"
    refused(gateway.post({"messages": messages}), 400, "chat template cannot show the messages: alternate!")
    assert gateway.post({"messages": messages[1:]}).status_code == 400 and asked(*engines) == []


def test_separators_cannot_be_allowed(gateway, engines, processor):
    for token in (processor.image_token_id, *processor.separator_token_ids):
        refused(gateway.ask(allowed_token_ids=[5, token]), 400, f"allowed_token_ids has {token}")
    assert gateway.ask(allowed_token_ids=[5]).status_code == 200
    assert asked(*engines)[0]["allowed_token_ids"] == [5]


def test_calls_are_sent_as_engines_take_them(gateway, engines):
    """Older clients' calls, arguments that are objects or no JSON, a result without a call's name."""
    old = {"name": "alarm", "arguments": '{"zone": "gate"}'}
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "a", "arguments": {"k": 1}}},
        {"function": {"name": "b", "arguments": '{"broken'}},
        {"id": None, "function": {"name": "c"}},
    ]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "function_call": old},
        {"role": "function", "name": "alarm", "content": "RESULT"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "DONE"}]},
    ]
    assert gateway.post({"messages": messages}).status_code == 200
    sent = asked(*engines)[0]["messages"]
    assert sent[1]["tool_calls"] == [{"id": "call_0", "type": "function", "function": old}]
    assert sent[2] == {"role": "tool", "name": "alarm", "content": "RESULT"}
    assert [(call["id"], call["function"]["arguments"]) for call in sent[3]["tool_calls"]] == [
        ("c1", '{"k": 1}'),
        ("call_1", '{"invalid_json": "{\\"broken"}'),
        ("call_2", "{}"),
    ]


def test_the_gateways_own_logit_bias_wins(gateway, engines, processor):
    token = str(processor.image_token_id)
    assert gateway.ask(logit_bias={token: 100, "7": 5}).status_code == 200
    bias = asked(*engines)[0]["logit_bias"]
    assert bias[token] == -100 and bias["7"] == 5
    assert {bias[str(token)] for token in processor.separator_token_ids} == {-100}


def test_replicas_may_call_the_model_by_other_names(serve, engines):
    engines[1].name = "backdrop-2"
    try:
        gateway = serve()
        names = {gateway.client.get(f"{gateway.url}/v1/models").json()["data"][0]["id"]}
        for shade in range(0, 250, 20):
            gateway.text(red_scene(width=0, shade=shade), model=next(iter(names)))
        assert all(engine.requests for engine in engines)
        assert {body["model"] for body in engines[1].requests} == {"backdrop-2"}
    finally:
        engines[1].name = "backdrop"


def test_a_group_is_taken_as_it_stands(gateway, engines, processor):
    images = processor.image_processor
    group = images.image_groups([red_scene(14, 14)])[0][1]
    buffer = BytesIO()
    save_group(group_to_image(group, 14, images.geometry()), buffer)
    gateway.text("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    (part,) = image_parts(asked(*engines)[0]["messages"])
    assert np.array_equal(group_of(part, processor).pixels, group.pixels)


@pytest.mark.parametrize("alpha", [0, 100, 253, 254, 255])
def test_a_picture_of_uniform_alpha_is_no_group(gateway, engines, alpha):
    """Its alpha may be a group's by chance; only a group carries the mark."""
    picture = red_scene(14, 14).convert("RGBA")
    picture.putalpha(alpha)
    assert gateway.ask(picture).status_code == 200
    shown = Image.new("RGBA", picture.size, "white")
    shown.alpha_composite(picture)
    expected = FrameSplitter(gateway.gateway.processor).split(shown.convert("RGB"), match=False)
    keys = [part["uuid"].split("-")[1] for part in image_parts(asked(*engines)[0]["messages"])]
    assert keys == [item.key for item in expected.items]
