"""What is timed: LLaVA and Backdrop on one set of random weights, each with its processor.

The modes:

- `llava`: `LlavaForConditionalGeneration` with the processor that `AutoProcessor` builds;
- `cold`: Backdrop without cache and matching, the detector on every image;
- `tokens`: matching, and a cache of vision tokens;
- `tokens+prefix`: matching, and a cache of vision tokens and language-model prefixes.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.processing_backdrop import SEPARATOR_TOKENS, BackdropProcessor

from .devices import synchronize
from .frames import Frame
from .planted_detector import PlantedDetector, build_detector
from .shapes import DTYPES, PROMPT, SHAPES, Shape, build_tokenizer

MODES = ("llava", "cold", "tokens", "tokens+prefix")
MATCHED_MODES = MODES[2:]
CACHE_BYTES = 8 * 2**30  # a bound that is never reached: eviction is not what is measured
TOLERANCE, MIN_REUSE = 10, 0.3  # grey levels; the smallest share of patches that a match reuses


def build_llava(shape: Shape, device: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """LLaVA with random weights, built where it will run."""
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(shape.llava_config(), dtype=dtype)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    return model.eval().requires_grad_(False)


def backdrop_config(llava: LlavaConfig) -> BackdropConfig:
    """The configuration of a Backdrop model of LLaVA's shape, with separators, that counts as finetuned on groups."""
    return BackdropConfig(
        vision_config=llava.vision_config,
        text_config=llava.text_config,
        image_token_id=llava.image_token_id,
        separator_token_ids=build_tokenizer().convert_tokens_to_ids(list(SEPARATOR_TOKENS)),
        projector_hidden_act=llava.projector_hidden_act,
        vision_feature_layer=llava.vision_feature_layer,
        vision_feature_select_strategy=llava.vision_feature_select_strategy,
        tie_word_embeddings=llava.tie_word_embeddings,
        trained_on_groups=True,
    )


def sharing_backdrop(llava: LlavaForConditionalGeneration) -> BackdropForConditionalGeneration:
    """A Backdrop model on LLaVA's own weights: no tensor is copied."""
    config = backdrop_config(llava.config)
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
    # The processor asks for the class; it calls no more than what this one has.
    image_processor.set_detector(detector)  # type: ignore[arg-type]
    return BackdropProcessor(image_processor, build_tokenizer())


@dataclass(frozen=True)
class Contender:
    """One mode: model, processor, and the detector that the processor runs (None: it has none)."""

    mode: str
    model: torch.nn.Module
    processor: LlavaProcessor | BackdropProcessor
    detector: PlantedDetector | None

    def first_token(self, frames: Sequence[Frame]) -> tuple[float, dict]:
        """Seconds from the images to the first token of every row, and the model's inputs."""
        images = [frame.image for frame in frames]
        if self.detector is not None:
            self.detector.plant(frames, self.processor.image_processor.model_images(images))
        device = self.model.device
        synchronize(device)
        started = time.perf_counter()
        inputs = self.processor(images=images, text=[PROMPT] * len(images), padding=True, return_tensors="pt")
        inputs = inputs.to(device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        tokens[:, -1].tolist()  # a token is there when the CPU can read it
        synchronize(device)
        return time.perf_counter() - started, inputs

    def store(self, backgrounds: Sequence[Frame]) -> float:
        """Seconds of a call about backgrounds that are not known, which stores them; all others are forgotten."""
        self.model.background_cache.clear()
        self.processor.background_matching.clear()
        return self.first_token(backgrounds)[0]

    def first_token_on_hits(self, frames: Sequence[Frame], backgrounds: int) -> tuple[float, dict]:
        """As `first_token`, for a matched mode whose cache knows the frames' `backgrounds` distinct backgrounds.

        Raises:
            RuntimeError: a background was not known, or prefixes were used where they are off.
        """
        before = self._counters()
        seconds, inputs = self.first_token(frames)
        after = self._counters()
        grew = {name: after[name] - before[name] for name in after}
        # The frames of one background in a batch may share one lookup.
        wanted = {"tokens": backgrounds, "prefix": backgrounds if self.mode == "tokens+prefix" else 0}
        problems = [
            f"{grew[f'{kind}_hits']} {kind} hits and {grew[f'{kind}_misses']} misses, wanted {least or 'no'} hits and no misses"
            for kind, least in wanted.items()
            if grew[f"{kind}_misses"] or grew[f"{kind}_hits"] < least or (grew[f"{kind}_hits"] and not least)
        ]
        if grew["matches"] != len(frames):
            problems.append(f"{grew['matches']} frames matched, wanted {len(frames)}")
        if problems:
            raise RuntimeError(f"Mode {self.mode}, batch {len(frames)}: {'; '.join(problems)}.")
        return seconds, inputs

    def _counters(self) -> dict[str, int]:
        """Counters of a matched mode's cache and matcher."""
        stats = self.model.background_cache.stats()
        counts = {
            name: stats[name] for name in ("tokens_hits", "tokens_misses", "prefix_hits", "prefix_misses")
        }
        return {**counts, "matches": self.processor.background_matching.stats()["matches"]}


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
        self.detector.plant(frames, images)
        synchronize(self.device)
        started = time.perf_counter()
        self.detector.detect(images)
        synchronize(self.device)
        return time.perf_counter() - started


def build_bench(shape_name: str, device: str, dtype: str, detector: PlantedDetector | None = None) -> Bench:
    """Models on one set of weights, and a processor for each mode.

    Args:
        shape_name: of `SHAPES`.
        device: "cpu", "cuda" or "cuda:0".
        dtype: of `DTYPES`.
        detector: what runs wherever a detector is due; None: `build_detector`'s.
    """
    shape = SHAPES[shape_name]
    llava = build_llava(shape, device, DTYPES[dtype])
    detector = detector or build_detector(device)
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
