"""The client that splits: what it sends, what it reuses, and that it finds out an engine that does not see groups."""

import asyncio
import base64
import json
from io import BytesIO

import httpx
import numpy as np
import openai
import pytest
from fake_engine import (
    AppThread,
    FakeEngine,
    data_url,
    group_of,
    image_of,
    red_scene,
    wait_until,
)
from paths import EXAMPLE
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from backdrop.processing.patch_groups_backdrop import (
    BACKGROUND,
    METADATA_KEY,
    OBJECT,
    group_to_image,
    looks_like_group,
    save_group,
)
from backdrop.scenes.world import render_scene
from backdrop.serving import AsyncBackdropClient, BackdropClient
from backdrop.serving.client import GATEWAY_MARK
from backdrop.serving.frames import group_key
from backdrop.serving.prompts import EngineMismatchError, check_prompt_tokens, prompt_text, prompt_tokens

MODEL = EXAMPLE
PATCH = 14


@pytest.fixture(scope="module")
def running_engine(processor):
    with FakeEngine(processor) as engine:
        yield engine


@pytest.fixture
def engine(running_engine):
    running_engine.reset()
    yield running_engine
    assert not running_engine.mixed_up, "one uuid for two groups"


@pytest.fixture
def client(engine, processor):
    with BackdropClient(f"{engine.url}/v1", processor=processor, max_retries=0) as client:
        yield client


def keys_of(engine, number: int = -1) -> list[str]:
    return [part["uuid"] for part in engine.parts(number)]


# ---- what is sent


def test_background_first_and_each_group_under_the_hash_of_what_is_sent(client, engine, processor):
    frame = red_scene(14, 28)
    answer = client.ask(frame, "what is shown?", max_tokens=5)
    background, objects = (group_of(part, processor) for part in engine.parts())
    assert (background.kind, objects.kind) == (BACKGROUND, OBJECT)
    assert (
        np.flatnonzero(objects.patch_mask).tolist() == [9]
        and (background.patch_mask != objects.patch_mask).all()
    )
    assert np.array_equal(background.pixels + objects.pixels, np.asarray(frame))
    geometry = processor.image_processor.geometry()
    assert keys_of(engine) == [group_key(group, PATCH, geometry) for group in (background, objects)]
    assert answer.text == str(answer) == f"{keys_of(engine)[0]} | what is shown?"
    (body,) = engine.requests
    assert body["model"] == "backdrop" and body["temperature"] == 0 and body["max_tokens"] == 5
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "image_url", "text"]


def test_a_known_background_goes_out_as_the_reference(client, engine, processor):
    first = client.ask(red_scene(0, 0, shade=90), "q")
    second = client.ask(red_scene(28, 28, shade=92), "q")  # within the tolerance
    (old, _), (new, objects) = (
        [group_of(part, processor) for part in engine.parts(number)] for number in (0, 1)
    )
    assert keys_of(engine, 0)[0] == keys_of(engine, 1)[0]
    assert np.array_equal(old.pixels, new.pixels) and set(np.unique(new.pixels[..., 0])) == {0, 90}
    # Patches that the reference does not own, and those that changed, come from the frame itself.
    assert np.flatnonzero(objects.patch_mask).tolist() == [0, 10]
    assert (objects.pixels[:14, :14, 0] == 92).all() and (objects.pixels[28:42, 28:42] == (255, 0, 0)).all()
    assert (first.patches, first.patches_reused, first.cached_tokens) == (16, 0, 0)
    assert (second.patches, second.patches_reused, second.cached_tokens) == (16, 14, 15)


def test_match_off_neither_uses_nor_leaves_a_reference(client, engine, processor):
    client.ask(red_scene(shade=90), "q", match=False)
    client.ask(red_scene(shade=92), "q")
    client.ask(red_scene(shade=91), "q", match=False)
    client.ask(red_scene(shade=91), "q")
    shades = [int(group_of(engine.parts(n)[0], processor).pixels[-1, -1, 0]) for n in range(4)]
    assert shades == [90, 92, 91, 92]


