"""Time to first token against transformers' own LLaVA: same weights, same prompt, same frames, one process.

    backdrop bench ttft --shapes clip-l+135m --batches 1,4 --fresh-shares 0.05,0.15,0.3 --json ttft.json

A call is timed from decoded images (PIL, RGB) to the first token: detector, matching, preprocessing, tokenising and
`generate(max_new_tokens=1)` are inside. The modes take turns within each repeat, on the same frames:

- `llava`: `LlavaForConditionalGeneration` with the processor that `AutoProcessor` builds;
- `cold`: Backdrop without cache and matching, the detector on every image;
- `tokens`: matching, and a cache of vision tokens;
- `tokens+prefix`: matching, and a cache of vision tokens and language-model prefixes.

All weights are random, and so the detector finds nothing of use: a real YOLOv8n network runs at the model's geometry
wherever a detector is due, then the frame's planted box is returned in place of its answer.

`flop_ideal_ratio` is what FLOPs alone would allow: those of all that LLaVA runs for the first token, over those that
the mode cannot do without. Above it no implementation can get by saving work; `fraction_of_ideal` says how near it is.

Nothing is compiled: torch.compile would take the language model of one mode through another path than the others'.

Shapes: `S` image side, `p` patch side, `P` patches, `N` images of a call.
"""

import gc
import importlib.metadata
import importlib.util
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, median

import numpy as np
import psutil
import torch
import transformers
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from backdrop.hub_export.convert import VICUNA_SYSTEM_PROMPT
from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.detector_backdrop import Detections, ObjectDetector
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import OBJECT
from backdrop.processing.processing_backdrop import IMAGE_TOKEN, SEPARATOR_TOKENS, BackdropProcessor

from .report import machine, versions, write_atomically, write_json_atomically

MODES = ("llava", "cold", "tokens", "tokens+prefix")
MATCHED_MODES = MODES[2:]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUESTION = "How many people are waiting near the entrance, and what is the closest one holding right now?"
PROMPT = f"<s>{VICUNA_SYSTEM_PROMPT} USER: {IMAGE_TOKEN}\n{QUESTION} ASSISTANT:"
MAX_BACKGROUNDS = 4  # cameras of a batch: a batch of 16 is 4 cameras with 4 frames each
CACHE_BYTES = 8 * 2**30  # a bound that is never reached: eviction is not what is measured
TOLERANCE, MIN_REUSE = 10, 0.3
MISS_REPEATS = 3  # storing calls are slow, and only the break-even needs them


@dataclass(frozen=True)
class Shape:
    """Sizes of tower and language model, and the source images `(width, height)` that they are fed."""

    vision: dict
    text: dict
    source: tuple[int, int]

    def llava_config(self, attention: str | None = None) -> LlavaConfig:
        """LLaVA's configuration; the placeholder's id is the benchmark tokenizer's."""
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**self.vision),
            text_config=LlamaConfig(
                max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, **self.text
            ),
            image_token_index=build_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN),
            tie_word_embeddings=self.text.get("tie_word_embeddings", False),
            attn_implementation=attention,
        )

    @property
    def grid(self) -> int:
        """Patches along a side; `P` is its square."""
        return self.vision["image_size"] // self.vision["patch_size"]


