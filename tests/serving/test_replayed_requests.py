"""Requests in the shapes of real products: each is answered as its client expects, and every word reaches the prompt.

The bodies were rebuilt from what the products send, with pictures and words of our own. Words are unique in a body, so that
one that is lost is seen. `backdrop` knows none of these products: what is tested is that it needs to know none.
"""

import json
import re

import pytest
from fake_engine import data_url, red_scene
from PIL import Image
from running_gateway import asked, events_of, streamed_text

FRAME = data_url(red_scene(14, 14), "JPEG")


@pytest.fixture
def gateway(serve, engines):
    """A gateway of a model with LLaVA-1.5's context."""
    for engine in engines:
        engine.context = 4096
    return serve()


def image(detail: str | None = None, url: str = FRAME) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **({"detail": detail} if detail else {})}}


def text(words: str, **fields) -> dict:
    return {"type": "text", "text": words, **fields}


def chat(*messages, **fields) -> dict:
    return {"model": "backdrop", "messages": list(messages), **fields}


def user(*parts, **fields) -> dict:
    return {"role": "user", "content": list(parts), **fields}


def system(words: str) -> dict:
    return {"role": "system", "content": words}


REVIEW = {
    "type": "json_schema",
    "json_schema": {
        "name": "review",
        "strict": True,
        "schema": {"type": "object", "properties": {"scene": {"type": "string"}}, "required": ["scene"]},
    },
}
ALARM = {"type": "function", "function": {"name": "alarmtool", "description": "raisesit", "parameters": {}}}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "alarmtool", "arguments": '{"zone": "gatezone"}'},
}

# By the product, and what is special in the request.
CHATS = {
    "openai: a question": chat(user(text("whatisit"), image()), max_completion_tokens=300),
    "openai: store, tier, effort": chat(
        user(text("whatisit"), image()),
        store=False,
        service_tier="auto",
        reasoning_effort="low",
        prompt_cache_key="cam1",
        safety_identifier="h",
        metadata={"a": "b"},
        user="someone",
    ),
    "openai: extra_body merged by the library": chat(
        user(text("whatisit")), top_k=20, repetition_penalty=1.05
    ),
    "openai: developer message": chat({"role": "developer", "content": "devrules"}, user(text("whatisit"))),
    "openai: refusal sent back": chat(
        user(text("first")),
        {"role": "assistant", "content": None, "refusal": "cannothelp", "annotations": [], "audio": None},
        user(text("second")),
    ),
    "LangChain: system, effort, stop": chat(
        system("sysrules"),
        user(text("whatisit"), image()),
        reasoning_effort="low",
        stop=["END"],
        n=1,
        stream=False,
    ),
    "LangChain: a tool that returns a picture": chat(
        user(text("look")),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": [text("snapshot"), image()]},
        tools=[ALARM],
    ),
    "LangChain: standard image block": chat(
        user(text("look"), {"type": "image", "source_type": "base64", "data": FRAME.split(",")[1]})
    ),
    "LiteLLM: cache control and vLLM's options": chat(
        user(text("whatisit", cache_control={"type": "ephemeral"}), image()), top_k=20, repetition_penalty=1.1
    ),
    "LiteLLM: nulls": chat(
        user({"type": "text", "text": "whatisit", "image_url": None}, {**image(), "text": None}, name=None),
        tools=None,
        stop=None,
        logit_bias=None,
        response_format=None,
        cache_salt=None,
    ),
    "LiteLLM proxy: Anthropic's picture": chat(
        user(
            text("whatisit"),
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/jpeg", "data": FRAME.split(",")[1]},
            },
        ),
    ),
    "LiveKit: a guide that streams": chat(
        system("guiderules"),
        user(image("low"), text("seen")),
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        top_k=20,
        parallel_tool_calls=False,
    ),
    "Open WebUI: advanced options": chat(
        system("sysrules"),
        user(text("whatisit"), image()),
        stream=True,
        stream_options={"include_usage": True},
        num_ctx=4096,
        repeat_penalty=1.1,
        think=False,
        keep_alive="5m",
        min_p=0.05,
        top_k=40,
        mirostat=0,
    ),
    "Open WebUI: a long conversation with pictures": chat(
        *(
            turn
            for number in range(18)
            for turn in (
                user(text(f"ask{number}q"), image()),
                {"role": "assistant", "content": f"said{number}q"},
            )
        ),
        user(text("last")),
    ),
    "Frigate: a review of many frames": chat(
        user(text("Describe"), *[image("low")] * 20), response_format=REVIEW, top_k=20, min_p=0
    ),
    "Home Assistant LLM Vision: names and labels": chat(
        system("analystrules"),
        user(text("PersonAnna"), image()),
        user(text("Image1"), image(), text("Image2"), image(), text("Doit")),
        max_completion_tokens=10_000,
        temperature=0.5,
        top_p=0.9,
    ),
    "home-generative-agent: calls and results": chat(
        system("sysrules"),
        user(text("arm")),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "toolresult", "name": "alarmtool"},
        system("latecontext"),
        user(text("armed")),
        tools=[ALARM],
        tool_choice="auto",
    ),
    "NVIDIA VSS: frames of a video": chat(
        system("videorules"),
        user(*[image("auto")] * 20, text("sampled at <0.0> <1.0> List")),
        max_tokens=16_384,
        seed=1,
        temperature=0.2,
        top_p=1.0,
        ignore_eos=False,
    ),
    "an older client: functions' results": chat(
        user(text("arm")),
        {"role": "assistant", "content": None, "function_call": {"name": "alarmtool", "arguments": "{}"}},
        {"role": "function", "name": "alarmtool", "content": "toolresult"},
    ),
    "a reasoning client": chat(
        user(text("first")),
        {"role": "assistant", "content": "answer", "reasoning": "because", "reasoning_content": None},
        user(text("second")),
        chat_template_kwargs={"enable_thinking": False},
    ),
    "a script: curl with extra_body": chat(
        {"role": "user", "content": "whatisit"}, extra_body={"top_k": 1}, max_tokens=100.0
    ),
}