def test_tolerance_and_matching_options_are_the_matchers(engine, processor):
    with BackdropClient(
        f"{engine.url}/v1", processor=processor, tolerance=0, matching={"max_references": 1}
    ) as client:
        client.ask(red_scene(shade=90), "q")
        client.ask(red_scene(shade=92), "q")
        assert keys_of(engine, 0)[0] != keys_of(engine, 1)[0]
        client.ask(red_scene(shade=90), "q")
        assert client.preparation.splitter.matcher.stats()["references"] == 1
    with pytest.raises(ValueError, match="tolerance is -1"):
        BackdropClient(f"{engine.url}/v1", processor=processor, tolerance=-1).ask(red_scene(), "q")


def test_several_frames_in_one_question(client, engine, processor):
    answer = client.ask([red_scene(0, 0), red_scene(14, 14), red_scene(shade=200, width=0)], "which?")
    kinds = [group_of(part, processor).kind for part in engine.parts()]
    assert kinds == [BACKGROUND, OBJECT, BACKGROUND, OBJECT, BACKGROUND]
    keys = keys_of(engine)
    assert keys[0] == keys[2] != keys[4]
    assert (answer.patches, answer.patches_reused) == (48, 14)
    assert client.ask((red_scene(0, 0),), "which?").patches == 16


def test_a_frame_can_be_an_image_an_array_a_path_or_text(client, engine, tmp_path):
    frame = red_scene(14, 14)
    frame.save(tmp_path / "frame.png")
    for source in (
        frame,
        np.asarray(frame),
        np.asarray(frame).transpose(2, 0, 1).copy(),
        tmp_path / "frame.png",
        str(tmp_path / "frame.png"),
        data_url(frame),
    ):
        client.ask(source, "q", match=False)
    assert len({tuple(keys_of(engine, number)) for number in range(6)}) == 1
    with pytest.raises(ValueError, match=r"Incorrect image source .*missing.png"):
        client.ask(tmp_path / "missing.png", "q")


def test_a_patch_group_is_taken_as_it_stands(client, engine, processor, tmp_path):
    images = processor.image_processor
    group = images.image_groups([red_scene(14, 14)])[0][1]
    save_group(group_to_image(group, PATCH, images.geometry()), tmp_path / "group.png")
    client.ask(red_scene(14, 14), "q")
    answer = client.ask(tmp_path / "group.png", "q")
    (sent,) = engine.parts()
    assert sent["uuid"] == keys_of(engine, 0)[1] == group_key(group, PATCH, images.geometry())
    assert np.array_equal(group_of(sent, processor).pixels, group.pixels)
    assert answer.text.startswith("None") and answer.patches_reused == 0


def test_a_group_says_how_it_was_made(client, engine, processor):
    client.ask(red_scene(), "q")
    written = json.loads(image_of(engine.parts()[0]).info[METADATA_KEY])
    assert written == {
        "geometry": processor.image_processor.geometry(),
        "image_size": 56,
        "patch_size": 14,
    }


def test_separators_and_placeholder_are_never_generated(client, engine, processor):
    client.ask(red_scene(), "q", logit_bias={"7": 5})
    tokens = [processor.image_token_id, *processor.separator_token_ids]
    assert engine.requests[0]["logit_bias"] == {**{str(token): -100 for token in tokens}, "7": 5}
    assert len(set(tokens)) == 5


def test_the_system_prompt_and_options_are_passed_on(client, engine):
    client.ask(red_scene(), "q", system="be brief", temperature=0.5, seed=3)
    (body,) = engine.requests
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert (body["temperature"], body["seed"]) == (0.5, 3)


def test_messages_can_be_sent_by_another_client(client, engine):
    messages = client.messages(red_scene(14, 14), "what?")
    assert engine.requests == []
    client.openai.chat.completions.create(model="backdrop", messages=messages)
    client.ask(red_scene(14, 14), "what?")
    assert engine.requests[0]["messages"] == engine.requests[1]["messages"] == messages


