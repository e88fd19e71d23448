"""`backdrop bench gpu`, parity: every shortcut against the slow path, on this device."""

import contextlib
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlavaForConditionalGeneration
from transformers.utils import is_flash_attn_2_available

from backdrop.modeling.grouped_vision_backdrop import encode_groups
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration

from .captured import captured_parity
from .contenders import (
    CACHE_BYTES,
    MIN_REUSE,
    TOLERANCE,
    backdrop_processor,
    build_llava,
    llava_processor,
    sharing_backdrop,
)
from .frames import Frame, background_image, draw_frame
from .gpu_run import GpuRun, NoDetector, difference, free
from .planted_detector import PlantedDetector
from .shapes import DTYPES, PROMPT, SHAPES, Shape

PARITY_FRAMES = 8
NEW_TOKENS = 12


def attentions(device: str) -> list[str]:
    """What can be asked for here: SDPA with each of its CUDA kernels, and flash attention where it is installed."""
    if torch.device(device).type != "cuda":
        return ["sdpa"]
    return ["sdpa", "sdpa: flash kernel", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]


@contextlib.contextmanager
def _attention(name: str, dtype: str) -> Iterator[str]:
    """The implementation's name for transformers; inside, SDPA is held to one kernel where the name says so."""
    implementation, _, kernel = name.partition(": ")
    if not kernel:
        yield implementation
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        yield implementation


def parity(run: GpuRun) -> None:
    """Every shortcut against the slow path; a row for each dtype, attention and shape."""
    shapes = ["tiny"] if run.shape == "tiny" else ["tiny", "clip-l+135m"]
    rows = run.results.setdefault("parity", {}).setdefault("rows", [])
    for shape in shapes:
        for dtype in ("float32", "bfloat16"):
            for attention in attentions(run.device):
                if attention != "sdpa" and dtype == "float32":
                    continue  # flash kernels take half precision only
                cell = {"shape": shape, "dtype": dtype, "attention": attention}
                try:
                    cell |= _parity_cell(shape, run.device, dtype, attention)
                except Exception as error:
                    cell["error"] = f"{type(error).__name__}: {error}"[:300]
                rows.append(cell)
                run.write()
                free()
    run.results["parity"]["device_map"] = _device_map_rows(run.device)


@torch.no_grad()
def _parity_cell(shape_name: str, device: str, dtype: str, attention: str) -> dict:
    shape = SHAPES[shape_name]
    torch.manual_seed(0)
    llava = build_llava(shape, device, DTYPES[dtype])
    with _attention(attention, dtype) as implementation:
        llava.set_attn_implementation(implementation)
        return {
            "off against LLaVA, largest difference of logits": _off_difference(llava, shape, device),
            "groups against a block-diagonal mask": _grouping_difference(llava, shape, device)
            if implementation == "sdpa"
            else None,
            **_cache_parity(llava, shape, device),
        }


def parity_frames(shape: Shape, count: int) -> list[Frame]:
    """Frames of one background, with more and more fresh patches."""
    background = background_image(*shape.source, seed=0)
    rng = np.random.default_rng(0)
    return [draw_frame(background, shape, 0.05 + 0.3 * i / count, rng) for i in range(count)]


def _sharing_plain(llava: LlavaForConditionalGeneration) -> BackdropForConditionalGeneration:
    model = sharing_backdrop(llava)
    model.config.separator_token_ids = None
    return model


def _off_difference(llava: LlavaForConditionalGeneration, shape: Shape, device: str) -> float:
    """Unsplit and without separators, Backdrop is LLaVA: the largest difference of logits on the same inputs."""
    model = _sharing_plain(llava)
    processor = llava_processor(shape)
    image = parity_frames(shape, 1)[0].image
    inputs = processor(images=[image], text=[PROMPT], return_tensors="pt").to(device, llava.dtype)
    return difference(llava(**inputs).logits, model(**inputs).logits)