def words_of(value) -> list[str]:
    """The words that a request says: of its texts, calls and results."""
    if isinstance(value, str):
        return re.findall(r"\w+", value) if len(value) < 200 else []
    if isinstance(value, list):
        return [word for each in value for word in words_of(each)]
    if isinstance(value, dict):
        notes = (
            "type",
            "role",
            "id",
            "detail",
            "tool_call_id",
            "call_id",
            "cache_control",
            "parameters",
            "url",
            "status",
        )
        pictures = ("source_type", "media_type", "data", "image_url")
        return [w for name, each in value.items() if name not in notes + pictures for w in words_of(each)]
    return []


def check_shown(engines, said) -> str:
    """Every word stands in the prompt that an engine made; the prompt."""
    (prompt,) = [prompt for engine in engines for prompt in engine.prompts]
    words = words_of(said)
    assert words and [word for word in words if word not in prompt] == []
    return prompt


@pytest.mark.parametrize("body", CHATS.values(), ids=CHATS)
def test_a_chat_of_a_product(gateway, engines, body):
    answer = gateway.post(body)
    assert answer.status_code == 200, answer.text
    prompt = check_shown(engines, [body["messages"], body.get("tools")])
    pictures = json.dumps(body).count("/9j/")
    assert prompt.count("<image>") == 2 * pictures
    if body.get("stream"):
        assert streamed_text(answer.content)
        assert events_of(answer.content)[-2]["usage"]["backdrop"]["patches"]["fresh"]
        assert answer.headers["cache-control"].startswith("no-cache")
        assert answer.headers["x-accel-buffering"] == "no"
    else:
        assert answer.json()["choices"][0]["message"]["content"]


