"""Fields that clients may not set, in a request, a message and a content part."""

import pytest
from fake_engine import data_url, red_scene
from running_gateway import asked, question, refused

from backdrop.serving.fields import REQUEST_FIELDS, Handling

REFUSED = [name for name, field in REQUEST_FIELDS.items() if field.handling is Handling.REFUSED]
PASSED_ON = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.2,
    "length_penalty": 1.0,
    "seed": 1,
    "stop": ["x"],
    "stop_token_ids": [5],
    "bad_words": ["y"],
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": False,
    "logprobs": True,
    "top_logprobs": 2,
    "return_tokens_as_token_ids": True,
    "parallel_tool_calls": True,
    "structured_outputs": {"choice": ["yes", "no"]},
    "repetition_detection": {"max_pattern_size": 8},
}


def test_what_the_engine_takes_is_passed_on(gateway, engines):
    assert gateway.ask(red_scene(), **PASSED_ON).status_code == 200
    assert {name: asked(*engines)[0][name] for name in PASSED_ON} == PASSED_ON
    table = {name for name, field in REQUEST_FIELDS.items() if field.handling is Handling.PASSED_ON}
    assert table == set(PASSED_ON)


def test_no_other_field_reaches_the_engine(gateway, engines):
    ignored = {name: 1 for name, field in REQUEST_FIELDS.items() if field.handling is Handling.IGNORED}
    answer = gateway.ask(red_scene(), zebra={"a": 1}, **ignored)
    assert answer.status_code == 200
    own = {"model", "messages", "cache_salt", "logit_bias"}
    assert set(asked(*engines)[0]) == own
    assert "store" in answer.headers["x-backdrop-ignored"]
    assert gateway.ask(red_scene(), zebra=1).headers["x-backdrop-ignored"] == "zebra"
    assert "x-backdrop-ignored" not in gateway.ask(red_scene(), top_k=5).headers


WRONG = {
    "temperature": (-1, "hot", True, [1]),
    "top_p": (0, 1.1, "0.5"),
    "top_k": (1.5, "20", True, -2),
    "min_p": (-0.1, 2),
    "repetition_penalty": (0, "1"),
    "seed": (1.5, 2**63, "1"),
    "stop": (5, [5], {}),
    "stop_token_ids": (5, ["5"], [-1], [1.5]),
    "bad_words": ("y", [1]),
    "ignore_eos": (1, "true"),
    "top_logprobs": (-1, 21),
    "structured_outputs": ("yes", ["yes"]),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_value_of_the_wrong_type_is_named(refusing, name, value):
    refused(refusing.ask(**{name: value}), 400, f"{name} is ", "; wanted ")


def test_whole_numbers_may_be_written_as_floats(gateway, engines):
    assert gateway.ask(max_tokens=100.0, top_k=20.0, seed=1.0).status_code == 200
    body = asked(*engines)[0]
    assert (body["max_tokens"], body["top_k"], body["seed"]) == (100, 20, 1)
    assert all(isinstance(body[name], int) for name in ("max_tokens", "top_k", "seed"))


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_clients_may_not_set_are_named(refusing, name):
    refused(refusing.ask(red_scene(), **{name: "x"}), 400, f"{name} cannot be set: ")


def test_null_means_unset_everywhere(gateway, engines):
    names = [*REQUEST_FIELDS, "temprature", "zebra"]
    body = question(red_scene(), **dict.fromkeys(name for name in names if name != "messages"))
    message = body["messages"][0]
    message.update(dict.fromkeys(["name", "tool_calls", "refusal", "audio", "uuid", "zebra"]))
    for part in message["content"]:
        part.update(dict.fromkeys(["uuid", "id", "cache_control", "fps", "zebra"]))
    message["content"][0]["text"] = message["content"][1]["image_url"] = None
    answer = gateway.post(body)
    assert answer.status_code == 200 and "x-backdrop-ignored" not in answer.headers
    assert set(asked(*engines)[0]) == {"model", "messages", "cache_salt", "logit_bias"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("priority", 0),
        ("echo", False),
        ("add_generation_prompt", True),
        ("use_beam_search", False),
        ("best_of", 1),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("mm_processor_kwargs", {}),
        ("functions", []),
    ],
)
def test_a_value_that_changes_nothing_is_not_refused(gateway, engines, name, value):
    assert gateway.ask(**{name: value}).status_code == 200 and name not in asked(*engines)[0]