def _grouping_difference(llava: LlavaForConditionalGeneration, shape: Shape, device: str) -> float:
    """Two groups encoded apart, against the whole tower under a block-diagonal mask; relative to the features' size."""
    tower = llava.model.vision_tower
    patches, side = shape.grid**2, shape.vision["image_size"]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, side, side, generator=generator).to(device, llava.dtype).expand(2, -1, -1, -1)
    owner = torch.rand(patches, generator=generator) < 0.3
    mask = torch.stack([~owner, owner]).to(device)
    found = torch.cat(encode_groups(tower, pixels, mask))
    layers = tower.encoder.layers[: len(tower.encoder.layers) - 1]
    wanted = []
    for group in mask:
        hidden = tower.pre_layrnorm(tower.embeddings(pixels[:1]))
        keep = torch.nn.functional.pad(group, (1, 0), value=True)
        same = keep[:, None] == keep[None, :]
        for layer in layers:
            hidden = layer(hidden, same[None, None])
        wanted.append(hidden[0][keep][1:])
    wanted = torch.cat(wanted)
    return difference(found, wanted) / float(wanted.float().abs().max())


def _cache_parity(llava: LlavaForConditionalGeneration, shape: Shape, device: str) -> dict:
    """Cache off, miss and hit on the processor's same output; a batch against its rows alone."""
    detector = PlantedDetector(NoDetector())
    processor = backdrop_processor(shape, detector)
    model = sharing_backdrop(llava)
    processor.enable_background_matching(
        tolerance=TOLERANCE, min_reuse=MIN_REUSE, max_overridden=1 - MIN_REUSE
    )
    frames = parity_frames(shape, PARITY_FRAMES)
    answers: dict[str, list] = {"off": [], "miss": [], "hit": []}
    first: dict[str, list] = {"off": [], "miss": [], "hit": []}
    prepared = []
    for frame in frames:
        detector.plant([frame], processor.image_processor.model_images([frame.image]))
        inputs = processor(images=[frame.image], text=[PROMPT], return_tensors="pt").to(device, llava.dtype)
        prepared.append(inputs)
        for state in ("off", "miss", "hit"):
            if state == "off":
                model.disable_background_cache()
            elif state == "miss":
                model.enable_background_cache(max_bytes=CACHE_BYTES)
            out = model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            answers[state].append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
            first[state].append(out.logits[0][0].float())
    cache = model.background_cache
    assert cache is not None, "enabled above"
    hits = cache.stats()["prefix_hits"]
    model.disable_background_cache()
    detector.plant(frames[:4], processor.image_processor.model_images([frame.image for frame in frames[:4]]))
    batch = processor(
        images=[frame.image for frame in frames[:4]],
        text=[PROMPT] * len(frames[:4]),
        padding=True,
        return_tensors="pt",
    ).to(device, llava.dtype)
    together = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    together = together[:, batch["input_ids"].shape[1] :].tolist()
    captured = captured_parity(model, prepared)
    return {
        "answers": len(frames),
        "prefix hits of the last answer": hits,
        "answers that differ, miss from hit": sum(
            a != b for a, b in zip(answers["miss"], answers["hit"], strict=True)
        ),
        "answers that differ, off from hit": sum(
            a != b for a, b in zip(answers["off"], answers["hit"], strict=True)
        ),
        "answers that differ, batch from single": sum(
            a != b for a, b in zip(together, answers["off"][:4], strict=True)
        ),
        "miss against hit, largest difference of logits": max(
            difference(a, b) for a, b in zip(first["miss"], first["hit"], strict=True)
        ),
        "off against hit, largest difference of logits": max(
            difference(a, b) for a, b in zip(first["off"], first["hit"], strict=True)
        ),
        **captured,
    }


@torch.no_grad()
def _device_map_rows(device: str) -> list[dict]:
    """A folder loaded onto the device whole, and with its tower on the CPU: logits against the CPU's."""
    shape = SHAPES["tiny"]
    model = sharing_backdrop(build_llava(shape, "cpu", torch.float32))
    detector = PlantedDetector(NoDetector())
    processor = backdrop_processor(shape, detector)
    frame = parity_frames(shape, 1)[0]
    detector.plant([frame], processor.image_processor.model_images([frame.image]))
    inputs = processor(images=[frame.image], text=[PROMPT], return_tensors="pt")
    wanted = model(**inputs).logits
    maps = {
        "whole": {"": device},
        "tower on the CPU": {
            "model.vision_tower": "cpu",
            "model.multi_modal_projector": device,
            "model.language_model": device,
            "lm_head": device,
        },
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, device_map in maps.items():
            row: dict = {"device_map": name}
            try:
                loaded = BackdropForConditionalGeneration.from_pretrained(folder, device_map=device_map)
                row["largest difference of logits"] = difference(
                    loaded(**inputs.to(device)).logits.cpu(), wanted
                )
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
    return rows
