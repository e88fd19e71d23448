"""Fields that clients may not set, in a request, a message and a content part."""

import pytest
from fake_engine import data_url, red_scene
from running_gateway import asked, refused


@pytest.mark.parametrize(
    "name",
    [
        "cache_salt",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "chat_template",
        "chat_template_kwargs",
        "add_generation_prompt",
        "add_special_tokens",
        "continue_final_message",
        "documents",
        "echo",
        "kv_transfer_params",
        "priority",
        "prompt_logprobs",
        "request_id",
        "skip_special_tokens",
        "stop_token_ids",
        "structured_outputs",
        "truncate_prompt_tokens",
        "vllm_xargs",
        "Model",
        "anything",
    ],
)
def test_fields_that_clients_may_not_set_are_named(refusing, name):
    refused(refusing.ask(red_scene(), **{name: None}), 400, name)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": data_url(red_scene())}, "uuid": "mine"},
        # vLLM would fetch this URL, and take its image for the one with this uuid.
        {"type": "text", "text": "hi", "uuid": "mine", "image_url": "http://169.254.169.254/"},
    ],
    ids=["image", "text"],
)
def test_a_uuid_cannot_be_set(refusing, part):
    body = {"messages": [{"role": "user", "content": [part]}]}
    refused(refusing.post(body), 400, "messages[0].content[0].uuid cannot be set")
    part = {**part, "uuid": None}
    answer = refusing.post({"messages": [{"role": "user", "content": [part]}]})
    refused(answer, 400, "unknown field messages[0].content[0].")


@pytest.mark.parametrize("name", ["image_url", "image_embeds", "audio_url", "image_pil", "cache_control"])
def test_a_text_part_holds_only_text(refusing, name):
    part = {"type": "text", "text": "hi", name: "http://169.254.169.254/"}
    answer = refusing.post({"messages": [{"role": "user", "content": [part]}]})
    refused(answer, 400, f"unknown field messages[0].content[0].{name}")


def test_fields_of_a_message_are_named(gateway, engines):
    def message(**fields):
        return {"messages": [{"role": "user", "content": "hi", **fields}]}

    refused(gateway.post(message(bogus=1)), 400, "unknown field messages[0].bogus")
    refused(gateway.post(message(name="<image>")), 400, "messages[0].name has 1 times '<image>'")
    tools = [{"type": "function", "function": {"name": "f", "description": "<image>"}}]
    refused(gateway.post(message() | {"tools": tools}), 400, "tools has 1 times '<image>'")
    # Clients send an answer's message back with further fields, which are empty; these are not passed on.
    assert gateway.post(message(refusal=None, annotations=[], name="Ann")).status_code == 200
    assert asked(*engines)[0]["messages"] == [{"role": "user", "content": "hi", "name": "Ann"}]