@pytest.mark.parametrize(
    ("name", "value"), [("priority", 1), ("best_of", 2), ("echo", 0), ("chat_template_kwargs", {"a": 1})]
)
def test_one_that_changes_something_is(refusing, name, value):
    refused(refusing.ask(**{name: value}), 400, f"{name} cannot be set")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("Model", "model"),
        ("topK", "top_k"),
        ("repetition_penality", "repetition_penalty"),
        ("responseformat", "response_format"),
        ("cache-salt", "cache_salt"),
        ("streaming", "stream"),
        ("stop_tokens_ids", "stop_token_ids"),
    ],
)
def test_a_misspelling_is_refused_with_what_it_resembles(refusing, name, meant):
    refused(refusing.ask(**{name: 1}), 400, f"unknown field '{name}'", f"is '{meant}' meant?")


def test_other_servers_names_are_read(gateway, engines):
    other = {"repeat_penalty": 1.2, "num_predict": 7, "guided_choice": ["a", "b"], "stop_sequences": ["c"]}
    assert gateway.ask(**other).status_code == 200
    body = asked(*engines)[0]
    assert body["repetition_penalty"] == 1.2 and body["max_tokens"] == 7 and body["stop"] == ["c"]
    assert body["structured_outputs"] == {"choice": ["a", "b"]}
    assert gateway.ask(max_tokens=None, num_predict=9).status_code == 200
    assert 9 in [body.get("max_tokens") for body in asked(*engines)]
    for engine in engines:
        engine.requests.clear()
    assert gateway.ask(max_tokens=5, num_predict=7).status_code == 200
    assert asked(*engines)[0]["max_tokens"] == 5, "the API's own name counts"


def test_an_extra_body_is_read_as_the_requests_own_fields(gateway, engines):
    assert gateway.ask(extra_body={"top_k": 5, "seed": 1, "cache_salt": None}, seed=2).status_code == 200
    body = asked(*engines)[0]
    assert body["top_k"] == 5 and body["seed"] == 2 and "extra_body" not in body
    refused(gateway.ask(extra_body={"cache_salt": "x"}), 400, "cache_salt cannot be set")
    refused(gateway.ask(extra_body=[1]), 400, "extra_body is a list")


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


@pytest.mark.parametrize("name", ["image_url", "image_embeds", "audio_url", "image_pil", "caption"])
def test_what_stands_in_a_text_part_beside_its_text_would_be_lost(refusing, name):
    part = {"type": "text", "text": "hi", name: "http://169.254.169.254/"}
    answer = refusing.post({"messages": [{"role": "user", "content": [part]}]})
    refused(answer, 400, f"unknown field messages[0].content[0].{name}", "would be lost")


def test_notes_in_parts_are_ignored(gateway, engines):
    body = question(red_scene())
    image, text = body["messages"][0]["content"]
    image |= {"id": "a", "index": 0, "fps": 2, "min_pixels": 50}
    image["image_url"]["detail"] = "low"
    text |= {"cache_control": {"type": "ephemeral"}, "annotations": [], "prompt_cache_breakpoint": {}}
    assert gateway.post(body).status_code == 200
    parts = asked(*engines)[0]["messages"][0]["content"]
    assert parts[-1] == {"type": "text", "text": "q"} and set(parts[0]) == {"type", "image_url", "uuid"}


def test_fields_of_a_message_are_named(gateway, engines):
    def message(**fields):
        return {"messages": [{"role": "user", "content": "hi", **fields}]}

    refused(
        gateway.post(message(bogus="words")),
        400,
        "unknown field messages[0].bogus: its content would be lost",
    )
    refused(gateway.post(message(contents="words")), 400, "is 'content' meant?")
    # Clients send an answer's message back with further fields; these are not passed on.
    back = message(refusal=None, annotations=[], name="Ann", audio=None, created=1.5, id="x", zebra=7)
    assert gateway.post(back).status_code == 200
    assert asked(*engines)[0]["messages"] == [{"role": "user", "content": "hi", "name": "Ann"}]