_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# Every source is 1 / 0.7 of the model's side high, so that resizing is paid and patches map to whole pixels.
SHAPES = {
    "tiny": Shape(
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        text={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
        },
        source=(100, 80),
    ),
    "clip-l+135m": Shape(
        vision=_CLIP_L,
        text={  # SmolLM2-135M
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        source=(640, 480),
    ),
    "llava-1.5-7b": Shape(
        vision=_CLIP_L,
        text={
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
        },
        source=(640, 480),
    ),
}


# ---- frames


@dataclass(frozen=True)
class Frame:
    """`image` (PIL, RGB), the patches `[P]` bool that differ from the background, the box around them (xyxy, model
    pixels) or None."""

    image: Image.Image
    changed: np.ndarray
    box: tuple[float, float, float, float] | None


def background_image(width: int, height: int, seed: int) -> Image.Image:
    """Something like a photo: smooth colours, edges and fine texture, all in middle greys (90-165)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = rng.uniform(0, width), rng.uniform(0, height)
        box = (left, top, left + rng.uniform(0.05, 0.3) * width, top + rng.uniform(0.05, 0.3) * height)
        draw.rectangle(box, outline=tuple(rng.integers(0, 256, 3).tolist()), width=max(1, height // 120))
    texture = rng.normal(0, 5, (height, width, 3))
    array = 90 + np.asarray(image) * (75 / 255) + texture
    return Image.fromarray(array.clip(90, 165).astype(np.uint8))


def draw_frame(background: Image.Image, shape: Shape, fresh_share: float, rng: np.random.Generator) -> Frame:
    """The background with one object that changes exactly `round(fresh_share * P)` patches at the model's geometry.

    The object is a rectangle whose last row may be shorter. It stays inside its patches by more than the reach of the
    resampling filter, and is darker or brighter than any background by 60 levels: no patch changes by accident and
    none is missed. Place, brightness and texture come from `rng`.
    """
    grid, patch, side = shape.grid, shape.vision["patch_size"], shape.vision["image_size"]
    count = round(fresh_share * grid * grid)
    changed = np.zeros((grid, grid), dtype=bool)
    if not count:
        return Frame(background, changed.reshape(-1), None)
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    top, left = rng.integers(0, grid - rows + 1), rng.integers(0, grid - columns + 1)
    cells = np.arange(rows * columns).reshape(rows, columns) < count
    changed[top : top + rows, left : left + columns] = cells

    width, height = background.size
    scale = side / height  # the shortest edge becomes S, the middle is cut out
    x = ((np.arange(width) + 0.5) * scale - (width * scale - side) / 2) // patch
    y = ((np.arange(height) + 0.5) * scale) // patch
    inside = (x >= 0) & (x < grid)
    mask = changed[y.astype(int)][:, x.clip(0, grid - 1).astype(int)] & inside  # [height, width]
    # 3 pixels from every border: bicubic resampling to 0.7 reaches 2.9 source pixels from a pixel's centre.
    mask = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(7))) > 0
    darkest = rng.choice([0, 225])
    texture = darkest + rng.integers(0, 31, (height, width, 3))
    image = np.where(mask[..., None], texture, np.asarray(background)).astype(np.uint8)
    box = (left * patch + 3, top * patch + 3, (left + columns) * patch - 3, (top + rows) * patch - 3)
    return Frame(Image.fromarray(image), changed.reshape(-1), tuple(float(edge) for edge in box))


# ---- tokenizer, detector, models


@lru_cache(maxsize=1)
def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the prompt: about one token a word, as a real tokenizer gives. No file, no network."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([PROMPT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    BackdropProcessor.add_tokens(tokenizer)
    return tokenizer


class PlantedDetector:
    """Runs a detector for its time, and answers with planted boxes in place of what random weights find."""

    def __init__(self, detector: ObjectDetector):
        self._detector = detector
        self._boxes: list = []

    def plant(self, frames: Sequence[Frame]) -> None:
        """The images of the next call to `detect`, in order."""
        self._boxes = [frame.box for frame in frames]

    def detect(self, images: Sequence[np.ndarray], **options) -> list[Detections]:
        """As `ObjectDetector.detect`."""
        self._detector.detect(images, **options)
        if len(images) != len(self._boxes):
            raise RuntimeError(
                f"The detector got {len(images)} images; wanted the {len(self._boxes)} planted."
            )
        return [
            Detections(
                xyxy=np.array([] if box is None else [box], dtype=np.float32).reshape(-1, 4),
                confidence=np.full(int(box is not None), 0.9, dtype=np.float32),
                class_id=np.zeros(int(box is not None), dtype=np.int64),
                names=self._detector.names,
            )
            for box in self._boxes
        ]


def build_yolo(device: str) -> ObjectDetector:
    """YOLOv8n with random weights, from the description that ultralytics ships; nothing is downloaded."""
    found = importlib.util.find_spec("ultralytics")
    if found is None:
        raise ImportError(
            "The benchmark runs a detector, but ultralytics is not installed: pip install ultralytics"
        )
    description = Path(found.origin).parent / "cfg" / "models" / "v8" / "yolov8.yaml"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "yolov8n.yaml")  # the scale, n, is read from the file's name
        shutil.copyfile(description, path)
        return ObjectDetector.from_name_or_path(str(path), device=device)


def build_detector(device: str) -> PlantedDetector:
    """The network of `build_yolo`, and planted answers."""
    return PlantedDetector(build_yolo(device))


def build_llava(shape: Shape, device: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """LLaVA with random weights, built where it will run."""
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(shape.llava_config(), dtype=dtype)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    return model.eval().requires_grad_(False)


def sharing_backdrop(llava: LlavaForConditionalGeneration) -> BackdropForConditionalGeneration:
    """A Backdrop model on LLaVA's own weights: no tensor is copied."""
    tokenizer = build_tokenizer()
    config = BackdropConfig(
        vision_config=llava.config.vision_config,
        text_config=llava.config.text_config,
        image_token_id=llava.config.image_token_id,
        separator_token_ids=tokenizer.convert_tokens_to_ids(list(SEPARATOR_TOKENS)),
        projector_hidden_act=llava.config.projector_hidden_act,
        vision_feature_layer=llava.config.vision_feature_layer,
        vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
        tie_word_embeddings=llava.config.tie_word_embeddings,
        trained_on_groups=True,
    )
    with torch.device("meta"):
        model = BackdropForConditionalGeneration(config)
    theirs = llava.model
    pairs = (
        (model.model.vision_tower, theirs.vision_tower),
        (model.model.multi_modal_projector, theirs.multi_modal_projector),
        (model.model.language_model, theirs.language_model),
        (model.lm_head, llava.lm_head),
    )
    # Tensors, not modules: a hook that transformers hangs on LLaVA's must not run in ours. And not by state dict,
    # which lacks the buffers that are never saved (rotary frequencies).
    for own, other in pairs:
        modules = dict(other.named_modules())
        for name, module in own.named_modules():
            module._parameters.update(modules[name]._parameters)
            module._buffers.update(modules[name]._buffers)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise RuntimeError(
            f"{len(missing)} tensors have no weights in LLaVA ({missing[0]}); wanted all shared."
        )
    model.generation_config = llava.generation_config
    return model.eval().requires_grad_(False)


def llava_processor(shape: Shape) -> LlavaProcessor:
    """What `AutoProcessor` makes of a LLaVA folder of this shape, with its default image backend."""
    side, patch = shape.vision["image_size"], shape.vision["patch_size"]
    own = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        build_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        own.save_pretrained(folder)
        return AutoProcessor.from_pretrained(folder)


def backdrop_processor(shape: Shape, detector: PlantedDetector) -> BackdropProcessor:
    """Backdrop's processor with its defaults and this detector."""
    side = shape.vision["image_size"]
    image_processor = BackdropImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        patch_size=shape.vision["patch_size"],
    )
    image_processor.set_detector(detector)
    return BackdropProcessor(image_processor, build_tokenizer())


