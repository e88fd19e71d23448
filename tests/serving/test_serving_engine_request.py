"""What an engine receives in the place of a client's request."""

import numpy as np
from fake_engine import data_url, group_of, image_parts, red_scene
from running_gateway import asked, question

from backdrop.processing.patch_groups_backdrop import group_to_image
from backdrop.serving.fields import REQUEST_FIELDS, Handling


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


def test_every_field_that_may_be_set_is_passed_on(gateway, engines):
    values = {
        "max_tokens": 5,
        "max_completion_tokens": 6,
        "n": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["x"],
        "stream": False,
        "seed": 1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "text"},
        "user": "me",
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "metadata": {"a": "b"},
    }
    assert gateway.ask(red_scene(), **values).status_code == 200
    body = asked(*engines)[0]
    assert {name: body[name] for name in values} == values
    may_be_set = {name for name, field in REQUEST_FIELDS.items() if field.handling is not Handling.REFUSED}
    assert set(values) | {"model", "messages", "logit_bias", "stream_options"} == may_be_set


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
    gateway.text(group_to_image(group, 14, images.geometry()))
    (part,) = image_parts(asked(*engines)[0]["messages"])
    assert np.array_equal(group_of(part, processor).pixels, group.pixels)