# ---- cameras


def test_a_camera_forgets_at_the_end_and_shares_nothing(client, engine, processor):
    def shade():
        return int(group_of(engine.parts()[0], processor).pixels[-1, -1, 0])

    client.ask(red_scene(shade=88), "q")
    with client.camera("gate") as gate, client.camera("yard") as yard:
        gate.ask(red_scene(shade=90), "q")
        assert shade() == 90
        yard.ask(red_scene(shade=91), "q")
        assert shade() == 91
        gate.ask(red_scene(28, 28, shade=92), "q")
        assert shade() == 90
        "".join(yard.stream(red_scene(28, 28, shade=92), "q"))
        assert shade() == 91
    matcher = client.preparation.splitter.matcher
    assert matcher.stats()["references"] == 1  # the client's own
    with client.camera("gate") as gate:
        gate.ask(red_scene(shade=92), "q")
        assert shade() == 92
    client.ask(red_scene(shade=92), "q")
    assert shade() == 88


def test_a_camera_forgets_after_an_error_too(client, engine):
    with pytest.raises(openai.BadRequestError), client.camera("gate") as gate:
        gate.ask(red_scene(), "q")
        engine.mode = "400"
        gate.ask(red_scene(), "q")
    assert client.preparation.splitter.matcher.stats()["references"] == 0


def test_clients_of_one_processor_share_nothing(engine, processor):
    clients = [BackdropClient(f"{engine.url}/v1", processor=processor) for _ in range(2)]
    for client in (*clients, *clients):
        answer = client.ask(red_scene(shade=90 + clients.index(client)), "q")
        shade = int(group_of(engine.parts()[0], processor).pixels[-1, -1, 0])
        assert shade == 90 + clients.index(client)
    assert answer.patches_reused == 15  # reported to the client whose frame it was
    assert processor.background_matching is None
    assert processor.image_processor.loaded_detector is not None


# ---- an engine that reads requests differently


def test_an_engine_that_drops_alpha_never_answers(engine, processor):
    engine.sees_alpha = False
    client = BackdropClient(f"{engine.url}/v1", processor=processor)
    for _ in range(2):
        with pytest.raises(EngineMismatchError, match="does not see patch groups.*image_mode") as caught:
            client.ask(red_scene(), "q")
        assert "\n" not in str(caught.value)
        with pytest.raises(EngineMismatchError):
            next(client.stream(red_scene(), "q"))
    assert engine.requests == [] and engine.probes == 4

    async def asynchronous():
        async with AsyncBackdropClient(f"{engine.url}/v1", processor=processor) as client:
            with pytest.raises(EngineMismatchError):
                await client.ask(red_scene(), "q")
            with pytest.raises(EngineMismatchError):
                async for _ in client.stream(red_scene(), "q"):
                    pytest.fail("an answer")

    asyncio.run(asynchronous())
    assert engine.requests == [] and engine.probes == 6
    engine.sees_alpha = True
    assert client.ask(red_scene(), "q").text.endswith("| q")


def test_every_answer_is_counted(client, engine):
    client.ask(red_scene(), "q")
    engine.sees_alpha = False  # as if another engine had been started on the same port
    with pytest.raises(EngineMismatchError, match="read a prompt of"):
        client.ask(red_scene(), "q")
    check_prompt_tokens(3, 3)


def test_the_count_is_that_of_the_processors_own_prompt(client, engine, processor):
    client.connect()
    for frames, system in (
        ([red_scene(0, 0)], None),
        ([red_scene(14, 14), red_scene(shade=10)], "start of it"),
    ):
        messages, split = client.preparation.messages(frames, "what is shown?", system, "", False)
        content = [{"type": "image"}] * len(engine_images(messages)) + [
            {"type": "text", "text": "what is shown?"}
        ]
        own = ([{"role": "system", "content": system}] if system else []) + [
            {"role": "user", "content": content}
        ]
        text = processor.apply_chat_template(own, add_generation_prompt=True)
        inputs = processor(text=text, images=engine_images(messages), add_special_tokens=False)
        items = [item for frame in split for item in frame.items]
        assert prompt_tokens(processor, prompt_text(processor, messages), items) == len(
            inputs["input_ids"][0]
        )