def needed_bytes(shape: Shape, dtype: torch.dtype, batch: int) -> int:
    """What a run needs, roughly: the weights, and keys and values of a batch, stored, joined and in use."""
    with torch.device("meta"):
        parameters = LlavaForConditionalGeneration(shape.llava_config()).num_parameters()
    text = LlamaConfig(**shape.text)
    columns = 2 * shape.grid**2 + 100
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * columns * batch
    return round((1.1 * parameters + 3 * cache) * dtype.itemsize)


def _check_memory(name: str, device: str, dtype: torch.dtype, batch: int) -> None:
    needed = needed_bytes(SHAPES[name], dtype, batch)
    free = torch.cuda.mem_get_info(device)[0] if _is_cuda(device) else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"Shape {name} in {str(dtype).removeprefix('torch.')} at batch {batch} needs about "
            f"{needed / 2**30:.1f} GiB on {device}, but {free / 2**30:.1f} GiB are free; wanted a smaller shape, batch "
            "or dtype, or another device."
        )


# ---- FLOPs


@lru_cache(maxsize=1)
def _meta_llava(name: str) -> LlavaForConditionalGeneration:
    with torch.device("meta"):  # eager: its attention is made of counted matrix products
        return LlavaForConditionalGeneration(SHAPES[name].llava_config("eager")).eval()