def test_labels_stand_before_their_pictures(gateway, engines):
    gateway.post(CHATS["Home Assistant LLM Vision: names and labels"])
    prompt = next(prompt for engine in engines for prompt in engine.prompts)
    assert re.search(r"Image1\s(<image>){2}\sImage2\s(<image>){2}\sDoit", prompt)


REFUSED = {
    "a video": (
        chat(user(text("q"), {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}})),
        "video_url",
    ),
    "sound": (chat(user(text("q"), {"type": "input_audio", "input_audio": {"data": "AAAA"}})), "input_audio"),
    "a template": (chat(user(text("q")), chat_template="{{ messages }}"), "chat_template cannot be set"),
    "a salt": (chat(user(text("q")), cache_salt="mine"), "cache_salt cannot be set"),
    "a uuid": (chat(user(image() | {"uuid": "u"})), "uuid cannot be set"),
    "pixels": (chat(user(text("q")), mm_processor_kwargs={"do_resize": False}), "mm_processor_kwargs cannot"),
    "a misspelling": (chat(user(text("q")), temprature=0), "is 'temperature' meant?"),
    "the system elsewhere": (chat(user(text("q")), system="be brief"), "wanted a message of the role system"),
}


@pytest.mark.parametrize(("body", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_shown_or_set_says_why(gateway, engines, body, words):
    answer = gateway.post(body)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    assert asked(*engines) == []


PICTURES = {
    "AVIF": lambda picture: data_url(picture, "AVIF"),
    "TIFF": lambda picture: data_url(picture, "TIFF"),
    "a phone's": lambda picture: data_url(picture.resize((8160, 6144)), "JPEG", quality=30),
    "line breaks": lambda picture: re.sub(r"(.{76})", "\\1\r\n", data_url(picture, "JPEG")),
    "bare base64": lambda picture: data_url(picture, "JPEG").split(",")[1],
    "uniform alpha": lambda picture: data_url(_with_alpha(picture, 254)),
}


def _with_alpha(picture: Image.Image, alpha: int) -> Image.Image:
    picture = picture.convert("RGBA")
    picture.putalpha(alpha)
    return picture


@pytest.mark.parametrize("write", PICTURES.values(), ids=PICTURES)
def test_a_picture_as_clients_write_it(gateway, engines, write):
    answer = gateway.post(chat(user(text("whatisit"), image(url=write(red_scene(14, 14, 128))))))
    assert answer.status_code == 200, answer.text
    parts = [part for message in asked(*engines)[0]["messages"] for part in message["content"]]
    assert [part["type"] for part in parts] == ["text", "image_url", "image_url"]


# ---- the responses API

TURNS = [
    {"role": "developer", "content": "devrules"},
    {
        "type": "message",
        "role": "user",
        "content": [
            {"type": "input_text", "text": "whatisit"},
            {"type": "input_image", "image_url": FRAME, "detail": "auto"},
        ],
    },
    {
        "type": "message",
        "role": "assistant",
        "id": "msg_1",
        "status": "completed",
        "content": [{"type": "output_text", "text": "abus", "annotations": []}],
    },
    {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "call_1",
        "name": "alarmtool",
        "arguments": '{"zone": "gatezone"}',
    },
    {"type": "function_call_output", "call_id": "call_1", "output": "toolresult"},
    {"type": "reasoning", "id": "rs_1", "summary": []},
    {"role": "user", "content": "andnow"},
]
RESPONSES = {
    "a text": {"model": "backdrop", "input": "whatisit"},
    "turns": {
        "model": "backdrop",
        "input": TURNS,
        "instructions": "instructed",
        "max_output_tokens": 16_384,
        "store": False,
        "include": [],
        "reasoning": {"effort": "low"},
        "text": {
            "format": {"type": "json_schema", "name": "review", "schema": {"type": "object"}, "strict": True}
        },
        "tools": [{"type": "function", **ALARM["function"]}],
        "tool_choice": {"type": "function", "name": "alarmtool"},
        "truncation": "auto",
    },
}


@pytest.mark.parametrize("body", RESPONSES.values(), ids=RESPONSES)
def test_a_request_of_the_responses_api(gateway, engines, body):
    answer = gateway.client.post(f"{gateway.url}/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    check_shown(engines, [body["input"], body.get("instructions"), body.get("tools")])
    response, sent = answer.json(), asked(*engines)[0]
    assert response["object"] == "response" and response["status"] == "completed"
    (message,) = response["output"]
    assert message["type"] == "message" and message["content"][0]["type"] == "output_text"
    assert message["content"][0]["text"].endswith(
        " | whatisit" if body["input"] is not TURNS else " | andnow"
    )
    assert (
        response["usage"]["input_tokens"] + response["usage"]["output_tokens"]
        == response["usage"]["total_tokens"]
    )
    if body["input"] is TURNS:
        assert sent["response_format"]["json_schema"] == {
            "name": "review",
            "schema": {"type": "object"},
            "strict": True,
        }
        assert sent["tool_choice"] == {"type": "function", "function": {"name": "alarmtool"}}
        assert 0 < sent["max_tokens"] < 4096


def test_a_stream_of_the_responses_api(gateway, engines):
    body = {"model": "backdrop", "input": TURNS, "stream": True}
    answer = gateway.client.post(f"{gateway.url}/v1/responses", json=body)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in answer.text.split("\n\n") if block]
    events = [json.loads(lines[1].removeprefix("data: ")) for lines in blocks]
    assert [lines[0] for lines in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert deltas > 1 and kinds == begin + ["output_text.delta"] * deltas + end
    whole = "".join(event["delta"] for event in events if "delta" in event)
    final = events[-1]["response"]
    assert whole.endswith("| andnow") and final["output"][0]["content"][0]["text"] == whole
    assert final["usage"]["backdrop"]["patches"]["fresh"] and events[0]["response"]["status"] == "in_progress"


def test_calls_in_answers_of_the_responses_api(gateway, engines):
    """What an engine calls, whole and in pieces, is a function_call item."""
    for stream in (False, True):
        for engine in engines:
            engine.calls = [CALL]
        answer = gateway.client.post(f"{gateway.url}/v1/responses", json={"input": "q", "stream": stream})
        if stream:
            events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
            pieces = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
            assert len(pieces) > 1 and "".join(pieces) == CALL["function"]["arguments"]
            response = events[-1]["response"]
        else:
            response = answer.json()
        (item,) = [item for item in response["output"] if item["type"] == "function_call"]
        assert (item["name"], item["call_id"]) == ("alarmtool", "call_1")
        assert item["arguments"] == CALL["function"]["arguments"] and item["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"previous_response_id": "resp_1"}, "not stored here"),
        ({"conversation": "conv_1"}, "not stored here"),
        ({"background": True}, "not stored here"),
        ({"input": []}, "input is missing or empty"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0] has the type 'item_reference'"),
        ({"input": [5]}, "input[0] has the type None"),
        ({"tools": [{"type": "web_search"}]}, "tools[0] is no function"),
    ],
)
def test_what_the_responses_api_cannot_do_here(gateway, engines, fields, words):
    answer = gateway.client.post(f"{gateway.url}/v1/responses", json={"input": "q"} | fields)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    assert asked(*engines) == []


def test_errors_within_a_responses_stream_end_it(gateway, engines):
    for engine in engines:
        engine.mode = "cut"
    answer = gateway.client.post(f"{gateway.url}/v1/responses", json={"input": "q", "stream": True})
    kinds = [line[7:] for line in answer.text.split("\n") if line.startswith("event: ")]
    assert kinds[-2:] == ["error", "response.failed"]


def test_paths_without_v1(gateway, engines):
    """Of clients whose base URL has no /v1, or a path of its own."""
    for path in ("/chat/completions", "/v1/chat/completions"):
        assert gateway.client.post(gateway.url + path, json=chat(user(text("q")))).status_code == 200
    assert gateway.client.get(f"{gateway.url}/models").status_code == 200
