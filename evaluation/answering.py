"""Greedy answers of a model in one of four modes, with every image prepared once however many questions it has.

* ``llava``: the whole image as one group.
* ``split``: the detector's groups.
* ``cached``: as `split`, but vision tokens and prefixes of backgrounds are cached and reused. The answers are those of `split`.
* ``matched``: as `cached`, but a known background replaces the image's own where the matcher allows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from backdrop.hub_export.checkpoint import ADAPTER_FILES, load_checkpoint
from backdrop.hub_export.model_folder import check_config
from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.background_matching_backdrop import BackgroundMatcher
from backdrop.processing.processing_backdrop import BackdropProcessor

MODES = ("llava", "split", "cached", "matched")


def load(
    model: str | Path, device: str = "auto"
) -> tuple[BackdropForConditionalGeneration, BackdropProcessor]:
    """(model, processor) of a folder or a Hub id; `auto` is a GPU if there is one. On a CPU in float32.

    The adapter in a folder is merged into its base.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dtype": torch.float32} if device == "cpu" else {}
    if Path(model, ADAPTER_FILES[0]).is_file():
        merged, processor = load_checkpoint(model)
        return merged.to(device, **options).eval(), processor
    check_config(str(model), BackdropConfig.get_config_dict(model)[0])
    loaded = BackdropForConditionalGeneration.from_pretrained(model, **options).eval().to(device)
    return loaded, BackdropProcessor.from_pretrained(model)


def open_image(image: dict) -> Image.Image:
    """Opens an image stored as `{"path", "bytes"}`, with its alpha channel."""
    source = BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    try:
        opened = Image.open(source)
        opened.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"The image {image.get('path') or 'given as bytes'} cannot be read: {error}"
        ) from error
    return opened


@dataclass(frozen=True)
class PreparedImages:
    """The images of one conversation, ready for any number of questions.

    Attributes:
        pixel_values, patch_mask, group_kind: `[g, 3, S, S]`, `[g, P]`, `[g]`, their groups.
        expansions: what each image's placeholder becomes.
        features: `[n, D]` vision tokens of all groups; None where the model's cache keeps them.
        matched: images whose background was known.
        patches_reused: patches taken from a known background, summed over the images; out of `patches`.
        tokens_reused: vision tokens that the cache held when the images were first encoded, of `tokens`.
    """

    pixel_values: torch.Tensor
    patch_mask: torch.Tensor
    group_kind: torch.Tensor
    expansions: list[str]
    features: torch.Tensor | None
    matched: int
    patches_reused: int
    patches: int
    tokens_reused: int
    tokens: int

    @property
    def reuse(self) -> dict[str, int]:
        """The counts, for a record."""
        names = ("matched", "patches_reused", "patches", "tokens_reused", "tokens")
        return {"images": len(self.expansions), **{name: getattr(self, name) for name in names}}


