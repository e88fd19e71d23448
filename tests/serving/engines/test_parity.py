"""The served model says what transformers says, token for token, in fp32."""

import asyncio
import base64
from io import BytesIO

import openai
import torch
from PIL import Image
from running import BLOCK, KEYS, MODEL

from backdrop.processing.patch_groups_backdrop import BACKGROUND
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.scenes.world import FAMILIES, render_scene
from backdrop.serving import AsyncBackdropClient, BackdropClient, FrameSplitter
from backdrop.serving.prompts import suppressed_tokens, template_messages

TOKENS = 12
BACKGROUNDS = {"phone": 115_010, "street": 115_011, "panel": 115_012}


def questions():
    """(scene, question) of a few frames of three backgrounds."""
    for family in FAMILIES:
        for frame in range(4):
            scene = render_scene(family, BACKGROUNDS[family], frame)
            for question in scene.questions[:3]:
                yield scene, question


def images_of(messages: list[dict]) -> list[Image.Image]:
    """The images that messages carry."""
    parts = [part for message in messages for part in message["content"] if part["type"] == "image_url"]
    return [Image.open(BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))) for part in parts]


@torch.no_grad()
def transformers_tokens(local, messages: list[dict], images: list[Image.Image], **options) -> list[int]:
    """Greedy tokens of our own model for the same messages."""
    model, processor = local
    text = processor.apply_chat_template(
        template_messages(messages), add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False, **options)
    found = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


async def served_tokens(url: str, requests: list[list[dict]], processor, at_once: int) -> list[list[int]]:
    """The engine's greedy tokens, so many requests at a time."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    gate = asyncio.Semaphore(at_once)

    async def one(messages):
        async with gate:
            found = await client.chat.completions.create(
                model="backdrop",
                messages=messages,
                temperature=0,
                max_tokens=TOKENS,
                logit_bias=suppressed_tokens(processor),
                extra_body={"return_token_ids": True},
            )
            return list(found.choices[0].token_ids)

    try:
        return list(await asyncio.gather(*map(one, requests)))
    finally:
        await client.close()


def without_end(tokens: list[int], processor) -> list[int]:
    end = processor.tokenizer.eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens


def test_groups_in_batches_give_the_tokens_of_transformers(stack, local):
    _, processor = local
    client = BackdropClient(f"{stack.engines[0]}/v1", processor=MODEL, tolerance=0)
    requests = [client.messages(scene.image, question.question) for scene, question in questions()]
    assert any(len(images_of(messages)) == 2 for messages in requests)
    wanted = [transformers_tokens(local, messages, images_of(messages)) for messages in requests]
    for at_once in (1, 8):
        found = asyncio.run(served_tokens(stack.engines[0], requests, processor, at_once))
        for one, other in zip(found, wanted, strict=True):
            assert without_end(one, processor) == without_end(other, processor)


def test_an_ordinary_image_is_one_group(stack, local):
    _, processor = local
    requests, wanted = [], []
    for scene, question in list(questions())[::4]:
        buffer = BytesIO()
        scene.image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question.question},
        ]
        requests.append([{"role": "user", "content": content}])
        wanted.append(transformers_tokens(local, requests[-1], [scene.image], split=False))
    found = asyncio.run(served_tokens(stack.engines[1], requests, processor, 4))
    for one, other in zip(found, wanted, strict=True):
        assert without_end(one, processor) == without_end(other, processor)


def test_the_gateway_answers_as_transformers_does(stack, local):
    _, processor = local
    gateway = BackdropClient(f"{stack.url}/v1", api_key=KEYS["north"])
    splitter = FrameSplitter(BackdropProcessor.from_pretrained(MODEL), tolerance=0)
    for scene, question in list(questions())[1::3]:
        answer = gateway.ask(scene.image, question.question, max_tokens=TOKENS)
        parts = [item.part() for item in splitter.split(scene.image).items]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question.question}]}]
        tokens = transformers_tokens(local, messages, images_of(messages))
        assert answer.text == processor.decode(without_end(tokens, processor)).strip()


def test_the_second_frame_finds_its_background_cached_to_the_block(stack, local):
    _, processor = local
    # Without refreshes a frame that is split again has the same groups.
    client = BackdropClient(
        f"{stack.engines[0]}/v1",
        processor=MODEL,
        tolerance=0,
        matching={"max_overridden": 0.3, "refresh": False},
    )
    for family in FAMILIES:
        first, second = (render_scene(family, 115_500, frame) for frame in (1, 2))
        cold = client.ask(first.image, first.questions[0].question)
        warm = client.ask(second.image, second.questions[0].question)
        assert cold.cached_tokens < BLOCK * 2  # the start of the template at most
        split = client.preparation.splitter.split(second.image)
        assert split.reused and len(split.items) == 2
        messages = client.messages(second.image, "?")
        text = processor.apply_chat_template(template_messages(messages), tokenize=False)
        before = len(processor.tokenizer(text[: text.index("<image>")], add_special_tokens=False).input_ids)
        group = processor.expand_group(split.background.patches, BACKGROUND)
        common = (
            before + len(processor.tokenizer(group, add_special_tokens=False).input_ids) + 1
        )  # [OBJ_START]
        assert warm.cached_tokens == common // BLOCK * BLOCK


def test_async_and_streamed_answers_are_the_same(stack):
    scene = render_scene("panel", 115_600, 3)
    asked = [question.question for question in scene.questions[:4]]
    client = BackdropClient(f"{stack.engines[0]}/v1", processor=MODEL, tolerance=0)
    plain = [client.ask(scene.image, question).text for question in asked]
    assert ["".join(client.stream(scene.image, question)).strip() for question in asked] == plain

    async def together():
        other = AsyncBackdropClient(f"{stack.engines[0]}/v1", processor=MODEL, tolerance=0)
        async with other, other.camera("panel") as camera:
            answers = await asyncio.gather(*(camera.ask(scene.image, question) for question in asked))
            streamed = [piece async for piece in camera.stream(scene.image, asked[0])]
        return [answer.text for answer in answers], "".join(streamed).strip()

    answers, streamed = asyncio.run(together())
    assert answers == plain and streamed == plain[0]


def test_tenants_share_nothing(stack):
    first, second = (render_scene("phone", 115_700, frame) for frame in (1, 2))
    north, south = (BackdropClient(f"{stack.url}/v1", api_key=KEYS[name]) for name in ("north", "south"))
    question = "What time is the alarm set for?"
    assert north.ask(first.image, question).cached_tokens < 2 * BLOCK
    assert north.ask(second.image, question).cached_tokens >= 2 * BLOCK, stack.changes()
    # The same frames of another tenant: nothing is cached.
    assert south.ask(first.image, question).cached_tokens == 0
    assert south.ask(second.image, question).cached_tokens >= 2 * BLOCK, stack.changes()