@torch.no_grad()
def _counted(run: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


@lru_cache
def stock_vision_flops(name: str) -> int:
    """Of LLaVA's whole tower (all its layers, as it runs them) and projector on one image."""
    model, side = _meta_llava(name).model, SHAPES[name].vision["image_size"]
    pixels = torch.empty(1, 3, side, side, device="meta")
    return _counted(lambda: model.get_image_features(pixel_values=pixels))


@lru_cache
def group_flops(name: str, patches: int) -> int:
    """Of one group: its own patches' embeddings, the layers up to the feature layer, and the projector."""
    model, shape = _meta_llava(name).model, SHAPES[name]
    tower, side = model.vision_tower, shape.vision["image_size"]
    pixels = torch.empty(1, 3, side, side, device="meta")
    embedding = _counted(lambda: tower.embeddings(pixels)) * patches // shape.grid**2
    depth = shape.vision["num_hidden_layers"] + 1 + model.config.vision_feature_layer
    hidden = torch.empty(1, 1 + patches, shape.vision["hidden_size"], device="meta")

    def encode():
        states = hidden
        for layer in tower.encoder.layers[:depth]:
            states = layer(states, None)
        model.multi_modal_projector(states[:, 1:])

    return embedding + _counted(encode)


@lru_cache
def text_flops(name: str, seen: int, new: int) -> int:
    """Of the language model on `new` columns behind `seen` cached ones, and of its head on the last column."""
    model, width = _meta_llava(name), SHAPES[name].text["hidden_size"]
    columns = torch.empty(1, seen + new, width, device="meta")
    cache = DynamicCache()

    def run(part):
        states = model.model.language_model(inputs_embeds=part, past_key_values=cache, use_cache=True)
        model.lm_head(states.last_hidden_state[:, -1:])

    with torch.no_grad():
        if seen:
            run(columns[:, :seen])
    return _counted(lambda: run(columns[:, seen:]))


@dataclass(frozen=True)
class Prompt:
    """One row of what a processor gave: columns, columns up to the background's end (0: none), patches by group."""

    columns: int
    prefix: int
    group_patches: tuple[int, ...]
    object_patches: int


def _prompts(inputs: dict) -> list[Prompt]:
    """The rows of a call of Backdrop's processor."""
    image_id, *_, bg_end = build_tokenizer().convert_tokens_to_ids([IMAGE_TOKEN, *SEPARATOR_TOKENS[:2]])
    patches, kinds = inputs["patch_mask"].sum(-1).tolist(), inputs["group_kind"].tolist()
    prompts, g = [], 0
    for ids, attended in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[attended.bool()].tolist()
        first, left = g, ids.count(image_id)
        while left:
            left -= patches[g]
            g += 1
        objects = sum(patches[i] for i in range(first, g) if kinds[i] == OBJECT)
        prefix = ids.index(bg_end) + 1 if bg_end in ids else 0
        prompts.append(Prompt(len(ids), prefix, tuple(patches[first:g]), objects))
    return prompts


def needed_flops(name: str, mode: str, prompts: Sequence[Prompt]) -> int:
    """The least that a mode of Backdrop has to compute for these rows on a known background."""
    total = 0
    for prompt in prompts:
        if mode == "cold":
            total += sum(group_flops(name, patches) for patches in prompt.group_patches)
        elif prompt.object_patches:
            total += group_flops(name, prompt.object_patches)
        seen = prompt.prefix if mode == "tokens+prefix" else 0
        total += text_flops(name, seen, prompt.columns - seen)
    return total


# ---- timing


@dataclass(frozen=True)
class Contender:
    """One mode: model, processor, and the detector that the processor runs (None: it has none)."""

    mode: str
    model: torch.nn.Module
    processor: LlavaProcessor | BackdropProcessor
    detector: PlantedDetector | None

    def first_token(self, frames: Sequence[Frame]) -> tuple[float, dict]:
        """Seconds from the images to the first token of every row, and the model's inputs."""
        if self.detector is not None:
            self.detector.plant(frames)
        images = [frame.image for frame in frames]
        device = self.model.device
        _synchronize(device)
        started = time.perf_counter()
        inputs = self.processor(images=images, text=[PROMPT] * len(images), padding=True, return_tensors="pt")
        inputs = inputs.to(device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        tokens[:, -1].tolist()  # a token is there when the CPU can read it
        _synchronize(device)
        return time.perf_counter() - started, inputs

    def store(self, backgrounds: Sequence[Frame]) -> float:
        """Forgets all backgrounds and answers about these, which stores them; seconds."""
        self.model.background_cache.clear()
        self.processor.background_matching.clear()
        return self.first_token(backgrounds)[0]


@dataclass(frozen=True)
class Bench:
    """The four modes of one shape on one device, and the detector by itself."""

    shape_name: str
    device: str
    dtype: str
    contenders: dict[str, Contender]
    detector: PlantedDetector

    def detector_seconds(self, frames: Sequence[Frame]) -> float:
        """Seconds of the detector alone on images at the model's geometry."""
        processor = self.contenders["cold"].processor.image_processor
        images = processor.model_images([frame.image for frame in frames])
        self.detector.plant(frames)
        _synchronize(self.device)
        started = time.perf_counter()
        self.detector.detect(images)
        _synchronize(self.device)
        return time.perf_counter() - started


def build_bench(shape_name: str, device: str, dtype: str) -> Bench:
    """Models on one set of weights, and a processor for each mode."""
    shape = SHAPES[shape_name]
    llava = build_llava(shape, device, DTYPES[dtype])
    detector = build_detector(device)
    contenders = {"llava": Contender("llava", llava, llava_processor(shape), None)}
    for mode in MODES[1:]:
        model, processor = sharing_backdrop(llava), backdrop_processor(shape, detector)
        if mode in MATCHED_MODES:
            model.enable_background_cache(max_bytes=CACHE_BYTES, prefixes=mode == "tokens+prefix")
            processor.enable_background_matching(
                tolerance=TOLERANCE,
                min_reuse=MIN_REUSE,
                max_overridden=1 - MIN_REUSE,  # so that min_reuse alone decides
                detect="on_miss",
            )
        contenders[mode] = Contender(mode, model, processor, detector)
    return Bench(shape_name, device, dtype, contenders, detector)


def _hit_counts(contender: Contender) -> dict[str, int]:
    """Counters of a matched mode's cache and matcher."""
    stats = contender.model.background_cache.stats()
    counts = {name: stats[name] for name in ("tokens_hits", "tokens_misses", "prefix_hits", "prefix_misses")}
    return {**counts, "matches": contender.processor.background_matching.stats()["matches"]}


def _hit_seconds(contender: Contender, frames: Sequence[Frame], backgrounds: int) -> tuple[float, dict]:
    """As `first_token`, for a matched mode.

    Raises:
        RuntimeError: a background was not known, or prefixes were used where they are off.
    """
    before = _hit_counts(contender)
    seconds, inputs = contender.first_token(frames)
    after = _hit_counts(contender)
    grew = {name: after[name] - before[name] for name in after}
    # A background that comes twice in a batch may be looked up once.
    wanted = {"tokens": backgrounds, "prefix": backgrounds if contender.mode == "tokens+prefix" else 0}
    problems = [
        f"{grew[f'{kind}_hits']} {kind} hits and {grew[f'{kind}_misses']} misses, wanted {least or 'no'} hits and no misses"
        for kind, least in wanted.items()
        if grew[f"{kind}_misses"] or grew[f"{kind}_hits"] < least or (grew[f"{kind}_hits"] and not least)
    ]
    if grew["matches"] != len(frames):
        problems.append(f"{grew['matches']} frames matched, wanted {len(frames)}")
    if problems:
        raise RuntimeError(f"Mode {contender.mode}, batch {len(frames)}: {'; '.join(problems)}.")
    return seconds, inputs


def run_cell(bench: Bench, batch: int, fresh_share: float, repeats: int) -> list[dict]:
    """One row a mode; `repeats` timed calls of each after one that warms up, the modes taking turns.

    Raises:
        RuntimeError: a timed frame was not a hit, or its fresh patches are not those that were drawn.
    """
    shape = SHAPES[bench.shape_name]
    distinct = min(batch, MAX_BACKGROUNDS)
    backgrounds = [background_image(*shape.source, seed=seed) for seed in range(distinct)]
    nothing = np.zeros(shape.grid**2, dtype=bool)
    empty = [Frame(backgrounds[row % distinct], nothing, None) for row in range(batch)]
    names = (*MODES, *(f"miss {mode}" for mode in MATCHED_MODES), "detector")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    stored_bytes, fresh_patches, inputs = dict.fromkeys(MODES, 0), [], {}
    for repeat in range(repeats + 1):
        rng = np.random.default_rng([batch, round(1000 * fresh_share), repeat])
        frames = [draw_frame(backgrounds[row % distinct], shape, fresh_share, rng) for row in range(batch)]
        took = {"detector": bench.detector_seconds(frames)}
        for mode in MATCHED_MODES if repeat <= MISS_REPEATS else ():
            contender = bench.contenders[mode]
            took[f"miss {mode}"] = contender.store(empty)
            stored_bytes[mode] = contender.model.background_cache.stats()["bytes"] // distinct
        # No mode always runs behind the same one.
        for mode in MODES[repeat % len(MODES) :] + MODES[: repeat % len(MODES)]:
            contender = bench.contenders[mode]
            if mode in MATCHED_MODES:
                took[mode], inputs[mode] = _hit_seconds(contender, frames, distinct)
                fresh_patches += _checked_fresh(mode, inputs[mode], frames)
            else:
                took[mode], inputs[mode] = contender.first_token(frames)
        if repeat:
            for name, value in took.items():
                seconds[name].append(value)
    ideals = _flop_ideals(bench.shape_name, inputs)
    overhead = _paired(seconds["cold"], np.add(seconds["llava"], seconds["detector"]))
    rows = []
    for mode in MODES:
        ratio = _paired(seconds["llava"], seconds[mode])
        rows.append(
            {
                "shape": bench.shape_name,
                "device": bench.device,
                "dtype": bench.dtype,
                "batch": batch,
                "fresh_share": fresh_share,
                "mode": mode,
                "median_s": median(seconds[mode]),
                "p95_s": float(np.percentile(seconds[mode], 95)),
                "ratio_to_llava": ratio,
                "flop_ideal_ratio": ideals[mode],
                "fraction_of_ideal": ratio / ideals[mode],
                "bytes_per_background": stored_bytes[mode],
                "measured_fresh_share": mean(fresh_patches) / shape.grid**2,
                "break_even_reuses": _break_even(seconds, mode),
                "miss_s": median(seconds[f"miss {mode}"]) if mode in MATCHED_MODES else None,
                "detector_s": median(seconds["detector"]),
                "cold_over_llava_plus_detector": overhead if mode == "cold" else None,
                "repeats": repeats,
                # As timed, in order: entry i of every mode is one repeat, so that a disturbed one shows.
                "seconds": seconds[mode],
            }
        )
    return rows


def _checked_fresh(mode: str, inputs: dict, frames: Sequence[Frame]) -> list[int]:
    """Fresh patches of each row, which must be as many as were drawn."""
    fresh = [prompt.object_patches for prompt in _prompts(inputs)]
    drawn = [int(frame.changed.sum()) for frame in frames]
    if fresh != drawn:
        raise RuntimeError(f"Mode {mode}: {fresh} patches were fresh; wanted the {drawn} that were drawn.")
    return fresh


def _flop_ideals(name: str, inputs: dict[str, dict]) -> dict[str, float]:
    """LLaVA's FLOPs over the least that each mode needs, for the calls that these inputs are."""
    columns = inputs["llava"]["attention_mask"].sum(-1).tolist()
    llava = sum(stock_vision_flops(name) + text_flops(name, 0, length) for length in columns)
    return {"llava": 1.0} | {
        mode: llava / needed_flops(name, mode, _prompts(inputs[mode])) for mode in MODES[1:]
    }


def _paired(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over repeats of the ratio within each."""
    return float(np.median(np.divide(numerators, denominators)))


def _break_even(seconds: dict[str, list[float]], mode: str) -> float | None:
    """Reuses that pay back what a storing call costs beyond LLaVA's; None: they never do."""
    if mode not in MATCHED_MODES:
        return 0.0
    llava, hit, miss = (median(seconds[name]) for name in ("llava", mode, f"miss {mode}"))
    if miss <= llava:
        return 0.0
    return (miss - llava) / (llava - hit) if hit < llava else None


# ---- the whole run


def run_ttft(
    shapes: Sequence[str],
    batches: Sequence[int],
    fresh_shares: Sequence[float],
    repeats: int,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    markdown_path: Path | None = None,
) -> list[dict]:
    """Times every cell (shape, batch, fresh share) in all modes.

    Args:
        shapes: names in `SHAPES`.
        batches: images of a call, `N`; up to 4 of them have backgrounds of their own.
        fresh_shares: share of the patches that differ from the background, 0 to 0.7.
        repeats: timed calls of each mode and cell, after one that warms up.
        device: "cpu", "cuda" or "cuda:0".
        dtype: "float32", "bfloat16" or "float16".
        threads: of torch on the CPU; None: torch's own choice.
        json_path: list of rows, written after every cell; cells that it holds already are not run again.
        plot_path, markdown_path: made from the rows alone, see `render_plot` and `render_markdown`.

    Returns:
        One row per cell and mode: those of `json_path`, the new ones last.

    Raises:
        ValueError: an argument is out of its range, or the memory is too small for a shape.
    """
    _check(shapes, batches, fresh_shares, repeats, device, dtype)
    if plot_path is not None:
        _pyplot()  # rather now than after an hour
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    rows = _read_rows(json_path)
    done = {_cell_key(row) for row in rows}
    cells = [(s, device, dtype, b, f, repeats) for s in shapes for b in batches for f in fresh_shares]
    origin = {"machine": machine(device), "versions": versions(), "command": _command()}
    bench = None
    with tqdm(total=len(cells), unit="cell", file=sys.stderr) as progress:
        for cell in cells:
            name, batch, fresh_share = cell[0], cell[3], cell[4]
            if cell not in done:
                if bench is None or bench.shape_name != name:
                    bench = None  # before the next one is built: two do not fit
                    gc.collect()
                    if _is_cuda(device):
                        torch.cuda.empty_cache()
                    _check_memory(name, device, DTYPES[dtype], max(batches))
                    bench = build_bench(name, device, dtype)
                new = run_cell(bench, batch, fresh_share, repeats)
                rows += [{**row, **origin} for row in new]
                done.add(cell)
                _write_json(json_path, rows)
                tqdm.write(_summary(new), file=sys.stderr)
            progress.update()
    if markdown_path is not None:
        write_atomically(markdown_path, render_markdown(rows))
    if plot_path is not None:
        render_plot(rows, plot_path)
    return rows


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _check(shapes, batches, fresh_shares, repeats, device, dtype) -> None:
    for name in shapes:
        if name not in SHAPES:
            raise ValueError(f"shape is {name!r}; wanted one of {', '.join(SHAPES)}.")
    for batch in batches:
        if batch < 1:
            raise ValueError(f"batch is {batch}; wanted 1 or more images.")
    for share in fresh_shares:
        if not 0 <= share <= 1 - MIN_REUSE:
            raise ValueError(
                f"fresh_share is {share}; wanted 0 to {1 - MIN_REUSE:g}: a match reuses {MIN_REUSE:g} at least."
            )
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; wanted 1 or more.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; wanted one of {', '.join(DTYPES)}.")
    if _is_cuda(device) and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no CUDA device; wanted 'cpu'.")


def _is_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def _synchronize(device: str | torch.device) -> None:
    if _is_cuda(device):
        torch.cuda.synchronize(device)


def _cell_key(row: dict) -> tuple:
    return tuple(row[name] for name in ("shape", "device", "dtype", "batch", "fresh_share", "repeats"))


def _read_rows(path: Path | None) -> list[dict]:
    if path is None or not Path(path).exists():
        return []
    try:
        rows = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no JSON ({error}); wanted a list of benchmark rows, or no file."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "fresh_share" in row for row in rows):
        raise ValueError(f"{path} holds something else; wanted a list of benchmark rows, or no file.")
    return rows


def _write_json(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        write_json_atomically(path, rows)


def _summary(rows: list[dict]) -> str:
    first = rows[0]
    times = ", ".join(
        f"{row['mode']} {_seconds(row['median_s'])} ({row['ratio_to_llava']:.2f}x)" for row in rows
    )
    return f"{first['shape']} batch {first['batch']} fresh {first['fresh_share']:.0%}: {times}"


# ---- pictures of the rows


def render_markdown(rows: list[dict]) -> str:
    """The rows as tables, one per shape, device, dtype and batch. A pure function of the rows."""
    lines = ["# Time to first token", ""]
    header = (
        "| fresh patches | mode | median | p95 | faster than LLaVA | FLOP ideal | of the ideal | MiB per background "
        "| break-even reuses | cold / (LLaVA + detector) |"
    )
    for key in _panels(rows):
        panel = _panel_rows(rows, key)
        lines += [f"## {_panel_title(key)}", "", header, "|" + "---:|" * 10]
        for row in panel:
            stores = row["mode"] in MATCHED_MODES
            break_even = "never" if row["break_even_reuses"] is None else f"{row['break_even_reuses']:.1f}"
            cold = row["cold_over_llava_plus_detector"]
            cells = [
                f"{row['measured_fresh_share']:.1%}",
                row["mode"],
                _seconds(row["median_s"]),
                _seconds(row["p95_s"]),
                f"{row['ratio_to_llava']:.2f}x",
                f"{row['flop_ideal_ratio']:.2f}x",
                f"{row['fraction_of_ideal']:.0%}",
                f"{row['bytes_per_background'] / 2**20:.3g}" if stores else "",
                break_even if stores else "",
                "" if cold is None else f"{cold:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *_origins(panel), ""]
    return "\n".join(lines)


def _origins(rows: list[dict]) -> list[str]:
    """How the rows were made, each way once."""
    ways = []
    for row in rows:
        hardware = ", ".join(f"{name} {value}" for name, value in row["machine"].items())
        software = ", ".join(f"{name} {value}" for name, value in row["versions"].items())
        way = f"{row['repeats']} repeats; {hardware}; {software}; `{row['command']}`"
        if way not in ways:
            ways.append(way)
    return ways


def render_plot(rows: list[dict], path: Path) -> None:
    """How much faster than LLaVA each mode is over the fresh share, one panel per shape and batch, as a picture.

    A pure function of the rows. Dashed lines: what FLOPs alone would allow. All panels have the same axes.
    """
    if not rows:
        raise ValueError("There are 0 rows to plot; wanted those of one cell at least.")
    plt = _pyplot()
    keys = _panels(rows)
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    width, height = max(6.4, 4.6 * columns), 3.9 * lines + 1.1
    figure, grid = plt.subplots(
        lines, columns, figsize=(width, height), squeeze=False, sharex=True, sharey=True
    )
    # Orange: everything is encoded freshly. Blue: the background is reused, the darker the more of it.
    styles = {
        "cold": ("#f0841e", "nothing reused"),
        "tokens": ("#7fb0e6", "vision tokens reused"),
        "tokens+prefix": ("#1f5aa6", "prefix reused"),
    }
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    for axes, key in zip(grid.flat, keys, strict=False):
        panel = _panel_rows(rows, key)
        for mode, (colour, words) in styles.items():
            points = [row for row in panel if row["mode"] == mode]
            x = [100 * row["measured_fresh_share"] for row in points]
            measured, ideal = (
                [row[name] for row in points] for name in ("ratio_to_llava", "flop_ideal_ratio")
            )
            axes.plot(x, measured, "o-", color=colour, label=words)
            style = {"alpha": 0.6, "markersize": 5, "linewidth": 1.2}
            axes.plot(x, ideal, "x--", color=colour, label=f"{words}: FLOP ideal", **style)
        axes.axhline(1, color="0.35", linewidth=1.2, zorder=1, label="LLaVA")
        axes.set_title(_panel_title(key), fontsize=10)
        axes.set_xlabel("patches that differ from the background, %")
        axes.set_ylabel("times faster than LLaVA")
        axes.tick_params(labelbottom=True, labelleft=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Time to first token on a known background, against LLaVA")
    # Columns are filled first: each mode above its ideal where there is room for four.
    ncols = 4 if columns > 1 else 2
    legend_inches = 0.12 + 0.21 * -(-7 // ncols)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=ncols, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, legend_inches / height, 1, 1))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "A plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _panels(rows: list[dict]) -> list[tuple]:
    """(shape, device, dtype, batch) of the rows, in the order of `SHAPES`, then by batch."""
    keys = {(row["shape"], row["device"], row["dtype"], row["batch"]) for row in rows}
    return sorted(keys, key=lambda key: (list(SHAPES).index(key[0]), *key[1:]))


def _panel_title(key: tuple) -> str:
    shape, device, dtype, batch = key
    return f"{shape}, batch {batch} ({device}, {dtype})"


def _panel_rows(rows: list[dict], key: tuple) -> list[dict]:
    chosen = [row for row in rows if (row["shape"], row["device"], row["dtype"], row["batch"]) == key]
    return sorted(chosen, key=lambda row: (row["fresh_share"], row["repeats"], MODES.index(row["mode"])))


def _seconds(value: float) -> str:
    return (
        f"{value:.2f} s"
        if value >= 1
        else f"{1000 * value:.0f} ms"
        if value >= 0.1
        else f"{1000 * value:.1f} ms"
    )