class Answerer:
    """A model in a mode. Turns background matching and the background cache of the given model and processor on or off.

    Args:
        tolerance: of `matched`, grey levels.
        max_new_tokens: longest answer.
        images_last: the images behind the question, where the chat template leaves them where they are.
    """

    def __init__(
        self,
        model: BackdropForConditionalGeneration,
        processor: BackdropProcessor,
        mode: str,
        tolerance: float = 0.0,
        max_new_tokens: int = 128,
        images_last: bool = False,
    ):
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; wanted one of {', '.join(MODES)}.")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; wanted 1 or more.")
        self.model, self.processor = model, processor
        self.mode, self.max_new_tokens, self.images_last = mode, max_new_tokens, images_last
        processor.disable_background_matching()
        model.disable_background_cache()
        if mode in ("cached", "matched"):
            model.enable_background_cache()
        if mode == "matched":
            processor.enable_background_matching(tolerance)

    def prepare(self, conversations: Sequence[Sequence[Image.Image]]) -> list[PreparedImages]:
        """Groups and vision tokens of the images of each conversation.

        With matching, images are taken one at a time and in order, so that which references they find depends on
        nothing but that order; otherwise all together.
        """
        with torch.inference_mode():
            if self.mode in ("llava", "split"):
                return self._together(conversations)
            return [self._alone(images) for images in conversations]

    @torch.inference_mode()
    def answer(self, prepared: Sequence[PreparedImages], questions: Sequence[str]) -> list[str]:
        """One greedy answer to one question about each conversation's images."""
        texts = [self._prompt(images, question) for images, question in zip(prepared, questions, strict=True)]
        inputs = self.processor.tokenizer(
            texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        )
        visual = self._visual(prepared)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")} | visual
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        out = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _together(self, conversations: Sequence[Sequence[Image.Image]]) -> list[PreparedImages]:
        groups = self._groups([image for images in conversations for image in images])
        features = self._features(groups) if groups["counts"] else []
        parts, first, image = [], 0, 0
        for images in conversations:
            counts = groups["counts"][image : image + len(images)]
            last = first + sum(counts)
            parts.append(self._part(groups, first, last, image, counts, torch.cat(features[first:last])))
            first, image = last, image + len(images)
        return parts

    def _alone(self, images: Sequence[Image.Image]) -> PreparedImages:
        matcher, cache = self.processor.background_matching, self.model.background_cache
        if cache is None:
            raise RuntimeError(
                f"the background cache was disabled; wanted it enabled for mode {self.mode!r}."
            )
        before = _matches(matcher)
        groups = self._groups(images)
        seen = cache.stats()
        self._features(groups)  # the cache keeps them
        now = cache.stats()
        reused, computed = (
            now[name] - seen[name] for name in ("vision_tokens_reused", "vision_tokens_computed")
        )
        after = _matches(matcher)
        return self._part(
            groups,
            0,
            sum(groups["counts"]),
            0,
            groups["counts"],
            None,
            matched=after[0] - before[0],
            patches_reused=after[1] - before[1],
            tokens_reused=reused,
            tokens=reused + computed,
        )

    def _groups(self, images: Sequence[Image.Image]) -> dict:
        if not images:
            raise ValueError("A question has no image; wanted one or more.")
        whole = {"split": False} if self.mode == "llava" else {}
        found = self.processor.image_processor(list(images), return_tensors="pt", **whole)
        expansions = [self.processor.replace_image_token(found, image_idx=i) for i in range(len(images))]
        return {**found, "counts": found["groups_per_image"].tolist(), "expansions": expansions}

    def _features(self, groups: dict) -> list[torch.Tensor]:
        device, dtype = self.model.device, self.model.dtype
        return self.model.get_image_features(
            groups["pixel_values"].to(device, dtype),
            groups["patch_mask"].to(device),
            groups["group_kind"].to(device),
            return_dict=True,
        ).pooler_output

    def _part(
        self,
        groups: dict,
        first: int,
        last: int,
        image: int,
        counts: list[int],
        features: torch.Tensor | None,
        **reuse: int,
    ) -> PreparedImages:
        """Groups `first` to `last`, which are those of `len(counts)` images from number `image` on."""
        patch_mask = groups["patch_mask"][first:last]
        none = {"matched": 0, "patches_reused": 0, "tokens_reused": 0}
        tokens = sum(self.model.base_model.tokens_per_group(patch_mask))
        return PreparedImages(
            pixel_values=groups["pixel_values"][first:last],
            patch_mask=patch_mask,
            group_kind=groups["group_kind"][first:last],
            expansions=groups["expansions"][image : image + len(counts)],
            features=features,
            patches=len(counts) * patch_mask.shape[1],
            **{**none, "tokens": tokens, **reuse},
        )

    def _prompt(self, images: PreparedImages, question: str) -> str:
        pictures, words = [{"type": "image"}] * len(images.expansions), [{"type": "text", "text": question}]
        content = words + pictures if self.images_last else pictures + words
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        parts = text.split(self.processor.image_token)
        if len(parts) != len(images.expansions) + 1:
            raise ValueError(
                f"The prompt has {len(parts) - 1} {self.processor.image_token} placeholders for "
                f"{len(images.expansions)} images; wanted one each: {question[:60]!r}."
            )
        filled = (part + expansion for part, expansion in zip(parts, [*images.expansions, ""], strict=True))
        return "".join(filled)

    def _visual(self, prepared: Sequence[PreparedImages]) -> dict[str, torch.Tensor]:
        if self.model.background_cache is None:
            return {"image_embeds": torch.cat([images.features for images in prepared])}
        # Pixels, so that the cache is used as in production: for vision tokens and for prefixes.
        return {
            "pixel_values": torch.cat([images.pixel_values for images in prepared]).to(self.model.dtype),
            "patch_mask": torch.cat([images.patch_mask for images in prepared]),
            "group_kind": torch.cat([images.group_kind for images in prepared]),
        }


def _matches(matcher: BackgroundMatcher | None) -> tuple[int, int]:
    """Matches so far, and patches taken from them; none without a matcher."""
    if matcher is None:
        return 0, 0
    stats = matcher.stats()
    return stats["matches"], stats["patches_reused"]