def engine_images(messages: list[dict]) -> list[Image.Image]:
    return [image_of(part) for part in messages[-1]["content"] if part["type"] == "image_url"]


# ---- streams, asyncio, the first request


def test_a_stream_says_what_the_answer_says(client, engine):
    engine.text = "a red bus\u2028of the background \N{BUS} "
    pieces = list(client.stream(red_scene(), "q"))
    assert len(pieces) > 1 and "".join(pieces) == engine.text
    assert client.ask(red_scene(), "q").text == engine.text.strip()


def test_a_stream_that_is_left_ends_at_the_engine_too(client, engine):
    engine.mode = "slow"
    engine.step(1)
    stream = client.stream(red_scene(), "q")
    assert next(stream)
    stream.close()
    wait_until(lambda: engine.cancelled == 1)


def test_asyncio_asks_at_once_and_connects_once(engine, processor):
    async def main():
        async with AsyncBackdropClient(f"{engine.url}/v1", processor=processor) as client:
            asked = [client.ask(red_scene(shade=10 * i), f"question {i}") for i in range(6)]
            answers = await asyncio.gather(*asked)
            async with client.camera("gate") as gate:
                same = await gate.ask(red_scene(shade=0), "again")
                streamed = "".join([piece async for piece in gate.stream(red_scene(shade=0), "again")])
            kept = client.preparation.splitter.matcher.stats()["references"]
            messages = await client.messages(red_scene(shade=0), "again")
            return answers, same, streamed, kept, messages

    answers, same, streamed, kept, messages = asyncio.run(main())
    assert [answer.text.split(" | ")[1] for answer in answers] == [f"question {i}" for i in range(6)]
    by_question = {body["messages"][-1]["content"][-1]["text"]: body for body in engine.requests}
    for i, answer in enumerate(answers):
        parts = by_question[f"question {i}"]["messages"][0]["content"]
        assert answer.text.split(" | ")[0] == parts[0]["uuid"]
    assert engine.probes == 1 and same.text == streamed
    # Shades 10 apart are one background at tolerance 10, but only if the first frame's reference exists by then.
    assert 1 <= kept <= 6 and messages[-1]["content"][-1] == {"type": "text", "text": "again"}


def test_the_model_is_chosen_and_named(engine, processor):
    client = BackdropClient(f"{engine.url}/v1", model="other", processor=processor)
    with pytest.raises(ValueError, match=r"the engine serves \['backdrop'\]; wanted other"):
        client.ask(red_scene(), "q")
    chosen = BackdropClient(f"{engine.url}/v1", model="backdrop", processor=processor)
    assert chosen.ask(red_scene(), "q").prompt_tokens > 16


def test_what_the_engine_refuses_is_openais_error(client, engine):
    engine.modes = ["400", "500"]
    with pytest.raises(openai.BadRequestError, match="refused with 400"):
        client.ask(red_scene(), "q")
    with pytest.raises(openai.InternalServerError):
        client.ask(red_scene(), "q")
    engine.mode = "late death"
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(client.stream(red_scene(), "q"))


