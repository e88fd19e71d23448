"""vLLM without a server: `LLM(...)` on an exported folder; prefusion, folded or refused."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from running import BLOCK, MODEL

from backdrop.hub_export.chat_template import chat_template
from backdrop.hub_export.export import export
from backdrop.hub_export.extend import fold_prefusion
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import group_to_image
from backdrop.processing.processing_backdrop import IMAGE_TOKEN, SEPARATOR_TOKENS, BackdropProcessor
from backdrop.scenes.world import render_scene
from backdrop.serving.frames import group_key

OFFLINE = Path(__file__).with_name("offline.py")
TOKENS = 12


def run_offline(
    python: str, folder, requests: list[dict], images: dict, tmp_path
) -> subprocess.CompletedProcess:
    np.savez(tmp_path / "requests.npz", requests=json.dumps(requests), **images)
    command = [
        python,
        str(OFFLINE),
        str(folder),
        str(tmp_path / "requests.npz"),
        str(tmp_path / "answers.json"),
    ]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)


@torch.no_grad()
def greedy(model, processor, text: str, images: list) -> list[int]:
    inputs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
    found = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


def prompt(processor, images: int, question: str) -> str:
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_the_folder_runs_offline_and_reuses_the_background(engine_python, local, tmp_path):
    model, processor = local
    images, requests, wanted = {}, [], []
    splitter = BackdropImageProcessor.from_pretrained(MODEL)
    splitter.enable_background_matching(tolerance=0)
    for frame in (1, 2, 3):
        groups = splitter.image_groups([render_scene("phone", 115_020, frame).image])[0]
        made = [group_to_image(group, splitter.patch_size, splitter.geometry()) for group in groups]
        names = [f"f{frame}g{i}" for i in range(len(made))]
        images |= {name: np.asarray(image) for name, image in zip(names, made, strict=True)}
        text = prompt(processor, len(made), "What time is the alarm set for?")
        uuids = [group_key(group, splitter.patch_size, "") for group in groups]
        requests.append({"prompt": text, "images": names, "uuids": uuids})
        wanted.append(greedy(model, processor, text, made))
    done = run_offline(engine_python, MODEL, requests, images, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "answers.json").read_text())
    assert [answer["tokens"] for answer in found] == wanted
    assert found[0]["cached"] == 0
    assert all(answer["cached"] >= 2 * BLOCK for answer in found[1:])


def tiny_with_prefusion() -> tuple[BackdropForConditionalGeneration, BackdropProcessor]:
    """A tiny model whose prefusion layers do something."""
    tokenizer = tiny.tokenizer()
    BackdropProcessor.add_tokens(tokenizer)
    image_id, *separators = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, *SEPARATOR_TOKENS])
    model = tiny.backdrop_model(
        text_config=tiny.text_config(vocab_size=320, num_attention_heads=2, hidden_size=64),
        image_token_id=image_id,
        separator_token_ids=separators,
        num_prefusion_layers=2,
    ).eval()
    torch.manual_seed(1)
    for name, parameter in model.model.prefusion.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
        assert name
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    images = BackdropImageProcessor(size={"shortest_edge": tiny.SIDE}, crop_size=side, patch_size=tiny.PATCH)
    return model, BackdropProcessor(images, tokenizer, chat_template=chat_template())


def test_prefusion_is_folded_or_refused(engine_python, tmp_path):
    model, processor = tiny_with_prefusion()
    export(model, processor, tmp_path / "unfolded")
    rng = np.random.default_rng(0)
    image = np.dstack(
        [
            rng.integers(0, 256, (tiny.SIDE, tiny.SIDE, 3), dtype=np.uint8),
            np.full((tiny.SIDE, tiny.SIDE), 253, np.uint8),
        ]
    )
    text = prompt(processor, 1, "what is shown?")
    before = greedy(model, processor, text, [image])
    fold_prefusion(model)
    assert greedy(model, processor, text, [image]) == before
    export(model, processor, tmp_path / "folded")
    requests = [{"prompt": text, "images": ["a"], "uuids": ["a"]}]
    refused = run_offline(engine_python, tmp_path / "unfolded", requests, {"a": image}, tmp_path)
    assert refused.returncode and "--fold-prefusion" in refused.stderr + refused.stdout
    done = run_offline(engine_python, tmp_path / "folded", requests, {"a": image}, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "answers.json").read_text())[0]["tokens"] == before


pytestmark = pytest.mark.slow