def test_the_key_is_given_or_the_environments(engine, processor, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert BackdropClient(engine.url).openai.api_key == "none"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    assert BackdropClient(engine.url).openai.api_key == "sk-environment"
    assert BackdropClient(engine.url, api_key="sk-given").openai.api_key == "sk-given"


def test_the_processor_comes_from_where_the_engine_says_it_serves_from(example_processor):
    """The committed model: its own detector, frames of one background from the made scenes."""
    with FakeEngine(example_processor, name="scenes", root=str(MODEL)) as engine:
        with BackdropClient(f"{engine.url}/v1") as client:
            scenes = [render_scene("phone", 115_000, frame) for frame in (1, 2)]
            answers = [client.ask(scene.image, scene.questions[0].question) for scene in scenes]
        assert engine.requests[0]["model"] == "scenes"
        assert (
            keys_of(engine, 0)[0] == keys_of(engine, 1)[0] and keys_of(engine, 0)[1] != keys_of(engine, 1)[1]
        )
        assert (
            answers[0].patches_reused == 0
            and answers[1].patches_reused > 72
            and answers[1].cached_tokens > 72
        )
        background = group_of(engine.parts(1)[0], example_processor)
        first = np.asarray(scenes[0].image)
        owned = background.pixels.any(axis=-1)
        assert np.array_equal(background.pixels[owned], first[owned])
        assert not engine.mixed_up


# ---- to a gateway


@pytest.fixture
def gateway_stub():
    """A server that a client takes for a gateway, by its mark; (its URL, the bodies that it was sent)."""
    bodies = []

    async def models(request):
        return JSONResponse(
            {"object": "list", "data": [{"id": "backdrop", "object": "model", GATEWAY_MARK: True}]}
        )

    async def chat(request):
        bodies.append(await request.json())
        message = {"role": "assistant", "content": " fine "}
        return JSONResponse(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "backdrop",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
            }
        )

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
    with AppThread(Starlette(routes=routes)) as server:
        yield server.url, bodies


def test_a_gateway_gets_whole_frames(gateway_stub, tmp_path):
    url, bodies = gateway_stub
    frame = red_scene(14, 14)
    frame.save(tmp_path / "frame.png")
    cmyk = Image.new("CMYK", (20, 10), (0, 255, 255, 0))
    cmyk.save(tmp_path / "cmyk.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    frame.resize((40, 20)).save(tmp_path / "turned.png", exif=exif)
    with BackdropClient(f"{url}/v1") as client, client.camera("gate") as gate:
        answer = gate.ask(
            [
                frame,
                np.asarray(frame),
                np.asarray(frame, dtype=np.float64) / 255,
                tmp_path / "frame.png",
                base64.b64encode((tmp_path / "frame.png").read_bytes()).decode(),
                tmp_path / "cmyk.jpg",
                tmp_path / "turned.png",
                "https://example.org/frame.png",
                data_url(frame),
            ],
            "q",
            max_tokens=3,
        )
    (body,) = bodies
    *images, link, inline, text = body["messages"][0]["content"]
    for part in images[:5]:
        assert "uuid" not in part and np.array_equal(np.asarray(image_of(part)), np.asarray(frame))
    assert image_of(images[5]).mode == "RGB" and image_of(images[5]).size == (20, 10)
    red = np.asarray(image_of(images[5]))[5, 10]
    assert red[0] > 200 and red[1] < 60
    assert image_of(images[6]).size == (20, 40)  # upright, as the file is shown
    assert link == {"type": "image_url", "image_url": {"url": "https://example.org/frame.png"}}
    assert inline["image_url"]["url"] == data_url(frame) and text["text"] == "q"
    assert "logit_bias" not in body  # the gateway sets it
    assert (answer.text, answer.prompt_tokens, answer.cached_tokens) == ("fine", 9, None)
    assert (answer.patches, answer.patches_reused) == (0, 0)


def test_a_group_reaches_a_gateway_as_a_group(gateway_stub, processor):
    url, bodies = gateway_stub
    images = processor.image_processor
    group = images.image_groups([red_scene(14, 14)])[0][1]
    with BackdropClient(f"{url}/v1") as client:
        client.ask(group_to_image(group, PATCH, images.geometry()), "q")
    sent = image_of(bodies[0]["messages"][0]["content"][0])
    assert looks_like_group(np.asarray(sent))
    buffer = BytesIO()
    sent.save(buffer, "PNG")
    assert np.array_equal(np.asarray(sent)[..., :3], group.pixels)
